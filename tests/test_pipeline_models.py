"""The whole line on pipelines of a user's own, tiny: from a folder to a recipe that comes back as a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import tmpq_exp
from tests.tiny_pipelines import save_tiny
from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.config import register_schema

SMALL = (
    *("debug=tiny", "calibration=ranges", "winograd.report_tiles=[]"),
    *("evaluation.num_images=16", "evaluation.paired_images=16", "evaluation.selection_images=16"),
    *("evaluation.reference_steps=4", "evaluation.num_finalists=1", "evaluation.noise_seeds=0"),
    *("evaluation.ranked_candidates=0", "search.num_generations=1"),
)


def run(*overrides: str) -> None:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*SMALL, *overrides])
    threads = torch.get_num_threads()
    try:
        run_job(composed)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "family"), [("ddpm", "ddpm"), ("sd14", "stable_diffusion"), ("instaflow", "stable_diffusion")]
)
def test_from_a_folder_to_a_pipeline(option: str, family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family)
    text = option != "ddpm"
    prompts = ["model.prompts=[a cat, the dog]"] if text else []
    directory = tmp_path / "run"
    run(f"model={option}", f"model.path={folder}", *prompts, f"paths.run_dir={directory}")
    report = json.loads((directory / "report.json").read_text())
    assert report["model"] == option
    best = report["best"]
    (steps,) = (entry["timesteps"] for entry in report["baselines"] if entry["name"] == "w6a6")
    assert len(best["timesteps"]) == len(steps) == 4
    assert steps[0] == (999 if option == "instaflow" else 800)
    pipe: Any = tmpq_exp.load(directory / "recipe.json", str(folder))
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": "a cat"} if text else {}
    made = [
        each(**arguments, generator=torch.Generator().manual_seed(1), output_type="np").images
        for each in (pipe, tmpq_exp.load(tmpq_exp.save(pipe, tmp_path / "packed")))
    ]
    assert made[0].shape == (1, 16, 16, 1)
    assert np.array_equal(*made)
    assert str(folder) not in (directory / "recipe.json").read_text()
    parts = report["fingerprint_parts"]["final"]
    assert parts["guidance_scale"] == (7.5 if option == "sd14" else 1.0)
    assert parts["conditions"]["kind"] == ("prompts" if text else "unconditional")
