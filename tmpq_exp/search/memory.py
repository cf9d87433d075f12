"""Owns what an evaluation does when memory does not suffice: the same again with smaller micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from tmpq_exp.config import UserError
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule

Result = TypeVar("Result")

_CPU_MESSAGES = ("DefaultCPUAllocator", "not enough memory")
"""What PyTorch says on CPUs, in words that have changed between releases."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_oom_error(error):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


def with_less_memory(what: str, micro_batch: int, action: Callable[[int], Result]) -> tuple[Result, int]:
    """Result of an action at a micro-batch, halved until memory suffices.

    Args:
        what: What is done, for the user.
        micro_batch: Images a forward, at least 1.
        action: Takes a micro-batch; it starts from the beginning every time.

    Returns:
        The result, and the micro-batch it was had at.

    Raises:
        UserError: If memory does not suffice for one image a forward.
    """
    while micro_batch >= 1:  # halved in every round
        try:
            return action(micro_batch), micro_batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        garbage_collection_cuda()  # out here, where the error no longer holds the tensors of its frames
        print(f"warning: {what}: out of memory at {micro_batch} images a forward", file=sys.stderr)
        micro_batch //= 2
    raise UserError(
        f"{what}: out of memory even at one image a forward; all evaluations before it are recorded. Free memory "
        "(other processes, quant.cache_max_bytes) and start again with the same hydra.run.dir"
    )


def images_with_less_memory(module: SupernetModule, candidate: Candidate, indices: range, seed: int) -> torch.Tensor:
    """Images of a candidate, ``(N, C, H, W)`` on the CPU: in one forward, or as many as memory asks for."""

    def make(micro_batch: int) -> torch.Tensor:
        parts = [indices[start : start + micro_batch] for start in range(0, len(indices), micro_batch)]
        return torch.cat([module.images(candidate, part, seed).cpu() for part in parts])

    return with_less_memory(f"images of {candidate.key()}", len(indices), make)[0]
