"""Passes side by side: which may be, and what comes of putting their parameters together."""

from __future__ import annotations

import pytest
import torch

from tests.quant.conftest import Case
from tmpq_exp.config import CalibrationConfig
from tmpq_exp.quant.attention_products import QuantAttentionProducts
from tmpq_exp.quant.passes import Touched, in_rounds, merged, touched
from tmpq_exp.quant.reconstruction import uniform_draw
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.quant.units import Unit


def passes(**read_and_written: tuple[str, str]) -> dict[int | str, Touched]:
    """Passes by name, parameters by letters; what is written is read as well."""
    return {
        name: Touched(frozenset((x, 0) for x in read + written), frozenset((x, 0) for x in written))
        for name, (read, written) in read_and_written.items()
    }


def test_passes_that_have_nothing_in_common_make_one_round() -> None:
    assert in_rounds(passes(a=("", "x"), b=("", "y"), c=("", "z"))) == [["a", "b", "c"]]


def test_what_is_only_read_may_be_shared() -> None:
    assert in_rounds(passes(a=("s", "x"), b=("s", "y"))) == [["a", "b"]]


def test_a_pass_waits_for_what_it_reads() -> None:
    assert in_rounds(passes(a=("", "xs"), b=("s", "y"), c=("s", "z"))) == [["a"], ["b", "c"]]
    assert in_rounds(passes(a=("", "x"), b=("", "xy"), c=("x", "z"))) == [["a"], ["b"], ["c"]]


def test_a_later_pass_may_change_what_an_earlier_one_reads() -> None:
    assert in_rounds(passes(a=("s", "x"), b=("", "sy"))) == [["a", "b"]]


def settings(act_iterations: int = 0, *, correct_means: bool = True) -> CalibrationConfig:
    return CalibrationConfig(weight_iterations=1, act_iterations=act_iterations, correct_means=correct_means)


def supernet(case: Case, widths: tuple[int, ...] = (6, 4)) -> Supernet:
    """The softmax at 8 alone."""
    softmax = [(8,) if shape.name.endswith("products") else widths for shape in case.layers]
    return Supernet(case.network, case.layers, softmax, [(6, 4)] * len(case.layers), case.calibrated().config)


def test_a_softmax_is_read_by_all_and_written_by_one(cross_attention: Case) -> None:
    layers = supernet(cross_attention).layers
    unit = Unit("all", cross_attention.network, layers)
    learned = {6: {6, 8}, 4: {4}}

    def found(config: CalibrationConfig) -> dict[int | str, Touched]:
        return {bits: touched(unit, uniform_draw(layers, bits), learned[bits], config) for bits in (6, 4)}

    softmax = {(f"{layer.name}/softmax", 0) for layer in layers if isinstance(layer, QuantAttentionProducts)}
    assert softmax
    learning = found(settings(act_iterations=1))
    assert learning[6].read & learning[4].read == softmax
    assert learning[6].read == learning[6].written
    assert learning[4].read - learning[4].written == softmax
    assert in_rounds(learning) == [[6], [4]]
    assert in_rounds(found(settings())) == [[6, 4]]


@pytest.mark.parametrize(("correct_means", "rounds"), [(True, [[6], [4]]), (False, [[6, 4]])])
def test_means_are_corrected_where_nothing_is_learned(
    cross_attention: Case, correct_means: bool, rounds: list[list[int]]
) -> None:
    layers = supernet(cross_attention, (4,)).layers
    unit, config = Unit("all", cross_attention.network, layers), settings(correct_means=correct_means)
    found = {bits: touched(unit, uniform_draw(layers, bits), {bits}, config) for bits in (6, 4)}
    assert in_rounds({**found}) == rounds


def test_rows_come_from_where_they_were_learned() -> None:
    def state(value: float) -> dict[str, torch.Tensor]:
        return {key: torch.full((3, 2), value) for key in ("a/w.scale", "a/w.rounding", "a/act.scale")}

    own = state(0)
    result = merged(own, [(state(1), frozenset({("a/w", 1)})), (state(2), frozenset({("a/w", 2), ("a/act", 0)}))])
    assert {key: value[:, 0].tolist() for key, value in result.items()} == {
        "a/w.scale": [0, 1, 2],
        "a/w.rounding": [0, 1, 2],
        "a/act.scale": [2, 0, 0],
    }
    assert all(not value.any() for value in own.values())
