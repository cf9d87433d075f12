"""Evaluating many candidates: each once, what is recorded first, and shared out as there are workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from tests.search.conftest import COST, REFERENCE, FakeMetric, FakeSupernet, candidate
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.executor import LocalExecutor, evaluate_all
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Protocol, images_by
from tmpq_exp.search.trials import Trial, TrialLog

CANDIDATES = [candidate(bits) for bits in (8, 7, 6, 5)]


class Backwards:
    """Three workers, of which the last is the first to be done; remembers what it was asked."""

    is_local, num_workers = False, 3

    def __init__(self, supernet: FakeSupernet) -> None:
        self._images = images_by(supernet)  # type: ignore[arg-type]
        self.measured: list[Candidate] = []
        self.made: list[Candidate] = []

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        for one in reversed(candidates):
            self.measured.append(one)
            yield one, objective.measure_here(one)

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        self.made.append(candidate)
        return self._images(candidate, protocol)


def objective(path: Path, supernet: FakeSupernet, executor: Backwards | None = None) -> Objective:
    return Objective(
        supernet,  # type: ignore[arg-type]
        FakeMetric(),
        Protocol(num_images=5, seed=3, micro_batch=2),
        COST,
        TrialLog(path),
        reference_candidate=REFERENCE,
        state="s",
        on_trial=lambda trial: None,
        images=None if executor is None else executor.images,
    )


def test_workers_give_the_trials_that_one_process_gives_in_another_order(tmp_path: Path) -> None:
    supernet = FakeSupernet()
    here = LocalExecutor(supernet)  # type: ignore[arg-type]
    alone = list(evaluate_all(here, objective(tmp_path / "alone", supernet), CANDIDATES, "search", generation=2))
    executor = Backwards(supernet)
    shared = list(
        evaluate_all(executor, objective(tmp_path / "shared", supernet, executor), CANDIDATES, "search", generation=2)
    )
    assert [trial.key for trial in alone] == [one.key() for one in CANDIDATES]
    assert [(t.key, t.metrics, t.generation) for t in shared] == [(t.key, t.metrics, t.generation) for t in alone[::-1]]
    assert [trial.index for trial in shared] == [0, 1, 2, 3]
    assert TrialLog(tmp_path / "shared").trials == shared


def test_what_is_recorded_or_stands_twice_is_not_measured_again(tmp_path: Path) -> None:
    supernet = FakeSupernet()
    executor = Backwards(supernet)
    scored = objective(tmp_path / "trials.jsonl", supernet, executor)
    known = scored.evaluate(CANDIDATES[2], "search")
    found = list(evaluate_all(executor, scored, [*CANDIDATES, CANDIDATES[0]], "baseline", names=list("abcde")))
    assert found[0] is known
    assert executor.measured == [CANDIDATES[3], CANDIDATES[1], CANDIDATES[0]]
    assert {trial.key: trial.name for trial in found} == {
        CANDIDATES[2].key(): None,
        CANDIDATES[3].key(): "d",
        CANDIDATES[1].key(): "b",
        CANDIDATES[0].key(): "e",
    }


def test_a_run_that_ends_amid_candidates_costs_those_that_had_not_come_back(tmp_path: Path) -> None:
    path, supernet = tmp_path / "trials.jsonl", FakeSupernet()

    def start() -> tuple[Backwards, Iterator[Trial]]:
        executor = Backwards(supernet)
        return executor, evaluate_all(executor, objective(path, supernet, executor), CANDIDATES, "search")

    _, killed = start()
    before = next(killed)
    resuming, resumed = start()
    assert next(resumed) == before
    assert len(list(resumed)) == 3
    assert resuming.measured == [CANDIDATES[2], CANDIDATES[1], CANDIDATES[0]]


@pytest.mark.parametrize("count", [1, 2])
def test_of_fewer_candidates_than_workers_the_images_are_shared(count: int, tmp_path: Path) -> None:
    supernet = FakeSupernet()
    executor = Backwards(supernet)
    scored = objective(tmp_path / "trials.jsonl", supernet, executor)
    trials = list(evaluate_all(executor, scored, CANDIDATES[:count], "selection"))
    assert [trial.metrics["brightness"] for trial in trials] == pytest.approx([8 / 64, 7 / 64][:count])
    assert executor.measured == []
    assert executor.made == [REFERENCE, *CANDIDATES[:count]]


def test_what_another_process_made_beside_candidates_is_taken_over(tmp_path: Path) -> None:
    supernet, other = FakeSupernet(), FakeSupernet()
    expected = objective(tmp_path / "a", supernet)
    scored = objective(tmp_path / "b", other)
    scored.adopt(expected.beside())
    assert scored.measure(CANDIDATES[0]) == expected.measure(CANDIDATES[0])
    assert {key for key, _, _ in other.calls} == {CANDIDATES[0].key()}
