"""task=classify: a float classifier against its direct and Winograd quantized versions, on test images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tmpq_exp.classification import BITS, Row, Study, allocation, evaluate, prepare, row_cost, winograd_row, with_ranges
from tmpq_exp.config import Config, TileConfig
from tmpq_exp.metrics.accuracy import wilson_interval
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.report.classification import SCHEMA, classification_table, write_classification_json
from tmpq_exp.report.classification_page import classification_html
from tmpq_exp.rundir import RunDirectory, writing
from tmpq_exp.seeding import stream_seed
from tmpq_exp.terminal import print_table
from tmpq_exp.tiling import pictured
from tmpq_exp.tracking import Job, classification_records, classification_results, finishing, open_tracker, say_notice
from tmpq_exp.winograd.scales import (
    ScaleSet,
    write_scales,
)
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.winograd.transform import standard_scales


def classify(config: Config, resolved: dict[str, Any]) -> None:
    """Evaluate a classifier float, direct W8A8 and as quantized Winograd; writes ``report.json`` and ``report.html``.

    A killed run goes on from the last row that was done.

    Args:
        config: Checked configuration.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        ValueError: If the input is bad; rows that were done before are kept.
    """
    quiet_lightning()
    with writing(Path(config.paths.run_dir)):
        run = RunDirectory.claim(Path(config.paths.run_dir), resolved)
        study = prepare(config, run)
        tracker = open_tracker(config.logger, Job.of_directory(run.path, "classify", resolved))
        with finishing(tracker):
            learned: dict[str, dict[str, Any]] = {}
            rows = [Row("float", FLOAT_BITS), Row("direct_w8a8", BITS)]
            variants = config.classification.rows()
            rows += [with_ranges(study, winograd_row(study, variant, learned)) for variant in variants]
            report = assemble(study, rows, evaluate(study, rows), learned)
            write_classification_json(run.report_json, report)
            classification_html(run.report_html, report)
            for record in classification_records(report):
                tracker.log_trial(record)
            tracker.log_results(classification_results(report))
    print_table(classification_table(report))
    print(f"report  {run.report_html}")
    say_notice(tracker)


def assemble(
    study: Study, rows: list[Row], figures: Mapping[str, Mapping[str, Any]], learned: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Content of ``report.json``; see ``tmpq_exp.report.classification``."""
    num_images = len(study.data.samples)
    write_scales(study.run.winograd_scales, study.task.name, _kept_scales(study, rows, learned))
    return {
        "schema": SCHEMA,
        "task": "classify",
        "model": study.task.name,
        "weights_hash": study.task.weights_hash,
        "data": {
            "name": study.data.name,
            "num_classes": len(study.data.classes),
            **study.data.preprocessing,
            "calibration": _calibration(study, rows),
        },
        "num_images": num_images,
        "fingerprint": study.fingerprint,
        "classification": [
            _entry(study, row, figures[row.name], num_images) for row in rows if not _is_further(study, row)
        ],
        "further_rows": [_entry(study, row, figures[row.name], num_images) for row in rows if _is_further(study, row)],
        "details": [_detail(study, row, figures[row.name]) for row in rows],
        "winograd": [_tile(study, tile, rows, figures, learned) for tile in study.config.classification.tiles],
        "learning": [{k: v for k, v in found.items() if k != "scales"} for found in learned.values()],
        "stages": study.run.stage_seconds(),
        "environment": json.loads(study.run.environment.read_text(encoding="utf-8"))["starts"][-1],
        "seed": study.config.seed,
    }


def _calibration(study: Study, rows: list[Row]) -> dict[str, Any] | None:
    """The images behind static ranges, and the rows that have some; None where all scales are dynamic."""
    data, static = study.data.calibration, [row.name for row in rows if row.ranges]
    if data is None or not static:
        return None
    return {"name": data.name, "num_images": len(data.samples), "fingerprint": data.fingerprint(), "rows": static}


def _is_further(study: Study, row: Row) -> bool:
    return row.variant in study.config.classification.further


def _kept_scales(
    study: Study, rows: list[Row], learned: Mapping[str, Mapping[str, Any]]
) -> dict[int, tuple[WinogradSpec, ScaleSet]]:
    """By tile, the kept scales of the last of ``classification.tiles``; of a further row where there is none."""
    by_name = {found["name"]: found for found in learned.values()}
    kept: dict[int, tuple[WinogradSpec, ScaleSet]] = {}
    for row in rows:
        if row.spec is None or row.name not in by_name or (_is_further(study, row) and row.spec.m in kept):
            continue
        kept[row.spec.m] = row.spec, ScaleSet.from_json(by_name[row.name]["scales"]["kept"])
    return kept


def _entry(study: Study, row: Row, figures: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    low, high = wilson_interval(figures["num_correct"], num_images)
    variant = row.variant
    direct = Row("direct", BITS)
    return {
        "name": row.name,
        "m": None if variant is None else variant.m,
        "points": None if variant is None else variant.points,
        "scales": None if variant is None else variant.scales,
        "top1": 100 * figures["num_correct"] / num_images,
        "top1_interval": [100 * low, 100 * high],
        "sqnr_db": _median(figures),
        "multiplications_ratio": _multiplications(study, direct) / _multiplications(study, row),
    }


def _median(figures: Mapping[str, Any]) -> float | None:
    values = figures["layer_sqnr_db"].values()
    return statistics.median(values) if values else None


def _multiplications(study: Study, row: Row) -> int:
    """Multiplications of all layers for one image; a Winograd layer's are of its Hadamard stage and error feedback."""
    cost = row_cost(study.cost, row)
    return cost.multiplications(Candidate((0,), (allocation(cost, row),)))


def _detail(study: Study, row: Row, figures: Mapping[str, Any]) -> dict[str, Any]:
    cost = row_cost(study.cost, row)
    candidate = Candidate((0,), (allocation(cost, row),))
    return {
        "name": row.name,
        "macs": cost.macs(candidate),
        "bitops": cost.bitops(candidate),
        "weight_bytes": cost.weight_bytes(candidate),
        "layer_sqnr_db": figures["layer_sqnr_db"],
        "spec": None if row.spec is None else asdict(row.spec),
    }


def _tile(
    study: Study,
    tile: TileConfig,
    rows: list[Row],
    figures: Mapping[str, Mapping[str, Any]],
    learned: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A tile as in the ``winograd`` list of every report; drawn with the kept scales, or those of its last row."""
    name = f"f{tile.m}_{tile.points}"
    names = {kind: f"{name}_{kind}" for kind in ("standard", "closed_form", "learned")}
    found = {
        "m": tile.m,
        "points": tile.points,
        "eligible_layers": [layer.name for layer in study.layers],
        "ineligible_layers": [{"name": name, "reason": reason} for name, reason in study.ineligible.items()],
        "sqnr_db": {kind: _median(figures[name]) if name in figures else None for kind, name in names.items()},
    }
    shown = {kind: row for kind, name in names.items() for row in rows if row.name == name}
    if not shown:
        return found
    kept, row = list(shown.items())[-1]
    scales, spec = row.scales, row.spec
    for one in learned.values():
        if one["name"] == names["learned"]:
            kept, scales = one["kept"], ScaleSet.from_json(one["scales"]["kept"])
    assert spec is not None
    assert scales is not None
    inputs = [study.task.weights_hash, study.config.seed, asdict(spec), scales.to_json()]
    seed = stream_seed(study.config.seed, "winograd", tile.m) % 2**32
    standard = ScaleSet(standard_scales(spec.transform()))
    compute = partial(pictured, study.layers, spec, standard, scales, seed)
    return {**found, "kept": kept, **study.run.stage(f"pictures {name}", inputs, [], compute)}
