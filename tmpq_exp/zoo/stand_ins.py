"""Owns the small models that stand for full-size ones where only the code is tried: random weights, every family."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.data import to_uint8
from tmpq_exp.zoo.resnet import ResNetCifar, ResNetImagenet
from tmpq_exp.zoo.weights import write_tensors

FORMAT = 1
"""Rises when a stand-in changes; its folder has it in its name."""

IMAGE_SIZE = 16
"""Side of the images that all pipelines here make, in pixels."""

NUM_REFERENCE_IMAGES = 64
NUM_CLASSES = 3
IMAGES_A_CLASS = 4

PROMPTS = ("a cat", "the dog", "two birds on a wire", "zoo")

BLOCKS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LDM_BETAS: dict[str, Any] = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}

_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
_TOKENS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
_ENDS: dict[str, Any] = {
    "bos_token_id": len(_TOKENS) - 2,
    "eos_token_id": len(_TOKENS) - 1,
    "pad_token_id": len(_TOKENS) - 1,
}


def pixel_unet(size: int = IMAGE_SIZE, channels: int = 3, num_classes: int | None = None) -> nn.Module:
    """U-Net of two levels with self-attention on the lower one.

    Args:
        size: Side of its states.
        channels: Channels of its states.
        num_classes: Classes that it is conditional on; None for none.
    """
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes,
        **BLOCKS,
    )
    return network


def context_unet(width: int, channels: int = 2) -> nn.Module:
    """U-Net of two levels on 8 x 8 latents with a transformer on the lower one.

    Args:
        width: Channels of the context that it attends to.
        channels: Channels of its latents.
    """
    from diffusers import UNet2DConditionModel

    network: nn.Module = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=width,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **BLOCKS,
    )
    return network


def vq_autoencoder(latent_channels: int = 3, image_channels: int = 3) -> nn.Module:
    """Autoencoder with a codebook, which halves each side."""
    from diffusers import VQModel

    network: nn.Module = VQModel(
        **_autoencoder(latent_channels, image_channels), num_vq_embeddings=16, scaling_factor=0.5
    )
    return network


def kl_autoencoder(latent_channels: int = 2, image_channels: int = 3) -> nn.Module:
    """Autoencoder with a Gaussian latent, which halves each side."""
    from diffusers import AutoencoderKL

    network: nn.Module = AutoencoderKL(**_autoencoder(latent_channels, image_channels), scaling_factor=0.3)
    return network


def _autoencoder(latent_channels: int, image_channels: int) -> dict[str, Any]:
    return {
        "in_channels": image_channels,
        "out_channels": image_channels,
        "latent_channels": latent_channels,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }


def letter_tokenizer(folder: Path, length: int = 12) -> Any:
    """CLIP's tokenizer with the 26 letters as its whole vocabulary.

    Args:
        folder: Where its files are written.
        length: Most tokens of a prompt.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(_TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def text_encoder(width: int = 12, length: int = 12) -> nn.Module:
    """CLIP's text encoder with one layer.

    Args:
        width: Channels of its states.
        length: Tokens of a prompt.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(_TOKENS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        **_ENDS,
    )
    network: nn.Module = CLIPTextModel(config)
    return network


def save_clip(folder: Path) -> None:
    """Write a CLIP of two layers for images of 32 pixels, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, **_ENDS, "vocab_size": len(_TOKENS), "max_position_embeddings": 24},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with tempfile.TemporaryDirectory() as vocabulary:
        processor: Any = CLIPProcessor
        processor(images, letter_tokenizer(Path(vocabulary), 24)).save_pretrained(folder)


def save_ddpm(folder: Path, channels: int = 3) -> None:
    """An unconditional pixel model."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(pixel_unet(channels=channels), DDPMScheduler()).save_pretrained(folder)


def save_ldm(folder: Path, channels: int = 3) -> None:
    """An unconditional latent model with a codebook."""
    from diffusers import DDIMScheduler, LDMPipeline

    scheduler = DDIMScheduler(clip_sample=False, **LDM_BETAS)
    unet = pixel_unet(IMAGE_SIZE // 2, 3)
    LDMPipeline(vq_autoencoder(image_channels=channels), unet, scheduler).save_pretrained(folder)


def save_ldm_of_classes(folder: Path, channels: int = 3) -> None:
    """A latent model of three classes, with a class embedder beside its parts."""
    from diffusers import DDIMScheduler, LDMPipeline

    scheduler, width = DDIMScheduler(clip_sample=False, **LDM_BETAS), 6
    LDMPipeline(vq_autoencoder(2, channels), context_unet(width), scheduler).save_pretrained(folder)
    (folder / "class_embedder").mkdir()
    embeddings = {"embedding.weight": torch.randn(NUM_CLASSES + 1, width)}
    write_tensors(folder / "class_embedder" / "model.safetensors", embeddings, {})


def save_stable_diffusion(folder: Path, channels: int = 3) -> None:
    """A text-conditional latent model with the parts of Stable Diffusion."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as vocabulary:
        StableDiffusionPipeline(
            vae=kl_autoencoder(image_channels=channels),
            text_encoder=text_encoder(),
            tokenizer=letter_tokenizer(Path(vocabulary)),
            unet=context_unet(12),
            scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


PIPELINES: dict[str, Callable[[Path], None]] = {
    "ddpm": save_ddpm,
    "ldm": save_ldm,
    "ldm_of_classes": save_ldm_of_classes,
    "stable_diffusion": save_stable_diffusion,
}
"""Families of pipelines, by name."""


class StandInFeatures(nn.Module):
    """Feature network with random weights, always the same: two convolutions and the mean over positions."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(16, 3, 3, 3, generator=generator) / 27**0.5, requires_grad=False)
        self.second = nn.Parameter(torch.randn(16, 16, 3, 3, generator=generator) / 12, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [0, 1] -> ``(N, 16)``."""
        hidden = F.relu(F.conv2d(2 * images - 1, self.first, padding=1))
        return F.relu(F.conv2d(hidden, self.second, stride=2)).mean(dim=(2, 3))


def resnet(family: str, depth: int) -> nn.Module:
    """Classifier of three classes whose normalizations have seen noise, so that its answers differ.

    Args:
        family: ``resnet_cifar`` or ``resnet_imagenet``.
        depth: Layers.

    Raises:
        ValueError: If the family has no network of that depth.
    """
    model = (ResNetCifar if family == "resnet_cifar" else ResNetImagenet)(depth, "made here")
    network = model.architecture(NUM_CLASSES)
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
    return network.eval()


def smooth_images(count: int, size: int) -> Tensor:
    """Coloured noise, ``(count, 3, size, size)`` in [0, 1]."""
    return F.interpolate(torch.rand(count, 3, 4, 4), size=(size, size), mode="bilinear", align_corners=False)


def save_images(images: Tensor, folder: Path) -> None:
    """One PNG an image, ``(N, 3, H, W)`` in [0, 1]."""
    folder.mkdir(parents=True)
    for index, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{index:03}.png")


def pipeline_stand_in(family: str, cache_dir: Path) -> Path:
    """Folder of a pipeline and of all that its evaluation asks for, made where it is not there.

    Args:
        family: A name of ``PIPELINES``.
        cache_dir: Where stand-ins are kept.

    Returns:
        Folder with ``pipeline/``, ``reference/`` (images), ``clip/`` and ``prompts.txt``.
    """

    def build(folder: Path) -> None:
        PIPELINES[family](folder / "pipeline")
        save_clip(folder / "clip")
        save_images(smooth_images(NUM_REFERENCE_IMAGES, IMAGE_SIZE), folder / "reference")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    return _made(cache_dir / f"stand_in_{family}_{FORMAT}", build)


def classifier_stand_in(family: str, depth: int, cache_dir: Path) -> Path:
    """Folder of a classifier's weights and test images, made where it is not there.

    Args:
        family: ``resnet_cifar`` or ``resnet_imagenet``.
        depth: Layers.
        cache_dir: Where stand-ins are kept.

    Returns:
        Folder with ``weights.safetensors`` and ``images/<class>/``.
    """

    def build(folder: Path) -> None:
        write_tensors(folder / "weights.safetensors", resnet(family, depth).state_dict(), {})
        for label in range(NUM_CLASSES):
            save_images(smooth_images(IMAGES_A_CLASS, 2 * IMAGE_SIZE), folder / "images" / f"class_{label}")

    return _made(cache_dir / f"stand_in_{family}{depth}_{FORMAT}", build)


def _made(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, built under another name first, so that nobody finds half of it; the same content each time."""
    if not folder.is_dir():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                build(temporary)
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
