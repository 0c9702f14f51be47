"""The maths of norms, activations, linear layers and the loss in readable PyTorch."""
