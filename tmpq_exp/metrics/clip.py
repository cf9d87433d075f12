"""Agreement of images with their prompts, on any CLIP of a local folder and on the embedded one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor
from transformers.utils import logging

from tmpq_exp.data import to_uint8
from tmpq_exp.metrics.inception import rgb
from tmpq_exp.metrics.metric import Batch, MissingWeights, PerImageMetric
from tmpq_exp.zoo.clip import ContrastiveNetwork, DigitsCLIP
from tmpq_exp.zoo.text import VOCABULARY, tokenize
from tmpq_exp.zoo.weights import content_hash

CLIP_BATCH = 50
"""Images a forward, at most."""

_TENSOR_PROCESSOR: dict[str, Any] = {"use_fast": True} if version("transformers").startswith("4.") else {}
"""Choose the image processor that computes with torch where images are; transformers 4 takes PIL's otherwise."""


class ImageTextEncoder(ABC):
    """Maps images and prompts into one space."""

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` uint8 -> ``(N, d)``, on the images' device."""

    @abstractmethod
    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """``(len(prompts), d)``."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What features depend on besides images and prompts, as plain data."""


class PromptScore(PerImageMetric):
    """Mean over images of ``100 cos(image, prompt)`` in an encoder's space, in [-100, 100]; higher is better.

    Args:
        name: Named after the encoder and starting with ``clip``; ``clip_score`` is that of a CLIP from a local folder.
        encoder: Encoder in eval mode.
        image_shape: ``(C, H, W)`` of the images it takes; None takes any.

    References:
        Hessel et al., "CLIPScore", EMNLP 2021, scaled by 100 as in torchmetrics. Differs from both in that nothing
        below zero is cut off.
    """

    needs = frozenset({"prompts"})

    def __init__(self, name: str, encoder: ImageTextEncoder, image_shape: tuple[int, int, int] | None = None) -> None:
        self.name, self.encoder, self.image_shape = name, encoder, image_shape
        self._texts: dict[str, Tensor] = {}

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        assert batch.prompts is not None, "the task has no prompts"
        device = batch.images.device
        for prompt in dict.fromkeys(batch.prompts):
            if prompt not in self._texts:
                self._texts[prompt] = self.encoder.text_features([prompt], device)[0].cpu()
        texts = torch.stack([self._texts[prompt] for prompt in batch.prompts]).to(device)
        parts = torch.split(to_uint8(batch.images), CLIP_BATCH)
        images = torch.cat([self.encoder.image_features(part) for part in parts])
        return 100 * F.cosine_similarity(images.double(), texts.double())

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {"metric": self.name, **self.encoder.fingerprint()}


class LocalClip(ImageTextEncoder):
    """A CLIP saved by transformers; nothing is downloaded and nothing unpickled.

    Images are resized, cropped and scaled on their own device. A CPU rounds to bytes after each of the two passes of a
    resize, as PIL does; a GPU does both in floats: pixels of smooth images differ by one gray level at most, those of
    noise, whose overshoot the bytes cut off, by more.

    Args:
        folder: Holds ``config.json``, ``model.safetensors``, and the files of tokenizer and image processor.

    Raises:
        ValueError: If the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        try:
            _check_files(folder)
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            loaded: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self.model, loading = loaded
            lost = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
            if lost:
                raise ValueError(f"{len(lost)} weights are missing or of another size, first {lost[0]}")
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, **_TENSOR_PROCESSOR)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"metrics.clip_score.path: {folder} must hold a CLIP with tokenizer and image processor as "
                f"transformers saves them, weights in model.safetensors ({' '.join(str(error).split())[:200]})"
            ) from error
        self.folder = folder

    def image_features(self, images: Tensor) -> Tensor:
        """See ``ImageTextEncoder.image_features``."""
        pixels = self.processor.image_processor(list(rgb(images)), return_tensors="pt")["pixel_values"]
        return _features(self.model.to(images.device).get_image_features(pixels))

    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """See ``ImageTextEncoder.text_features``; prompts are cut to the length that the model knows."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        inputs = (tokens["input_ids"].to(device), tokens["attention_mask"].to(device))
        return _features(self.model.to(device).get_text_features(*inputs))

    @cached_property
    def _hashes(self) -> tuple[str, str]:
        settings = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".txt"))
        digest = hashlib.sha256()
        for path in settings:
            digest.update(f"{path.name};".encode() + hashlib.sha256(path.read_bytes()).digest())
        return content_hash(self.model.state_dict()), digest.hexdigest()[:16]

    def fingerprint(self) -> dict[str, Any]:
        """See ``ImageTextEncoder.fingerprint``."""
        weights, settings = self._hashes
        return {
            "extractor": weights,
            "resize": f"of the image processor on the images' device, {settings}",
            "library": f"transformers {version('transformers')}",
        }


def _check_files(folder: Path) -> None:
    """Refuse a folder without the files in whose place transformers would take defaults, without a word."""
    for choices in (
        [{"config.json"}],
        [{"tokenizer.json"}, {"vocab.json", "merges.txt"}],
        [{"processor_config.json"}, {"preprocessor_config.json"}],
    ):
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise ValueError(" or ".join(" and ".join(sorted(names)) for names in choices) + " is missing")


def _features(output: Any) -> Tensor:
    """Features as transformers 4 returns them, and as 5 does."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


class EmbeddedClip(ImageTextEncoder):
    """The embedded CLIP of captioned digits.

    Args:
        network: Its encoders, in eval mode.
    """

    def __init__(self, network: ContrastiveNetwork) -> None:
        self.network = network

    def image_features(self, images: Tensor) -> Tensor:
        """See ``ImageTextEncoder.image_features``."""
        return self.network.to(images.device).embed_images(images.float() / 255)

    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """See ``ImageTextEncoder.text_features``.

        Raises:
            ValueError: If a prompt holds words that the embedded CLIP does not know.
        """
        return self.network.to(device).embed_texts(tokenize(prompts).to(device))

    def fingerprint(self) -> dict[str, Any]:
        """See ``ImageTextEncoder.fingerprint``."""
        words = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()[:16]
        return {"extractor": content_hash(self.network.state_dict()), "vocabulary": words}


def clip_digits(checkpoint: str | None = None) -> PromptScore:
    """``clip_digits``: agreement with the prompt as the embedded CLIP of captioned digits sees it.

    Args:
        checkpoint: Other weights.
    """
    model = DigitsCLIP(checkpoint)
    return PromptScore("clip_digits", EmbeddedClip(model.load()), model.image_shape)


def clip_score(path: str | None = None) -> PromptScore:
    """``clip_score`` on the CLIP of a local folder.

    Args:
        path: The folder.

    Raises:
        MissingWeights: If there is no such folder.
        ValueError: If it holds no CLIP.
    """
    if path is None or not Path(path).is_dir():
        raise MissingWeights(
            f"clip_score: no folder of a CLIP at {path} (metrics.clip_score.path); give one as transformers saves it: "
            "config.json, model.safetensors, tokenizer and image processor, for instance a copy of "
            "openai/clip-vit-large-patch14"
        )
    return PromptScore("clip_score", LocalClip(Path(path)))
