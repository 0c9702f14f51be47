"""Attention: schemas, argument checks, fakes, autograd and the public functions."""
