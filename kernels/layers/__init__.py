"""Triton kernels of norms, activations and the loss, and their launchers."""
