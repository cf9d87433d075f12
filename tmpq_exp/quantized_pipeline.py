"""A recipe as a diffusers pipeline: the usual call, a quantized U-Net, the kept timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tmpq_exp.recipe import CompressedModel, apply_recipe, save_packed
from tmpq_exp.zoo.conditioning import ClassLabels, Prompts, Unconditional
from tmpq_exp.zoo.decoding import Autoencoder, Pixels
from tmpq_exp.zoo.kept_timesteps import KeptTimestepsScheduler
from tmpq_exp.zoo.pipelines import ClipEmbedding
from tmpq_exp.zoo.task import DiffusionTask


class QuantizedUNet(nn.Module):
    """U-Net of a compressed model: at each timestep it runs at the bits and tiles of that step.

    Args:
        model: What ``apply_recipe`` gave.
    """

    def __init__(self, model: CompressedModel) -> None:
        super().__init__()
        self.supernet, self._candidate = model.module.supernet, model.candidate
        sampler = model.task.sampler
        self._step_index = {sampler.network_timestep(t): i for i, t in enumerate(model.timesteps)}

    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Whatever the float U-Net takes and returns; the timestep must be one of the kept ones."""
        told = int(timestep.flatten()[0]) if isinstance(timestep, Tensor) else int(timestep)
        subnet = self.supernet.subnet(self._candidate.allocation_at(self._step_index[told]))
        with subnet, self.supernet.at_timestep(told):
            return self.supernet(sample, timestep, *args, **kwargs)

    @property
    def config(self) -> Any:
        """Configuration of the float U-Net."""
        return self.supernet.network.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that stayed float."""
        return next(self.supernet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.supernet.parameters()).device


class ConditionalPipeline(DiffusionPipeline):  # type: ignore[misc]
    """What pipelines of tasks have in common for which diffusers has no class.

    Args:
        unet: Quantized U-Net.
        scheduler: Kept timesteps.
        task: Conditions, guidance and decoder.
    """

    def __init__(self, unet: QuantizedUNet, scheduler: KeptTimestepsScheduler, task: DiffusionTask) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._task = task

    @torch.no_grad()
    def _make(
        self,
        inputs: dict[str, Tensor],
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
    ) -> Any:
        """Images of these inputs of the network, as diffusers' pipelines return them."""
        task, device = self._task, self.unet.device
        task.conditions.follow(device)
        conditioning = {key: value.to(device) for key, value in task.with_null(inputs, num_images).items()}
        shape = (num_images, *task.sample_shape)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        self.scheduler.set_timesteps(device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            seen = x if task.calls_per_step == 1 else torch.cat([x, x])
            prediction = task.guided(self.unet(seen, timestep.expand(len(seen)), **conditioning).sample)
            x = self.scheduler.step(prediction, timestep, x).prev_sample
        images: Any = task.decode(x)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class ClassToImagePipeline(ConditionalPipeline):
    """Images of class labels."""

    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image a label.

        Args:
            class_labels: Labels, from 0.
            generator: Of the start states.
            num_inference_steps: Ignored, as by all pipelines of a recipe: the timesteps are the recipe's.
            latents: Start states, ``(N, C, H, W)``; None draws them.
            output_type: ``pil``, ``np`` or ``pt``.
            return_dict: Whether to return an object with ``images`` or a tuple.

        Raises:
            ValueError: If there is no such label.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        conditions = self._task.conditions
        assert isinstance(conditions, ClassLabels)
        for label in labels:
            if not 0 <= label < conditions.num_classes:
                raise ValueError(f"class_labels must be in 0..{conditions.num_classes - 1}, found {label}")
        return self._make(conditions.of(labels), len(labels), generator, latents, output_type, return_dict)


class TextToPixelsPipeline(ConditionalPipeline):
    """Images of prompts, by a model without an autoencoder."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image a prompt.

        Args:
            prompt: One or several.
            generator, num_inference_steps, latents, output_type, return_dict: See ``ClassToImagePipeline``.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        conditions = self._task.conditions
        assert isinstance(conditions, Prompts)
        return self._make(conditions.of(prompts), len(prompts), generator, latents, output_type, return_dict)


def load(path: str | Path, pipeline: str | None = None) -> DiffusionPipeline:
    """A recipe as a diffusers pipeline.

    Its call has the signature of the pipeline that the recipe was made of: ``StableDiffusionPipeline``,
    ``LDMPipeline``, ``DDIMPipeline``, or ``ClassToImagePipeline`` for class-conditional models, of which diffusers has
    no pipeline. ``num_inference_steps`` changes nothing, the recipe has its own timesteps. ``guidance_scale`` does, and
    its default is the pipeline's: give the one that the recipe was searched with, which its model card names.

    Args:
        path: ``recipe.json``.
        pipeline: Folder or hub id of the float pipeline; see ``apply_recipe``.

    Raises:
        ValueError: If a file is missing, damaged or of another model; the file and what was expected are named.
    """
    return as_pipeline(apply_recipe(path, pipeline=pipeline))


def as_pipeline(model: CompressedModel) -> DiffusionPipeline:
    """The pipeline of a compressed model, see ``load``."""
    task, unet = model.task, QuantizedUNet(model)
    scheduler = KeptTimestepsScheduler(task.sampler, model.timesteps)
    decoder, conditions = task.decoder, task.conditions
    if isinstance(conditions, ClassLabels):
        pipe: Any = ClassToImagePipeline(unet, scheduler, task)
    elif isinstance(conditions, Prompts) and isinstance(decoder, Pixels):
        pipe = TextToPixelsPipeline(unet, scheduler, task)
    elif isinstance(conditions, Prompts) and isinstance(decoder, Autoencoder):
        assert isinstance(conditions.embed, ClipEmbedding)
        pipe = diffusers.StableDiffusionPipeline(
            vae=decoder.module,
            text_encoder=conditions.embed.encoder,
            tokenizer=conditions.embed.tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif isinstance(decoder, Autoencoder):
        pipe = diffusers.LDMPipeline(decoder.module, unet, scheduler)
    else:
        assert isinstance(conditions, Unconditional), f"no pipeline for {type(conditions).__name__}"
        pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
        pipe.register_modules(scheduler=scheduler)
    pipe.recipe_model = model
    return pipe


def save(pipe: DiffusionPipeline, folder: str | Path) -> Path:
    """Write what ``load`` gave into a folder from which ``load`` gives it again, without the float U-Net.

    Integer weights are packed at their own bits; see ``save_packed``. Nothing is sent anywhere.

    Returns:
        Path of the written ``recipe.json``.

    Raises:
        ValueError: If the pipeline is not one that ``load`` gave.
    """
    model = getattr(pipe, "recipe_model", None)
    if not isinstance(model, CompressedModel):
        raise ValueError(f"pipe must be what tmpq_exp.load gave, found a {type(pipe).__name__}")
    return save_packed(model, folder)
