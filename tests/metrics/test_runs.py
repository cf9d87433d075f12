"""Whole runs by other metrics than a Frechet distance, with further ones beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from tests.metrics.conftest import natural_images, save
from tests.test_pipeline import FEW, run_here

SHORT = (*FEW, "calibration=ranges", "evaluation.bootstrap=20", "objective.num_images=8", "evaluation.num_finalists=2")


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder of torch's downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def test_a_run_whose_metric_has_no_weights_stops_before_any_computation(tmp_path: Path) -> None:
    with pytest.raises(InstantiationException, match="no weights at"):
        run_here(tmp_path / "run", "evaluation.metric=kid", "metrics.kid.reference=nowhere")
    assert not {"stages.json", "trials.jsonl"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_a_run_by_a_metric_that_rises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path / "run", "evaluation.metric=ssim", "evaluation.further=[fd_digits,latent_sqnr_db,lpips]", *SHORT)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    trials = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    scores = [trial["metrics"]["ssim"] for trial in trials if trial["phase"] == "search"]
    assert report["evidence"]["progress"]["search"] == [max(scores[: i + 1]) for i in range(len(scores))]
    front = [entry["metrics"]["ssim"] for entry in report["front"]]
    assert front == sorted(front)
    assert front[-1] == max(scores)
    selected = {trial["key"]: trial["metrics"]["ssim"] for trial in trials if trial["phase"] == "selection"}
    best = next(trial for trial in trials if trial["name"] == "best")
    assert selected[best["key"]] == max(list(selected.values())[:2])  # the finalists; others check the ranking
    assert report["evidence"]["score_noise"]["scores"][0] in scores
    low, high = report["best"]["intervals"]["ssim"]
    assert low < report["best"]["metrics"]["ssim"] < high <= 1

    assert [metric["name"] for metric in report["further"]] == ["fd_digits", "latent_sqnr_db"]
    for entry in [*report["baselines"], report["best"]]:
        assert entry["metrics"]["fd_digits"] > 0
        assert set(entry["further"]) == {"fd_digits", "latent_sqnr_db"}
    assert all("fd_digits" not in trial["metrics"] for trial in trials if trial["phase"] != "final")
    shown = capsys.readouterr()
    assert "further metrics" in shown.out
    assert "warning: left out of evaluation.further: lpips: no weights at" in shown.err
    assert any("lpips: no weights at" in warning for warning in report["warnings"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>fd_digits</th><th>latent_sqnr_db</th>" in page


@pytest.mark.slow
def test_a_run_by_kid_repeats_with_its_reference_in_the_cache(inception_weights: Path, tmp_path: Path) -> None:
    save(natural_images(10, 16, 0, channels=1), tmp_path / "real")
    options = (
        "evaluation.metric=kid", f"metrics.kid.weights={inception_weights}", f"metrics.kid.reference={tmp_path}/real",
        f"paths.cache_dir={tmp_path}/cache", *SHORT,
        "search.num_generations=1", "evaluation.noise_seeds=1", "evaluation.num_images=4", "objective.num_images=4",
        "evaluation.micro_batch=4", "evaluation.ranked_candidates=1", "objective.proxy_images=4",
    )  # fmt: skip
    run_here(tmp_path / "first", *options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    run_here(tmp_path / "second", *options)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    first, second = ((tmp_path / name / "trials.jsonl").read_bytes() for name in ("first", "second"))
    assert first == second
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["stages"]["references"] > 0
    parts = report["fingerprint_parts"]["final"]
    assert parts["library"].startswith("torchmetrics ")
    assert parts["resize"] == "bilinear to 299x299, antialiased"
    assert {"extractor", "reference", "subsets", "weights", "seed", "num_images", "micro_batch"} <= parts.keys()
    assert report["best"]["metrics"]["kid"] is not None
