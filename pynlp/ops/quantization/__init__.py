"""Quantized weights and their products: schemas, checks, fakes, autograd and the public functions."""
