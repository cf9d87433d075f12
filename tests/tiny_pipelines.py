"""Tiny pipelines of every family, saved with diffusers as a full-size one would be; gray, to try one channel too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler

from tmpq_exp.zoo.stand_ins import pixel_unet, save_ddpm, save_ldm, save_ldm_of_classes, save_stable_diffusion


def ddim_of_classes(folder: Path, channels: int) -> None:
    DDIMPipeline(pixel_unet(channels=channels, num_classes=3), DDIMScheduler(clip_sample=False)).save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path, int], None]] = {
    "ddpm": save_ddpm,
    "ddim_of_classes": ddim_of_classes,
    "ldm": save_ldm,
    "ldm_of_classes": save_ldm_of_classes,
    "stable_diffusion": save_stable_diffusion,
}


def save_tiny(family: str, folder: Path) -> Path:
    """A pipeline of a family with random weights, the same each time."""
    torch.manual_seed(0)
    FAMILIES[family](folder, 1)
    return folder
