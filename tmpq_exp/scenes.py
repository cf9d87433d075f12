"""Captioned scenes of handwritten digits: what a caption says, the image that shows it, and the data set of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tmpq_exp.data import ImageData, LabelledImages, held_out, to_uint8, uci_digits
from tmpq_exp.seeding import stream

CANVAS_SIZE = 24
"""Side of a scene in pixels."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PAIR_SHARE = 0.6
"""Share of training scenes that hold two digits."""

RENDER_BATCH = 4096
"""Scenes drawn at once."""


@dataclass(frozen=True)
class Place:
    """Where a digit stands on the canvas: its centre and its side, in pixels."""

    x: float
    y: float
    side: float


CENTRE, LARGE, SMALL = Place(12, 12, 17), Place(12, 12, 22), Place(12, 12, 11)
CORNERS = {
    "top left": Place(6, 6, 11),
    "top right": Place(18, 6, 11),
    "bottom left": Place(6, 18, 11),
    "bottom right": Place(18, 18, 11),
}
ROW = (Place(6.25, 12, 12), Place(17.75, 12, 12))
COLUMN = (Place(12, 6, 11), Place(12, 18, 11))


@dataclass(frozen=True)
class Scene:
    """Digits 0 to 9 and the place of each."""

    digits: tuple[int, ...]
    places: tuple[Place, ...]


SINGLES = {
    "a handwritten {word}": CENTRE,
    "the digit {digit}": CENTRE,
    "{a_word}": CENTRE,
    "one digit: {digit}": CENTRE,
    "a large {word}": LARGE,
    "the large digit {digit}": LARGE,
    "a small {word}": SMALL,
    "the small digit {digit}": SMALL,
    **{f"a small {{word}} at the {corner}": place for corner, place in CORNERS.items()},
}
"""Captions of one digit, and where it stands."""

PROMPTED_SINGLES = ("a handwritten {word}", "the digit {digit}", "a large {word}")
"""Those of them that models are judged on, beside small digits in the corners."""

PAIRS = {
    "two digits: {digit} and {other}": ROW,
    "{digit} above {other}": COLUMN,
    "{a_word} and {a_other_word}": ROW,
    "{a_word} above {a_other_word}": COLUMN,
    "the number {digit}{other}": ROW,
    "{digit} left of {other}": ROW,
    "{other} below {digit}": COLUMN,
}
"""Captions of two digits, and where the first and the other stand."""


def caption(template: str, digit: int, other: int = 0) -> str:
    """A template of ``SINGLES`` or ``PAIRS`` filled in."""
    word, other_word = DIGIT_WORDS[digit], DIGIT_WORDS[other]
    return template.format(
        digit=digit, other=other, word=word, a_word=_with_article(word), a_other_word=_with_article(other_word)
    )


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" and word != "one" else f"a {word}"


@cache
def captioned_scenes() -> dict[str, Scene]:
    """Every caption with its scene, 820 of them in a fixed order; several captions say the same scene."""
    singles = {
        caption(template, digit): Scene((digit,), (place,))
        for template, place in SINGLES.items()
        for digit in range(10)
    }
    pairs = {
        caption(template, digit, other): Scene((digit, other), places)
        for template, places in PAIRS.items()
        for digit in range(10)
        for other in range(10)
    }
    return singles | pairs


@cache
def captions() -> tuple[str, ...]:
    """All captions; a data set's labels count them."""
    return tuple(captioned_scenes())


def scene_indices() -> Tensor:
    """The number of each caption's scene, ``(820,)``: captions of the same scene have the same number."""
    numbers: dict[Scene, int] = {}
    return torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in captioned_scenes().values()])


@cache
def prompts() -> tuple[str, ...]:
    """The 110 captions that models are judged on: ten digits in each of eleven ways, seven of them pairs.

    Digits and ways alternate together, so that few images are balanced too: any ten neighbours hold every digit, any
    eleven every way.
    """
    corners = list(CORNERS)
    ways = [
        *([caption(template, d, (3 * d + r) % 10) for d in range(10)] for r, template in enumerate(PAIRS)),
        *([caption(template, d) for d in range(10)] for template in PROMPTED_SINGLES),
        [caption(f"a small {{word}} at the {corners[d % len(corners)]}", d) for d in range(10)],
    ]
    return tuple(ways[index % len(ways)][index % 10] for index in range(10 * len(ways)))


def render(scenes: Sequence[Scene], digits: LabelledImages, generator: torch.Generator) -> Tensor:
    """Draw scenes with random digits, each turned, sheared, scaled and shifted a little.

    Args:
        scenes: What to draw.
        digits: Handwritten digits ``(n, 1, s, s)``, light on black, labelled 0 to 9, each at least once.
        generator: Chooses the digits and how they are changed.

    Returns:
        uint8 ``(len(scenes), 1, 24, 24)``.
    """
    order = digits.labels.argsort(stable=True)
    counts = digits.labels.bincount(minlength=10)
    first = counts.cumsum(0) - counts
    canvas = torch.zeros(len(scenes), 1, CANVAS_SIZE, CANVAS_SIZE)
    for slot in range(max(len(scene.digits) for scene in scenes)):
        rows = [index for index, scene in enumerate(scenes) if len(scene.digits) > slot]
        wanted = torch.tensor([scenes[index].digits[slot] for index in rows])
        drawn = (torch.rand(len(rows), generator=generator) * counts[wanted]).long()
        sources = digits.pixels[order[first[wanted] + drawn]].float() / 255
        places = torch.tensor([[p.x, p.y, p.side] for p in (scenes[index].places[slot] for index in rows)])
        grid = F.affine_grid(_random_maps(places, generator), [len(rows), *canvas.shape[1:]], align_corners=False)
        canvas[rows] = torch.maximum(canvas[rows], F.grid_sample(sources, grid, align_corners=False))
    return to_uint8(canvas)


def _random_maps(places: Tensor, generator: torch.Generator) -> Tensor:
    """Affine maps from canvas to digit, ``(n, 2, 3)``, in coordinates from -1 to 1.

    Turned by up to 8 degrees, sheared by up to 0.1, scaled by up to 8 % and shifted by up to a pixel.
    """
    angle, shear, scale, dx, dy = 2 * torch.rand(5, len(places), generator=generator) - 1
    angle, shear, side = 0.14 * angle, 0.1 * shear, places[:, 2] * (1 + 0.08 * scale)
    linear = torch.stack(
        [torch.stack([angle.cos(), shear - angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1
    )
    linear = linear * (CANVAS_SIZE / side).view(-1, 1, 1)
    centre = 2 * (places[:, :2] + torch.stack([dx, dy], 1)) / CANVAS_SIZE - 1
    return torch.cat([linear, -linear @ centre.unsqueeze(2)], 2)


class CaptionedDigits(ImageData):
    """Scenes of UCI digits with captions, drawn when the data set is made; a label is the number of a caption.

    The reference is drawn with all digits, for the prompts that models are judged on.

    Args:
        batch_size, seed: See ``ImageData``; the seed also draws the scenes.
        num_images: Training scenes, at least 1.
        holdout_fraction: Share of the digits that no training scene holds, in [0, 1), and share of ``num_images`` that
            is drawn with them for validation.
        reference_images: Reference scenes a prompt, at least 1.
    """

    description = (
        f"scenes of one or two digits at {CANVAS_SIZE}x{CANVAS_SIZE} with captions, drawn with the UCI digits as "
        "shipped by scikit-learn (CC BY 4.0)"
    )

    def __init__(
        self,
        batch_size: int,
        num_images: int = 120000,
        holdout_fraction: float = 0.0,
        reference_images: int = 100,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_images", num_images), ("reference_images", reference_images)):
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, found {value}")
        digits = LabelledImages(*uci_digits())
        held = held_out(len(digits.labels), holdout_fraction)
        train, holdout = (LabelledImages(digits.pixels[mask], digits.labels[mask]) for mask in (~held, held))
        super().__init__(
            batch_size,
            seed,
            _drawn(_random_labels(num_images, seed, "train"), train, seed, "train"),
            _drawn(_random_labels(round(num_images * holdout_fraction), seed, "holdout"), holdout, seed, "holdout"),
            _drawn(_prompt_labels(reference_images), digits, seed, "reference"),
        )


def _random_labels(count: int, seed: int, name: str) -> Tensor:
    """Captions of random scenes: one in ``PAIR_SHARE`` of them of two digits, all of a kind equally often."""
    pairs = torch.tensor([len(scene.digits) == 2 for scene in captioned_scenes().values()])
    weights = torch.where(pairs, PAIR_SHARE / pairs.sum(), (1 - PAIR_SHARE) / (~pairs).sum())
    if not count:
        return torch.zeros(0, dtype=torch.long)
    return torch.multinomial(weights, count, replacement=True, generator=stream(seed, "captions", name))


def _prompt_labels(images_a_prompt: int) -> Tensor:
    """Every prompt equally often."""
    number = {text: index for index, text in enumerate(captions())}
    return torch.tensor([number[text] for text in prompts()]).repeat(images_a_prompt)


def _drawn(labels: Tensor, digits: LabelledImages, seed: int, name: str) -> LabelledImages:
    """Scenes of these captions."""
    generator, scenes = stream(seed, "scenes", name), list(captioned_scenes().values())
    pixels = torch.zeros(len(labels), 1, CANVAS_SIZE, CANVAS_SIZE, dtype=torch.uint8)
    for first in range(0, len(labels), RENDER_BATCH):
        part = slice(first, first + RENDER_BATCH)
        pixels[part] = render([scenes[label] for label in labels[part]], digits, generator)
    return LabelledImages(pixels, labels)
