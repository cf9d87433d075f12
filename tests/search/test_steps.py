"""Kept timesteps: every operator stays within groups and numbers, children take from their parents only."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.diffusion.schedule import TimestepRule, timestep_groups
from tmpq_exp.search.steps import StepSpace


@st.composite
def spaces(draw: st.DrawFn) -> StepSpace:
    """Grouped or free, K fixed or not, some groups of a single timestep."""
    num_train_timesteps = draw(st.integers(1, 60))
    num_groups = draw(st.integers(1, min(8, num_train_timesteps)))
    groups = timestep_groups(num_train_timesteps, num_groups, draw(st.sampled_from(TimestepRule)))
    low = draw(st.integers(0, 2))
    high = draw(st.integers(max(low, 1), 4 if num_groups > 1 else num_train_timesteps + 2))
    fewest = sum(min(low, len(group)) for group in groups)
    most = sum(min(high, len(group)) for group in groups)
    max_steps = draw(st.integers(max(1, fewest), most))
    return StepSpace(groups, draw(st.integers(1, max_steps)), max_steps, low, high)


seeds = st.integers(0, 2**32)


@given(spaces(), seeds, st.floats(0.01, 1))
def test_operators_stay_in_the_space(space: StepSpace, seed: int, prob: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = space.sample(rng, space.max_steps), space.sample(rng, space.max_steps)
    children = space.mutate(first, prob, rng), space.crossover(first, second, rng)
    for timesteps in (first, second, *children, space.first(space.min_steps), space.first(space.max_steps)):
        assert space.min_steps <= len(timesteps) <= space.max_steps
        assert list(timesteps) == sorted(set(timesteps), reverse=True)
        assert space.contains(timesteps)


@given(spaces(), seeds)
def test_a_child_keeps_what_both_parents_keep_and_nothing_else_is_new(space: StepSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = space.sample(rng, space.max_steps), space.sample(rng, space.max_steps)
    assert set(space.crossover(first, second, rng)) <= {*first, *second}
    assert space.crossover(first, first, rng) == first


@given(spaces(), seeds)
def test_drops_and_additions_end_at_the_range(space: StepSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    timesteps = space.sample(rng, space.max_steps)
    dropped = space.droppable(timesteps, rng.permutation(len(timesteps)).tolist())
    assert len(dropped) == len(timesteps) - space.min_steps
    assert space.contains(tuple(t for i, t in enumerate(timesteps) if i not in dropped))
    while len(timesteps) < space.max_steps:
        longer = space.with_one_more(timesteps, rng)
        assert set(timesteps) < set(longer)
        assert len(longer) == len(timesteps) + 1
        assert space.contains(longer)
        timesteps = longer


def test_the_number_of_sequences_is_that_of_a_count() -> None:
    space = StepSpace((range(3), range(3, 5), range(5, 6)), 2, 4, 0, 2)
    counted = {
        k: sum(space.contains(tuple(sorted(chosen, reverse=True))) for chosen in combinations(range(6), k))
        for k in range(1, 7)
    }
    assert space.num_sequences() == {2: 15, 3: 19, 4: 12}  # by hand: 20 - 1 and 15 - 3 hold no whole first group
    assert counted == {1: 0, 2: 15, 3: 19, 4: 12, 5: 0, 6: 0}


def test_sampling_draws_the_number_of_steps_uniformly() -> None:
    space = StepSpace(timestep_groups(1000, 10, TimestepRule.QUADRATIC), 5, 20, 0, 2)
    rng = np.random.default_rng(0)
    numbers = np.bincount([len(space.sample(rng, 14)) for _ in range(2000)], minlength=21)
    assert numbers[:5].sum() == numbers[15:].sum() == 0
    assert numbers[5:15].min() > 140


def test_mutation_changes_the_number_of_steps_and_moves_them() -> None:
    space = StepSpace(timestep_groups(1000, 10, TimestepRule.QUADRATIC), 5, 20, 0, 2)
    rng = np.random.default_rng(0)
    parent = space.sample(rng, 12)
    changes = [len(space.mutate(parent, 0.2, rng)) - len(parent) for _ in range(500)]
    assert min(changes) < 0 < max(changes)
    assert any(change == 0 for change in changes)


def test_without_groups_any_timesteps_may_be_kept() -> None:
    space = StepSpace((range(1000),), 3, 3, 0, 1000)
    assert space.contains((999, 998, 0))
    assert not space.contains((999, 0))
    assert not space.contains((1000, 5, 0))
    drawn = np.array([space.sample(np.random.default_rng(seed), 3) for seed in range(500)])
    assert drawn.mean() == pytest.approx(499.5, abs=35)


def test_counterparts_are_of_the_same_group_before_they_are_near() -> None:
    space = StepSpace((range(10), range(10, 1000)), 2, 2)
    assert space.counterparts((12, 0), (900, 9)) == [0, 1]
    assert StepSpace((range(1000),), 1, 5, 0, 5).counterparts((700, 12), (900, 650, 9)) == [1, 2]


def test_bad_ranges_are_named() -> None:
    groups = (range(3), range(3, 6))
    for arguments, message in [
        ((2, 1), "min_steps must be at least 1 and at most max_steps, found 2 and 1"),
        ((0, 1), "min_steps must be at least 1"),
        ((2, 2, 2, 1), "min_steps_per_group must be at least 0 and at most max_steps_per_group, found 2 and 1"),
        ((1, 1), r"2 groups keep 2 to 2 timesteps, which min_steps..max_steps must meet, found 1..1"),
        ((7, 9, 0, 3), "2 groups keep 0 to 6 timesteps"),
    ]:
        with pytest.raises(ValueError, match=message):
            StepSpace(groups, *arguments)
