"""Owns the cache of what is derived from parameters, under a cap of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch


class Sized(Protocol):
    """What knows how much memory it takes: a tensor, or a layer's Winograd weights."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


SizedT = TypeVar("SizedT", bound=Sized)


class LRUCache:
    """Quantized weights and the like, ready for use; the least recently used ones are dropped above a memory cap.

    Args:
        max_bytes: Cap; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes, self.num_misses = max_bytes, 0, 0
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], SizedT]) -> SizedT:
        """What belongs to a key, computed if it is not there."""
        if key in self._entries:
            self._entries.move_to_end(key)
            found: SizedT = self._entries[key]
            return found
        self.num_misses += 1
        with torch.inference_mode(False), torch.no_grad():  # one kind of tensor, whoever asks first
            value = compute()
        if value.nbytes <= self.max_bytes:
            self._entries[key] = value
            self.num_bytes += value.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.nbytes
        return value

    def clear(self) -> None:
        """Drop everything: the parameters of some quantizer have changed."""
        self._entries.clear()
        self.num_bytes = 0
