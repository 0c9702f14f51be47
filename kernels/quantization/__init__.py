"""Triton kernels of quantized weights, and their launchers."""
