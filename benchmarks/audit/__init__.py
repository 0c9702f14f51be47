"""The audit of the Triton kernels' machine code; what all families share, and a module for each family."""
