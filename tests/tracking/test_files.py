"""The other loggers: CSV tables, TensorBoard files, and none, read back from disk."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmpq_exp.config import LoggerConfig, UserError
from tmpq_exp.tracking import Job, NullTracker, Results, Tracker, open_tracker

Trial = Callable[..., dict[str, Any]]

CONFIG = {"seed": 3, "space": {"groups": "free"}}


def log_everything(tracker: Tracker, trial: Trial, picture: Path) -> None:
    Image.fromarray(np.full((4, 6, 3), 255, np.uint8)).save(picture)
    for index in range(3):
        tracker.log_trial(trial(index))
    tracker.log_trial(trial(3, phase="final", name="best", metrics={"fd_digits": 2.5, "psnr_db": None}))
    tracker.log_training(50, {"loss": 0.25})
    tracker.log_results(
        Results({"best/fd_digits": 2.5, "fingerprint/final": "b"}, [picture], bits={"act_bits": [8, 5]})
    )
    tracker.finish()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("starts", [1, 2])
def test_csv_has_a_row_a_trial_and_a_resumed_job_has_none_twice(starts: int, tmp_path: Path, trial: Trial) -> None:
    for _ in range(starts):
        tracker = open_tracker(LoggerConfig(name="csv"), Job(tmp_path, "run", CONFIG))
        log_everything(tracker, trial, tmp_path / "pareto.png")
    rows = rows_of(tmp_path / "csv" / "metrics.csv")
    trials = [row for row in rows if row["trial/index"]]
    assert [row["step"] for row in trials] == ["0", "1", "2", "3"]
    assert [row["trial/search/fd_digits"] for row in trials] == ["9.0", "8.0", "7.0", ""]
    assert trials[3]["trial/final/fd_digits"] == "2.5"
    assert [row["train/loss"] for row in rows if row["train/loss"]] == ["0.25"]
    (summary,) = rows_of(tmp_path / "csv" / "summary" / "metrics.csv")
    assert (summary["best/fd_digits"], summary["fingerprint/final"]) == ("2.5", "b")
    assert "space.groups: free" in (tmp_path / "csv" / "hparams.yaml").read_text()
    assert tracker.notice == f"csv     {tmp_path / 'csv' / 'metrics.csv'}"


def test_csv_is_on_disk_after_every_trial(tmp_path: Path, trial: Trial) -> None:
    tracker = open_tracker(LoggerConfig(name="csv"), Job(tmp_path, "run", CONFIG))
    for index in range(3):
        tracker.log_trial(trial(index))
        assert len(rows_of(tmp_path / "csv" / "metrics.csv")) == index + 1


def test_tensorboard_has_scalars_histograms_and_pictures(tmp_path: Path, trial: Trial) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker(LoggerConfig(name="tensorboard"), Job(tmp_path, "run", CONFIG))
    log_everything(tracker, trial, tmp_path / "pareto.png")
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"histograms": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("trial/search/fd_digits")] == [(0, 9.0), (1, 8.0), (2, 7.0)]
    assert [(e.step, e.value) for e in events.Scalars("trial/final/fd_digits")] == [(3, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(50, 0.25)]
    histogram = events.Histograms("trial/weight_bits")[1].histogram_value
    found = {limit - 0.5: count for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True) if count}
    assert found == {6: 1, 7: 1, 8: 1}
    assert len(events.Histograms("best/act_bits")) == 1
    (picture,) = events.Images("pictures/pareto")
    assert (picture.width, picture.height) == (6, 4)
    assert tracker.notice == f"board   tensorboard --logdir {tmp_path / 'tensorboard'}"


def test_tensorboard_that_is_missing_is_named_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpq_exp.config.root.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"package tensorboard, which is not installed: pip install .*logger=csv"):
        LoggerConfig(name="tensorboard")
    LoggerConfig(name="csv")


def test_none_takes_everything_and_leaves_nothing(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(LoggerConfig(name="none"), Job(tmp_path, "run", {}))
    assert isinstance(tracker, NullTracker)
    log_everything(tracker, trial, tmp_path / "pareto.png")
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.png"]  # the test's own
    assert tracker.notice is None
