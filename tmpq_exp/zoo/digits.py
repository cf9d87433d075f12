"""The embedded digits models: a class-conditional DDPM at 16x16 and the feature network of ``fd_digits``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.data import DIGITS_SIZE
from tmpq_exp.diffusion.schedule import linear_alphas_cumprod
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, TrainableModel
from tmpq_exp.zoo.training import ClassifierTraining, DiffusionTraining, Recipe
from tmpq_exp.zoo.weights import load_weights

EMBEDDED = Path(__file__).parent
"""Folder of the shipped weights; each model has a folder of its own with its model card."""

NUM_DIGITS = 10


class DigitsDDPM(TrainableDiffusionModel):
    """Class-conditional DDPM on the UCI digits at 16x16: 0.82 M parameters, 40.8 MMAC a call, T = 1000, linear betas.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.
    """

    name = "ddpm_digits"
    num_train_timesteps = 1000
    beta_range = (1e-4, 0.02)

    def __init__(self, checkpoint: str | None = None, recipe: Recipe | None = None) -> None:
        self.checkpoint = Path(checkpoint) if checkpoint else EMBEDDED / self.name / "model.safetensors"
        self.recipe = recipe

    def architecture(self) -> nn.Module:
        """A three-level U-Net with attention at 8x8 and 4x4."""
        network: nn.Module = UNet2DModel(
            sample_size=DIGITS_SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            num_class_embeds=NUM_DIGITS,
        )
        return network

    def alphas_cumprod(self) -> Tensor:
        """Linear schedule of Ho et al. 2020."""
        return linear_alphas_cumprod(self.num_train_timesteps, *self.beta_range)

    def load(self) -> nn.Module:
        """See ``TrainableModel.load``."""
        network = self.architecture()
        load_weights(network, self.checkpoint, self.name)
        return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def wrap(self, network: nn.Module) -> DiffusionTask:
        """See ``TrainableDiffusionModel.wrap``."""
        return DiffusionTask(
            name=self.name,
            unet=network,
            sample_shape=(1, DIGITS_SIZE, DIGITS_SIZE),
            alphas_cumprod=self.alphas_cumprod(),
            num_classes=NUM_DIGITS,
            clip_sample=False,
        )

    def training_module(self) -> DiffusionTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return DiffusionTraining(self.architecture(), self.recipe, self.alphas_cumprod(), class_conditional=True)


class DigitsFeatureNetwork(nn.Module):
    """Small CNN whose pooled activations are the features of ``fd_digits``.

    ``features`` maps images in [0, 1], ``(N, 1, 16, 16)``, to ``(N, 64)``; ``forward`` gives class logits.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, self.num_features, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, NUM_DIGITS)

    def features(self, images: Tensor) -> Tensor:
        """Spatial mean of the last activations, ``(N, 64)``."""
        return F.adaptive_avg_pool2d(self.body(images), 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, ``(N, 10)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class DigitsClassifier(TrainableModel):
    """The digits classifier; its features serve ``fd_digits``.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.
    """

    name = "digits_classifier"

    def __init__(self, checkpoint: str | None = None, recipe: Recipe | None = None) -> None:
        self.checkpoint = Path(checkpoint) if checkpoint else EMBEDDED / self.name / "model.safetensors"
        self.recipe = recipe

    def architecture(self) -> DigitsFeatureNetwork:
        """A fresh network."""
        return DigitsFeatureNetwork()

    def load(self) -> DigitsFeatureNetwork:
        """See ``TrainableModel.load``."""
        network = self.architecture()
        load_weights(network, self.checkpoint, self.name)
        network.eval().requires_grad_(False)
        return network

    def training_module(self) -> ClassifierTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return ClassifierTraining(self.architecture(), self.recipe)
