"""Every op in readable PyTorch: the default back end, and what the others are compared with."""
