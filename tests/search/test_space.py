"""Search space: operators stay inside it, genes come from parents, and arrays and candidates say the same."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.cost import AttentionShape, ConvShape, CostModel, LayerShape, LinearShape
from tmpq_exp.diffusion.schedule import TimestepRule, timestep_groups
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.search.space import BitsPerStep, SearchSpace

LAYERS: tuple[LayerShape, ...] = (
    ConvShape("first", 3, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 16),
    ConvShape("wide", 16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 16),
    ConvShape("down", 64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 1, 8, 8),
    LinearShape("embedding", 64, 128, 1),
    AttentionShape("attention.products", 4, 64, 64, 16),
)
COST = CostModel(LAYERS, calls_per_step=2)
BITS = (8, 7, 6, 5)


JOINT_K = {"min_steps": 2, "max_steps": 8, "min_steps_per_group": 0, "max_steps_per_group": 3}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_step": {"bits_per_step": "per_step"},
    "joint_k": JOINT_K,
    "joint_k per_step": JOINT_K | {"bits_per_step": "per_step"},
}


def make_space(num_groups: int = 5, **arguments: Any) -> SearchSpace:
    return SearchSpace(
        timestep_groups(100, num_groups, TimestepRule.QUADRATIC),
        weight_choices=((8,), BITS, BITS, BITS, (8,)),
        act_choices=((8,), BITS, BITS, BITS, BITS),
        tile_choices=((0,), (0, 2, 4, 6), (0,), (0,), (0,)),
        **arguments,
    )


seeds = st.integers(0, 2**32)


def test_counts_of_genes_and_candidates() -> None:
    space = make_space()
    sizes = [len(group) for group in space.timestep_groups]
    assert space.num_genes == sum(size > 1 for size in sizes) + 3 + 4 + 1
    assert space.num_candidates == int(np.prod(sizes)) * 4**8
    assert space.num_layers == 5


@given(seeds, st.sampled_from(list(KINDS)))
def test_operators_stay_in_the_space(seed: int, kind: str) -> None:
    space, rng = make_space(**KINDS[kind]), np.random.default_rng(seed)
    first, second = space.sample(rng), space.sample(rng, highest_bits=True)
    for candidate in (first, second, space.mutate(first, 0.5, rng), space.crossover(first, second, rng)):
        assert space.contains(candidate)
        assert space.decode(candidate.timesteps, space.encode(candidate)) == candidate


@given(seeds, st.sampled_from(list(KINDS)))
def test_crossover_takes_every_gene_from_a_parent(seed: int, kind: str) -> None:
    space, rng = make_space(**KINDS[kind]), np.random.default_rng(seed)
    first, second = space.sample(rng), space.sample(rng)
    child = space.crossover(first, second, rng)
    parents = first.allocations + second.allocations
    for allocation in child.allocations:
        for name in ("weight_bits", "act_bits", "tiles"):
            held = zip(*(getattr(parent, name) for parent in parents), strict=True)
            assert all(gene in genes for gene, genes in zip(getattr(allocation, name), held, strict=True))
    assert set(child.timesteps) <= {*first.timesteps, *second.timesteps}


@given(seeds)
def test_where_parents_have_the_same_steps_each_step_crosses_alone(seed: int) -> None:
    space, rng = make_space(bits_per_step="per_step"), np.random.default_rng(seed)
    first = space.sample(rng)
    second = Candidate(first.timesteps, space.sample(rng).allocations)
    child = space.crossover(first, second, rng)
    assert child.timesteps == first.timesteps
    for step in range(5):
        mine, *parents = (c.allocation_at(step).weight_bits for c in (child, first, second))
        assert all(gene in genes for gene, *genes in zip(mine, *parents, strict=True))


def test_steps_that_agree_are_written_as_one_allocation() -> None:
    space = make_space(bits_per_step="per_step")
    candidate = space.uniform((90, 60, 30, 5, 0), 6, 6)
    assert space.encode(candidate).shape == (3, 5, 5)
    assert space.decode(candidate.timesteps, space.encode(candidate)) == candidate
    assert space.contains(Candidate(candidate.timesteps, space.sample(np.random.default_rng(0)).allocations))


def test_counts_with_a_free_number_of_steps_and_bits_per_step() -> None:
    bits = ((8, 6),)
    space = SearchSpace((range(2), range(2, 4)), bits, bits, ((0,),), 1, 2, 0, 2, BitsPerStep.PER_STEP)
    assert space.num_candidates == 4 * 4 + 6 * 4**2
    assert space.num_genes == 2 + 2 * 2


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
