"""Schema of quantizers and their calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tmpq_exp.config.checks import UserError, check_at_least, check_bits


class Granularity(str, Enum):
    """Which values of a tensor share one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


@dataclass
class QuantizerConfig:
    """One tensor's quantizer.

    Args:
        granularity: Weights: per tensor, per output channel, or per group of input channels within an output
            channel. Activations: per tensor or per channel with static ranges, or per group of channels with one
            dynamic scale an image and group.
        group_size: Channels that share a scale under ``per_group``, at least 1; a last group may be shorter.
        symmetric: Zero point fixed at 0.
        estimator: ``minmax``, ``mse`` or ``percentile``.
        percentile: In (50, 100], for the estimator of that name.
    """

    granularity: str = Granularity.PER_TENSOR.value
    group_size: int = 32
    symmetric: bool = False
    estimator: str = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        accepted = [str(choice.value) for choice in Granularity]
        if self.granularity not in accepted:
            raise UserError(f"granularity must be one of {', '.join(accepted)}, found {self.granularity!r}")
        check_at_least("group_size", self.group_size, 1)
        if self.estimator not in ("minmax", "mse", "percentile"):
            raise UserError(f"estimator must be minmax, mse or percentile, found {self.estimator!r}")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile must be in (50, 100], found {self.percentile}")


@dataclass
class QuantConfig:
    """Quantizers of the supernet.

    Args:
        weight: Quantizer of convolution and linear weights.
        act: Quantizer of their inputs, and of q, k and v.
        softmax_bits: Bits of the softmax output before it meets v, fixed for all candidates.
        split_shortcuts: Where a block's input is a concatenation, as in the up path of a U-Net, quantize its two sides
            apart: they differ in range. For static per-tensor activations and per-channel or per-tensor weights.
        cache_max_bytes: Memory cap of quantized weights kept ready for use.
        compile: Whether subnets without Winograd tiles run through ``torch.compile``, which fuses the quantization of
            activations with what is around it; null: on GPUs. Subnets of all bits share one graph, and the weights of
            one must fit under the cap. Images differ from those of ``false`` by rounding.
    """

    weight: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(Granularity.PER_CHANNEL.value))
    act: QuantizerConfig = field(default_factory=QuantizerConfig)
    softmax_bits: int = 8
    split_shortcuts: bool = True
    cache_max_bytes: int = 512 * 2**20
    compile: bool | None = None

    def __post_init__(self) -> None:
        check_bits("quant.softmax_bits", self.softmax_bits)
        check_at_least("quant.cache_max_bytes", self.cache_max_bytes, 0)


@dataclass
class CalibrationConfig:
    """Quantizer parameters from states of the float sampling trajectory.

    Args:
        method: ``ranges``: estimated ranges, rounding to nearest. ``uniform_prefix``: block by block, each bit width
            learned behind a network at that width. ``sampled``: block by block, a bit width drawn for each layer and
            iteration.
        states: File of calibration states made by ``task=states``; null makes them from the model, or takes those
            that were made before.
        num_images: Trajectories, at least 1.
        num_timesteps: States a trajectory, at equal distances; at least 1.
        max_values: Activation values kept for each quantizer (a seeded sample of them), at least 1024.
        weight_iterations: Adam steps of the rounding of a block at each bit width, at least 0.
        act_iterations: Adam steps of its activation scales at each bit width, at least 0.
        batch_size: States a step, at least 1.
        weight_learning_rate: Of the rounding's logits, above 0.
        act_learning_rate: Of the activation scales, falling to 0 along a cosine; above 0.
        regularizer_weight: Of AdaRound's regularizer, a sum over all weights, at least 0; null: the loss of the block
            before divided by its number of weights.
        correct_means: Flip roundings of a block's last layer, once all is learned, against the mean error of channels.
        max_cache_bytes: Memory cap of kept activations; what is beyond it goes to files in the run directory.
    """

    method: str = "uniform_prefix"
    states: str | None = None
    num_images: int = 32
    num_timesteps: int = 20
    max_values: int = 2**14
    weight_iterations: int = 0
    act_iterations: int = 0
    batch_size: int = 16
    weight_learning_rate: float = 1e-3
    act_learning_rate: float = 4e-4
    regularizer_weight: float | None = 0.01
    correct_means: bool = True
    max_cache_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        if self.method not in ("ranges", "uniform_prefix", "sampled"):
            raise UserError(f"calibration.method must be ranges, uniform_prefix or sampled, found {self.method!r}")
        check_at_least("calibration.num_images", self.num_images, 1)
        check_at_least("calibration.num_timesteps", self.num_timesteps, 1)
        check_at_least("calibration.max_values", self.max_values, 1024)
        check_at_least("calibration.weight_iterations", self.weight_iterations, 0)
        check_at_least("calibration.act_iterations", self.act_iterations, 0)
        check_at_least("calibration.batch_size", self.batch_size, 1)
        check_at_least("calibration.max_cache_bytes", self.max_cache_bytes, 0)
        for name in ("weight_learning_rate", "act_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"calibration.{name} must be above 0, found {getattr(self, name)}")
        if self.regularizer_weight is not None and not self.regularizer_weight >= 0:
            raise UserError(
                f"calibration.regularizer_weight must be at least 0 or null, found {self.regularizer_weight}"
            )
