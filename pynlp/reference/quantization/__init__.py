"""The formats of quantized weights and their products in readable PyTorch."""
