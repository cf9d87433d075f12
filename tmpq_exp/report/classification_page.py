"""The report of ``task=classify`` as one HTML file: table, accuracy against cost, learning, and SQNR of every layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tmpq_exp.files import replace_file
from tmpq_exp.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, frame
from tmpq_exp.report.classification import all_rows, calibration_note, float_top1, points_lost, validate_classification
from tmpq_exp.report.content import plain
from tmpq_exp.report.page import stage_bars, template
from tmpq_exp.report.winograd import winograd_pictures

_DODGE = 9.0
"""Distance in the drawing of marks that cost the same."""


_NAME_WIDTH = 50.0
"""Distance in the drawing of tiles' names."""


_SHOWN_POINTS = 12.0
"""Percentage points below the highest top-1 that the chart shows to scale."""


def classification_html(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write the report of a comparison as one self-contained HTML file.

    Args:
        path: File to write or replace.
        report: Content of ``report.json``, see ``tmpq_exp.report.classification``.

    Raises:
        ValueError: If a documented key is missing.
    """
    validate_classification(report)
    content = plain(report)
    context = {
        "report": content,
        "float_top1": float_top1(content),
        "rows": [{**entry, "lost": points_lost(content, entry)} for entry in all_rows(content)],
        "best": _best(content),
        "calibration_note": calibration_note(content),
        "chart": accuracy_chart(all_rows(content)),
        "learning": [_learning(entry) for entry in content["learning"] if len(entry["curve_db"]) > 1],
        "layers": _layers(content),
        "layer_chart": layer_chart(content),
        "winograd": winograd_pictures(content),
        "stages": stage_bars(content["stages"]),
    }
    replace_file(path, template("classification.html").render(context).encode())


def _best(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The Winograd row that saves most of those inside float's interval, among equals that of the highest SQNR.

    Where none is inside, that of the highest top-1. The highest top-1 alone would pick by luck.
    """
    winograd = [entry for entry in all_rows(report) if entry["m"] is not None]
    floor = next(entry["top1_interval"][0] for entry in report["classification"] if entry["name"] == "float")
    inside = [entry for entry in winograd if entry["top1"] >= floor]
    if not inside:
        best = max(winograd, key=lambda entry: float(entry["top1"]), default=None)
    else:
        best = max(inside, key=lambda entry: (entry["multiplications_ratio"], entry["sqnr_db"] or 0.0))
    return None if best is None else {**best, "lost": points_lost(report, best), "is_inside": bool(inside)}


def accuracy_chart(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Top-1 with its interval against how many times fewer multiplications a row takes.

    Rows that cost the same stand side by side around their cost. Rows far below float, which would press all others
    together, are arrows at the lower edge with their value.
    """
    lowest = max(entry["top1"] for entry in entries) - _SHOWN_POINTS
    ratios = [entry["multiplications_ratio"] for entry in entries]
    x = Axis.around(ratios, LEFT + 20, RIGHT - 20)
    shown = [entry for entry in entries if entry["top1"] >= lowest]
    y = Axis.around([value for entry in shown for value in entry["top1_interval"]], BOTTOM, TOP)
    y = Axis(max(0.0, y.low), min(100.0, y.high), y.start, y.end)
    marks = []
    for entry, ratio in zip(entries, ratios, strict=True):
        same = [other["name"] for other in entries if other["multiplications_ratio"] == ratio]
        offset = (same.index(entry["name"]) - (len(same) - 1) / 2) * _DODGE
        low, high = entry["top1_interval"]
        marks.append(
            {
                "x": round(x.at(ratio) + offset, 1),
                "y": y.at(entry["top1"]) if entry["top1"] >= lowest else BOTTOM - 8,
                "below": None if entry["top1"] >= lowest else f"{entry['top1']:.1f}",
                "low": y.at(max(low, y.low)),
                "high": y.at(min(high, y.high)),
                "kind": _kind(entry),
                "improved": entry["points"] not in (None, "standard"),
                "title": f"{entry['name']}: {entry['top1']:.2f} % [{low:.2f}, {high:.2f}], {ratio:.2f}x fewer",
            }
        )
    tiles = [
        (x.at(entry["multiplications_ratio"]), f"F({entry['m']},3)" if entry["m"] else "direct") for entry in entries
    ]
    return {**frame(x, y), "right": RIGHT, "marks": marks, "names": _names(tiles)}


def _names(tiles: Sequence[tuple[float, str]]) -> list[dict[str, Any]]:
    """Tiles above the chart, those that stand too close to each other in one name."""
    names: list[dict[str, Any]] = []
    for at, text in sorted(set(tiles)):
        if names and at - names[-1]["x"] < _NAME_WIDTH:
            names[-1]["text"] += "" if text in names[-1]["text"] else f", {text}"
        else:
            names.append({"x": at, "text": text})
    return names


def _kind(entry: Mapping[str, Any]) -> str:
    if entry["m"] is None:
        return "float" if entry["name"] == "float" else "direct"
    is_plain = entry["name"] == f"f{entry['m']}_{entry['points']}_{entry['scales']}"
    return str(entry["scales"]) if is_plain else "further"


def _learning(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A curve of learning with the held-out figures of closed form and learned scales as lines."""
    curve, held_out = entry["curve_db"], entry["held_out_sqnr_db"]
    shown = [held_out[kind] for kind in ("closed_form", "learned")]
    x = Axis.around([1.0, float(len(curve))], LEFT, RIGHT)
    y = Axis.around([value for value in (*curve, *shown) if value is not None], BOTTOM, TOP)
    points = [f"{x.at(step)} {y.at(value)}" for step, value in enumerate(curve, 1) if value is not None]
    return {
        **frame(x, y),
        "title": entry["name"],
        "kept": entry["kept"],
        "held_out": held_out,
        "noise": entry["noise"],
        "path": "M" + "L".join(points) if points else "",
        "lines": [
            {"at": y.at(value), "kind": kind}
            for kind, value in zip(("closed_form", "learned"), shown, strict=True)
            if value is not None
        ],
    }


def _layers(report: Mapping[str, Any]) -> dict[str, Any]:
    """SQNR of every eligible layer, a column a row of the comparison."""
    columns = [detail for detail in report["details"] if detail["layer_sqnr_db"]]
    names = list(dict.fromkeys(name for column in columns for name in column["layer_sqnr_db"]))
    return {
        "columns": [column["name"] for column in columns],
        "rows": [{"name": n, "values": [column["layer_sqnr_db"].get(n) for column in columns]} for n in names],
    }


def layer_chart(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """SQNR of the eligible layers from the first to the last: direct, and every tile with its closed form."""
    kinds = {entry["name"]: (_kind(entry), entry) for entry in all_rows(report)}
    shown = [d for d in report["details"] if d["layer_sqnr_db"] and kinds[d["name"]][0] in ("direct", "closed_form")]
    values = [value for detail in shown for value in detail["layer_sqnr_db"].values()]
    if not values:
        return None
    x = Axis.around([1.0, float(max(len(detail["layer_sqnr_db"]) for detail in shown))], LEFT, RIGHT - 96)
    y = Axis.around(values, BOTTOM, TOP)
    lines = []
    for detail in shown:
        entry = kinds[detail["name"]][1]
        layers = list(detail["layer_sqnr_db"].items())
        tile = "direct W8A8" if entry["m"] is None else f"F({entry['m']},3) {entry['points']}"
        marks = [
            {"x": x.at(i), "y": y.at(value), "title": f"{name}, {tile}: {value:.1f} dB"}
            for i, (name, value) in enumerate(layers, 1)
        ]
        lines.append({"tile": tile, "m": entry["m"] or 0, "points": entry["points"], "marks": marks})
    return {**frame(x, y), "lines": lines}
