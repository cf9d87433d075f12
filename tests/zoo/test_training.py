"""Training recipes: settings in range, the learning rate they describe, and a loss that falls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tmpq_exp.diffusion.schedule import linear_alphas_cumprod
from tmpq_exp.zoo.digits import DigitsClassifier
from tmpq_exp.zoo.training import ClassifierTraining, DiffusionTraining, Recipe, TrainingModule, random_flip_and_shift


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.recipe\.{name} must be .* found {value}"):
        Recipe(**({"num_steps": 10, "learning_rate": 1e-3} | {name: value}))


@given(st.integers(1, 500), st.integers(0, 600))
def test_learning_rate_rises_then_falls_to_zero(num_steps: int, warmup_steps: int) -> None:
    recipe = Recipe(num_steps, 1.0, warmup_steps=warmup_steps)
    factors = [recipe.learning_rate_factor(step) for step in range(num_steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup_steps], factors[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup_steps <= num_steps:
        assert falling[0] == 1 or num_steps == warmup_steps
    if warmup_steps < num_steps:
        assert falling[-1] == pytest.approx(0, abs=1e-12)


def test_learning_rate_by_hand() -> None:
    recipe = Recipe(12, 1.0, warmup_steps=4)
    factors = [recipe.learning_rate_factor(step) for step in (0, 1, 3, 4, 8, 12)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 0.5, 0])


class Denoiser(nn.Module):
    """Smallest network that can tell noise from a constant image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.body(x))


def fit(module: TrainingModule, images: Tensor, labels: Tensor, tmp_path: Path) -> list[float]:
    losses: list[float] = []
    loss = module.loss

    def recorded(*batch: Tensor) -> Tensor:
        value = loss(*batch)
        losses.append(value.item())
        return value

    module.loss = recorded  # type: ignore[method-assign]
    trainer = L.Trainer(
        max_steps=module.recipe.num_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    trainer.fit(module, loader, loader if isinstance(module, ClassifierTraining) else None)
    return losses


def test_noise_prediction_lowers_its_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = DiffusionTraining(Denoiser(), Recipe(30, 0.1, warmup_steps=3), linear_alphas_cumprod(100, 1e-3, 0.2))
    losses = fit(module, torch.full((640, 1, 4, 4), 0.5), torch.zeros(640).long(), tmp_path)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_loss_of_the_true_noise_is_zero_and_that_of_silence_is_one() -> None:
    alphas_cumprod = linear_alphas_cumprod(100, 1e-3, 0.2)

    class KnowsTheImage(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> SimpleNamespace:
            alpha = alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
            x0 = class_labels.view(-1, 1, 1, 1) * 2.0 - 1  # labels 0 and 1 are black and white images
            return SimpleNamespace(sample=self.factor * (x - alpha.sqrt() * x0) / (1 - alpha).sqrt())

    torch.manual_seed(0)
    labels = torch.arange(512) % 2
    images = labels.view(-1, 1, 1, 1).expand(512, 1, 4, 4).float()
    for factor, expected in ((1.0, 0.0), (0.0, 1.0)):
        module = DiffusionTraining(KnowsTheImage(factor), Recipe(1, 1.0), alphas_cumprod)
        assert module.loss(images, labels).item() == pytest.approx(expected, abs=0.05 if expected else 1e-6)


def test_min_snr_weighs_noisy_timesteps_in_full_and_clean_ones_less() -> None:
    alphas_cumprod = linear_alphas_cumprod(100, 1e-3, 0.2)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    module = DiffusionTraining(Denoiser(), Recipe(1, 1.0), alphas_cumprod, min_snr_gamma=5.0)
    weight = module.get_buffer("loss_weight")
    assert torch.equal(weight[snr <= 5], torch.ones(int((snr <= 5).sum())))
    torch.testing.assert_close(weight[snr > 5], (5 / snr[snr > 5]).float())


def test_flip_and_shift_moves_whole_images() -> None:
    torch.manual_seed(0)
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    padded = F.pad(images[:1], (2, 2, 2, 2), mode="reflect")[0, 0]
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    windows += [
        F.pad(images[:1].flip(3), (2, 2, 2, 2), mode="reflect")[0, 0][i : i + 8, j : j + 8]
        for i in range(5)
        for j in range(5)
    ]
    moved = random_flip_and_shift(images, pixels=2)
    assert moved.shape == images.shape
    assert all(any(torch.equal(image[0], window) for window in windows) for image in moved)
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 40  # of 50


def test_buffers_are_averaged_and_counters_copied() -> None:
    network = nn.BatchNorm1d(2)
    module = TrainingModule(network, Recipe(1, 1e-2))
    network.running_mean, network.num_batches_tracked = torch.tensor([2.0, 4.0]), torch.tensor(7)
    module.move_average(0.75)
    average = module.trained_network()
    torch.testing.assert_close(average.running_mean, torch.tensor([0.5, 1.0]))
    assert average.num_batches_tracked == 7
    module.move_average(0.0)
    assert torch.equal(average.running_mean, network.running_mean)
    assert average.running_mean.data_ptr() != network.running_mean.data_ptr()


def test_the_shipped_weights_are_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decay, num_steps = 0.5, 3
    module = ClassifierTraining(
        DigitsClassifier().architecture(),
        Recipe(num_steps, 1e-2, warmup_steps=0, ema_decay=decay),
        lambda images: images,
    )
    weights: list[Tensor] = []
    move_average = module.move_average

    def recorded(decay: float) -> None:
        weights.append(module.network.head.weight.detach().clone())
        move_average(decay)

    module.move_average = recorded  # type: ignore[method-assign]
    fit(module, torch.rand(192, 1, 16, 16), torch.arange(192) % 10, tmp_path)
    expected = decay * (decay * weights[0] + (1 - decay) * weights[1]) + (1 - decay) * weights[2]
    network = module.trained_network()
    torch.testing.assert_close(network.head.weight, expected)
    assert not network.training
