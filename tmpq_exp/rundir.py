"""A run directory: its file names, who may use it, where its results come from, and which stages are done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from tmpq_exp import locks
from tmpq_exp.config import UserError
from tmpq_exp.config.identity import digest, flatten, lasting
from tmpq_exp.files import remedy, replace_file
from tmpq_exp.plain_data import parse_json_object, read_yaml_mapping

_PACKAGES = ("torch", "torchvision", "lightning", "diffusers", "transformers", "torchmetrics", "pytorch-fid", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically: no NaN, no Infinity."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def bad_input(advice: str = "") -> Iterator[None]:
    """Turn a ``ValueError`` about what the user gave into a ``UserError``, with ``advice`` behind its message.

    As a decorator: of a function whose every ``ValueError`` is about that.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}{advice}") from error


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a disk that is full, read-only or somebody else's into a ``UserError`` that says how to go on."""
    try:
        yield
    except OSError as error:
        advice = remedy(error)
        if advice is None or (isinstance(error, PermissionError) and not _is_within(error.filename, directory)):
            raise
        raise UserError(
            f"{error.filename or directory} could not be written ({error.strerror}); what was recorded in {directory} "
            f"is safe. {advice} and start again with the same hydra.run.dir"
        ) from error


def _is_within(name: str | None, directory: Path) -> bool:
    """Whether a file lies in a directory, or is not named: others may be kept from being read."""
    return name is None or Path(name).absolute().is_relative_to(directory.absolute())


@dataclass(frozen=True)
class RunDirectory:
    """One job's directory with its fixed file names."""

    path: Path

    def __getattr__(self, name: str) -> Path:
        if name not in _FILES:
            raise AttributeError(name)
        return self.path / _FILES[name]

    @classmethod
    def claim(cls, path: Path, config: Mapping[str, Any]) -> RunDirectory:
        """Take a new directory, or come back to one that the same configuration made.

        Args:
            path: The directory.
            config: The resolved configuration.

        Raises:
            UserError: If the directory holds other things, was made by another configuration, cannot be written, or
                is in use by another process.
        """
        run = cls(path)
        plain = json.loads(json.dumps(config, default=str))
        if path.exists() and not path.is_dir():
            raise UserError(f"hydra.run.dir: {path} is a file; a directory was expected")
        if run.config.exists():
            _refuse_other_config(run.config, plain)
        elif path.exists():
            _refuse_other_content(run)
        path.mkdir(parents=True, exist_ok=True)
        _lock(run)
        _remove_leftovers(path)
        if run.config.exists():  # made by another process in the meantime, or long ago
            _refuse_other_config(run.config, plain)
        else:
            replace_file(run.config, OmegaConf.to_yaml(plain).encode())
        _record_start(run.environment)
        return run

    def release(self) -> None:
        """Let other processes in."""
        locks.release(self.lock)

    def stage(self, name: str, inputs: Any, outputs: Sequence[Path], compute: Callable[[], Any]) -> Any:
        """Result of a stage, computed unless the same inputs gave it before and its files are still there.

        Args:
            name: Name of the stage.
            inputs: JSON value that the result depends on.
            outputs: Files the stage writes.
            compute: Does the work and returns a JSON value.
        """
        if self.is_done(name, inputs) and all(path.exists() for path in outputs):
            return self._stages()[name]["result"]
        start = time.perf_counter()
        result = compute()
        done = self._stages()
        done[name] = {"inputs": digest(inputs), "seconds": round(time.perf_counter() - start, 3), "result": result}
        write_json(self.stages, done)
        return result

    def is_done(self, name: str, inputs: Any) -> bool:
        """Whether the result of a stage is known for these inputs."""
        record = self._stages().get(name)
        return record is not None and record["inputs"] == digest(inputs)

    def add_stage_seconds(self, name: str, seconds: float) -> None:
        """Record the time of a stage that keeps its own results; times of resumed parts add up."""
        done = self._stages()
        before = done.get(name, {}).get("seconds", 0.0)
        done[name] = {"inputs": None, "seconds": round(before + seconds, 3), "result": None}
        write_json(self.stages, done)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        return {name: record["seconds"] for name, record in self._stages().items()}

    def _stages(self) -> dict[str, Any]:
        if not self.stages.exists():
            return {}
        with bad_input("; remove it to compute the stages again"):
            stages = _read_object(self.stages)
            if not all(isinstance(r, dict) and r.keys() >= {"inputs", "seconds", "result"} for r in stages.values()):
                raise ValueError(f"{self.stages} is damaged (it holds something else than stages)")
        return stages


_FILES = {
    "lock": ".lock",
    "job": "job.json",
    "config": "config.yaml",
    "environment": "environment.json",
    "stages": "stages.json",
    "trials": "trials.jsonl",
    "calibration": "calibration",
    "recalibrated": "recalibrated",
    "supernet": "supernet.safetensors",
    "winograd_scales": "winograd_scales.json",
    "winograd_ranges": "winograd_ranges.safetensors",
    "row_ranges": "winograd_ranges",
    "recipe": "recipe.json",
    "recipe_state": "recipe.safetensors",
    "cost": "cost.json",
    "report_json": "report.json",
    "report_html": "report.html",
    "samples": "samples.png",
    "pareto": "pareto.png",
    "wandb": "wandb",
    "comparison_html": "comparison.html",
    "comparison_csv": "comparison.csv",
    "table_markdown": "table.md",
    "table_latex": "table.tex",
    "forecast": "forecast.json",
    "weights": "model.safetensors",
    "reference": "reference.safetensors",
    "model_card": "model_card.md",
    "log": "run.log",
    "crash_log": "crash.log",
}


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: If the file holds none; it is named.
    """
    try:
        return parse_json_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _lock(run: RunDirectory) -> None:
    """Keep other processes out of a run directory until it is released or this one ends."""
    try:
        locks.hold(run.lock)
    except locks.LockedError as error:
        raise UserError(f"hydra.run.dir: {run.path} is in use by {error}; wait for it or stop it") from error


def _refuse_other_content(run: RunDirectory) -> None:
    """A directory without a configuration may hold what comes before one, and nothing else."""
    own = {name for name in _FILES.values() if name.startswith(".")} | {run.job.name, run.log.name, run.crash_log.name}
    if any(child.name not in own and not _is_leftover(child.name) for child in run.path.iterdir()):
        raise UserError(
            f"hydra.run.dir: {run.path} is not empty and no run directory (it has no {run.config.name}); "
            "give a new directory, or one that an earlier run made"
        )


def _is_leftover(name: str) -> bool:
    """Whether a kill in the middle of ``replace_file`` left a file of this name."""
    return any(fnmatch(name, f".{own}.*.tmp") for own in _FILES.values())


def _remove_leftovers(path: Path) -> None:
    """Remove what a kill in the middle of ``replace_file`` left behind."""
    for child in path.iterdir():
        if _is_leftover(child.name):
            child.unlink(missing_ok=True)


def _refuse_other_config(path: Path, config: Mapping[str, Any]) -> None:
    with bad_input():
        before = read_yaml_mapping(path)
    old, new = (flatten(lasting(c)) for c in (before, config))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        shown = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"hydra.run.dir: {path.parent} was made by another configuration ({shown}{more}); "
            "use the same configuration to resume it, or another directory"
        )


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with ``-dirty`` behind it where files are changed.

    The environment variable ``GIT_COMMIT``, which builds from copies set, goes before; None outside a checkout.
    """
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def sweep_name() -> str | None:
    """Name of the directory of the sweep that this job belongs to; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def describe_environment() -> dict[str, Any]:
    """Command, commit, sweep, versions and hardware of this process."""
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(),
        "sweep": sweep_name(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _record_start(path: Path) -> None:
    starts: list[Any] = []
    if path.exists():
        with bad_input("; remove it to go on without the record of earlier starts"):
            starts = _read_object(path).get("starts", [])
            if not isinstance(starts, list):
                raise ValueError(f"{path} is damaged (its starts are no list)")
    write_json(path, {"starts": [*starts, describe_environment()]})
