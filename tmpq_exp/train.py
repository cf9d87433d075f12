"""task=train: train a float model by its own recipe and write its weights with a model card."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tmpq_exp.batch_size import fitting_micro_batch
from tmpq_exp.config import Config, UserError
from tmpq_exp.data import ImageData
from tmpq_exp.diffusion.schedule import spaced_timesteps
from tmpq_exp.files import replace_file
from tmpq_exp.measuring import quality_metric
from tmpq_exp.metrics.metric import Metric, Place
from tmpq_exp.metrics.statistics import FeatureSums
from tmpq_exp.progress import StageProgress, quiet_lightning
from tmpq_exp.report import samples_png
from tmpq_exp.rundir import RunDirectory, bad_input, describe_environment
from tmpq_exp.seeding import stream_seed
from tmpq_exp.tracking import Job, Results, Tracker, TrainingCurve, finishing, open_tracker, say_notice
from tmpq_exp.zoo.clip import ContrastiveNetwork, retrieval_percent
from tmpq_exp.zoo.embedded import FeatureClassifier
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, TrainableModel, task_layers
from tmpq_exp.zoo.training import DiffusionTraining, TrainingModule, top1_percent
from tmpq_exp.zoo.weights import write_tensors

CHECKPOINT_EVERY_STEPS = 1000

SAMPLE_COLUMNS, MAX_SAMPLE_ROWS = 12, 22

ERROR_DRAWS = 10000
"""Images times draws, at least, behind a diffusion model's noise error."""


def train(config: Config, resolved: dict[str, Any]) -> None:
    """Train, assess and save; a killed run goes on from its last checkpoint, with fresh random numbers from there.

    Writes ``model.safetensors`` and ``model_card.md`` into the run directory; for a network whose features serve a
    Frechet distance also ``reference.safetensors``, the statistics of the data under them, for a diffusion model
    ``samples.png``.

    The card of a diffusion model has its quality metric if that can be measured when the training ends.

    Raises:
        ValueError: If model or data cannot be used, or the metric is of other images.
    """
    quiet_lightning()
    run = RunDirectory.claim(Path(config.paths.run_dir), resolved)
    if run.weights.exists() and run.model_card.exists():
        print(f"already trained\nweights     {run.weights}\nmodel card  {run.model_card}")
        return
    torch.manual_seed(stream_seed(config.seed, "train"))
    model = instantiate(config.model)
    if not isinstance(model, TrainableModel):
        raise UserError(f"model: {getattr(model, 'name', type(model).__name__)} has no training recipe here")
    data = instantiate(config.data)
    if not isinstance(data, ImageData):
        raise UserError(f"data: {type(data).__name__} holds no training images; choose digits or cifar10")
    _check_fit(config, model, data)
    tracker = open_tracker(config.logger, Job.of_directory(run.path, "train", resolved))
    with finishing(tracker):
        card = _train(config, model, data, run, tracker)
    print(f"{card}\nweights     {run.weights}\nmodel card  {run.model_card}")
    say_notice(tracker)


def _last_checkpoint(path: Path) -> Path | None:
    """What a training that was stopped goes on from; None if there is nothing.

    Raises:
        UserError: If the file is damaged, or holds more than tensors and plain values.
    """
    if not path.exists():
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise UserError(
            f"{path} is damaged or holds more than a checkpoint ({type(error).__name__}); only tensors and plain "
            "values are read and nothing is unpickled. Remove it to train from the beginning"
        ) from error
    return path


def _train(config: Config, model: TrainableModel, data: ImageData, run: RunDirectory, tracker: Tracker) -> str:
    """Train, assess and save; returns the model card."""
    module = model.training_module()
    num_steps = module.recipe.num_steps
    checkpoint = ModelCheckpoint(run.path, filename="last", save_top_k=1, every_n_train_steps=CHECKPOINT_EVERY_STEPS)
    trainer = instantiate(config.trainer)(
        max_steps=num_steps,
        enable_checkpointing=True,
        callbacks=[checkpoint, StageProgress(f"train {model.name}", num_steps), TrainingCurve(tracker)],
        gradient_clip_val=module.recipe.gradient_clip,
        limit_val_batches=0,
        default_root_dir=run.path,
    )
    data.keep_on(trainer.strategy.root_device)
    last = _last_checkpoint(run.path / "last.ckpt")
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=last, weights_only=True)
    run.add_stage_seconds("train", time.perf_counter() - start)
    device = trainer.strategy.root_device
    network = module.trained_network().to(device)
    dtype = getattr(torch, model.weights_dtype)
    state = network.state_dict()
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    network.load_state_dict(weights)  # from here on it is what is shipped
    write_tensors(run.weights, weights, {"model": model.name, "seed": str(config.seed)})
    facts = {
        "data": data.description,
        "seed": str(config.seed),
        "hardware": f"{_device_name(device)}; torch {torch.__version__}",
        "training time": f"{run.stage_seconds()['train']:.0f} s",
        "final training loss": f"{float(module.final_loss):.5f}",
        **{name: f"{value:.3f}" for name, value in _assess(config, model, module, network, data, run).items()},
    }
    card = _model_card(model, module, facts)
    replace_file(run.model_card, card.encode())
    tracker.log_results(Results(facts, [run.samples] if run.samples.exists() else []))
    return card


def _check_fit(config: Config, model: TrainableModel, data: ImageData) -> None:
    """Refuse before the training what would fail in it or behind it.

    Raises:
        UserError: If the data or the metric of a diffusion model is of other images.
    """
    found = tuple(data.reference_set.pixels.shape[1:])
    if found != model.image_shape:
        raise UserError(f"data: {model.name} is trained on images of shape {model.image_shape}, found {found}")
    if isinstance(model, TrainableDiffusionModel):
        metric = _card_metric(config)
        with bad_input(f", as model {model.name} makes them; choose another metric"):
            if metric is not None:
                metric.check_images(model.image_shape)


def _card_metric(config: Config) -> Metric | None:
    """The quality metric; None, and why on stderr, without its network, which may be trained beside this run."""
    try:
        return quality_metric(config)
    except InstantiationException as error:
        print(f"warning: no quality metric for the model card at present: {error.__cause__}", file=sys.stderr)
        return None


def _assess(
    config: Config,
    model: TrainableModel,
    module: TrainingModule,
    network: nn.Module,
    data: ImageData,
    run: RunDirectory,
) -> dict[str, float]:
    """Figures of the trained network for its card; reference statistics under its features are written as well."""
    if isinstance(model, TrainableDiffusionModel):
        assert isinstance(module, DiffusionTraining)
        task = model.wrap(network)
        _draw_samples(task, config, run, model.condition_names)
        return _noise_error(module, network, data) | _image_quality(task, config)
    assert isinstance(network, FeatureClassifier | ContrastiveNetwork)
    sums = FeatureSums(network)
    device = next(network.parameters()).device
    for images, _ in data.reference_dataloader():
        sums.update(images.to(device))
    sums.statistics().save(run.reference, f"{sums.num_images} images of: {data.description}; uint8")
    if isinstance(network, ContrastiveNetwork):
        name = "held-out images whose nearest caption tells their scene, percent"
        return {name: retrieval_percent(network, data.val_dataloader())}
    return {"top-1 on held-out images, percent": top1_percent(network, data.val_dataloader())}


def _noise_error(module: DiffusionTraining, network: nn.Module, data: ImageData) -> dict[str, float]:
    draws = max(1, ERROR_DRAWS // len(data.reference_set.labels))
    name = f"noise MSE of the averaged weights, {len(data.reference_set.labels)} images, {draws} draws each"
    return {name: module.average_error(network, data.reference_dataloader(), draws)}


def _image_quality(task: DiffusionTask, config: Config) -> dict[str, float]:
    metric = _card_metric(config)
    if metric is None:
        return {}
    metric.make_ready(Place(next(task.unet.parameters()).device, Path(config.paths.cache_dir)))
    quality = {}
    for num_steps in (config.space.num_inference_steps, config.evaluation.reference_steps):
        name = f"{metric.name}, {config.evaluation.num_images} images, DDIM, {num_steps} {task.spacing.value} steps"
        quality[name] = metric(_images(task, config, num_steps))
    return quality


def _draw_samples(task: DiffusionTask, config: Config, run: RunDirectory, names: Sequence[str]) -> None:
    """samples.png: a row a condition, the first ones where they are many, at the steps of the float reference."""
    rows = range(min(len(names), MAX_SAMPLE_ROWS))
    timesteps = spaced_timesteps(task.num_train_timesteps, config.evaluation.reference_steps, task.spacing)
    indices = [row + column * len(names) for row in rows for column in range(SAMPLE_COLUMNS)]
    with torch.inference_mode():
        images = task.sample(task.unet, indices, timesteps, stream_seed(config.seed, "final")).cpu()
    parts = torch.split(images, SAMPLE_COLUMNS)
    samples_png(run.samples, [(names[row], part) for row, part in zip(rows, parts, strict=True)])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_environment()['processor']}, {torch.get_num_threads()} threads"


def _images(task: DiffusionTask, config: Config, num_steps: int) -> Iterator[Tensor]:
    timesteps = spaced_timesteps(task.num_train_timesteps, num_steps, task.spacing)
    seed = stream_seed(config.seed, "final")
    device = next(task.unet.parameters()).device
    batch = config.evaluation.micro_batch or fitting_micro_batch(task_layers(task), task.calls_per_step, device)
    for first in range(0, config.evaluation.num_images, batch):
        indices = range(first, min(first + batch, config.evaluation.num_images))
        with torch.inference_mode():
            yield task.sample(task.unet, indices, timesteps, seed)


def _model_card(model: TrainableModel, module: TrainingModule, facts: dict[str, str]) -> str:
    environment = describe_environment()
    rows = {
        "parameters": f"{sum(p.numel() for p in module.network.parameters()):,}",
        "command": f"`python -m tmpq_exp {' '.join(environment['command'].split()[1:])}`",
        "commit": environment["commit"] or "not in a git checkout",
        "recipe": f"{module.recipe}",
        **facts,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    summary = (type(model).__doc__ or "").split("\n\n")[0]
    return f"# {model.name}\n\n{summary}\n\n| | |\n| --- | --- |\n{table}\n"
