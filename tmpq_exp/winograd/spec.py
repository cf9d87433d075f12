"""What a quantized Winograd convolution is: its F(m, r), the bits of its stages, and which elements share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import integer_range
from tmpq_exp.winograd.transform import PointsSpec, Transform, build_transform, parse_points

FLOAT_STAGES: Mapping[str, Any] = {
    "quantize_input": False,
    "quantize_v": False,
    "quantize_u": False,
    "quantize_m": False,
}
"""Keyword arguments of ``WinogradSpec`` that switch every stage off: Winograd in float."""

ALL = 0
"""Group size that puts all channels into one group; ``"all"`` is read as this."""

SHAPED_STAGES = ("u", "v", "m")
"""Stages whose rounding may be shaped."""


class Method(str, Enum):
    """Which elements share a scale, by whose method.

    ``groups``: Pan et al. (CVPR 2025), the layout of this package. ``per_tensor``: one scale a tensor and stage, as
    in plain W8A8 Winograd. ``per_tap``: one scale a tap for U, V and M, with an output transform in float.
    ``bqw_style``: groups, after balancing channels between U and V at every tap, by the formula of Chikin and
    Kryzhanovskiy, "Channel Balancing for Accurate Quantization of Winograd Convolutions" (CVPR 2022).
    ``fsq_style``: groups, with the scale of every tap of M factorised into one for its row and one for its column and
    folded into the transforms, after Chen et al. (NeurIPS 2023). Both ``_style`` methods follow their formulas; their
    full texts were not at hand.
    """

    GROUPS = "groups"
    PER_TENSOR = "per_tensor"
    PER_TAP = "per_tap"
    BQW_STYLE = "bqw_style"
    FSQ_STYLE = "fsq_style"


@dataclass(frozen=True)
class Layout:
    """Which elements of a tensor share a dynamic scale.

    Args:
        channel_dim: Dimension that is cut into groups.
        group_size: Channels of a group, ``ALL`` for one group; a short last group is legal.
        shared_dims: Further dimensions over which a scale is shared.
    """

    channel_dim: int
    group_size: int
    shared_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class WinogradSpec:
    """Which F(m, r) is used, what of it is quantized, to how many bits and with which scales.

    Args:
        m: Outputs of a tile in one dimension, 2..8.
        r: Kernel size, 2..5.
        points: ``"standard"``, ``"improved"`` or n points, as ``parse_points`` reads them.
        group_size: Elements that share a scale, at least 1, or ``ALL`` (also ``"all"``); a short last group is legal.
        quantize_input: Quantize x to ``input_bits``.
        quantize_v: Quantize the transformed input V to ``v_bits``.
        quantize_u: Quantize the transformed weights U to ``u_bits``.
        quantize_m: Quantize the Hadamard product M to ``m_bits`` before the output transform.
        m_bits: 2..16, or ``FLOAT_BITS``.
        input_bits, v_bits: 2..16 or ``FLOAT_BITS``; None takes the layer's ``act_bits``.
        u_bits: Likewise; None takes the layer's ``weight_bits``.
        m_scale: ``"tile"``: all taps of a tile share a scale, as an integer output transform needs. ``"tap"``: every
            tap has its own, in groups of channels; the output transform then runs on floats.
        act_scales: ``"dynamic"``, or ``"static"``: x, V and M have ranges that were measured beforehand. Who runs a
            network by this spec hands them to ``winograd_conv2d``, which goes by what it is given.
        method: A ``Method`` or its name.
        transform_bits: Bits of A_T, G and B_T as integers with one scale a row, 4..16; None leaves them float.
        shaped_stages: Which of ``u``, ``v``, ``m`` round with error feedback, see ``winograd.shaping``.
        pixel_correlation: In [0, 1): correlation of neighbouring pixels that shaping of U assumes.

    Raises:
        ValueError: If a value is out of its range.
    """

    m: int
    r: int = 3
    points: PointsSpec = "standard"
    group_size: int | str = 32
    quantize_input: bool = True
    quantize_v: bool = True
    quantize_u: bool = True
    quantize_m: bool = True
    m_bits: int = 8
    input_bits: int | None = None
    v_bits: int | None = None
    u_bits: int | None = None
    m_scale: str = "tile"
    act_scales: str = "dynamic"
    method: str = Method.GROUPS.value
    transform_bits: int | None = None
    shaped_stages: Sequence[str] = ()
    pixel_correlation: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.points, str):
            object.__setattr__(self, "points", tuple(self.points))
        parse_points(self.points, self.m, self.r)
        object.__setattr__(self, "group_size", _group_size(self.group_size))
        object.__setattr__(self, "method", _method(self.method).value)
        object.__setattr__(self, "shaped_stages", _shaped_stages(self.shaped_stages))
        check_bits("m_bits", self.m_bits)
        for name in ("input_bits", "v_bits", "u_bits"):
            if (bits := getattr(self, name)) is not None:
                check_bits(name, bits)
        if self.m_scale not in ("tile", "tap"):
            raise ValueError(f"m_scale must be tile or tap, found {self.m_scale!r}")
        if self.act_scales not in ("dynamic", "static"):
            raise ValueError(f"act_scales must be dynamic or static, found {self.act_scales!r}")
        if self.transform_bits is not None and self.transform_bits not in range(4, 17):
            raise ValueError(f"transform_bits must be in 4..16 or None for float, found {self.transform_bits!r}")
        if self.method == Method.BQW_STYLE and {"u", "v"} & set(self.shaped_stages):
            raise ValueError(f"shaped_stages of method bqw_style may hold m only, found {self.shaped_stages!r}")
        if not 0 <= self.pixel_correlation < 1:
            raise ValueError(f"pixel_correlation must be in [0, 1), found {self.pixel_correlation!r}")

    @property
    def is_static(self) -> bool:
        """Whether activation scales come from ranges that were measured beforehand."""
        return self.act_scales == "static"

    @property
    def n(self) -> int:
        """Taps of a tile in one dimension, m + r - 1."""
        return self.m + self.r - 1

    @property
    def group_channels(self) -> int:
        """``group_size`` as a number, ``ALL`` for all channels."""
        assert isinstance(self.group_size, int)
        return self.group_size

    @property
    def m_group_channels(self) -> int:
        """Output channels that share a scale of M, together with all n*n taps of their tile."""
        return max(1, self.group_channels // self.n**2) if self.group_channels != ALL else ALL

    def transform(self) -> Transform:
        """The exact transform of this spec."""
        return build_transform(self.m, self.r, self.points)

    def stage_bits(self, stage: str, layer_bits: int) -> int:
        """Bits of a stage of ``input``, ``v``, ``u`` or ``m``; ``FLOAT_BITS`` where it is not quantized.

        Args:
            stage: The stage.
            layer_bits: The layer's ``act_bits`` or ``weight_bits``, for the stages that follow them. A layer at
                ``FLOAT_BITS`` is float in these stages, whatever the spec says.
        """
        if not getattr(self, f"quantize_{stage}"):
            return FLOAT_BITS
        if stage == "m":
            return self.m_bits
        own = getattr(self, f"{stage}_bits")
        return layer_bits if own is None or layer_bits == FLOAT_BITS else int(own)

    def layout(self, stage: str) -> Layout:
        """Dynamic scales of x (B, C, H, W), V (taps, C, B, tiles), U (taps, K, C) or M (taps, K, B, tiles).

        No method lets two images share a dynamic scale, so that an image's result does not depend on its batch.
        """
        channel_dim = 2 if stage == "u" else 1
        if stage == "input":
            return Layout(1, ALL if self.method == Method.PER_TENSOR else self.group_channels, (2, 3))
        if self.method == Method.PER_TENSOR:
            return Layout(channel_dim, ALL, (0, 1) if stage == "u" else (0, 3))
        if self.method == Method.PER_TAP:
            return Layout(channel_dim, ALL, (1,) if stage == "u" else (3,))
        if stage == "m" and self.m_scale == "tile":
            return Layout(1, self.m_group_channels, (0,))
        return Layout(channel_dim, self.group_channels)


def check_bits(name: str, bits: int) -> None:
    """Refuse bits outside 2..16 other than ``FLOAT_BITS``.

    Raises:
        ValueError: Naming the parameter.
    """
    if bits != FLOAT_BITS:
        try:
            integer_range(bits, symmetric=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or {FLOAT_BITS} for float") from None


def _group_size(value: int | str) -> int:
    if value == "all":
        return ALL
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"group_size must be an integer of at least 1, or 0 or 'all' for one group, found {value!r}")
    return value


def _method(value: str) -> Method:
    try:
        return Method(value)
    except ValueError:
        raise ValueError(f"method must be one of {', '.join(m.value for m in Method)}, found {value!r}") from None


def _shaped_stages(stages: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stages, str) or not set(stages) <= set(SHAPED_STAGES):
        raise ValueError(f"shaped_stages must be a list of {', '.join(SHAPED_STAGES)}, found {stages!r}")
    return tuple(stage for stage in SHAPED_STAGES if stage in stages)
