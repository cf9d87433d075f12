"""A recipe gives back the images of the run it was written by, and a bad one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tmpq_exp import apply_recipe
from tmpq_exp.config import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, is_eligible
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.static_ranges import measuring_ranges_for_all_bits
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.recipe import save_packed, write_recipe
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import DiffusionTask, task_layers
from tmpq_exp.zoo.weights import write_tensors

TIMESTEPS = (700, 250, 40)
TILES = {m: (WinogradSpec(m), closed_form_scales(WinogradSpec(m).transform())) for m in (2, 4)}
STATIC = QuantConfig(QuantizerConfig(Granularity.PER_CHANNEL, estimator="minmax"), QuantizerConfig(estimator="minmax"))
GROUPWISE = QuantConfig(
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
)


@pytest.fixture(scope="module")
def task() -> DiffusionTask:
    return DigitsDDPM().task()


def make_module(task: DiffusionTask, config: QuantConfig) -> SupernetModule:
    layers = task_layers(task)
    choices = [(8,) if isinstance(shape, AttentionShape) else (8, 6) for shape in layers]
    module = SupernetModule(task, layers, choices, [(8, 6)] * len(layers), config)
    calibration = CalibrationConfig("ranges", num_images=2, num_timesteps=2, max_values=1024)
    fitting = CalibrationModule(module.supernet, trajectory_states(task, 2, 2, 0), calibration, 0)
    fitting.on_train_epoch_start()
    for index in fitting.train_dataloader():
        fitting.training_step(index, index)
    fitting.on_train_epoch_end()
    module.supernet.set_winograd(TILES)
    return module


@pytest.fixture(scope="module")
def module(task: DiffusionTask) -> SupernetModule:
    return make_module(task, STATIC)


def allocation(layers: tuple[LayerShape, ...], kind: str) -> Allocation:
    eligible = [isinstance(shape, ConvShape) and is_eligible(shape) for shape in layers]
    tile = {"winograd": 4}.get(kind, DIRECT_TILE)
    weight_bits = [8 if isinstance(shape, AttentionShape) or i % 2 else 6 for i, shape in enumerate(layers)]
    act_bits = [6 if i % 3 else 8 for i in range(len(layers))]
    if kind == "some float":
        for i in range(0, len(layers), 4):
            weight_bits[i] = act_bits[i] = FLOAT_BITS
        weight_bits[1], act_bits[2] = FLOAT_BITS, FLOAT_BITS
    return Allocation(tuple(weight_bits), tuple(act_bits), tuple(tile if e else DIRECT_TILE for e in eligible))


def write(module: SupernetModule, candidate: Candidate, folder: Path) -> Path:
    path = folder / "recipe.json"
    write_recipe(path, folder / "recipe.safetensors", module, candidate, TILES, micro_batch=3, evidence={"fd": 1.5})
    return path


def make_candidate(module: SupernetModule, kind: str) -> Candidate:
    layers = module.supernet.shapes
    if kind == "per step":
        kinds = ("direct", "winograd", "some float")
        return Candidate(TIMESTEPS, tuple(allocation(layers, k) for k in kinds))
    return Candidate(TIMESTEPS, (allocation(layers, kind),))


@pytest.mark.parametrize("kind", ["direct", "winograd", "some float", "per step"])
def test_images_are_bit_equal(module: SupernetModule, kind: str, tmp_path: Path) -> None:
    candidate = make_candidate(module, kind)
    model = apply_recipe(write(module, candidate, tmp_path))
    whole = torch.cat([module.images(candidate, indices, 5) for indices in (range(1, 4), range(4, 7))])
    assert torch.equal(model.sample(5, seed=5, first_index=1), whole[:5])
    assert model.candidate == candidate
    assert model.timesteps == TIMESTEPS
    with pytest.raises(ValueError, match="num_images must be at least 1, found 0"):
        model.sample(0, seed=5)


def test_images_of_groupwise_quantizers_are_bit_equal(task: DiffusionTask, tmp_path: Path) -> None:
    module = make_module(task, GROUPWISE)
    candidate = make_candidate(module, "direct")
    model = apply_recipe(write(module, candidate, tmp_path), task)
    assert torch.equal(model.sample(3, seed=5), module.images(candidate, range(3), 5))


@pytest.fixture(scope="module")
def ranged(task: DiffusionTask) -> SupernetModule:
    """A supernet whose Winograd layers have static ranges."""
    module = make_module(task, STATIC)
    tiles = {m: (replace(spec, act_scales="static"), scales) for m, (spec, scales) in TILES.items()}
    module.supernet.set_winograd(tiles)
    with measuring_ranges_for_all_bits(module.supernet) as found, torch.no_grad():
        for state in trajectory_states(task, 2, 2, 0):
            state.run(module.supernet, module.device)
    module.supernet.set_ranges(found)
    return module


def write_ranged(module: SupernetModule, candidate: Candidate, folder: Path) -> Path:
    tiles = {m: (spec, TILES[m][1]) for m, (spec, _) in module.supernet.winograd.items()}
    path = folder / "recipe.json"
    write_recipe(path, folder / "recipe.safetensors", module, candidate, tiles, micro_batch=3, evidence={})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["winograd", "per step"])
def test_static_ranges_are_part_of_a_recipe(
    module: SupernetModule, ranged: SupernetModule, kind: str, tmp_path: Path
) -> None:
    candidate = make_candidate(ranged, kind)
    path = write_ranged(ranged, candidate, tmp_path)
    expected = ranged.images(candidate, range(3), 5)
    model = apply_recipe(path)
    assert torch.equal(model.sample(3, seed=5), expected)
    assert not torch.equal(module.images(candidate, range(3), 5), expected)
    eligible = {shape.name for shape in ranged.supernet.shapes if isinstance(shape, ConvShape) and is_eligible(shape)}
    assert model.module.supernet.ranges.keys() == {(name, 4) for name in eligible}
    packed = apply_recipe(save_packed(model, tmp_path / "packed"))
    assert torch.equal(packed.sample(3, seed=5), expected)


def test_a_recipe_without_the_ranges_it_needs_is_refused(ranged: SupernetModule, tmp_path: Path) -> None:
    candidate = make_candidate(ranged, "winograd")
    found = dict(ranged.supernet.ranges)
    ranged.supernet.set_ranges({})
    path = write_ranged(ranged, candidate, tmp_path)
    ranged.supernet.set_ranges(found)
    with pytest.raises(ValueError, match=r"recipe\.safetensors holds no winograd\.f4\..*act_scales is static"):
        apply_recipe(path)


def test_a_direct_recipe_carries_no_ranges(ranged: SupernetModule, tmp_path: Path) -> None:
    candidate = make_candidate(ranged, "direct")
    model = apply_recipe(write_ranged(ranged, candidate, tmp_path))
    assert not model.module.supernet.ranges
    assert torch.equal(model.sample(3, seed=5), ranged.images(candidate, range(3), 5))


@pytest.fixture
def path(module: SupernetModule, tmp_path: Path) -> Path:
    return write(module, make_candidate(module, "winograd"), tmp_path)


def test_it_is_plain_json_without_weights(path: Path, task: DiffusionTask) -> None:
    recipe = json.loads(path.read_text())
    assert recipe["evidence"] == {"fd": 1.5}
    assert recipe["winograd"].keys() == {"4"}
    assert recipe["weights_hash"] == task.weights_hash
    num_parameters = sum(parameter.numel() for parameter in task.unet.parameters())
    assert path.with_suffix(".safetensors").stat().st_size < num_parameters / 4


def test_missing_and_no_json(tmp_path: Path, path: Path, task: DiffusionTask) -> None:
    with pytest.raises(ValueError, match=r"no recipe at .*nowhere\.json"):
        apply_recipe(tmp_path / "nowhere.json", task)
    for content in (b"{", b"\xff\xfe\x00", b"[]", b"3", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"recipe\.json is no (JSON|recipe)"):
            apply_recipe(path, task)


KEYS = (
    "schema",
    "model",
    "weights_hash",
    "source",
    "packed",
    "micro_batch",
    "candidate",
    "layers",
    "quant",
    "winograd",
    "state",
)


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_and_values_of_another_type_are_refused(path: Path, task: DiffusionTask, key: str) -> None:
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in recipe.items() if k != key}))
    with pytest.raises(ValueError, match=rf"recipe\.json is no recipe: it misses {key}"):
        apply_recipe(path, task)
    for value in (None, 1.5, [1], {"a": 1}):
        if key in ("model", "source"):  # only asked for without a task
            continue
        path.write_text(json.dumps(recipe | {key: value}))
        with pytest.raises(ValueError, match=r"recipe\.json"):
            apply_recipe(path, task)


def edit(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(recipe: dict[str, Any]) -> None:
        target: Any = recipe
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("weights_hash", value="0" * 16), "made for weights 0000000000000000"),
        (edit("schema", value=2), "recipe schema 2"),
        (edit("layers", 0, value="other"), "layers of the recipe"),
        (edit("candidate", "timesteps", value=[1000, 5, 0]), r"timesteps must be in 0..999"),
        (edit("candidate", "timesteps", value=[9, 5, -1]), r"timesteps must be in 0..999"),
        (edit("candidate", "timesteps", value=[5, 9]), "strictly descending"),
        (edit("candidate", "allocations", 0, "weight_bits", 0, value=64), "bits must be in 2..16, found 64"),
        (edit("candidate", "allocations", 0, "tiles", 1, value=4), "tile 4"),
        (edit("candidate", "allocations", 0, "tiles", 0, value=6), "tile 6"),
        (edit("candidate", "allocations", 0, "act_bits", value=[8]), "entry a layer"),
        (edit("micro_batch", value=0), "micro_batch must be .* found 0"),
        (edit("quant", "act", "granularity", value="per_pixel"), "per_pixel"),
        (edit("quant", "act", "extra", value=1), "extra"),
        (edit("winograd", "4", "spec", "group_size", value=-1), "group_size"),
        (edit("winograd", "4", "scales", "s_b", value=[1.0]), "s_b"),
        (edit("state", value={}), "file"),
        (edit("state", "file", value="../../elsewhere.safetensors"), "elsewhere.safetensors"),
    ],
)
def test_damaged_recipes_are_refused(
    path: Path, task: DiffusionTask, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    recipe = json.loads(path.read_text())
    change(recipe)
    path.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message) as error:
        apply_recipe(path, task)
    assert str(path.parent) in str(error.value)


def test_a_state_outside_of_the_recipes_folder_is_not_read(path: Path, task: DiffusionTask) -> None:
    inner = path.parent / "inner"
    inner.mkdir()
    recipe = json.loads(path.read_text())
    recipe["state"]["file"] = "../recipe.safetensors"
    (inner / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"no file at .*inner.recipe\.safetensors"):
        apply_recipe(inner / "recipe.json", task)


def test_a_missing_truncated_or_changed_state_is_refused(path: Path, task: DiffusionTask) -> None:
    state = path.with_suffix(".safetensors")
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"recipe\.safetensors is damaged"):
        apply_recipe(path, task)
    write_tensors(state, {"scale": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"recipe\.safetensors is not the file"):
        apply_recipe(path, task)
    state.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"recipe\.safetensors is truncated"):
        apply_recipe(path, task)
    state.unlink()
    with pytest.raises(ValueError, match=r"no file at .*recipe\.safetensors"):
        apply_recipe(path, task)


def test_models_that_are_not_embedded_need_their_task(path: Path, task: DiffusionTask) -> None:
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps(recipe | {"model": "mine"}))
    with pytest.raises(ValueError, match=r"model 'mine', which is not embedded"):
        apply_recipe(path)
    assert apply_recipe(path, replace(task, name="mine")).timesteps == TIMESTEPS
