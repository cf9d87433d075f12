"""What the tasks know of a model: to price it, to train it, to make images with it, or to tell images apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tmpq_exp.cost import LayerShape
from tmpq_exp.diffusion.sampler import ddim_sample, initial_noise
from tmpq_exp.trace import trace_layers
from tmpq_exp.zoo.weights import content_hash

if TYPE_CHECKING:
    from tmpq_exp.zoo.training import TrainingModule  # Lightning takes seconds to import, and costs need none


@dataclass(frozen=True)
class DiffusionTask:
    """A float diffusion model ready to sample.

    Args:
        name: Name of the model.
        unet: Noise predictor in eval mode, called as ``unet(x, timestep, **conditioning)``; it returns an object
            with the prediction in ``.sample``, as diffusers U-Nets do.
        sample_shape: ``(C, H, W)`` of one state.
        alphas_cumprod: ``(num_train_timesteps,)``, float64.
        num_classes: Number of class labels; image i is of class ``i % num_classes``. None: unconditional.
        clip_sample: Whether the sampler clips x_0 to [-1, 1].
    """

    name: str
    unet: nn.Module
    sample_shape: tuple[int, int, int]
    alphas_cumprod: Tensor
    num_classes: int | None
    clip_sample: bool

    @cached_property
    def weights_hash(self) -> str:
        """Content hash of the network's weights."""
        return content_hash(self.unet.state_dict())

    @property
    def num_train_timesteps(self) -> int:
        """Length of the training schedule."""
        return len(self.alphas_cumprod)

    def conditioning(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """Keyword arguments of the U-Net for these images."""
        if self.num_classes is None:
            return {}
        return {"class_labels": torch.tensor([int(i) % self.num_classes for i in image_indices])}

    def probe(self, unet: nn.Module) -> Any:
        """One call of a network like ``unet`` with one image of zeros, to look at its layers."""
        device = next(unet.parameters()).device
        conditioning = {key: value.to(device) for key, value in self.conditioning([0]).items()}
        x = torch.zeros(1, *self.sample_shape, device=device)
        return unet(x, torch.zeros(1, dtype=torch.long, device=device), **conditioning)

    def sample(
        self,
        unet: nn.Module,
        image_indices: Sequence[int],
        timesteps: Sequence[int],
        seed: int,
        *,
        activate: Callable[[int], AbstractContextManager[None]] | None = None,
        on_state: Callable[[Tensor, int], None] | None = None,
    ) -> Tensor:
        """Images of the stream ``seed``, made by ``unet`` over the kept timesteps, as one micro-batch.

        Args:
            unet: The float network or a quantized stand-in; its device is where sampling runs.
            image_indices: Which images.
            timesteps: Kept timesteps, strictly descending.
            seed: Seed of the image stream.
            activate: ``step_index -> context manager`` in which that step's prediction runs; a supernet switches
                its subnet here.
            on_state: See ``ddim_sample``.

        Returns:
            Float images in [0, 1], ``(N, C, H, W)``; NaN where the state was not finite.
        """
        device = next(unet.parameters()).device
        noise = initial_noise(self.sample_shape, image_indices, seed).to(device)
        conditioning = {key: value.to(device) for key, value in self.conditioning(image_indices).items()}

        def predict_noise(x: Tensor, timestep: int, step_index: int) -> Tensor:
            with nullcontext() if activate is None else activate(step_index):
                prediction: Any = unet(x, torch.full((len(x),), timestep, device=device), **conditioning)
            return prediction.sample  # type: ignore[no-any-return]

        x0 = ddim_sample(
            predict_noise,
            noise.contiguous(memory_format=torch.channels_last),
            timesteps,
            self.alphas_cumprod,
            clip_sample=self.clip_sample,
            on_state=on_state,
        )
        return (x0 / 2 + 0.5).clamp(0, 1).masked_fill_(~x0.isfinite(), float("nan"))


def unet_layers(
    unet: nn.Module, sample_shape: Sequence[int], conditioning: Mapping[str, Tensor]
) -> tuple[LayerShape, ...]:
    """Layers of a noise predictor in the order of every allocation, read off one call for one image.

    Args:
        unet: Called as ``unet(x, timestep, **conditioning)``; it may lie on the meta device.
        sample_shape: ``(C, H, W)`` of one state.
        conditioning: Of one image, on any device.
    """
    device = next(unet.parameters()).device

    def run_forward(network: nn.Module) -> Any:
        inputs = {key: value.to(device) for key, value in conditioning.items()}
        x = torch.zeros(1, *sample_shape, device=device)
        return network(x, torch.zeros(1, dtype=torch.long, device=device), **inputs)

    return trace_layers(unet, run_forward)


def task_layers(task: DiffusionTask) -> tuple[LayerShape, ...]:
    """``unet_layers`` of a task."""
    return unet_layers(task.unet, task.sample_shape, task.conditioning([0]))


class CostedModel(ABC):
    """An option of the model group that ``task=cost`` can price: its layers are known without weights.

    Class attributes:
        name: Name of the model, as in ``model=...``.
        guided: Whether sampling calls the network twice a step, with and without condition.
    """

    name: str
    guided: bool = False

    @abstractmethod
    def layers(self) -> tuple[LayerShape, ...]:
        """Layers of one U-Net call for one image, read off without a checkpoint and without memory for weights."""

    def diffusers_layers(self) -> tuple[LayerShape, ...] | None:
        """The same of the equivalent in diffusers, where the network is defined otherwise here; else None."""
        return None


class TrainableModel(ABC):
    """An option of the model group that ``task=train`` can train: how its network is built, trained and loaded.

    Class attributes:
        name: Name of the model, as in ``model=...``.
        image_shape: ``(C, H, W)`` of the images it is trained on.
        weights_dtype: Type that trained weights are rounded to and kept in, ``float32`` or ``float16``.
    """

    name: str
    image_shape: tuple[int, int, int]
    weights_dtype = "float32"

    @abstractmethod
    def architecture(self) -> nn.Module:
        """The network with fresh weights (without memory under ``torch.device("meta")``)."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The network with its trained weights, in eval mode.

        Raises:
            ValueError: If the checkpoint is missing, truncated or of another model.
        """

    @abstractmethod
    def training_module(self) -> TrainingModule:
        """Module that trains the network by this model's recipe; its ``trained_network()`` gives the result."""


class DiffusionModel(ABC):
    """An option of the model group that makes images: all that ``task=run`` needs."""

    @abstractmethod
    def task(self) -> DiffusionTask:
        """The float network with its weights, schedule and conditioning.

        Raises:
            ValueError: If the checkpoint is missing, truncated or of another model.
        """


class TrainableDiffusionModel(TrainableModel, DiffusionModel, CostedModel):
    """A model that can be trained here and makes images; ``task=cost`` builds its architecture on the meta device."""

    @property
    @abstractmethod
    def condition_names(self) -> tuple[str, ...]:
        """What each condition asks for; image i has condition ``i % len(condition_names)``."""

    @abstractmethod
    def wrap(self, network: nn.Module) -> DiffusionTask:
        """Task around a network of this architecture: its schedule, conditioning and images."""

    def layers(self) -> tuple[LayerShape, ...]:
        """See ``CostedModel.layers``."""
        with torch.device("meta"):
            network = self.architecture()
        return task_layers(self.wrap(network))

    def task(self) -> DiffusionTask:
        """The loaded network as a task."""
        return self.wrap(self.load())


@dataclass(frozen=True)
class ClassificationTask:
    """A float classifier ready to be evaluated.

    Args:
        name: Name of the model.
        network: In eval mode; maps normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``.
        num_classes: Number of classes.
    """

    name: str
    network: nn.Module
    num_classes: int

    @cached_property
    def weights_hash(self) -> str:
        """Content hash of the network's weights."""
        return content_hash(self.network.state_dict())

    def layers(self, image_shape: tuple[int, int, int]) -> tuple[LayerShape, ...]:
        """Layers in the order of every allocation, for images of this shape ``(C, H, W)``."""
        device = next(self.network.parameters()).device
        return trace_layers(self.network, lambda network: network(torch.zeros(1, *image_shape, device=device)))


class ClassificationModel(ABC):
    """An option of the model group that tells classes of images apart: all that ``task=classify`` needs.

    Class attributes:
        name: Name of the model, with its depth where it has one.
    """

    name: str

    @abstractmethod
    def task(self) -> ClassificationTask:
        """The float network with its weights.

        Raises:
            ValueError: If the checkpoint is missing, damaged or of another model.
        """
