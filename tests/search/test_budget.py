"""Fitting to a budget: it ends below any ceiling and close to it, stays in the space, and repeats under one seed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.cost import AttentionShape, ConvShape, CostModel, LayerShape, LinearShape
from tmpq_exp.diffusion.schedule import TimestepRule, group_minima, timestep_groups
from tmpq_exp.quant.allocation import FLOAT_BITS, Allocation, Candidate
from tmpq_exp.search.budget import Budget
from tmpq_exp.search.space import SearchSpace

LAYERS: tuple[LayerShape, ...] = (
    ConvShape("first", 3, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 16),
    ConvShape("wide", 16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 16),
    ConvShape("down", 64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 1, 8, 8),
    LinearShape("embedding", 64, 128, 1),
    AttentionShape("attention.products", 4, 64, 64, 16),
)
COST = CostModel(LAYERS, calls_per_step=2)
JOINT_K = {"min_steps": 2, "max_steps": 8, "min_steps_per_group": 0, "max_steps_per_group": 3}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_step": {"bits_per_step": "per_step"},
    "joint_k": JOINT_K,
    "joint_k per_step": JOINT_K | {"bits_per_step": "per_step"},
    "float": {"bits": (8, 7, 6, 5, FLOAT_BITS)},
    "direct": {"tiles": (0,)},
}


def make_space(bits: tuple[int, ...] = (8, 7, 6, 5), tiles: tuple[int, ...] = (0, 2, 4, 6), **kind: Any) -> SearchSpace:
    return SearchSpace(
        timestep_groups(100, 5, TimestepRule.QUADRATIC),
        weight_choices=((8,), bits, bits, bits, (8,)),
        act_choices=((8,), bits, bits, bits, bits),
        tile_choices=((0,), tiles, (0,), (0,), (0,)),
        **kind,
    )


def uniform_budget(space: SearchSpace, bits: int) -> int:
    return COST.bitops(space.uniform(group_minima(space.timestep_groups), bits, bits))


seeds = st.integers(0, 2**32)


@given(seeds, st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]), st.sampled_from(list(KINDS)), st.booleans())
def test_repair_and_fill_end_within_any_budget(seed: int, position: float, kind: str, highest_bits: bool) -> None:
    space, rng = make_space(**KINDS[kind]), np.random.default_rng(seed)
    low = COST.bitops(space.cheapest(COST))
    budget = Budget(space, COST, low + int(position * (uniform_budget(space, 8) - low)))
    repaired = budget.repair(space.sample(rng, highest_bits=highest_bits), rng)
    filled = budget.fill(repaired, rng)
    assert COST.bitops(repaired) <= COST.bitops(filled) <= budget.budget_bitops
    assert space.contains(repaired)
    assert space.contains(filled)


@given(seeds, st.sampled_from(["shared", "per_step"]))
def test_no_gene_of_a_filled_candidate_can_be_raised(seed: int, kind: str) -> None:
    space, rng = make_space(**KINDS[kind]), np.random.default_rng(seed)
    budget = Budget(space, COST, uniform_budget(space, 6))
    filled = budget.fill(budget.repair(space.sample(rng), rng), rng)
    genes = space.encode(filled)
    for place in zip(*np.nonzero(genes[:2] < space.num_choices[:2] - 1), strict=True):
        raised = genes.copy()
        raised[place] += 1
        assert not budget.is_feasible(space.decode(filled.timesteps, raised))


@given(seeds)
def test_a_lower_ceiling_holds_for_one_call(seed: int) -> None:
    space, rng = make_space(**JOINT_K), np.random.default_rng(seed)
    budget = Budget(space, COST, uniform_budget(space, 8))
    ceiling = int(rng.integers(budget.cheapest_bitops, budget.budget_bitops))
    filled = budget.fill(budget.repair(space.sample(rng), rng, ceiling), rng, ceiling)
    assert COST.bitops(filled) <= ceiling


def test_repair_leaves_feasible_candidates_and_fixed_timesteps_alone() -> None:
    space, rng = make_space(), np.random.default_rng(0)
    budget = Budget(space, COST, uniform_budget(space, 6))
    feasible = space.cheapest(COST)
    assert budget.repair(feasible, rng) is feasible
    costly = space.uniform(space.sample(rng).timesteps, 8, 8)
    assert budget.repair(costly, rng).timesteps == costly.timesteps
    assert budget.fill(feasible, rng).timesteps == feasible.timesteps


def test_repair_lowers_layers_in_proportion_to_what_that_saves() -> None:
    """Two layers of one binary gene each, one of them nine times as costly: it goes first nine times in ten."""
    cost = CostModel((LinearShape("small", 10, 10, 1), LinearShape("large", 10, 10, 9)))
    space = SearchSpace((range(1),), ((8, 7), (8, 7)), ((8,), (8,)), ((0,), (0,)))
    highest = space.uniform((0,), 8, 8)
    budget = Budget(space, cost, cost.bitops(highest) - 1)
    rng = np.random.default_rng(0)
    lowered = [budget.repair(highest, rng).allocations[0].weight_bits for _ in range(2000)]
    assert lowered.count((8, 7)) / 2000 == pytest.approx(0.9, abs=0.025)
    assert lowered.count((8, 7)) + lowered.count((7, 8)) == 2000


@pytest.mark.parametrize("kind", ["joint_k", "joint_k per_step"])
def test_repair_may_drop_steps_and_fill_may_add_them(kind: str) -> None:
    space, rng = make_space(**KINDS[kind]), np.random.default_rng(0)
    budget = Budget(space, COST, uniform_budget(space, 6))
    numbers = {len(budget.repair(space.sample(rng, highest_bits=True), rng).timesteps) for _ in range(200)}
    assert min(numbers) >= 2
    assert len(numbers) >= 4
    rich = Budget(space, COST, 10**15)
    filled = rich.fill(space.cheapest(COST), rng)
    assert len(filled.timesteps) == 8
    assert {allocation.act_bits for allocation in filled.allocations} == {(8,) * 5}


def test_the_budget_says_how_many_steps_it_pays_for() -> None:
    space = make_space(**JOINT_K)
    per_step = COST.bitops(space.cheapest(COST)) // 2
    assert Budget(space, COST, 5 * per_step).max_steps == 5
    assert Budget(space, COST, 6 * per_step - 1).max_steps == 5
    assert Budget(space, COST, 100 * per_step).max_steps == 8


@pytest.mark.parametrize("kind", KINDS)
def test_repair_and_fill_repeat_under_one_seed(kind: str) -> None:
    space = make_space(**KINDS[kind])
    budget = Budget(space, COST, uniform_budget(space, 6))

    def fit(seed: int) -> Candidate:
        rng = np.random.default_rng(seed)
        return budget.fill(budget.repair(space.sample(rng), rng), rng)

    assert fit(3) == fit(3)
    assert len({fit(seed) for seed in range(20)}) == 20


def test_a_budget_below_the_cheapest_candidate_names_it() -> None:
    space = make_space()
    cheapest = COST.bitops(space.cheapest(COST))
    assert Budget(space, COST, cheapest).cheapest_bitops == cheapest
    with pytest.raises(ValueError, match=f"at least {cheapest} .*cheapest.*found {cheapest - 1}"):
        Budget(space, COST, cheapest - 1)
    with pytest.raises(ValueError, match="space has 5 layers and cost has 1"):
        Budget(space, CostModel(LAYERS[:1]), 10**12)


def test_tiles_give_way_only_where_bits_do_not_suffice() -> None:
    space, rng = make_space(), np.random.default_rng(0)
    costly = Allocation((8, 8, 8, 8, 8), (8,) * 5, (0, 0, 0, 0, 0))
    direct = Candidate(space.cheapest(COST).timesteps, (costly,))
    lowest = space.uniform(direct.timesteps, 5, 5)
    kept = Budget(space, COST, COST.bitops(lowest)).repair(direct, rng)
    assert kept == lowest
    given_up = Budget(space, COST, COST.bitops(lowest) - 1).repair(direct, rng)
    assert given_up.allocations[0].tiles != lowest.allocations[0].tiles
    assert given_up.allocations[0].act_bits == lowest.allocations[0].act_bits
