"""Tiny pipelines of every family, saved with diffusers as a full-size one would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pixel_unet(size: int = 16, channels: int = 1, num_classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes,
        **BLOCKS,
    )


def context_unet(width: int, channels: int = 2) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=width,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **BLOCKS,
    )


def vq(channels: int = 3) -> VQModel:
    return VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    )


def kl(channels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Knows letters only."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(width: int = 12) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )


def ddpm(folder: Path) -> None:
    DDPMPipeline(pixel_unet(), DDPMScheduler()).save_pretrained(folder)


def ddim_of_classes(folder: Path) -> None:
    DDIMPipeline(pixel_unet(num_classes=3), DDIMScheduler(clip_sample=False)).save_pretrained(folder)


def ldm(folder: Path) -> None:
    scheduler = DDIMScheduler(clip_sample=False, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    LDMPipeline(vq(), pixel_unet(8, 3), scheduler).save_pretrained(folder)


def ldm_of_classes(folder: Path) -> None:
    scheduler = DDIMScheduler(clip_sample=False, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    LDMPipeline(vq(2), context_unet(6), scheduler).save_pretrained(folder)
    (folder / "class_embedder").mkdir()
    save_file({"embedding.weight": torch.randn(4, 6)}, folder / "class_embedder" / "model.safetensors")


def stable_diffusion(folder: Path) -> None:
    StableDiffusionPipeline(
        vae=kl(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder.parent / "vocabulary"),
        unet=context_unet(12),
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "ddpm": ddpm,
    "ddim_of_classes": ddim_of_classes,
    "ldm": ldm,
    "ldm_of_classes": ldm_of_classes,
    "stable_diffusion": stable_diffusion,
}


def save_tiny(family: str, folder: Path) -> Path:
    """A pipeline of a family with random weights, the same each time."""
    torch.manual_seed(0)
    FAMILIES[family](folder)
    return folder
