"""Evolution: feasible, distinct, capped, repeatable, resumable, and better than random search."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tmpq_exp.cost import CostModel, LinearShape
from tmpq_exp.diffusion.schedule import TimestepRule, group_minima, timestep_groups
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Origin, Search, SearchStatistics
from tmpq_exp.search.evolution import EvolutionSearch
from tmpq_exp.search.random import RandomSearch
from tmpq_exp.search.space import SearchSpace

NUM_LAYERS = 12
COST = CostModel(tuple(LinearShape(f"layer_{i}", 2 + i, 8, 1 + i % 5) for i in range(NUM_LAYERS)))
SPACE = SearchSpace(
    timestep_groups(100, 4, TimestepRule.QUADRATIC),
    weight_choices=((8, 7, 6, 5),) * NUM_LAYERS,
    act_choices=((8, 7, 6, 5),) * NUM_LAYERS,
    tile_choices=((0,),) * NUM_LAYERS,
)
W6A6 = SPACE.uniform(group_minima(SPACE.timestep_groups), 6, 6)
SMALL: dict[str, Any] = {
    "population_size": 12,
    "num_parents": 4,
    "num_mutants": 6,
    "num_crossovers": 3,
    "num_generations": 5,
}
TINY_COST = CostModel((LinearShape("a", 4, 4, 1), LinearShape("b", 8, 4, 1)))
TINY_SPACE = SearchSpace((range(2), range(2, 4)), ((8, 6), (8, 6)), ((8, 6), (8,)), ((0,), (0,)))


def make_search(**changes: Any) -> EvolutionSearch:
    arguments = SMALL | {"seed": 1, "seed_candidates": (W6A6,)} | changes
    return EvolutionSearch(SPACE, COST, COST.bitops(W6A6), **arguments)


def error_of(candidate: Candidate) -> float:
    """A separable stand-in for quality: layers differ in sensitivity, timesteps have a best place."""
    (allocation,) = candidate.allocations
    bits = np.array([allocation.weight_bits, allocation.act_bits])
    sensitivity = np.random.default_rng(5).gamma(0.5, size=bits.shape)
    noise = float((sensitivity * 4.0 ** (5 - bits)).sum())
    return noise + sum(abs(t - 25 * i - 7) / 25 for i, t in enumerate(reversed(candidate.timesteps)))


def play(search: EvolutionSearch, num_generations: int = 10**6) -> list[tuple[str, ...]]:
    asked = []
    while not search.finished and search.generation < num_generations:
        candidates = search.ask()
        if candidates:
            asked.append(tuple(candidate.key() for candidate in candidates))
            search.tell({candidate.key(): error_of(candidate) for candidate in candidates})
    return asked


@settings(max_examples=15)
@given(st.integers(0, 10**9), st.booleans())
@example(72521, False)  # its last parents are so alike that three crossovers find nothing new, and say so
def test_asks_are_feasible_in_the_space_and_never_repeat(seed: int, fill: bool) -> None:
    search = make_search(seed=seed, fill=fill)
    keys = [key for generation in play(search) for key in generation]
    assert len(keys) == len(set(keys)) == 60 - search.statistics.num_capped
    assert search.statistics.num_capped <= SMALL["num_crossovers"] * SMALL["num_generations"]
    assert search.stop_reason == "generations"
    for scored in search.history:
        assert SPACE.contains(scored.candidate)
        assert COST.bitops(scored.candidate) <= COST.bitops(W6A6)


def test_a_generation_is_made_as_the_settings_say() -> None:
    search = make_search()
    play(search)
    for generation in range(5):
        origins = [scored.origin for scored in search.history if scored.generation == generation]
        if generation == 0:
            assert origins == [Origin.SEED] + [Origin.RANDOM] * 11
        else:
            assert origins == [Origin.MUTATION] * 6 + [Origin.CROSSOVER] * 3 + [Origin.RANDOM] * 3


def test_release_settings_are_the_defaults_but_for_the_fill() -> None:
    search = EvolutionSearch(SPACE, COST, COST.bitops(W6A6), seed_candidates=(W6A6,), fill=False, num_generations=2)
    assert [len(generation) for generation in play(search)] == [50, 50]
    origins = [scored.origin for scored in search.history[50:]]
    assert [origins.count(origin) for origin in Origin] == [0, 15, 25, 10, 0]
    assert search.history[0].candidate == W6A6


def test_one_seed_one_history() -> None:
    assert play(make_search()) == play(make_search())
    assert play(make_search()) != play(make_search(seed=2))


def test_scores_order_does_not_matter() -> None:
    one, other = make_search(), make_search()
    for _ in range(3):
        candidates = one.ask()
        assert candidates == other.ask()
        scores = {candidate.key(): error_of(candidate) for candidate in candidates}
        one.tell(scores)
        other.tell(dict(reversed(scores.items())))
    assert one.history == other.history


def test_asking_again_gives_the_same_and_draws_nothing() -> None:
    search = make_search()
    candidates, statistics = search.ask(), replace(search.statistics)
    assert search.ask() == candidates
    assert search.statistics == statistics


@pytest.mark.parametrize("is_pending", [False, True])
@pytest.mark.parametrize("num_generations", [0, 1, 3])
def test_resumes_identically_from_json(num_generations: int, is_pending: bool) -> None:
    whole = make_search()
    expected = play(whole)
    killed = make_search()
    play(killed, num_generations)
    if is_pending:
        killed.ask()
    resumed = make_search()
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict(), allow_nan=False)))
    assert play(resumed) == expected[num_generations:]
    assert resumed.history == whole.history
    assert resumed.statistics == whole.statistics
    assert resumed.best == whole.best


def test_replaying_recorded_scores_resumes_as_well() -> None:
    whole = make_search()
    expected = play(whole)
    trials = {scored.candidate.key(): scored.score for scored in whole.history if scored.generation < 3}
    resumed = make_search()
    for generation in range(3):
        assert tuple(candidate.key() for candidate in resumed.ask()) == expected[generation]
        resumed.tell({candidate.key(): trials[candidate.key()] for candidate in resumed.ask()})
    assert play(resumed) == expected[3:]


def test_a_state_of_another_search_is_refused_by_name() -> None:
    state = make_search().state_dict()
    with pytest.raises(ValueError, match="of a search with other arguments: mutation_prob, seed"):
        make_search(seed=9, mutation_prob=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a search: KeyError"):
        make_search().load_state_dict({"settings": state["settings"]})


def test_golden_history_of_a_tiny_problem() -> None:
    """A refactor may not move these."""
    search = EvolutionSearch(
        TINY_SPACE,
        TINY_COST,
        TINY_COST.bitops(TINY_SPACE.uniform((2, 0), 8, 8)) * 9 // 10,
        population_size=4,
        num_parents=2,
        num_mutants=2,
        num_crossovers=1,
        num_generations=3,
        seed=0,
    )
    play(search)
    history = [
        (scored.origin.value, scored.candidate.timesteps, allocation.weight_bits, allocation.act_bits)
        for scored in search.history
        for allocation in scored.candidate.allocations
    ]
    assert history == [
        ("random", (2, 0), (6, 8), (6, 8)),
        ("random", (2, 0), (8, 6), (8, 8)),
        ("random", (2, 0), (8, 6), (6, 8)),
        ("random", (3, 0), (8, 6), (8, 8)),
        ("mutation", (2, 1), (8, 6), (8, 8)),
        ("mutation", (2, 0), (6, 6), (8, 8)),
        ("random", (3, 1), (8, 6), (8, 8)),
        ("mutation", (3, 1), (8, 6), (6, 8)),
        ("mutation", (2, 1), (6, 6), (8, 8)),
        ("random", (3, 0), (6, 8), (6, 8)),
    ]
    assert search.statistics == SearchStatistics(
        num_draws=214, num_repairs=5, num_fills=3, num_duplicates=209, num_capped=2
    )


def test_a_small_space_is_asked_to_the_last_candidate_and_ends() -> None:
    budget = TINY_COST.bitops(TINY_SPACE.uniform((2, 0), 8, 8))
    search = EvolutionSearch(TINY_SPACE, TINY_COST, budget, **(SMALL | {"num_generations": 100}))
    asked = [key for generation in play(search) for key in generation]
    assert search.stop_reason == "space_exhausted"
    assert search.finished
    assert search.ask() == ()
    assert len(asked) == TINY_SPACE.num_candidates == 32
    assert search.statistics.num_capped > 0
    assert search.statistics.num_duplicates >= 100


def test_one_candidate_space() -> None:
    space = SearchSpace((range(1),), ((8,), (8,)), ((8,), (8,)), ((0,), (0,)))
    search = EvolutionSearch(space, TINY_COST, 10**9, max_attempts=3, **SMALL)
    assert [len(generation) for generation in play(search)] == [1]
    assert search.stop_reason == "space_exhausted"


def test_seeds_over_the_budget_are_repaired() -> None:
    costly = SPACE.uniform(W6A6.timesteps, 8, 8)
    search = make_search(seed_candidates=(costly, W6A6))
    first, second, *_ = search.ask()
    assert COST.bitops(first) <= COST.bitops(W6A6)
    assert first.timesteps == costly.timesteps
    assert second == W6A6
    assert search.statistics.num_repairs >= 1


def test_an_infeasible_budget_is_a_clear_error() -> None:
    cheapest = COST.bitops(SPACE.cheapest(COST))
    with pytest.raises(ValueError, match=f"budget_bitops must be at least {cheapest}"):
        EvolutionSearch(SPACE, COST, cheapest - 1, **SMALL)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failed_candidates_are_no_parents_and_never_best(bad: float) -> None:
    search = make_search()
    failed = [candidate.key() for candidate in search.ask()]
    search.tell(dict.fromkeys(failed, bad))
    assert search.best is None
    assert search.top(3) == ()
    restored = make_search()
    restored.load_state_dict(json.loads(json.dumps(search.state_dict(), allow_nan=False)))
    candidates = search.ask()
    assert restored.ask() == candidates
    assert len(candidates) == 12
    assert not {candidate.key() for candidate in candidates} & set(failed)
    search.tell({candidate.key(): error_of(candidate) for candidate in candidates})
    assert search.best is not None
    assert [scored.origin for scored in search.history[12:]] == [Origin.RANDOM] * 12


def test_a_single_parent_mutates_but_does_not_cross() -> None:
    search = make_search()
    first, *others = (candidate.key() for candidate in search.ask())
    search.tell({first: 1.0} | dict.fromkeys(others, math.nan))
    search.tell({candidate.key(): 1.0 for candidate in search.ask()})
    assert [scored.origin for scored in search.history[12:]] == [Origin.MUTATION] * 6 + [Origin.RANDOM] * 6


def test_top_is_sorted_and_ties_keep_the_order_asked() -> None:
    search = make_search()
    candidates = search.ask()
    search.tell({candidate.key(): float(i // 2) for i, candidate in enumerate(candidates)})
    assert [scored.candidate for scored in search.top(5)] == list(candidates[:5])
    assert search.best == search.top(1)[0]


def test_tell_takes_exactly_what_was_asked() -> None:
    search = make_search()
    with pytest.raises(ValueError, match="nothing was asked"):
        search.tell({})
    keys = [candidate.key() for candidate in search.ask()]
    with pytest.raises(ValueError, match=rf"missing \['{keys[0]}'\], not asked for \['other'\]"):
        search.tell(dict.fromkeys([*keys[1:], "other"], 1.0))
    search.tell(dict.fromkeys(keys, 1.0))
    with pytest.raises(ValueError, match="nothing was asked"):
        search.tell(dict.fromkeys(keys, 1.0))


def test_the_default_beats_random_search_at_eighty_noisy_evaluations() -> None:
    """Settings of conf/search/evolution.yaml; a score is off by 3 % or so, as with images of a fixed set of seeds."""
    settings = {
        "population_size": 10,
        "num_parents": 5,
        "num_mutants": 0,
        "num_crossovers": 10,
        "num_generations": 8,
        "mutation_prob": 0.03,
        "mutate_crossovers": True,
        "sample_from": "highest",
    }

    def found(search: Search) -> float:
        while not search.finished:
            rng = np.random.default_rng([search.seed, search.generation])
            candidates = search.ask()
            search.tell({c.key(): error_of(c) * (1 + 0.03 * rng.standard_normal()) for c in candidates})
        assert len(search.history) == 80
        assert search.best is not None
        return error_of(search.best.candidate)

    evolved = [found(make_search(**(settings | {"seed": seed}))) for seed in range(10)]
    random = [
        found(
            RandomSearch(
                SPACE,
                COST,
                COST.bitops(W6A6),
                population_size=10,
                num_generations=8,
                seed=seed,
                seed_candidates=(W6A6,),
            )
        )
        for seed in range(10)
    ]
    assert sum(one < other for one, other in zip(evolved, random, strict=True)) >= 8
    assert np.mean(evolved) < 0.9 * np.mean(random)


def test_mutated_crossovers_hold_genes_of_no_parent() -> None:
    search = make_search(num_mutants=0, num_crossovers=12, mutate_crossovers=True, mutation_prob=0.5, fill=False)
    play(search, 2)
    parents = {s.candidate.timesteps for s in search.history if s.generation == 0}
    children = [s.candidate.timesteps for s in search.history if s.generation == 1]
    assert any(t not in {p[i] for p in parents} for child in children for i, t in enumerate(child))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population_size": 0, "num_mutants": 0, "num_crossovers": 0}, "population_size must be at least 1, found 0"),
        ({"num_parents": 0}, "num_parents must be at least 1, found 0"),
        ({"num_mutants": -1}, "num_mutants must be at least 0, found -1"),
        ({"num_crossovers": -1}, "num_crossovers must be at least 0"),
        ({"num_mutants": 10}, r"at most population_size \(12\), found 10 \+ 3"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"mutation_prob": 0.0}, r"mutation_prob must lie in \(0, 1\], found 0.0"),
        ({"mutation_prob": math.nan}, "mutation_prob"),
        ({"max_attempts": 0}, "max_attempts must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed_candidates": (W6A6,) * 13}, r"seed_candidates must be at most population_size \(12\), found 13"),
        ({"seed_candidates": (TINY_SPACE.uniform((2, 0), 8, 8),)}, "seed_candidates must lie in the search space"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_search(**changes)
