"""Launches, integers, random numbers, rows and products, which the kernels of all families share."""
