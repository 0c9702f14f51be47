"""The maths of attention in readable PyTorch."""
