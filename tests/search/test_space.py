"""Search space: operators stay inside it, and fitting to a budget ends, below the ceiling and close to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.cost import AttentionShape, ConvShape, CostModel, LayerShape, LinearShape
from tmpq_exp.diffusion.schedule import TimestepRule, timestep_groups
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
BITS = (8, 7, 6, 5)


def make_space(num_groups: int = 5, float_bits: bool = False) -> SearchSpace:
    bits = (*BITS, FLOAT_BITS) if float_bits else BITS
    return SearchSpace(
        timestep_groups(100, num_groups, TimestepRule.QUADRATIC),
        weight_choices=((8,), bits, bits, bits, (8,)),
        act_choices=((8,), bits, bits, bits, bits),
        tile_choices=((0,), (0, 2, 4, 6), (0,), (0,), (0,)),
    )


def uniform_budget(space: SearchSpace, bits: int) -> int:
    timesteps = tuple(group[0] for group in reversed(space.timestep_groups))
    return COST.bitops(space.uniform(timesteps, bits, bits))


seeds = st.integers(0, 2**32)


def test_counts_of_genes_and_candidates() -> None:
    space = make_space()
    sizes = [len(group) for group in space.timestep_groups]
    assert space.num_genes == sum(size > 1 for size in sizes) + 3 + 4 + 1
    assert space.num_candidates == int(np.prod(sizes)) * 4**8
    assert space.num_layers == 5


@given(seeds)
def test_operators_stay_in_the_space(seed: int) -> None:
    space, rng = make_space(), np.random.default_rng(seed)
    first, second = space.sample(rng), space.sample(rng)
    for candidate in (first, second, space.mutate(first, 0.5, rng), space.crossover(first, second, rng)):
        assert space.contains(candidate)


@given(seeds)
def test_crossover_takes_every_gene_from_a_parent(seed: int) -> None:
    space, rng = make_space(), np.random.default_rng(seed)
    first, second = space.sample(rng), space.sample(rng)
    child = space.crossover(first, second, rng)
    for field in ("weight_bits", "act_bits", "tiles"):
        genes = zip(*(getattr(c.allocations[0], field) for c in (child, first, second)), strict=True)
        assert all(gene in parents for gene, *parents in genes)
    assert all(t in parents for t, *parents in zip(child.timesteps, first.timesteps, second.timesteps, strict=True))


def test_mutation_redraws_the_expected_share_of_genes() -> None:
    space = SearchSpace((range(1),), ((2, 3, 4, 5),) * 400, ((2, 3, 4, 5),) * 400, ((0,),) * 400)
    rng = np.random.default_rng(0)
    before = space.sample(rng)
    after = space.mutate(before, 0.25, rng)
    (old,), (new,) = before.allocations, after.allocations
    old_genes, new_genes = old.weight_bits + old.act_bits, new.weight_bits + new.act_bits
    num_changed = sum(a != b for a, b in zip(old_genes, new_genes, strict=True))
    assert num_changed / 800 == pytest.approx(0.25 * 0.75, abs=0.04)


def test_contains_refuses_what_is_outside() -> None:
    space = make_space(num_groups=2)
    inside = space.sample(np.random.default_rng(0))
    (allocation,) = inside.allocations
    low, high = space.timestep_groups
    outside = [
        Candidate((high[0],), (allocation,)),
        Candidate((low[1], low[0]), (allocation,)),
        Candidate(inside.timesteps, (allocation, allocation)),
        Candidate(inside.timesteps, (Allocation((8, 8, 4, 8, 8), allocation.act_bits, allocation.tiles),)),
        Candidate(inside.timesteps, (Allocation(allocation.weight_bits, allocation.act_bits, (4, 0, 0, 0, 0)),)),
        Candidate(inside.timesteps, (Allocation((8,) * 4, (8,) * 4, (0,) * 4),)),
    ]
    assert space.contains(inside)
    assert not any(space.contains(candidate) for candidate in outside)


def test_uniform_keeps_fixed_genes_and_is_direct() -> None:
    candidate = make_space().uniform((9, 1), 6, 5)
    assert candidate.timesteps == (9, 1)
    assert candidate.allocations == (Allocation((8, 6, 6, 6, 8), (8, 5, 5, 5, 5), (0, 0, 0, 0, 0)),)
    with pytest.raises(ValueError, match=r"weight_bits must be one of \[8, 7, 6, 5\], found 4"):
        make_space().uniform((9, 1), 4, 5)


def test_cheapest_is_the_minimum_over_the_whole_space() -> None:
    space = make_space(num_groups=1)
    cheapest = space.cheapest(COST)
    assert space.contains(cheapest)
    rng = np.random.default_rng(0)
    least = min(COST.bitops(space.sample(rng)) for _ in range(3000))
    assert COST.bitops(cheapest) <= least
    assert cheapest.allocations[0].weight_bits == (8, 5, 5, 5, 8)


@given(seeds, st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]), st.booleans())
def test_repair_and_fill_end_within_any_budget(seed: int, position: float, float_bits: bool) -> None:
    space, rng = make_space(float_bits=float_bits), np.random.default_rng(seed)
    low = COST.bitops(space.cheapest(COST))
    budget = Budget(space, COST, low + int(position * (uniform_budget(space, 8) - low)))
    repaired = budget.repair(space.sample(rng), rng)
    filled = budget.fill(repaired, rng)
    assert COST.bitops(repaired) <= COST.bitops(filled) <= budget.budget_bitops
    assert space.contains(repaired)
    assert space.contains(filled)


@given(seeds)
def test_no_gene_of_a_filled_candidate_can_be_raised(seed: int) -> None:
    space, rng = make_space(), np.random.default_rng(seed)
    budget = Budget(space, COST, uniform_budget(space, 6))
    filled = budget.fill(budget.repair(space.sample(rng), rng), rng)
    (allocation,) = filled.allocations
    for layer, choices in enumerate(space.act_choices):
        for choice in choices:
            if choice > allocation.act_bits[layer]:
                act_bits = (*allocation.act_bits[:layer], choice, *allocation.act_bits[layer + 1 :])
                raised = Allocation(allocation.weight_bits, act_bits, allocation.tiles)
                assert not budget.is_feasible(Candidate(filled.timesteps, (raised,)))


def test_repair_leaves_feasible_candidates_and_timesteps_alone() -> None:
    space, rng = make_space(), np.random.default_rng(0)
    budget = Budget(space, COST, uniform_budget(space, 6))
    feasible = space.cheapest(COST)
    assert budget.repair(feasible, rng) is feasible
    costly = space.uniform(space.sample(rng).timesteps, 8, 8)
    assert budget.repair(costly, rng).timesteps == costly.timesteps
    assert budget.fill(feasible, rng).timesteps == feasible.timesteps


def test_repair_and_fill_repeat_under_one_seed() -> None:
    space = make_space()
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


def test_bad_spaces_are_named() -> None:
    bits = ((8, 6),)
    with pytest.raises(ValueError, match="timestep_groups must not be empty"):
        SearchSpace((), bits, bits, bits)
    for groups in [(range(3), range(2, 5)), (range(3), range(0)), ((2, 1),), (range(5, 6), range(1))]:
        with pytest.raises(ValueError, match="timestep_groups must be non-empty and ascend"):
            SearchSpace(groups, bits, bits, bits)
    with pytest.raises(ValueError, match=r"one entry a layer each, found \[1, 2, 1\]"):
        SearchSpace((range(3),), bits, bits * 2, bits)
    with pytest.raises(ValueError, match="act_choices of layer 0 must be distinct"):
        SearchSpace((range(3),), bits, ((8, 8),), bits)
    with pytest.raises(ValueError, match="space has 5 layers and cost has 1"):
        Budget(make_space(), CostModel(LAYERS[:1]), 10**12)
