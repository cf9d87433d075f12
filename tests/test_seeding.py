"""Named random streams: the same everywhere, different from each other."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.seeding import stream, stream_seed

NAMES = st.lists(st.one_of(st.integers(0, 99), st.sampled_from(["image", "search", "final"])), max_size=3)


@given(st.integers(0, 2**64), NAMES)
def test_seeds_survive_json_and_seed_a_generator(seed: int, names: list[str | int]) -> None:
    value = stream_seed(seed, *names)
    assert 0 <= value < 2**53
    assert json.loads(json.dumps(float(value))) == value
    assert stream(seed, *names).initial_seed() == value


@given(st.integers(0, 3), NAMES, st.integers(0, 3), NAMES)
def test_streams_are_equal_if_and_only_if_seed_and_names_are(
    seed: int, names: list[str | int], other_seed: int, other_names: list[str | int]
) -> None:
    same = (seed, *names) == (other_seed, *other_names)
    assert (stream_seed(seed, *names) == stream_seed(other_seed, *other_names)) is same


def test_the_stream_of_a_seed_never_changes() -> None:
    assert stream_seed(0, "final") == 4249672027237875
    assert torch.randn(1, generator=stream(0, "image", 3)).item() == pytest.approx(0.920333, abs=1e-6)


def test_two_streams_are_uncorrelated() -> None:
    a, b = (torch.randn(20_000, generator=stream(0, "image", i)) for i in range(2))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03
