"""What a candidate is worth: the protocol of an evaluation, its fingerprint, and the evaluation itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.config.identity import digest
from tmpq_exp.cost import CostModel
from tmpq_exp.metrics.control import ControlledFrechet
from tmpq_exp.metrics.fidelity import FeatureError, Psnr
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.metrics.metric import Measurement, Metric, features_of
from tmpq_exp.metrics.statistics import FeatureStatistics, FeatureSums
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.evaluation import Evaluation, Made
from tmpq_exp.search.memory import with_less_memory
from tmpq_exp.search.trials import Trial, TrialLog, finite_metrics
from tmpq_exp.zoo.conditioning import Prompts

Feed = Callable[[Candidate, Callable[[Tensor], None]], None]
"""Makes the images of a candidate under a protocol and hands on one whole micro-batch after the other."""


@dataclass(frozen=True)
class Protocol:
    """Which images an evaluation makes.

    Args:
        num_images: Number of images.
        seed: Seed of the image stream; search, selection and final evaluation have different ones.
        micro_batch: Images a forward.
        paired_images: Images, the first of them, that are compared with the float reference's of the same seeds.
    """

    num_images: int
    seed: int
    micro_batch: int
    paired_images: int = 256

    def micro_batches(self) -> list[range]:
        """Image indices of every forward; the last one is whole too, so that an image never depends on their number."""
        return [range(i, i + self.micro_batch) for i in range(0, self.num_images, self.micro_batch)]

    def paired(self) -> Protocol:
        """The same with no more images than are compared with the float reference's."""
        return replace(self, num_images=min(self.num_images, self.paired_images))

    def wanted(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """These micro-batches without the images beyond ``num_images``."""
        missing = self.num_images
        for images in batches:
            yield images[:missing]
            missing -= len(images)


class Control:
    """A schedule whose images of the same seeds stand beside every candidate's, to take chance out of the score.

    Args:
        module: Makes the images.
        metric: Quality metric, made ready.
        candidate: The schedule, float.
        protocol: Which images its statistics come from; other seeds than any candidate's.
    """

    def __init__(self, module: SupernetModule, metric: FrechetMetric, candidate: Candidate, protocol: Protocol) -> None:
        self.module, self.metric, self.candidate, self.protocol = module, metric, candidate, protocol

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Of its own images, measured at first use."""

        def measure(micro_batch: int) -> FeatureStatistics:
            protocol, sums = replace(self.protocol, micro_batch=micro_batch), FeatureSums(self.metric.network)
            with StageBar("control images", len(protocol.micro_batches())) as bar:
                for images in self._images(protocol):
                    sums.update(images)
                    bar.advance()
            return sums.statistics()

        return with_less_memory("control images", self.protocol.micro_batch, measure)[0]

    def under(self, protocol: Protocol) -> ControlledFrechet:
        """The metric of candidates under a protocol."""
        facts = {"schedule": self.candidate.key(), "images": self.protocol.num_images, "seed": self.protocol.seed}

        def measure(micro_batch: int) -> Tensor:
            images = self._images(replace(protocol, micro_batch=micro_batch))
            return torch.cat([features_of(self.metric.network, some).cpu() for some in images])

        found = cache(lambda: with_less_memory("control images", protocol.micro_batch, measure)[0])
        return ControlledFrechet(self.metric, lambda: self.statistics, found, facts)

    def _images(self, protocol: Protocol) -> Iterator[Tensor]:
        made = (self.module.images(self.candidate, some, protocol.seed) for some in protocol.micro_batches())
        yield from protocol.wanted(made)


PROXIES = ("psnr_db", "feature_mse")
"""Metrics against the float reference's images of the same seeds."""


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
    ) -> None:
        self.module, self.metric, self.protocol, self.cost, self.trials = module, metric, protocol, cost, trials
        self.reference_candidate, self._on_trial = reference_candidate, on_trial
        self.state, self.measures_quality, self.bootstrap = state, measures_quality, bootstrap
        self.further = tuple(further)
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
        known = self.trials.find(candidate, self.fingerprint, self.state)
        if known is not None and self._has_further(known):
            return known
        earlier = self.trials.find_elsewhere(candidate, self.fingerprint, self.state)
        if earlier is not None and self._has_further(earlier):
            index = self.trials.num_lines
            trial = replace(earlier, index=index, phase=phase, name=name, generation=generation)
        else:
            trial = self._trial(candidate, phase, name, generation, feed)
        self.trials.append(trial)
        self._on_trial(trial)
        return trial

    def _has_further(self, trial: Trial) -> bool:
        """Whether a trial was measured by these further metrics too."""
        return self.further_fingerprints.items() <= (trial.further or {}).items()

    def _trial(
        self, candidate: Candidate, phase: str, name: str | None, generation: int | None, feed: Feed | None
    ) -> Trial:
        """Measure a candidate."""
        what = f"evaluation of {candidate.key()}"
        action = partial(self._measure, candidate, feed)
        (metrics, intervals, problems), micro_batch = with_less_memory(what, self.protocol.micro_batch, action)
        judged = (self.score.name,) if self.measures_quality else PROXIES
        missing = {name: problems[name] for name in self.further_fingerprints if name in problems}
        return Trial(
            index=self.trials.num_lines,
            phase=phase,
            name=name,
            generation=generation,
            key=candidate.key(),
            candidate=candidate.to_json(),
            bitops=self.cost.bitops(candidate),
            macs=self.cost.macs(candidate),
            weight_bytes=self.cost.weight_bytes(candidate),
            metrics=finite_metrics(metrics),
            num_images=self.protocol.num_images,
            seed=self.protocol.seed,
            fingerprint=self.fingerprint,
            state=self.state,
            error=next((problems[name] for name in judged if name in problems), None),
            intervals=intervals,
            further=self.further_fingerprints or None,
            missing=missing or None,
            micro_batch=None if micro_batch == self.protocol.micro_batch else micro_batch,
        )

    def _measure(
        self, candidate: Candidate, feed: Feed | None, micro_batch: int
    ) -> tuple[dict[str, float], dict[str, list[float]] | None, dict[str, str]]:
        """Metrics, their intervals, and why a metric could not be had."""
        started = self._started()
        metrics, problems = self._evaluated(candidate, started, micro_batch, feed).values()
        main = self.metric.name
        if not self.bootstrap or not self.measures_quality or main in problems:
            return metrics, None, problems
        interval = started[main].interval(self.bootstrap, self.protocol.seed)
        return metrics, None if interval is None else {main: list(interval)}, problems

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
            _, problems = self._evaluated(candidate, {self.score.name: measurement}, micro_batch).values()
            return None if problems else measurement.interval(num_resamples, self.protocol.seed)

        interval, _ = with_less_memory(f"interval of {candidate.key()}", self.protocol.micro_batch, measure)
        return None if interval is None else list(interval)

    def _evaluated(
        self, candidate: Candidate, started: Mapping[str, Measurement], micro_batch: int, feed: Feed | None = None
    ) -> Evaluation:
        """Measurements that have taken all images of a candidate, made at this micro-batch."""
        protocol = replace(self.protocol, micro_batch=micro_batch)
        is_reference = candidate == self.reference_candidate
        conditions = self.module.task.conditions
        evaluation = Evaluation(
            started,
            self.protocol.num_images,
            self.protocol.paired().num_images,
            None if is_reference else self._reference_made(micro_batch),
            conditions.of_images if isinstance(conditions, Prompts) else None,
            self._reference_memos,
        )
        self._make(candidate, protocol, evaluation.take, feed if protocol == self.protocol else None)
        if len(evaluation.own.images) == self.protocol.paired().num_images:
            self._reference = evaluation.own
        return evaluation

    def _make(
        self, candidate: Candidate, protocol: Protocol, take: Callable[[Made], None], feed: Feed | None = None
    ) -> None:
        """Make the images of a candidate; with latents where a metric reads them, and then here in any case."""
        if feed is not None and not self._needs_latents:
            feed(candidate, lambda images: take(Made(images)))
            return
        for indices in protocol.micro_batches():
            if self._needs_latents:
                latents = self.module.latents(candidate, indices, protocol.seed)
                with torch.inference_mode():
                    take(Made(self.module.task.decode(latents), latents))
            else:
                take(Made(self.module.images(candidate, indices, protocol.seed)))

    def _reference_made(self, micro_batch: int) -> Made:
        """The float reference's images of the first of these seeds, made at this micro-batch if they are not there."""
        if self._reference is None:
            parts, protocol = list[Made](), replace(self.protocol.paired(), micro_batch=micro_batch)
            self._make(self.reference_candidate, protocol, parts.append)
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
