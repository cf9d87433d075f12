"""The picture files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.example import BUDGET, make_trials, trial
from tmpq_exp.report import pareto_png, samples_png


def test_pareto_png_is_drawn_also_without_a_feasible_candidate(tmp_path: Path) -> None:
    over = [trial(1, 3.0, 9e10), trial(2, 300.0, 8e10)]
    for name, trials in {"full": make_trials(), "none": [], "over": over}.items():
        path = tmp_path / f"{name}.png"
        pareto_png(path, trials, metric="fd_digits", budget_bitops=BUDGET, budget_name="w6a6")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000


def test_samples_png_enlarges_without_smoothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (2, 3, 8, 8)).astype(np.float64) / 255
    samples_png(tmp_path / "samples.png", [("Float", values), ("Best", 1 - values)])
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    expected = np.rint(values[0] * 255).astype(np.uint8).transpose(1, 2, 0).repeat(9, 0).repeat(9, 1)
    left = next(x for x in range(pixels.shape[1]) if np.array_equal(pixels[18:90, x : x + 72], expected))
    assert left > 40


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one pair"),
        ([("a", np.zeros((2, 4, 8, 8)))], r"C 1 or 3, found \(2, 4, 8, 8\)"),
        ([("a", np.full((1, 1, 2, 2), -1.0))], r"must lie in \[0, 1\], found -1 to -1"),
        ([("a", np.zeros((2, 1, 4, 4))), ("b", np.zeros((3, 1, 4, 4)))], "all rows must have as many images"),
    ],
)
def test_wrong_images_are_named(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        samples_png(tmp_path / "samples.png", rows)
