"""What every search keeps: feasible and new candidates, one history a seed, and a resume from JSON after any tell."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tmpq_exp.cost import CostModel, LinearShape
from tmpq_exp.diffusion.schedule import TimestepRule, group_minima, timestep_groups
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Origin, Search
from tmpq_exp.search.evolution import EvolutionSearch
from tmpq_exp.search.greedy import GreedySearch
from tmpq_exp.search.nsga2 import NSGA2Search
from tmpq_exp.search.random import RandomSearch
from tmpq_exp.search.space import SearchSpace

NUM_LAYERS, POPULATION, GENERATIONS = 8, 9, 4
COST = CostModel(tuple(LinearShape(f"layer_{i}", 2 + i, 8, 1 + 3 * (i % 4)) for i in range(NUM_LAYERS)))
GROUPS = timestep_groups(100, 4, TimestepRule.QUADRATIC)
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_step": {"bits_per_step": "per_step"},
    "joint_k": {"min_steps": 2, "max_steps": 8, "min_steps_per_group": 0, "max_steps_per_group": 2},
}
ALGORITHMS: dict[str, Callable[..., Search]] = {
    "random": RandomSearch,
    "evolution": lambda *args, **kwargs: EvolutionSearch(
        *args, num_parents=4, num_mutants=4, num_crossovers=3, mutate_crossovers=True, **kwargs
    ),
    "greedy": GreedySearch,
    "nsga2": NSGA2Search,
}


def make_space(kind: str = "shared", choices: tuple[int, ...] = (8, 7, 6, 5)) -> SearchSpace:
    layers = (choices,) * NUM_LAYERS
    return SearchSpace(GROUPS, layers, layers, ((0,),) * NUM_LAYERS, **KINDS[kind])


def make_search(name: str, kind: str = "shared", **changes: Any) -> Search:
    space = make_space(kind)
    seed = space.uniform(group_minima(GROUPS), 6, 6)
    arguments: dict[str, Any] = {
        "population_size": POPULATION,
        "num_generations": GENERATIONS,
        "seed": 3,
        "seed_candidates": (seed,),
    }
    return ALGORITHMS[name](space, COST, COST.bitops(seed), **(arguments | changes))


def error_of(candidate: Candidate) -> float:
    """A stand-in for quality: layers differ in sensitivity, few steps and steps far from some places cost."""
    bits = np.array([[a.weight_bits, a.act_bits] for a in candidate.allocations])
    sensitivity = np.random.default_rng(5).gamma(0.5, size=bits.shape[1:])
    gaps = np.diff([-1, *reversed(candidate.timesteps), 100])
    return float((sensitivity * 4.0 ** (5 - bits)).mean(axis=0).sum() + (gaps**2).sum() / 2000)


def play(search: Search, num_generations: int = 10**6) -> list[tuple[str, ...]]:
    asked = []
    while not search.finished and search.generation < num_generations:
        candidates = search.ask()
        asked.append(tuple(candidate.key() for candidate in candidates))
        if candidates:
            search.tell({candidate.key(): error_of(candidate) for candidate in candidates})
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_asks_are_new_feasible_candidates_of_the_space_at_equal_evaluations(name: str, kind: str) -> None:
    search = make_search(name, kind)
    keys = [key for generation in play(search) for key in generation]
    assert search.stop_reason == "generations"
    assert len(keys) == len(set(keys)) == POPULATION * GENERATIONS
    for scored in search.history:
        assert search.space.contains(scored.candidate)
        assert search.budget.is_feasible(scored.candidate)
    assert search.history[0].origin is Origin.SEED
    assert search.statistics.num_draws >= search.statistics.num_fills


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("is_pending", [False, True])
def test_resumes_identically_from_json_after_any_tell(name: str, is_pending: bool) -> None:
    whole = make_search(name)
    expected = play(whole)
    for told in range(GENERATIONS):
        killed = make_search(name)
        play(killed, told)
        if is_pending:
            killed.ask()
        resumed = make_search(name)
        resumed.load_state_dict(json.loads(json.dumps(killed.state_dict(), allow_nan=False)))
        assert play(resumed) == expected[told:]
        assert resumed.history == whole.history
        assert resumed.statistics == whole.statistics


@pytest.mark.parametrize("name", ALGORITHMS)
def test_replaying_recorded_scores_resumes_as_well(name: str) -> None:
    whole = make_search(name)
    expected = play(whole)
    scores = {scored.candidate.key(): scored.score for scored in whole.history}
    resumed = make_search(name)
    for keys in expected[:3]:
        assert tuple(candidate.key() for candidate in resumed.ask()) == keys
        resumed.tell({key: scores[key] for key in keys})
    assert play(resumed) == expected[3:]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_seed_one_history(name: str) -> None:
    assert play(make_search(name)) == play(make_search(name))
    assert play(make_search(name)) != play(make_search(name, seed=4))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_search_goes_on_where_everything_failed(name: str) -> None:
    search = make_search(name)
    while not search.finished:
        search.tell({candidate.key(): math.nan for candidate in search.ask()})
    assert len(search.history) == POPULATION * GENERATIONS
    assert search.top(3) == ()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_space_of_few_candidates_ends_the_search(name: str) -> None:
    groups = ((0,), (5,))
    space = SearchSpace(groups, ((8, 6),) + ((8,),) * 7, ((8,),) * 8, ((0,),) * 8)
    budget = COST.bitops(space.uniform((5, 0), 8, 8))
    search = ALGORITHMS[name](space, COST, budget, population_size=POPULATION, num_generations=50, max_attempts=30)
    play(search)
    assert search.finished
    assert 1 <= len(search.history) <= 2
    assert search.statistics.num_capped > 0


def test_a_state_of_another_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="other arguments: algorithm"):
        make_search("random").load_state_dict(make_search("greedy").state_dict())


def test_the_front_is_what_nothing_beats_and_spreads_below_the_ceiling() -> None:
    search = make_search("nsga2", population_size=20, num_generations=6)
    assert isinstance(search, NSGA2Search)
    assert search.front() == ()
    play(search)
    front = search.front()
    points = [(COST.bitops(scored.candidate), scored.score) for scored in search.history]
    undominated = {
        point
        for point in points
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    }
    found = [(COST.bitops(scored.candidate), scored.score) for scored in front]
    assert found == sorted(undominated)
    assert len(front) >= 6
    assert found[0][0] < 0.85 * search.budget.budget_bitops
    assert search.best is not None
    assert front[-1].score == search.best.score


def test_nsga2_finds_a_better_front_than_as_many_random_candidates() -> None:
    def covered(seed: int, population_size: int, num_generations: int) -> float:
        """Area that the front dominates within the budget."""
        search = make_search("nsga2", population_size=population_size, num_generations=num_generations, seed=seed)
        play(search)
        limit = search.budget.budget_bitops
        points = sorted((COST.bitops(s.candidate) / limit, s.score) for s in search.history)
        area, best = 0.0, 6.0
        for (bitops, score), (following, _) in zip(points, [*points[1:], (1.0, 0.0)], strict=True):
            best = min(best, score)
            area += (following - bitops) * (6.0 - best)
        return area

    searched, drawn = [covered(seed, 20, 8) for seed in range(4)], [covered(seed, 160, 1) for seed in range(4)]
    assert min(searched) > max(drawn)


def test_greedy_gives_bits_to_the_layers_that_need_them() -> None:
    """Half of the layers, equally costly as the others, are the only sensitive ones."""
    cost = CostModel(tuple(LinearShape(f"layer_{i}", 8, 8, 1) for i in range(NUM_LAYERS)))
    space = make_space()
    seed = space.uniform(group_minima(GROUPS), 6, 6)
    search = GreedySearch(
        space, cost, cost.bitops(seed), population_size=20, num_generations=4, seed_candidates=(seed,)
    )
    sensitive = [2, 3, 6, 7]
    while not search.finished:
        scores = {}
        for candidate in search.ask():
            (allocation,) = candidate.allocations
            bits = [*(allocation.weight_bits[i] for i in sensitive), *(allocation.act_bits[i] for i in sensitive)]
            scores[candidate.key()] = float(sum(4.0 ** (5 - b) for b in bits))
        search.tell(scores)
    assert search.best is not None
    (best,) = search.best.candidate.allocations
    others = [i for i in range(NUM_LAYERS) if i not in sensitive]
    assert min(best.weight_bits[i] + best.act_bits[i] for i in sensitive) > max(
        best.weight_bits[i] + best.act_bits[i] for i in others
    )
    assert search.best.score < 0.5 * next(s.score for s in search.history if s.candidate == seed)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population_size": 0}, "population_size must be at least 1, found 0"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"max_attempts": 0}, "max_attempts must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_arguments_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_search(name, **changes)


def test_bad_probability_of_nsga2_is_named() -> None:
    with pytest.raises(ValueError, match=r"mutation_prob must lie in \(0, 1\], found 0"):
        NSGA2Search(make_space(), COST, 10**9, mutation_prob=0)
