"""A recipe comes back as a pipeline with the usual call, and packed into a folder of its own gives the same images."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tmpq_exp
from tests.tiny_pipelines import FAMILIES, save_tiny
from tmpq_exp.config import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape, ConvShape, is_eligible
from tmpq_exp.diffusion.sampler import initial_noise
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.recipe import CompressedModel, apply_recipe, write_recipe
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.pipelines import PipelineModel
from tmpq_exp.zoo.task import DiffusionTask, task_layers

TIMESTEPS = (800, 300, 20)
SPEC = WinogradSpec(4)
TILES = {4: (SPEC, closed_form_scales(SPEC.transform()))}
MODELS = ("ddpm_digits", *FAMILIES)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        save_tiny(family, root / family)
    return root


def make_task(name: str, pipelines: Path) -> DiffusionTask:
    if name == "ddpm_digits":
        return DigitsDDPM().task()
    settings: dict[str, Any] = {
        "stable_diffusion": {"guidance_scale": 2.0, "prompts": ["a cat", "the dog"], "negative_prompt": "bad"},
        "ldm_of_classes": {"guidance_scale": 1.5},
        "ldm": {"sampler": "dpm_solver_pp_2m"},
    }.get(name, {})
    return PipelineModel(name, str(pipelines / name), **settings).task()


def make_candidate(module: SupernetModule, kind: str) -> Candidate:
    """Mixed bits, no tile: ``direct``; every kind of layer, other bits each step: ``per step``."""
    shapes = module.supernet.shapes
    is_attention = [isinstance(shape, AttentionShape) for shape in shapes]
    eligible = [isinstance(shape, ConvShape) and is_eligible(shape) for shape in shapes]
    direct = Allocation(
        tuple(8 if attention or i % 2 else 5 for i, attention in enumerate(is_attention)),
        tuple(8 if i % 3 else 5 for i in range(len(shapes))),
        (DIRECT_TILE,) * len(shapes),
    )
    if kind == "direct":
        return Candidate(TIMESTEPS, (direct,))
    tiles = Allocation(direct.weight_bits, direct.act_bits, tuple(4 if e else 0 for e in eligible))
    others = tuple(8 if attention else FLOAT_BITS if i % 4 else 8 for i, attention in enumerate(is_attention))
    return Candidate(TIMESTEPS, (direct, tiles, Allocation(others, direct.act_bits, direct.tiles)))


def compressed(task: DiffusionTask, folder: Path, kind: str = "direct", learned: bool = False) -> Path:
    """Recipe of a task whose quantizers saw two short trajectories."""
    layers = task_layers(task)
    choices = [(8,) if isinstance(shape, AttentionShape) else (8, 5) for shape in layers]
    config = QuantConfig(
        QuantizerConfig(Granularity.PER_CHANNEL, estimator="minmax"), QuantizerConfig(estimator="minmax")
    )
    module = SupernetModule(task, layers, choices, [(8, 5)] * len(layers), config)
    fitting = CalibrationModule(
        module.supernet, trajectory_states(task, 2, 2, 0), CalibrationConfig("ranges", max_values=1024), 0
    )
    fitting.on_train_epoch_start()
    for index in fitting.train_dataloader():
        fitting.training_step(index, index)
    fitting.on_train_epoch_end()
    module.supernet.set_winograd(TILES)
    for layer in module.supernet.layers if learned else ():
        rows = layer.weight_rows()
        if rows is not None:
            weight = layer.float_layer.weight.detach()
            rows[0].start_rounding(weight)
            rows[0].set_rounding(5, weight > 0)
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.json"
    candidate = make_candidate(module, kind)
    write_recipe(path, folder / "recipe.safetensors", module, candidate, TILES, micro_batch=2, evidence={"fd": 1.5})
    return path


def applied(path: Path, name: str, pipelines: Path) -> CompressedModel:
    return apply_recipe(path, pipeline=None if name == "ddpm_digits" else str(pipelines / name))


def images_of(pipe: Any, task: DiffusionTask, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Images by the pipeline's usual call, from these start states."""
    pipe.set_progress_bar_config(disable=True)
    names = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"output_type": "np"}
    if "prompt" in names:
        arguments |= {
            "prompt": ["a cat", "the dog"],
            "negative_prompt": ["bad", "bad"],
            "guidance_scale": task.guidance_scale,
        }
    elif "class_labels" in names:
        arguments |= {"class_labels": [0, 1]}
    if "latents" in names:
        arguments |= {"latents": noise}
    else:
        arguments |= {"batch_size": 2}
        monkeypatch.setattr(f"{pipe.__class__.__module__}.randn_tensor", lambda *_, **__: noise.clone())
    images: np.ndarray = pipe(**arguments).images
    return images


@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_gives_the_images_of_the_recipe(
    name: str, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(name, pipelines)
    path = compressed(task, tmp_path / "run")
    source = None if name == "ddpm_digits" else str(pipelines / name)
    pipe = tmpq_exp.load(path, source)
    expected = applied(path, name, pipelines)
    with expected.module.supernet.subnet(expected.candidate.allocations[0]), torch.inference_mode():
        images = task.sample(expected.module.supernet, range(2), TIMESTEPS, 3)
    noise = initial_noise(task.sample_shape, range(2), 3)
    found = images_of(pipe, task, noise, monkeypatch)
    np.testing.assert_allclose(found, images.permute(0, 2, 3, 1).numpy(), atol=2e-3)
    with torch.inference_mode():
        float_images = task.sample(task.unet, range(2), TIMESTEPS, 3).permute(0, 2, 3, 1).numpy()
    assert np.abs(float_images - found).max() > 5e-3


DIFFUSERS_CLASSES = {
    "stable_diffusion": diffusers.StableDiffusionPipeline,
    "ldm": diffusers.LDMPipeline,
    "ddpm": diffusers.DDIMPipeline,
}


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_the_call_is_that_of_diffusers_and_keeps_the_timesteps(name: str, pipelines: Path, tmp_path: Path) -> None:
    pipe: Any = tmpq_exp.load(compressed(make_task(name, pipelines), tmp_path / "run"), str(pipelines / name))
    assert type(pipe) is DIFFUSERS_CLASSES[name]
    pipe.set_progress_bar_config(disable=True)
    told: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: told.append(int(args[1])))
    subject = {"prompt": "a cat"} if name == "stable_diffusion" else {}
    (image,) = pipe(**subject, num_inference_steps=7, generator=torch.Generator().manual_seed(0)).images
    assert told == list(TIMESTEPS)
    assert pipe.to("cpu").device == torch.device("cpu")
    assert set(pipe.components) >= {"unet", "scheduler"}
    assert image.size == (16, 16)
    again = pipe(**subject, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(again))


@pytest.mark.parametrize("kind", ["direct", "per step", "learned"])
@pytest.mark.parametrize("name", ["ddpm_digits", "stable_diffusion"])
def test_a_packed_recipe_gives_the_same_bits(
    name: str, kind: str, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(name, pipelines)
    path = compressed(task, tmp_path / "run", kind.replace("learned", "direct"), learned=kind == "learned")
    pipe = tmpq_exp.load(path, None if name == "ddpm_digits" else str(pipelines / name))
    packed = tmpq_exp.save(pipe, tmp_path / "packed")
    moved = packed.parent.rename(tmp_path / "moved") / "recipe.json"
    loaded = tmpq_exp.load(moved)
    noise = initial_noise(task.sample_shape, range(2), 3)
    expected = images_of(pipe, task, noise, monkeypatch)
    assert np.array_equal(images_of(loaded, task, noise, monkeypatch), expected)
    once_more = tmpq_exp.load(tmpq_exp.save(loaded, tmp_path / "again"))
    assert np.array_equal(images_of(once_more, task, noise, monkeypatch), expected)
    if name == "ddpm_digits":
        assert torch.equal(apply_recipe(moved).sample(3, 5), applied(path, name, pipelines).sample(3, 5))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "stable_diffusion"])
def test_every_family_can_be_packed(
    name: str, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(name, pipelines)
    pipe = tmpq_exp.load(compressed(task, tmp_path / "run"), str(pipelines / name))
    loaded = tmpq_exp.load(tmpq_exp.save(pipe, tmp_path / "packed"))
    noise = initial_noise(task.sample_shape, range(2), 3)
    found = images_of(loaded, task, noise, monkeypatch)
    assert np.array_equal(found, images_of(pipe, task, noise, monkeypatch))


def test_packed_weights_take_their_bits_and_no_float_copy(tmp_path: Path) -> None:
    task = DigitsDDPM().task()
    pipe: Any = tmpq_exp.load(compressed(task, tmp_path / "run"))
    folder = tmpq_exp.save(pipe, tmp_path / "packed").parent
    tensors = load_file(folder / "recipe.safetensors")
    floats = {key.removeprefix("unet.") for key in tensors if key.startswith("unet.")}
    weighted = [layer for layer in pipe.unet.supernet.layers if layer.weight_rows() is not None]
    assert not floats & {f"{layer.name}.weight" for layer in weighted}
    bits = pipe.recipe_model.candidate.allocations[0].weight_bits
    for layer, width in zip(pipe.unet.supernet.layers, bits, strict=True):
        if layer in weighted:
            num_bytes = -(-layer.float_layer.weight.numel() * width // 8)
            assert tensors[f"packed.{layer.name}.{width}"].nbytes == num_bytes
    num_weights = sum(layer.float_layer.weight.numel() for layer in weighted)
    assert (folder / "recipe.safetensors").stat().st_size < 1.1 * num_weights
    assert {entry.name for entry in folder.iterdir()} == {"README.md", "recipe.json", "recipe.safetensors"}


def test_a_card_says_what_it_is_and_how_it_is_loaded(pipelines: Path, tmp_path: Path) -> None:
    path = compressed(make_task("stable_diffusion", pipelines), tmp_path / "run")
    card = path.with_name("model_card.md").read_text(encoding="utf-8")
    assert card.startswith("# stable_diffusion, compressed")
    assert "3 kept: 800, 300, 20" in card
    assert "| measured: fd | 1.5 |" in card
    assert "guidance_scale 2, negative_prompt bad" in card
    assert 'tmpq_exp.load("recipe.json", pipeline="FOLDER_OF_THE_FLOAT_PIPELINE")' in card
    packed = tmpq_exp.save(tmpq_exp.load(path, str(pipelines / "stable_diffusion")), tmp_path / "packed")
    assert 'tmpq_exp.load("recipe.json")' in packed.with_name("README.md").read_text(encoding="utf-8")


def test_the_folder_of_the_float_pipeline_is_asked_for_and_checked(pipelines: Path, tmp_path: Path) -> None:
    path = compressed(make_task("ddpm", pipelines), tmp_path / "run")
    with pytest.raises(ValueError, match=r"the recipe is for a pipeline \(ddpm\); give its folder: pipeline="):
        tmpq_exp.load(path)
    with pytest.raises(ValueError, match="the recipe was made for weights"):
        tmpq_exp.load(path, str(pipelines / "ddim_of_classes"))
    assert str(pipelines) not in path.read_text()
    with pytest.raises(ValueError, match=r"pipe must be what tmpq_exp\.load gave, found a DDIMPipeline"):
        tmpq_exp.save(diffusers.DDIMPipeline.from_pretrained(pipelines / "ddpm"), tmp_path)


@pytest.mark.parametrize("found", ["../pipelines/ddpm", "/etc", "a/../b", "name"])
def test_a_recipe_names_no_path(found: str, pipelines: Path, tmp_path: Path) -> None:
    path = compressed(make_task("ddpm", pipelines), tmp_path / "run")
    recipe = json.loads(path.read_text())
    recipe["source"] |= {"hub": found}
    path.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"source\.hub must be a hub id"):
        tmpq_exp.load(path)


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a packed recipe, and its hash with them."""

    def damage(path: Path) -> None:
        tensors = load_file(path.with_suffix(".safetensors"))
        change(tensors)
        save_file(tensors, path.with_suffix(".safetensors"))
        recipe = json.loads(path.read_text())
        recipe["state"] |= {"sha256": hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()}
        path.write_text(json.dumps(recipe))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.with_suffix(".safetensors").unlink(), "no file at"),
        (rewritten(lambda tensors: tensors.pop("packed.conv_in.5")), "does not fit: 1 keys missing"),
        (
            rewritten(lambda tensors: tensors.update({"packed.conv_in.8": torch.zeros(1, dtype=torch.uint8)})),
            "conv_in.8",
        ),
        (
            rewritten(lambda tensors: tensors.update({"packed.conv_in.5": torch.zeros(3, dtype=torch.uint8)})),
            "integers of layer conv_in at 5 bits: .* bytes expected",
        ),
        (rewritten(lambda tensors: tensors.pop("unet.conv_in.bias")), "first missing key conv_in.bias"),
        (rewritten(lambda tensors: tensors.update({"unet.other": torch.zeros(1)})), "first extra key other"),
    ],
)
def test_a_damaged_packed_recipe_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmpq_exp.save(tmpq_exp.load(compressed(DigitsDDPM().task(), tmp_path / "run")), tmp_path / "packed")
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        tmpq_exp.load(path)
    assert str(path.parent) in str(error.value)


def test_labels_and_steps_out_of_range(tmp_path: Path) -> None:
    pipe: Any = tmpq_exp.load(compressed(DigitsDDPM().task(), tmp_path / "run"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"class_labels must be in 0\.\.9, found 10"):
        pipe([3, 10])
    with pytest.raises(ValueError, match="eta must be 0, found 1"):
        pipe.scheduler.step(torch.zeros(1), 800, torch.zeros(1), eta=1.0)
    assert pipe(3, output_type="pt", return_dict=False)[0].shape == (1, 1, 16, 16)
