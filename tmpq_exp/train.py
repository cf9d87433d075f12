"""task=train: train a float model by its own recipe and write its weights with a model card."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tmpq_exp.config import Config, UserError
from tmpq_exp.data import ImageData
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.files import replace_file
from tmpq_exp.metrics.frechet import FeatureSums, FrechetMetric
from tmpq_exp.progress import StageProgress, quiet_lightning
from tmpq_exp.rundir import RunDirectory, describe_environment
from tmpq_exp.seeding import stream_seed
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, TrainableModel
from tmpq_exp.zoo.training import ClassifierTraining, DiffusionTraining, TrainingModule
from tmpq_exp.zoo.weights import write_tensors

CHECKPOINT_EVERY_STEPS = 1000


def train(config: Config, resolved: dict[str, Any]) -> None:
    """Train, assess and save; a killed run goes on from its last checkpoint, with fresh random numbers from there.

    Writes ``model.safetensors`` and ``model_card.md`` into the run directory; for a classifier also
    ``reference.safetensors``, the statistics of the data under its features.
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
    data: ImageData = instantiate(config.data)
    module = model.training_module()
    num_steps = module.recipe.num_steps
    checkpoint = ModelCheckpoint(run.path, filename="last", save_top_k=1, every_n_train_steps=CHECKPOINT_EVERY_STEPS)
    trainer = instantiate(config.trainer)(
        max_steps=num_steps,
        enable_checkpointing=True,
        callbacks=[checkpoint, StageProgress(f"train {model.name}", num_steps)],
        limit_val_batches=0,
        default_root_dir=run.path,
    )
    last = run.path / "last.ckpt"
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    run.add_stage_seconds("train", time.perf_counter() - start)
    device = _device_name(trainer.strategy.root_device)
    module.cpu()
    write_tensors(run.weights, module.trained_network().state_dict(), {"model": model.name, "seed": str(config.seed)})
    facts = {
        "data": data.description,
        "seed": str(config.seed),
        "hardware": f"{device}; torch {torch.__version__}",
        "training time": f"{run.stage_seconds()['train']:.0f} s",
        "final training loss": f"{float(module.final_loss):.5f}",
        **{name: f"{value:.3f}" for name, value in _assess(config, model, module, data, run).items()},
    }
    replace_file(run.model_card, _model_card(model, module, facts).encode())
    print(run.model_card.read_text(encoding="utf-8"))
    print(f"weights     {run.weights}\nmodel card  {run.model_card}")


def _assess(
    config: Config, model: TrainableModel, module: TrainingModule, data: ImageData, run: RunDirectory
) -> dict[str, float]:
    """Figures of the trained network for its card; a classifier's reference statistics are written as well."""
    if isinstance(module, ClassifierTraining):
        network: Any = module.trained_network()
        sums = FeatureSums(network)
        sums.update(data.everything()[0])
        sums.statistics().save(run.reference, f"all images of: {data.description}; uint8")
        return {"top-1 on held-out images, percent": module.top1(data.val_dataloader())}
    assert isinstance(module, DiffusionTraining)
    assert isinstance(model, TrainableDiffusionModel)
    task = model.wrap(module.trained_network())
    metric: FrechetMetric = instantiate(config.evaluation.metric)
    quality = {"noise MSE of the averaged weights, all images": module.average_loss(*data.everything())}
    for num_steps in (config.space.num_inference_steps, config.evaluation.reference_steps):
        name = f"{metric.name}, {config.evaluation.num_images} images, DDIM, {num_steps} quadratic steps"
        quality[name] = metric(_images(task, config, num_steps))
    return quality


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_environment()['processor']}, {torch.get_num_threads()} threads"


def _images(task: DiffusionTask, config: Config, num_steps: int) -> Iterator[Tensor]:
    timesteps = spaced_timesteps(task.num_train_timesteps, num_steps, TimestepSpacing.QUADRATIC)
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
