"""How a job of a sweep stands: the file ``job.json`` in its directory, and the hash that names the directory."""

from __future__ import annotations

import copy
import json
import socket
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp import locks
from tmpq_exp.config.identity import digest, lasting
from tmpq_exp.files import replace_file
from tmpq_exp.plain_data import parse_json_object

RECORD_NAME, LOCK_NAME = "job.json", ".lock"


class JobState(str, Enum):
    """How a job stands. Only the first three are ever written; a job that runs and holds no lock was stopped."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class JobRecord:
    """Content of ``job.json``.

    Args:
        number: Number of the job in the sweep that started it last.
        overrides: Its own overrides, such as ``["seed=1", "budget=w5a5"]``.
        name: The same in one word, without those that change no result.
        state: See ``JobState``.
        exit_status: Of a job that ended: 0 done, 2 bad input, 1 anything else.
        cause: Why it failed, in one line.
        seconds: Time of the last start until the end.
        started: Time of day of the last start, as ISO 8601; for people, nothing is decided by it.
        host: Machine of the last start.
    """

    number: int
    overrides: list[str]
    name: str
    state: JobState = JobState.RUNNING
    exit_status: int | None = None
    cause: str | None = None
    seconds: float | None = None
    started: str = field(default_factory=_now)
    host: str = field(default_factory=socket.gethostname)

    def __post_init__(self) -> None:
        """Refuse what a damaged or foreign file may hold.

        Raises:
            ValueError: If a value is of another type than it should be.
        """
        texts = [self.name, self.started, self.host, *self.overrides]
        numbers = [self.number, 0 if self.exit_status is None else self.exit_status]
        is_sound = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        is_sound &= self.cause is None or isinstance(self.cause, str)
        is_sound &= self.seconds is None or type(self.seconds) in (int, float)
        if not is_sound:
            raise ValueError("a value is of another type than it should be")
        object.__setattr__(self, "state", JobState(self.state))


def write_record(directory: Path, record: JobRecord) -> None:
    """Write ``job.json`` atomically."""
    replace_file(directory / RECORD_NAME, (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_record(directory: Path) -> JobRecord | None:
    """The record of a directory; None if there is none or it is damaged, which only costs its knowledge of the job."""
    try:
        content = parse_json_object((directory / RECORD_NAME).read_bytes())
        return JobRecord(**{entry.name: content[entry.name] for entry in fields(JobRecord)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def job_name(directory: Path) -> str:
    """What people call a job: number and overrides in its sweep, else the name of its directory."""
    record = read_record(directory)
    return directory.resolve().name if record is None else f"{record.number}_{record.name}"


def state_now(directory: Path, record: JobRecord) -> JobState:
    """State of a job at this moment: what was written, unless its process is gone."""
    if record.state is JobState.RUNNING and not locks.is_held(directory / LOCK_NAME):
        return JobState.STOPPED
    return record.state


def config_hash(config: DictConfig) -> str:
    """Content hash of a composed configuration, without what changes no result; names a job's directory.

    A configuration that cannot be resolved, which its job will refuse, is hashed as it stands.
    """
    own = copy.deepcopy(config)
    with open_dict(own):
        own.pop("hydra", None)
        own.paths.run_dir = ""  # this is what it names
    try:
        plain: Any = OmegaConf.to_container(own, resolve=True, enum_to_str=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(own, resolve=False, enum_to_str=True)
    return digest(lasting(plain))


def register_resolvers() -> None:
    """Make ``${config_hash:}`` known to OmegaConf; ``conf/hydra/default.yaml`` names directories with it."""
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)
