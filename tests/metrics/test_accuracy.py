"""Top-1 and its interval, against scipy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from tmpq_exp.metrics.accuracy import count_correct, wilson_interval


@given(st.integers(1, 20000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_the_interval_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    low, high = wilson_interval(*counts, confidence)
    expected = binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= counts[0] / counts[1] + 1e-12
    assert counts[0] / counts[1] - 1e-12 <= high <= 1


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 2, 0.0), (1, 2, 1.0)])
def test_what_is_no_share_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="found"):
        wilson_interval(*arguments)  # type: ignore[arg-type]


def test_images_are_counted_over_batches_and_nan_is_wrong() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    nan = float("nan")
    batches = [
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([1, 1])),
        (torch.tensor([[nan, 1.0], [5.0, nan], [3.0, 0.0]]), torch.tensor([0, 0, 0])),
    ]
    seen: list[int] = []
    assert count_correct(Pixels(), batches, lambda: seen.append(1)) == 2
    assert len(seen) == 2
