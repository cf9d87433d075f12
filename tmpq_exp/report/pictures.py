"""The two picture files of a run: the search as a scatter of trials, and sample images side by side."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from tmpq_exp.data import to_uint8
from tmpq_exp.files import replace_file
from tmpq_exp.report.content import higher_is_better
from tmpq_exp.report.points import SearchView, search_view, spread

LOG_SPREAD = 3.0
"""A quality axis becomes logarithmic when its largest value is this many times its smallest."""

_INK, _MUTED, _GRID = "#1c2430", "#667085", "#e4e7ec"
_TRIAL, _BEST, _FLOAT, _UNIFORM = "#5b8def", "#d9480f", "#087f5b", "#6741d9"


def pareto_png(
    path: str | os.PathLike[str],
    trials: Iterable[Mapping[str, Any]],
    *,
    metric: str,
    budget_bitops: int | None = None,
    budget_name: str = "budget",
    best_key: str | None = None,
    fingerprint: str | None = None,
) -> None:
    """Draw quality against BitOPs of every search trial, and how the search went.

    Args:
        path: PNG file to write.
        trials: Records of ``trials.jsonl``; the phases ``search`` and ``baseline`` are drawn.
        metric: Name of the quality metric.
        budget_bitops: The most BitOPs a candidate may cost; None draws no line.
        budget_name: Name of the budget.
        best_key: Content hash of the candidate to mark; None marks the best within the budget.
        fingerprint: The fingerprint the trials must have; None accepts any single one.

    Raises:
        ValueError: If the trials mix fingerprints.
    """
    view = search_view(
        trials,
        metric=metric,
        budget_bitops=budget_bitops,
        budget_name=budget_name,
        best_key=best_key,
        fingerprint=fingerprint,
    )
    figure = Figure(figsize=(11.0, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_trials(left, view)
    _draw_progress(right, view)
    for axes in (left, right):
        _plain_axes(axes)
    if view.searched:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    replace_file(path, data.getvalue())


def _draw_trials(axes: Axes, view: SearchView) -> None:
    axes.set_title("Quality against cost, search seeds", loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("GBitOPs of one image, whole trajectory", color=_MUTED)
    axes.set_ylabel(_quality_label(view.metric), color=_MUTED)
    if not view.searched:
        axes.text(0.5, 0.5, "no candidate has been scored", ha="center", transform=axes.transAxes, color=_MUTED)
        return
    x, y = [p.bitops / 1e9 for p in view.searched], [p.value for p in view.searched]
    axes.scatter(x, y, s=26, color=_TRIAL, alpha=0.45, linewidths=0, label=f"{len(x)} candidates")
    axes.plot(
        [p.bitops / 1e9 for p in view.front], [p.value for p in view.front],
        color=_TRIAL, linewidth=1.6, marker="o", markersize=4, drawstyle="steps-post", label="front",
    )  # fmt: skip
    for point in view.baselines:
        colour = _FLOAT if point.is_float else _UNIFORM
        if view.is_costly(point):
            axes.axhline(point.value, color=colour, linewidth=1.1, linestyle=(0, (5, 3)))
        else:
            axes.scatter([point.bitops / 1e9], [point.value], s=62, marker="D", color=colour, zorder=4)
            axes.annotate(point.label, (point.bitops / 1e9, point.value), (-9, 5), textcoords="offset points",
                          ha="right", color=colour, fontsize=9, fontweight="bold")  # fmt: skip
    if view.budget_bitops is not None:
        axes.axvline(view.budget_bitops / 1e9, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)),
                     label=f"budget ({view.budget_name})")  # fmt: skip
    if view.best is not None:
        axes.scatter([view.best.bitops / 1e9], [view.best.value], s=230, marker="*", color=_BEST, zorder=5,
                     edgecolors="white", linewidths=1, label="best found")  # fmt: skip
    _scale_quality(axes, [*y, *(p.value for p in view.baselines)])
    low, high = view.cost_range()
    room = 0.08 * (high - low)
    axes.set_xlim(low - room, high + room)
    _name_lines(axes, view)


def _name_lines(axes: Axes, view: SearchView) -> None:
    """Names of the costly baselines right of the axes, moved apart where their lines are close."""
    points = [point for point in view.baselines if view.is_costly(point)]
    axes.get_ylim()  # settles the limits, which the transform below reads as they are
    to_shares = axes.transData + axes.transAxes.inverted()
    shares = [float(to_shares.transform((0.0, point.value))[1]) for point in points]
    for point, share in zip(points, spread(shares, 0.045), strict=True):
        text = f"{point.label}, {point.bitops / 1e9:,.0f} G"
        axes.text(1.01, share, text, transform=axes.transAxes, va="center", fontsize=8.5,
                  color=_FLOAT if point.is_float else _UNIFORM)  # fmt: skip


def _draw_progress(axes: Axes, view: SearchView) -> None:
    axes.set_title("Search progress", loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("candidates scored", color=_MUTED)
    axes.set_ylabel(f"{view.metric}, best so far", color=_MUTED)
    known = [(index, value) for index, value in enumerate(view.progress, 1) if math.isfinite(value)]
    if not known:
        axes.text(0.5, 0.5, "no candidate within the budget yet", ha="center", transform=axes.transAxes, color=_MUTED)
        return
    x, y = [index for index, _ in known], [value for _, value in known]
    axes.scatter(range(1, len(view.searched) + 1), [p.value for p in view.searched], s=12, color=_TRIAL, alpha=0.35,
                 linewidths=0)  # fmt: skip
    axes.plot(x, y, color=_BEST, linewidth=2, drawstyle="steps-post")
    axes.annotate(f"{y[-1]:.4g}", (x[-1], y[-1]), (0, -13), textcoords="offset points", ha="right", color=_BEST,
                  fontsize=9, fontweight="bold")  # fmt: skip
    _scale_quality(axes, [p.value for p in view.searched])
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _quality_label(metric: str) -> str:
    return f"{metric} ({'higher' if higher_is_better(metric) else 'lower'} is better)"


def is_log_scale(values: Sequence[float]) -> bool:
    """Whether a quality axis over these values should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_SPREAD


def _scale_quality(axes: Axes, values: Sequence[float]) -> None:
    if is_log_scale(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()


def _plain_axes(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def byte_images(images: Any, name: str = "images") -> npt.NDArray[np.uint8]:
    """Images as rounded bytes with channels last.

    Args:
        images: Array or tensor (N, C, H, W) with C 1 or 3, floats in [0, 1]. Pixels that are not finite become black.
        name: What to call the images in an error.

    Returns:
        Array (N, H, W, 3).

    Raises:
        ValueError: If the shape or the range is another.
    """
    array = np.asarray(images.detach().cpu().float().numpy() if hasattr(images, "detach") else images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{name} must have the shape (N, C, H, W) with C 1 or 3, found {array.shape}")
    array = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{name} must lie in [0, 1], found {array.min():.3g} to {array.max():.3g}")
    pixels: npt.NDArray[np.uint8] = to_uint8(torch.from_numpy(array)).numpy()
    return np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:])).transpose(0, 2, 3, 1).copy()


def sample_rows(rows: Sequence[tuple[str, Any]], max_columns: int) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Labelled rows of byte images, all with the same number of columns and the same size.

    Args:
        rows: Labels and images (N, C, H, W) in [0, 1]; image i of every row started from the same seed.
        max_columns: Most images to take of a row, at least 1.

    Returns:
        Labels and arrays (columns, H, W, 3).

    Raises:
        ValueError: If there is no row, or the rows differ in number or size of their images.
    """
    if not rows:
        raise ValueError("rows must hold at least one pair of a label and images, found none")
    pixels = [(label, byte_images(images, f"images of {label!r}")) for label, images in rows]
    shapes = {label: array.shape[:3] for label, array in pixels}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all rows must have as many images of one size, found (N, H, W) = {shapes}")
    return [(label, array[:max_columns]) for label, array in pixels]


def samples_png(path: str | os.PathLike[str], rows: Sequence[tuple[str, Any]], *, max_columns: int = 12) -> None:
    """Draw labelled rows of images, one seed a column.

    Args:
        path: PNG file to write.
        rows: Labels and images (N, C, H, W) with C 1 or 3 in [0, 1], enlarged by whole factors without smoothing.
        max_columns: Most images to take of a row, at least 1.

    Raises:
        ValueError: If there is no row, or shapes or ranges are wrong.
    """
    pixels = sample_rows(rows, max_columns)
    count, height, width, _ = pixels[0][1].shape
    zoom = max(1, round(72 / max(height, width)))
    height, width, gap, margin = height * zoom, width * zoom, 6, 18
    font = ImageFont.load_default(size=17)
    label_width = math.ceil(max(font.getlength(label) for label, _ in pixels)) + margin
    size = (margin * 2 + label_width + count * (width + gap) - gap, margin * 2 + len(pixels) * (height + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(pixels):
        top = margin + row * (height + gap)
        draw.text((margin, top + height // 2), label, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + label_width + column * (width + gap), top))
    replace_file(path, png_bytes(canvas))


def png_bytes(image: Image.Image) -> bytes:
    """The image as an encoded PNG."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()
