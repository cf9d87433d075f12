"""task=classify with static scales: images of a folder apart calibrate them, and nothing else does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.classifying import STATIC, rows, run, study
from tmpq_exp import classification
from tmpq_exp.data import ImageFolderData
from tmpq_exp.zoo.weights import read_tensors


def calibration_images(root: Path, per_class: int = 2, size: int = 12, seed: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("one", "other"):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def ranges_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = (read_tensors(path, "ranges") for path in (run / "winograd_ranges").iterdir())
    return {metadata["row"]: tensors for tensors, metadata in found}


@pytest.mark.slow
def test_static_scales_come_from_calibration_images_alone(
    toy_inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calibration = calibration_images(tmp_path / "calibration")
    given = {"data.calibration_root": str(calibration), "data.calibration_images": "3"}
    run(toy_inputs, tmp_path / "a", *STATIC, **given)
    said = " ".join(capfd.readouterr().out.split())
    assert "Activation scales are static, from 3 images of calibration, in static, balanced." in said
    report = json.loads((tmp_path / "a" / "report.json").read_text(encoding="utf-8"))
    assert report["data"]["calibration"]["num_images"] == 3
    assert report["data"]["calibration"]["rows"] == ["static", "balanced"]
    sqnr = {name: entry["sqnr_db"] for name, entry in rows(report).items()}
    assert sqnr["dynamic"] > 10
    assert sqnr["static"] is sqnr["balanced"] is None  # noise is not what the ranges were measured on
    specs = {detail["name"]: detail["spec"]["act_scales"] for detail in report["details"] if detail["spec"]}
    assert specs == {"dynamic": "dynamic", "static": "static", "balanced": "static"}
    assert "static, from 3 images of calibration" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")

    ranges = ranges_of(tmp_path / "a")
    assert ranges.keys() == {"static", "balanced"}
    data = ImageFolderData(str(calibration), limit=3)
    ((images, _),) = data.test_dataloader()
    pixels = images.abs().amax()  # of x, and its three colours share a group
    assert torch.equal(ranges["static"]["winograd.f4.conv1.input"], pixels.expand(1, 3, 1, 1))

    others = calibration_images(tmp_path / "tests", per_class=4, seed=2)
    (others / "third").mkdir()
    shutil.copy(others / "one" / "0.png", others / "third" / "0.png")
    run(toy_inputs, tmp_path / "b", *STATIC, **given | {"data.root": str(others)})  # other test images, the same ranges
    again = ranges_of(tmp_path / "b")
    for row, tensors in ranges.items():
        assert all(torch.equal(again[row][key], value) for key, value in tensors.items())


def test_static_rows_run_with_their_ranges(toy_inputs: Path, tmp_path: Path) -> None:
    calibration = {"data.calibration_root": str(calibration_images(tmp_path / "calibration"))}
    prepared = study(toy_inputs, tmp_path / "run", *STATIC, **calibration)
    variants = {variant.name: variant for variant in prepared.config.classification.rows()}
    found = {
        name: classification.with_ranges(prepared, classification.winograd_row(prepared, variants[name], {}))
        for name in ("dynamic", "static")
    }
    assert not found["dynamic"].ranges
    assert len(found["static"].ranges) == len(prepared.layers)
    assert found["dynamic"].state() != found["static"].state()
    images = next(iter(prepared.data.test_dataloader()))[0][:4]
    logits = {}
    for name, row in found.items():
        with classification._as(prepared, row), torch.no_grad():
            logits[name] = prepared.supernet(images)
    assert not torch.equal(logits["static"], logits["dynamic"])
    exact = prepared.task.network(images)
    assert float((logits["static"] - exact).square().mean() / exact.square().mean()) < 0.5
