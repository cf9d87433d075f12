"""Schema of Winograd convolutions, and of the classification rows that vary them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp.config.checks import UserError, check_at_least, check_bits, check_tile

SCALES = ("standard", "closed_form", "learned")
"""Kinds of scales of the Winograd transforms."""

ACT_SCALES = ("dynamic", "static")
"""When scales of x, V and M are found: at every input, or once, on calibration data."""


@dataclass
class WinogradLearningConfig:
    """Learning of the transform scales from noise.

    Args:
        num_steps: SGD steps, at least 0; 0 keeps the closed form.
        learning_rate: Of SGD on the log scales, above 0.
        layers_per_step: Convolutions drawn each step (K in the paper).
        init: Where learning starts: ``closed_form`` or ``standard``.
        noise: What layers are fed: ``gaussian`` (the paper's), ``uniform`` or ``pink`` (1/f, pixels correlate).
        per_layer: Every layer learns scales of its own, with ``num_steps`` each; otherwise all share one set.
        separate_columns: Transforms of rows and of columns have scales of their own.
    """

    num_steps: int = 60
    learning_rate: float = 0.02
    layers_per_step: int = 2
    init: str = "closed_form"
    noise: str = "gaussian"
    per_layer: bool = False
    separate_columns: bool = False

    def __post_init__(self) -> None:
        check_at_least("winograd.learning.num_steps", self.num_steps, 0)
        check_at_least("winograd.learning.layers_per_step", self.layers_per_step, 1)
        if self.learning_rate <= 0:
            raise UserError(f"winograd.learning.learning_rate must be above 0, found {self.learning_rate}")
        if self.init not in ("closed_form", "standard"):
            raise UserError(f"winograd.learning.init must be closed_form or standard, found {self.init!r}")
        if self.noise not in ("gaussian", "uniform", "pink"):
            raise UserError(f"winograd.learning.noise must be gaussian, uniform or pink, found {self.noise!r}")


@dataclass
class WinogradConfig:
    """Winograd convolutions.

    Args:
        tile: m of F(m, 3) for every eligible layer of the searched model; 0 keeps direct convolution.
        report_tiles: Tiles whose SQNR the report compares, whatever ``tile`` says.
        points: ``standard``, ``improved`` or a list of rationals and ``inf``.
        scales: Scales of the transforms used by the searched model: ``standard``, ``closed_form`` or ``learned``.
        scales_from: ``winograd_scales.json`` of another run: the searched model uses the scales that it kept, instead
            of ``scales``. The report's figures stay those of this network's own scales.
        method: Which elements share a scale: ``groups``, or the baselines ``per_tensor``, ``per_tap``, ``bqw_style``
            and ``fsq_style``; the last one finds scales of its own for the searched tile.
        group_size: Elements that share a scale, at least 1, or ``all`` (also 0); a last group may be shorter.
        quantize_input, quantize_v, quantize_u, quantize_m: The four stages.
        input_bits, v_bits, u_bits: Bits of a stage; null follows the layer's own bits.
        m_bits: Bits of the products before the output transform.
        m_scale: ``tile`` (all taps of a tile share a scale of M) or ``tap`` (each has its own, in groups).
        act_scales: ``dynamic`` (scales of x, V and M follow every input) or ``static`` (their ranges are measured once,
            on calibration data).
        transform_bits: Bits of integer transform matrices, 4..16; null keeps them float.
        shaped_stages: Which of ``u``, ``v`` and ``m`` round with error feedback.
        pixel_correlation: Correlation of neighbouring pixels that shaping of U assumes, in [0, 1).
        learning: How scales are learned.
    """

    tile: int = 0
    report_tiles: list[int] = field(default_factory=lambda: [2, 4, 6])
    points: Any = "standard"
    scales: str = "learned"
    scales_from: str | None = None
    method: str = "groups"
    group_size: int | str = 32
    quantize_input: bool = True
    quantize_v: bool = True
    quantize_u: bool = True
    quantize_m: bool = True
    input_bits: int | None = None
    v_bits: int | None = None
    u_bits: int | None = None
    m_bits: int = 8
    m_scale: str = "tile"
    act_scales: str = "dynamic"
    transform_bits: int | None = None
    shaped_stages: list[str] = field(default_factory=list)
    pixel_correlation: float = 0.5
    learning: WinogradLearningConfig = field(default_factory=WinogradLearningConfig)

    def __post_init__(self) -> None:
        if self.tile != 0 and not 2 <= self.tile <= 6:
            raise UserError(f"winograd.tile must be 0 (direct) or in 2..6, found {self.tile}")
        for tile in self.report_tiles:
            if not 2 <= tile <= 6:
                raise UserError(f"winograd.report_tiles must hold tiles in 2..6, found {tile}")
        if not isinstance(self.points, (str, list)):
            raise UserError(f"winograd.points must be standard, improved or a list of points, found {self.points!r}")
        if self.scales not in SCALES:
            raise UserError(f"winograd.scales must be standard, closed_form or learned, found {self.scales!r}")
        self._check_layout()
        self._check_stage_bits()

    def varied(self, row: VariantConfig) -> WinogradConfig:
        """These settings with what a row of classification changes.

        Raises:
            UserError: If the row names no key of this group, or a value is of a wrong type or out of range.
        """
        own = {"tile": row.m, "points": row.points, "scales": row.scales}
        taken = sorted(own.keys() & row.winograd.keys())
        if taken:
            raise UserError(f"classification.further: {row.name}: winograd.{taken[0]} is set by the row itself")
        try:
            varied = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self), row.winograd, own))
        except (OmegaConfBaseException, UserError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"classification.further: {row.name}: {first_line}") from error
        assert isinstance(varied, WinogradConfig)
        return varied

    def _check_layout(self) -> None:
        if self.group_size == "all":
            self.group_size = 0
        if isinstance(self.group_size, str) or self.group_size < 0:
            raise UserError(f"winograd.group_size must be at least 1, or all, found {self.group_size!r}")
        methods = ("groups", "per_tensor", "per_tap", "bqw_style", "fsq_style")
        if self.method not in methods:
            raise UserError(f"winograd.method must be one of {', '.join(methods)}, found {self.method!r}")
        if self.m_scale not in ("tile", "tap"):
            raise UserError(f"winograd.m_scale must be tile or tap, found {self.m_scale!r}")
        if self.act_scales not in ACT_SCALES:
            raise UserError(f"winograd.act_scales must be dynamic or static, found {self.act_scales!r}")
        unknown = sorted(set(self.shaped_stages) - {"u", "v", "m"})
        if unknown:
            raise UserError(f"winograd.shaped_stages must hold u, v or m, found {unknown[0]!r}")
        if self.method == "bqw_style" and set(self.shaped_stages) - {"m"}:
            raise UserError(f"winograd.shaped_stages may hold m only with bqw_style, found {self.shaped_stages}")
        if not 0 <= self.pixel_correlation < 1:
            raise UserError(f"winograd.pixel_correlation must be in [0, 1), found {self.pixel_correlation}")

    def _check_stage_bits(self) -> None:
        check_bits("winograd.m_bits", self.m_bits)
        for name in ("input_bits", "v_bits", "u_bits"):
            bits = getattr(self, name)
            if bits is not None:
                check_bits(f"winograd.{name}", bits)
        if self.transform_bits is not None and not 4 <= self.transform_bits <= 16:
            raise UserError(f"winograd.transform_bits must be in 4..16 or null, found {self.transform_bits}")


@dataclass
class TileConfig:
    """A tile that classification examines.

    Args:
        m: Outputs of F(m, 3) in one dimension, 2..6.
        points: ``standard`` or ``improved``.
    """

    m: int = 4
    points: str = "standard"

    def __post_init__(self) -> None:
        check_tile("classification.tiles", self.m)
        if self.points not in ("standard", "improved"):
            raise UserError(f"classification.tiles: points must be standard or improved, found {self.points!r}")


@dataclass
class VariantConfig:
    """A further row of classification: a tile, and what differs from the ``winograd`` group.

    Args:
        name: Of the row; no other row has it.
        m: Outputs of F(m, 3) in one dimension, 2..6.
        points: ``standard``, ``improved`` or a list of rationals and ``inf``.
        scales: ``standard``, ``closed_form`` or ``learned``.
        winograd: Keys of the ``winograd`` group with their values.
    """

    name: str = MISSING
    m: int = 4
    points: Any = "standard"
    scales: str = "closed_form"
    winograd: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tile("classification.further", self.m)
        if self.scales not in SCALES:
            raise UserError(f"classification.further: scales must be one of {', '.join(SCALES)}, found {self.scales!r}")


@dataclass
class ClassificationConfig:
    """What ``task=classify`` compares, beside the float network and direct W8A8.

    Args:
        tiles: Each is evaluated with each of ``scales``.
        scales: ``standard``, ``closed_form``, ``learned``.
        further: Rows of other kinds.
    """

    tiles: list[TileConfig] = field(
        default_factory=lambda: [TileConfig(2), TileConfig(4), TileConfig(4, "improved"), TileConfig(6)]
    )
    scales: list[str] = field(default_factory=lambda: list(SCALES))
    further: list[VariantConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        for scales in self.scales:
            if scales not in SCALES:
                raise UserError(f"classification.scales must hold {', '.join(SCALES)}, found {scales!r}")
        rows = [row.name for row in self.rows()]
        repeated = sorted({name for name in rows if rows.count(name) > 1})
        if repeated:
            raise UserError(
                f"classification.tiles, classification.further: names must differ, found {repeated[0]} more than once"
            )

    def rows(self) -> list[VariantConfig]:
        """All Winograd rows: ``f{m}_{points}_{scales}``, then the further ones."""
        named = [
            VariantConfig(f"f{tile.m}_{tile.points}_{scales}", tile.m, tile.points, scales)
            for tile in self.tiles
            for scales in self.scales
        ]
        return [*named, *self.further]
