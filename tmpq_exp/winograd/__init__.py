"""Winograd convolution: exact transforms, the staged quantized convolution and its scales."""
