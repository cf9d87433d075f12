"""Winograd scales learned on a ResNet-20 and used on a ResNet-32: by all layers, by name, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.classifying import rows, run, study, write_network
from tmpq_exp import classification
from tmpq_exp.classification import winograd_row
from tmpq_exp.config import UserError
from tmpq_exp.winograd.scales import ScaleSet, write_scales
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales

LEARNED = "{name: own, m: 4, scales: learned, winograd: {learning: {per_layer: PER_LAYER}}}"
TRANSFERRED = "{name: closed, m: 4}, {name: transferred, m: 4, scales: learned, winograd: {scales_from: PATH}}"


@pytest.fixture(scope="module")
def deeper(toy_inputs: Path) -> Path:
    """A ResNet-32 beside the ResNet-20."""
    path = toy_inputs / "r32.th"
    write_network(path, 32)
    return path


def further(listed: str) -> tuple[str, str]:
    return "classification.tiles=[]", f"classification.further=[{listed}]"


def used_on_deeper(toy_inputs: Path, deeper: Path, directory: Path, scales: Path) -> ScaleSet:
    """Scales of the row that takes them from a file, on the ResNet-32."""
    changes = {"model.checkpoint": str(deeper), "model.depth": "32"}
    prepared = study(toy_inputs, directory, *further(TRANSFERRED.replace("PATH", str(scales))), **changes)
    variant = next(row for row in prepared.config.classification.rows() if row.name == "transferred")
    found = winograd_row(prepared, variant, {}).scales
    assert found is not None
    return found


@pytest.mark.parametrize("per_layer", ["false", "true"])
def test_layers_take_the_scales_of_their_name_and_others_the_shared_ones(
    per_layer: str, toy_inputs: Path, deeper: Path, tmp_path: Path
) -> None:
    changes = {"data.limit": "3", "winograd.learning.num_steps": "10"}
    run(toy_inputs, tmp_path / "r20", *further(LEARNED.replace("PER_LAYER", per_layer)), **changes)
    path = tmp_path / "r20" / "winograd_scales.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["model"] == "resnet_cifar20"
    own = ScaleSet.from_json(written["tiles"]["4"]["scales"])
    closed = closed_form_scales(WinogradSpec(4).transform())
    assert own != ScaleSet(closed)  # something was learned
    assert bool(own.layers) == (per_layer == "true")
    found = used_on_deeper(toy_inputs, deeper, tmp_path / "r32", path)
    assert found == own
    for name in ("conv1", *own.layers):
        assert found.of(name) == own.of(name)
    assert found.of("layer1.3.conv1") == own.shared  # a layer that only the deeper network has


def test_scales_of_layers_that_the_network_does_not_have_are_refused(
    toy_inputs: Path, deeper: Path, tmp_path: Path
) -> None:
    spec, path = WinogradSpec(4), tmp_path / "winograd_scales.json"
    closed = closed_form_scales(spec.transform())
    write_scales(path, "a U-Net", {4: (spec, ScaleSet(closed, {"mid.conv1": closed, "mid.conv2": closed}))})
    message = (
        r"winograd_scales\.json holds scales for single layers of a U-Net, mid\.conv1 and others, none of which this "
        r"network has; .* without winograd\.learning\.per_layer .*row transferred of classification"
    )
    with pytest.raises(UserError, match=message):
        used_on_deeper(toy_inputs, deeper, tmp_path / "run", path)


@pytest.mark.slow
def test_the_commands(toy_inputs: Path, deeper: Path, tmp_path: Path) -> None:
    def command(name: str, depth: int, *overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = (
            *(
                f"model.depth={depth}",
                f"model.checkpoint={toy_inputs}/r{depth}.th",
                f"data.root={toy_inputs}/images",
            ),
            *("data.limit=6", "logger=none", "num_threads=1", f"hydra.run.dir={tmp_path}/{name}", *overrides),
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(classification.__file__).parents[1])}
        return subprocess.run(
            [sys.executable, "-m", "tmpq_exp", "experiment=winograd/resnet_cifar", *arguments],
            capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment,
        )  # fmt: skip

    learned = command("learned", 20, "classification.tiles=[{m: 4}]", "classification.further=[]")
    assert learned.returncode == 0, learned.stderr
    listed = TRANSFERRED.replace("PATH", f"{tmp_path}/learned/winograd_scales.json")
    used = command("used", 32, *further(listed))
    assert used.returncode == 0, used.stderr
    found = rows(json.loads((tmp_path / "used" / "report.json").read_text(encoding="utf-8")))
    assert list(found) == ["float", "direct_w8a8", "closed", "transferred"]
    assert found["transferred"]["sqnr_db"] != found["closed"]["sqnr_db"]
    assert abs(found["transferred"]["sqnr_db"] - found["closed"]["sqnr_db"]) < 1
    refused = command("refused", 32, *further(listed.replace("m: 4", "m: 6")))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "winograd_scales.json holds scales for the tiles 4, not for 6 (row transferred of classification)" in line
