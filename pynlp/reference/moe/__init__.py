"""Mixtures of experts in readable PyTorch."""
