"""Schema of what is searched, at which cost, and how candidates are scored and evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tmpq_exp.config.checks import UserError, check_at_least, check_bit_choices, check_bits
from tmpq_exp.quant.allocation import DIRECT_TILE


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
        tiles: Choices of every eligible convolution: 0 (direct) and m of F(m, 3) in 2..6. A layer is offered those
            that save BitOPs against every smaller one. Empty: ``winograd.tile`` for all, not searched.
        recipe: ``recipe.json`` of another run, whose timesteps and bits are kept: tiles alone are searched then,
            whatever the other settings of timesteps and bits say.
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
    tiles: list[int] = field(default_factory=list)
    recipe: str | None = None
    bits_per_step: str = "shared"

    def __post_init__(self) -> None:
        check_at_least("space.num_inference_steps", self.num_inference_steps, 1)
        if self.groups not in ("quadratic", "uniform", "free"):
            raise UserError(f"space.groups must be quadratic, uniform or free, found {self.groups!r}")
        self._check_number_of_steps()
        check_bit_choices("space.weight_bits", self.weight_bits)
        check_bit_choices("space.act_bits", self.act_bits)
        if self.bits_per_step not in ("shared", "per_step"):
            raise UserError(f"space.bits_per_step must be shared or per_step, found {self.bits_per_step!r}")
        for tile in self.tiles:
            if tile != DIRECT_TILE and not 2 <= tile <= 6:
                raise UserError(f"space.tiles must hold 0 (direct) and tiles in 2..6, found {tile}")
        if len(set(self.tiles)) != len(self.tiles):
            raise UserError(f"space.tiles must not repeat a tile, found {self.tiles}")
        if self.tiles and DIRECT_TILE not in self.tiles:
            raise UserError(f"space.tiles must hold 0 (direct), to which budgets refer, found {self.tiles}")

    def _check_number_of_steps(self) -> None:
        k = self.num_inference_steps
        fewest, most = (k if bound is None else bound for bound in (self.min_steps, self.max_steps))
        check_at_least("space.min_steps", fewest, 1)
        check_at_least("space.max_steps", most, fewest)
        check_at_least("space.min_steps_per_group", self.min_steps_per_group, 0)
        check_at_least("space.max_steps_per_group", self.max_steps_per_group, max(1, self.min_steps_per_group))
        low, high = k * self.min_steps_per_group, k * self.max_steps_per_group
        if self.groups != "free" and (most < low or fewest > high):
            raise UserError(
                f"space.min_steps..max_steps must meet {low}..{high}, what {k} groups (space.num_inference_steps) of "
                f"{self.min_steps_per_group} to {self.max_steps_per_group} steps keep, found {fewest}..{most}"
            )


@dataclass
class BudgetConfig:
    """Ceiling on the BitOPs, or on the MACs, of a whole trajectory.

    Args:
        weight_bits, act_bits: The ceiling is what the direct network costs at these uniform bits and K steps.
        bitops: Explicit ceiling; overrides the two above.
        macs: The same in executed MACs, transforms of Winograd layers counted, where every layer of the space has 8
            bits alone.
    """

    weight_bits: int = 6
    act_bits: int = 6
    bitops: int | None = None
    macs: int | None = None

    def __post_init__(self) -> None:
        check_bits("budget.weight_bits", self.weight_bits)
        check_bits("budget.act_bits", self.act_bits)
        for name, given in (("bitops", self.bitops), ("macs", self.macs)):
            if given is not None and given < 1:
                raise UserError(f"budget.{name} must be given and at least 1, found {given}")
        if self.bitops is not None and self.macs is not None:
            raise UserError(f"budget.bitops and budget.macs: give one of them, found {self.bitops} and {self.macs}")

    @property
    def name(self) -> str:
        """What the ceiling comes from: ``macs``, ``bitops``, or uniform bits as ``w6a6``."""
        if self.macs is not None:
            return "macs"
        return "bitops" if self.bitops is not None else f"w{self.weight_bits}a{self.act_bits}"


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
        check_bits("cost.weight_bits", self.weight_bits, or_float=True)
        check_bits("cost.act_bits", self.act_bits, or_float=True)
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
        control_images: Images of the float model at K steps, on seeds of their own, behind the control variate that
            takes most of the seeds' chance out of a score (see ``tmpq_exp.metrics.control``), best several times
            ``num_images``. 0: plain scores, as those of metrics that are no Frechet distance always are.
    """

    num_images: int = 128
    proxy: str | None = None
    proxy_images: int = 16
    promote_fraction: float = 0.5
    control_images: int = 1024

    def __post_init__(self) -> None:
        check_at_least("objective.num_images", self.num_images, 2)
        if self.proxy not in (None, "feature_mse", "psnr_db"):
            raise UserError(f"objective.proxy must be feature_mse, psnr_db or null, found {self.proxy!r}")
        if not 1 <= self.proxy_images <= self.num_images:
            raise UserError(
                f"objective.proxy_images must be in 1..{self.num_images} (objective.num_images), "
                f"found {self.proxy_images}"
            )
        check_at_least("objective.control_images", self.control_images, 0)
        if self.control_images == 1:
            raise UserError("objective.control_images must be 0 or at least 2, found 1")
        if not 0 < self.promote_fraction <= 1:
            raise UserError(f"objective.promote_fraction must be in (0, 1], found {self.promote_fraction}")


@dataclass
class EvaluationConfig:
    """Final evaluation, on seeds the search never saw.

    Args:
        metric: The quality metric that is searched by: a name in ``metrics``, or a ``_target_`` of its own.
        further: Metrics that are reported beside it for the baselines and the winner, on the final images; names or
            nodes with ``_target_``.
        reference: Images that distances compare with: a folder, an ``.npz`` of statistics, or safetensors of a training
            run; null: the metric's own, where it has one.
        num_images: Images for the baselines and the winner, at least 2.
        num_finalists: Best candidates of the search that are scored again on a third set of seeds to choose the
            winner.
        selection_images: Images for that, at least 2; null: as many as ``num_images``.
        baseline_bits: Uniform bit widths to compare with; 8 and 6 are always among them.
        baseline_spacings: Schedules of those, beside the model's own: ``quadratic`` always among them, ``leading`` and
            ``trailing``.
        reference_steps: Steps of the float reference.
        quantized_reference: Compare with W8A8 at the reference's timesteps too.
        micro_batch: Images a forward; results are bit-equal at a fixed micro-batch and number of threads. Null: as many
            as memory suffices for where the run starts, kept with the run, and no more than a candidate of the search
            has.
        paired_images: Images compared with the float reference's of the same seeds (``psnr_db``, ``feature_mse``).
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
    further: list[Any] = field(default_factory=list)
    reference: str | None = None
    num_images: int = 512
    num_finalists: int = 4
    selection_images: int | None = None
    baseline_bits: list[int] = field(default_factory=lambda: [8, 6])
    baseline_spacings: list[str] = field(default_factory=lambda: ["quadratic"])
    reference_steps: int = 50
    quantized_reference: bool = False
    micro_batch: int | None = 64
    paired_images: int = 512
    bootstrap: int = 100
    noise_seeds: int = 2
    ranked_candidates: int = 4
    random_control: bool = False
    recalibrated_candidates: int = 0
    recalibrate: bool = False

    def __post_init__(self) -> None:
        check_at_least("evaluation.num_images", self.num_images, 2)
        check_at_least("evaluation.num_finalists", self.num_finalists, 1)
        check_at_least("evaluation.reference_steps", self.reference_steps, 1)
        if self.micro_batch is not None:
            check_at_least("evaluation.micro_batch", self.micro_batch, 1)
        check_at_least("evaluation.paired_images", self.paired_images, 1)
        if self.selection_images is not None:
            check_at_least("evaluation.selection_images", self.selection_images, 2)
        check_bit_choices("evaluation.baseline_bits", self.baseline_bits)
        if not {8, 6} <= set(self.baseline_bits):
            raise UserError(f"evaluation.baseline_bits must hold 8 and 6, found {self.baseline_bits}")
        spacings = ("quadratic", "leading", "trailing")
        if "quadratic" not in self.baseline_spacings or not set(self.baseline_spacings) <= set(spacings):
            raise UserError(
                "evaluation.baseline_spacings must hold quadratic, and leading or trailing beside it, "
                f"found {self.baseline_spacings}"
            )
        for name in ("bootstrap", "noise_seeds", "ranked_candidates", "recalibrated_candidates"):
            check_at_least(f"evaluation.{name}", getattr(self, name), 0)
        if self.bootstrap == 1:
            raise UserError("evaluation.bootstrap must be 0 or at least 2, found 1")
