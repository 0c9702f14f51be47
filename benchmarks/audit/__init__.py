"""The machine code of the Triton kernels, compiled for GPUs that need not be here."""
