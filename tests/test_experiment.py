"""What a run lays out before it computes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.choices import used_tiles, winograd_spec
from tmpq_exp.config import register_schema, to_config
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.tiling import tile_rule
from tmpq_exp.winograd.scales import ScaleSet, write_scales
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales


def laid_out(directory: Path, *overrides: str) -> Experiment:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [f"paths.run_dir={directory}", *overrides])
    resolved: Any = OmegaConf.to_container(composed, resolve=True)
    run = RunDirectory.claim(directory, resolved)
    return prepare(to_config(composed), run, TrialLog(run.trials), on_trial=lambda trial: None)


@pytest.fixture(scope="module")
def joint_k(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return laid_out(tmp_path_factory.mktemp("joint_k") / "run", "experiment=cifar10_joint_k")


def test_w8a8_at_the_reference_steps_costs_ten_times_the_budget_of_joint_k(joint_k: Experiment) -> None:
    reference = joint_k.baselines()["w8a8_reference"]
    assert reference.timesteps == joint_k.standard_schedule(100)
    assert joint_k.cost.bitops(reference) == 10 * joint_k.budget_bitops


def test_scales_of_single_layers_are_for_networks_that_have_some_of_them(tmp_path: Path) -> None:
    spec, path = WinogradSpec(4), tmp_path / "winograd_scales.json"
    closed = closed_form_scales(spec.transform())
    own = "down_blocks.0.resnets.0.conv1"
    overrides = ("winograd=f4", f"winograd.scales_from={path}", "winograd.report_tiles=[]")
    write_scales(path, "resnet_cifar20", {4: (spec, ScaleSet(closed, {"layer1.0.conv1": closed}))})
    with pytest.raises(ValueError, match=r"single layers of resnet_cifar20, layer1\.0\.conv1, none of which"):
        laid_out(tmp_path / "foreign", *overrides)
    write_scales(path, "resnet_cifar20", {4: (spec, ScaleSet(closed, {"layer1.0.conv1": closed, own: closed}))})
    laid_out(tmp_path / "known", *overrides)


TILES_ONLY = ("experiment=joint_winograd", "ablation=tiles_only", "budget=macs")


def test_the_rule_keeps_a_budget_in_macs_and_takes_the_least_noise_it_allows(tmp_path: Path) -> None:
    direct = 407_500_000  # MACs of ten direct calls, rounded up
    chosen = {}
    for share in (1.0, 0.9, 0.7, 0.6):
        macs = int(share * direct)
        experiment = laid_out(tmp_path / f"{share}", *TILES_ONLY, f"budget.macs={macs}")
        specs = {m: winograd_spec(experiment.config, m) for m in used_tiles(experiment.config)}
        experiment.module.supernet.set_winograd({m: (s, closed_form_scales(s.transform())) for m, s in specs.items()})
        for layer in experiment.module.supernet.layers:
            rows = layer.weight_rows()
            if rows is not None:
                rows[0].estimate(rows[1])
        candidate = tile_rule(experiment)
        assert candidate is not None
        assert set(candidate.allocations[0].weight_bits) == set(candidate.allocations[0].act_bits) == {8}
        chosen[share] = candidate.allocations[0].tiles
        assert macs / 1.1 < experiment.cost.macs(candidate) <= macs
        assert experiment.budget_bitops == 64 * macs
        assert experiment.cost.bitops(candidate) == 64 * experiment.cost.macs(candidate)
    counts = [sum(tile > 0 for tile in tiles) for tiles in chosen.values()]
    assert counts == sorted(set(counts))  # every further saving takes tiles at more layers


def test_a_budget_in_macs_needs_8_bits_everywhere(tmp_path: Path) -> None:
    message = r"budget\.macs counts where all bits are 8 .* found \[5, 6, 7, 8\]; give budget\.bitops"
    with pytest.raises(ValueError, match=message):
        laid_out(tmp_path / "bits", "experiment=joint_winograd", "budget=macs", "budget.macs=400000000")
    with pytest.raises(ValueError, match=r"found \[8, 16\]"):
        laid_out(tmp_path / "softmax", *TILES_ONLY, "budget.macs=400000000", "quant.softmax_bits=16")


def test_joint_k_may_keep_more_steps_than_there_are_groups(joint_k: Experiment) -> None:
    assert (joint_k.space.steps.min_steps, joint_k.space.steps.max_steps) == (5, 20)
