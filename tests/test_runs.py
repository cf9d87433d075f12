"""Run directories of others: found, read without touching them, and logged again to the last trial."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.report.example import candidate, make_report
from tests.tracking.conftest import OfflineRun
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.compare import compare
from tmpq_exp.config import Config, LoggerConfig, PathsConfig, UserError
from tmpq_exp.relog import log_runs
from tmpq_exp.report import write_report_json
from tmpq_exp.runs import differing_settings, past_runs
from tmpq_exp.search.trials import Trial

NUM_TRIALS = 7


def make_run(directory: Path, *, finished: bool = True, task: str = "tmpq_exp.pipeline.run", **settings: Any) -> Path:
    """A run directory as a job leaves it; unfinished, it was killed in the middle of a line."""
    directory.mkdir(parents=True)
    config = {"task": {"_target_": task}, "seed": 0, "logger": {"group": None, "tags": ["mine"]}, **settings}
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config))
    start = {"commit": "0123456789ab", "sweep": "multirun_7", "command": "tmpq-exp"}
    (directory / "environment.json").write_text(json.dumps({"starts": [start]}))
    lines = []
    for index in range(NUM_TRIALS):
        proposed = candidate(index)
        record = Trial(
            index, "search", None, 0, proposed.key(), proposed.to_json(), 10**9, 10, 10, {"fd_digits": 9.0 - index},
            128, 1, "search-f", "state",
        )  # fmt: skip
        lines.append(json.dumps(asdict(record)) + "\n")
    text = "".join(lines)
    (directory / "trials.jsonl").write_text(text if finished else text + lines[0][:40])
    if finished:
        write_report_json(directory / "report.json", make_report())
    return directory


def config_of(tmp_path: Path, *runs: Path, logger: str = "wandb") -> Config:
    paths = PathsConfig(run_dir=str(tmp_path / "out"))
    return Config(runs=[str(run) for run in runs], logger=LoggerConfig(name=logger), paths=paths)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_sweep_is_its_jobs_in_their_order(tmp_path: Path) -> None:
    for index in (10, 2, 0):
        make_run(tmp_path / "sweep" / f"{index}_seed={index}", finished=index != 2, seed=index)
    (tmp_path / "sweep" / "notes").mkdir()
    alone = make_run(tmp_path / "alone", seed=5)
    runs = past_runs([str(tmp_path / "sweep"), str(alone)])
    assert [run.name for run in runs] == ["0_seed=0", "2_seed=2", "10_seed=10", "alone"]
    assert [run.report is not None for run in runs] == [True, False, True, True]
    assert [len(run.trials) for run in runs] == [NUM_TRIALS] * 4
    assert differing_settings(runs) == [{"seed": 0}, {"seed": 2}, {"seed": 10}, {"seed": 5}]
    assert runs[1].warnings == ["trials.jsonl: its last line was cut after 40 bytes and is left out"]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "no run directory given"),
        (["nowhere"], "nowhere is no directory"),
        (["empty"], "empty is no run directory and holds none"),
        (["run", "run"], "run is given more than once"),
        (["damaged"], r"damaged/report.json is no report of this version"),
        (["foreign"], r"foreign/config.yaml holds no configuration"),
    ],
)
def test_what_is_no_run_is_named(runs: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(Path("run"))
    (make_run(Path("damaged")) / "report.json").write_text('{"schema": 1}')
    (make_run(Path("foreign")) / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=f"runs: {said}"):
        past_runs(runs)


def test_a_killed_run_loses_nothing_that_its_trials_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    killed, done = make_run(tmp_path / "killed", finished=False), make_run(tmp_path / "done")
    before = files_of(killed)
    log_runs(config_of(tmp_path, killed, done), {})
    assert files_of(killed) == before, "the run itself is left as it is, its cut line too"
    for directory, status in ((killed, 1), (done, 0)):
        (folder,) = (directory / "wandb").glob("offline-run-*")
        logged = OfflineRun(folder)
        assert [row["trial/index"] for row in logged.trials] == list(range(NUM_TRIALS))
        assert [row["trial/search/fd_digits"] for row in logged.trials] == [9.0 - i for i in range(NUM_TRIALS)]
        assert logged.exit_code == status
        (start, *_) = logged.of_kind("run")
        assert (start.run_group, start.display_name, list(start.tags)) == ("multirun_7", directory.name, ["mine"])
        assert [artifact.type for artifact in logged.of_kind("artifact")].count("trials") == 1
        assert "_wandb.visualize.charts/quality_against_bitops" in logged.config
        assert ("best/fd_digits" in logged.summary) == (status == 0)
    captured = capsys.readouterr()
    assert f"logged  {killed}: 7 trials, not finished" in captured.out
    assert captured.out.count("wandb sync ") == 2
    assert "its last line was cut" in captured.err


def test_other_tasks_and_no_logger_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="logger=none logs nothing"):
        log_runs(config_of(tmp_path, run, logger="none"), {})
    training = make_run(tmp_path / "training", task="tmpq_exp.train.train")
    with pytest.raises(UserError, match="is of task=train; task=log takes run and classify"):
        log_runs(config_of(tmp_path, training), {})
    with pytest.raises(UserError, match="is of task=train; task=report compares runs of task=run"):
        compare(config_of(tmp_path, training), {})


def test_task_report_writes_a_page_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "sweep" / f"{i}_seed={i}", seed=i) for i in range(2)]
    killed = make_run(tmp_path / "killed", finished=False)
    compare(config_of(tmp_path, tmp_path / "sweep", killed), {"seed": 0})
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert 'href="../sweep/0_seed%3D0/report.html"' not in page, "no link to a page that is not there"
    assert "seed=1" in page
    assert (tmp_path / "out" / "comparison.csv").read_text().count("\n") == 1 + 2 * 5 + 1
    out = capsys.readouterr().out
    assert f"csv     {tmp_path / 'out' / 'comparison.csv'}" in out
    (runs[0] / "report.html").touch()
    compare(config_of(tmp_path, tmp_path / "sweep"), {"seed": 0})
    assert 'href="../sweep/0_seed%3D0/report.html"' in (tmp_path / "out" / "comparison.html").read_text()
    with pytest.raises(UserError, match=r"none of the 1 runs is finished \(no report.json\)"):
        compare(config_of(tmp_path, killed), {"seed": 0})


def test_every_task_that_leaves_a_run_directory_is_known() -> None:
    from tmpq_exp.runs import KINDS

    targets = {str(OmegaConf.load(path).get("_target_")) for path in (conf_dir() / "task").glob("*.yaml")}
    assert set(KINDS) <= targets
