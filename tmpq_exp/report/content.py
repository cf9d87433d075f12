"""The content of ``report.json``: its documented keys, their check, the file and the terminal table.

The four ``*_KEYS`` tables below are the schema. A report may carry more keys than they name, never fewer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

from tmpq_exp.files import replace_file
from tmpq_exp.metrics.names import higher_is_better as higher_is_better

SCHEMA = 1
"""Version of the keys below; it rises when a key changes its meaning or goes away."""

REPORT_KEYS: Mapping[str, str] = {
    "schema": "version of this layout, an integer",
    "model": "name of the compressed model",
    "fingerprint": "{search, final}: hash of everything that a quality figure depends on, for either set of seeds",
    "metric": "name of the quality metric the search minimised or maximised",
    "further": "[{name, higher_is_better, fingerprint, fingerprint_parts}]: metrics reported beside it",
    "num_train_timesteps": "length T of the training schedule; timesteps lie in 0..T-1",
    "budget": "{bitops, name}: the most BitOPs a candidate may cost, and the baseline it comes from",
    "baselines": "entries float_reference, float_k, w8a8 and w6a6 on the final seeds",
    "best": "entry of the model that is shipped on the final seeds, plus metrics_supernet, candidate, layers, weighted",
    "front": "entries that no other one beats in both quality and BitOPs",
    "calibration": "[{unit, bits, loss_before, loss_after}]: squared output error of every block; empty for ranges",
    "winograd": "one element a tile, see WINOGRAD_KEYS; empty if no tile was examined",
    "search": "see SEARCH_KEYS",
    "evidence": "how far the search's figures can be trusted, see EVIDENCE_KEYS",
    "stages": "seconds of wall time, by name of the stage",
    "warnings": "sentences that a reader of the figures must know",
}
"""Top-level keys of a report and their meaning."""

ENTRY_KEYS: Mapping[str, str] = {
    "name": "identifier of the entry",
    "timesteps": "kept timesteps, integers in 0..T-1, in sampling order",
    "bits": "{weight_bits_mean, act_bits_mean, label}: summary of the allocation, means in bits",
    "bitops": "bit operations of the whole trajectory of one image, guidance included",
    "hadamard_bitops": "bitops without the transforms of Winograd layers",
    "macs": "multiply-accumulates of the whole trajectory of one image, guidance included",
    "multiplications": "macs without the transforms of Winograd layers",
    "weight_bytes": "bytes of the weights at their bit widths, scales excluded",
    "metrics": "name -> value or null; null where a value is not defined or not finite",
    "intervals": "name -> [low, high]: 95 % bootstrap interval over images of a metric; empty where not asked for",
    "num_images": "images the metrics were measured on",
    "seed": "seed those images started from",
    "fingerprint": "hash of everything that its quality figures depend on; figures compare under one hash",
    "further": "further metric -> its own fingerprint; empty where none was measured",
}
"""Keys of an entry (a baseline, the best, a member of the front)."""

BEST_KEYS: Mapping[str, str] = {
    "metrics_supernet": "metrics of the same candidate inside the supernet, before it was specialized",
    "recalibration": "null, or {shipped, selection, metrics_recalibrated}: the candidate calibrated for its own bits",
    "candidate": "{timesteps, allocations}: the candidate itself, as in the recipe",
    "layers": "names of the quantized layers in the order of the allocation",
    "weighted": "one boolean a layer: false for attention products, which have no weights",
}
"""Keys that the best entry has on top of ``ENTRY_KEYS``."""

WINOGRAD_KEYS: Mapping[str, str] = {
    "m": "outputs per tile and dimension of F(m, r)",
    "points": "interpolation points",
    "eligible_layers": "names of the layers that the tile fits, or their number",
    "ineligible_layers": "[{name, reason}]: layers that stay direct",
    "sqnr_db": "{standard, closed_form, learned}: dB or null, all stages int8, unit Gaussian input, median of layers",
}
"""Keys of one element of ``winograd``."""

SEARCH_KEYS: Mapping[str, str] = {
    "metric": "what candidates were ranked by: the metric, or <metric>_controlled with the control variate",
    "num_evaluations": "distinct candidates that were scored",
    "stop_reason": "why the search ended",
    "seconds": "wall time of the search in seconds",
}
"""Keys of ``search``."""

EVIDENCE_KEYS: Mapping[str, str] = {
    "seeds": "{search, selection, final}: seeds of the image streams; no two are the same",
    "score_noise": "the best found's score on its own seed and on others, with intervals over images and over seeds",
    "rank_correlation": "[{between, tau, p_value, num_candidates}]: Kendall's tau between two scores of candidates",
    "progress": "{search, random}: best score after each evaluation, of the search and of a random search beside it",
}
"""Keys of ``evidence``."""

BASELINE_NAMES = ("float_reference", "float_k", "w8a8", "w6a6")
"""Baselines that every report has, in the order of the table."""

SPACINGS = ("quadratic", "leading", "trailing")
"""Schedules of further baselines, in their names behind the bits; the others have the model's own, mostly quadratic."""

REFERENCE = "reference"
"""Ends the name of a baseline at the float reference's timesteps."""

TILE_RULE = "winograd_rule"
"""Name of the baseline whose tiles the data-free rule chose."""


def validate_report(report: Mapping[str, Any]) -> None:
    """Check that a report has every documented key.

    Args:
        report: Content of a ``report.json``; keys beyond the documented ones are accepted.

    Raises:
        ValueError: If a key or a baseline is missing, the schema is another, or a cost or mean bits are no number above
            0; the message gives the full path.
    """
    require(report, REPORT_KEYS, "report")
    if report["schema"] != SCHEMA:
        raise ValueError(f"report.schema must be {SCHEMA}, found {report['schema']!r}")
    require(report["fingerprint"], ("search", "final"), "report.fingerprint")
    require(report["budget"], ("bitops", "name"), "report.budget")
    require(report["search"], SEARCH_KEYS, "report.search")
    require(report["evidence"], EVIDENCE_KEYS, "report.evidence")
    require(report["best"], (*ENTRY_KEYS, *BEST_KEYS), "report.best")
    names = [entry.get("name") for entry in report["baselines"]]
    for name in BASELINE_NAMES:
        if name not in names:
            raise ValueError(f"report.baselines must have an entry named {name!r}, found {names}")
    for place, entry in _entries(report):
        require(entry, ENTRY_KEYS, place)
        require(entry["bits"], ("weight_bits_mean", "act_bits_mean", "label"), f"{place}.bits")
        require(entry["metrics"], (report["metric"],), f"{place}.metrics")
        _require_positive(entry, ("bitops",), place)
        _require_positive(entry["bits"], ("weight_bits_mean", "act_bits_mean"), f"{place}.bits")
    _refuse_mixed_fingerprints(report)
    for index, tile in enumerate(report["winograd"]):
        require(tile, WINOGRAD_KEYS, f"report.winograd[{index}]")
        require(tile["sqnr_db"], ("standard", "closed_form", "learned"), f"report.winograd[{index}].sqnr_db")
        for layer in tile["ineligible_layers"]:
            require(layer, ("name", "reason"), f"report.winograd[{index}].ineligible_layers")


def _refuse_mixed_fingerprints(report: Mapping[str, Any]) -> None:
    """Every figure of a table was measured as the others of its column."""
    further = {metric["name"]: metric["fingerprint"] for metric in report["further"]}
    for place, entry in _entries(report):
        is_front = place.startswith("report.front")
        expected = report["fingerprint"]["search" if is_front else "final"]
        if entry["fingerprint"] != expected:
            raise ValueError(
                f"{place}.fingerprint must be {expected!r} as of all figures beside it, found "
                f"{entry['fingerprint']!r}; figures measured differently cannot stand in one table"
            )
        if not is_front and entry["further"] != further:
            raise ValueError(
                f"{place}.further must be {further} as in report.further, found {entry['further']}; figures measured "
                "differently cannot stand in one table"
            )


def _entries(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "report.best", report["best"]
    for kind in ("baselines", "front"):
        for index, entry in enumerate(report[kind]):
            yield f"report.{kind}[{index}]", entry


def require(found: Any, keys: Mapping[str, str] | tuple[str, ...], place: str) -> None:
    """Check that ``found``, which stands at ``place`` in a report, is a mapping with these keys.

    Raises:
        ValueError: Naming the place and the first missing key.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{place} must be a mapping with the keys {list(keys)}, found {found!r}")
    for key in keys:
        if key not in found:
            meaning = f" ({keys[key]})" if isinstance(keys, Mapping) and key in keys else ""
            raise ValueError(f"{place} misses the key {key!r}{meaning}; it has {sorted(map(str, found))}")


def _require_positive(found: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{place}.{key} must be a number above 0, found {value!r}")


def plain(value: Any) -> Any:
    """Rebuild nested data from JSON's own types; numbers that are not finite become ``None``.

    Args:
        value: Mappings, sequences, numbers (also zero-dimensional arrays and tensors), strings, paths.

    Returns:
        Equal data that ``json.dumps(..., allow_nan=False)`` accepts.

    Raises:
        ValueError: If a value has no form in JSON.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise ValueError(f"a report holds numbers, strings, lists and mappings, found {value!r}")


def write_report_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Check a report and write it atomically as strict JSON.

    Args:
        path: File to write or replace; its directory exists.
        report: Content, with the keys of ``REPORT_KEYS``. Infinities and NaN are written as null.

    Raises:
        ValueError: If a key is missing (see ``validate_report``) or a value has no form in JSON.
    """
    validate_report(report)
    text = json.dumps(plain(report), indent=2, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())


def find_baseline(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Baseline entry of that name; ``validate_report`` has made sure the documented ones exist."""
    return next(entry for entry in report["baselines"] if entry["name"] == name)


def saving_factor(report: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """How many times fewer BitOPs the entry costs than the float model at the same number of steps."""
    return float(find_baseline(report, "float_k")["bitops"]) / float(entry["bitops"])


def entry_label(entry: Mapping[str, Any], *, is_best: bool = False) -> str:
    """Name of an entry as people read it, such as ``Float, 10 steps`` or ``Best found``."""
    if is_best:
        return "Best found"
    if str(entry["name"]).startswith("float"):
        return f"Float, {len(entry['timesteps'])} steps"
    bits = str(entry["bits"]["label"])
    if entry["name"] == TILE_RULE:
        return f"{bits}, tiles by rule"
    _, _, kind = str(entry["name"]).partition("_")
    if kind.startswith("f") and kind[1:].isdigit():
        return f"{bits}, F({kind[1:]},3)"
    if kind == REFERENCE:
        return f"{bits}, {len(entry['timesteps'])} steps"
    return f"{bits}, {kind}" if kind in SPACINGS else bits


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Labels and entries of the results table: the documented baselines, any further ones, the best."""
    named = {name: position for position, name in enumerate(BASELINE_NAMES)}
    baselines = sorted(report["baselines"], key=lambda entry: named.get(entry["name"], len(named)))
    rows = [(entry_label(entry), entry) for entry in baselines]
    return [*rows, (entry_label(report["best"], is_best=True), report["best"])]


def number(value: float | None, digits: int = 2) -> str:
    """A value with a fixed number of decimals; a dash where it is not defined."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def large(value: float) -> str:
    """A cost with about four digits: decimals only below a thousand."""
    return number(value, 1 if value < 1000 else 0)


def mean_bits(entry: Mapping[str, Any]) -> str:
    """Mean bits of weights and activations, with a decimal where they are not whole."""
    bits = (float(entry["bits"][name]) for name in ("weight_bits_mean", "act_bits_mean"))
    return " / ".join(f"{value:.0f}" if value == round(value) else f"{value:.1f}" for value in bits)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Results of a run as a table for the terminal.

    Args:
        report: Content of a ``report.json``.

    Returns:
        One row for each baseline and one for the best candidate, all on the final seeds. Saving is in times fewer
        BitOPs than float at the same number of steps; one KB is 1000 bytes.

    Raises:
        ValueError: If a documented key is missing.
    """
    validate_report(report)
    metric = report["metric"]
    better = "higher" if higher_is_better(metric) else "lower"
    caption = f"{metric}: {better} is better. Quantization is simulated: BitOPs are counted, not timed."
    table = Table(title=str(report["model"]), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding, table.collapse_padding = (0, 1), True
    for heading in ("", "bits W/A"):
        table.add_column(heading, no_wrap=True)
    for heading in ("steps", metric, "psnr_db", "GBitOPs", "saving", "KB"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = table_rows(report)
    for position, (label, entry) in enumerate(rows, 1):
        is_best = position == len(rows)
        table.add_row(
            label,
            f"{entry['bits']['weight_bits_mean']:.1f}/{entry['bits']['act_bits_mean']:.1f}",
            str(len(entry["timesteps"])),
            number(entry["metrics"].get(metric)),
            number(entry["metrics"].get("psnr_db"), 1),
            number(entry["bitops"] / 1e9, 1),
            f"{saving_factor(report, entry):.1f}x",
            number(entry["weight_bytes"] / 1e3, 0),
            style="bold green" if is_best else "",
            end_section=position == len(rows) - 1,
        )
    return table


def further_table(report: Mapping[str, Any]) -> Table | None:
    """The further metrics of the same rows; None where none was measured.

    Args:
        report: Content of a ``report.json``.

    Raises:
        ValueError: If a documented key is missing, or fingerprints are mixed.
    """
    validate_report(report)
    names = [metric["name"] for metric in report["further"]]
    if not names:
        return None
    better = "; ".join(f"{name}: {'higher' if higher_is_better(name) else 'lower'} is better" for name in names)
    table = Table(title="further metrics", caption=f"{better}.", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, entry in table_rows(report):
        table.add_row(label, *(number(entry["metrics"].get(name), 3) for name in names))
    return table
