"""Launching, random numbers, integers and rows: what the kernels of all families share."""
