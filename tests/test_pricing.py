"""task=cost gives the figures of the method page for the published architectures, and says what it counts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import UserError, register_schema, to_config
from tmpq_exp.cost import ConvShape, LayerShape, LinearShape
from tmpq_exp.overrides import explain, is_bad_input
from tmpq_exp.pricing import cost_content, price, summary_lines, winograd_content
from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.pipelines import PipelineModel
from tmpq_exp.zoo.task import DiffusionModel, DiffusionTask, task_layers

GMACS = {
    "ddpm_cifar10_paper": 6.22,
    "ldm_bedroom": 101.2,
    "ldm_church": 20.92,
    "ldm_imagenet": 104.2,
    "sd14": 401.6,
}
"""Of one call without guidance, in the original architectures."""

PARAMETERS = {
    "ddpm_cifar10_paper": 35_746_307,
    "ldm_bedroom": 274_056_163,
    "ldm_church": 294_966_916,
    "ldm_imagenet": 400_920_579,
    "sd14": 859_520_964,
}
"""Of the original networks: with these the architectures are the published ones in every width."""


def compose_config(*overrides: str, run_dir: str = "somewhere") -> Any:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("config", ["task=cost", f"paths.run_dir='{run_dir}'", *overrides])


@cache
def paper_model(name: str) -> PipelineModel:
    model = instantiate(to_config(compose_config(f"model={name}")).model)
    assert isinstance(model, PipelineModel)
    return model


@cache
def paper_layers(name: str) -> tuple[LayerShape, ...]:
    return paper_model(name).layers()


def priced(name: str, *overrides: str) -> dict[str, Any]:
    config = to_config(compose_config(f"model={name}", *overrides))
    return cost_content(config, name, paper_model(name).guided, paper_layers(name), None)


def run(directory: Path, *overrides: str) -> dict[str, Any]:
    """What ``cost.json`` holds after a job in this process."""
    composed = compose_config(*overrides, run_dir=str(directory))
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    price(to_config(composed), {str(key): value for key, value in resolved.items()})
    content: dict[str, Any] = json.loads((directory / "cost.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", GMACS)
def test_macs_are_those_of_the_original_architecture(name: str) -> None:
    content = priced(name)
    assert content["macs"] == pytest.approx(GMACS[name] * 1e9, rel=1e-3)
    assert content["macs"] == sum(row["macs"] for row in content["layers"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_original_network(name: str) -> None:
    settings = to_config(compose_config(f"model={name}")).model["architecture"]["unet"]
    with torch.device("meta"):
        network = instantiate(settings)()
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["ddpm_cifar10_paper", "ldm_bedroom", "ldm_church", "ldm_imagenet", "sd14"])
def test_the_equivalent_in_diffusers_has_the_same_macs(name: str) -> None:
    of_diffusers = paper_model(name).diffusers_layers()
    assert of_diffusers is not None
    assert sum(layer.macs for layer in of_diffusers) == sum(layer.macs for layer in paper_layers(name))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ddpm_cifar10_paper", {"conv": 6.051, "linear": 0.003, "attention": 0.168}),
        ("sd14", {"conv": 222.0, "linear": 116.6, "attention": 63.0}),
    ],
)
def test_macs_by_kind(name: str, kinds: dict[str, float]) -> None:
    found = priced(name)["macs_by_kind"]
    assert {kind: round(macs / 1e9, 3 if name != "sd14" else 1) for kind, macs in found.items()} == kinds


@pytest.mark.parametrize(
    ("name", "softmax_bits", "terabitops"),
    [
        ("ddpm_cifar10_paper", 6, 0.224),
        ("ldm_bedroom", 6, 3.64),
        ("ldm_church", 6, 0.753),
        ("ldm_church", 8, 0.767),
        ("ldm_imagenet", 6, 3.75),
        ("sd14", 6, 14.46),
        ("sd14", 16, 16.35),
    ],
)
def test_bitops_at_w6a6(name: str, softmax_bits: int, terabitops: float) -> None:
    content = priced(name, f"quant.softmax_bits={softmax_bits}")
    assert content["bitops"] == pytest.approx(terabitops * 1e12, rel=2e-3)
    assert content["softmax_bits"] == softmax_bits


def test_bits_steps_and_guidance() -> None:
    content = priced("sd14", "cost.weight_bits=8", "cost.act_bits=4", "space.num_inference_steps=25")
    weighted = [row for row in content["layers"] if row["kind"] != "attention"]
    assert {(row["weight_bits"], row["act_bits"]) for row in weighted} == {(8, 4)}
    assert all(row["bitops"] == row["macs"] * 32 for row in weighted)
    trajectory = content["trajectory"]
    assert (trajectory["num_inference_steps"], trajectory["calls_per_step"]) == (25, 2)
    assert trajectory["bitops"] == 50 * content["bitops"]
    assert trajectory["macs"] == 50 * content["macs"]
    assert priced("ldm_church")["trajectory"]["bitops"] == 10 * priced("ldm_church")["bitops"]
    in_float = priced("sd14", f"cost.weight_bits={FLOAT_BITS}", f"cost.act_bits={FLOAT_BITS}")
    assert in_float["bitops"] == in_float["macs"] * 1024
    assert in_float["weight_bytes"] == 4 * sum(layer.num_weights for layer in paper_layers("sd14"))


def test_a_winograd_tile_counts_where_it_fits() -> None:
    direct, tiled = priced("ldm_church"), priced("ldm_church", "winograd=f4")
    assert tiled["tile"] == 4
    assert {row["tile"] for row in tiled["layers"]} == {0, 4}
    assert tiled["macs"] < direct["macs"]
    rows = zip(direct["layers"], tiled["layers"], strict=True)
    assert all(before["bitops"] == after["bitops"] for before, after in rows if after["tile"] == 0)


def test_what_tiles_save_on_stable_diffusion() -> None:
    found = priced("sd14")["winograd"]
    assert len(found["eligible_layers"]) == 49
    assert found["eligible_macs"] == pytest.approx(197e9, rel=2e-3)
    ratios = {row["m"]: round(row["multiplications_ratio"], 2) for row in found["tiles"]}
    assert (ratios[2], ratios[4], ratios[6]) == (2.25, 4.0, 3.97)
    assert ratios[None] > 4.0
    assert {layer["reason"] for layer in found["ineligible_layers"]} >= {
        "kernel 1x1, needs 3x3",
        "stride 2x2, needs 1x1",
    }
    convolutions = [row for row in priced("sd14")["layers"] if row["kind"] == "conv"]
    assert len(convolutions) == len(found["eligible_layers"]) + len(found["ineligible_layers"])


def test_a_map_that_is_a_multiple_of_a_tile_saves_its_whole_factor() -> None:
    layers = (ConvShape("only", 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, 12, 12),)
    ratios = {row["m"]: row["multiplications_ratio"] for row in winograd_content(layers, (2, 4, 6))["tiles"]}
    assert ratios == {2: 9 * 4 / 16, 4: 9 * 16 / 36, 6: 9 * 36 / 64, None: 9 * 36 / 64}
    assert winograd_content((LinearShape("none", 2, 2, 1),), (2,))["tiles"] == []


def test_the_command_says_which_layers_stay_direct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path / "run", "model=ddpm_digits", "winograd=f4")
    assert [row["m"] for row in content["winograd"]["tiles"]] == [2, 4, 6, None]
    said = capsys.readouterr().out
    assert "26 of 35 convolutions are eligible" in said
    assert "2 with stride 2x2, needs 1x1" in said
    assert "F(4,3): " in said


def test_the_releases_scale_stands_beside_the_exact_one() -> None:
    exact, both = priced("sd14"), priced("sd14", "cost.scale=release")
    assert "release" not in exact
    assert not any("release" in key for row in exact["layers"] for key in row)
    assert {key: both[key] for key in exact if key != "layers"} == {key: exact[key] for key in exact if key != "layers"}
    weighted = sum(row["macs"] for row in exact["layers"] if row["kind"] != "attention")
    tokens = [(4096, 320)] * 5 + [(1024, 640)] * 5 + [(256, 1280)] * 5 + [(64, 1280)]
    products = 2 * 2 * sum(n * channels**2 for n, channels in tokens)  # self- and cross-attention
    assert both["release"]["macs"] == 2 * weighted + products
    assert both["release"]["bitops"] == 2 * weighted * 36 + products // 2 * (36 + 48)


def test_a_difference_to_diffusers_is_told() -> None:
    config = to_config(compose_config())
    layers = DigitsDDPM().layers()
    same = cost_content(config, "x", False, layers, layers)
    assert same["diffusers_agrees"] is True
    assert "macs_diffusers" not in same
    assert "diffusers    its equivalent counts the same MACs" in summary_lines(same)
    other = cost_content(config, "x", False, layers, layers[1:])
    assert other["diffusers_agrees"] is False
    assert other["macs_diffusers"] == other["macs"] - layers[0].macs
    assert any(line.startswith("diffusers    its equivalent counts 40.68 MMACs") for line in summary_lines(other))


def test_the_table_names_every_layer_in_full_and_the_file_holds_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(tmp_path / "run", "model=ddpm_digits", "model.checkpoint=there/is/none.safetensors")
    assert {"macs", "bitops", "weight_bytes", "layers", "trajectory"} <= content.keys()
    layers = task_layers(DigitsDDPM().task())
    assert [row["name"] for row in content["layers"]] == [layer.name for layer in layers]
    assert content["macs"] == sum(layer.macs for layer in layers)
    assert content["weight_bytes"] == sum(row["weight_bytes"] for row in content["layers"])
    assert sum(row["macs_share"] for row in content["layers"]) == pytest.approx(1)
    assert "diffusers_agrees" not in content
    shown = capsys.readouterr().out
    assert all(layer.name in shown for layer in layers)
    assert "one call     40.75 MMACs (conv 37.91 M, linear 1.921 M, attention 917.5 k)" in shown
    assert "1.473 GBitOPs at W6A6, softmax 8" in shown
    assert "one image    407.5 MMACs, 14.73 GBitOPs: 10 steps" in shown
    assert str(tmp_path / "run" / "cost.json") in shown
    assert run(tmp_path / "run", "model=ddpm_digits", "model.checkpoint=there/is/none.safetensors") == content


def test_stable_diffusion_from_the_command_line_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "model=sd14", "cost.scale=release")
    assert content["diffusers_agrees"] is True
    assert content["release"]["bitops"] == sum(row["bitops_release"] for row in content["layers"])
    shown = capsys.readouterr().out
    assert "release's GBitOPs" in shown
    assert "on the scale of the authors' code, for any number of steps" in shown
    assert "10 steps x 2 calls (classifier-free guidance)" in shown


class LoadedOnly(DiffusionModel):
    """A model of the user's that exists with its weights only."""

    def task(self) -> DiffusionTask:
        raise AssertionError("weights were asked for")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=digits_classifier"], "model: digits_classifier makes no images and can only be trained"),
        (["model=ldm_church", "model.architecture.sample_shape=[4,30,32]"], "multiples of 16, found"),
        (["model=ldm_church", "model.architecture.sample_shape=[4,32]"], "sample_shape must be (C, H, W)"),
        (["model=ldm_church", "model.architecture.unet.channels=200"], "num_channels"),
        (["model=sd14", "model.architecture.context_shape=null"], "context tokens must have 768 channels, found None"),
        (["model=sd14", "+model.architecture.unet.chanels=3"], "unet: got an unexpected keyword argument 'chanels'"),
    ],
)
def test_what_cannot_be_priced_is_refused_before_a_directory_is_made(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  is_bad_input judges it
        run(tmp_path / "run", *overrides)
    assert is_bad_input(caught.value)
    assert message in explain(caught.value, overrides, conf_dir())
    assert not (tmp_path / "run").exists()


def test_a_model_that_needs_its_weights_is_refused(tmp_path: Path) -> None:
    config = to_config(compose_config(run_dir=str(tmp_path)))
    config.model = {"_target_": f"{__name__}.LoadedOnly"}
    with pytest.raises(UserError, match="model: LoadedOnly cannot be built without its weights"):
        price(config, {})
