"""Models, channels, training and experiments for AI-based CSI feedback, on the kernels of :mod:`csikernels`."""

__version__ = "0.1.0"
