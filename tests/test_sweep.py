"""Sweeps as a user runs them: a directory a job, nothing done twice, nothing lost, and one page that says it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.report.example import make_report
from tests.running import wait_until
from tmpq_exp import __main__ as command_line
from tmpq_exp import jobs, locks, sweep_end
from tmpq_exp.job_record import RECORD_NAME, JobRecord, JobState, read_record, write_record
from tmpq_exp.report import write_report_json
from tmpq_exp.report.content import number
from tmpq_exp.sweep import conclude, swept_jobs

COSTS = ("task=cost", "logger=none", "cost.weight_bits=8,33")
"""Two cheap jobs, of which the second is refused."""

TINY = (
    *("debug=tiny", "calibration=ranges", "space.num_inference_steps=2", "evaluation.reference_steps=2"),
    *("evaluation.num_images=8", "evaluation.num_finalists=1", "evaluation.micro_batch=8", "objective.num_images=8"),
    *("objective.control_images=8", "objective.proxy_images=8", "search.population_size=4", "search.num_crossovers=4"),
    *("winograd.report_tiles=[]", "winograd.learning.num_steps=1"),
)
"""The whole line, as small as it gets."""

Tmpq = Callable[..., int]


@pytest.fixture
def tmpq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tmpq:
    """The command line in this process; gives the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tmpq-exp", *arguments])
        monkeypatch.setattr(sweep_end, "_directories", [])
        GlobalHydra.instance().clear()
        try:
            command_line.main()
        except SystemExit as end:
            return int(str(end.code))
        return 0

    return run


def directories(place: Path) -> list[Path]:
    return sorted((path.parent for path in place.glob(f"*/{RECORD_NAME}")), key=lambda path: number_of(path))


def number_of(directory: Path) -> int:
    record = read_record(directory)
    assert record is not None
    return record.number


def test_finished_jobs_are_skipped_and_failed_ones_retried_on_demand(
    tmpq: Tmpq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tmpq("--multirun", *COSTS, "hydra.sweep.dir=sweep") == 2
    place = tmp_path / "sweep"
    good, bad = directories(place)
    assert all(len(path.name) == 16 and set(path.name) <= set("0123456789abcdef") for path in (good, bad))
    assert sorted(path.name for path in bad.iterdir()) == [".lock", RECORD_NAME]
    cause = "cost.weight_bits must be in 2..16 or 32 (float), found 33"
    first = capsys.readouterr()
    assert f"job 1 (cost.weight_bits=33): {cause}" in first.err
    assert "1 failed; the same command with hydra.sweep.dir=sweep sweep.retry_failed=true goes on" in first.err
    assert f"sweep   {Path('sweep') / 'sweep.html'}" in first.out
    done = read_record(good)
    assert done is not None
    assert (done.state, done.exit_status, done.cause) == (JobState.FINISHED, 0, None)
    before = (good / "cost.json").stat().st_mtime_ns

    assert tmpq("--multirun", *COSTS, "hydra.sweep.dir=sweep") == 2
    second = capsys.readouterr()
    assert "job 0 (cost.weight_bits=8): finished before, skipped" in second.err
    assert f"job 1 (cost.weight_bits=33): failed before ({cause}); sweep.retry_failed=true" in second.err
    assert (good / "cost.json").stat().st_mtime_ns == before
    assert read_record(good) == done

    write_record(bad, JobRecord(1, ["cost.weight_bits=33"], "cost.weight_bits=33", JobState.FAILED, 1, "the disk"))
    assert tmpq("--multirun", *COSTS, "hydra.sweep.dir=sweep", "sweep.retry_failed=true") == 2
    again = read_record(bad)
    assert again is not None
    assert (again.state, again.exit_status, again.cause) == (JobState.FAILED, 2, cause)
    assert (good / "cost.json").stat().st_mtime_ns == before
    assert directories(place) == [good, bad], "another key of the sweep is no other job"


def test_the_page_and_the_table_say_state_cause_and_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = make_report()
    jobs_of = {
        "a": JobRecord(0, ["seed=0", "task=run"], "seed=0", JobState.FINISHED, 0, None, 61.2),
        "b": JobRecord(1, ["seed=-1", "task=run"], "seed=-1", JobState.FAILED, 2, "found <script>alert(1)</script>"),
        "c": JobRecord(2, ["seed=[red]</td>", "task=run"], "x"),
        "d": JobRecord(3, ["seed=3", "task=run"], "seed=3", JobState.FINISHED, 0),
    }
    for name, record in jobs_of.items():
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
    (tmp_path / "a" / "config.yaml").write_text("task: {_target_: tmpq_exp.pipeline.run}\n")
    write_report_json(tmp_path / "a" / "report.json", report)
    (tmp_path / "a" / "report.html").touch()
    (tmp_path / "d" / "config.yaml").write_text("- 1\n")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / RECORD_NAME).write_text("{")
    assert conclude(tmp_path) == 2
    captured = capsys.readouterr()
    quality = f"fd_digits {number(report['best']['metrics']['fd_digits'])}"
    for said in ("finished", "failed", "stopped", "seed=[red]</td>", "job.json is", "damaged", quality, "61"):
        assert said in captured.out
    assert "1 failed and 2 stopped; the same command with hydra.sweep.dir=" in captured.err
    page = (tmp_path / "sweep.html").read_text()
    assert "2 finished, 1 failed, 2 stopped" in page
    assert "holds no configuration" in page
    assert quality in page
    assert '<a href="a/report.html">seed=0</a>' in page
    assert "seed=[red]&lt;/td&gt;" in page
    assert "<script" not in page
    assert "seed=[red]</td>" not in page
    assert [job.number for job in swept_jobs(tmp_path)] == [0, 1, 2, 3, None]


@pytest.mark.parametrize("runs", ["[]", "[empty]", "[gone]"])
def test_what_is_no_sweep_is_named(runs: str, tmpq: Tmpq, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert tmpq("task=sweep", f"runs={runs}") == 2
    assert "runs: " in capsys.readouterr().err


def test_a_job_at_which_another_process_is_is_left_to_it(
    tmpq: Tmpq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = ("--multirun", "task=cost", "logger=none", "seed=0", "hydra.sweep.dir=sweep")
    assert tmpq(*sweep) == 0
    (first,) = directories(tmp_path / "sweep")
    record = read_record(first)
    assert record is not None
    write_record(first, JobRecord(0, record.overrides, record.name))  # as a kill leaves it
    assert [job.state for job in swept_jobs(tmp_path / "sweep")] == [JobState.STOPPED]
    (first / "cost.json").unlink()
    code = (
        "import time; from pathlib import Path; from tmpq_exp import locks\n"
        f"locks.hold(Path({str(first / '.lock')!r})); print('held', flush=True); time.sleep(60)"
    )
    capsys.readouterr()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert tmpq(*sweep) == 0
        captured = capsys.readouterr()
        assert f"job 0 (seed=0): left to another process (process {other.pid} on " in captured.err
        assert "running" in captured.out
        assert not (first / "cost.json").exists()
        other.kill()
        other.wait()
    # started again by hand: a lock that a kill left is no obstacle, and the sweep knows of it
    assert tmpq("task=cost", "logger=none", f"hydra.run.dir={first}") == 0
    assert (first / "cost.json").exists()
    assert [job.state for job in swept_jobs(tmp_path / "sweep")] == [JobState.FINISHED]


def test_what_nobody_foresaw_is_one_jobs_affair(
    tmpq: Tmpq, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def fail_first(_: object) -> None:
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("shapes differ")

    monkeypatch.setattr(jobs, "run_job", fail_first)
    assert tmpq("--multirun", "logger=none", "seed=0,1", "hydra.sweep.dir=sweep") == 1
    bad, _ = directories(tmp_path / "sweep")
    assert "unexpected error RuntimeError: shapes differ; the traceback is in " in capsys.readouterr().err
    assert "Traceback" in (bad / "crash.log").read_text()
    assert 'crash.log">seed=0</a>' in (tmp_path / "sweep" / "sweep.html").read_text()
    assert [job.state for job in swept_jobs(tmp_path / "sweep")] == [JobState.FAILED, JobState.FINISHED]
    assert len(seen) == 2


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tmpq_exp", *arguments], cwd=cwd, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(command_line.__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)], ids=lambda x: x[0])
def test_a_killed_process_of_a_launcher_costs_no_more_than_what_was_in_flight(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    if launcher[0] == "submitit_local":
        pytest.importorskip("submitit", reason="needs the extra cluster")
    alone = start(tmp_path, *TINY, "hydra.run.dir=alone")
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, output
    sweep = ("--multirun", f"hydra/launcher={launcher[0]}", *launcher[1:], *TINY, "seed=0,1", "hydra.sweep.dir=sweep")
    process, place = start(tmp_path, *sweep), tmp_path / "sweep"
    wait_until(lambda: len(list(place.glob("*/trials.jsonl"))) == 2 or process.poll() is not None)
    worker = json.loads((next(place.glob("*/trials.jsonl")).parent / ".lock").read_text())["pid"]
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "tmpq-exp: hydra/launcher: a job's process was killed, or memory did not suffice for it" in output
    assert "unexpected error" not in output
    assert "stopped" in output
    assert "goes on, and runs no finished job again" in output
    wait_until(lambda: not any(locks.is_held(path / ".lock") for path in directories(place)), "a job goes on for ever")
    again = start(tmp_path, *sweep)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert [job.state for job in swept_jobs(place)] == [JobState.FINISHED, JobState.FINISHED]
    first = directories(place)[0]
    assert (first / "trials.jsonl").read_bytes() == (tmp_path / "alone" / "trials.jsonl").read_bytes()
    if launcher[0] == "joblib":
        assert "Best found" in (first / "run.log").read_text()


@pytest.mark.slow
def test_two_sweeps_started_at_once_share_the_work(tmp_path: Path) -> None:
    sweep = ("--multirun", *TINY, "seed=0,1", "hydra.sweep.dir=sweep")
    both = [start(tmp_path, *sweep) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    found = directories(tmp_path / "sweep")
    assert len(found) == 2
    for directory in found:
        indices = [json.loads(line)["index"] for line in (directory / "trials.jsonl").read_bytes().splitlines()]
        assert indices == list(range(len(indices)))
        assert len(json.loads((directory / "environment.json").read_text())["starts"]) == 1, "nobody did it again"
    assert any("left to another process" in output for output in outputs)


@pytest.mark.slow
def test_submitit_runs_jobs_in_processes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra cluster")
    done = start(tmp_path, "--multirun", "hydra/launcher=submitit_local", *COSTS, "hydra.sweep.dir=sweep")
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 2, output
    assert [job.state for job in swept_jobs(tmp_path / "sweep")] == [JobState.FINISHED, JobState.FAILED]
