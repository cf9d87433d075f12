"""Schema of the whole configuration and every range check that needs no network; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from tmpq_exp.quant.allocation import FLOAT_BITS

MIN_BITS, MAX_BITS = 2, 16


class UserError(ValueError):
    """Something the user asked for cannot be done; the message names what was wrong, found and accepted."""


def _check_at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise UserError(f"{name} must be at least {low}, found {value}")


def _check_bits(name: str, bits: int, *, or_float: bool = False) -> None:
    if not MIN_BITS <= bits <= MAX_BITS and not (or_float and bits == FLOAT_BITS):
        accepted = f"{MIN_BITS}..{MAX_BITS}" + (f" or {FLOAT_BITS} (float)" if or_float else "")
        raise UserError(f"{name} must be in {accepted}, found {bits}")


def _check_bit_choices(name: str, choices: list[int]) -> None:
    if not choices:
        raise UserError(f"{name} must not be empty; give at least one bit width in {MIN_BITS}..{MAX_BITS}")
    for bits in choices:
        _check_bits(name, bits)
    if len(set(choices)) != len(choices):
        raise UserError(f"{name} must not repeat a bit width, found {choices}")


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
        _check_at_least("group_size", self.group_size, 1)
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
    """

    weight: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(Granularity.PER_CHANNEL.value))
    act: QuantizerConfig = field(default_factory=QuantizerConfig)
    softmax_bits: int = 8
    split_shortcuts: bool = True
    cache_max_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        _check_bits("quant.softmax_bits", self.softmax_bits)
        _check_at_least("quant.cache_max_bytes", self.cache_max_bytes, 0)


@dataclass
class WinogradLearningConfig:
    """Learning of the transform scales from noise.

    Args:
        num_steps: SGD steps, at least 0; 0 keeps the closed form.
        learning_rate: Of SGD on the log scales, above 0.
        layers_per_step: Convolutions drawn each step (K in the paper).
        init: Where learning starts: ``closed_form`` or ``standard``.
    """

    num_steps: int = 60
    learning_rate: float = 0.02
    layers_per_step: int = 2
    init: str = "closed_form"

    def __post_init__(self) -> None:
        _check_at_least("winograd.learning.num_steps", self.num_steps, 0)
        _check_at_least("winograd.learning.layers_per_step", self.layers_per_step, 1)
        if self.learning_rate <= 0:
            raise UserError(f"winograd.learning.learning_rate must be above 0, found {self.learning_rate}")
        if self.init not in ("closed_form", "standard"):
            raise UserError(f"winograd.learning.init must be closed_form or standard, found {self.init!r}")


@dataclass
class WinogradConfig:
    """Winograd convolutions.

    Args:
        tile: m of F(m, 3) for every eligible layer of the searched model; 0 keeps direct convolution.
        report_tiles: Tiles whose SQNR the report compares, whatever ``tile`` says.
        points: ``standard``, ``improved`` or a list of rationals and ``inf``.
        scales: Scales of the transforms used by the searched model: ``standard``, ``closed_form`` or ``learned``.
        group_size: Elements that share a scale, at least 1; a last group may be shorter.
        quantize_input, quantize_v, quantize_u, quantize_m: The four stages.
        m_bits: Bits of the products before the output transform.
        learning: How scales are learned.
    """

    tile: int = 0
    report_tiles: list[int] = field(default_factory=lambda: [2, 4, 6])
    points: Any = "standard"
    scales: str = "learned"
    group_size: int = 32
    quantize_input: bool = True
    quantize_v: bool = True
    quantize_u: bool = True
    quantize_m: bool = True
    m_bits: int = 8
    learning: WinogradLearningConfig = field(default_factory=WinogradLearningConfig)

    def __post_init__(self) -> None:
        if self.tile != 0 and not 2 <= self.tile <= 6:
            raise UserError(f"winograd.tile must be 0 (direct) or in 2..6, found {self.tile}")
        for tile in self.report_tiles:
            if not 2 <= tile <= 6:
                raise UserError(f"winograd.report_tiles must hold tiles in 2..6, found {tile}")
        if not isinstance(self.points, (str, list)):
            raise UserError(f"winograd.points must be standard, improved or a list of points, found {self.points!r}")
        if self.scales not in ("standard", "closed_form", "learned"):
            raise UserError(f"winograd.scales must be standard, closed_form or learned, found {self.scales!r}")
        _check_at_least("winograd.group_size", self.group_size, 1)
        _check_bits("winograd.m_bits", self.m_bits)


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
        _check_at_least("calibration.num_images", self.num_images, 1)
        _check_at_least("calibration.num_timesteps", self.num_timesteps, 1)
        _check_at_least("calibration.max_values", self.max_values, 1024)
        _check_at_least("calibration.weight_iterations", self.weight_iterations, 0)
        _check_at_least("calibration.act_iterations", self.act_iterations, 0)
        _check_at_least("calibration.batch_size", self.batch_size, 1)
        _check_at_least("calibration.max_cache_bytes", self.max_cache_bytes, 0)
        for name in ("weight_learning_rate", "act_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"calibration.{name} must be above 0, found {getattr(self, name)}")
        if self.regularizer_weight is not None and not self.regularizer_weight >= 0:
            raise UserError(
                f"calibration.regularizer_weight must be at least 0 or null, found {self.regularizer_weight}"
            )


@dataclass
class SpaceConfig:
    """What a candidate may choose.

    Args:
        num_inference_steps: K, from 1 to the schedule's length: the number of groups, the steps of baselines and of
            the budget, and of every candidate unless ``min_steps`` or ``max_steps`` say otherwise.
        groups: Rule that cuts the schedule into K groups: ``quadratic`` or ``uniform``; ``free``: no groups, any
            timesteps may be kept.
        search_timesteps: Whether the kept timesteps of a group are free; if not it is the group's smallest.
        min_steps, max_steps: Range of a candidate's kept timesteps; null: K.
        min_steps_per_group, max_steps_per_group: Range of the kept timesteps of one group; no use if ``free``.
        weight_bits: Choices for every layer's weights; a single one fixes them.
        act_bits: Choices for every layer's activations.
        bits_per_step: ``shared``: all steps have the same bits; ``per_step``: each has its own.
    """

    num_inference_steps: int = 10
    groups: str = "quadratic"
    search_timesteps: bool = True
    min_steps: int | None = None
    max_steps: int | None = None
    min_steps_per_group: int = 1
    max_steps_per_group: int = 1
    weight_bits: list[int] = field(default_factory=lambda: [8, 7, 6, 5])
    act_bits: list[int] = field(default_factory=lambda: [8, 7, 6, 5])
    bits_per_step: str = "shared"

    def __post_init__(self) -> None:
        _check_at_least("space.num_inference_steps", self.num_inference_steps, 1)
        if self.groups not in ("quadratic", "uniform", "free"):
            raise UserError(f"space.groups must be quadratic, uniform or free, found {self.groups!r}")
        self._check_number_of_steps()
        _check_bit_choices("space.weight_bits", self.weight_bits)
        _check_bit_choices("space.act_bits", self.act_bits)
        if self.bits_per_step not in ("shared", "per_step"):
            raise UserError(f"space.bits_per_step must be shared or per_step, found {self.bits_per_step!r}")

    def _check_number_of_steps(self) -> None:
        k = self.num_inference_steps
        fewest, most = (k if bound is None else bound for bound in (self.min_steps, self.max_steps))
        _check_at_least("space.min_steps", fewest, 1)
        _check_at_least("space.max_steps", most, fewest)
        _check_at_least("space.min_steps_per_group", self.min_steps_per_group, 0)
        _check_at_least("space.max_steps_per_group", self.max_steps_per_group, max(1, self.min_steps_per_group))
        low, high = k * self.min_steps_per_group, k * self.max_steps_per_group
        if self.groups != "free" and (most < low or fewest > high):
            raise UserError(
                f"space.min_steps..max_steps must meet {low}..{high}, what {k} groups (space.num_inference_steps) of "
                f"{self.min_steps_per_group} to {self.max_steps_per_group} steps keep, found {fewest}..{most}"
            )


@dataclass
class BudgetConfig:
    """Ceiling on the BitOPs of a whole trajectory.

    Args:
        weight_bits, act_bits: The ceiling is what the direct network costs at these uniform bits and K steps.
        bitops: Explicit ceiling; overrides the two above.
    """

    weight_bits: int = 6
    act_bits: int = 6
    bitops: int | None = None

    def __post_init__(self) -> None:
        _check_bits("budget.weight_bits", self.weight_bits)
        _check_bits("budget.act_bits", self.act_bits)
        if self.bitops is not None and self.bitops < 1:
            raise UserError(f"budget.bitops must be given and at least 1, found {self.bitops}")


@dataclass
class CostConfig:
    """What ``task=cost`` counts; ``quant.softmax_bits``, ``winograd.tile`` and ``space.num_inference_steps`` count too.

    Args:
        weight_bits, act_bits: Uniform bits of all layers; 32 is float.
        scale: ``exact``; or ``release``, which adds what the TMPQ-DM authors' code counts.
    """

    weight_bits: int = 6
    act_bits: int = 6
    scale: str = "exact"

    def __post_init__(self) -> None:
        _check_bits("cost.weight_bits", self.weight_bits, or_float=True)
        _check_bits("cost.act_bits", self.act_bits, or_float=True)
        if self.scale not in ("exact", "release"):
            raise UserError(f"cost.scale must be exact or release, found {self.scale!r}")


@dataclass
class ObjectiveConfig:
    """How the search scores a candidate.

    Args:
        num_images: Images a candidate, the same seeds for all, at least 2.
        proxy: Cheap look at every candidate that decides whose quality is measured: ``feature_mse`` or ``psnr_db``
            against the float reference at the same seeds, or null for none.
        proxy_images: Images of the cheap look, the first of the others; from 1 to ``num_images``.
        promote_fraction: Share of a generation that is scored after it, in (0, 1].
    """

    num_images: int = 128
    proxy: str | None = None
    proxy_images: int = 16
    promote_fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_at_least("objective.num_images", self.num_images, 2)
        if self.proxy not in (None, "feature_mse", "psnr_db"):
            raise UserError(f"objective.proxy must be feature_mse, psnr_db or null, found {self.proxy!r}")
        if not 1 <= self.proxy_images <= self.num_images:
            raise UserError(
                f"objective.proxy_images must be in 1..{self.num_images} (objective.num_images), "
                f"found {self.proxy_images}"
            )
        if not 0 < self.promote_fraction <= 1:
            raise UserError(f"objective.promote_fraction must be in (0, 1], found {self.promote_fraction}")


@dataclass
class EvaluationConfig:
    """Final evaluation, on seeds the search never saw.

    Args:
        metric: Config of the quality metric (a ``_target_``); lower is better.
        num_images: Images for the baselines and the winner, at least 2.
        num_finalists: Best candidates of the search that are scored again on a third set of seeds to choose the
            winner.
        selection_images: Images for that, at least 2; null: as many as ``num_images``.
        baseline_bits: Uniform bit widths to compare with; 8 and 6 are always among them.
        baseline_spacings: Schedules of those, ``quadratic`` always among them, beside ``leading`` and ``trailing``.
        reference_steps: Steps of the float reference.
        micro_batch: Images a forward; results are bit-equal at a fixed micro-batch and number of threads.
        bootstrap: Resamples behind the intervals over images, 0 for none.
        noise_seeds: Further seeds on which the winner is scored as the search did, to show the noise of its score.
        ranked_candidates: Candidates from best to worst that are scored once more on ``num_images``, to show how far
            the search's ranking holds.
        random_control: Score as many random candidates as the search did, under the same budget.
        recalibrated_candidates: Candidates from best to worst that are calibrated for their own bits and scored once
            more, to show how far the supernet's ranking is theirs.
        recalibrate: Calibrate the winner for its own bits, and ship that where it is better on the selection's images.
    """

    metric: Any = MISSING
    num_images: int = 512
    num_finalists: int = 4
    selection_images: int | None = None
    baseline_bits: list[int] = field(default_factory=lambda: [8, 6])
    baseline_spacings: list[str] = field(default_factory=lambda: ["quadratic"])
    reference_steps: int = 50
    micro_batch: int = 64
    bootstrap: int = 100
    noise_seeds: int = 3
    ranked_candidates: int = 6
    random_control: bool = True
    recalibrated_candidates: int = 0
    recalibrate: bool = False

    def __post_init__(self) -> None:
        _check_at_least("evaluation.num_images", self.num_images, 2)
        _check_at_least("evaluation.num_finalists", self.num_finalists, 1)
        _check_at_least("evaluation.reference_steps", self.reference_steps, 1)
        _check_at_least("evaluation.micro_batch", self.micro_batch, 1)
        if self.selection_images is not None:
            _check_at_least("evaluation.selection_images", self.selection_images, 2)
        _check_bit_choices("evaluation.baseline_bits", self.baseline_bits)
        if not {8, 6} <= set(self.baseline_bits):
            raise UserError(f"evaluation.baseline_bits must hold 8 and 6, found {self.baseline_bits}")
        spacings = ("quadratic", "leading", "trailing")
        if "quadratic" not in self.baseline_spacings or not set(self.baseline_spacings) <= set(spacings):
            raise UserError(
                "evaluation.baseline_spacings must hold quadratic, and leading or trailing beside it, "
                f"found {self.baseline_spacings}"
            )
        for name in ("bootstrap", "noise_seeds", "ranked_candidates", "recalibrated_candidates"):
            _check_at_least(f"evaluation.{name}", getattr(self, name), 0)
        if self.bootstrap == 1:
            raise UserError("evaluation.bootstrap must be 0 or at least 2, found 1")


@dataclass
class LoggerConfig:
    """Experiment tracking.

    Args:
        name: ``wandb`` or ``none``.
        project: W&B project.
        mode: W&B mode: ``offline`` (no prompt, no network), ``online`` or ``disabled``.
        group: W&B group; jobs of a sweep share one.
        tags: W&B tags.
    """

    name: str = "wandb"
    project: str = "tmpq_exp"
    mode: str = "offline"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name not in ("wandb", "none"):
            raise UserError(f"logger.name must be wandb or none, found {self.name!r}")
        if self.mode not in ("offline", "online", "disabled"):
            raise UserError(f"logger.mode must be offline, online or disabled, found {self.mode!r}")


@dataclass
class PathsConfig:
    """Where things are.

    Args:
        output_dir: Root of run directories.
        cache_dir: Where calibration states are kept for other runs.
        run_dir: This run's directory; set from Hydra.
    """

    output_dir: str = "outputs"
    cache_dir: str = "outputs/.cache"
    run_dir: str = MISSING


@dataclass
class Config:
    """Everything a job is told; the groups of ``conf/`` fill it.

    Args:
        task: What to do, a partial ``_target_``: ``run``, ``train``, ``states`` or ``cost``.
        tier: ``full`` or ``smoke``; only its name is kept.
        executor: Who scores candidates: ``local``.
        model: The float model, a ``_target_``.
        data: Images for training, a ``_target_``.
        search: The search algorithm, a partial ``_target_``.
        trainer: The Lightning Trainer, a partial ``_target_``.
        reuse: Run directories whose evaluations are taken over where protocol and quantizers are the same, as they
            are when only the budget or the search differ.
        seed: Seed of every random stream, at least 0.
        search_seed: Seed of what the search draws and of the images it scores; null: as ``seed``. Runs that differ in
            it alone share calibration, selection and final images.
        num_threads: CPU threads of torch; null leaves torch's choice.
    """

    task: Any = MISSING
    tier: str = "full"
    executor: str = "local"
    model: Any = MISSING
    data: Any = MISSING
    quant: QuantConfig = field(default_factory=QuantConfig)
    winograd: WinogradConfig = field(default_factory=WinogradConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    search: Any = MISSING
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    reuse: list[str] = field(default_factory=list)
    seed: int = 0
    search_seed: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        again = self.evaluation.recalibrate or self.evaluation.recalibrated_candidates
        if again and self.calibration.method == "ranges":
            raise UserError(
                "evaluation.recalibrate: calibration=ranges finds the same ranges again; choose calibration=sampled "
                "or calibration=uniform_prefix"
            )
        _check_at_least("seed", self.seed, 0)
        if self.search_seed is not None:
            _check_at_least("search_seed", self.search_seed, 0)
        if self.num_threads is not None:
            _check_at_least("num_threads", self.num_threads, 1)
        if self.cost.scale == "release" and self.winograd.tile != 0:
            raise UserError(f"winograd.tile must be 0 under cost.scale=release, found {self.winograd.tile}")


def register_schema() -> None:
    """Put the schema where the defaults list of ``conf/config.yaml`` finds it."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Composed config -> checked values: the one door through which a configuration enters.

    Raises:
        UserError: If a value is out of range or of the wrong type, or a key was added that nothing reads.
    """
    _refuse_added_keys(composed, "")
    for place in ("weight", "act"):  # a quantizer does not know whose it is
        try:
            OmegaConf.to_object(composed.quant[place])
        except UserError as error:
            raise UserError(f"quant.{place}.{error}") from None
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def _refuse_added_keys(node: DictConfig, prefix: str) -> None:
    """``+key=value`` gets past Hydra's check of names; here it is caught wherever the schema names the keys."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    known = [entry.name for entry in fields(schema)]
    for key in map(str, node):
        if key not in known:
            raise UserError(f"{prefix}{key}: no such key; known: {', '.join(known)}")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _refuse_added_keys(node[key], f"{prefix}{key}.")
