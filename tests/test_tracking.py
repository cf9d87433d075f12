"""W&B holds what the run logged, offline, and its failures end nothing."""

from __future__ import annotations

import json
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmpq_exp.tracking import NullTracker, WandbTracker

wandb = pytest.importorskip("wandb")

_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def read_offline_file(path: Path) -> list[Any]:
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


def read_finished_file(directory: Path) -> list[Any]:
    """Records of the run's file once it holds the exit code: W&B's service writes on for a moment after ``finish``."""
    deadline = time.monotonic() + 30
    while True:
        records = [record for path in directory.glob("*.wandb") for record in read_offline_file(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"no exit code in {directory}"
        time.sleep(0.05)


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Logged rows, without W&B's own columns."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def trial(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index, "phase": "search", "name": None, "generation": 0, "key": f"{index:016x}", "candidate": {},
        "bitops": 10**9 * (index + 1), "macs": 10**7, "weight_bytes": 4000, "metrics": {"fd_digits": 9.0 - index},
        "num_images": 128, "seed": 1, "fingerprint": "f", "error": None,
    } | changes  # fmt: skip


def entry(name: str) -> dict[str, Any]:
    metrics = {"fd_digits": 3.5, "psnr_db": None}
    return {"name": name, "metrics": metrics, "bitops": 5, "macs": 6, "weight_bytes": 7}


REPORT = {
    "baselines": [entry("w6a6")],
    "best": entry("trial-3"),
    "search": {"num_evaluations": 12},
    "stages": {"search": 1.5},
    "fingerprint": {"search": "a", "final": "b"},
}


@pytest.fixture(autouse=True)
def _own_wandb_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("WANDB_MODE", "")  # an empty variable must not be an error


def test_offline_run_holds_every_trial_and_the_summary(tmp_path: Path) -> None:
    picture = tmp_path / "pareto.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)
    tracker = WandbTracker("tmpq", directory=tmp_path, group="sweep", tags=["demo"], config={"seed": 0}, name="one")
    for index in range(20):
        tracker.log_trial(trial(index))
    tracker.log_trial(trial(20, phase="baseline", name="w6a6", metrics={"fd_digits": None, "psnr_db": float("inf")}))
    tracker.log_summary(REPORT)
    tracker.log_images([picture])
    directory = tracker.directory
    tracker.finish(exit_code=3)

    assert directory is not None
    assert directory.parent == tmp_path / "wandb"
    records = read_finished_file(directory)
    trials = [row for row in history(records) if "trial/index" in row]
    assert [row["trial/index"] for row in trials] == list(range(21))
    assert trials[4]["trial/fd_digits"] == 5.0
    assert trials[4]["trial/bitops"] == 5 * 10**9
    assert trials[20]["trial/phase"] == "baseline"
    assert trials[20]["trial/name"] == "w6a6"
    assert "trial/fd_digits" not in trials[20]
    assert "trial/psnr_db" not in trials[20]
    assert any("pictures/pareto" in key for row in history(records) for key in row)
    kinds = {record.WhichOneof("record_type") for record in records}
    assert {"run", "metric", "exit"} <= kinds
    assert not kinds & {"output", "output_raw"}, "the console must not be captured"
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == ("tmpq", "sweep", "one", ["demo"])
    steps = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert steps["trial/*"] == "trial/index"
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [3]
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["best/fd_digits"] == 3.5
    assert summary["w6a6/bitops"] == 5
    assert "best/psnr_db" not in summary


def test_failure_to_start_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(RuntimeWarning, match="no space left") as caught:  # noqa: PT031
        tracker = WandbTracker("tmpq", directory=tmp_path)
        tracker.log_trial(trial(0))
        tracker.log_summary(REPORT)
        tracker.log_images([tmp_path / "missing.png"])
        tracker.finish()
    assert len(caught) == 1
    assert tracker.directory is None


def test_failure_half_way_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        disabled = False

        def define_metric(self, *_: Any, **__: Any) -> None:
            return None

        def log(self, _: Any) -> None:
            raise ConnectionError("service is gone")

        def finish(self, exit_code: int) -> None:
            raise AssertionError("a broken run is left alone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    tracker = WandbTracker("tmpq", directory=tmp_path)
    with pytest.warns(RuntimeWarning, match="service is gone"):
        tracker.log_trial(trial(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log_trial(trial(1))
        tracker.finish()


def test_ctrl_c_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WandbTracker("tmpq", directory=tmp_path)


def test_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of offline, online, disabled, found 'ofline'"):
        WandbTracker("tmpq", mode="ofline", directory=tmp_path)


def test_null_tracker_takes_everything_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = NullTracker()
    tracker.log_trial(trial(0))
    tracker.log_summary(REPORT)
    tracker.log_images([])
    tracker.finish(1)
    assert not list(tmp_path.iterdir())
