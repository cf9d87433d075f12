"""trials.jsonl, the source of truth: one record per evaluated candidate, on disk before the next one starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tmpq_exp.config import UserError
from tmpq_exp.files import remedy
from tmpq_exp.metrics.names import loss
from tmpq_exp.plain_data import parse_json_object
from tmpq_exp.quant.allocation import Candidate


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    A record holds no times, so that runs of one seed write the same file to the byte.

    Args:
        index: Line number in the file, from 0.
        phase: ``proxy`` (a cheap look at few images), ``search`` (scored by the search), ``random`` (by the random
            search beside it), ``baseline`` (uniform bits under the search's protocol), ``recalibrated`` (under the
            search's protocol, calibrated for its own bits), ``noise`` (the winner on other seeds), ``selection``
            (finalists on a second set of seeds) or ``final`` (baselines and winner on a third).
        name: Name of a baseline or of the winner.
        generation: Generation of a search trial.
        key: ``Candidate.key()``.
        candidate: ``Candidate.to_json()``.
        bitops, macs: Whole trajectory, one image, guidance included.
        weight_bytes: Stored weights.
        metrics: Name -> value; None where it is infinite or could not be had.
        num_images: Images it was measured on.
        seed: Seed of the image stream.
        fingerprint: Hash of the protocol: all that the metrics depend on but the candidate and the quantizers.
        state: Hash of the quantizers and transform scales it was scored with.
        error: Why the evaluation failed, if it did.
        intervals: Metric -> 95 % bootstrap interval over images, where it was asked for.
        source: Run directory whose trial this one repeats.
        further: Further metric -> its own fingerprint, where such were measured.
        missing: Further metric -> why it could not be had.
        micro_batch: Images a forward it was measured at, where memory did not suffice for the protocol's; its figures
            may differ from those at the protocol's in their last digits.
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
    state: str
    error: str | None = None
    intervals: dict[str, list[float]] | None = None
    source: str | None = None
    further: dict[str, str] | None = None
    missing: dict[str, str] | None = None
    micro_batch: int | None = None

    def score(self, metric: str) -> float:
        """Value of a metric as a search minimises it: negated where higher is better; infinite for a failed trial."""
        return loss(metric, self.metrics.get(metric))


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
        reuse: Run directories whose trials are found too.

    Raises:
        UserError: If the file cannot be read, or a run directory to reuse has none.
    """

    def __init__(self, path: Path, reuse: Sequence[Path] = ()) -> None:
        self.path = path
        self.trials: list[Trial] = []
        self.num_lines = 0
        self.warnings: list[str] = []
        self._by_key: dict[tuple[str, str, str], Trial] = {}
        if path.exists():
            data = _read(path)
            tail = len(data) - data.rfind(b"\n") - 1
            if tail:
                self._cut(len(data) - tail)
            self.num_lines = data.count(b"\n")
            for trial in self._noting(_parsed(path, data)):
                self._remember(trial)
        self._elsewhere = {directory: -1 for directory in reuse}
        self._reusable: dict[tuple[str, str, str], Trial] = {}
        self._reread()

    def _reread(self) -> None:
        """Trials that other runs, which may still go on, have recorded since the last look."""
        for directory, size in self._elsewhere.items():
            file = directory / self.path.name
            data = _read(file)
            if len(data) == size:
                continue
            self._elsewhere[directory] = len(data)
            self._reusable |= {
                _identity(trial): replace(trial, source=trial.source or str(directory))
                for trial in self._noting(_parsed(file, data[: data.rfind(b"\n") + 1]))
            }

    def _noting(self, found: tuple[list[Trial], list[str]]) -> list[Trial]:
        """The trials; what was found damaged is kept for the reader."""
        self.warnings += found[1]
        return found[0]

    def _cut(self, size: int) -> None:
        try:
            with self.path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be repaired: {error.strerror}") from error

    def _remember(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._by_key[_identity(trial)] = trial  # a later one has further metrics

    def find(self, candidate: Candidate, fingerprint: str, state: str) -> Trial | None:
        """The trial of this candidate under this protocol and with these quantizers, if there is one here."""
        return self._by_key.get((candidate.key(), fingerprint, state))

    def find_elsewhere(self, candidate: Candidate, fingerprint: str, state: str) -> Trial | None:
        """As ``find``, in the run directories to reuse, as they are now."""
        self._reread()
        return self._reusable.get((candidate.key(), fingerprint, state))

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
                f"trials before it are safe. {remedy(error) or 'See to the disk'} and start again with the same "
                "hydra.run.dir"
            ) from error
        self.num_lines += 1
        self._remember(trial)

    def of_phase(self, *phases: str) -> list[Trial]:
        """Trials of these phases in order."""
        return [trial for trial in self.trials if trial.phase in phases]


def read_trials(path: Path) -> tuple[list[Trial], list[str]]:
    """Trials of a file that another run may still be writing, which is left as it is, and what was found damaged.

    Raises:
        UserError: If the file cannot be read.
    """
    return _parsed(path, _read(path))


def _parsed(path: Path, data: bytes) -> tuple[list[Trial], list[str]]:
    """Readable trials of a file, and a sentence for everything that is not."""
    *lines, tail = data.split(b"\n")
    warnings = [f"{path.name}: its last line was cut after {len(tail)} bytes and is left out"] if tail else []
    trials = []
    for number, line in enumerate(lines, start=1):
        try:
            trials.append(_parse(line))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            warnings.append(f"{path.name}: line {number} is damaged and is left out ({error})")
    return trials, warnings


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: what is not finite becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _identity(trial: Trial) -> tuple[str, str, str]:
    return trial.key, trial.fingerprint, trial.state


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


_LARGEST = 2**80
"""Counts lie below; no run comes near."""


def _parse(line: bytes) -> Trial:
    trial = Trial(**parse_json_object(line))
    _check_types(trial)
    if Candidate.from_json(trial.candidate).key() != trial.key:
        raise ValueError("its key does not match its candidate")
    return trial


def _check_types(trial: Trial) -> None:
    """Raise ``ValueError`` unless every value is of its kind: the file may come from anybody."""
    texts = [trial.phase, trial.key, trial.fingerprint, trial.state]
    texts += [text for text in (trial.name, trial.error, trial.source) if text is not None]
    texts += [*(trial.further or {}).values(), *(trial.missing or {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is of another type")
    counts = [trial.index, trial.bitops, trial.macs, trial.weight_bytes, trial.num_images, trial.seed]
    counts += [count for count in (trial.generation, trial.micro_batch) if count is not None]
    if not all(type(count) is int and 0 <= count < _LARGEST for count in counts):
        raise ValueError("a count is no integer, or out of range")
    figures = [*(v for v in trial.metrics.values() if v is not None), *chain(*(trial.intervals or {}).values())]
    if not all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures):
        raise ValueError("its metrics are no numbers")
    if not all(len(interval) == 2 for interval in (trial.intervals or {}).values()):
        raise ValueError("an interval has two ends")
