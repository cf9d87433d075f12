"""Owns how many images a forward takes where the configuration leaves it to the machine."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from tmpq_exp.cost import AttentionShape, LayerShape

LARGEST = {"cpu": 64, "cuda": 1024}
"""By kind of device: with more images a forward an image gets no cheaper, or by little where a network is small."""

FLOAT_BYTES = 4


def fitting_micro_batch(layers: Sequence[LayerShape], calls_per_step: int, device: torch.device) -> int:
    """Images a forward that memory suffices for, by a bound that needs no trial.

    An image is taken to need all that the layers of a call read, as though nothing were freed between them: skip
    connections, quantized copies and Winograd's tiles lie within. Half of the memory that is free is given to it; the
    rest is for weights kept ready and for feature networks. Where it does not suffice after all, an evaluation goes
    back to half as many (``with_less_memory``).

    Args:
        layers: Layers of the network.
        calls_per_step: Calls of one image a step, 2 with guidance; they run together.
        device: Where images are made.

    Returns:
        A power of two, at most ``LARGEST`` of the kind of device; a power, so that a little more or less free
        memory mostly changes nothing.
    """
    image = FLOAT_BYTES * calls_per_step * sum(map(_num_read, layers))
    fitting = max(1, free_memory(device) // 2 // image)
    return min(LARGEST.get(device.type, LARGEST["cuda"]), 1 << (fitting.bit_length() - 1))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _num_read(shape: LayerShape) -> int:
    """Values that a layer reads for one image; of attention its scores too."""
    scores = shape.heads * shape.queries * shape.keys if isinstance(shape, AttentionShape) else 0
    return shape.num_inputs + scores
