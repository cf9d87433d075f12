"""Captioned scenes: captions say what is drawn and where, and prompts are balanced."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tmpq_exp.data import LabelledImages, uci_digits
from tmpq_exp.scenes import (
    CANVAS_SIZE,
    COLUMN,
    LARGE,
    PAIRS,
    ROW,
    SINGLES,
    CaptionedDigits,
    Scene,
    caption,
    captioned_scenes,
    captions,
    prompts,
    render,
    scene_indices,
)
from tmpq_exp.zoo.digits import DigitsClassifier


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return LabelledImages(*uci_digits())


def test_captions_are_distinct_and_name_their_scene() -> None:
    scenes = captioned_scenes()
    assert len(scenes) == 10 * len(SINGLES) + 100 * len(PAIRS)
    assert scenes["the number 47"] == scenes["a four and a seven"] == scenes["4 left of 7"] == Scene((4, 7), ROW)
    assert scenes["7 below 4"] == scenes["4 above 7"] == Scene((4, 7), COLUMN)
    assert len(set(scenes.values())) == scene_indices().max() + 1
    numbers = dict(zip(captions(), scene_indices().tolist(), strict=True))
    assert numbers["7 below 4"] == numbers["4 above 7"] != numbers["7 above 4"]


def test_articles() -> None:
    assert caption("{a_word} and {a_other_word}", 8, 1) == "an eight and a one"


def test_few_neighbouring_prompts_are_balanced() -> None:
    scenes = [captioned_scenes()[text] for text in prompts()]
    assert len(set(prompts())) == len(prompts()) == 110
    for first in range(len(scenes)):
        neighbours = [scenes[(first + offset) % len(scenes)] for offset in range(11)]
        assert {scene.digits[0] for scene in neighbours[:10]} == set(range(10))
        assert sum(len(scene.digits) == 2 for scene in neighbours) == 7
        assert sum(scene.places == (LARGE,) for scene in neighbours) == 1


def test_a_digit_stands_where_its_caption_says(digits: LabelledImages) -> None:
    scenes = [scene for scene in captioned_scenes().values() if len(scene.digits) == 1]
    images = render(scenes, digits, torch.Generator().manual_seed(0)).double()[:, 0]
    assert images.shape == (len(scenes), CANVAS_SIZE, CANVAS_SIZE)
    pixels = torch.arange(CANVAS_SIZE) + 0.5
    light = images.sum((1, 2))
    found = torch.stack([(images.sum(1) @ pixels.double()), (images.sum(2) @ pixels.double())], 1) / light.unsqueeze(1)
    said = torch.tensor([(scene.places[0].x, scene.places[0].y) for scene in scenes])
    assert (found - said).abs().max() < 3.5


def test_pairs_are_drawn_in_their_order(digits: LabelledImages) -> None:
    blank = LabelledImages(digits.pixels.clone(), digits.labels)
    blank.pixels[digits.labels == 7] = 0  # sevens are invisible
    images = render([Scene((4, 7), ROW)] * 20 + [Scene((4, 7), COLUMN)] * 20, blank, torch.Generator().manual_seed(0))
    half = CANVAS_SIZE // 2
    row, column = images[:20].float(), images[20:].float()
    assert row[..., :half].sum() > 20 * row[..., half:].sum()
    assert column[:, :, :half].sum() > 20 * column[:, :, half:].sum()


def test_the_digit_that_is_said_is_drawn(digits: LabelledImages) -> None:
    scenes = [scene for scene in captioned_scenes().values() if scene.places == (SINGLES["a large {word}"],)] * 20
    images = render(scenes, digits, torch.Generator().manual_seed(0)).float() / 255
    resized = F.interpolate(images[:, :, 1:-1, 1:-1], size=16, mode="bilinear", antialias=True)
    said = torch.tensor([scene.digits[0] for scene in scenes])
    assert (DigitsClassifier().load()(resized).argmax(1) == said).float().mean() > 0.9


def test_data_repeats_under_a_seed_and_holds_its_shares() -> None:
    data, again, other = (CaptionedDigits(64, 3000, 0.1, reference_images=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(data.train_set.pixels, again.train_set.pixels)
    assert not torch.equal(data.train_set.pixels, other.train_set.pixels)
    scenes = [captioned_scenes()[captions()[label]] for label in data.train_set.labels]
    assert sum(len(scene.digits) == 2 for scene in scenes) / 3000 == pytest.approx(0.6, abs=0.05)
    assert (len(data.train_set.labels), len(data.holdout_set.labels)) == (3000, 300)
    assert [captions()[label] for label in data.reference_set.labels] == [*prompts(), *prompts()]


def test_settings_out_of_range_are_named() -> None:
    for name in ("num_images", "reference_images"):
        with pytest.raises(ValueError, match=rf"data\.{name} must be at least 1, found 0"):
            CaptionedDigits(1, **{name: 0})
    with pytest.raises(ValueError, match=r"data\.holdout_fraction must be in \[0, 1\), found 1"):
        CaptionedDigits(1, holdout_fraction=1)
