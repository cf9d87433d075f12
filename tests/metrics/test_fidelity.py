"""PSNR by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tmpq_exp.metrics.fidelity import mean_psnr_db


def test_mean_of_the_images_psnr() -> None:
    reference = torch.full((2, 1, 4, 4), 0.5)
    images = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)  # 20 and 40 dB
    assert mean_psnr_db(images, reference) == pytest.approx(30, abs=1e-3)
    assert mean_psnr_db(reference, reference) == math.inf


def test_one_shape() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        mean_psnr_db(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))
