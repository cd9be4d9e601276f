"""How good a channel estimate is: metrics, precoding, detection, and a linear estimator to hold every network against.

- :mod:`~csimodels.evaluation.metrics`: NMSE, GCS, SGCS, codeword cosine, CsiNet's rho, sum rate, symbol error ratio.
- :mod:`~csimodels.evaluation.precoding`: zero forcing, regularised, WMMSE and structured precoders.
- :mod:`~csimodels.evaluation.detection`: QAM, linear MMSE and maximum-likelihood detectors.
- :mod:`~csimodels.evaluation.lmmse`: channel reconstruction from a linear codeword with sample statistics.
"""
