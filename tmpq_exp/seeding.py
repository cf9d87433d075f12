"""One seed, named streams: every random number of a run comes from a generator made here."""

from __future__ import annotations

import hashlib
import json

import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """Seed of the stream with these names, in [0, 2**53), exact in JSON; different names give independent streams."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11


def stream(seed: int, *names: str | int) -> torch.Generator:
    """CPU generator of the stream with these names."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))
