"""W&B holds what the run logged, offline, and its failures end nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmpq_exp.config import LoggerConfig
from tmpq_exp.tracking import Job, Results, finishing, open_tracker
from tmpq_exp.tracking.records import quality_chart

wandb = pytest.importorskip("wandb")

Trial = Callable[..., dict[str, Any]]


def job_in(directory: Path, kind: str = "run") -> Job:
    environment = {"commit": "0123456789ab-dirty", "sweep": "multirun_1", "packages": {"torch": "2.15.0"}}
    return Job(directory, kind, {"seed": 3, "space": {"groups": "free"}}, environment)


@pytest.fixture
def finished(tmp_path: Path, trial: Trial, offline_runs: Any) -> Any:
    """An offline run of 21 trials with everything that a job leaves behind, which failed with status 3."""
    directory = tmp_path / "0_seed=3"
    directory.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(directory / "pareto.png")
    trials = [trial(index) for index in range(20)]
    metrics = {"fd_digits": None, "psnr_db": float("inf")}
    trials.append(trial(20, phase="baseline", name="w6a6", metrics=metrics))
    (directory / "trials.jsonl").write_text("\n".join(json.dumps(record) for record in trials[:20]) + "\n")
    tracker = open_tracker(LoggerConfig(project="tmpq", tags=["demo"]), job_in(directory), trials[:5])
    for record in trials[5:]:
        tracker.log_trial(record)
    tracker.log_results(
        Results(
            {"best/fd_digits": 3.5, "w6a6/bitops": 5, "fingerprint/final": "b"},
            [directory / "pareto.png"],
            directory / "trials.jsonl",
            trials,
            quality_chart(trials),
            {"weight_bits": [8, 6, 6]},
        )
    )
    tracker.finish(exit_code=3)
    (run,) = offline_runs(directory)
    return run, tracker, directory


def test_a_relative_directory_is_meant_from_here_whichever_folder_the_service_started_in(
    tmp_path: Path, trial: Trial, offline_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    open_tracker(LoggerConfig(), job_in(tmp_path / "first")).finish()  # by now the service has started
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(LoggerConfig(), job_in(Path(".")))
    tracker.log_trial(trial(0))
    tracker.finish()
    (run,) = offline_runs(tmp_path)
    assert [row["trial/index"] for row in run.trials] == [0]


def test_every_trial_is_a_step_with_its_own_index(finished: Any) -> None:
    run, _, _ = finished
    assert [row["trial/index"] for row in run.trials] == list(range(21))
    assert run.trials[4]["trial/search/fd_digits"] == 5.0
    assert run.trials[4]["trial/bitops"] == 5 * 10**9
    assert run.trials[4]["trial/num_steps"] == 3
    assert run.trials[20]["trial/phase"] == "baseline"
    assert run.trials[20]["trial/name"] == "w6a6"
    assert not [key for key in run.trials[20] if key.endswith(("fd_digits", "psnr_db"))]
    steps = {metric.glob_name: metric.step_metric for metric in run.of_kind("metric")}
    assert steps["trial/*"] == "trial/index"


def test_bits_are_histograms_with_a_bin_a_width(finished: Any) -> None:
    run, _, _ = finished
    (best,) = [row for row in run.history if "best/weight_bits/values" in row]
    for row, name, counts in (
        (run.trials[4], "trial/weight_bits", {6: 2, 8: 1}),
        (run.trials[5], "trial/weight_bits", {6: 1, 7: 1, 8: 1}),
        (run.trials[4], "trial/act_bits", {5: 1, 8: 2}),
        (best, "best/weight_bits", {6: 2, 8: 1}),
    ):
        assert row[f"{name}/_type"] == "histogram"
        assert row[f"{name}/bins"] == [bits - 0.5 for bits in range(2, 18)]
        assert row[f"{name}/values"] == [counts.get(bits, 0) for bits in range(2, 17)]


def test_a_run_says_which_job_of_which_sweep_it_is(finished: Any) -> None:
    run, _, _ = finished
    (start, *_) = run.of_kind("run")
    assert (start.project, start.run_group, start.job_type, start.display_name, list(start.tags)) == (
        "tmpq", "multirun_1", "run", "0_seed=3", ["demo"]
    )  # fmt: skip
    assert start.git.commit == "0123456789ab"
    text = {str(key): value for key, value in run.config.items()}
    assert text["seed"] == 3
    assert text["space"]["groups"] == "free"
    assert text["environment"]["commit"] == "0123456789ab-dirty"
    assert run.exit_code == 3
    kinds = {record.WhichOneof("record_type") for record in run.records}
    assert not kinds & {"output", "output_raw"}, "the console must not be captured"


def test_quality_against_bitops_is_a_chart_of_its_own(finished: Any) -> None:
    run, _, directory = finished
    panel = json.loads(json.dumps(run.config["_wandb.visualize.charts/quality_against_bitops"]))
    assert panel["panel_config"]["fieldSettings"] == {"x": "GBitOPs", "y": "fd_digits"}
    (file,) = directory.glob("wandb/offline-run-*/files/media/table/charts/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["GBitOPs", "fd_digits", "name"]
    assert table["data"] == [[index + 1.0, 9.0 - index, "candidate"] for index in range(20)]


def test_trials_are_an_artifact_whose_files_lie_in_the_run_directory(finished: Any) -> None:
    run, _, directory = finished
    (artifact,) = [found for found in run.of_kind("artifact") if found.type == "trials"]
    contents = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(contents) == {"trials.jsonl", "trials.table.json"}
    for entry in contents.values():
        assert Path(entry.local_path).resolve().is_relative_to(directory.resolve())
    assert Path(contents["trials.jsonl"].local_path).read_bytes() == (directory / "trials.jsonl").read_bytes()
    table = json.loads(Path(contents["trials.table.json"].local_path).read_text())
    assert len(table["data"]) == 21
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows[3]["search/fd_digits"] == 6.0
    assert rows[20]["search/fd_digits"] is None
    assert {row["fingerprint"] for row in rows} == {"f"}


def test_summary_pictures_and_the_command_to_upload(finished: Any) -> None:
    run, tracker, directory = finished
    assert run.summary["best/fd_digits"] == 3.5
    assert run.summary["w6a6/bitops"] == 5
    assert any("pictures/pareto" in key for row in run.history for key in row)
    assert tracker.notice is not None
    command, place = tracker.notice.removeprefix("wandb ").strip().rsplit(" ", 1)
    assert command == "wandb sync"
    assert [Path(place.strip("'"))] == list(directory.glob("wandb/offline-run-*"))


def test_training_has_its_own_axis(tmp_path: Path, offline_runs: Any) -> None:
    tracker = open_tracker(LoggerConfig(), job_in(tmp_path, "train"))
    for step in (50, 100):
        tracker.log_training(step, {"loss": 1 / step})
    tracker.finish()
    (run,) = offline_runs(tmp_path)
    assert [(row["train/step"], row["train/loss"]) for row in run.history] == [(50, 0.02), (100, 0.01)]
    assert {m.glob_name: m.step_metric for m in run.of_kind("metric")}["train/*"] == "train/step"
    assert (run.of_kind("run")[0].job_type, run.exit_code) == ("train", 0)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (ValueError("not ours"), 1), (ZeroDivisionError(), 1)]
)
def test_the_exit_status_is_that_of_the_job(
    error: BaseException, status: int, tmp_path: Path, offline_runs: Any
) -> None:
    with pytest.raises(type(error)), finishing(open_tracker(LoggerConfig(), job_in(tmp_path))):
        raise error
    assert offline_runs(tmp_path)[0].exit_code == status


def said_once(capsys: pytest.CaptureFixture[str], reason: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"warning: tracking with W&B stopped ({reason}")
    assert "task=log" in line


def test_failure_to_start_is_said_once_and_the_run_goes_on(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = open_tracker(LoggerConfig(), job_in(tmp_path), [trial(0)])
    tracker.log_trial(trial(1))
    tracker.log_training(1, {})
    tracker.log_results(Results({}, [tmp_path / "missing.png"]))
    tracker.finish()
    assert tracker.notice is None
    said_once(capsys, "no space left on device")


def test_failure_half_way_is_said_once(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def define_metric(self, *_: Any, **__: Any) -> None:
            return None

        def log(self, _: Any) -> None:
            raise ConnectionError("service is gone\nand more")

        def finish(self, exit_code: int) -> None:
            raise AssertionError("a broken run is left alone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    tracker = open_tracker(LoggerConfig(), job_in(tmp_path))
    for index in range(3):
        tracker.log_trial(trial(index))
    tracker.finish()
    said_once(capsys, "service is gone)")


def test_ctrl_c_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_tracker(LoggerConfig(), job_in(tmp_path))
