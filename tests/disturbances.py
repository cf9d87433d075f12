"""What tests do to processes of a run: count what they measure, let memory run out, let numbers break down."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.objective import Feed, Measured, Objective
from tmpq_exp.search.protocol import Images

Identity = tuple[str, ...]
"""Candidate, protocol and quantizers, by their hashes."""


def injected(prepare: partial[None]) -> dict[str, str]:
    """Environment in which every process that imports the search calls this first: ranks and workers too.

    Args:
        prepare: A function of a module, with arguments that JSON holds.
    """
    tests = Path(__file__).parent
    call = [prepare.func.__module__, prepare.func.__name__, prepare.args]
    return {
        "PYTHONPATH": os.pathsep.join([str(tests / "injected"), str(tests.parent)]),
        "TMPQ_EXP_TEST_PREPARE": json.dumps(call),
    }


def note_measurements(path: str) -> None:
    """Have this process note every candidate in a file before it measures it."""
    measure = Objective.measure

    def noting(
        self: Objective, candidate: Candidate, feed: Feed | None = None, images: Images | None = None
    ) -> Measured:
        line = f"{candidate.key()} {self.fingerprint} {self.state}\n".encode()
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)  # at once: others write too
        os.close(file)
        return measure(self, candidate, feed, images)

    Objective.measure = noting  # type: ignore[method-assign]


class Measurements:
    """What the processes of a run directory have measured, start by start.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._notes, self._trials = directory.with_suffix(".measured"), directory / "trials.jsonl"
        self.go_on()

    @property
    def prepare(self) -> partial[None]:
        """What each process has to call."""
        return partial(note_measurements, str(self._notes))

    def check(self, num_in_flight: int) -> int:
        """Look at what was measured since the last look, by processes that have ended.

        Args:
            num_in_flight: How many at most may have been measured without being recorded.

        Returns:
            How many were measured without being recorded.
        """
        measured, recorded = self._noted()[self._num_seen :], recorded_identities(self._trials)
        assert not self._before & set(measured), "nothing that was recorded is measured again"
        assert len(set(measured)) == len(measured), "nothing is measured twice"
        new = recorded - self._before
        assert new <= set(measured), "nothing is recorded that was not measured"
        assert len(measured) - len(new) <= num_in_flight
        self.go_on()
        return len(measured) - len(new)

    def go_on(self) -> None:
        """Take what is there now as what the next start finds."""
        self._num_seen, self._before = len(self._noted()), recorded_identities(self._trials)

    def _noted(self) -> list[Identity]:
        text = self._notes.read_text(encoding="utf-8") if self._notes.exists() else ""
        return [tuple(line.split()) for line in text.splitlines()]


def recorded_identities(path: Path) -> frozenset[Identity]:
    """What stands in whole lines of a file of trials."""
    data = path.read_bytes() if path.exists() else b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return frozenset(tuple(json.loads(line)[name] for name in ("key", "fingerprint", "state")) for line in lines)


def break_candidates(large: str | None, broken: str | None, seed: int, room: int) -> None:
    """Let memory run out for one candidate and the images of another be NaN, in this process.

    Args:
        large: Key of the candidate of which no more than ``room`` images are made at a time; None: of none.
        broken: Key of the candidate whose images are NaN; None: of none.
        seed: Of the images that are meant.
        room: Images a forward for which there is memory.
    """
    images = SupernetModule.images

    def disturbed(self: SupernetModule, candidate: Candidate, image_indices: Sequence[int], seed_: int) -> Tensor:
        if seed_ == seed and candidate.key() == large and len(image_indices) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made = images(self, candidate, image_indices, seed_)
        return made * float("nan") if seed_ == seed and candidate.key() == broken else made

    SupernetModule.images = disturbed  # type: ignore[method-assign]
