"""The whole line on the embedded text-to-image model, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tmpq_exp.recipe import apply_recipe
from tmpq_exp.report import validate_report


@pytest.mark.slow
def test_the_whole_line_reports_distance_agreement_and_fidelity(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tmpq_exp", "model=sd_digits", "tier=smoke", "logger=none", "num_threads=1"]
    command += ["model.guidance_scale=1.5"]  # not the default: the recipe knows it
    finished = subprocess.run(
        [*command, f"hydra.run.dir={run}", f"paths.cache_dir={tmp_path / 'cache'}"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    validate_report(report)
    entries = {entry["name"]: entry for entry in [*report["baselines"], report["best"]]}
    for name in ("float_reference", "float_k", "w8a8", "w6a6"):
        assert {"fd_clip_digits", "clip_digits"} <= entries[name]["metrics"].keys()
    assert entries["w8a8"]["metrics"]["clip_digits"] > 50  # the digits that were asked for
    assert report["best"]["bitops"] <= report["budget"]["bitops"]
    model = apply_recipe(run / "recipe.json")
    assert model.module.task.guidance_scale == 1.5
    assert model.sample(2, 0).shape == (2, 1, 24, 24)
