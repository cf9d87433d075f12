"""The embedded CLIP: its loss counts captions of one scene as one, and it tells scenes of digits it never saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.scenes import CaptionedDigits, captions, scene_indices
from tmpq_exp.zoo.clip import ContrastiveTraining, DigitsCLIP, retrieval_percent
from tmpq_exp.zoo.text import tokenize
from tmpq_exp.zoo.training import Recipe


class Knows(nn.Module):
    """Stands in for the encoders; sees the number of the caption in the image and knows which scene it tells."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def embed_images(self, images: Tensor) -> Tensor:
        numbers = images.flatten().long()
        return nn.functional.one_hot(scene_indices()[numbers], int(scene_indices().max()) + 1).float()

    def embed_texts(self, tokens: Tensor) -> Tensor:
        known = {tuple(row): index for index, row in enumerate(tokenize(captions()).tolist())}
        return self.embed_images(torch.tensor([known[tuple(row)] for row in tokens.tolist()]))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.sharpness * self.embed_images(images) @ self.embed_texts(tokens).T


def training(network: Any) -> ContrastiveTraining:
    return ContrastiveTraining(network, Recipe(1, 1e-3))


def test_captions_of_one_scene_are_no_mistake() -> None:
    number = {text: index for index, text in enumerate(captions())}
    labels = torch.tensor([number[text] for text in ("4 above 7", "7 below 4", "the digit 3", "7 above 4")])
    images = labels.float().view(-1, 1, 1, 1)
    # two rows have two right answers each and cannot do better than ln 2, two have one
    assert training(Knows(50.0)).loss(images, labels).item() == pytest.approx(torch.tensor(2.0).log().item() / 2)
    assert training(Knows(0.0)).loss(images, labels).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_retrieval_counts_images_whose_scene_is_told() -> None:
    network: Any = Knows(1.0)
    shown, said = torch.tensor([0.0, 1, 2, 3]).view(-1, 1, 1, 1), torch.tensor([0, 1, 2, 4])
    assert retrieval_percent(network, [(shown, said)]) == 75
    assert torch.tensor(retrieval_percent(network, [])).isnan()


def test_training_needs_a_recipe() -> None:
    with pytest.raises(ValueError, match=r"model\.recipe is null"):
        DigitsCLIP().training_module()
    module = DigitsCLIP(recipe=Recipe(1, 1e-3)).training_module()
    assert sum(parameter.numel() for parameter in module.network.parameters()) < 1e6


def test_the_embedded_clip_tells_scenes_of_digits_it_never_saw() -> None:
    data = CaptionedDigits(1, num_images=2500, holdout_fraction=0.2, reference_images=1, seed=7)
    assert retrieval_percent(DigitsCLIP().load(), data.val_dataloader()) >= 90
