"""Mixtures of experts: schemas, checks, fakes, autograd and the public functions."""
