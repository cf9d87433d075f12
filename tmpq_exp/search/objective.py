"""What a candidate is worth: the protocol of an evaluation, its fingerprint, and the evaluation itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from tmpq_exp.cost import CostModel
from tmpq_exp.metrics.control import ControlVariate
from tmpq_exp.metrics.fidelity import mean_psnr_db
from tmpq_exp.metrics.frechet import FeatureSums, FrechetMetric
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.rundir import digest
from tmpq_exp.search.trials import Trial, TrialLog, finite_metrics
from tmpq_exp.zoo.weights import content_hash

MicroBatches = Callable[[Candidate], Iterable[Tensor]]
"""Images of a candidate under a protocol, one micro-batch after the other."""


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
        metric: Quality metric.
        candidate: The schedule, float.
        protocol: Which images its statistics come from; other seeds than any candidate's.
    """

    def __init__(self, module: SupernetModule, metric: FrechetMetric, candidate: Candidate, protocol: Protocol) -> None:
        self.module, self.metric, self.candidate, self.protocol = module, metric, candidate, protocol

    @cached_property
    def variate(self) -> ControlVariate:
        """The control variate, its statistics measured at first use."""
        sums, batches = FeatureSums(self.metric.network), self.protocol.micro_batches()
        with StageBar("control images", len(batches)) as bar:
            for images in self.protocol.wanted(self._images(self.protocol)):
                sums.update(images)
                bar.advance()
        return ControlVariate(self.metric, sums.statistics())

    def features(self, protocol: Protocol) -> Tensor:
        """Features of its images under a candidate's protocol."""
        return self.variate.features(protocol.wanted(self._images(protocol)))

    def _images(self, protocol: Protocol) -> Iterator[Tensor]:
        for indices in protocol.micro_batches():
            yield self.module.images(self.candidate, indices, protocol.seed)

    def fingerprint(self) -> dict[str, str | int]:
        """What the control depends on."""
        return {"schedule": self.candidate.key(), "num_images": self.protocol.num_images, "seed": self.protocol.seed}


PROXIES = ("psnr_db", "feature_mse")
"""Metrics against the float reference's images of the same seeds."""


class Objective:
    """Scores candidates under one protocol, each at most once.

    Every trial has ``psnr_db`` and ``feature_mse``, both against the float reference's images of the same seeds, on the
    first ``paired_images``: they need few, and the reference has many steps.

    Args:
        module: Supernet.
        metric: Quality metric, lower is better.
        protocol: Which images.
        cost: Prices candidates.
        trials: Where evaluations are kept and looked up.
        reference_candidate: Float schedule whose images, at the same seeds, are the reference of the proxies.
        state: Hash of the quantizers and transform scales that the supernet computes with.
        on_trial: Called with every new trial.
        measures_quality: Whether the quality metric is measured; without it a trial has the proxies alone.
        bootstrap: Resamples behind the quality's interval over images; 0 leaves it out.
        control: Control variate of the score; with it a trial also has ``<metric>_controlled``, which is its score.
    """

    def __init__(
        self,
        module: SupernetModule,
        metric: FrechetMetric,
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
    ) -> None:
        self.module, self.metric, self.protocol, self.cost, self.trials = module, metric, protocol, cost, trials
        self.reference_candidate, self._on_trial = reference_candidate, on_trial
        self.state, self.measures_quality, self.bootstrap = state, measures_quality, bootstrap
        self.control = control if measures_quality else None
        self._reference: Tensor | None = None
        task = module.task
        is_cuda = module.device.type == "cuda"
        self.fingerprint_parts = {
            **metric.fingerprint(),
            **asdict(protocol),
            "model": task.weights_hash,
            "schedule": content_hash({"alphas_cumprod": task.alphas_cumprod}),
            "sample_shape": list(task.sample_shape),
            "num_classes": task.num_classes,
            "torch": torch.__version__,
            "sampler": f"ddim, eta 0, clip_sample {task.clip_sample}",
            "psnr_reference": reference_candidate.key(),
            "dtype": "float32",
            "tf32": torch.backends.cudnn.allow_tf32 if is_cuda else None,
            "resize": "none",
            "device": module.device.type,
            "num_threads": None if is_cuda else torch.get_num_threads(),
            "quality": measures_quality,
        }
        if self.control is not None:
            self.fingerprint_parts["control"] = self.control.fingerprint()
        self.fingerprint = digest(self.fingerprint_parts)

    def images(self, candidate: Candidate) -> Iterator[Tensor]:
        """Images of a candidate, one micro-batch after the other; they stay on the device."""
        yield from self._images(candidate, self.protocol)

    def _images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        for indices in protocol.micro_batches():
            yield self.module.images(candidate, indices, protocol.seed)

    @property
    def score_name(self) -> str:
        """Name of the metric that candidates are ranked by."""
        return self.metric.name if self.control is None else f"{self.metric.name}_controlled"

    def score(self, trial: Trial) -> float:
        """What a trial is ranked by, lower is better; infinite if it failed."""
        return trial.score(self.score_name)

    @cached_property
    def _control_features(self) -> Tensor:
        assert self.control is not None
        return self.control.features(self.protocol)

    def interval(self, candidate: Candidate, num_resamples: int) -> tuple[float, float]:
        """Bootstrap interval of a candidate's score over images, 95 %."""
        images = self.protocol.wanted(self.images(candidate))
        if self.control is None:
            return self.metric.interval(images, num_resamples, self.protocol.seed)
        variate = self.control.variate
        return variate.interval(variate.features(images), self._control_features, num_resamples, self.protocol.seed)

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
        images: MicroBatches | None = None,
    ) -> Trial:
        """Trial of a candidate: the recorded one if there is one, else a new one, recorded before it is returned.

        One that an earlier run recorded is recorded here again, with its source, and not measured.

        Args:
            candidate: What to score.
            phase, name, generation: See ``Trial``.
            images: Makes the images instead of ``self.images``; must make the same ones.
        """
        known = self.trials.find(candidate, self.fingerprint, self.state)
        if known is not None:
            return known
        earlier = self.trials.find_elsewhere(candidate, self.fingerprint, self.state)
        if earlier is not None:
            index = self.trials.num_lines
            trial = replace(earlier, index=index, phase=phase, name=name, generation=generation)
        else:
            trial = self._trial(candidate, phase, name, generation, images or self.images)
        self.trials.append(trial)
        self._on_trial(trial)
        return trial

    def _trial(
        self, candidate: Candidate, phase: str, name: str | None, generation: int | None, images: MicroBatches
    ) -> Trial:
        """Measure a candidate."""
        metrics, intervals, error = self._measure(candidate, images)
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
            error=error,
            intervals=intervals,
        )

    def _measure(
        self, candidate: Candidate, images: MicroBatches
    ) -> tuple[dict[str, float], dict[str, list[float]] | None, str | None]:
        """Metrics, their intervals, and why the quality could not be had."""
        batches = list(self.protocol.wanted(images(candidate)))
        made = torch.cat(batches)
        quality = {self.metric.name: math.nan} if self.measures_quality else {}
        if not made.isfinite().all():
            return quality | dict.fromkeys(PROXIES, math.nan), None, "images held NaN or infinity"
        reference = self._reference_images(candidate, made)
        paired = made[: len(reference)]
        metrics = quality | {
            "psnr_db": mean_psnr_db(paired, reference),
            "feature_mse": self.metric.paired(paired, reference),
        }
        if not self.measures_quality:
            return metrics, None, None
        try:
            value = self.metric(batches)
        except (ValueError, LinAlgError) as error:  # features too degenerate for the metric: this candidate's fault
            return metrics, None, f"{self.metric.name}: {error}"
        if not math.isfinite(value):
            return metrics, None, f"{self.metric.name} was {value}"
        metrics[self.metric.name] = value
        if self.control is not None:
            variate = self.control.variate
            metrics[self.score_name] = variate.distance(variate.features(batches), self._control_features)
        if not self.bootstrap:
            return metrics, None, None
        interval = self.metric.interval(batches, self.bootstrap, self.protocol.seed)
        return metrics, {self.metric.name: list(interval)}, None

    def _reference_images(self, candidate: Candidate, made: Tensor) -> Tensor:
        """The float reference's images of the same seeds as the first of these."""
        protocol = self.protocol.paired()
        if candidate == self.reference_candidate:
            self._reference = made[: protocol.num_images]
        elif self._reference is None:
            self._reference = torch.cat(list(protocol.wanted(self._images(self.reference_candidate, protocol))))
        return self._reference.to(made.device)


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
