"""What the page knows of every drawn candidate, for the one whose mark is clicked: figures, bits and timesteps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.report.charts import heat_colours
from tmpq_exp.report.content import number
from tmpq_exp.report.points import Point, SearchView
from tmpq_exp.report.winograd import by_block

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Bits and tiles of a candidate are strings with one of these for each layer; 32 bits, float, are ``w``."""


def candidate_data(view: SearchView, records: Iterable[Mapping[str, Any]], report: Mapping[str, Any]) -> dict[str, Any]:
    """Data that ``page.js`` draws a candidate from.

    Args:
        view: Points that the charts draw.
        records: The records they come from.
        report: Content of ``report.json``.

    Returns:
        ``layers``, ``weighted``, ``blocks`` (name and indices of its layers), ``palette`` (bits -> colours),
        ``last`` (the largest timestep), ``best`` (the trial that is marked), and ``candidates`` by the number of
        their trial. A candidate of another network's layers, or of none, has timesteps alone.
    """
    layers = report["best"]["layers"]
    by_index = {record["index"]: record for record in records}
    points = {point.index: point for point in (*view.searched, *view.baselines)}
    candidates = {
        index: _candidate(point, by_index[index], view.metric, len(layers)) for index, point in points.items()
    }
    widths = {DIGITS.index(digit) for c in candidates.values() for row in (*c["w"], *c["a"]) for digit in row}
    ceiling = max({8, *widths} - {FLOAT_BITS})
    return {
        "layers": layers,
        "weighted": report["best"]["weighted"],
        "blocks": list(by_block(layers).items()),
        "palette": {bits: shade(bits, ceiling) for bits in sorted(widths)},
        "last": max(1, report["num_train_timesteps"] - 1),
        "best": None if view.best is None else view.best.index,
        "candidates": candidates,
    }


def embedded_json(data: Mapping[str, Any]) -> Markup:
    """JSON that may stand inside a ``script`` element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def shade(bits: int, ceiling: int) -> dict[str, str]:
    """Fill of a cell, light for few bits and dark for ``ceiling`` bits, the ink readable on it, and its text."""
    if bits == FLOAT_BITS:
        return {"fill": "#98a2b3", "ink": "#101828", "text": "fp"}
    return {**heat_colours((bits - 2) / (ceiling - 2)), "text": str(bits)}


def _candidate(point: Point, record: Mapping[str, Any], metric: str, num_layers: int) -> dict[str, Any]:
    candidate = record.get("candidate") or {}
    allocations = [a for a in candidate.get("allocations", ()) if len(a["weight_bits"]) == num_layers]
    figures = [f"{metric} {point.value:.4g}", f"{point.bitops / 1e9:,.2f} GBitOPs", f"{point.num_steps} steps"]
    psnr = (record.get("metrics") or {}).get("psnr_db")
    if psnr is not None:
        figures.append(f"PSNR {number(psnr, 1)} dB")
    if allocations:
        means = [_mean([bits for a in allocations for bits in a[name]]) for name in ("weight_bits", "act_bits")]
        figures.append(f"bits W / A {means[0]:.1f} / {means[1]:.1f}")
    if record.get("generation") is not None:
        figures.append(f"generation {record['generation']}")
    tiles = [_digits(a["tiles"]) for a in allocations]
    return {
        "name": point.label or f"Candidate {point.index}",
        "figures": figures,
        "timesteps": list(candidate.get("timesteps", ())),
        "w": [_digits(a["weight_bits"]) for a in allocations],
        "a": [_digits(a["act_bits"]) for a in allocations],
        "tiles": tiles if any(row.strip("0") for row in tiles) else [],
    }


def _digits(values: Sequence[int]) -> str:
    return "".join(DIGITS[value] for value in values)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
