"""The objective: each candidate once, failures recorded with their cause, fingerprints that separate protocols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from tests.search.conftest import REFERENCE, FakeMetric, Setup, candidate, fake_task
from tmpq_exp.metrics.metric import Batch, PerImageMetric
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.search.objective import Feed, label
from tmpq_exp.search.protocol import Protocol
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.zoo.conditioning import Prompts


@dataclass
class Seen(PerImageMetric):
    """Remembers its batches."""

    name: str = "seen"
    needs: Any = frozenset()
    batches: list[Batch] = field(default_factory=list)

    def values(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return batch.images.flatten(1).mean(1)

    def fingerprint(self) -> dict[str, Any]:
        return {"metric": self.name}


def byte(brightness: float) -> float:
    """Brightness of an image as it is saved."""
    return round(brightness * 255) / 255


def test_images_come_in_micro_batches_of_one_stream(setup: Setup) -> None:
    setup.objective().evaluate(candidate(8), "search", generation=0)
    batches = [(0, 1), (2, 3), (4, 5)]  # the last one is whole; what is beyond num_images is left out
    expected = [(c.key(), batch, 3) for c in (REFERENCE, candidate(8)) for batch in batches]
    assert setup.supernet.calls == expected


def test_a_trial_holds_quality_cost_and_protocol(setup: Setup) -> None:
    objective = setup.objective()
    trial = objective.evaluate(candidate(8, 6), "search", generation=2)
    assert trial.metrics["brightness"] == pytest.approx(8 / 64)
    assert trial.metrics["psnr_db"] == pytest.approx(-20 * torch.log10(torch.tensor(24 / 64)).item(), abs=1e-4)
    assert (trial.bitops, trial.macs) == (2 * 48 * (64 + 32), 2 * (64 + 32))
    assert trial.weight_bytes == 64
    assert (trial.num_images, trial.seed, trial.fingerprint) == (5, 3, objective.fingerprint)
    assert (trial.phase, trial.generation, trial.index, trial.error) == ("search", 2, 0, None)
    assert setup.told == setup.trials.trials == TrialLog(setup.trials.path).trials == [trial]


def test_no_candidate_is_scored_twice(setup: Setup) -> None:
    objective = setup.objective()
    first = objective.evaluate(candidate(8), "search", generation=0)
    calls = len(setup.supernet.calls)
    assert objective.evaluate(candidate(8), "baseline", name="w8a8") is first
    assert setup.objective().evaluate(candidate(8), "search", generation=1) is first
    assert len(setup.supernet.calls) == calls
    assert setup.told == [first]
    assert setup.trials.path.read_bytes().count(b"\n") == 1


def test_the_float_reference_is_made_once_and_is_perfect(setup: Setup) -> None:
    objective = setup.objective()
    trial = objective.evaluate(REFERENCE, "final", name="float_reference")
    objective.evaluate(candidate(8), "final")
    objective.evaluate(candidate(6), "final")
    assert trial.metrics["psnr_db"] is None  # infinite
    assert sum(key == REFERENCE.key() for key, _, _ in setup.supernet.calls) == 3


def handing_on(made: list[Tensor]) -> Feed:
    """A feed of these micro-batches."""

    def feed(_: Candidate, take: Callable[[Tensor], None]) -> None:
        for images in made:
            take(images)

    return feed


def test_few_images_are_compared_with_the_reference(setup: Setup) -> None:
    objective = setup.objective(protocol=Protocol(num_images=6, seed=3, micro_batch=2, paired_images=3))
    made = [torch.full((2, 1, 2, 2), value) for value in (0.5, 0.25, 0.0)]
    trial = objective.evaluate(candidate(8), "search", feed=handing_on(made))
    reference = [batch for key, batch, _ in setup.supernet.calls if key == REFERENCE.key()]
    assert reference == [(0, 1), (2, 3)]  # whole micro-batches
    assert trial.metrics["feature_mse"] == pytest.approx(
        (0 + 0 + (byte(0.5) - byte(0.25)) ** 2) / 3
    )  # the reference is 0.5 everywhere
    assert trial.metrics["brightness"] == pytest.approx(0.25)


def test_images_may_be_made_elsewhere(setup: Setup) -> None:
    made = [torch.full((5, 1, 2, 2), 0.25)]
    trial = setup.objective().evaluate(REFERENCE, "final", feed=handing_on(made))
    assert trial.metrics["brightness"] == 0.25
    assert setup.supernet.calls == []


def test_a_candidate_whose_images_hold_nan_fails_and_the_next_one_is_scored(setup: Setup) -> None:
    setup.supernet.bad = candidate(6)
    objective = setup.objective()
    failed = objective.evaluate(candidate(6), "search", generation=0)
    assert failed.error == "images held NaN or infinity"
    assert failed.metrics == {"brightness": None, "psnr_db": None, "feature_mse": None}
    assert failed.score("brightness") == float("inf")
    assert objective.evaluate(candidate(8), "search", generation=0).error is None
    calls = len(setup.supernet.calls)
    assert TrialLog(setup.trials.path).find(candidate(6), objective.fingerprint, "s") == failed
    assert objective.evaluate(candidate(6), "search", generation=1) is failed  # nor is it tried again
    assert len(setup.supernet.calls) == calls


@pytest.mark.parametrize(
    ("metric", "cause"),
    [
        (FakeMetric(value=float("nan")), "brightness was nan"),
        (FakeMetric(value=float("inf")), "brightness was inf"),
        (FakeMetric(raises=ValueError("Imaginary component 0.1")), "brightness: Imaginary component 0.1"),
        (FakeMetric(raises=LinAlgError("singular")), "brightness: singular"),
    ],
)
def test_a_metric_that_breaks_down_is_a_failed_trial(metric: FakeMetric, cause: str, setup: Setup) -> None:
    trial = setup.objective(metric=metric).evaluate(candidate(8), "search")
    assert trial.error == cause
    assert trial.metrics["brightness"] is None
    assert trial.metrics["psnr_db"] is not None


def test_other_quantizers_are_other_trials_under_the_same_fingerprint(setup: Setup) -> None:
    first, other = setup.objective(), setup.objective(state="t")
    assert first.fingerprint == other.fingerprint
    trials = [objective.evaluate(candidate(8), "search") for objective in (first, other)]
    assert [trial.index for trial in trials] == [0, 1]
    assert [first.covers(trial) for trial in trials] == [True, False]


def test_a_cheap_look_measures_the_distance_to_the_reference_alone(setup: Setup) -> None:
    objective = setup.objective(metric=FakeMetric(raises=ValueError("never asked")), measures_quality=False)
    trial = objective.evaluate(candidate(8), "proxy", generation=0)
    assert trial.error is None
    assert trial.metrics.keys() == {"psnr_db", "feature_mse"}
    assert trial.metrics["feature_mse"] == pytest.approx((byte(0.5) - byte(8 / 64)) ** 2)


def test_intervals_stand_beside_the_quality_where_they_are_asked_for(setup: Setup) -> None:
    assert setup.objective().evaluate(candidate(8), "search").intervals is None
    trial = setup.objective(bootstrap=2, protocol=Protocol(4, 9, 2)).evaluate(candidate(8), "final")
    assert trial.intervals == {"brightness": pytest.approx([8 / 64 - 2, 8 / 64 + 2])}
    assert TrialLog(setup.trials.path).trials[-1] == trial


def test_further_metrics_stand_beside_the_quality_with_fingerprints_of_their_own(setup: Setup, tmp_path: Path) -> None:
    plain = setup.objective().evaluate(candidate(8), "final")
    objective = setup.objective(further=[Seen(), FakeMetric(name="dark", reference="s")])
    trial = objective.evaluate(candidate(8), "final")
    assert trial.metrics == {**plain.metrics, "seen": pytest.approx(8 / 64), "dark": pytest.approx(8 / 64)}
    assert trial.fingerprint == plain.fingerprint  # the quality is measured as without them
    assert trial.further == objective.further_fingerprints
    assert objective.evaluate(candidate(8), "final") is trial
    other = setup.objective(further=[Seen(), FakeMetric(name="dark", reference="t")])
    changed = {name for name, found in other.further_fingerprints.items() if found != trial.further[name]}
    assert changed == {"dark"}
    assert other.evaluate(candidate(8), "final").index == trial.index + 1


def test_a_further_metric_that_breaks_down_leaves_the_trial_good(setup: Setup) -> None:
    further = [FakeMetric(name="dark", raises=ValueError("too few images")), FakeMetric(name="nan", value=float("nan"))]
    trial = setup.objective(further=further).evaluate(candidate(8), "final")
    assert (trial.error, trial.metrics["dark"], trial.metrics["nan"]) == (None, None, None)
    assert trial.missing == {"dark": "dark: too few images", "nan": "nan was nan"}


def test_metrics_see_prompts_and_the_reference_of_the_first_images(setup: Setup) -> None:
    setup.supernet.task.conditions = Prompts(["one", "two", "three"], lambda _: torch.zeros(1, 1), "e")
    seen = Seen()
    protocol = Protocol(num_images=5, seed=3, micro_batch=2, paired_images=3)
    setup.objective(further=[seen], protocol=protocol).evaluate(candidate(8), "final")
    assert [batch.prompts for batch in seen.batches] == [("one", "two"), ("three", "one"), ("two",)]
    assert [len(batch.reference) for batch in seen.batches if batch.reference is not None] == [2, 1, 0]
    assert {batch.latents for batch in seen.batches} == {None}


@pytest.mark.parametrize("chosen", [candidate(8), REFERENCE])
def test_latents_are_there_where_a_metric_reads_them(setup: Setup, chosen: Candidate) -> None:
    seen = Seen(needs=frozenset({"latents"}))
    protocol = Protocol(num_images=5, seed=3, micro_batch=2, paired_images=3)
    objective = setup.objective(further=[seen], protocol=protocol)
    objective.evaluate(chosen, "final", feed=lambda *_: pytest.fail("images without their latents"))
    bits = chosen.allocations[0].weight_bits[0]
    assert [len(batch.images) for batch in seen.batches] == [2, 2, 1]
    for batch, count in zip(seen.batches, (2, 1, 0), strict=True):
        assert batch.latents is not None
        assert batch.reference_latents is not None
        assert batch.latents.unique().tolist() == [bits / 32 - 1]
        assert (batch.latents / 2 + 0.5).equal(batch.images)
        assert len(batch.reference_latents) == count
        assert not batch.reference_latents.any()


def test_a_metric_without_features_has_no_feature_error(setup: Setup) -> None:
    trial = setup.objective(metric=FakeMetric(network=None)).evaluate(candidate(8), "search")
    assert trial.metrics.keys() == {"brightness", "psnr_db"}


def test_higher_is_better_where_the_name_says_so(setup: Setup) -> None:
    trials = [setup.objective(metric=FakeMetric(name="ssim")).evaluate(candidate(bits), "search") for bits in (8, 6)]
    assert [trial.metrics["ssim"] for trial in trials] == [8 / 64, 6 / 64]
    assert trials[0].score("ssim") < trials[1].score("ssim") < float("inf")
    assert setup.objective(metric=FakeMetric(name="ssim", value=float("nan"))).evaluate(candidate(5), "search").score(
        "ssim"
    ) == float("inf")


def test_the_interval_of_a_candidate_is_that_of_its_quality(setup: Setup) -> None:
    assert setup.objective().interval(candidate(8), 2) == pytest.approx([8 / 64 - 2, 8 / 64 + 2])
    setup.supernet.bad = candidate(6)
    assert setup.objective().interval(candidate(6), 2) is None


def test_what_an_earlier_run_measured_is_recorded_and_not_measured(setup: Setup, tmp_path: Path) -> None:
    measured = setup.objective().evaluate(candidate(8), "search", generation=3)
    log = TrialLog(tmp_path / "later" / "trials.jsonl", [tmp_path])
    log.path.parent.mkdir()
    calls = len(setup.supernet.calls)
    later = setup.objective(trials=log)
    trial = later.evaluate(candidate(8), "random", generation=0)
    assert (trial.index, trial.phase, trial.generation, trial.source) == (0, "random", 0, str(tmp_path))
    assert trial.metrics == measured.metrics
    assert later.evaluate(candidate(8), "search") is trial
    assert TrialLog(log.path).trials == [trial]
    assert len(setup.supernet.calls) == calls
    assert setup.objective(trials=log, state="t").evaluate(candidate(8), "search").source is None


def test_a_broken_program_is_no_failed_candidate(setup: Setup) -> None:
    with pytest.raises(TypeError):
        setup.objective(metric=FakeMetric(raises=TypeError())).evaluate(candidate(8), "search")
    assert setup.trials.trials == []


def test_the_fingerprint_changes_with_all_that_a_figure_depends_on(setup: Setup) -> None:
    objectives = [
        setup.objective(),
        setup.objective(protocol=Protocol(6, 3, 2)),
        setup.objective(protocol=Protocol(5, 4, 2)),
        setup.objective(protocol=Protocol(5, 3, 3)),
        setup.objective(measures_quality=False),
        setup.objective(protocol=Protocol(5, 3, 2, paired_images=2)),
        setup.objective(reference_candidate=candidate(32, 32)),
        setup.objective(metric=FakeMetric(reference="q")),
    ]
    for change in ({"weights": "v"}, {"sampler": "t"}):
        setup.supernet.task = fake_task(**change)
        objectives.append(setup.objective())
    assert len({objective.fingerprint for objective in objectives}) == len(objectives)
    setup.supernet.task = fake_task()
    assert setup.objective().fingerprint == objectives[0].fingerprint


def test_an_index_is_the_line_number_also_behind_a_damaged_line(setup: Setup) -> None:
    setup.objective().evaluate(candidate(8), "search")
    with setup.trials.path.open("ab") as file:
        file.write(b"damaged\n")
    trials = TrialLog(setup.trials.path)
    assert setup.objective(trials=trials).evaluate(candidate(6), "search").index == 2


@pytest.mark.parametrize(
    ("bits", "name"), [((32, 32), "float"), ((6, 6), "W6A6"), ((4, 8), "W4A8"), ((32, 8), "W32A8")]
)
def test_label_names_uniform_bits(bits: tuple[int, int], name: str) -> None:
    assert label(candidate(*bits), [True, True])["label"] == name


def test_label_of_mixed_bits_leaves_out_layers_without_weights() -> None:
    mixed = Candidate((1, 0), (Allocation((8, 4, 2), (6, 6, 3), (0, 0, 0)),))
    assert label(mixed, [True, True, False]) == {
        "weight_bits_mean": 6.0,
        "act_bits_mean": 5.0,
        "label": "W6.0A5.0 mixed",
    }
