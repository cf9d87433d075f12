"""The search under Lightning: epochs are generations, an exhausted space ends it, checkpoints hold all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from tmpq_exp.cost import CostModel, LinearShape
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.evolution import EvolutionSearch
from tmpq_exp.search.executor import Executor, LocalExecutor
from tmpq_exp.search.module import Proxy, SearchModule
from tmpq_exp.search.space import SearchSpace

NUM_LAYERS = 6
COST = CostModel(tuple(LinearShape(f"layer_{i}", 2 + i, 8, 1 + i) for i in range(NUM_LAYERS)))
SPACE = SearchSpace(
    (range(5), range(5, 20)), ((8, 7, 6, 5),) * NUM_LAYERS, ((8, 7, 6, 5),) * NUM_LAYERS, ((0,),) * NUM_LAYERS
)
TINY = SearchSpace((range(2), range(2, 4)), ((8,),) * NUM_LAYERS, ((8,),) * NUM_LAYERS, ((0,),) * NUM_LAYERS)


class ToyObjective:
    """Scores by the sum of timesteps less the bits; remembers what it was asked."""

    score = SimpleNamespace(name="toy")

    def __init__(self) -> None:
        self.asked: list[tuple[str, int | None, str]] = []

    def recorded(self, *_: Any, **__: Any) -> None:
        return None

    def measure(self, candidate: Candidate) -> float:
        (allocation,) = candidate.allocations
        return float(sum(candidate.timesteps) - sum(allocation.weight_bits) - sum(allocation.act_bits))

    def record(self, candidate: Candidate, measured: float, phase: str, *, generation: int | None, **_: Any) -> Any:
        self.asked.append((candidate.key(), generation, phase))
        return SimpleNamespace(key=candidate.key(), score=lambda name: measured if name == "toy" else None)


def make_search(space: SearchSpace = SPACE, **changes: Any) -> EvolutionSearch:
    budget = COST.bitops(space.uniform((5, 0), 8, 8)) if space is TINY else COST.bitops(space.uniform((5, 0), 6, 6))
    arguments = {
        "population_size": 8,
        "num_parents": 3,
        "num_mutants": 3,
        "num_crossovers": 2,
        "num_generations": 4,
        "seed": 7,
    }
    return EvolutionSearch(space, COST, budget, **(arguments | changes))  # type: ignore[arg-type]


def trainer(max_epochs: int, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        **arguments,
    )


HERE = LocalExecutor(None)  # type: ignore[arg-type]


class Disorderly:
    """Measures three at a time, and gives the last first."""

    is_local, num_workers = False, 3

    def measure(self, objective: Any, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Any]]:
        for start in range(0, len(candidates), 3):
            for candidate in reversed(candidates[start : start + 3]):
                yield candidate, objective.measure(candidate)

    def images(self, *_: Any) -> Any:
        raise AssertionError("a toy has no images")


def run(search: EvolutionSearch, max_epochs: int, executor: Executor = HERE) -> ToyObjective:
    objective = ToyObjective()
    trainer(max_epochs).fit(SearchModule(search, objective, executor))  # type: ignore[arg-type]
    return objective


def test_one_epoch_is_one_generation() -> None:
    search = make_search()
    objective = run(search, 4)
    assert search.stop_reason == "generations"
    assert [generation for _, generation, _ in objective.asked] == [g for g in range(4) for _ in range(8)]
    assert [key for key, _, _ in objective.asked] == [scored.candidate.key() for scored in search.history]
    assert len({key for key, _, _ in objective.asked}) == 32
    assert {phase for _, _, phase in objective.asked} == {"search"}


def test_lightning_changes_nothing_of_the_search() -> None:
    search, plain, objective = make_search(), make_search(), ToyObjective()
    run(search, 4)
    while not plain.finished:
        plain.tell({c.key(): objective.measure(c) for c in plain.ask()})
    assert search.history == plain.history


def test_the_order_in_which_scores_come_in_changes_nothing() -> None:
    search, disturbed = make_search(), make_search()
    asked, others = run(search, 4).asked, run(disturbed, 4, Disorderly()).asked
    assert asked != others
    assert sorted(asked) == sorted(others)
    assert search.history == disturbed.history


def test_an_exhausted_space_ends_the_search_early() -> None:
    search = make_search(TINY, num_generations=50, max_attempts=200)
    objective = run(search, 50)
    assert search.stop_reason == "space_exhausted"
    assert sorted(key for key, _, _ in objective.asked) == sorted({s.candidate.key() for s in search.history})
    assert len(objective.asked) == TINY.num_candidates == 4


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_checkpoint_is_json_and_continues_to_the_same_end(done: int) -> None:
    whole, first, second = make_search(), make_search(), make_search()
    run(whole, 4)
    run(first, done)
    checkpoint: dict[str, Any] = {}
    SearchModule(first, ToyObjective(), HERE).on_save_checkpoint(checkpoint)  # type: ignore[arg-type]
    module = SearchModule(second, ToyObjective(), HERE)  # type: ignore[arg-type]
    module.on_load_checkpoint(json.loads(json.dumps(checkpoint)))
    assert second.generation == done
    run(second, 4 - done)
    assert second.history == whole.history
    assert second.stop_reason == whole.stop_reason


class ToyProxy(ToyObjective):
    """Looks at the first timestep alone."""

    def measure(self, candidate: Candidate) -> float:
        return 100.0 - candidate.timesteps[0]

    def record(self, candidate: Candidate, measured: float, phase: str, **_: Any) -> Any:
        assert phase == "proxy"
        self.asked.append((candidate.key(), None, phase))
        return SimpleNamespace(key=candidate.key(), metrics={"psnr_db": measured})


def test_a_proxy_lets_the_most_promising_through() -> None:
    search, objective, cheap = make_search(), ToyObjective(), ToyProxy()
    proxy = Proxy(cheap, "psnr_db", 0.4)  # type: ignore[arg-type]
    trainer(4).fit(SearchModule(search, objective, HERE, proxy))  # type: ignore[arg-type]
    assert [key for key, _, _ in cheap.asked] == [scored.candidate.key() for scored in search.history]
    assert len(objective.asked) == 4 * 4  # 0.4 of eight, rounded up
    for generation in range(4):
        scored = [s for s in search.history if s.generation == generation]
        promoted = [s.candidate.timesteps[0] for s in scored if math.isfinite(s.score)]
        others = [s.candidate.timesteps[0] for s in scored if not math.isfinite(s.score)]
        assert len(promoted) == 4
        assert max(promoted) <= min(others)


def test_the_note_shows_the_best_of_all_generations() -> None:
    search = make_search()
    module = SearchModule(search, ToyObjective(), HERE)  # type: ignore[arg-type]
    assert module.progress_note == ""
    trainer(2).fit(module)
    assert search.best is not None
    assert module.progress_note == f"best toy {search.best.score:.3f}"
    module.training_step(0, 0)
    assert float(module.progress_note.removeprefix("best toy ")) <= search.best.score
