"""What the tasks know of a model: to price it, to train it, to make images with it, or to tell images apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tmpq_exp.cost import LayerShape
from tmpq_exp.diffusion.sampler import Sampler, initial_noise, sample
from tmpq_exp.diffusion.schedule import TimestepSpacing
from tmpq_exp.trace import trace_layers
from tmpq_exp.zoo.conditioning import Conditioning, Unconditional
from tmpq_exp.zoo.decoding import Decoder, Pixels
from tmpq_exp.zoo.weights import content_hash

if TYPE_CHECKING:
    from tmpq_exp.zoo.training import TrainingModule  # Lightning takes seconds to import, and costs need none

OnCall = Callable[[Tensor, int, dict[str, Tensor]], None]
"""Sees ``(x, timestep, conditioning)`` of a network call: all images of the call at the network's own timestep."""


@dataclass(frozen=True)
class DiffusionTask:
    """A float diffusion model ready to sample.

    With guidance every step makes one call with twice the images: first those without condition, then those with it;
    its prediction is ``without + scale * (with - without)``.

    Args:
        name: Name of the model.
        unet: Network in eval mode, called as ``unet(x, timestep, **conditioning)``; it returns an object with the
            prediction in ``.sample``, as diffusers U-Nets do.
        sample_shape: ``(C, H, W)`` of one state.
        sampler: Schedule, what the network predicts, and the steps.
        conditions: What the network is told about each image.
        guidance_scale: Scale of classifier-free guidance; 1 is without, and then there is no call without condition.
        decoder: Turns clean states into images.
        spacing: How kept timesteps are laid where none are searched.
        origin: The option of the model group that made it; a recipe asks it how to make the task again.

    References:
        Ho, Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, equation 6, with the scale counted from 1
        as in Saharia et al., "Imagen", and diffusers.
    """

    name: str
    unet: nn.Module
    sample_shape: tuple[int, int, int]
    sampler: Sampler
    conditions: Conditioning = field(default_factory=Unconditional)
    guidance_scale: float = 1.0
    decoder: Decoder = field(default_factory=Pixels)
    spacing: TimestepSpacing = TimestepSpacing.QUADRATIC
    origin: DiffusionModel | None = None

    @cached_property
    def weights_hash(self) -> str:
        """Content hash of the network's weights."""
        return content_hash(self.unet.state_dict())

    @property
    def num_train_timesteps(self) -> int:
        """Length of the training schedule."""
        return self.sampler.num_train_timesteps

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return self.decoder.image_shape(self.sample_shape)

    @property
    def calls_per_step(self) -> int:
        """Images that pass through the network at every step for one: 2 with guidance."""
        return 1 if self.guidance_scale == 1 else 2

    @cached_property
    def state_fingerprint(self) -> dict[str, Any]:
        """What states depend on besides kept timesteps and seed, as plain data."""
        return {
            "weights": self.weights_hash,
            "schedule": content_hash({"schedule": self.sampler.schedule}),
            "sampler": self.sampler.description,
            "shape": list(self.sample_shape),
            "conditions": self.conditions.fingerprint(),
            "guidance_scale": float(self.guidance_scale),
        }

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What images depend on besides kept timesteps and seed, as plain data."""
        return self.state_fingerprint | {"decoder": self.decoder.fingerprint()}

    def conditioning(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """Keyword arguments of the U-Net for these images, without guidance; on the CPU."""
        return self.conditions.inputs(image_indices)

    def probe(self, unet: nn.Module) -> Any:
        """One call of a network like ``unet`` with one image of zeros, to look at its layers."""
        return probe(unet, self.sample_shape, self.conditioning([0]))

    def sample(
        self,
        unet: nn.Module,
        image_indices: Sequence[int],
        timesteps: Sequence[int],
        seed: int,
        *,
        activate: Callable[[int], AbstractContextManager[None]] | None = None,
        on_call: OnCall | None = None,
    ) -> Tensor:
        """Images of the stream ``seed``, made by ``unet`` over the kept timesteps, as one micro-batch.

        Args:
            unet, image_indices, timesteps, seed, activate, on_call: See ``latents``.

        Returns:
            Float images in [0, 1], ``(N, C, H, W)``; NaN where the image was not finite.
        """
        return self.decode(self.latents(unet, image_indices, timesteps, seed, activate=activate, on_call=on_call))

    def latents(
        self,
        unet: nn.Module,
        image_indices: Sequence[int],
        timesteps: Sequence[int],
        seed: int,
        *,
        activate: Callable[[int], AbstractContextManager[None]] | None = None,
        on_call: OnCall | None = None,
    ) -> Tensor:
        """Clean states of the stream ``seed`` before they are decoded; for pixel models the images in [-1, 1].

        Args:
            unet: The float network or a quantized stand-in; its device is where sampling runs.
            image_indices: Which images.
            timesteps: Kept timesteps, strictly descending.
            seed: Seed of the image stream.
            activate: ``step_index -> context manager`` in which that step's prediction runs; a supernet switches
                its subnet here.
            on_call: Sees what the network is called with, before each call.

        Returns:
            ``(N, C, H, W)``.
        """
        device = next(unet.parameters()).device
        noise = initial_noise(self.sample_shape, image_indices, seed).to(device)
        self.conditions.follow(device)
        inputs = self.with_null(self.conditioning(image_indices), len(image_indices))
        conditioning = {key: value.to(device) for key, value in inputs.items()}

        def predict(x: Tensor, timestep: int, step_index: int) -> Tensor:
            seen = x if self.calls_per_step == 1 else torch.cat([x, x])
            if on_call is not None:
                on_call(seen, timestep, conditioning)
            with nullcontext() if activate is None else activate(step_index):
                called: Any = unet(seen, torch.full((len(seen),), timestep, device=device), **conditioning)
            return self.guided(called.sample)

        return sample(self.sampler, predict, noise.contiguous(memory_format=torch.channels_last), timesteps)

    def guided(self, prediction: Tensor) -> Tensor:
        """Prediction of one call -> prediction that is followed, ``(N, C, H, W)``; the same without guidance."""
        if self.calls_per_step == 1:
            return prediction
        without, with_condition = prediction.chunk(2)
        return without + self.guidance_scale * (with_condition - without)

    def decode(self, x0: Tensor) -> Tensor:
        """Clean states -> images in [0, 1]; NaN where the image was not finite."""
        images = self.decoder(x0)
        return (images / 2 + 0.5).clamp(0, 1).masked_fill_(~images.isfinite(), float("nan"))

    def with_null(self, inputs: dict[str, Tensor], num_images: int) -> dict[str, Tensor]:
        """Keyword arguments of one call of the U-Net for these images: with guidance, those without condition first."""
        if self.calls_per_step == 1:
            return inputs
        null = self.conditions.null_inputs(num_images)
        return {key: torch.cat([null[key], value]) for key, value in inputs.items()}


def probe(unet: nn.Module, sample_shape: Sequence[int], conditioning: Mapping[str, Tensor]) -> Any:
    """One call of a noise predictor with one image of zeros.

    Args:
        unet: Called as ``unet(x, timestep, **conditioning)``; it may lie on the meta device.
        sample_shape: ``(C, H, W)`` of one state.
        conditioning: Of one image, on any device.
    """
    device = next(unet.parameters()).device
    inputs = {key: value.to(device) for key, value in conditioning.items()}
    x = torch.zeros(1, *sample_shape, device=device)
    return unet(x, torch.zeros(1, dtype=torch.long, device=device), **inputs)


def unet_layers(
    unet: nn.Module, sample_shape: Sequence[int], conditioning: Mapping[str, Tensor]
) -> tuple[LayerShape, ...]:
    """Layers of a noise predictor in the order of every allocation, read off one ``probe``."""
    return trace_layers(unet, lambda network: probe(network, sample_shape, conditioning))


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
