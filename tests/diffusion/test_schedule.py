"""Schedules: the published cuts, and partitions that hold for every T and K."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.diffusion.schedule import (
    TimestepRule,
    TimestepSpacing,
    group_minima,
    linear_alphas_cumprod,
    spaced_timesteps,
    standing_timestep,
    timestep_groups,
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int]:
    num_train_timesteps = draw(st.integers(1, 1500))
    return num_train_timesteps, draw(st.integers(1, num_train_timesteps))


def test_quadratic_cuts_are_the_published_ones() -> None:
    groups = timestep_groups(1000, 10, TimestepRule.QUADRATIC)
    assert [group.start for group in groups] == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert groups[-1].stop == 1000


def test_quadratic_cuts_are_exact_where_floats_are_off_by_one() -> None:
    for num_groups in range(2, 30):
        starts = [group.start for group in timestep_groups(1000, num_groups, TimestepRule.QUADRATIC)]
        assert starts == [800 * j * j // (num_groups - 1) ** 2 for j in range(num_groups)]


@given(steps(), st.sampled_from(TimestepRule))
def test_groups_partition_all_timesteps(counts: tuple[int, int], rule: TimestepRule) -> None:
    num_train_timesteps, num_groups = counts
    groups = timestep_groups(num_train_timesteps, num_groups, rule)
    assert len(groups) == num_groups
    assert all(len(group) > 0 for group in groups)
    assert [timestep for group in groups for timestep in group] == list(range(num_train_timesteps))


@pytest.mark.parametrize("rule", TimestepRule)
def test_groups_are_non_empty_at_every_small_count(rule: TimestepRule) -> None:
    for num_train_timesteps in range(1, 41):
        for num_groups in range(1, num_train_timesteps + 1):
            groups = timestep_groups(num_train_timesteps, num_groups, rule)
            assert sum(map(len, groups)) == num_train_timesteps
            assert len(groups) == num_groups
            assert all(groups)


def test_uniform_groups_differ_by_one_timestep_at_most() -> None:
    sizes = {len(group) for group in timestep_groups(1000, 7, TimestepRule.UNIFORM)}
    assert sizes == {142, 143}


@given(steps(), st.sampled_from(TimestepSpacing))
def test_spaced_timesteps_descend_within_the_schedule(counts: tuple[int, int], spacing: TimestepSpacing) -> None:
    num_train_timesteps, num_steps = counts
    timesteps = spaced_timesteps(num_train_timesteps, num_steps, spacing)
    assert len(set(timesteps)) == num_steps
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert 0 <= timesteps[-1] <= timesteps[0] < num_train_timesteps


def test_quadratic_spacing_is_the_group_minima() -> None:
    groups = timestep_groups(1000, 10, TimestepRule.QUADRATIC)
    assert spaced_timesteps(1000, 10, TimestepSpacing.QUADRATIC) == group_minima(groups)
    assert group_minima(groups) == (800, 632, 483, 355, 246, 158, 88, 39, 9, 0)


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_standing_timesteps_of_uniform_groups_are_the_trailing_schedule(num_steps: int) -> None:
    groups = timestep_groups(1000, num_steps, TimestepRule.UNIFORM)
    standing = tuple(standing_timestep(group, TimestepSpacing.TRAILING) for group in reversed(groups))
    assert standing == spaced_timesteps(1000, num_steps, TimestepSpacing.TRAILING)
    assert [standing_timestep(group, TimestepSpacing.QUADRATIC) for group in groups] == [g[0] for g in groups]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50, 999, 1000])
def test_leading_and_trailing_spacing_equal_those_of_diffusers(num_steps: int) -> None:
    leading = (np.arange(0, num_steps) * (1000 // num_steps)).round()[::-1]
    trailing = np.round(np.arange(1000, 0, -1000 / num_steps))[:num_steps] - 1
    assert spaced_timesteps(1000, num_steps, TimestepSpacing.LEADING) == tuple(leading.astype(int).tolist())
    assert spaced_timesteps(1000, num_steps, TimestepSpacing.TRAILING) == tuple(trailing.astype(int).tolist())


def test_alphas_cumprod_equals_its_definition() -> None:
    alphas_cumprod = linear_alphas_cumprod(1000, 1e-4, 0.02)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert alphas_cumprod.dtype == torch.float64
    assert alphas_cumprod.shape == (1000,)
    assert float(alphas_cumprod[0]) == pytest.approx(1 - 1e-4, rel=1e-14)
    assert float(alphas_cumprod[-1]) == pytest.approx(np.prod([1 - beta for beta in betas]), rel=1e-12)
    assert (alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_too_many_or_no_steps_are_named_with_their_limit(num_steps: int) -> None:
    message = rf"num_inference_steps must be in 1\.\.1000 .*found {num_steps}"
    with pytest.raises(ValueError, match=message):
        timestep_groups(1000, num_steps, TimestepRule.QUADRATIC)
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, num_steps, TimestepSpacing.LEADING)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 1, found 0"):
        timestep_groups(0, 1, TimestepRule.UNIFORM)
    with pytest.raises(ValueError, match="timestep_rule must be one of quadratic, uniform, found 'cubic'"):
        timestep_groups(10, 2, "cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timestep_spacing must be one of quadratic, leading, trailing"):
        spaced_timesteps(10, 2, "even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta_start"):
        linear_alphas_cumprod(10, 0.0, 0.1)
    with pytest.raises(ValueError, match="beta_end"):
        linear_alphas_cumprod(10, 0.1, 0.05)
