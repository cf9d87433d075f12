"""The embedded CLIP of captioned digits: the networks of ``clip_digits`` and ``fd_clip_digits``, and their training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.scenes import CANVAS_SIZE, captions, scene_indices
from tmpq_exp.zoo.embedded import embedded_file
from tmpq_exp.zoo.task import TrainableModel
from tmpq_exp.zoo.text import text_encoder, tokenize
from tmpq_exp.zoo.training import Recipe, TrainingModule
from tmpq_exp.zoo.weights import load_weights

EMBEDDING_SIZE = 64

MAX_LOGIT_SCALE = 100.0
"""Largest factor on cosines in the loss, as in CLIP."""


class ContrastiveNetwork(nn.Module):
    """Image and text encoder into one space.

    Args:
        image_width, image_layers: Vision transformer on patches of 4x4 pixels.
        text_width, text_layers: See ``text_encoder``.
    """

    num_features = EMBEDDING_SIZE

    def __init__(self, image_width: int, image_layers: int, text_width: int, text_layers: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel  # here, because the import takes seconds

        config = CLIPVisionConfig(
            hidden_size=image_width,
            intermediate_size=4 * image_width,
            num_hidden_layers=image_layers,
            num_attention_heads=image_width // 32,
            num_channels=1,
            image_size=CANVAS_SIZE,
            patch_size=4,
        )
        vision: Any = CLIPVisionModel(config)
        self.image_encoder: nn.Module = getattr(vision, "vision_model", vision)  # a shell before transformers 5
        self.text_encoder = text_encoder(text_width, text_layers)
        self.image_projection = nn.Linear(image_width, EMBEDDING_SIZE, bias=False)
        self.text_projection = nn.Linear(text_width, EMBEDDING_SIZE, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings before they are normalised, ``(N, 64)``, of images in [0, 1]."""
        features: Tensor = self.image_projection(self.image_encoder(pixel_values=images * 2 - 1).pooler_output)
        return features

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors, ``(N, 64)``, of images in [0, 1]."""
        return F.normalize(self.features(images), dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Unit vectors, ``(N, 64)``, of tokens ``(N, NUM_TOKENS)``."""
        return F.normalize(self.text_projection(self.text_encoder(input_ids=tokens).pooler_output), dim=1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosine of every image with every text, ``(images, texts)``."""
        scale = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        return scale * self.embed_images(images) @ self.embed_texts(tokens).T


class ContrastiveTraining(TrainingModule):
    """Images and captions of a batch told apart, both ways; captions of the same scene count as the same.

    Args:
        network: The encoders.
        recipe: See ``TrainingModule``.

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, figure 3;
        with several positives as in Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022,
        equation (3).
    """

    def __init__(self, network: ContrastiveNetwork, recipe: Recipe) -> None:
        super().__init__(network, recipe)
        self.register_buffer("tokens", tokenize(captions()), persistent=False)
        self.register_buffer("scenes", scene_indices(), persistent=False)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean of both directions' cross entropies; labels are numbers of captions."""
        logits = self.network(images, self.get_buffer("tokens")[labels]).float()
        scenes = self.get_buffer("scenes")[labels]
        same = (scenes.unsqueeze(1) == scenes).to(logits.dtype)
        targets = same / same.sum(1, keepdim=True)  # symmetric: all rows of one scene are alike
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def retrieval_percent(network: ContrastiveNetwork, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Percentage of images whose nearest caption, among all there are, tells their scene; NaN without images.

    Args:
        network: The encoders.
        batches: Images in [0, 1] and numbers of captions.
    """
    device = next(network.parameters()).device
    texts, scenes = network.embed_texts(tokenize(captions()).to(device)), scene_indices()
    hits = [
        scenes[(network.embed_images(images.to(device)) @ texts.T).argmax(1).cpu()] == scenes[labels]
        for images, labels in batches
    ]
    return float(torch.cat(hits).float().mean() * 100) if hits else float("nan")


class DigitsCLIP(TrainableModel):
    """CLIP on captioned scenes of digits at 24x24: vision transformer of four layers, text encoder of two.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.
    """

    name = "clip_digits"
    image_shape = (1, CANVAS_SIZE, CANVAS_SIZE)
    weights_dtype = "float16"

    def __init__(self, checkpoint: str | None = None, recipe: Recipe | None = None) -> None:
        self.checkpoint = Path(checkpoint) if checkpoint else embedded_file(self.name, "model.safetensors")
        self.recipe = recipe

    def architecture(self) -> ContrastiveNetwork:
        """0.9 M parameters."""
        return ContrastiveNetwork(image_width=128, image_layers=4, text_width=64, text_layers=2)

    def load(self) -> ContrastiveNetwork:
        """See ``TrainableModel.load``."""
        network = self.architecture()
        load_weights(network, self.checkpoint, self.name)
        return network.eval().requires_grad_(False)

    def training_module(self) -> ContrastiveTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return ContrastiveTraining(self.architecture(), self.recipe)
