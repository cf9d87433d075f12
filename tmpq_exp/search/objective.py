"""What a candidate is worth: the protocol of an evaluation, its fingerprint, and the evaluation itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.config.identity import digest
from tmpq_exp.cost import CostModel
from tmpq_exp.metrics.control import ControlledFrechet
from tmpq_exp.metrics.fidelity import FeatureError, Psnr
from tmpq_exp.metrics.metric import Measurement, Metric
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.evaluation import Evaluation, Made
from tmpq_exp.search.memory import with_less_memory
from tmpq_exp.search.protocol import Beside, Control, Images, Protocol, images_by
from tmpq_exp.search.trials import Trial, TrialLog, finite_metrics
from tmpq_exp.zoo.conditioning import Prompts

Feed = Callable[[Candidate, Callable[[Tensor], None]], None]
"""Makes the images of a candidate under a protocol and hands on one whole micro-batch after the other."""

PROXIES = ("psnr_db", "feature_mse")
"""Metrics against the float reference's images of the same seeds."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one candidate, as plain values that may come from another process.

    Args:
        metrics: Name -> value, NaN where it could not be had.
        intervals: Metric -> 95 % interval over images, where one was asked for.
        problems: Metric -> why it could not be had.
        micro_batch: Images a forward, where memory did not suffice for the protocol's.
    """

    metrics: dict[str, float]
    intervals: dict[str, list[float]] | None
    problems: dict[str, str]
    micro_batch: int | None = None


class Objective:
    """Scores candidates under one protocol, each at most once.

    Where memory does not suffice, a candidate is measured again from its start at half the micro-batch, and its trial
    says so; the next one starts at the protocol's again, so that a trial never depends on the ones before it.

    Every trial has ``psnr_db`` and, where the metric has a feature network, ``feature_mse``, both against the float
    reference's images of the same seeds, on the first ``paired_images``: they need few, and the reference has many
    steps. Images are measured batch by batch; only the reference's are kept.

    Args:
        module: Supernet.
        metric: Quality metric, made ready.
        protocol: Which images.
        cost: Prices candidates.
        trials: Where evaluations are kept and looked up.
        reference_candidate: Float schedule whose images, at the same seeds, are the reference of the proxies.
        state: Hash of the quantizers and transform scales that the supernet computes with.
        on_trial: Called with every new trial.
        measures_quality: Whether the quality metric is measured; without it a trial has the proxies alone.
        bootstrap: Resamples behind the quality's interval over images; 0 leaves it out.
        control: With it a trial has ``<metric>_controlled`` too, and candidates are ranked by that.
        further: Metrics that are measured beside the quality, made ready; each has a fingerprint of its own.
        images: Makes the images; None: the module, here.
    """

    def __init__(
        self,
        module: SupernetModule,
        metric: Metric,
        protocol: Protocol,
        cost: CostModel,
        trials: TrialLog,
        *,
        reference_candidate: Candidate,
        state: str,
        on_trial: Callable[[Trial], None],
        measures_quality: bool = True,
        bootstrap: int = 0,
        control: Control | None = None,
        further: Sequence[Metric] = (),
        images: Images | None = None,
    ) -> None:
        self.module, self.metric, self.protocol, self.cost, self.trials = module, metric, protocol, cost, trials
        self.reference_candidate, self._on_trial = reference_candidate, on_trial
        self.state, self.measures_quality, self.bootstrap = state, measures_quality, bootstrap
        self.further = tuple(further)
        self._images = images_by(module) if images is None else images
        self.score: Metric = metric if control is None or not measures_quality else control.under(protocol)
        self._needs_latents = any("latents" in used.needs for used in (metric, *further))
        self._reference: Made | None = None
        self._reference_memos: dict[tuple[int, int], dict[int, Tensor]] = {}  # by first image and number of images
        is_cuda = module.device.type == "cuda"
        common: dict[str, Any] = {
            **asdict(protocol),
            **module.task.fingerprint,
            "torch": torch.__version__,
            "psnr_reference": reference_candidate.key(),
            "dtype": "float32",
            "tf32": torch.backends.cudnn.allow_tf32 if is_cuda else None,
            "fidelity": Psnr().fingerprint()["library"],
            "device": module.device.type,
            "compiled": module.is_compiled,
            "num_threads": None if is_cuda else torch.get_num_threads(),
        }
        self.fingerprint_parts = {"resize": "none", **common, **self.score.fingerprint(), "quality": measures_quality}
        self.fingerprint = digest(self.fingerprint_parts)
        self.further_parts = {m.name: {**common, **m.fingerprint()} for m in self.further}
        self.further_fingerprints = {name: digest(parts) for name, parts in self.further_parts.items()}

    def covers(self, trial: Trial) -> bool:
        """Whether a trial was scored by this protocol and with these quantizers."""
        return (trial.fingerprint, trial.state) == (self.fingerprint, self.state)

    def evaluate(
        self,
        candidate: Candidate,
        phase: str,
        *,
        name: str | None = None,
        generation: int | None = None,
        feed: Feed | None = None,
    ) -> Trial:
        """Trial of a candidate: the recorded one if there is one, else a new one, recorded before it is returned.

        One that an earlier run recorded is recorded here again, with its source, and not measured.

        Args:
            candidate: What to score.
            phase, name, generation: See ``Trial``.
            feed: Makes the images instead of the module; must make the same ones.
        """
        known = self.recorded(candidate, phase, name=name, generation=generation)
        if known is not None:
            return known
        return self.record(candidate, self.measure(candidate, feed), phase, name=name, generation=generation)

    def recorded(
        self, candidate: Candidate, phase: str, *, name: str | None = None, generation: int | None = None
    ) -> Trial | None:
        """The trial of a candidate that this run or one to be reused has recorded; None if it is to be measured.

        One of a run to be reused is recorded here again, with its source. Arguments as for ``evaluate``.
        """
        known = self.trials.find(candidate, self.fingerprint, self.state)
        if known is not None and self._has_further(known):
            return known
        earlier = self.trials.find_elsewhere(candidate, self.fingerprint, self.state)
        if earlier is None or not self._has_further(earlier):
            return None
        index = self.trials.num_lines
        return self._keep(replace(earlier, index=index, phase=phase, name=name, generation=generation))

    def record(
        self,
        candidate: Candidate,
        measured: Measured,
        phase: str,
        *,
        name: str | None = None,
        generation: int | None = None,
    ) -> Trial:
        """Keep what was measured of a candidate, wherever that was; on disk when it is returned."""
        judged = (self.score.name,) if self.measures_quality else PROXIES
        problems = measured.problems
        missing = {name: problems[name] for name in self.further_fingerprints if name in problems}
        trial = Trial(
            index=self.trials.num_lines,
            phase=phase,
            name=name,
            generation=generation,
            key=candidate.key(),
            candidate=candidate.to_json(),
            bitops=self.cost.bitops(candidate),
            macs=self.cost.macs(candidate),
            weight_bytes=self.cost.weight_bytes(candidate),
            metrics=finite_metrics(measured.metrics),
            num_images=self.protocol.num_images,
            seed=self.protocol.seed,
            fingerprint=self.fingerprint,
            state=self.state,
            error=next((problems[name] for name in judged if name in problems), None),
            intervals=measured.intervals,
            further=self.further_fingerprints or None,
            missing=missing or None,
            micro_batch=measured.micro_batch,
        )
        return self._keep(trial)

    def _keep(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self._on_trial(trial)
        return trial

    def measure(self, candidate: Candidate, feed: Feed | None = None, images: Images | None = None) -> Measured:
        """Figures of a candidate, at a smaller micro-batch where memory asks for one; nothing is looked up or recorded.

        Args:
            candidate: What to measure.
            feed: Makes the candidate's images, see ``evaluate``.
            images: Makes them, and what stands beside them, where there is no feed; None: as the objective was told.
        """
        action = partial(self._measure, candidate, feed, images or self._images)
        what = f"evaluation of {candidate.key()}"
        measured, micro_batch = with_less_memory(what, self.protocol.micro_batch, action)
        return measured if micro_batch == self.protocol.micro_batch else replace(measured, micro_batch=micro_batch)

    def _measure(self, candidate: Candidate, feed: Feed | None, images: Images, micro_batch: int) -> Measured:
        """Figures at this micro-batch."""
        started = self._started()
        metrics, problems = self._evaluated(candidate, started, micro_batch, images, feed).values()
        main = self.metric.name
        if not self.bootstrap or not self.measures_quality or main in problems:
            return Measured(metrics, None, problems)
        interval = started[main].interval(self.bootstrap, self.protocol.seed)
        return Measured(metrics, None if interval is None else {main: list(interval)}, problems)

    def measure_here(self, candidate: Candidate) -> Measured:
        """The same with images that the module makes in this process."""
        return self.measure(candidate, images=images_by(self.module))

    def beside(self) -> Beside:
        """What candidates are compared with, made at first use; on the CPU."""
        made = partial(self._reference_made, images=self._images)
        reference = with_less_memory("float reference", self.protocol.micro_batch, made)[0].to(torch.device("cpu"))
        if not isinstance(self.score, ControlledFrechet):
            return Beside(reference)
        return Beside(reference, self.score.statistics(), self.score.features())

    def adopt(self, beside: Beside) -> None:
        """Take over what another process made of the same objective."""
        self._reference = beside.reference.to(self.module.device)
        statistics, features = beside.control_statistics, beside.control_features
        if isinstance(self.score, ControlledFrechet) and statistics is not None and features is not None:
            self.score.statistics, self.score.features = lambda: statistics, lambda: features

    def _has_further(self, trial: Trial) -> bool:
        """Whether a trial was measured by these further metrics too."""
        return self.further_fingerprints.items() <= (trial.further or {}).items()

    def _started(self) -> dict[str, Measurement]:
        """Every metric of a trial, begun: the quality's first."""
        metric, cheap, started = self.metric, list[Metric]([Psnr()]), dict[str, Measurement]()
        if metric.network is not None:
            cheap.append(FeatureError(metric.network))
        if self.measures_quality:
            started = {m.name: m.start(resampled=bool(self.bootstrap)) for m in (metric, self.score)}
        for other in (*cheap, *self.further):
            started.setdefault(other.name, other.start())
        return started

    def interval(self, candidate: Candidate, num_resamples: int) -> list[float] | None:
        """Bootstrap interval of a candidate's score over images, 95 %; None where there is none."""

        def measure(micro_batch: int) -> tuple[float, float] | None:
            measurement = self.score.start(resampled=True)
            started = {self.score.name: measurement}
            _, problems = self._evaluated(candidate, started, micro_batch, self._images).values()
            return None if problems else measurement.interval(num_resamples, self.protocol.seed)

        interval, _ = with_less_memory(f"interval of {candidate.key()}", self.protocol.micro_batch, measure)
        return None if interval is None else list(interval)

    def _evaluated(
        self,
        candidate: Candidate,
        started: Mapping[str, Measurement],
        micro_batch: int,
        images: Images,
        feed: Feed | None = None,
    ) -> Evaluation:
        """Measurements that have taken all images of a candidate, made at this micro-batch."""
        protocol = replace(self.protocol, micro_batch=micro_batch)
        is_reference = candidate == self.reference_candidate
        conditions = self.module.task.conditions
        evaluation = Evaluation(
            started,
            self.protocol.num_images,
            self.protocol.paired().num_images,
            None if is_reference else self._reference_made(micro_batch, images),
            conditions.of_images if isinstance(conditions, Prompts) else None,
            self._reference_memos,
        )
        self._make(candidate, protocol, evaluation.take, feed if protocol == self.protocol else None, images)
        if len(evaluation.own.images) == self.protocol.paired().num_images:
            self._reference = evaluation.own
        return evaluation

    def _make(
        self,
        candidate: Candidate,
        protocol: Protocol,
        take: Callable[[Made], None],
        feed: Feed | None,
        images: Images,
    ) -> None:
        """Make the images of a candidate; with latents where a metric reads them, and then here in any case."""
        if feed is not None and not self._needs_latents:
            feed(candidate, lambda batch: take(Made(batch)))
            return
        if not self._needs_latents:
            for batch in images(candidate, protocol):
                take(Made(batch))
            return
        for indices in protocol.micro_batches():
            latents = self.module.latents(candidate, indices, protocol.seed)
            with torch.inference_mode():
                take(Made(self.module.task.decode(latents), latents))

    def _reference_made(self, micro_batch: int, images: Images) -> Made:
        """The float reference's images of the first of these seeds, made at this micro-batch if they are not there."""
        if self._reference is None:
            parts, protocol = list[Made](), replace(self.protocol.paired(), micro_batch=micro_batch)
            self._make(self.reference_candidate, protocol, parts.append, None, images)
            self._reference = reduce(Made.joined, parts)[: protocol.num_images]
        return self._reference


def label(candidate: Candidate, weighted: Sequence[bool]) -> dict[str, float | str]:
    """Summary of a candidate's bits: means over layers, and a name such as ``W6A6`` where they are uniform."""
    weight_bits = [b for a in candidate.allocations for b, has in zip(a.weight_bits, weighted, strict=True) if has]
    act_bits = [b for a in candidate.allocations for b in a.act_bits]
    uniform = len(set(weight_bits)) == len(set(act_bits)) == 1
    means = sum(weight_bits) / len(weight_bits), sum(act_bits) / len(act_bits)
    if uniform:
        name = "float" if means == (32, 32) else f"W{weight_bits[0]}A{act_bits[0]}"
    else:
        name = f"W{means[0]:.1f}A{means[1]:.1f} mixed"
    return {"weight_bits_mean": means[0], "act_bits_mean": means[1], "label": name}
