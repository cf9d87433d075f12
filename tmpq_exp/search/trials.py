"""trials.jsonl, the source of truth: one record per evaluated candidate, on disk before the next one starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmpq_exp.config import UserError
from tmpq_exp.quant.allocation import Candidate


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    A record holds no times, so that runs of one seed write the same file to the byte.

    Args:
        index: Line number in the file, from 0.
        phase: ``search`` (scored by the search), ``baseline`` (uniform bits under the search's protocol),
            ``selection`` (finalists on a second set of seeds) or ``final`` (baselines and winner on a third).
        name: Name of a baseline or of the winner.
        generation: Generation of a search trial.
        key: ``Candidate.key()``.
        candidate: ``Candidate.to_json()``.
        bitops, macs: Whole trajectory, one image, guidance included.
        weight_bytes: Stored weights.
        metrics: Name -> value; None where it is infinite or could not be had.
        num_images: Images it was measured on.
        seed: Seed of the image stream.
        fingerprint: Hash of everything else that the metrics depend on.
        error: Why the evaluation failed, if it did.
    """

    index: int
    phase: str
    name: str | None
    generation: int | None
    key: str
    candidate: dict[str, Any]
    bitops: int
    macs: int
    weight_bytes: int
    metrics: dict[str, float | None]
    num_images: int
    seed: int
    fingerprint: str
    error: str | None = None

    def score(self, metric: str) -> float:
        """Value of a metric where lower is better; infinite for a failed trial."""
        value = self.metrics.get(metric)
        return math.inf if value is None else value


class TrialLog:
    """Append-only file of trials.

    A line cut in the middle, as a kill leaves it at the end of the file, is removed and said in ``warnings``; every
    other damaged line stays in the file, is skipped and said.

    Attributes:
        trials: Readable trials in order.
        num_lines: Lines of the file, damaged ones included: the index of the next trial.
        warnings: What was found damaged.

    Args:
        path: The file; it need not exist.

    Raises:
        UserError: If the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[Trial] = []
        self.num_lines = 0
        self.warnings: list[str] = []
        self._by_key: dict[tuple[str, str], Trial] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        *lines, tail = data.split(b"\n")
        if tail:
            self.warnings.append(f"{self.path.name}: its last line was cut after {len(tail)} bytes and is left out")
            self._cut(len(data) - len(tail))
        self.num_lines = len(lines)
        for number, line in enumerate(lines, start=1):
            try:
                self._remember(_parse(line))
            except (ValueError, TypeError, KeyError) as error:
                self.warnings.append(f"{self.path.name}: line {number} is damaged and is left out ({error})")

    def _cut(self, size: int) -> None:
        try:
            with self.path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be repaired: {error.strerror}") from error

    def _remember(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._by_key.setdefault((trial.key, trial.fingerprint), trial)

    def find(self, candidate: Candidate, fingerprint: str) -> Trial | None:
        """The trial of this candidate under this protocol, if there is one."""
        return self._by_key.get((candidate.key(), fingerprint))

    def append(self, trial: Trial) -> None:
        """Write a trial and wait until it is on disk.

        Raises:
            UserError: If it cannot be written; the file then ends with the last whole trial.
        """
        line = json.dumps(asdict(trial), allow_nan=False).encode() + b"\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # what cannot be cut off now is cut off at the next start
                os.truncate(self.path, size)
            raise UserError(
                f"{self.path}: trial {trial.index} could not be written ({error.strerror}); the {len(self.trials)} "
                "trials before it are safe. Make room and start again with the same hydra.run.dir"
            ) from error
        self.num_lines += 1
        self._remember(trial)

    def of_phase(self, *phases: str) -> list[Trial]:
        """Trials of these phases in order."""
        return [trial for trial in self.trials if trial.phase in phases]


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: what is not finite becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _parse(line: bytes) -> Trial:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    trial = Trial(**record)
    if not isinstance(trial.metrics, dict) or not all(
        v is None or isinstance(v, int | float) for v in trial.metrics.values()
    ):
        raise ValueError("its metrics are no numbers")
    if Candidate.from_json(trial.candidate).key() != trial.key:
        raise ValueError("its key does not match its candidate")
    return trial
