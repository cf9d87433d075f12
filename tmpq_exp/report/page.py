"""The report as one HTML file: everything inside it, nothing fetched, readable on a phone, in dark and in light."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from tmpq_exp.files import replace_file
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Candidate
from tmpq_exp.report.candidates import candidate_data, embedded_json, shade
from tmpq_exp.report.charts import multiplications_chart, progress_chart, trials_chart
from tmpq_exp.report.content import (
    entry_label,
    find_baseline,
    higher_is_better,
    large,
    mean_bits,
    number,
    plain,
    saving_factor,
    table_rows,
    validate_report,
)
from tmpq_exp.report.pictures import png_bytes, sample_rows
from tmpq_exp.report.points import SearchView, search_view
from tmpq_exp.report.winograd import by_block, winograd_pictures

_SAMPLE_COLUMNS = 10
_SAMPLE_PIXELS = 128


def report_html(
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    trials: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, str | os.PathLike[str]],
    samples: Sequence[tuple[str, Any]] = (),
) -> None:
    """Write the report of a run as one self-contained HTML file.

    Args:
        path: File to write or replace.
        report: Content of ``report.json``, with the keys of ``REPORT_KEYS``.
        trials: Records of ``trials.jsonl``; those of the search and its baselines are drawn.
        pictures: PNG files to embed, by name. ``pareto`` is skipped where there are trials to draw it from, and
            ``samples`` where ``samples`` is given.
        samples: Rows of (label, images), as ``samples_png`` takes them; embedded pixel by pixel.

    Raises:
        ValueError: If the report misses a documented key, the trials mix fingerprints or have another one than the
            report, or the images are of a wrong shape.
    """
    validate_report(report)
    content, records = plain(report), list(trials)
    view = search_view(
        records,
        metric=content["search"]["metric"],
        budget_bitops=content["budget"]["bitops"],
        budget_name=str(content["budget"]["name"]),
        best_key=Candidate.from_json(content["best"]["candidate"]).key(),
        fingerprint=content["fingerprint"]["search"],
    )
    context = {
        "report": content,
        "metric": content["metric"],
        "better": "higher" if higher_is_better(content["metric"]) else "lower",
        "verdict": _verdict(content),
        "rows": _rows(content, view),
        "has_search_values": bool(view.baselines or content.get("search_baselines")),
        "trials_chart": trials_chart(view) if view.searched else None,
        "progress_chart": progress_chart(view, content["evidence"]["progress"]["random"]) if view.searched else None,
        "multiplications_chart": multiplications_chart(view) if _has_tiles(content) else None,
        "winograd": winograd_pictures(content),
        "view": view,
        "samples": _strips(samples) if samples else [],
        "pictures": _embedded(pictures, bool(view.searched), bool(samples)),
        "heat": _heat_map(content["best"]),
        "legend": _legend(content["best"]),
        "layers": _layer_table(content["best"]),
        "schedules": _schedules(content),
        "evidence": _evidence(content),
        "stages": stage_bars(content["stages"]),
        "candidates": embedded_json(candidate_data(view, records, content)) if view.searched else "",
        "front": [_row(content, entry_label(entry), entry) for entry in content["front"]],
    }
    replace_file(path, template("page.html").render(context).encode())


def template(name: str) -> Template:
    """A page of this folder; ``number`` and ``large`` are filters of its figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "large": large}
    return environment.get_template(name)


def _has_tiles(report: Mapping[str, Any]) -> bool:
    """Whether tiles were searched."""
    return str(report.get("winograd_choice", "")).startswith("searched")


def _verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the summary: the best found against uniform W6A6 at the same number of steps."""
    metric, best, uniform = report["metric"], report["best"], find_baseline(report, "w6a6")
    found, reference = best["metrics"][metric], uniform["metrics"][metric]
    known = found is not None and reference is not None
    change = (found - reference) / reference if known and reference else None
    is_better = known and (found > reference if higher_is_better(metric) else found < reference)
    budget = report["budget"]["bitops"]
    return {
        "best": found,
        "uniform": reference,
        "change_percent": None if change is None else abs(100 * change),
        "direction": "higher" if known and found > reference else "lower",
        "is_better": is_better,
        "is_equal": known and found == reference,
        "saving": saving_factor(report, best),
        "saving_reference": find_baseline(report, "float_reference")["bitops"] / best["bitops"],
        "reference_steps": len(find_baseline(report, "float_reference")["timesteps"]),
        "uniform_gbitops": uniform["bitops"] / 1e9,
        "budget_percent": 100 * best["bitops"] / budget if budget else None,
        "weights_saving": find_baseline(report, "float_k")["weight_bytes"] / best["weight_bytes"]
        if best["weight_bytes"]
        else None,
        "seeds_differ": report["fingerprint"]["search"] != report["fingerprint"]["final"],
    }


def _row(report: Mapping[str, Any], label: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": label,
        "bits": mean_bits(entry),
        "num_steps": len(entry["timesteps"]),
        "quality": entry["metrics"][report["metric"]],
        "interval": _interval(entry["intervals"].get(report["metric"])),
        "psnr_db": entry["metrics"].get("psnr_db"),
        "further": [entry["metrics"].get(metric["name"]) for metric in report["further"]],
        "gbitops": entry["bitops"] / 1e9,
        "saving": saving_factor(report, entry),
        "weight_kb": entry["weight_bytes"] / 1e3,
    }


def _rows(report: Mapping[str, Any], view: SearchView) -> list[dict[str, Any]]:
    score = report["search"]["metric"]
    searched = {entry["name"]: entry["metrics"].get(score) for entry in report.get("search_baselines", ())}
    searched |= {point.name: point.value for point in view.baselines if point.name not in searched}
    rows = []
    for label, entry in table_rows(report):
        is_best = entry is report["best"]
        on_search_seeds = view.best.value if is_best and view.best else searched.get(entry["name"])
        rows.append(
            _row(report, label, entry) | {"is_best": is_best, "search_quality": on_search_seeds, "name": entry["name"]}
        )
    return rows


def _strips(samples: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    strips = []
    for label, images in sample_rows(samples, _SAMPLE_COLUMNS):
        tiles = [Image.fromarray(image) for image in images]
        for tile in tiles:
            tile.thumbnail((_SAMPLE_PIXELS, _SAMPLE_PIXELS))
        strips.append({"label": label, "uris": [_data_uri(png_bytes(tile)) for tile in tiles]})
    return strips


def _embedded(
    pictures: Mapping[str, str | os.PathLike[str]], has_chart: bool, has_samples: bool
) -> list[dict[str, str]]:
    shown = {"pareto": has_chart, "samples": has_samples}
    return [
        {"name": name, "uri": _data_uri(Path(file).read_bytes())}
        for name, file in pictures.items()
        if not shown.get(name, False)
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _heat_map(best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cells of the heat map: layers in groups of one block, rows of weight and activation bits (for each step)."""
    candidate = Candidate.from_json(best["candidate"])
    ceiling = _ceiling(candidate)
    shared = len(candidate.allocations) == 1
    result = []
    for block, indices in by_block(best["layers"]).items():
        rows = []
        for kind, field in (("W", "weight_bits"), ("A", "act_bits")):
            for step, allocation in enumerate(candidate.allocations):
                bits = getattr(allocation, field)
                label = kind if shared else f"{kind} t={candidate.timesteps[step]}"
                cells = [_cell(best, allocation.tiles, index, kind, bits[index], ceiling) for index in indices]
                rows.append({"label": label, "cells": cells})
        result.append({"block": block, "rows": rows})
    return result


def _cell(
    best: Mapping[str, Any], tiles: Sequence[int], index: int, kind: str, bits: int, ceiling: int
) -> dict[str, Any]:
    what = {"W": "weights", "A": "activations"}[kind]
    if not best["weighted"][index]:
        what = {"W": "softmax output", "A": "q, k and v"}[kind]
    tile = "" if tiles[index] == DIRECT_TILE else f", F({tiles[index]}, r)"
    said = "float" if bits == FLOAT_BITS else f"{bits} bits"
    return {"bits": bits, "title": f"{best['layers'][index]}: {what} {said}{tile}", **shade(bits, ceiling)}


def _ceiling(candidate: Candidate) -> int:
    widths = {bits for a in candidate.allocations for bits in (*a.weight_bits, *a.act_bits) if bits != FLOAT_BITS}
    return max(8, *widths) if widths else 8


def _legend(best: Mapping[str, Any]) -> list[dict[str, str]]:
    candidate = Candidate.from_json(best["candidate"])
    widths = sorted({bits for a in candidate.allocations for bits in (*a.weight_bits, *a.act_bits)})
    return [shade(bits, _ceiling(candidate)) for bits in widths]


def _layer_table(best: Mapping[str, Any]) -> list[dict[str, str]]:
    """Bits and tile of every layer in words; a span where they differ between steps."""
    allocations = Candidate.from_json(best["candidate"]).allocations
    rows = []
    for index, name in enumerate(best["layers"]):
        tiles = {a.tiles[index] for a in allocations}
        rows.append(
            {
                "name": name,
                "weight": _span([a.weight_bits[index] for a in allocations]),
                "act": _span([a.act_bits[index] for a in allocations]),
                "tile": ", ".join("direct" if tile == DIRECT_TILE else f"m = {tile}" for tile in sorted(tiles)),
                "kind": "weights" if best["weighted"][index] else "attention product",
            }
        )
    return rows


def _span(bits: Sequence[int]) -> str:
    return str(bits[0]) if min(bits) == max(bits) else f"{min(bits)} to {max(bits)}"


def _schedules(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Timesteps of the best and of the uniform baseline, in shares of the schedule from noise to image."""
    last = max(1, report["num_train_timesteps"] - 1)
    uniform = find_baseline(report, "w6a6")
    pairs = [("Best found", report["best"]), (f"Baselines ({entry_label(uniform)})", uniform)]
    return [
        {
            "label": label,
            "marks": [{"t": t, "percent": 100 * (1 - t / last)} for t in entry["timesteps"]],
            "text": ", ".join(map(str, entry["timesteps"])),
        }
        for label, entry in pairs
    ]


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _evidence(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says about the noise of the score and about the random search."""
    noise, progress = report["evidence"]["score_noise"], report["evidence"]["progress"]
    seeds = noise["over_seeds"]
    found, random = (values[-1] if values else None for values in (progress["search"], progress["random"]))
    return {
        "num_images": noise["num_images"],
        "own": noise["scores"][0],
        "over_images": _interval(noise["over_images"]["interval"]),
        "others": [number(score) for score in noise["scores"][1:]],
        "mean": seeds["mean"],
        "over_seeds": _interval(seeds["interval"]),
        "found": found,
        "random": random,
        "num_random": len(progress["random"]),
        "correlations": report["evidence"]["rank_correlation"],
    }


def stage_bars(stages: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Seconds of each stage and its share of all, in percent."""
    total = sum(seconds or 0.0 for seconds in stages.values())
    return [
        {"name": name, "seconds": seconds, "percent": 100 * (seconds or 0.0) / total if total else 0.0}
        for name, seconds in stages.items()
    ]
