"""A run that fails, is started again and ends: what W&B has of either start, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.config import UserError, register_schema

pytest.importorskip("wandb")


def run_here(directory: Path) -> None:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        run_job(compose("config", ["tier=smoke", "logger=wandb", "num_threads=null", f"paths.run_dir={directory}"]))


@pytest.mark.slow
def test_every_start_is_a_run_with_its_own_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offline_runs: Callable[[Path], list[Any]],
) -> None:
    directory = tmp_path / "run"

    def refuse(*_: Any) -> None:
        raise UserError("no more")

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    threads = torch.get_num_threads()
    with monkeypatch.context() as failing:
        failing.setattr("tmpq_exp.pipeline.select", refuse)
        with pytest.raises(UserError, match="no more"):
            run_here(directory)
    num_searched = len((directory / "trials.jsonl").read_text().splitlines())
    (failed,) = offline_runs(directory)
    assert failed.exit_code == 2
    assert [row["trial/index"] for row in failed.trials] == list(range(num_searched))
    capsys.readouterr()

    run_here(directory)
    records = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    _, done = offline_runs(directory)
    assert done.exit_code == 0
    assert [row["trial/index"] for row in done.trials] == [record["index"] for record in records]
    assert len(records) > num_searched
    report = json.loads((directory / "report.json").read_text())
    assert done.summary["best/fd_digits"] == report["best"]["metrics"]["fd_digits"]
    assert done.summary["fingerprint/final"] == report["fingerprint"]["final"]
    assert done.config["budget"]["weight_bits"] == 6
    assert any("pictures/samples" in key for row in done.history for key in row)
    (table,) = directory.glob("wandb/offline-run-*/files/media/table/charts/*.table.json")
    searched = [r for r in records if r["phase"] in ("search", "baseline")]
    assert len(json.loads(table.read_text())["data"]) == len(searched)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("wandb   wandb sync ")
    assert torch.get_num_threads() == threads
