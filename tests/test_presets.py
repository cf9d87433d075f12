"""The presets: each composes under its own protocol, and its smoke tier runs the whole line on a stand-in."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.config import STAND_INS, PaperConfig, UserError, to_config
from tmpq_exp.report.classification import validate_classification
from tmpq_exp.report.content import validate_report
from tmpq_exp.smoke import METRIC

EXPERIMENTS = sorted(
    path.relative_to(conf_dir() / "experiment").with_suffix("").as_posix()
    for path in (conf_dir() / "experiment").rglob("*.yaml")
)
FOLDERS = ("tmpq_dm", "winograd")
FEWER = (
    *("calibration.num_images=2", "calibration.num_timesteps=2", "search.num_generations=1"),
    *("search.population_size=4", "search.num_crossovers=4", "evaluation.num_images=16"),
    *("evaluation.noise_seeds=0", "evaluation.ranked_candidates=0"),
)
"""What makes the smoke tier of the embedded CIFAR-10 model, which is 14 times the digits model, end in a minute."""

ROWS = [name for name in EXPERIMENTS if name.startswith(FOLDERS) and not name.startswith("winograd/resnet_")]
"""Presets of a row of a paper; the two commands for classifiers of one's own are none."""


pytestmark = pytest.mark.usefixtures("hydra")


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("config", ["paths.run_dir=somewhere", *overrides])


@cache
def paper_of(name: str) -> PaperConfig:
    paper = to_config(composed(f"experiment={name}")).paper
    assert paper is not None, f"experiment={name} says nothing of its paper"
    return paper


def test_both_papers_have_their_rows() -> None:
    for family in ("cifar10", "lsun_bedroom", "lsun_church", "imagenet", "sd14"):
        assert [name for name in ROWS if name.startswith(f"tmpq_dm/{family}")]
    for family in ("instaflow", "sd15"):
        kinds = {name.removeprefix(f"winograd/{family}_") for name in ROWS if name.startswith(f"winograd/{family}")}
        assert kinds == {"w8a8", "f4_standard", "f4_learned", "f6_standard", "f6_learned"}
    assert {"winograd/resnet18_f6_learned", "winograd/resnet34_f6_learned"} <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_measures_under_the_protocol_that_it_states(name: str) -> None:
    config = composed(f"experiment={name}")
    paper = paper_of(name)
    assert paper.preset == name
    found = {key: OmegaConf.select(config, key, throw_on_missing=True) for key in paper.protocol}
    assert {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in found.items()} == paper.protocol
    assert paper.protocol["tier"] == "full"
    assert paper.title
    assert paper.row
    assert config.stand_in in STAND_INS


@pytest.mark.parametrize("name", ROWS)
def test_what_a_preset_compares_is_what_its_run_reports(name: str) -> None:
    config, paper = to_config(composed(f"experiment={name}")), paper_of(name)
    assert paper.figures
    for figure in paper.figures:
        if figure.metric == "top1":
            rows = ["float", "direct_w8a8", *(row.name for row in config.classification.rows())]
            assert figure.entry in rows
            continue
        assert figure.metric in {config.evaluation.metric, *config.evaluation.further}
        names = {"best", "float_reference", "float_k", *(f"w{bits}a{bits}" for bits in config.evaluation.baseline_bits)}
        assert figure.entry in names | ({"w8a8_reference"} if config.evaluation.quantized_reference else set())


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_says_what_it_costs_and_where_that_comes_from(name: str) -> None:
    paper = paper_of(name)
    assert (paper.expected_gpu_hours is None) == (not paper.hours_from)


def test_no_result_of_the_tmpq_paper_is_made_up() -> None:
    for name in ROWS:
        for figure in paper_of(name).figures:
            if "TMPQ-DM" in figure.source:
                assert figure.figure is None


def test_the_winograd_rows_have_the_papers_figures() -> None:
    def best(name: str) -> dict[str, float | None]:
        return {
            figure.metric: figure.figure for figure in paper_of(f"winograd/{name}").figures if figure.entry == "best"
        }

    assert best("instaflow_f6_learned") == {"fid": 26.58, "clip_score": 29.65}
    assert best("instaflow_f6_standard") == {"fid": 326.96, "clip_score": 5.95}
    assert best("sd15_f6_learned") == {"fid": 20.52, "clip_score": 31.53}
    assert best("sd15_f4_learned") == {"fid": None, "clip_score": None}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("stand_in=vae", "stand_in must be null or one of ddpm, "),
        ("paper.expected_gpu_hours=0", "expected_gpu_hours must be above 0 or null, found 0"),
        ("paper.figures=[{metric: fid, figure: 1.0, source: x}]", "both be given or both null, found 1.0 and None"),
        ("paper.figures=[{metric: fid, figure: 1.0, tolerance: 0, source: x}]", "tolerance must be above 0, found 0"),
        ("paper.figures=[{metric: fid, source: x}, {metric: fid, source: y}]", "found best fid twice"),
    ],
)
def test_bad_values_are_named(change: str, found: str) -> None:
    with pytest.raises(UserError) as caught:
        to_config(composed("experiment=tmpq_dm/cifar10_w6a6", change))
    assert found in str(caught.value)


def test_the_smoke_tier_makes_the_sizes_of_an_experiment_small() -> None:
    config = to_config(composed("experiment=tmpq_dm/sd14_w6a6", "tier=smoke"))
    assert (config.evaluation.num_images, config.evaluation.selection_images) == (32, None)
    assert (config.objective.num_images, config.calibration.weight_iterations) == (16, 2)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("tier=smoke",), True),
        (("tier=full",), False),
        (("tier=smoke", "model.path=mine"), False),
        (("tier=smoke", "task=cost"), False),
    ],
)
def test_a_stand_in_takes_the_place_of_a_model_that_is_not_given(overrides: tuple[str, ...], wanted: bool) -> None:
    assert to_config(composed("experiment=tmpq_dm/cifar10_w6a6", *overrides)).wants_stand_in is wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_smoke_tier_of_every_experiment_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(
        "config",
        [
            *(f"experiment={name}", "tier=smoke", "logger=none", "num_threads=1", f"paths.run_dir={tmp_path / 'run'}"),
            *(FEWER if name.startswith("cifar10_") else ()),
        ],
    )
    threads = torch.get_num_threads()
    try:
        run_job(config)
    finally:
        torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    stands_in = to_config(config).stand_in is not None
    assert ("stands in; its figures mean nothing" in capsys.readouterr().err) is stands_in
    if "classification" in report:
        validate_classification(report)
        return
    validate_report(report)
    assert (report["metric"] == METRIC) is stands_in
    assert (tmp_path / "run" / "recipe.json").exists()
    assert not [warning for warning in report["warnings"] if warning.startswith("recipe.json")]
    assert report["best"]["bitops"] <= report["budget"]["bitops"]
