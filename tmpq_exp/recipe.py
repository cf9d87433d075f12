"""The recipe: everything that turns the float model into the best candidate again, as JSON and safetensors.

``recipe.json`` holds the kept timesteps, the allocation and the Winograd scales; ``recipe.safetensors`` beside it holds
scales, zero points and learned roundings at the chosen bits, and the ranges of Winograd layers whose activation scales
are static. No weights: they are the float model's, named by their hash. A *packed* recipe (``save_packed``) needs no
float U-Net: its safetensors file holds the integers of the weights, at as many bits as they have, and in float what is
not quantized. A recipe from a stranger is data only, nothing in it is imported, evaluated or unpickled, and no file
outside of its folder is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.config import QuantConfig, QuantizerConfig
from tmpq_exp.files import replace_file
from tmpq_exp.model_card import model_card
from tmpq_exp.plain_data import parse_json
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.packed import PackedState
from tmpq_exp.quant.primitives import integer_range
from tmpq_exp.quant.static_ranges import load_ranges, ranges_state, split_state, used_layers
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.rundir import write_json
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.scales import ScaleSet
from tmpq_exp.zoo.cifar import CifarDDPM
from tmpq_exp.zoo.conditioning import Prompts
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.pipeline_folder import is_hub_id
from tmpq_exp.zoo.pipelines import PipelineModel
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, task_layers
from tmpq_exp.zoo.text_to_image import DigitsTextToImage
from tmpq_exp.zoo.weights import fill, read_tensors, write_tensors

RECIPE_SCHEMA = 4
EMBEDDED_MODELS: dict[str, type[TrainableDiffusionModel]] = {
    model.name: model for model in (DigitsDDPM, CifarDDPM, DigitsTextToImage)
}
"""Models that a recipe may name; for any other one ``apply_recipe`` is given the float task."""


@dataclass(frozen=True)
class CompressedModel:
    """A float model under a recipe, ready to sample.

    Args:
        candidate: Kept timesteps and allocation.
        module: Supernet that holds the chosen bits only.
        micro_batch: Images a forward; images are bit-equal to the run's at this micro-batch and the same number of
            threads.
        recipe: Content of ``recipe.json``.
    """

    candidate: Candidate
    module: SupernetModule
    micro_batch: int
    recipe: Mapping[str, Any]

    @property
    def task(self) -> DiffusionTask:
        """The float task; its U-Net holds the integers' values where the recipe is packed."""
        return self.module.task

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Kept timesteps, in sampling order."""
        return self.candidate.timesteps

    @property
    def unet(self) -> nn.Module:
        """The network; it runs quantized inside ``with model.module.supernet.subnet(allocation)``."""
        return self.module.supernet

    def sample(self, num_images: int, seed: int, *, first_index: int = 0) -> Tensor:
        """Images ``first_index ... first_index + num_images - 1`` of a stream.

        Returns:
            Images in [0, 1], ``(num_images, C, H, W)``, on the CPU.

        Raises:
            ValueError: If ``num_images`` is below 1.
        """
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, found {num_images}")
        starts = range(first_index, first_index + num_images, self.micro_batch)
        batches = (range(start, start + self.micro_batch) for start in starts)  # always whole ones: see micro_batch
        return torch.cat([self.module.images(self.candidate, b, seed).cpu() for b in batches])[:num_images]


def write_recipe(
    path: Path,
    state_path: Path,
    module: SupernetModule,
    candidate: Candidate,
    winograd: Mapping[int, tuple[WinogradSpec, ScaleSet]],
    *,
    micro_batch: int,
    evidence: Mapping[str, Any],
) -> None:
    """Write a candidate of a run's supernet as a recipe, with its model card ``model_card.md`` beside it.

    Args:
        path, state_path: ``recipe.json`` and the safetensors file beside it.
        module: The run's supernet.
        candidate: What to ship; its steps share an allocation or have one each.
        winograd: Specification and scales of the tiles the supernet may take.
        micro_batch: Images a forward in the run.
        evidence: What was measured, kept for the reader.
    """
    layers = module.supernet.shapes
    choices = bit_choices(candidate)
    compressed = SupernetModule(module.task, layers, *choices, module.supernet.config)
    held = dict(module.supernet.named_quantizers())
    for name, quantizer in compressed.supernet.named_quantizers():
        quantizer.take(held[name])
    used = used_layers(candidate, [shape.name for shape in layers])
    ranges = {key: found for key, found in module.supernet.ranges.items() if key in used}
    state = compressed.supernet.quantizer_state() | ranges_state(ranges)
    write_tensors(state_path, state, {"model": module.task.name, "weights": module.task.weights_hash})
    tiles = {m for _, m in used}
    recipe = {
        "schema": RECIPE_SCHEMA,
        "model": module.task.name,
        "weights_hash": module.task.weights_hash,
        "source": _source(module.task),
        "packed": False,
        "sampler": _sampler(module.task),
        "micro_batch": micro_batch,
        "candidate": candidate.to_json(),
        "layers": [shape.name for shape in layers],
        "quant": asdict(module.supernet.config),
        "winograd": {
            str(m): {"spec": asdict(spec), "scales": scales.to_json()}
            for m, (spec, scales) in winograd.items()
            if m in tiles
        },
        "state": _state_entry(state_path),
        "evidence": evidence,
    }
    write_json(path, recipe)
    replace_file(path.with_name("model_card.md"), model_card(recipe).encode())


def bit_choices(candidate: Candidate) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Bit widths that a candidate uses, one entry a layer, without float."""

    def used(per_step: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(sorted(set(bits) - {FLOAT_BITS}, reverse=True)) for bits in zip(*per_step, strict=True)]

    return used([a.weight_bits for a in candidate.allocations]), used([a.act_bits for a in candidate.allocations])


def apply_recipe(
    path: str | Path, task: DiffusionTask | None = None, *, pipeline: str | None = None
) -> CompressedModel:
    """Compress the float model by a recipe.

    Args:
        path: ``recipe.json``; its safetensors file is looked for beside it.
        task: The float task; None takes the embedded model that the recipe names, or the pipeline.
        pipeline: Folder or hub id of the float pipeline that the recipe was made of; None takes the hub id in the
            recipe, if there is one. A packed recipe needs neither.

    Returns:
        The compressed model; at the run's seed its images are bit-equal to the run's best candidate's.

    Raises:
        ValueError: If a file is missing, damaged or of another model; the file and what was expected are named.
    """
    path = Path(path)
    recipe = _read(path)
    try:
        return _apply_packed(path, recipe) if recipe["packed"] is True else _apply(path, recipe, task, pipeline)
    except torch.OutOfMemoryError:
        raise
    except _DAMAGES as error:
        raise ValueError(f"{path} is damaged: {error!r} while reading it") from error
    except ValueError as error:
        if str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


_DAMAGES = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What a recipe with odd values may make of the code that takes it."""


def save_packed(model: CompressedModel, folder: str | Path) -> Path:
    """Write a compressed model into a folder of its own, without float weights where they are quantized.

    Args:
        model: What ``apply_recipe`` gave.
        folder: Made if it is missing; ``recipe.json``, ``recipe.safetensors`` and a model card are written, and for a
            pipeline its other parts.

    Returns:
        Path of the written ``recipe.json``; ``apply_recipe`` gives bit-equal images from it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = model.task
    if isinstance(task.origin, PipelineModel):
        task.origin.folder().copy_parts(folder)
    state_path, path = folder / "recipe.safetensors", folder / "recipe.json"
    state = PackedState.of(model.module.supernet, task.unet, model.candidate)
    tensors = state.tensors() | ranges_state(model.module.supernet.ranges)
    write_tensors(state_path, tensors, {"model": task.name})
    recipe = {**model.recipe, "packed": True, "state": _state_entry(state_path)}
    write_json(path, recipe)
    replace_file(folder / "README.md", model_card(recipe).encode())
    return path


def _apply_packed(path: Path, recipe: Mapping[str, Any]) -> CompressedModel:
    """A model whose U-Net comes from the recipe's folder alone."""
    state = PackedState.from_tensors(_read_state(path, recipe))
    origin = _origin(path, recipe, str(path.parent))
    network = origin.folder().bare_unet() if isinstance(origin, PipelineModel) else origin.architecture()
    fill(network, state.blank_weights(network), path.parent, recipe["model"])
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    task = origin.task(network) if isinstance(origin, PipelineModel) else origin.wrap(network)
    model = _compressed(path, recipe, task, state.quantizers)
    state.keep_integers(model.module.supernet, model.candidate)
    return model


def read_candidate(path: Path, layers: Sequence[str]) -> Candidate:
    """The candidate of a recipe, of a network with these layers.

    Raises:
        ValueError: If the file is no recipe, or of another network.
    """
    recipe = _read(path)
    if recipe["layers"] != list(layers):
        raise ValueError(f"{path}: the layers of the recipe are not those of this model")
    candidate = Candidate.from_json(recipe["candidate"])
    if any(len(allocation) != len(layers) for allocation in candidate.allocations):
        raise ValueError(f"{path}: the network has {len(layers)} layers, an allocation another number of entries")
    return candidate


def _apply(path: Path, recipe: Mapping[str, Any], task: DiffusionTask | None, pipeline: str | None) -> CompressedModel:
    task = task or _origin(path, recipe, pipeline).task()
    if task.weights_hash != recipe["weights_hash"]:
        raise ValueError(
            f"{path}: the recipe was made for weights {recipe['weights_hash']}, "
            f"the float model given ({task.name}) has {task.weights_hash}"
        )
    return _compressed(path, recipe, task, _read_state(path, recipe))


def _compressed(
    path: Path, recipe: Mapping[str, Any], task: DiffusionTask, state: Mapping[str, Tensor]
) -> CompressedModel:
    """The model of a task under a recipe, with these quantizers and static ranges."""
    if recipe["sampler"] != _sampler(task):
        raise ValueError(f"{path}: the recipe was made for sampler {recipe['sampler']}, the task has {_sampler(task)}")
    layers = task_layers(task)
    if [shape.name for shape in layers] != recipe["layers"]:
        raise ValueError(f"{path}: the layers of the recipe are not those of model {task.name}")
    candidate = _candidate(recipe["candidate"], task, len(layers))
    micro_batch = recipe["micro_batch"]
    if type(micro_batch) is not int or micro_batch < 1:
        raise ValueError(f"micro_batch must be an integer of at least 1, found {micro_batch!r}")
    module = SupernetModule(task, layers, *bit_choices(candidate), _quant_config(recipe["quant"]))
    quantizers, ranges = split_state(state)
    source = str(path.parent / "recipe.safetensors")
    module.supernet.load_quantizer_state(quantizers, source)
    module.supernet.set_winograd(
        {
            int(m): (WinogradSpec(**entry["spec"]), ScaleSet.from_json(entry["scales"]))
            for m, entry in recipe["winograd"].items()
        }
    )
    for allocation in candidate.allocations:
        with module.supernet.subnet(allocation):
            pass  # every tile is one that its layer can take
    load_ranges(module.supernet, ranges, source, used_layers(candidate, recipe["layers"]))
    return CompressedModel(candidate, module, micro_batch, recipe)


def _origin(path: Path, recipe: Mapping[str, Any], pipeline: str | None) -> PipelineModel | TrainableDiffusionModel:
    """The option of the model group that makes the float task."""
    source = recipe["source"]
    if source["kind"] == "pipeline":
        found = pipeline or source["hub"]
        if found is None:
            raise ValueError(f"{path}: the recipe is for a pipeline ({recipe['model']}); give its folder: pipeline=...")
        if pipeline is None and (not is_hub_id(found) or Path(found).exists()):
            raise ValueError(
                f"{path}: source.hub must be a hub id (owner/name) and no path of this machine, found {found!r}; a "
                "folder is given by pipeline=..."
            )
        prompts = [""] if source["text"] else None  # callers of the pipeline bring their own
        settings = {name: source["settings"][name] for name in PipelineModel.SETTINGS}
        return PipelineModel(str(recipe["model"]), str(found), prompts=prompts, **settings)
    if recipe["model"] not in EMBEDDED_MODELS:
        raise ValueError(
            f"{path}: the recipe is for model {recipe['model']!r}, which is not embedded "
            f"({', '.join(EMBEDDED_MODELS)}); give its float task"
        )
    if recipe["model"] == DigitsTextToImage.name:
        return DigitsTextToImage(guidance_scale=_guidance_scale(path, recipe))
    return EMBEDDED_MODELS[recipe["model"]]()


def _guidance_scale(path: Path, recipe: Mapping[str, Any]) -> float:
    sampler = recipe["sampler"]
    found = sampler.get("guidance_scale") if isinstance(sampler, dict) else None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise ValueError(f"{path}: sampler.guidance_scale must be a number, found {found!r}")
    return float(found)


def _source(task: DiffusionTask) -> dict[str, Any]:
    """How the float task is made again, without paths."""
    origin = task.origin
    if not isinstance(origin, PipelineModel):
        return {"kind": "task"}
    text = isinstance(task.conditions, Prompts)
    return {"kind": "pipeline", "hub": origin.hub_id(), "text": text, "settings": origin.settings()}


def _read_state(path: Path, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors beside a recipe, the ones it was written with."""
    state_path = path.parent / Path(recipe["state"]["file"]).name  # a name, never a path out of the recipe's folder
    state, _ = read_tensors(state_path, "quantizer state of the recipe")
    found = hashlib.sha256(state_path.read_bytes()).hexdigest()
    if found != recipe["state"]["sha256"]:
        raise ValueError(f"{state_path} is not the file that {path.name} was written with (SHA-256 {found[:16]}...)")
    return state


def _state_entry(state_path: Path) -> dict[str, str]:
    return {"file": state_path.name, "sha256": hashlib.sha256(state_path.read_bytes()).hexdigest()}


def _sampler(task: DiffusionTask) -> dict[str, Any]:
    return {key: task.state_fingerprint[key] for key in ("schedule", "sampler", "guidance_scale")}


def _candidate(data: Any, task: DiffusionTask, num_layers: int) -> Candidate:
    candidate = Candidate.from_json(data)
    first, last = candidate.timesteps[0], candidate.timesteps[-1]
    if last < 0 or first >= task.num_train_timesteps:
        raise ValueError(f"timesteps must be in 0..{task.num_train_timesteps - 1}, found {last}..{first}")
    for allocation in candidate.allocations:
        if len(allocation) != num_layers:
            raise ValueError(f"the network has {num_layers} layers, an allocation {len(allocation)} entries")
        for bits in {*allocation.weight_bits, *allocation.act_bits} - {FLOAT_BITS}:
            integer_range(bits, symmetric=True)
    return candidate


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no recipe at {path}; a recipe.json that a run wrote was expected there")
    try:
        recipe = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); a recipe.json that a run wrote was expected") from error
    keys = {
        "schema",
        "model",
        "weights_hash",
        "source",
        "packed",
        "sampler",
        "micro_batch",
        "candidate",
        "layers",
        "quant",
        "winograd",
        "state",
    }
    if not isinstance(recipe, dict) or not keys <= recipe.keys():
        missing = sorted(keys - recipe.keys()) if isinstance(recipe, dict) else sorted(keys)
        raise ValueError(f"{path} is no recipe: it misses {', '.join(missing)}")
    if recipe["schema"] != RECIPE_SCHEMA:
        raise ValueError(f"{path}: recipe schema {recipe['schema']!r}, this version reads {RECIPE_SCHEMA}")
    if not isinstance(recipe["packed"], bool):
        raise ValueError(f"{path}: packed must be true or false, found {recipe['packed']!r}")
    return recipe


def _quant_config(data: Mapping[str, Any]) -> QuantConfig:
    return QuantConfig(**{**data, "weight": QuantizerConfig(**data["weight"]), "act": QuantizerConfig(**data["act"])})
