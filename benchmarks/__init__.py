"""What the kernels reach, beside PyTorch, in one process and on the same tensors."""
