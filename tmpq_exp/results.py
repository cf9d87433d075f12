"""Turns trials into the content of report.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from tmpq_exp.choices import has_static_ranges, used_tiles, winograd_spec
from tmpq_exp.config import Config, Granularity
from tmpq_exp.cost import TRANSFORM_BITS, AttentionShape, ConvShape, CostModel, LayerShape, is_eligible
from tmpq_exp.experiment import Experiment
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.report import SCHEMA
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.memory import images_with_less_memory
from tmpq_exp.search.objective import Objective, label
from tmpq_exp.search.trials import Trial
from tmpq_exp.seeding import stream_seed
from tmpq_exp.stages import Shipped
from tmpq_exp.winograd.spec import ALL

SAMPLE_COLUMNS = 12


def entry(trial: Trial, name: str, weighted: Sequence[bool], cost: CostModel) -> dict[str, Any]:
    """Report entry of a trial."""
    candidate = Candidate.from_json(trial.candidate)
    return {
        "name": name,
        "timesteps": list(candidate.timesteps),
        "bits": label(candidate, weighted),
        "bitops": trial.bitops,
        "hadamard_bitops": cost.hadamard_bitops(candidate),
        "macs": trial.macs,
        "multiplications": cost.multiplications(candidate),
        "weight_bytes": trial.weight_bytes,
        "metrics": trial.metrics,
        "intervals": trial.intervals or {},
        "num_images": trial.num_images,
        "seed": trial.seed,
        "fingerprint": trial.fingerprint,
        "further": trial.further or {},
    }


def front(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Trials that no other one beats in both quality and BitOPs, cheapest first."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.bitops, t.score(metric))):
        if trial.metrics.get(metric) is not None and (not kept or trial.score(metric) < kept[-1].score(metric)):
            kept.append(trial)
    return kept


def assemble_report(
    experiment: Experiment,
    winograd: list[dict[str, Any]],
    algorithm: Search,
    shipped: Shipped,
    finals: dict[str, Trial],
    evidence: dict[str, Any],
    search_objective: Objective,
    final_objective: Objective,
    warnings: list[str],
) -> dict[str, Any]:
    """Content of ``report.json``; see ``tmpq_exp.report.REPORT_KEYS``."""
    config, metric = experiment.config, experiment.metric.name
    weighted = [not isinstance(shape, AttentionShape) for shape in experiment.layers]
    searched = [trial for trial in experiment.trials.of_phase("search") if search_objective.covers(trial)]
    seconds = experiment.run.stage_seconds()
    best = entry(finals["best"], "best", weighted, experiment.cost)
    winner = shipped.candidate
    in_supernet = "best" if shipped.module is experiment.module else "best_other"
    best |= {
        "metrics_supernet": finals[in_supernet].metrics,
        "recalibration": None
        if shipped.other is None
        else {
            "shipped": "supernet" if in_supernet == "best" else "recalibrated",
            "selection": shipped.selection,
            "metrics_recalibrated": finals["best_other" if in_supernet == "best" else "best"].metrics,
        },
        "candidate": winner.to_json(),
        "layers": [shape.name for shape in experiment.layers],
        "weighted": weighted,
    }
    baselines = experiment.baselines()
    protocol = search_objective.fingerprint, search_objective.state
    scored = {name: search_objective.trials.find(c, *protocol) for name, c in baselines.items()}
    failed = [trial for trial in searched if trial.error is not None]
    starts = json.loads(experiment.run.environment.read_text(encoding="utf-8"))["starts"]
    return {
        "schema": SCHEMA,
        "model": experiment.task.name,
        "fingerprint": {"search": search_objective.fingerprint, "final": final_objective.fingerprint},
        "fingerprint_parts": {
            "search": search_objective.fingerprint_parts,
            "final": final_objective.fingerprint_parts,
        },
        "metric": metric,
        "further": [
            {
                "name": metric.name,
                "higher_is_better": metric.higher_is_better,
                "fingerprint": final_objective.further_fingerprints[metric.name],
                "fingerprint_parts": final_objective.further_parts[metric.name],
            }
            for metric in final_objective.further
        ],
        "num_train_timesteps": experiment.task.num_train_timesteps,
        "budget": {"bitops": experiment.budget_bitops, "name": experiment.config.budget.name},
        "baselines": [entry(finals[name], name, weighted, experiment.cost) for name in baselines],
        "best": best,
        "front": [
            entry(trial, trial.key, weighted, experiment.cost) for trial in front(searched, search_objective.score.name)
        ],
        "calibration": experiment.calibration,
        "winograd": [{key: value for key, value in tile.items() if key != "scales"} for tile in winograd],
        "winograd_choice": _winograd_choice(experiment, winner),
        "search": {
            "metric": search_objective.score.name,
            "num_evaluations": len(searched),
            "num_reused": sum(trial.source is not None for trial in searched),
            "num_proxy_evaluations": len(experiment.trials.of_phase("proxy")),
            "num_failed": len(failed),
            "stop_reason": algorithm.stop_reason,
            "seconds": seconds.get("search", 0.0),
            "num_images": search_objective.protocol.num_images,
            "seed": search_objective.protocol.seed,
            "statistics": asdict(algorithm.statistics),
        },
        "evidence": evidence
        | {
            "seeds": {
                "search": search_objective.protocol.seed,
                "selection": stream_seed(config.seed, "selection"),
                "final": final_objective.protocol.seed,
            }
        },
        "search_baselines": [
            entry(trial, name, weighted, experiment.cost) for name, trial in scored.items() if trial is not None
        ],
        "stages": seconds,
        "warnings": [*warnings, *_warnings(experiment, searched, search_objective), *_missing(finals)],
        "ragged_groups": ragged_groups(experiment),
        "environment": starts[-1],
        "seed": config.seed,
    }


def _missing(finals: dict[str, Trial]) -> list[str]:
    """Further metrics that could not be had, with the reason."""
    return [f"{name}: {reason}" for name, trial in finals.items() for reason in (trial.missing or {}).values()]


def _winograd_choice(experiment: Experiment, winner: Candidate) -> str:
    """The tile of all eligible layers, or how many layers (of all steps) took which where tiles were searched."""
    tile = experiment.config.winograd.tile
    static = ", with static activation scales" if has_static_ranges(experiment.config) else ""
    if not experiment.config.space.tiles:
        return f"f{tile}{static}" if tile else "none"
    taken = Counter(
        tile
        for allocation in winner.allocations
        for shape, tile in zip(experiment.layers, allocation.tiles, strict=True)
        if isinstance(shape, ConvShape) and is_eligible(shape)
    )
    return (
        "searched: " + ", ".join(f"{count} {f'f{m}' if m else 'direct'}" for m, count in sorted(taken.items())) + static
    )


def _warnings(experiment: Experiment, searched: Sequence[Trial], objective: Objective) -> list[str]:
    """What a reader of the figures must know."""
    config = experiment.config.winograd
    found = [f"candidate {trial.key} failed: {trial.error}" for trial in searched if trial.error is not None]
    smaller = sum(trial.micro_batch is not None for trial in experiment.trials.trials)
    if smaller:
        found.append(
            f"{smaller} evaluations ran at fewer images a forward than the others, because memory did not suffice "
            "(trials.jsonl names them); their figures may differ in the last digits from those at "
            f"{objective.protocol.micro_batch}"
        )
    others = [trial for trial in experiment.trials.of_phase("search") if not objective.covers(trial)]
    if others:
        found.append(
            f"{len(others)} search trials were scored under another fingerprint or with other quantizers (other "
            "threads, device, library or files than now) and are left out"
        )
    stages = (config.quantize_input, config.quantize_v, config.quantize_u, config.quantize_m)
    own_bits = (config.input_bits, config.v_bits, config.u_bits)
    tiles = used_tiles(experiment.config)
    if tiles and (config.m_bits != TRANSFORM_BITS or not all(stages) or any(own_bits)):
        found.append(
            f"BitOPs count every Winograd stage as quantized and M at {TRANSFORM_BITS} bits, which is not what this "
            "run computes: compare its quality, not its cost"
        )
    if tiles:
        found += _unlike_scales(experiment.config)
    if experiment.config.space.tiles and experiment.tile_rule is None:
        found.append("the data-free rule for tiles found no uniform bits that fit the budget; it is no baseline here")
    return found


def picture_records(experiment: Experiment, objective: Objective) -> list[dict[str, Any]]:
    """Trials of this objective with their multiplications; baselines that the search had scored stand there twice."""
    names = {candidate.key(): name for name, candidate in experiment.baselines().items()}
    trials = [trial for trial in experiment.trials.of_phase("search", "baseline") if objective.covers(trial)]
    again = [
        {**asdict(trial), "phase": "baseline", "name": names[trial.key]}
        for trial in trials
        if trial.phase == "search" and trial.key in names
    ]
    records = [*(asdict(trial) for trial in trials), *again]
    for record in records:
        record["multiplications"] = experiment.cost.multiplications(Candidate.from_json(record["candidate"]))
    return records


def sample_rows(experiment: Experiment, shipped: Shipped, seed: int) -> list[tuple[str, Tensor]]:
    """Labelled rows of images at the same final seeds: every baseline, and the best found."""
    config = experiment.config
    baselines = experiment.baselines()
    names = {
        "float_reference": f"float, {config.evaluation.reference_steps} steps",
        "float_k": f"float, {config.space.num_inference_steps} steps",
    } | {f"w{bits}a{bits}": f"W{bits}A{bits}" for bits in config.evaluation.baseline_bits}
    rows = [(label, baselines[name], experiment.module) for name, label in names.items()]
    if experiment.tile_rule is not None:
        rows.append(("tiles by rule", experiment.tile_rule, experiment.module))
    rows.append(("best found", shipped.candidate, shipped.module))
    indices = range(min(SAMPLE_COLUMNS, config.evaluation.num_images))
    return [(label, images_with_less_memory(module, candidate, indices, seed)) for label, candidate, module in rows]


def _unlike_scales(config: Config) -> list[str]:
    """What to say where Winograd and direct layers find their activation scales at different times."""
    is_dynamic = config.quant.act.granularity == Granularity.PER_GROUP
    if is_dynamic == (config.winograd.act_scales == "dynamic"):
        return []
    if is_dynamic:
        return [
            "Winograd layers have static activation scales, direct ones dynamic group-wise scales: to compare tiles "
            "alone, run with winograd.act_scales=dynamic"
        ]
    return [
        "Winograd layers have dynamic group-wise activation scales, direct ones static scales: to compare tiles "
        "alone, run with quant=groupwise"
    ]


def ragged_groups(experiment: Experiment) -> list[dict[str, Any]]:
    """Layers whose last group of channels is shorter than the group size."""
    config = experiment.config
    found: dict[tuple[str, int], int] = {}
    for quantizer in (config.quant.weight, config.quant.act):
        if quantizer.granularity == Granularity.PER_GROUP:
            for shape in experiment.layers:
                found[shape.name, quantizer.group_size] = _input_channels(shape) % quantizer.group_size
    tiles = used_tiles(config)
    size = winograd_spec(config, tiles[0]).group_channels if tiles else ALL
    if size != ALL:
        for shape in experiment.layers:
            if isinstance(shape, ConvShape) and is_eligible(shape):
                found[shape.name, size] = shape.in_channels % size
    found = {key: last for key, last in found.items() if last}
    return [{"name": name, "group_size": size, "last_group": last} for (name, size), last in found.items()]


def _input_channels(shape: LayerShape) -> int:
    if isinstance(shape, ConvShape):
        return shape.in_channels
    return shape.heads * shape.head_dim if isinstance(shape, AttentionShape) else shape.in_features
