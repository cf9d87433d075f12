"""Image quality: Frechet distance on any feature module, and per-image fidelity against the float model."""
