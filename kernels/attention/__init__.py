"""Triton kernels of attention, forward, backward and over a cache, and their launchers."""
