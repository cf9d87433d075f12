"""The benchmarks run and write what they measured; how fast they are is no test's business."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks.growth import images_growth, layers_growth, widths_growth
from tests.benchmarks.naive import naive_ratio
from tests.benchmarks.scoring import forward_share, frechet_seconds
from tests.benchmarks.supernets import (
    Case,
    cifar_unet,
    digits_unet,
    plain_ratio,
    state_ratio,
    supernet_ratio,
    timestep_ratio,
    uniform_supernet,
)
from tests.benchmarks.workers import two_workers
from tmpq_exp.config import CalibrationConfig


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("__main__.py")), run_name="benchmarks"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_benchmark_runs(bench: SimpleNamespace, tmp_path: Path) -> None:
    measurements = [
        supernet_ratio(Case.of("ddpm_digits", digits_unet, 2), 1),
        plain_ratio(Case.of("ddpm_digits", digits_unet, 2), 1),
        timestep_ratio(Case.of("ddpm_digits", digits_unet, 2), 1),
        bench.winograd_ratio(4, 1, 8, 2),
        bench.winograd_ratio(4, 1, 8, 1, shaped=True),
        bench.winograd_memory(4, 1, 8),
        bench.candidate_rate(3, 1),
        bench.image_seconds(3, 2, 1),
        naive_ratio(64, 1, 1),
        state_ratio("ddpm_digits", digits_unet()),
    ]
    bench.write(tmp_path / "new" / "bench.json", measurements)
    lines = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [set(line) for line in lines] == [{"name", "ratio", "unit", "goal", "met", "spread", "device"}] * 10
    assert all(line["ratio"] > 0 for line in lines)
    assert lines[-1]["met"]  # no timing: bytes
    assert [line["met"] is None for line in lines] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert bench.table(measurements).row_count == 10


def test_the_benchmarks_of_growth_run() -> None:
    lines = [images_growth(2, 1, 1), layers_growth(1), widths_growth(1)]
    assert all(line.ratio > 0 and line.goal is None for line in lines)


@pytest.mark.slow
def test_the_benchmark_of_workers_runs() -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    small = ("tier=smoke", "objective.num_images=8", "objective.proxy_images=8", "objective.control_images=8")
    assert two_workers(1, 2, *small).ratio > 0


@pytest.mark.slow
def test_the_calibration_benchmarks_run(bench: SimpleNamespace) -> None:
    tiny = CalibrationConfig("uniform_prefix", None, 2, 2, 1024, weight_iterations=1, act_iterations=1)
    assert bench.calibration_seconds(tiny).ratio > 0
    assert bench.calibration_loss(tiny).ratio > 0


def test_the_cifar_network_is_the_one_of_the_papers(bench: SimpleNamespace) -> None:
    with torch.device("meta"):
        network = cifar_unet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_the_compressed_side_is_quantized(bench: SimpleNamespace) -> None:
    network = digits_unet()
    x = torch.randn(2, 1, 16, 16)
    arguments = (x, torch.tensor([500, 500]), torch.tensor([1, 2]))
    supernet, allocation = uniform_supernet(network, x, class_labels=arguments[2])
    with torch.inference_mode():
        reference = network(*arguments).sample
        assert supernet(*arguments).sample.equal(reference)
        with supernet.subnet(allocation):
            assert not supernet(*arguments).sample.equal(reference)


def test_a_name_that_fits_nothing_is_an_error(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main(["--only", "nothing like it"])
    assert raised.value.code == 2
    assert "supernet cifar10" in capsys.readouterr().err


def test_one_name_runs_alone(bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--only", "candidates per", "--rounds", "1", "--output", str(tmp_path / "bench.json")])
    assert "filled candidates" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 1


def test_parts_of_scoring_are_timed() -> None:
    assert 0.2 < forward_share(4, 2, 1) < 1
    assert frechet_seconds(8) > 0
