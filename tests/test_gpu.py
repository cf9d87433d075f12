"""The line on a GPU: same images as on the CPU up to rounding, and a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from tests.running import sorted_trials
from tmpq_exp.config import CalibrationConfig, QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import task_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_a_supernet_moves_to_the_gpu_and_back() -> None:
    task = DigitsDDPM().task()
    layers = task_layers(task)
    module = SupernetModule(task, layers, [(8,)] * len(layers), [(8,)] * len(layers), QuantConfig())
    for _, quantizer in module.supernet.named_quantizers():
        quantizer.scale.fill_(0.02)
        quantizer.zero_point.fill_(128)
    weights = tuple(8 if isinstance(shape, AttentionShape) else 32 for shape in layers)
    candidate = Candidate((900, 400, 0), (Allocation(weights, (8,) * len(layers), (0,) * len(layers)),))
    before = module.images(candidate, range(8), seed=0)
    moved = module.to("cuda").images(candidate, range(8), seed=0)
    assert moved.device.type == "cuda"
    assert (moved.cpu() - before).abs().mean() < 0.02
    assert module.to("cpu").images(candidate, range(8), seed=0).equal(before)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch's own, as inductor starts
@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_compiled_subnets_on_the_gpu_make_the_same_images_up_to_rounding(granularity: str) -> None:
    task = DigitsDDPM().task()
    layers = task_layers(task)
    act = QuantizerConfig(granularity=granularity, estimator="minmax")
    modules = [
        SupernetModule(task, layers, [(8, 6)] * len(layers), [(8, 6)] * len(layers), QuantConfig(act=act, compile=flag))
        for flag in (False, None)
    ]
    for module in modules:
        for name, quantizer in module.supernet.named_quantizers():
            quantizer.scale.fill_(0.02 if "act" in name else 0.004)
            quantizer.zero_point.fill_(128)
        module.to("cuda")
    assert [module.is_compiled for module in modules] == [False, True]
    for bits in (8, 6, 32):
        allocation = Allocation((bits,) * len(layers), (bits,) * len(layers), (0,) * len(layers))
        candidate = Candidate((900, 400, 0), (allocation,))
        plain, compiled = (module.images(candidate, range(8), seed=0) for module in modules)
        assert (compiled - plain).abs().mean() < (0.001 if bits == 32 else 0.02)


@pytest.mark.parametrize("m", [2, 4, 6])
@pytest.mark.parametrize("shaped_stages", [(), ("u", "v", "m")])
def test_winograd_on_the_gpu_is_close_to_the_cpu(m: int, shaped_stages: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 48, 17, 16, generator=generator), torch.randn(32, 48, 3, 3, generator=generator)
    spec = WinogradSpec(m, shaped_stages=shaped_stages)
    matrices = WinogradMatrices.from_scales(spec.transform())
    on_gpu = matrices.to(device="cuda")
    y = winograd_conv2d(x, transform_weights(weight, matrices, spec, 8), None, matrices, spec, 8, 1)
    z = winograd_conv2d(x.cuda(), transform_weights(weight.cuda(), on_gpu, spec, 8), None, on_gpu, spec, 8, 1).cpu()
    error = F.conv2d(x, weight, padding=1) - y
    assert (y - z).square().mean() < 0.1 * error.square().mean()


def test_reconstruction_on_the_gpu_with_and_without_spilling(tmp_path: Path) -> None:
    def state(max_bytes: int) -> dict[str, torch.Tensor]:
        task = DigitsDDPM().task()
        task.unet.cuda()
        layers = task_layers(task)
        supernet = SupernetModule(task, layers, [(8, 4)] * len(layers), [(8, 4)] * len(layers), QuantConfig()).supernet
        config = CalibrationConfig("uniform_prefix", weight_iterations=5, act_iterations=5, max_cache_bytes=max_bytes)
        states = trajectory_states(task, 4, 3, 0)
        with ActivationStore(max_bytes, tmp_path / "spill", torch.device("cuda")) as store:
            module = CalibrationModule(supernet, states, config, 0, store)
            trainer = L.Trainer(
                max_epochs=module.num_epochs,
                reload_dataloaders_every_n_epochs=1,
                accelerator="gpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=str(tmp_path),
            )
            trainer.fit(module)
        assert sum(r.loss_after for r in module.records) < sum(r.loss_before for r in module.records)
        return {key: value.cpu() for key, value in supernet.quantizer_state().items()}

    kept, spilled = state(2**30), state(0)
    assert [key for key in kept if key.endswith("rounding")]
    for key in (key for key in kept if not key.endswith("rounding")):
        torch.testing.assert_close(kept[key], spilled[key], rtol=1e-3, atol=1e-4)


def test_a_whole_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tmpq_exp",
        "tier=smoke",
        "trainer=gpu",
        "logger=none",
        f"hydra.run.dir={tmp_path}",
    ]
    subprocess.run(command, check=True, timeout=300)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fingerprint_parts"]["search"]["device"] == "cuda"
    assert report["best"]["bitops"] <= report["budget"]["bitops"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("several", [("trainer=ddp",), ("trainer=gpu", "executor=ray")])
def test_two_gpus_write_what_one_writes(several: tuple[str, ...], tmp_path: Path) -> None:
    if "executor=ray" in several:
        pytest.importorskip("ray", reason="the extra ray is not installed")
    for name, overrides in {"one": ("trainer=gpu",), "two": several}.items():
        command = [sys.executable, "-m", "tmpq_exp", "tier=smoke", "logger=none", *overrides]
        subprocess.run([*command, f"hydra.run.dir={tmp_path / name}"], check=True, timeout=300)
    assert sorted_trials(tmp_path / "two") == sorted_trials(tmp_path / "one")
