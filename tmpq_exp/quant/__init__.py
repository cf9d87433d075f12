"""Simulated quantization: pure primitives, quantizers, quantized layers, the supernet and its calibration."""
