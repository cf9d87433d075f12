"""What the page draws of Winograd: ranges of M over the taps, SQNR of every layer and stage, learning of the scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tmpq_exp.report.charts import curve_chart, heat_colours

STAGE_LABELS = {"input": "x", "v": "V", "u": "U", "m": "M", "all": "all"}
"""Stages as they are called on the page, in the order of the computation."""

TOP_DB = 50.0
"""SQNR of the darkest cell."""

DEEPEST_RATIO = 1e-3
"""Range, over the largest of its map, of the lightest cell."""


def winograd_pictures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pictures of every examined tile; those that a report of an earlier version has no figures for are left out.

    Args:
        report: Content of ``report.json``, with only JSON's own types.

    Returns:
        By tile ``m``: ``label``, ``maps`` (title and cells, before and after scaling), ``stages`` (groups of one
        block: rows of a stage, cells of a layer) and ``curve`` (of learning); empty lists and None for what is missing.
    """
    return [
        {
            "m": tile["m"],
            "label": f"F({tile['m']}, 3)" + _points(tile, report["winograd"]),
            "maps": _maps(tile.get("range_map", {}), tile.get("kept", "")),
            "stages": _stage_groups(tile["eligible_layers"], tile["stage_sqnr_db"]) if "stage_sqnr_db" in tile else [],
            "curve": _curve(tile),
        }
        for tile in report["winograd"]
    ]


def _points(tile: Mapping[str, Any], tiles: Sequence[Mapping[str, Any]]) -> str:
    """The tile's points, where others of its size have other ones."""
    if sum(other["m"] == tile["m"] for other in tiles) < 2:
        return ""
    return f", {tile['points']} points"


def layer_block(name: str) -> str:
    """Block of the network that a layer belongs to: ``down_blocks.0``, ``mid_block``, a ResNet's ``layer1``."""
    head, _, rest = name.partition(".")
    if re.fullmatch(r"layer\d+", head):
        return head
    position = rest.partition(".")[0]
    if "block" not in head:
        return "input, embedding, output"
    return f"{head}.{position}" if position.isdigit() else head


def by_block(names: Sequence[str]) -> dict[str, list[int]]:
    """Block -> indices of its layers, in the order of the network."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(layer_block(name), []).append(index)
    return groups


def _maps(maps: Mapping[str, Sequence[Sequence[float]]], kept: str) -> list[dict[str, Any]]:
    how = {"closed_form": "closed form", "learned": "learned", "per_layer": "own per layer"}
    said = {"standard": "standard", "kept": how.get(kept, kept)}
    return [_map(said[name], maps[name]) for name in ("standard", "kept") if name in maps]


def _map(title: str, values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One map over n x n taps, shaded by the logarithm of each range over the largest."""
    largest = max(max(row) for row in values)
    smallest = min(min(row) for row in values)
    cells = [
        {
            "x": x,
            "y": y,
            "title": f"tap ({y}, {x}): {value / largest:.3g} of the largest",
            **heat_colours(1 - _decades(value / largest) / _decades(DEEPEST_RATIO)),
        }
        for y, row in enumerate(values)
        for x, value in enumerate(row)
    ]
    return {"title": title, "ratio": largest / smallest, "n": len(values), "cells": cells}


def _decades(ratio: float) -> float:
    return -math.log10(max(ratio, DEEPEST_RATIO))


def _stage_groups(names: Sequence[str], by_stage: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    stages = [stage for stage in STAGE_LABELS if stage in by_stage]
    return [
        {
            "block": block,
            "rows": [
                {
                    "label": STAGE_LABELS[stage],
                    "cells": [_stage_cell(names[i], STAGE_LABELS[stage], by_stage[stage][i]) for i in indices],
                }
                for stage in stages
            ],
        }
        for block, indices in by_block(names).items()
    ]


def _stage_cell(name: str, stage: str, value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "-", "title": f"{name}: {stage} exact", **heat_colours(1.0)}
    what = "all stages" if stage == "all" else f"{stage} alone"
    return {"text": f"{min(value, 99):.0f}", "title": f"{name}: {value:.1f} dB, {what}", **heat_colours(value / TOP_DB)}


def _curve(tile: Mapping[str, Any]) -> dict[str, Any] | None:
    values = tile.get("curve_db", [])
    if len(values) < 2 or any(value is None for value in values):
        return None
    return curve_chart(values)
