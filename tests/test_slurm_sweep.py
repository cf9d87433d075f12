"""Sweeps whose jobs go through SLURM: what is asked of it, what comes back, and what a host without it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="needs the extra cluster")

from tests import fake_slurm
from tests.running import TIMEOUT, TINY, num_trials, run_here, wait_until
from tmpq_exp.job_record import JobState
from tmpq_exp.sweep import swept_jobs

COSTS = ("task=cost", "logger=none", "cost.weight_bits=8,33")
"""Two cheap jobs, of which the second is refused."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where commands of SLURM are put."""
    path = tmp_path / "slurm"
    path.mkdir()
    return path


def start(cwd: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """A sweep by ``submitit_slurm``."""
    return subprocess.Popen(
        [sys.executable, "-m", "tmpq_exp", "--multirun", "hydra/launcher=submitit_slurm", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_jobs_go_through_slurm_with_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    asked = ("partition=gpu", "gpus_per_node=1", "cpus_per_task=3", "mem_gb=16", "timeout_min=600", "account=lab")
    overrides = [f"hydra.launcher.{setting}" for setting in asked]
    environment = fake_slurm.install(folder, *fake_slurm.COMMANDS)
    process = start(tmp_path, environment, *overrides, *COSTS, "hydra.sweep.dir=sweep")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, output
    assert [job.state for job in swept_jobs(tmp_path / "sweep")] == [JobState.FINISHED, JobState.FAILED]
    assert "cost.weight_bits must be in 2..16 or 32 (float), found 33" in output
    options = fake_slurm.submitted(folder)
    expected = {
        **{"partition": "gpu", "gpus-per-node": "1", "cpus-per-task": "3", "mem": "16GB", "time": "600"},
        **{"account": "lab", "array": "0-1%2", "nodes": "1", "ntasks-per-node": "1", "job-name": "tmpq_exp"},
    }
    assert options.items() >= expected.items()
    assert Path(options["output"]).is_relative_to(tmp_path / "sweep" / ".submitit")


@pytest.mark.slow
@pytest.mark.parametrize("num_timeouts", [0, 1])
def test_a_job_that_reaches_its_time_limit_is_queued_again_as_often_as_is_asked_for(
    num_timeouts: int, folder: Path, tmp_path: Path
) -> None:
    alone, place = tmp_path / "alone", tmp_path / "sweep"
    run_here(alone, *TINY, "num_threads=1", "seed=1")
    limits = ("hydra.launcher.timeout_min=5", f"hydra.launcher.max_num_timeout={num_timeouts}")
    environment = fake_slurm.install(folder, *fake_slurm.COMMANDS)

    def sweep(*further: str) -> subprocess.Popen[str]:
        return start(tmp_path, environment, *limits, *TINY, "num_threads=1", f"hydra.sweep.dir={place}", *further)

    def directory() -> Path:
        return next((path.parent for path in place.glob("*/trials.jsonl")), place)

    process = sweep("seed=1")
    wait_until(lambda: num_trials(directory()) >= 4 or process.poll() is not None)
    owner = json.loads((directory() / ".lock").read_text())
    name = fake_slurm.submitted(folder)["signal"].partition("@")[0]
    os.kill(owner["pid"], getattr(signal, f"SIG{name}"))  # as SLURM does so many seconds before the limit
    output, _ = process.communicate(timeout=TIMEOUT)
    if num_timeouts == 0:
        assert process.returncode == 1, output
        (job,) = swept_jobs(place)
        assert job.state is JobState.FAILED
        assert "the time limit of the job was reached; hydra.launcher.max_num_timeout=10 has" in str(job.cause)
        assert not (folder / "requeued").exists()
        process = sweep("seed=1", "sweep.retry_failed=true")
        output, _ = process.communicate(timeout=TIMEOUT)
    else:
        assert (folder / "requeued").read_text() == f"{fake_slurm.FIRST_JOB}\n"
    assert process.returncode == 0, output + (folder / "log").read_text()
    assert [job.state for job in swept_jobs(place)] == [JobState.FINISHED]
    assert (directory() / "trials.jsonl").read_bytes() == (alone / "trials.jsonl").read_bytes()
    assert len(json.loads((directory() / "environment.json").read_text())["starts"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("there", [(), ("srun",)])
def test_a_host_without_slurm_says_so(there: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    environment = fake_slurm.install(folder, *there)
    process = start(tmp_path, environment, *COSTS, "hydra.sweep.dir=sweep")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, output
    (line,) = output.splitlines()
    assert line.startswith("tmpq-exp: hydra/launcher=submitit_slurm: found no sbatch and srun on this host")
    assert "hydra/launcher=submitit_local" in line


@pytest.mark.slow
def test_what_slurm_refuses_is_said(folder: Path, tmp_path: Path) -> None:
    environment = fake_slurm.install(folder, *fake_slurm.COMMANDS)
    partition = "hydra.launcher.partition=nowhere"
    process = start(tmp_path, environment, partition, *COSTS, "hydra.sweep.dir=sweep")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, output
    said = "tmpq-exp: hydra/launcher=submitit_slurm: sbatch: error: invalid partition specified: nowhere"
    assert [line for line in output.splitlines() if line.startswith("tmpq-exp")] == [said]
