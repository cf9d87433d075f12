"""Costs equal hand counts, add up, and count what the method says they count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.cost import (
    AttentionShape,
    ConvShape,
    CostModel,
    LayerShape,
    LinearShape,
    saving_tiles,
    with_error_feedback,
)
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate


def conv(name: str = "conv", channels: tuple[int, int] = (16, 32), size: int = 8, **changes: object) -> ConvShape:
    settings: dict[str, object] = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    settings |= {"groups": 1, "out_height": size, "out_width": size} | changes
    return ConvShape(name, *channels, **settings)  # type: ignore[arg-type]


LAYERS: tuple[LayerShape, ...] = (conv(), LinearShape("linear", 10, 20, 3), AttentionShape("attn.products", 2, 4, 6, 8))


def uniform(weight_bits: int, act_bits: int, num_steps: int = 1, tiles: tuple[int, ...] = (0, 0, 0)) -> Candidate:
    allocation = Allocation((weight_bits,) * 3, (act_bits,) * 3, tiles)
    return Candidate(tuple(range(num_steps, 0, -1)), (allocation,))


def test_direct_convolution_by_hand() -> None:
    layer = conv(kernel_size=(3, 5), groups=4, out_height=7, out_width=9)
    assert layer.num_weights == 32 * 4 * 15
    assert layer.macs == 7 * 9 * 32 * 4 * 15
    assert layer.bitops(4, 8, DIRECT_TILE) == layer.macs * 32
    assert layer.weight_bytes(4, DIRECT_TILE) == 32 * 4 * 15 // 2


def test_linear_by_hand() -> None:
    layer = LinearShape("linear", 10, 20, 3)
    assert layer.macs == 600
    assert layer.bitops(5, 7, DIRECT_TILE) == 600 * 35
    assert layer.weight_bytes(5, DIRECT_TILE) == 125


def test_weight_bytes_round_up() -> None:
    assert LinearShape("linear", 3, 1, 1).weight_bytes(3, DIRECT_TILE) == 2


def test_attention_by_hand() -> None:
    layer = AttentionShape("attn.products", heads=2, queries=4, keys=6, head_dim=8)
    products = 2 * 4 * 6 * 8
    assert layer.macs == 2 * products
    assert layer.bitops(16, 6, DIRECT_TILE) == products * (6 * 6 + 16 * 6)
    assert layer.bitops(FLOAT_BITS, FLOAT_BITS, DIRECT_TILE) == 2 * products * 1024
    assert layer.weight_bytes(8, DIRECT_TILE) == 0
    assert AttentionShape("a", 2, 4, 6, 8, value_dim=3).macs == 2 * 4 * 6 * (8 + 3)


def test_winograd_convolution_by_hand() -> None:
    """F(4, 3) on 10 x 10 pixels: 3 x 3 tiles of 6 x 6, those of the border counted whole."""
    layer = conv(channels=(16, 32), size=10)
    assert layer.num_tiles(4) == 9
    assert layer.hadamard_macs(4) == 9 * 36 * 16 * 32
    assert layer.input_transform_macs(4) == 9 * 16 * 2 * 216
    assert layer.output_transform_macs(4) == 9 * 32 * (4 * 36 + 16 * 6)
    transforms = 9 * 16 * 432 * 5 * 8 + 9 * 32 * 240 * 8 * 8
    assert layer.bitops(6, 5, 4) == 9 * 36 * 16 * 32 * 30 + transforms
    assert layer.hadamard_bitops(6, 5, 4) == 9 * 36 * 16 * 32 * 30
    assert layer.executed_macs(4) == 9 * (36 * 512 + 16 * 432 + 32 * 240)
    assert layer.weight_bytes(6, 4) == 36 * 16 * 32 * 6 // 8


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_hadamard_share_without_waste(tile: int) -> None:
    layer = conv(size=12)
    assert layer.hadamard_macs(tile) * 9 * tile**2 == layer.macs * (tile + 2) ** 2


@pytest.mark.parametrize(("channels", "percent"), [(16, 117), (32, 58), (64, 29)])
def test_transforms_weigh_what_the_method_says(channels: int, percent: int) -> None:
    layer = conv(channels=(channels, channels), size=16)
    transforms = layer.bitops(8, 8, 4) - layer.hadamard_bitops(8, 8, 4)
    assert round(100 * transforms / layer.hadamard_bitops(8, 8, 4)) == percent


def test_float_layers_count_32_by_32_at_every_stage() -> None:
    for tile in (DIRECT_TILE, 2, 4):
        assert conv().bitops(FLOAT_BITS, FLOAT_BITS, tile) == conv().executed_macs(tile) * 1024


@pytest.mark.parametrize(
    "layer",
    [
        conv(stride=(2, 2)),
        conv(dilation=(2, 2)),
        conv(kernel_size=(1, 1)),
        conv(kernel_size=(3, 1)),
        conv(groups=2),
        LinearShape("conv", 4, 4, 1),
        AttentionShape("conv", 1, 2, 2, 4),
    ],
)
def test_tiles_are_refused_where_winograd_is_impossible(layer: LayerShape) -> None:
    with pytest.raises(ValueError, match=r"tile of layer 'conv' must be 0 \(direct\), found 4"):
        layer.bitops(8, 8, 4)
    with pytest.raises(ValueError, match="tile of layer 'conv'"):
        layer.weight_bytes(8, 4)


@pytest.mark.parametrize("tile", [-2, 1])
def test_tiles_that_are_none_are_refused(tile: int) -> None:
    with pytest.raises(ValueError, match=f"found {tile}"):
        conv().executed_macs(tile)


def test_trajectory_is_steps_times_calls_times_layers() -> None:
    one_call = sum(layer.bitops(6, 5, DIRECT_TILE) for layer in LAYERS)
    assert CostModel(LAYERS).bitops(uniform(6, 5)) == one_call
    assert CostModel(LAYERS).bitops(uniform(6, 5, num_steps=10)) == 10 * one_call
    assert CostModel(LAYERS, calls_per_step=2).bitops(uniform(6, 5, num_steps=10)) == 20 * one_call
    assert CostModel(LAYERS, calls_per_step=2).macs(uniform(6, 5, 10)) == 20 * sum(layer.macs for layer in LAYERS)


def test_hadamard_total_leaves_out_transforms_only() -> None:
    cost, candidate = CostModel(LAYERS), uniform(8, 8, num_steps=3, tiles=(4, 0, 0))
    layer = conv()
    transforms = 64 * (layer.input_transform_macs(4) + layer.output_transform_macs(4))
    assert cost.bitops(candidate) - cost.hadamard_bitops(candidate) == 3 * transforms
    assert cost.hadamard_bitops(uniform(8, 8)) == cost.bitops(uniform(8, 8))


def test_error_feedback_of_shaped_stages_is_paid_for() -> None:
    plain, layer = CostModel(LAYERS), conv()
    shaped = {stages: CostModel(with_error_feedback(LAYERS, stages)) for stages in (("u",), ("v",), ("u", "v", "m"))}
    tiled, direct = uniform(6, 5, tiles=(4, 0, 0)), uniform(6, 5)
    of_v = 4 * (36 * 35 // 2) * 16  # 4 tiles of 6 x 6 taps, 16 channels in and 32 out
    of_m = 2 * of_v
    assert layer.num_tiles(4) == 4
    assert shaped["u",].bitops(tiled) == plain.bitops(tiled)
    assert shaped["v",].bitops(tiled) - plain.bitops(tiled) == of_v * 5 * 8
    every = shaped["u", "v", "m"]
    assert every.bitops(tiled) - plain.bitops(tiled) == of_v * 5 * 8 + of_m * 8 * 8
    for count in ("macs", "multiplications"):
        assert getattr(every, count)(tiled) - getattr(plain, count)(tiled) == of_v + of_m
    assert every.hadamard_bitops(tiled) == plain.hadamard_bitops(tiled)
    assert every.bitops(direct) == plain.bitops(direct)
    in_float = uniform(32, 32, tiles=(4, 0, 0))
    assert every.bitops(in_float) == plain.bitops(in_float)


def test_steps_may_differ_and_store_each_distinct_weight_once() -> None:
    cost = CostModel(LAYERS)
    low, high = uniform(4, 4).allocations[0], uniform(8, 6).allocations[0]
    mixed = Candidate((3, 2, 1), (low, high, low))
    assert cost.bitops(mixed) == 2 * cost.call_bitops(low) + cost.call_bitops(high)
    stored = cost.weight_bytes(uniform(4, 4)) + cost.weight_bytes(uniform(8, 6))
    assert cost.weight_bytes(mixed) == stored
    assert cost.weight_bytes(Candidate((3, 2, 1), (low, low, low))) == cost.weight_bytes(uniform(4, 4))


def test_weight_bytes_ignore_activations_and_steps() -> None:
    cost = CostModel(LAYERS)
    assert cost.weight_bytes(uniform(8, 4)) == cost.weight_bytes(uniform(8, 8, num_steps=9)) == 16 * 32 * 9 + 200


@given(st.lists(st.tuples(st.integers(2, 16), st.integers(2, 16), st.sampled_from([0, 2, 4])), min_size=3, max_size=3))
def test_table_adds_up_to_the_call(settings: list[tuple[int, int, int]]) -> None:
    settings = [settings[0], (*settings[1][:2], 0), (*settings[2][:2], 0)]
    weight_bits, act_bits, tiles = zip(*settings, strict=True)
    allocation = Allocation(weight_bits, act_bits, tiles)
    cost, candidate = CostModel(LAYERS), Candidate((0,), (allocation,))
    table = cost.layer_table(allocation)
    assert [row.name for row in table] == ["conv", "linear", "attn.products"]
    assert [row.kind for row in table] == ["conv", "linear", "attention"]
    assert sum(row.bitops for row in table) == cost.bitops(candidate) == cost.call_bitops(allocation)
    assert sum(row.hadamard_bitops for row in table) == cost.hadamard_bitops(candidate)
    assert sum(row.macs for row in table) == cost.macs(candidate)
    assert sum(row.weight_bytes for row in table) == cost.weight_bytes(candidate)


def test_counts_are_exact_integers_beyond_floats() -> None:
    layer = LinearShape("linear", 10**9 + 7, 10**9 + 9, 3)
    assert CostModel((layer,)).layer_bitops(0, 7, 5, DIRECT_TILE) == (10**9 + 7) * (10**9 + 9) * 105


def test_uniform_bits_leave_the_softmax_its_own_unless_weights_are_float() -> None:
    cost = CostModel(LAYERS)
    assert cost.uniform(6, 5, softmax_bits=8) == Allocation((6, 6, 8), (5, 5, 5), (DIRECT_TILE,) * 3)
    assert cost.uniform(FLOAT_BITS, FLOAT_BITS, softmax_bits=8).weight_bits == (FLOAT_BITS,) * 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="layers must not be empty"):
        CostModel(())
    with pytest.raises(ValueError, match=r"distinct names, found \['conv'\]"):
        CostModel((conv(), conv()))
    with pytest.raises(ValueError, match="calls_per_step must be at least 1, found 0"):
        CostModel(LAYERS, calls_per_step=0)
    with pytest.raises(ValueError, match=r"one entry a layer \(3\), found 1"):
        CostModel(LAYERS).bitops(Candidate((0,), (Allocation((8,), (8,), (0,)),)))


@given(
    st.integers(1, 96), st.integers(1, 96), st.integers(1, 33), st.sampled_from([4, 6, 8]), st.sampled_from([4, 6, 8])
)
def test_every_tile_that_is_offered_saves_against_all_smaller_ones(
    channels: int, outputs: int, pixels: int, weight_bits: int, act_bits: int
) -> None:
    layer = ConvShape("layer", channels, outputs, (3, 3), (1, 1), (1, 1), (1, 1), 1, pixels, pixels)
    offered = saving_tiles(layer, (6, 0, 2, 4), weight_bits, act_bits)
    bitops = {tile: layer.bitops(weight_bits, act_bits, tile) for tile in (0, 2, 4, 6)}
    assert offered[0] == 0
    for tile in (2, 4, 6):
        assert (tile in offered) == all(bitops[tile] < bitops[smaller] for smaller in bitops if smaller < tile)


def test_a_layer_of_one_channel_is_offered_no_tile() -> None:
    first = ConvShape("first", 1, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 16)
    assert saving_tiles(first, (0, 2, 4, 6), 8, 8) == (0,)
    wide = ConvShape("wide", 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, 8, 8)
    assert saving_tiles(wide, (0, 2, 4, 6), 8, 8) == (0, 2, 4)  # 8 is no multiple of 6


def test_multiplications_leave_out_transforms() -> None:
    layer = ConvShape("layer", 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, 8, 8)
    cost = CostModel((layer, LinearShape("linear", 4, 8, 1)), calls_per_step=2)
    candidate = Candidate((5, 3, 1), (Allocation((8, 8), (8, 8), (4, 0)),))
    transforms = layer.input_transform_macs(4) + layer.output_transform_macs(4)
    assert cost.multiplications(candidate) == 6 * (4 * 36 * 16 * 32 + 32)
    assert cost.macs(candidate) - cost.multiplications(candidate) == 6 * transforms
