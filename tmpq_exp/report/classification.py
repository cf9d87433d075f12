"""The content of ``report.json`` of ``task=classify``: its documented keys, their check, and the terminal table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tmpq_exp.report.content import number, plain, require
from tmpq_exp.rundir import write_json

SCHEMA = 2
"""Version of the keys below; it rises when a key changes its meaning or goes away."""

CLASSIFICATION_REPORT_KEYS: Mapping[str, str] = {
    "schema": "version of this layout, an integer",
    "task": "always classify",
    "model": "name of the classifier",
    "weights_hash": "content hash of its weights",
    "data": "{name, num_classes, resize, crop, mean, std, calibration}: the images and what was done to them; "
    "calibration is {name, num_images, fingerprint, rows}, the images behind the static scales of these rows, or null",
    "num_images": "images that every row was measured on",
    "fingerprint": "hash of everything that top-1 depends on beside the row: images, weights, batch size, threads, ...",
    "classification": "one element a row, see CLASSIFICATION_ENTRY_KEYS",
    "further_rows": "the same of rows of classification.further, which have names of their own",
    "details": "one element a row of both, in the same order, see CLASSIFICATION_DETAIL_KEYS",
    "winograd": "one element a tile and set of points: m, points, eligible_layers, ineligible_layers, sqnr_db",
    "learning": "one element a set of scales that was learned, see LEARNING_KEYS",
    "stages": "seconds of wall time, by name of the stage",
    "environment": "command, commit, versions and hardware",
    "seed": "seed of noise and learning",
}
"""Top-level keys and their meaning."""

CLASSIFICATION_ENTRY_KEYS: Mapping[str, str] = {
    "name": "float, direct_w8a8 or f{m}_{points}_{scales}; of a further row a name of classification.further",
    "m": "outputs of F(m, 3) in one dimension; null where all layers are direct",
    "points": "standard, improved, or a list; null where all layers are direct",
    "scales": "standard, closed_form or learned; null where all layers are direct",
    "top1": "share of images whose class is found, in percent",
    "top1_interval": "[low, high]: Wilson's 95 % interval of top1 over images, in percent",
    "sqnr_db": "median over eligible layers of the SQNR in dB on unit Gaussian input; null for float and static scales",
    "multiplications_ratio": "multiplications of the direct network over this one's, border tiles whole, without "
    "transforms, with error feedback",
}
"""Keys of a row."""

CLASSIFICATION_DETAIL_KEYS: Mapping[str, str] = {
    "name": "of the row",
    "macs": "multiply-accumulates of one image, transforms included",
    "bitops": "bit operations of one image, transforms included",
    "weight_bytes": "bytes of the weights, in the Winograd domain where they are used there",
    "layer_sqnr_db": "SQNR in dB by name of the eligible layer",
    "spec": "the Winograd convolution in full; null where all layers are direct",
}
"""Keys of a row's details."""

LEARNING_KEYS: Mapping[str, str] = {
    "name": "row that the scales were learned for",
    "m": "outputs of F(m, 3) in one dimension",
    "points": "interpolation points",
    "noise": "kind of noise",
    "kept": "learned or closed_form, whichever is better on held-out noise; per_layer where layers differ",
    "held_out_sqnr_db": "{standard, closed_form, learned, kept}: median of layers in dB, on noise not learned from",
    "curve_db": "SQNR in dB of every step",
}
"""Keys of a set of learned scales."""


def validate_classification(report: Mapping[str, Any]) -> None:
    """Check that a report has every documented key.

    Raises:
        ValueError: If a key is missing or the schema is another; the message gives its full path.
    """
    require(report, CLASSIFICATION_REPORT_KEYS, "report")
    if report["schema"] != SCHEMA:
        raise ValueError(f"report.schema must be {SCHEMA}, found {report['schema']!r}")
    lists = {
        "classification": CLASSIFICATION_ENTRY_KEYS,
        "further_rows": CLASSIFICATION_ENTRY_KEYS,
        "details": CLASSIFICATION_DETAIL_KEYS,
        "learning": LEARNING_KEYS,
    }
    for kind, keys in lists.items():
        for index, entry in enumerate(report[kind]):
            require(entry, keys, f"report.{kind}[{index}]")
    names = [entry["name"] for entry in report["classification"]]
    if "float" not in names:
        raise ValueError(f"report.classification must have a row named 'float', found {names}")


def write_classification_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Check a report and write it atomically as strict JSON.

    Raises:
        ValueError: If a documented key is missing; nothing is written.
    """
    validate_classification(report)
    write_json(Path(path), plain(report))


def all_rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All that was evaluated, in order: the rows of ``classification`` and the further ones."""
    return [*report["classification"], *report["further_rows"]]


def float_top1(report: Mapping[str, Any]) -> float:
    """Top-1 of the float network in percent."""
    return next(float(entry["top1"]) for entry in report["classification"] if entry["name"] == "float")


def points_lost(report: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """How much a row gains or loses against float, in percentage points with a sign; a dash for float itself."""
    return "-" if entry["name"] == "float" else f"{entry['top1'] - float_top1(report):+.2f}"


def calibration_note(report: Mapping[str, Any]) -> str:
    """Which rows have static activation scales, and from which images, behind a space; empty if all are dynamic."""
    calibration = report["data"].get("calibration")
    if calibration is None:
        return ""
    images = f"{calibration['num_images']:,} images of {calibration['name']}"
    return f" Activation scales are static, from {images}, in {', '.join(calibration['rows'])}."


def classification_table(report: Mapping[str, Any]) -> Table:
    """All rows as a table for the terminal.

    Raises:
        ValueError: If a documented key is missing.
    """
    validate_classification(report)
    caption = (
        f"{report['num_images']:,} images of {report['data']['name']}. SQNR: unit Gaussian input, median of layers. "
        f"Quantization is simulated: multiplications are counted, not timed.{calibration_note(report)}"
    )
    table = Table(title=str(report["model"]), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding, table.collapse_padding = (0, 1), True
    table.add_column("", no_wrap=True)
    for heading in ("top-1 %", "95 % interval", "to float", "SQNR dB", "mult."):
        table.add_column(heading, justify="right", no_wrap=True)
    entries = all_rows(report)
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        low, high = entry["top1_interval"]
        table.add_row(
            entry["name"],
            number(entry["top1"]),
            f"{low:.2f}..{high:.2f}",
            points_lost(report, entry),
            number(entry["sqnr_db"], 1),
            f"{entry['multiplications_ratio']:.2f}x",
            end_section=after is not None and (entry["m"], entry["points"]) != (after["m"], after["points"]),
        )
    return table
