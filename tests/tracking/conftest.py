"""Reads the files of offline W&B runs back, and keeps W&B's own folders inside the test."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def _records(path: Path) -> list[Any]:
    """Records of a ``.wandb`` file: LevelDB log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts, records = path.read_bytes(), _HEADER, b"", []
    while offset + _RECORD_HEADER <= len(data):
        if _BLOCK - offset % _BLOCK < _RECORD_HEADER:
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + _RECORD_HEADER])
        if offset + _RECORD_HEADER + length > len(data):
            break  # still being written
        body = data[offset + _RECORD_HEADER : offset + _RECORD_HEADER + length]
        offset += _RECORD_HEADER + length
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
    return records


class OfflineRun:
    """What a finished offline W&B run holds.

    W&B's service writes on for a moment after ``finish``: reading waits for the exit code.
    """

    def __init__(self, directory: Path) -> None:
        deadline = time.monotonic() + 30
        while True:
            self.records = [record for path in directory.glob("*.wandb") for record in _records(path)]
            if self.of_kind("exit"):
                return
            assert time.monotonic() < deadline, f"no exit code in {directory}"
            time.sleep(0.05)

    def of_kind(self, kind: str) -> list[Any]:
        """Contents of the records of a kind."""
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    @property
    def exit_code(self) -> int:
        """Exit status that W&B shows."""
        (found,) = self.of_kind("exit")
        return int(found.exit_code)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Logged rows, without W&B's own columns."""
        rows = [_values(record.item) for record in self.of_kind("history")]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Rows of the history that are trials."""
        return [row for row in self.history if "trial/index" in row]

    @property
    def summary(self) -> dict[str, Any]:
        """The last summary."""
        return {key: value for record in self.of_kind("summary") for key, value in _values(record.update).items()}

    @property
    def config(self) -> dict[str, Any]:
        """Configuration under dotted names."""
        (run, *_) = self.of_kind("run")
        values = _values(run.config.update, ".")
        return values | {k: v for record in self.of_kind("config") for k, v in _values(record.update, ".").items()}


def _values(items: Any, joint: str = "/") -> dict[str, Any]:
    return {item.key or joint.join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def offline_runs() -> Callable[[Path], list[OfflineRun]]:
    """Offline W&B runs of a run directory, in the order of their start."""
    return lambda directory: [OfflineRun(path) for path in sorted((directory / "wandb").glob("offline-run-*"))]


@pytest.fixture(autouse=True)
def _own_wandb_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # an empty variable must not be an error
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def trial() -> Callable[..., dict[str, Any]]:
    """Makes a record of ``trials.jsonl``."""

    def make(index: int, **changes: Any) -> dict[str, Any]:
        allocation = {"weight_bits": [8, 6, 6 + index % 2], "act_bits": [8, 8, 5], "tiles": [0, 0, 0]}
        return {
            "index": index, "phase": "search", "name": None, "generation": 0, "key": f"{index:016x}",
            "candidate": {"timesteps": [9, 4, 0], "allocations": [allocation]},
            "bitops": 10**9 * (index + 1), "macs": 10**7, "weight_bytes": 4000, "metrics": {"fd_digits": 9.0 - index},
            "num_images": 128, "seed": 1, "fingerprint": "f", "state": "s", "error": None,
        } | changes  # fmt: skip

    return make
