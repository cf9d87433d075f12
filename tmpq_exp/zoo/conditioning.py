"""What a network is told about each image besides state and timestep; made once per image, whatever the steps."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.zoo.weights import content_hash

NUM_CACHED_PROMPTS = 1024
"""Text embeddings kept in memory; those of Stable Diffusion take 0.24 MB each."""


class Conditioning(ABC):
    """Keyword arguments of a U-Net for images of a stream; image i gets the same in any batch."""

    def follow(self, device: torch.device) -> None:  # noqa: B027 - most have nothing to move
        """Do what there is to compute on this device from now on."""

    @abstractmethod
    def inputs(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """For these images, on the CPU; the first axis of every tensor is the image."""

    def null_inputs(self, num_images: int) -> dict[str, Tensor]:
        """For that many images without condition, as guidance needs them.

        Raises:
            ValueError: If the model knows no such condition.
        """
        raise ValueError(f"guidance needs a model with an empty condition, found {type(self).__name__} without one")

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the inputs depend on, as plain data."""


class Unconditional(Conditioning):
    """No condition."""

    def inputs(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """See ``Conditioning.inputs``."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Conditioning.fingerprint``."""
        return {"kind": "unconditional"}


class ClassLabels(Conditioning):
    """Class labels; image i is of class ``i % num_classes``.

    Args:
        num_classes: Number of classes, at least 1.
        null_label: Label of no class, for guidance; None if the model has none.
        embeddings: ``(labels, tokens, width)``: what each label becomes for a network that attends to it
            (``encoder_hidden_states``); None for one that takes the label itself (``class_labels``).
    """

    def __init__(self, num_classes: int, null_label: int | None = None, embeddings: Tensor | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, found {num_classes}")
        self.num_classes, self.null_label, self.embeddings = num_classes, null_label, embeddings

    def inputs(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """See ``Conditioning.inputs``."""
        return self.of([int(i) % self.num_classes for i in image_indices])

    def null_inputs(self, num_images: int) -> dict[str, Tensor]:
        """See ``Conditioning.null_inputs``."""
        if self.null_label is None:
            return super().null_inputs(num_images)
        return self.of([self.null_label] * num_images)

    def of(self, labels: Sequence[int]) -> dict[str, Tensor]:
        """For images of these labels."""
        if self.embeddings is None:
            return {"class_labels": torch.tensor(labels)}
        return {"encoder_hidden_states": self.embeddings[list(labels)]}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Conditioning.fingerprint``."""
        embeddings = {} if self.embeddings is None else {"embeddings": content_hash({"e": self.embeddings})}
        return {"kind": "classes", "num_classes": self.num_classes, "null_label": self.null_label, **embeddings}


class Prompts(Conditioning):
    """Text embeddings of a list of prompts; image i has prompt ``i % len(prompts)``.

    Every prompt is embedded alone, so that its embedding does not depend on the batch, and remembered.

    Args:
        prompts: At least one.
        embed: Prompt -> embedding ``(tokens, width)``, on any device; moved by its method ``to`` if it has one.
        encoder: What the embeddings depend on besides the prompt, for fingerprints: a hash of weights and tokenizer.
        negative_prompt: The prompt of no condition, for guidance.
    """

    def __init__(
        self, prompts: Sequence[str], embed: Callable[[str], Tensor], encoder: str, negative_prompt: str = ""
    ) -> None:
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, found none")
        self.prompts, self.negative_prompt = tuple(prompts), negative_prompt
        self.embed, self._encoder, self._device = embed, encoder, torch.device("cpu")

        def embedded(prompt: str) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():  # reconstruction differentiates through its users
                return embed(prompt).cpu()

        self._embedded = lru_cache(NUM_CACHED_PROMPTS)(embedded)

    def follow(self, device: torch.device) -> None:
        """See ``Conditioning.follow``; embeddings of another device are made anew, because they differ in last bits."""
        move: Callable[[torch.device], object] | None = getattr(self.embed, "to", None)
        if move is not None and device != self._device:
            move(device)
            self._device = device
            self._embedded.cache_clear()

    def inputs(self, image_indices: Sequence[int]) -> dict[str, Tensor]:
        """See ``Conditioning.inputs``."""
        return self.of(self.of_images(image_indices))

    def null_inputs(self, num_images: int) -> dict[str, Tensor]:
        """See ``Conditioning.null_inputs``."""
        return self.of([self.negative_prompt] * num_images)

    def of(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """For images of these prompts."""
        return {"encoder_hidden_states": torch.stack([self._embedded(prompt) for prompt in prompts])}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Conditioning.fingerprint``."""
        text = hashlib.sha256(json.dumps([self.prompts, self.negative_prompt]).encode()).hexdigest()[:16]
        return {"kind": "prompts", "num_prompts": len(self.prompts), "text": text, "encoder": self._encoder}

    def of_images(self, image_indices: Sequence[int]) -> tuple[str, ...]:
        """The prompts of these images."""
        return tuple(self.prompts[int(i) % len(self.prompts)] for i in image_indices)
