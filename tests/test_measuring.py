"""Metrics are chosen by name and checked against the model before anything is computed; what lacks weights is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose
from hydra.errors import InstantiationException

from tmpq_exp.config import Config, UserError, to_config
from tmpq_exp.measuring import chosen_metrics
from tmpq_exp.metrics.metric import MissingWeights
from tmpq_exp.overrides import is_bad_input
from tmpq_exp.zoo.conditioning import Prompts
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import DiffusionTask

pytestmark = pytest.mark.usefixtures("hydra")


@pytest.fixture(scope="module")
def task() -> DiffusionTask:
    """Makes gray images of 16x16 pixels, without prompts."""
    return DigitsDDPM().task()


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder of torch's downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def config(*overrides: str) -> Config:
    return to_config(compose("config", ["paths.run_dir=somewhere", *overrides]))


def test_metrics_are_chosen_by_name_or_given_whole(task: DiffusionTask) -> None:
    own = "{_target_: tmpq_exp.metrics.fidelity.LatentSqnr}"
    found = chosen_metrics(config(f"evaluation.further=[ssim,{own}]"), task)
    assert found.quality.name == "fd_digits"
    assert [metric.name for metric in found.further] == ["ssim", "latent_sqnr_db"]
    assert found.warnings == ()
    assert chosen_metrics(config("evaluation.metric=ssim"), task).quality.higher_is_better
    assert chosen_metrics(
        config("+metrics.mine={_target_: tmpq_exp.metrics.fidelity.Ssim}", "evaluation.metric=mine"), task
    )


def test_a_further_metric_without_weights_is_left_out_with_a_warning(task: DiffusionTask, tmp_path: Path) -> None:
    found = chosen_metrics(config("evaluation.further=[kid,ssim,clip_score]", "metrics.kid.reference=nowhere"), task)
    assert [metric.name for metric in found.further] == ["ssim"]
    kid, clip = found.warnings
    assert kid.startswith("left out of evaluation.further: kid: no weights at ")
    assert f"{tmp_path}/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth" in kid
    assert clip.startswith("left out of evaluation.further: clip_score: no folder of a CLIP at None")


@pytest.mark.parametrize("metric", ["fid", "fid_torchmetrics", "sfid", "kid", "inception_score", "clip_score", "lpips"])
def test_the_searched_metric_must_have_its_weights(metric: str, task: DiffusionTask) -> None:
    with pytest.raises(InstantiationException) as caught:
        chosen_metrics(config(f"evaluation.metric={metric}"), task)
    assert isinstance(caught.value.__cause__, MissingWeights)
    assert str(caught.value.__cause__).startswith(f"{metric}: no ")
    assert is_bad_input(caught.value)


def test_other_faults_of_a_further_metric_stop_the_run(task: DiffusionTask) -> None:
    with pytest.raises(InstantiationException, match="weights-of-nothing") as caught:
        chosen_metrics(
            config("evaluation.further=[fd_cifar10]", "metrics.fd_cifar10.checkpoint=weights-of-nothing"), task
        )
    assert is_bad_input(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.further=[fd_cifar10]"],
            r"evaluation\.further: fd_cifar10 takes images of shape \(3, 32, 32\), found \(1, 16, 16\), as model "
            "ddpm_digits makes them",
        ),
        (["evaluation.metric=fd_cifar10"], r"evaluation\.metric: fd_cifar10 takes images of shape"),
        (
            ["evaluation.further=[{_target_: tmpq_exp.metrics.frechet.digits_frechet}]"],
            r"evaluation\.further must not repeat a metric, found fd_digits, fd_digits",
        ),
        (
            ["evaluation.metric=ssim", "objective=multi_fidelity"],
            r"objective\.proxy: ssim has no feature network behind feature_mse; choose psnr_db or null",
        ),
    ],
)
def test_metrics_that_do_not_fit_are_refused(overrides: list[str], message: str, task: DiffusionTask) -> None:
    with pytest.raises(UserError, match=message):
        chosen_metrics(config(*overrides), task)


def test_prompt_scores_need_prompts(task: DiffusionTask, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config("evaluation.further=[{_target_: tests.test_measuring.prompt_score}]")
    with pytest.raises(UserError, match=r"evaluation\.further: clip_none compares images with prompts, and model"):
        chosen_metrics(own, task)
    with_text = replace(task, conditions=Prompts(["a"], lambda _: torch.zeros(1, 1), "e"))
    assert [metric.name for metric in chosen_metrics(own, with_text).further] == ["clip_none"]


def prompt_score() -> object:
    """A prompt score that is never measured."""
    from tmpq_exp.metrics.clip import PromptScore

    return PromptScore("clip_none", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metric=fdi", r"evaluation\.metric: no metric 'fdi'; known: .*fid_torchmetrics"),
        ("evaluation.further=[ssim,fdi]", r"evaluation\.further: no metric 'fdi'; known: "),
        ("evaluation.further=[fd_digits]", r"evaluation\.further must not repeat a metric, found 'fd_digits' twice"),
        ("evaluation.further=[ssim,ssim]", r"evaluation\.further must not repeat a metric, found 'ssim' twice"),
        ("evaluation.further=[7]", r"evaluation\.further must be a name \(.*\) or a _target_, found 7"),
        ("evaluation.metric={name: fid}", r"evaluation\.metric must be a name .*found \{'name': 'fid'\}"),
    ],
)
def test_names_are_checked_before_anything_is_loaded(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(override)
