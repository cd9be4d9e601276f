"""Triton kernels, imported only when one of them is called."""
