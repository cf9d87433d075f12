"""Training recipes of the embedded models as LightningModules: noise prediction with EMA, and classification."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True)
class Recipe:
    """Optimization settings of a training run.

    Args:
        num_steps: Optimizer steps, at least 1.
        learning_rate: Peak of a linear warm-up followed by a cosine to 0, above 0.
        warmup_steps: Steps of the warm-up, at least 0.
        weight_decay: AdamW's, at least 0.
        ema_decay: Decay of the weight average, in [0, 1); 0 ships the last weights.
        gradient_clip: Largest norm of the gradient, above 0; None leaves it as it is.
        compile: Train through ``torch.compile`` in channels-last memory; pays on GPUs.
        cuda_graphs: Replay a compiled step from CUDA graphs; pays where small kernels leave a GPU waiting. Without
            effect on a CPU, or if not compiled.
    """

    num_steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    gradient_clip: float | None = None
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"model.recipe.num_steps must be at least 1, found {self.num_steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"model.recipe.learning_rate must be above 0, found {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"model.recipe.warmup_steps must be at least 0, found {self.warmup_steps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"model.recipe.weight_decay must be at least 0, found {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"model.recipe.ema_decay must be in [0, 1), found {self.ema_decay}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"model.recipe.gradient_clip must be above 0, found {self.gradient_clip}")

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the peak learning rate at this step, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class TrainingModule(L.LightningModule):
    """AdamW with warm-up, cosine and EMA around a network; subclasses say what the loss is.

    No step waits for the device, so that it always has work: nothing is read back, and the average is moved there.
    ``final_loss`` is the exponential mean of the training loss over about the last 100 steps.
    """

    final_loss: Tensor

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe
        self.average = copy.deepcopy(network)
        self.register_buffer("final_loss", torch.tensor(float("nan")))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar training loss of one batch of images in [0, 1]."""
        raise AssertionError("a subclass says what the loss is")

    def on_fit_start(self) -> None:
        """Compile, where the recipe says so; the averaged network stays plain."""
        if self.recipe.compile:
            for network in (self.network, self.average):
                network.to(memory_format=torch.channels_last)
            self.network.compile(mode="reduce-overhead" if self.recipe.cuda_graphs else "default")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One optimizer step."""
        loss = self.loss(*batch)
        value = loss.detach()
        self.final_loss.copy_(torch.where(self.final_loss.isnan(), value, self.final_loss.lerp(value, 0.01)))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the weight average; after the first step it is the weights themselves."""
        self.move_average(0.0 if self.global_step <= 1 else self.recipe.ema_decay)

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """Average the weights, and buffers of floats, with this decay; other buffers are copied."""
        averages, current = ([*network.parameters(), *network.buffers()] for network in (self.average, self.network))
        pairs = list(zip(averages, current, strict=True))
        moved = [(average, value) for average, value in pairs if value.is_floating_point()]
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([average for average, _ in moved], [value for _, value in moved], None)
        for average, value in pairs:
            if not value.is_floating_point():
                average.copy_(value)

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule of the recipe, stepped every batch."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained_network(self) -> nn.Module:
        """The averaged network, in eval mode."""
        return self.average.eval()


class DiffusionTraining(TrainingModule):
    """Epsilon prediction at uniform random timesteps.

    Args:
        network, recipe: See ``TrainingModule``.
        alphas_cumprod: ``(num_train_timesteps,)``.
        flip: Mirror images at random.
        min_snr_gamma: Weight the error of a timestep by min(SNR, gamma) / SNR; None weighs all the same.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 1.
        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023, section 3.4.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        alphas_cumprod: Tensor,
        *,
        flip: bool = False,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__(network, recipe)
        self.flip = flip
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weight = torch.ones_like(snr) if min_snr_gamma is None else snr.clamp(max=min_snr_gamma) / snr
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.register_buffer("loss_weight", weight.float(), persistent=False)

    @torch.no_grad()
    def average_error(
        self, network: nn.Module, batches: Iterable[tuple[Tensor, ...]], num_draws: int, seed: int = 0
    ) -> float:
        """Mean squared error of the predicted noise, unweighted, over images, random timesteps and noises.

        Args:
            network: Noise predictor.
            batches: Images in [0, 1] and labels.
            num_draws: Draws of timestep and noise an image.
            seed: Of the draws.
        """
        device = next(network.parameters()).device
        errors = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for images, labels in batches:
                for _ in range(num_draws):
                    errors.append(self._errors(network, images.to(device), labels.to(device))[0])
        return float(torch.cat(errors).mean())

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean squared error of the predicted noise."""
        if self.flip:
            images = random_flip(images)
        errors, timesteps = self._errors(self.network, images, labels)
        return (errors * self.get_buffer("loss_weight")[timesteps]).mean()

    def conditioning(self, labels: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the network for images with these labels, ``(N,)``; here class labels."""
        return {"class_labels": labels}

    def _errors(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of each image at a random timestep, and the timesteps; ``(N,)`` both."""
        x0 = images * 2 - 1
        alphas_cumprod = self.get_buffer("alphas_cumprod").to(x0.device)
        timesteps = torch.randint(len(alphas_cumprod), (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        predicted = network(x, timesteps, **self.conditioning(labels)).sample
        return (predicted.float() - noise).square().mean((1, 2, 3)), timesteps


class ClassifierTraining(TrainingModule):
    """Cross entropy on randomly changed images.

    Args:
        network, recipe: See ``TrainingModule``.
        augment: Changes training images ``(N, C, H, W)`` at random.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, augment: Callable[[Tensor], Tensor]) -> None:
        super().__init__(network, recipe)
        self._augment = augment

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the logits."""
        return F.cross_entropy(self.network(self._augment(images)), labels)


@torch.no_grad()
def top1_percent(network: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Percentage of images that a network gives their label; NaN without images."""
    device = next(network.parameters()).device
    hits = [network(images.to(device)).argmax(1).cpu() == labels for images, labels in batches]
    return float(torch.cat(hits).float().mean() * 100) if hits else float("nan")


def random_flip(images: Tensor) -> Tensor:
    """Each image mirrored left to right, or not, by a fair coin."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def random_flip_and_shift(images: Tensor, pixels: int = 4) -> Tensor:
    """Each image mirrored or not, and shifted by up to ``pixels`` each way; what comes in from outside is mirrored."""
    images = F.pad(random_flip(images), (pixels,) * 4, mode="reflect")
    size = [side - 2 * pixels for side in images.shape[2:]]
    rows, columns = (
        torch.randint(2 * pixels + 1, (len(images), 1), device=images.device) + torch.arange(side, device=images.device)
        for side in size
    )
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def random_affine(images: Tensor) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to 10 %, sheared and shifted by up to a tenth of its width.

    Args:
        images: ``(N, C, H, W)``; zeros come in from outside.
    """
    angle, scale, shear, shift_x, shift_y = (2 * torch.rand(5, len(images), device=images.device) - 1) * 0.1
    angle, scale = angle * 1.75, 1 + scale
    rows = [
        torch.stack([scale * angle.cos(), shear - angle.sin(), shift_x], dim=1),
        torch.stack([angle.sin(), scale * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
