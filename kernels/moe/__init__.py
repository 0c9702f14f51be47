"""Triton kernels of mixtures of experts, and their launchers."""
