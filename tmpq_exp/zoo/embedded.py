"""What embedded models have in common: shipped weights, a DDPM of the linear schedule, a classifier for features."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.diffusion.sampler import DDIM
from tmpq_exp.diffusion.schedule import linear_alphas_cumprod
from tmpq_exp.zoo.conditioning import ClassLabels
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, TrainableModel
from tmpq_exp.zoo.training import ClassifierTraining, DiffusionTraining, Recipe
from tmpq_exp.zoo.weights import load_weights


def embedded_file(model: str, file: str) -> Path:
    """A file shipped with a model; each model has a folder of its own beside this module, with its model card."""
    return Path(__file__).parent / model / file


class EmbeddedDDPM(TrainableDiffusionModel):
    """Class-conditional DDPM in pixel space, T = 1000, linear betas.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.

    Class attributes:
        class_names: One name a class label.
        clip_sample: Whether the sampler clips x_0 to [-1, 1].
        flip: Whether training mirrors images at random.
        min_snr_gamma: See ``DiffusionTraining``.
    """

    class_names: tuple[str, ...]
    clip_sample = False
    flip = False
    min_snr_gamma: float | None = None
    num_train_timesteps = 1000
    beta_range = (1e-4, 0.02)

    def __init__(self, checkpoint: str | None = None, recipe: Recipe | None = None) -> None:
        self.checkpoint = Path(checkpoint) if checkpoint else embedded_file(self.name, "model.safetensors")
        self.recipe = recipe

    @property
    def condition_names(self) -> tuple[str, ...]:
        """See ``TrainableDiffusionModel.condition_names``."""
        return self.class_names

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
            sample_shape=self.image_shape,
            sampler=DDIM(self.alphas_cumprod(), clip_sample=self.clip_sample),
            conditions=ClassLabels(len(self.class_names)),
            origin=self,
        )

    def training_module(self) -> DiffusionTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return DiffusionTraining(
            self.architecture(),
            self.recipe,
            self.alphas_cumprod(),
            flip=self.flip,
            min_snr_gamma=self.min_snr_gamma,
        )


class FeatureClassifier(nn.Module):
    """A classifier whose pooled activations are the features of a Frechet distance.

    Args:
        body: Maps images in [0, 1] to activations ``(N, num_features, h, w)``.
        num_features: Features an image.
        num_classes: Classes of the linear head.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.num_features = body, num_features
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Spatial mean of the last activations, ``(N, num_features)``."""
        return F.adaptive_avg_pool2d(self.body(images), 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, ``(N, num_classes)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class EmbeddedClassifier(TrainableModel):
    """A classifier whose features serve a Frechet distance.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.
    """

    def __init__(self, checkpoint: str | None = None, recipe: Recipe | None = None) -> None:
        self.checkpoint = Path(checkpoint) if checkpoint else embedded_file(self.name, "model.safetensors")
        self.recipe = recipe

    @abstractmethod
    def architecture(self) -> FeatureClassifier:
        """A fresh network."""

    @abstractmethod
    def augment(self, images: Tensor) -> Tensor:
        """Training images changed at random."""

    def load(self) -> FeatureClassifier:
        """See ``TrainableModel.load``."""
        network = self.architecture()
        load_weights(network, self.checkpoint, self.name)
        return network.eval().requires_grad_(False)

    def training_module(self) -> ClassifierTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return ClassifierTraining(self.architecture(), self.recipe, self.augment)
