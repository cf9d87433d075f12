"""task=train: train a float model by its own recipe and write its weights with a model card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tmpq_exp.config import Config, UserError
from tmpq_exp.data import ImageData
from tmpq_exp.diffusion.schedule import spaced_timesteps
from tmpq_exp.files import replace_file
from tmpq_exp.measuring import quality_metric
from tmpq_exp.metrics.metric import Place
from tmpq_exp.metrics.statistics import FeatureSums
from tmpq_exp.progress import StageProgress, quiet_lightning
from tmpq_exp.report import samples_png
from tmpq_exp.rundir import RunDirectory, describe_environment
from tmpq_exp.seeding import stream_seed
from tmpq_exp.tracking import Job, Results, Tracker, TrainingCurve, finishing, open_tracker, say_notice
from tmpq_exp.zoo.embedded import EmbeddedDDPM, FeatureClassifier
from tmpq_exp.zoo.task import DiffusionTask, TrainableModel
from tmpq_exp.zoo.training import ClassifierTraining, DiffusionTraining, TrainingModule, top1_percent
from tmpq_exp.zoo.weights import write_tensors

CHECKPOINT_EVERY_STEPS = 1000

SAMPLE_COLUMNS = 12

ERROR_DRAWS = 10000
"""Images times draws, at least, behind a diffusion model's noise error."""


def train(config: Config, resolved: dict[str, Any]) -> None:
    """Train, assess and save; a killed run goes on from its last checkpoint, with fresh random numbers from there.

    Writes ``model.safetensors`` and ``model_card.md`` into the run directory; for a classifier also
    ``reference.safetensors``, the statistics of the data under its features, for a diffusion model ``samples.png``.
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


def _assess(
    config: Config,
    model: TrainableModel,
    module: TrainingModule,
    network: nn.Module,
    data: ImageData,
    run: RunDirectory,
) -> dict[str, float]:
    """Figures of the trained network for its card; a classifier's reference statistics are written as well."""
    if isinstance(module, ClassifierTraining):
        assert isinstance(network, FeatureClassifier)
        sums = FeatureSums(network)
        device = next(network.parameters()).device
        for images, _ in data.reference_dataloader():
            sums.update(images.to(device))
        sums.statistics().save(run.reference, f"{sums.num_images} images of: {data.description}; uint8")
        return {"top-1 on held-out images, percent": top1_percent(network, data.val_dataloader())}
    assert isinstance(module, DiffusionTraining)
    assert isinstance(model, EmbeddedDDPM)
    task = model.wrap(network)
    _draw_samples(task, config, run, model.class_names)
    metric = quality_metric(config)
    metric.make_ready(Place(next(network.parameters()).device, Path(config.paths.cache_dir)))
    draws = max(1, ERROR_DRAWS // len(data.reference_set.labels))
    name = f"noise MSE of the averaged weights, {len(data.reference_set.labels)} images, {draws} draws each"
    quality = {name: module.average_error(network, data.reference_dataloader(), draws)}
    for num_steps in (config.space.num_inference_steps, config.evaluation.reference_steps):
        name = f"{metric.name}, {config.evaluation.num_images} images, DDIM, {num_steps} {task.spacing.value} steps"
        quality[name] = metric(_images(task, config, num_steps))
    return quality


def _draw_samples(task: DiffusionTask, config: Config, run: RunDirectory, names: Sequence[str]) -> None:
    """samples.png: a row a class, at the steps of the float reference."""
    num_classes = len(names)
    timesteps = spaced_timesteps(task.num_train_timesteps, config.evaluation.reference_steps, task.spacing)
    with torch.inference_mode():
        images = task.sample(
            task.unet, range(SAMPLE_COLUMNS * num_classes), timesteps, stream_seed(config.seed, "final")
        )
    samples_png(run.samples, [(name, images[label::num_classes].cpu()) for label, name in enumerate(names)])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_environment()['processor']}, {torch.get_num_threads()} threads"


def _images(task: DiffusionTask, config: Config, num_steps: int) -> Iterator[Tensor]:
    timesteps = spaced_timesteps(task.num_train_timesteps, num_steps, task.spacing)
    seed = stream_seed(config.seed, "final")
    batch = config.evaluation.micro_batch
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
