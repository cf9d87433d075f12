"""The values a search is about: bits and tile of every layer, and the timesteps that are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOAT_BITS = 32
"""Bit width that stands for "not quantized"; costs count it as 32 x 32."""

DIRECT_TILE = 0
"""Tile size that stands for direct convolution; any other tile is the m of F(m, r)."""


@dataclass(frozen=True)
class Allocation:
    """Bits and tile of every quantizable layer, in the order of the network's layer list.

    Args:
        weight_bits: One entry a layer. For the products of an attention layer, which have no weights, the
            entry holds the bits of the softmax output.
        act_bits: One entry a layer. For an attention layer: the bits of q, k and v.
        tiles: One entry a layer: ``DIRECT_TILE`` or the m of F(m, r).
    """

    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    tiles: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.weight_bits) == len(self.act_bits) == len(self.tiles):
            raise ValueError(
                f"weight_bits, act_bits and tiles must have one entry a layer each, found "
                f"{len(self.weight_bits)}, {len(self.act_bits)} and {len(self.tiles)} entries"
            )

    def __len__(self) -> int:
        return len(self.weight_bits)


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Args:
        timesteps: Kept timesteps in sampling order, strictly descending.
        allocations: One allocation shared by all steps, or one a kept timestep.
    """

    timesteps: tuple[int, ...]
    allocations: tuple[Allocation, ...]

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise ValueError("timesteps must not be empty")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must be strictly descending, found {list(self.timesteps)}")
        if len(self.allocations) not in (1, len(self.timesteps)):
            raise ValueError(
                f"allocations must have 1 entry or one a timestep ({len(self.timesteps)}), "
                f"found {len(self.allocations)}"
            )

    def allocation_at(self, step_index: int) -> Allocation:
        """Allocation of the step with this index (0 is the first, noisiest step)."""
        return self.allocations[0 if len(self.allocations) == 1 else step_index]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, ready for ``json.dumps``."""
        return {
            "timesteps": list(self.timesteps),
            "allocations": [
                {"weight_bits": list(a.weight_bits), "act_bits": list(a.act_bits), "tiles": list(a.tiles)}
                for a in self.allocations
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Inverse of ``to_json``.

        Raises:
            ValueError: If a key is missing or an entry is not an integer.
        """
        try:
            allocations = tuple(
                Allocation(*(_integers(a[key], key) for key in ("weight_bits", "act_bits", "tiles")))
                for a in data["allocations"]
            )
            return cls(_integers(data["timesteps"], "timesteps"), allocations)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a candidate: {error!r} while reading it") from error

    def key(self) -> str:
        """Content hash, 16 hex digits: equal candidates have equal keys on every machine."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int for v in values):
        raise ValueError(f"{name} must be a list of integers, found {values!r}")
    return tuple(values)
