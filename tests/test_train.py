"""task=train: weights, reference statistics and model card of a short run, and what a finished run does again."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import UserError, register_schema, to_config
from tmpq_exp.metrics.statistics import FeatureStatistics
from tmpq_exp.train import train
from tmpq_exp.zoo.clip import DigitsCLIP
from tmpq_exp.zoo.digits import DigitsClassifier, DigitsDDPM
from tmpq_exp.zoo.text_to_image import DigitsTextToImage
from tmpq_exp.zoo.training import ClassifierTraining


def run(directory: Path, *overrides: str) -> None:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().resolve())):
        composed = compose(
            "config", ["task=train", f"paths.run_dir={directory}", "num_threads=1", "logger=csv", *overrides]
        )
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    train(to_config(composed), {str(key): value for key, value in resolved.items()})


def test_a_classifier_leaves_weights_statistics_and_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("model=digits_classifier", "data=digits_holdout", "model.recipe.num_steps=60")
    run(tmp_path, *overrides)
    DigitsClassifier(str(tmp_path / "model.safetensors")).load()
    assert FeatureStatistics.load(tmp_path / "reference.safetensors").num_images == 1797
    card = (tmp_path / "model_card.md").read_text()
    for fact in ("| seed | 0 |", "scikit-learn", "top-1 on held-out images", "training time", "final training loss"):
        assert fact in card
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["step"] == "50"
    assert 0 < float(row["train/loss"]) < 3
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run(tmp_path, *overrides)
    assert "already trained" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written


def test_a_diffusion_model_is_assessed_with_its_averaged_weights(tmp_path: Path) -> None:
    run(
        tmp_path,
        "model.recipe.num_steps=2",
        "evaluation.num_images=8",
        "evaluation.reference_steps=3",
        "data.batch_size=8",
    )
    DigitsDDPM(str(tmp_path / "model.safetensors")).load()
    card = (tmp_path / "model_card.md").read_text()
    assert "noise MSE of the averaged weights" in card
    assert "fd_digits, 8 images, DDIM, 3 quadratic steps" in card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_stopped_training_goes_on_from_its_last_checkpoint_unless_that_is_hostile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmpq_exp.train.CHECKPOINT_EVERY_STEPS", 10)
    overrides = ("model=digits_classifier", "data=digits_holdout", "model.recipe.num_steps=30")
    steps, step = list[int](), ClassifierTraining.training_step

    def stopping(self: Any, *arguments: Any) -> Any:
        steps.append(self.global_step)
        if len(steps) == 15:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(ClassifierTraining, "training_step", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, *overrides)
    last, trace = tmp_path / "last.ckpt", tmp_path / "trace"
    whole = last.read_bytes()
    for damaged in (pickle.dumps(Trap(trace)), whole[:1000], b""):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.ckpt is damaged .*Remove it to train from the beginning"):
            run(tmp_path, *overrides)
    assert not trace.exists()
    last.write_bytes(whole)
    run(tmp_path, *overrides)
    assert steps[15:] == list(range(10, 30)), "only tensors and plain values are in a checkpoint, and they suffice"
    DigitsClassifier(str(tmp_path / "model.safetensors")).load()


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_without_the_network_of_its_metric_a_model_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tmpq_exp.train.ERROR_DRAWS", 1)
    small = ("model.recipe.num_steps=1", "data.batch_size=8", "evaluation.reference_steps=1")
    run(tmp_path, *small, f"metrics.fd_digits.checkpoint={tmp_path}/later.safetensors")
    assert "no quality metric for the model card at present: checkpoint of model digits_classifier: no file at" in (
        capsys.readouterr().err
    )
    assert "noise MSE" in (card := (tmp_path / "model_card.md").read_text())
    assert "quadratic steps" not in card


def test_a_clip_and_a_text_to_image_model_that_it_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpq_exp.train.ERROR_DRAWS", 1)
    small = (
        *("model.recipe.num_steps=2", "model.recipe.compile=false"),
        *("data.batch_size=8", "data.num_images=40", "data.reference_images=1"),
    )
    run(tmp_path / "clip", "model=clip_digits", *small)
    weights, reference = tmp_path / "clip" / "model.safetensors", tmp_path / "clip" / "reference.safetensors"
    DigitsCLIP(str(weights)).load()
    assert FeatureStatistics.load(reference).num_images == 110
    assert "held-out images whose nearest caption" in (tmp_path / "clip" / "model_card.md").read_text()
    run(
        tmp_path / "sd",
        "model=sd_digits",
        *small,
        f"metrics.clip_digits.checkpoint={weights}",
        f"evaluation.reference={reference}",
        "evaluation.num_images=11",
        "evaluation.reference_steps=1",
        "space.num_inference_steps=2",
    )
    DigitsTextToImage(str(tmp_path / "sd" / "model.safetensors")).load()
    assert "fd_clip_digits, 11 images, DDIM, 2 quadratic steps" in (tmp_path / "sd" / "model_card.md").read_text()
    assert (tmp_path / "sd" / "samples.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=clip_digits", "data=digits"], r"clip_digits is trained on images of shape \(1, 24, 24\)"),
        (["data=captioned_digits", "data.num_images=512"], r"ddpm_digits is trained on images of shape \(1, 16, 16\)"),
        (["evaluation=fd_cifar10"], r"fd_cifar10 takes images of .*, as model ddpm_digits makes them"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_training(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "model.safetensors").exists()
