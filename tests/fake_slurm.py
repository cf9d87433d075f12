"""Stands in for the commands of SLURM on one host: what ``sbatch`` is given runs at once, in the background.

``python fake_slurm.py sbatch|srun|sacct|scontrol ...``; what was submitted is kept in ``FAKE_SLURM``.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

FIRST_JOB = 4242
PLACE = "FAKE_SLURM"

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")


def install(folder: Path, *names: str) -> dict[str, str]:
    """Environment in which these commands are there, and no other of SLURM.

    Args:
        folder: Empty; holds the commands and what is submitted.
        names: Of ``COMMANDS``.
    """
    for name in names:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o700)
    return {"PATH": os.pathsep.join([str(folder), "/usr/bin", "/bin"]), PLACE: str(folder)}


def submitted(folder: Path) -> dict[str, str]:
    """Options of what was submitted."""
    script = (folder / "script").read_text(encoding="utf-8")
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def run_task(folder: Path, job_id: str, index: str) -> None:
    """Run a job of an array, or the only one."""
    is_array = "array" in submitted(folder)
    array = {"SLURM_ARRAY_JOB_ID": job_id, "SLURM_ARRAY_TASK_ID": index} if is_array else {}
    job = {
        **{"SLURM_JOB_ID": str(int(job_id) + int(index)), "SLURM_JOB_NAME": submitted(folder)["job-name"]},
        **{"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"},
        **{"SLURM_JOB_NODELIST": socket.gethostname(), "SLURM_NODELIST": socket.gethostname()},
    }
    with (folder / "log").open("ab") as log:
        subprocess.Popen(
            ["bash", str(folder / "script")],
            env={**os.environ, **job, **array},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def sbatch(folder: Path, script: str) -> None:
    """Take a script; a partition of the name ``nowhere`` there is not."""
    (folder / "script").write_text(Path(script).read_text(encoding="utf-8"), encoding="utf-8")
    options = submitted(folder)
    if options.get("partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    last = re.fullmatch(r"0-(\d+)%\d+", options.get("array", "0-0%1"))
    assert last is not None
    with (folder / "jobs").open("a+", encoding="utf-8") as file:  # a number for every job of an array
        file.seek(0)
        job_id = str(FIRST_JOB + len(file.read().split()))
        file.write(f"{job_id} " * (int(last[1]) + 1))
    for index in range(int(last[1]) + 1):
        run_task(folder, job_id, str(index))
    print(f"Submitted batch job {job_id}")


def srun(_: Path, *arguments: str) -> None:
    """Run the one task of a job in its place."""
    command = list(arguments)
    while command[0].startswith("--"):
        if command.pop(0) in ("--output", "--error"):
            del command[0]
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    os.execvp(command[0], command)


def sacct(folder: Path, *_: str) -> None:
    """Say that every job runs: its end is seen by what it leaves."""
    jobs = (folder / "jobs").read_text(encoding="utf-8").split()
    print("\n".join(["JobID|State|NodeList", *(f"{job}|RUNNING|{socket.gethostname()}" for job in jobs)]))


def scontrol(folder: Path, what: str, job: str) -> None:
    """Queue a job again."""
    assert what == "requeue"
    with (folder / "requeued").open("a", encoding="utf-8") as file:
        file.write(f"{job}\n")
    job_id, _, index = job.partition("_")
    run_task(folder, job_id, index or "0")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ[PLACE]), *sys.argv[2:])
