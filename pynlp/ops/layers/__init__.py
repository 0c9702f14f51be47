"""Norms, activations, linear layers and the loss: schemas, fakes, autograd and the public functions."""
