"""Packed integers are what the quantizer computes with, and fill no more bits than they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.config import Granularity, QuantizerConfig
from tmpq_exp.quant.primitives import integer_range, pack_integers, unpack_integers
from tmpq_exp.quant.quantizer import WeightQuantizer


@given(st.data(), st.integers(1, 16))
def test_packing_integers_is_undone_and_wastes_nothing(data: st.DataObject, bits: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack_integers(torch.tensor(values), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack_integers(packed, bits, len(values)).tolist() == values


def test_six_bits_by_hand() -> None:
    # the lowest bit first: 100000 111111 010000 -> 10000011 11110100 00
    assert pack_integers(torch.tensor([1, 63, 2]), 6).tolist() == [0b11000001, 0b00101111, 0b00]


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (5, 1, 3, 3), (5, 7, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kept_integers_stand_for_the_weight(
    granularity: Granularity,
    symmetric: bool,
    is_learned: bool,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(memory_format=memory_format)
    config = QuantizerConfig(granularity, symmetric=symmetric, group_size=4)
    quantizer, fresh = (WeightQuantizer((8, 3), weight.shape, config) for _ in range(2))
    quantizer.estimate(quantizer.rows(weight))
    if is_learned:
        quantizer.start_rounding(weight)
        for bits in (8, 3):
            quantizer.set_rounding(bits, torch.rand(weight.shape, generator=generator) < 0.5)
    fresh.scale, fresh.zero_point = quantizer.scale, quantizer.zero_point
    for bits in (8, 3):
        low, high = integer_range(bits, symmetric)
        integers = quantizer.integers(weight, bits)
        assert integers.min() >= low
        assert integers.max() <= high
        assert torch.equal(integers, integers.round())
        fresh.keep_packed(bits, quantizer.packed(weight, bits))
        expected, again = quantizer(weight, bits), fresh(torch.zeros_like(weight), bits)
        assert torch.equal(again, expected)
        assert again.stride() == expected.stride()  # kernels differ in the last bit between layouts
        assert torch.equal(fresh.packed(weight, bits), quantizer.packed(weight, bits))


def test_as_many_bytes_as_the_weight_needs() -> None:
    quantizer = WeightQuantizer((6,), (2, 3), QuantizerConfig())
    for wrong in (torch.zeros(6, dtype=torch.uint8), torch.zeros(5), torch.zeros(5, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="5 bytes expected, found"):
            quantizer.keep_packed(6, wrong)
