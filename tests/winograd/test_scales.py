"""Scales of a network: sets, files, figures by layer and stage, FSQ-style factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.noise import NOISE_BATCH, NOISE_SIZE, Noise, noise
from tmpq_exp.winograd.scales import (
    ConvWeight,
    ScaleSet,
    fsq_style_scales,
    layer_sqnr_db,
    layers_sqnr_db,
    network_sqnr_db,
    read_scales,
    stage_sqnr_db,
    write_scales,
)
from tmpq_exp.winograd.transform import (
    build_transform,
    closed_form_scales,
    range_map,
    standard_scales,
)


def conv(name: str, k: int, c: int, seed: int = 0) -> ConvWeight:
    return ConvWeight(name, torch.randn(k, c, 3, 3, generator=torch.Generator().manual_seed(seed)))


def test_network_figure_is_the_median_over_layers() -> None:
    first, second = conv("first", 16, 16), conv("second", 24, 16, seed=1)
    broken = ConvWeight("broken", torch.zeros(4, 4, 3, 3), 1)
    spec = WinogradSpec(4)
    scales = closed_form_scales(spec.transform())
    assert layer_sqnr_db(broken, spec, scales, 5) == float("inf")
    assert layer_sqnr_db(first, spec, scales, 5) == layer_sqnr_db(first, spec, scales, 5)
    median = network_sqnr_db([first, second, broken], spec, scales, seed=0)
    assert median == pytest.approx(layer_sqnr_db(first, spec, scales, 5), abs=0.7)


def test_stages_are_measured_alone_and_together() -> None:
    layer, spec = conv("conv", 16, 32), WinogradSpec(4)
    x = noise(32, torch.Generator().manual_seed(0))
    figures = stage_sqnr_db(layer, x, spec, closed_form_scales(spec.transform()))
    assert set(figures) == {"input", "v", "u", "m", "all"}
    powers = [10 ** (-figures[stage] / 10) for stage in ("input", "v", "u", "m")]
    assert 10 ** (-figures["all"] / 10) == pytest.approx(sum(powers), rel=0.2)  # errors of stages are independent


@pytest.mark.parametrize("kind", [*Noise])
def test_noise_has_unit_variance(kind: Noise) -> None:
    x = noise(400, torch.Generator().manual_seed(0), kind)
    assert x.shape == (NOISE_BATCH, 400, NOISE_SIZE, NOISE_SIZE)
    assert float(x.var()) == pytest.approx(1, abs=0.05)
    assert float(x.mean()) == pytest.approx(0, abs=0.05)
    neighbours = float((x[..., 1:] * x[..., :-1]).mean())
    assert neighbours == pytest.approx(0.65 if kind is Noise.PINK else 0, abs=0.06)
    channels = float((x[:, 1:] * x[:, :-1]).mean())
    assert channels == pytest.approx(0, abs=0.03)
    if kind is Noise.UNIFORM:
        assert float(x.abs().max()) <= 3**0.5


def test_pink_noise_has_a_spectrum_of_one_over_f() -> None:
    power = torch.fft.fft2(noise(500, torch.Generator().manual_seed(0), "pink")).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16, rel=0.15)
    assert float(power[4, 0] / power[8, 0]) == pytest.approx(4, rel=0.15)


def test_fsq_style_factors_level_the_ranges_of_m() -> None:
    layer, spec = conv("conv", 32, 32), WinogradSpec(4)
    scales = fsq_style_scales(layer, spec, seed=0)
    flat = [value for row in range_map(spec.transform(), scales) for value in row]
    assert max(flat) / min(flat) < 1.6  # white input and weights: near the closed form
    standard = [v for row in range_map(spec.transform(), standard_scales(spec.transform())) for v in row]
    assert max(standard) / min(standard) > 100
    closed = layer_sqnr_db(layer, spec, closed_form_scales(spec.transform()), 1)
    assert layer_sqnr_db(layer, spec, scales, 1) == pytest.approx(closed, abs=1)


def test_range_map_of_closed_form_is_flat() -> None:
    transform = build_transform(6)
    for row in range_map(transform, closed_form_scales(transform)):
        assert row == pytest.approx([1.0] * 8)


def test_files_carry_scales_to_another_network(tmp_path: Path) -> None:
    spec = WinogradSpec(4, points="improved")
    closed, standard = (f(spec.transform()) for f in (closed_form_scales, standard_scales))
    scales = ScaleSet(closed, {"conv1": standard})
    path = tmp_path / "winograd_scales.json"
    write_scales(path, "a network", {4: (spec, scales)})
    found = read_scales(path, spec)
    assert found == scales
    assert (found.of("conv1"), found.of("another")) == (standard, closed)
    with pytest.raises(ValueError, match="holds scales for the tiles 4, not for 6"):
        read_scales(path, WinogradSpec(6))
    with pytest.raises(ValueError, match=r"holds scales of F\(4,3\) for the points .*'2/3'.*, not for"):
        read_scales(path, WinogradSpec(4))
    with pytest.raises(ValueError, match="holds no Winograd scales: FileNotFoundError"):
        read_scales(tmp_path / "none.json", spec)
    for text in ("[]", "no json", '{"tiles": {"4": {"points": []}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no"):
            read_scales(path, spec)


def test_wrong_scales_in_a_file_are_refused(tmp_path: Path) -> None:
    spec, path = WinogradSpec(2), tmp_path / "winograd_scales.json"
    write_scales(path, "a network", {2: (spec, ScaleSet(closed_form_scales(spec.transform())))})
    data = json.loads(path.read_text())
    data["tiles"]["2"]["scales"]["s_b"] = [1.0]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must have equal length"):
        read_scales(path, spec)
    data["tiles"]["2"]["scales"]["s_g"] = [1.0]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="holds 1 scales for tile 2, 4 are needed"):
        read_scales(path, spec)


def test_figures_by_layer_use_the_layers_own_scales() -> None:
    layers = [conv("a", 16, 16), conv("b", 16, 16, seed=1)]
    spec = WinogradSpec(4)
    closed, standard = (f(spec.transform()) for f in (closed_form_scales, standard_scales))
    mixed = layers_sqnr_db(layers, spec, ScaleSet(closed, {"b": standard}), seed=0)
    assert mixed["a"] == layers_sqnr_db(layers, spec, closed, seed=0)["a"]
    assert mixed["b"] == layers_sqnr_db(layers, spec, standard, seed=0)["b"]
