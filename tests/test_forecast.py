"""The forecast counts what a run then does, and says what it will take before anything is spent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor

from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.calibrating import calibrate
from tmpq_exp.config import register_schema, to_config
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.forecast import duration, forecast_content
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.unet_calls import Calls, stage_calls

SMOKE = ("tier=smoke", "logger=none", "num_threads=1")


def composed(directory: Path, *overrides: str) -> Any:
    register_schema()
    GlobalHydra.instance().clear()
    cache = f"paths.cache_dir={directory.parent}/cache"
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("config", [*SMOKE, cache, f"paths.run_dir={directory}", *overrides])


def laid_out(directory: Path, *overrides: str) -> Experiment:
    config = composed(directory, *overrides)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    run = RunDirectory.claim(directory, resolved)
    return prepare(to_config(config), run, TrialLog(run.trials), on_trial=lambda trial: None)


def test_calls_are_those_of_a_count_by_hand(tmp_path: Path) -> None:
    """The smoke tier: K = 4, reference at 8 steps, micro-batches of 16."""
    stages = stage_calls(laid_out(tmp_path / "run", "calibration=ranges"))
    assert stages == {
        "calibrate": Calls(2 * 8 * 5),  # states, and one look at them
        "winograd": Calls(2 * 8 * (5 + 1)),  # a trajectory a tile, and a look at the layers' inputs
        # 20 candidates and W8A8, W6A6 on 16 images, float at 4 steps, the reference and the control once, and the
        # 32 images behind the control variate
        "search": Calls(16 * 4 + 16 * 8 + 16 * 4 + 32 * 4, 22 * 16 * 4),
        # two of the search and uniform W6A6
        "select": Calls(32 * 8 + 32 * 4, 3 * 32 * 4),
        # one more seed, images for the interval, two candidates ranked on 32 images
        "weigh": Calls(16 * 8 + 16 * 4, 2 * 16 * 4 + 2 * 32 * 4),
        "specialize": Calls(),
        # float at 8 and at 4 steps, W8A8, W6A6, best; 12 samples a row; the recipe tried twice
        "evaluate": Calls(32 * (8 + 4) + 12 * (8 + 4), 3 * 32 * 4 + 12 * 3 * 4 + 2 * 16 * 4),
    }


def test_more_of_anything_is_never_forecast_as_less(tmp_path: Path) -> None:
    few = sum(stage_calls(laid_out(tmp_path / "few")).values(), Calls()).total
    for index, override in enumerate(
        (
            "search.num_generations=3",
            "evaluation.num_finalists=4",
            "evaluation.random_control=true",
            "evaluation.num_images=33",  # one micro-batch more
            "evaluation.noise_seeds=2",
            "objective.num_images=48",
            "calibration.num_timesteps=6",
            "calibration.weight_iterations=3",
            "space.num_inference_steps=5",
        )
    ):
        more = laid_out(tmp_path / str(index), override)
        assert sum(stage_calls(more).values(), Calls()).total > few, override
    proxy = laid_out(tmp_path / "proxy", "objective.proxy=psnr_db", "objective.proxy_images=16")
    assert stage_calls(proxy)["search"].quantized_calls == (20 + 10 + 2) * 16 * 4


def test_a_forecast_has_time_memory_and_disk_and_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    experiment = laid_out(tmp_path / "run")
    before = {key: value.clone() for key, value in experiment.module.supernet.quantizer_state().items()}
    random = torch.random.get_rng_state()
    content = forecast_content(experiment)
    after = experiment.module.supernet.quantizer_state()
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)  # NaN: not calibrated yet
    assert torch.equal(random, torch.random.get_rng_state())
    assert experiment.module.supernet.winograd == {}
    measured = content["measured"]
    assert measured["micro_batch"] == 16
    assert min(measured["float_call"], measured["quantized_call"]) > 0
    stages = content["stages"].values()
    assert content["calls"] == sum(stage["float_calls"] + stage["quantized_calls"] for stage in stages)
    assert content["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages), abs=0.5)
    assert content["peak_memory_bytes"] > measured["peak_bytes"] > 10**8
    assert 10**6 < content["disk_bytes"] < 10**8


def test_task_forecast_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(composed(tmp_path / "run", "task=forecast", "winograd=f4", "num_threads=null"))
    lines = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert [line.split()[0] for line in lines[:7]] == list(content["stages"])
    said = r"forecast  [\d,]+ U-Net calls of one image, about \d+:\d\d:\d\d here \(float .* ms, quantized .* ms a call"
    assert re.match(said, lines[7])
    assert f"{content['calls']:,} U-Net calls" in lines[7]
    assert re.fullmatch(r" +up to about \d+\.\d GB of memory, \d+ MB on disk", lines[8])
    assert not (tmp_path / "run" / "trials.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00:00"), (59.2, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")]
)
def test_durations_are_rounded_up(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
def test_a_run_says_the_forecast_first_and_then_calls_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = stage_calls(laid_out(tmp_path / "other"))
    counted = []
    forward = UNet2DModel.forward

    def counting(self: UNet2DModel, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    def calibrating(experiment: Experiment, *team: Any) -> None:
        calibrate(experiment, *team)
        counted.clear()  # it reaches blocks by replays of the network in which finished ones are left out

    monkeypatch.setattr(UNet2DModel, "forward", counting)
    monkeypatch.setattr("tmpq_exp.pipeline.calibrate", calibrating)
    run_job(composed(tmp_path / "run", "num_threads=null"))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("forecast  ")
    expected = sum(stages.values(), Calls()).total - stages["calibrate"].total
    found = sum(count for count in counted if count > 1)  # what looks at the layers takes one image
    assert 0.85 * expected < found <= expected
