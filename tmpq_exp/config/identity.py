"""Owns when two configurations are the same: content hashes, dotted keys, and the parts that change no result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

VOLATILE_KEYS = ("logger", "paths", "runs", "sweep", "executor")
"""Parts of the configuration that do not change results; a run may be resumed with others."""

VOLATILE_TRAINER_KEYS = ("devices", "num_nodes", "strategy")
"""Settings of the Trainer that only say how many processes share the work."""


def digest(value: Any) -> str:
    """Content hash of a JSON value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a resolved configuration that make a run what it is."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    trainer = kept.get("trainer")
    if isinstance(trainer, Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in VOLATILE_TRAINER_KEYS}
    return kept
