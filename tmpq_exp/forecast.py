"""task=forecast: U-Net calls, time, memory and disk of a run before anything is spent; a run prints the same first."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tmpq_exp.batch_size import FLOAT_BYTES
from tmpq_exp.choices import used_tiles, winograd_spec, with_tile
from tmpq_exp.config import Config
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.calibration import estimate_ranges
from tmpq_exp.quant.reconstruction import bit_widths
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.recipe import bit_choices
from tmpq_exp.rundir import RunDirectory, write_json, writing
from tmpq_exp.search.memory import images_with_less_memory
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.unet_calls import Calls, Tally, stage_calls
from tmpq_exp.winograd.scales import ScaleSet
from tmpq_exp.winograd.transform import closed_form_scales

try:
    import resource
except ImportError:  # Windows does not say
    resource = None  # type: ignore[assignment]

MEASURED_CALLS = 5
"""Calls of the float network, and as many of the quantized one, behind the expected time."""

MEASURED_BITS = 8
"""Bits of the quantized network that is timed."""


TRIAL_BYTES = 600
"""A line of trials.jsonl without its candidate."""

TRIAL_COPIES = 5
"""Times that a trial is kept: in its file, in the tracker's with its table and artifact, in the page."""

PAGE_BYTES = 2 * 10**6
"""Pictures, page and report."""


@dataclass(frozen=True)
class CallSeconds:
    """What a call takes here, for one image of a micro-batch.

    Args:
        float_call: Seconds in float.
        quantized_call: Seconds quantized, with the largest Winograd tile in use.
        micro_batch: Images a call.
        peak_bytes: Peak memory of the process, or of the GPU, behind these calls.
    """

    float_call: float
    quantized_call: float
    micro_batch: int
    peak_bytes: int


def forecast(config: Config, resolved: dict[str, Any]) -> None:
    """Print what ``task=run`` with this configuration would spend, stage by stage, and write ``forecast.json``.

    Args:
        config: Checked configuration.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        ValueError: If the input is bad, as for ``task=run``.
    """
    quiet_lightning()
    path = Path(config.paths.run_dir)
    with writing(path):
        directory = RunDirectory.claim(path, resolved)
        experiment = prepare(config, directory, TrialLog(directory.trials), on_trial=lambda trial: None)
        content = forecast_content(experiment)
        write_json(directory.forecast, content)
    for name, stage in content["stages"].items():
        calls = f"{stage['float_calls']:>12,} float {stage['quantized_calls']:>12,} quantized"
        print(f"{name:<12} {calls}  about {duration(stage['seconds'])}")
    print("\n".join(forecast_lines(content)))
    print(f"forecast  {directory.forecast}")


def say_forecast(experiment: Experiment) -> None:
    """Print the forecast of a run that is about to start, in two lines on the standard error stream."""
    lines = forecast_lines(forecast_content(experiment))
    if experiment.trials.trials:
        lines[0] += "; less for what an earlier start has done"
    print("\n".join(lines), file=sys.stderr, flush=True)


def forecast_content(experiment: Experiment) -> dict[str, Any]:
    """Content of ``forecast.json``: calls and seconds of every stage, totals, memory and disk in bytes."""
    stages = stage_calls(experiment)
    measured = measure_calls(experiment)

    def seconds(calls: Calls) -> float:
        return calls.float_calls * measured.float_call + calls.quantized_calls * measured.quantized_call

    total = sum(stages.values(), Calls())
    return {
        "schema": 1,
        "model": experiment.task.name,
        "device": experiment.device.type,
        "num_threads": torch.get_num_threads(),
        "measured": asdict(measured),
        "stages": {name: {**asdict(calls), "seconds": round(seconds(calls), 1)} for name, calls in stages.items()},
        "calls": total.total,
        "seconds": round(seconds(total), 1),
        "peak_memory_bytes": measured.peak_bytes + cached_bytes(experiment),
        "disk_bytes": disk_bytes(experiment),
    }


def forecast_lines(content: dict[str, Any]) -> list[str]:
    """Two lines for the user."""
    measured = content["measured"]
    per_call = [f"{name} {1e3 * measured[f'{name}_call']:.3g} ms" for name in ("float", "quantized")]
    return [
        f"forecast  {content['calls']:,} U-Net calls of one image, about {duration(content['seconds'])} here "
        f"({', '.join(per_call)} a call, at {measured['micro_batch']} images on {content['device']})",
        f"          up to about {content['peak_memory_bytes'] / 1e9:.1f} GB of memory, "
        f"{content['disk_bytes'] / 1e6:.0f} MB on disk",
    ]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def measure_calls(experiment: Experiment) -> CallSeconds:
    """Seconds of a call of the float network and of the quantized one, ten calls behind a warm-up.

    They are made by a network of its own with roughly estimated ranges: the run's is left as it is.
    """
    config, device = experiment.config, experiment.device
    timesteps = experiment.baselines()["float_k"].timesteps[:1]
    indices = range(experiment.micro_batch)
    candidates = [experiment.uniform(timesteps, bits, bits) for bits in (FLOAT_BITS, MEASURED_BITS)]
    tiles = used_tiles(config)
    module = _measured_network(experiment, candidates[1], tiles).to(device)
    if tiles:
        allocation = with_tile(candidates[1].allocations[0], experiment.layers, max(tiles))
        candidates[1] = replace(candidates[1], allocations=(allocation,))
    seconds = [_seconds(module, candidate, indices) / len(indices) for candidate in candidates]
    return CallSeconds(seconds[0], seconds[1], len(indices), _peak_bytes(device))


def _measured_network(experiment: Experiment, candidate: Candidate, tiles: Sequence[int]) -> SupernetModule:
    """Network that runs the candidate, and its layers as these tiles; Winograd scales are the closed form.

    It is not compiled, which would take longer than all calls: where the run's is, the forecast is on the safe side.
    """
    config, quant = experiment.config, experiment.config.quant
    weight, act = (replace(quantizer, estimator="minmax") for quantizer in (quant.weight, quant.act))
    rough = replace(quant, weight=weight, act=act, compile=False)
    module = SupernetModule(experiment.task, experiment.layers, *bit_choices(candidate), rough).to(experiment.device)
    supernet, generator = module.supernet, torch.Generator().manual_seed(0)
    for layer in supernet.layers:
        for quantizer in layer.act_quantizers():
            quantizer.start_observing()
    with torch.no_grad(), supernet.observing(lambda quantizer, x: quantizer.observe(x, 1024, generator)):
        experiment.task.sample(supernet, [0], candidate.timesteps, 0)
    estimate_ranges(supernet)
    specs = {m: winograd_spec(config, m) for m in tiles}
    supernet.set_winograd({m: (s, ScaleSet(closed_form_scales(s.transform()))) for m, s in specs.items()})
    return module


def _seconds(module: SupernetModule, candidate: Candidate, indices: range) -> float:
    """Median of the measured calls; noise and one step of the sampler are in it."""
    taken = []
    for _ in range(1 + MEASURED_CALLS):
        start = time.perf_counter()
        images_with_less_memory(module, candidate, indices, 0)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU where there is one, else of the process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cached_bytes(experiment: Experiment) -> int:
    """Memory for what is kept ready, up to its caps: quantized weights, and activations of the calibration."""
    quant, calibration = experiment.config.quant, experiment.config.calibration
    weights = FLOAT_BYTES * _held_weights(experiment)
    activations = 0
    if calibration.method != "ranges":
        widths = 1 if calibration.method == "sampled" else len(bit_widths(experiment.module.supernet.layers))
        num_states = calibration.num_images * calibration.num_timesteps
        activations = FLOAT_BYTES * (1 + widths) * num_states * max(shape.num_inputs for shape in experiment.layers)
    return min(weights, quant.cache_max_bytes) + min(activations, calibration.max_cache_bytes)


def disk_bytes(experiment: Experiment) -> int:
    """Size of what the run writes, states in the cache included."""
    calibration = experiment.config.calibration
    state = sum(t.numel() * t.element_size() for t in experiment.module.supernet.quantizer_state().values())
    if calibration.method != "ranges":
        state += _held_weights(experiment) // 8  # a bit for each learned rounding
    sample = math.prod(experiment.task.sample_shape)
    states = FLOAT_BYTES * calibration.num_images * calibration.num_timesteps * sample
    tally, candidate = Tally(experiment), json.dumps(experiment.baselines()["w6a6"].to_json())
    num_trials = tally.num_scored() * (2 if experiment.config.evaluation.random_control else 1)
    return 2 * state + states + num_trials * TRIAL_COPIES * (len(candidate) + TRIAL_BYTES) + PAGE_BYTES


def _held_weights(experiment: Experiment) -> int:
    """Weights of all layers at all of their bit widths."""
    choices = [layer.weight_choices for layer in experiment.module.supernet.layers]
    return sum(s.num_weights * len(widths) for s, widths in zip(experiment.layers, choices, strict=True))
