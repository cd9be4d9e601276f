"""Schemas, fake kernels, autograd formulas and the public functions."""
