"""Owns the count of a run's U-Net calls, stage by stage, before any of them is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tmpq_exp.choices import examined_tiles, has_static_ranges
from tmpq_exp.experiment import Experiment, make_search
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.reconstruction import bit_widths
from tmpq_exp.quant.states import states_path
from tmpq_exp.results import SAMPLE_COLUMNS
from tmpq_exp.tiling import STATES_FOR_SCALES

BACKWARD_FACTOR = 3
"""An optimizer step of the calibration over a forward pass of the same images."""


@dataclass(frozen=True)
class Calls:
    """Calls of the U-Net by a stage, counted as one image each; guidance is not counted twice.

    Args:
        float_calls: In float.
        quantized_calls: Quantized.
    """

    float_calls: int = 0
    quantized_calls: int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(self.float_calls + other.float_calls, self.quantized_calls + other.quantized_calls)

    def times(self, count: int) -> Calls:
        """As many times as much."""
        return Calls(self.float_calls * count, self.quantized_calls * count)

    @property
    def total(self) -> int:
        """All of them."""
        return self.float_calls + self.quantized_calls


class Tally:
    """Counts U-Net calls of what the stages of a run do.

    Args:
        experiment: The run, laid out.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._config, self._experiment = experiment.config, experiment
        self._num_steps = experiment.space.steps.max_steps
        self._num_standard_steps = experiment.config.space.num_inference_steps

    def images(self, num_images: int, num_steps: int, in_float: bool = False) -> Calls:
        """Images in whole micro-batches."""
        micro_batch = self._experiment.micro_batch
        count = math.ceil(num_images / micro_batch) * micro_batch * num_steps
        return _drawn(count, in_float)

    def score(self, num_images: int) -> Calls:
        """One candidate of the search, with the most steps it may have."""
        return self.images(num_images, self._num_steps)

    def baselines(self, num_images: int, *, with_reference: bool) -> Calls:
        """All baselines, with or without the float reference."""
        found = self._experiment.baselines().items()
        kept = [candidate for name, candidate in found if with_reference or name != "float_reference"]
        return sum((self.images(num_images, len(c.timesteps), is_float(c)) for c in kept), Calls())

    def reference(self, num_images: int) -> Calls:
        """The float reference's images of the same seeds, made once for a network and a set of seeds."""
        evaluation = self._config.evaluation
        return self.images(min(num_images, evaluation.paired_images), evaluation.reference_steps, in_float=True)

    def beside(self, num_images: int) -> Calls:
        """What stands beside the candidates of an objective: the float reference's images, and the control's."""
        control = self.images(num_images, self._num_standard_steps, in_float=True)
        return self.reference(num_images) + control.times(int(self._experiment.control is not None))

    def search(self) -> Calls:
        """Candidates with the proxy before them, the baselines, and the images behind the control variate."""
        objective, search = self._config.objective, make_search(self._experiment)
        size, num_scored = search.population_size, self.num_scored()
        calls = self.score(objective.num_images).times(num_scored) + self.beside(objective.num_images)
        if self._experiment.control is not None:
            calls += self.images(objective.control_images, self._num_standard_steps, in_float=True)
        if objective.proxy is not None:
            looked = self.score(objective.proxy_images).times(size * search.num_generations)
            calls += looked + self.reference(objective.proxy_images)
        return calls + self.baselines(objective.num_images, with_reference=False)

    def num_scored(self) -> int:
        """Candidates that the search scores, at most."""
        objective, search = self._config.objective, make_search(self._experiment)
        share = 1.0 if objective.proxy is None else objective.promote_fraction
        return math.ceil(search.population_size * share) * search.num_generations

    def select(self) -> Calls:
        """Finalists on images of their own."""
        search, selection = make_search(self._experiment), self._experiment.selection_images
        num_seeds = sum(map(search.budget.is_feasible, search.seed_candidates))
        finalists = self._config.evaluation.num_finalists + num_seeds
        if finalists == 1:
            return Calls()
        return self.score(selection).times(finalists) + self.beside(selection)

    def weigh(self) -> Calls:
        """The score's noise, the ranking once more, the random search, and candidates calibrated again."""
        evaluation, num_images = self._config.evaluation, self._config.objective.num_images
        once = self.score(num_images) + self.beside(num_images)
        selection = self._experiment.selection_images
        ranked = self.score(selection).times(evaluation.ranked_candidates)
        if evaluation.ranked_candidates and not self.select().total:
            ranked += self.beside(selection)
        return (
            once.times(evaluation.noise_seeds)
            + self.score(num_images).times(bool(evaluation.bootstrap))
            + ranked
            + self.score(num_images).times(self.num_scored() if evaluation.random_control else 0)
            + (once + self.calibrate()).times(evaluation.recalibrated_candidates)
        )

    def specialize(self) -> Calls:
        """The winner calibrated for its own bits, and both on the selection's images."""
        if not self._config.evaluation.recalibrate:
            return Calls()
        selection = self._experiment.selection_images
        known = self.select().total or self._config.evaluation.ranked_candidates  # what stands beside the supernet's
        return self.calibrate() + self.score(selection).times(2) + self.beside(selection).times(1 if known else 2)

    def evaluate(self) -> Calls:
        """Baselines and the winner on the final images, the recipe tried out, and the samples of the report."""
        evaluation = self._config.evaluation
        winners = 2 if evaluation.recalibrate else 1
        shown = min(SAMPLE_COLUMNS, evaluation.num_images)
        samples = self._experiment.baselines().values()
        drawn = sum((_drawn(shown * len(c.timesteps), is_float(c)) for c in samples), Calls())
        tried = 2 * self._experiment.micro_batch
        return (
            self.baselines(evaluation.num_images, with_reference=True)
            + self.score(evaluation.num_images).times(winners)
            + self.reference(evaluation.num_images).times(winners - 1)  # the supernet's is a baseline
            + drawn
            + _drawn((shown + tried) * self._num_steps, in_float=False)
        )

    def calibrate(self) -> Calls:
        """The states, one look at them, and what every block's reconstruction does, added up over the blocks.

        A step of the reconstruction counts as ``BACKWARD_FACTOR`` forward passes of its batch.
        """
        config, layers = self._config.calibration, self._experiment.module.supernet.layers
        num_states = config.num_images * config.num_timesteps
        calls = Calls(num_states)
        if config.method == "ranges":
            return calls
        widths = len(bit_widths(layers))
        passes = 1 if config.method == "sampled" else widths
        judged = 1 + (2 if config.correct_means else 1)
        steps = (config.weight_iterations + config.act_iterations) * config.batch_size * BACKWARD_FACTOR
        return calls + Calls(num_states, num_states * (passes + judged * widths) + steps * widths)

    def states(self) -> Calls:
        """The calibration states, unless they are there."""
        experiment, config = self._experiment, self._config.calibration
        cache = Path(self._config.paths.cache_dir)
        if config.states or states_path(experiment.task, config, self._config.seed, cache).exists():
            return Calls()
        return Calls(config.num_images * config.num_timesteps)

    def winograd(self) -> Calls:
        """A trajectory and one call more for each examined tile, and a look at the states where ranges are static.

        Learning scales calls no U-Net.
        """
        config = self._config.calibration
        scales = Calls(STATES_FOR_SCALES * (config.num_timesteps + 1)).times(len(examined_tiles(self._config)))
        is_static = has_static_ranges(self._config)
        return scales + Calls(config.num_images * config.num_timesteps if is_static else 0)


def stage_calls(experiment: Experiment) -> dict[str, Calls]:
    """U-Net calls of every stage of a run, at most: what was scored before is not scored again.

    Learning of Winograd scales, feature networks and metrics are left out.
    """
    tally = Tally(experiment)
    return {
        "calibrate": tally.states() + tally.calibrate(),
        "winograd": tally.winograd(),
        "search": tally.search(),
        "select": tally.select(),
        "weigh": tally.weigh(),
        "specialize": tally.specialize(),
        "evaluate": tally.evaluate(),
    }


def _drawn(count: int, in_float: bool) -> Calls:
    return Calls(count, 0) if in_float else Calls(0, count)


def is_float(candidate: Candidate) -> bool:
    """Whether a candidate is a schedule in float arithmetic."""
    return all(bits == FLOAT_BITS for a in candidate.allocations for bits in (*a.weight_bits, *a.act_bits))
