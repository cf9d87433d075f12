"""Learned scales: they never lose to the closed form by much, mend a bad start, and repeat under a seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.learning import (
    LearnedScales,
    ScaleResult,
    WinogradScalesModule,
    learn_scales,
    step_seeds,
)
from tmpq_exp.winograd.scales import ConvWeight, ScaleSet, network_sqnr_db
from tmpq_exp.winograd.transform import closed_form_scales, standard_scales

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated")

trainer_factory: Callable[..., L.Trainer] = functools.partial(
    L.Trainer,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


def network() -> list[ConvWeight]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 1), (16, 16), (24, 16), (16, 40))
    return [ConvWeight(f"conv{i}", torch.randn(k, c, 3, 3, generator=generator)) for i, (k, c) in enumerate(shapes)]


def learn(m: int, *, steps: int = 30, seed: int = 0, **arguments: Any) -> ScaleResult:
    return learn_scales(
        network(),
        WinogradSpec(m),
        num_steps=steps,
        learning_rate=0.02,
        seed=seed,
        trainer_factory=trainer_factory,
        **arguments,
    )


@pytest.mark.parametrize("m", [2, 4, 6])
def test_learned_scales_hold_the_closed_form(m: int) -> None:
    result = learn(m)
    assert result.sqnr_db["learned"] >= result.sqnr_db["closed_form"] - 0.2
    assert result.kept == max(("closed_form", "learned"), key=lambda kind: result.sqnr_db[kind])
    assert result.kept_scales == result.scales[result.kept]
    assert result.sqnr_db["kept"] == max(result.sqnr_db["learned"], result.sqnr_db["closed_form"])
    assert len(result.curve) == 30
    if m > 2:
        assert result.sqnr_db["standard"] < 5
        assert result.sqnr_db["closed_form"] > result.sqnr_db["standard"] + 10


def test_learning_mends_the_standard_scales() -> None:
    result = learn(4, initial="standard")
    assert result.sqnr_db["learned"] > result.sqnr_db["standard"] + 5
    pairs = zip(result.scales["learned"].shared.s_b, result.scales["standard"].shared.s_b, strict=True)
    assert all(a * b > 0 for a, b in pairs)


def test_a_seed_repeats_and_another_differs() -> None:
    first = learn(4, steps=6)
    assert learn(4, steps=6) == first
    assert learn(4, steps=6, seed=1).curve != first.curve
    assert step_seeds(3, 10)[:4] == step_seeds(3, 4)


def test_weights_stay_as_they_are() -> None:
    layers = network()
    before = [layer.weight.clone() for layer in layers]
    learn_scales(layers, WinogradSpec(4), num_steps=2, learning_rate=0.02, seed=0, trainer_factory=trainer_factory)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    assert all(layer.weight.grad is None for layer in layers)


@pytest.mark.parametrize("initial", [standard_scales, closed_form_scales])
def test_learned_scales_start_where_they_are_told(initial: Callable[..., object]) -> None:
    scales = initial(WinogradSpec(6).transform())
    learned = LearnedScales(scales).to_scales()  # type: ignore[arg-type]
    assert learned.s_b == pytest.approx(scales.s_b, rel=1e-5)  # type: ignore[attr-defined]
    assert learned.s_g == pytest.approx(scales.s_g, rel=1e-5)  # type: ignore[attr-defined]


def test_each_layer_may_learn_its_own_and_keeps_the_better() -> None:
    result = learn(4, steps=3, per_layer=True, initial="standard")
    names = [layer.name for layer in network()]
    assert len(result.curve) == 3 * 2  # two of four layers a step
    learned = result.scales["learned"]
    assert set(learned.layers) == set(names)
    assert len({learned.of(name) for name in names}) == 4
    for name in names:
        figures = {kind: values[name] for kind, values in result.layer_sqnr_db.items()}
        assert figures["kept"] == max(figures["learned"], figures["closed_form"])
    assert result.kept == "closed_form"  # a few steps from the standard scales do not get there
    assert not result.kept_scales.layers


def test_learning_per_layer_holds_the_closed_form() -> None:
    result = learn(4, steps=5, per_layer=True)
    for name, value in result.layer_sqnr_db["kept"].items():
        assert value >= result.layer_sqnr_db["closed_form"][name]
        assert value >= result.layer_sqnr_db["learned"][name]
    learned, closed = (result.layer_sqnr_db[kind] for kind in ("learned", "closed_form"))
    assert set(result.kept_scales.layers) == {name for name in learned if learned[name] > closed[name]}


def test_columns_learn_apart_from_rows() -> None:
    result = learn(4, steps=5, separate_columns=True)
    learned = result.scales["learned"].shared
    assert learned.columns is not None
    assert learned.columns[0] != learned.s_b
    assert learned.columns[0] == pytest.approx(learned.s_b, rel=0.2)
    assert ScaleSet.from_json(result.scales["learned"].to_json()) == result.scales["learned"]


def test_scales_learned_on_coloured_noise_are_better_there() -> None:
    pink = learn(4, steps=40, noise_kind="pink")
    assert pink.sqnr_db["learned"] > pink.sqnr_db["closed_form"] + 0.3


def test_learning_with_integer_transforms_and_shaping() -> None:
    spec = WinogradSpec(4, transform_bits=8, shaped_stages=("u", "m"))
    result = learn_scales(network()[:2], spec, num_steps=3, learning_rate=0.02, seed=0, trainer_factory=trainer_factory)
    plain = network_sqnr_db(network()[:2], WinogradSpec(4), result.scales["closed_form"], 0)
    assert result.sqnr_db["kept"] > plain + 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, found 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, found 0.0"),
        ({"initial": "zero"}, "initial must be one of standard, closed_form, found 'zero'"),
        ({"layers": []}, "layers must hold at least one eligible convolution"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"layers": network(), "num_steps": 1, "learning_rate": 0.1, **kwargs}
    layers = arguments.pop("layers")
    with pytest.raises(ValueError, match=message):
        learn_scales(layers, WinogradSpec(4), seed=0, trainer_factory=trainer_factory, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="momentum must be in"):
        WinogradScalesModule(network(), WinogradSpec(4), momentum=1.0)
