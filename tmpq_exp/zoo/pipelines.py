"""Diffusers pipelines as models: pixel, latent and text-conditional ones, from a local folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.cost import LayerShape
from tmpq_exp.diffusion.schedule import TimestepSpacing
from tmpq_exp.zoo.architecture import BareArchitecture
from tmpq_exp.zoo.conditioning import ClassLabels, Conditioning, Prompts, Unconditional
from tmpq_exp.zoo.decoding import Autoencoder, Decoder, Pixels
from tmpq_exp.zoo.pipeline_folder import PipelineFolder, open_pipeline, read_prompts
from tmpq_exp.zoo.schedulers import SamplerName, sampler_of
from tmpq_exp.zoo.task import CostedModel, DiffusionModel, DiffusionTask, unet_layers


class PipelineModel(DiffusionModel, CostedModel):
    """A pipeline of diffusers: its U-Net is compressed, autoencoder and text encoder stay float.

    What kind it is, its folder says: a U-Net alone makes pixels, with an autoencoder it makes latents; it is
    conditional on classes (``num_class_embeds`` of the U-Net, or a folder ``class_embedder`` with one matrix whose
    last row is the empty class), on text (``text_encoder``), or on nothing.

    Args:
        name: Name of the model, as in ``model=...``.
        path: Local folder, or hub id ``owner/name``; needed for all tasks but ``task=cost``.
        sampler: ``ddim``, ``dpm_solver_pp_2m``, or ``rectified_flow`` for networks that were trained as one.
        clip_sample: Whether the predicted x_0 is clipped to [-1, 1]; None asks the pipeline's scheduler.
        guidance_scale: Scale of classifier-free guidance, at least 1; 1 is without.
        prompts: Text file, UTF-8, one prompt a line, or a list of prompts, for text-conditional pipelines; image i has
            prompt i modulo their number.
        negative_prompt: Prompt of no condition, for guidance.
        spacing: How kept timesteps are laid where none are searched: ``quadratic``, ``leading`` or ``trailing``.
        architecture: The published architecture, with which ``task=cost`` needs no folder; None reads it from ``path``.

    Raises:
        ValueError: If a setting is out of range.
    """

    SETTINGS = ("sampler", "clip_sample", "guidance_scale", "negative_prompt", "spacing")
    """Arguments that a recipe keeps, and all that it may set."""

    def __init__(
        self,
        name: str,
        path: str | None = None,
        *,
        sampler: str = "ddim",
        clip_sample: bool | None = None,
        guidance_scale: float = 1.0,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        spacing: str = "quadratic",
        architecture: BareArchitecture | None = None,
    ) -> None:
        if not guidance_scale >= 1:
            raise ValueError(f"model.guidance_scale must be at least 1 (without guidance), found {guidance_scale}")
        self.name, self.path, self.architecture = name, path, architecture
        self.sampler = _choice(SamplerName, sampler, "model.sampler")
        self.spacing = _choice(TimestepSpacing, spacing, "model.spacing")
        self.clip_sample, self.guidance_scale = clip_sample, guidance_scale
        self.prompts, self.negative_prompt = prompts, negative_prompt
        self.guided = guidance_scale != 1

    def folder(self) -> PipelineFolder:
        """The pipeline's folder; a hub id's files are fetched where they are missing.

        Raises:
            ValueError: If ``path`` is missing or leads to no pipeline.
        """
        if self.path is None:
            raise ValueError(
                f"model.path of {self.name} must be a folder of a diffusers pipeline, or a hub id (owner/name), found "
                "null; without it there is only task=cost"
            )
        return open_pipeline(self.path)

    def hub_id(self) -> str | None:
        """``path`` if it is a hub id; None for a folder."""
        return self.path if self.path is not None and not Path(self.path).expanduser().exists() else None

    def layers(self) -> tuple[LayerShape, ...]:
        """See ``CostedModel.layers``; of the pipeline's own U-Net if ``path`` is given."""
        if self.path is None and self.architecture is not None:
            return self.architecture.layers()
        folder = self.folder()
        with torch.device("meta"):
            network = folder.bare_unet()
        return unet_layers(network, sample_shape(folder), _one_of_each(folder))

    def diffusers_layers(self) -> tuple[LayerShape, ...] | None:
        """See ``CostedModel.diffusers_layers``."""
        return None if self.architecture is None or self.path is not None else self.architecture.diffusers_layers()

    def settings(self) -> dict[str, Any]:
        """What makes the same task of the same folder again, as plain data without paths."""
        return {
            "sampler": self.sampler.value,
            "clip_sample": self.clip_sample,
            "guidance_scale": float(self.guidance_scale),
            "negative_prompt": self.negative_prompt,
            "spacing": self.spacing.value,
        }

    def task(self, network: nn.Module | None = None) -> DiffusionTask:
        """See ``DiffusionModel.task``.

        Args:
            network: Stands for the folder's U-Net, which then needs no weights; None takes that.
        """
        folder = self.folder()
        shape = sample_shape(folder)
        config = folder.config("scheduler", "scheduler_config.json")
        source = f"scheduler of {folder.path}"
        sampler = sampler_of(config, self.sampler, self.clip_sample, source)
        conditions = self._conditions(folder)
        if self.guided:
            conditions.null_inputs(1)
        return DiffusionTask(
            name=self.name,
            unet=(network or folder.unet()).to(memory_format=torch.channels_last),
            sample_shape=shape,
            sampler=sampler,
            conditions=conditions,
            guidance_scale=self.guidance_scale,
            decoder=_decoder(folder),
            spacing=self.spacing,
            origin=self,
        )

    def _conditions(self, folder: PipelineFolder) -> Conditioning:
        """What the pipeline is conditional on."""
        if folder.class_name("text_encoder") is not None:
            return self._text_conditions(folder)
        if self.prompts is not None:
            raise ValueError(f"model.prompts must be null, found {self.prompts}: {folder.path} has no text encoder")
        width = folder.config("unet").get("cross_attention_dim")
        embeddings = folder.class_embeddings()
        if embeddings is not None:
            if embeddings.shape[1] != width or len(embeddings) < 2:
                raise ValueError(
                    f"{folder.path}: class_embedder must be (classes + 1, {width}), found {tuple(embeddings.shape)}"
                )
            return ClassLabels(len(embeddings) - 1, len(embeddings) - 1, embeddings[:, None, :])
        if folder.class_name("unet") == "UNet2DConditionModel":
            raise ValueError(
                f"{folder.path}: the U-Net attends to a context, but the pipeline has neither a text_encoder nor a "
                "class_embedder that makes one"
            )
        num_classes = folder.config("unet").get("num_class_embeds")
        return Unconditional() if num_classes is None else ClassLabels(int(num_classes))

    def _text_conditions(self, folder: PipelineFolder) -> Prompts:
        given = self.prompts
        prompts = read_prompts(given) if given is None or isinstance(given, str) else [str(prompt) for prompt in given]
        parts = folder.text_encoder()
        assert parts is not None
        width = folder.config("unet").get("cross_attention_dim")
        found = folder.config("text_encoder").get("hidden_size")
        if width != found:
            raise ValueError(f"{folder.path}: the U-Net attends to {width} channels, its text encoder has {found}")
        encoder = f"{folder.hash_of('text_encoder')} {folder.hash_of('tokenizer')}"
        return Prompts(prompts, ClipEmbedding(*parts), encoder, self.negative_prompt)


class ClipEmbedding:
    """Prompt -> last hidden states of CLIP's text encoder, padded to its length, as Stable Diffusion takes them.

    Args:
        encoder: ``CLIPTextModel`` in eval mode.
        tokenizer: ``CLIPTokenizer``.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer

    def to(self, device: torch.device) -> None:
        """Run there from now on."""
        self.encoder.to(device)

    def __call__(self, prompt: str) -> Tensor:
        """``(tokens, width)``; what is beyond the encoder's length is cut off."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states: Tensor = self.encoder(ids.input_ids.to(next(self.encoder.parameters()).device))[0]
        return states[0]


def sample_shape(folder: PipelineFolder) -> tuple[int, int, int]:
    """``(C, H, W)`` of a state of a pipeline.

    Raises:
        ValueError: If the U-Net does not say its size, or predicts other channels than it takes.
    """
    folder.unet_class()
    config = folder.config("unet")
    size, channels = config.get("sample_size"), config.get("in_channels")
    if config.get("out_channels") != channels or type(channels) is not int:
        raise ValueError(
            f"{folder.path}: the U-Net takes {channels} channels and predicts {config.get('out_channels')}; accepted "
            "are networks that predict what they take (no learned variance, no inpainting)"
        )
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if type(height) is not int or type(width) is not int:
        raise ValueError(f"{folder.path}: sample_size of the U-Net must be an integer or (H, W), found {size}")
    return channels, height, width


def _decoder(folder: PipelineFolder) -> Decoder:
    module = folder.autoencoder()
    if module is None:
        return Pixels()
    config: Any = module.config
    downsampling = 2 ** (len(config.block_out_channels) - 1)
    return Autoencoder(module, float(config.scaling_factor), downsampling, int(config.out_channels))


def _one_of_each(folder: PipelineFolder) -> dict[str, Tensor]:
    """Conditioning of one image, of the right shapes only."""
    config = folder.config("unet")
    if folder.class_name("unet") == "UNet2DConditionModel":
        is_text = folder.class_name("text_encoder") is not None
        num_tokens = int(folder.config("text_encoder")["max_position_embeddings"]) if is_text else 1
        return {"encoder_hidden_states": torch.zeros(1, num_tokens, config["cross_attention_dim"])}
    return {} if config.get("num_class_embeds") is None else {"class_labels": torch.zeros(1, dtype=torch.long)}


def _choice(choices: Any, value: str, key: str) -> Any:
    try:
        return choices(value)
    except ValueError:
        accepted = ", ".join(str(choice.value) for choice in choices)
        raise ValueError(f"{key} must be one of {accepted}, found {value!r}") from None
