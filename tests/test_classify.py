"""task=classify on a small network and folder: every row, its figures, resuming, the page, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException

from tests.classifying import STATIC, rows, run
from tmpq_exp import classification
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.classification import BITS, Row, Study, allocation
from tmpq_exp.config import UserError
from tmpq_exp.cost import CostModel
from tmpq_exp.data import ImageFolderData
from tmpq_exp.metrics.accuracy import count_correct
from tmpq_exp.overrides import explain, is_bad_input
from tmpq_exp.progress import StageBar
from tmpq_exp.report.classification import (
    CLASSIFICATION_ENTRY_KEYS,
    CLASSIFICATION_REPORT_KEYS,
    validate_classification,
)
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.zoo.resnet import ResNetCifar

TILES = ("f2_standard", "f4_standard", "f4_improved", "f6_standard")
ROWS = [
    "float",
    "direct_w8a8",
    *(f"{tile}_{scales}" for tile in TILES for scales in ("standard", "closed_form", "learned")),
]
SMALL = [
    "winograd.learning.layers_per_step=6",
    "classification.further=["
    "{name: f4_improved_per_layer, m: 4, points: improved, scales: learned, winograd: {learning: {per_layer: true}}},"
    "{name: f6_standard_shaped, m: 6, winograd: {shaped_stages: [u, v, m]}}]",
]
FURTHER = ["f4_improved_per_layer", "f6_standard_shaped"]


@pytest.fixture(scope="module")
def done(toy_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "a"
    run(toy_inputs, directory, *SMALL)
    return directory


@pytest.fixture(scope="module")
def report(done: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((done / "report.json").read_text(encoding="utf-8"))
    return content


def test_every_row_has_its_documented_keys(report: dict[str, Any]) -> None:
    assert [entry["name"] for entry in report["classification"]] == ROWS
    assert [entry["name"] for entry in report["further_rows"]] == FURTHER
    for entry in report["classification"][2:]:
        assert entry["name"] == f"f{entry['m']}_{entry['points']}_{entry['scales']}"
    assert report.keys() == CLASSIFICATION_REPORT_KEYS.keys()
    for entry in (*report["classification"], *report["further_rows"]):
        assert entry.keys() == CLASSIFICATION_ENTRY_KEYS.keys()
        assert entry["top1_interval"][0] <= entry["top1"] <= entry["top1_interval"][1]
        assert round(entry["top1"] * 12 / 100) == pytest.approx(entry["top1"] * 12 / 100)
    found = rows(report)
    for name in ("float", "direct_w8a8"):
        assert [found[name][key] for key in ("m", "points", "scales")] == [None] * 3
        assert found[name]["multiplications_ratio"] == 1
    assert found["float"]["sqnr_db"] is None
    assert [found["f4_improved_learned"][key] for key in ("m", "points", "scales")] == [4, "improved", "learned"]


def test_the_float_row_is_the_float_network(toy_inputs: Path, report: dict[str, Any]) -> None:
    data = ImageFolderData(str(toy_inputs / "images"), batch_size=5)
    correct = count_correct(ResNetCifar(20, str(toy_inputs / "r20.th")).task().network, data.test_dataloader())
    assert rows(report)["float"]["top1"] == pytest.approx(100 * correct / 12)


def test_layers_come_out_as_the_theory_of_scales_and_points_says(report: dict[str, Any]) -> None:
    sqnr = {name: entry["sqnr_db"] for name, entry in rows(report).items()}
    assert sqnr["direct_w8a8"] > sqnr["f2_standard_closed_form"] > sqnr["f4_improved_closed_form"]
    assert sqnr["f4_improved_closed_form"] > sqnr["f4_standard_closed_form"] + 5 > sqnr["f6_standard_closed_form"] + 8
    assert sqnr["f4_standard_standard"] < 5
    assert sqnr["f6_standard_standard"] < -5
    assert sqnr["f6_standard_shaped"] > sqnr["f6_standard_closed_form"] + 5


def test_every_tile_is_pictured_by_tap_stage_and_layer(report: dict[str, Any], done: Path) -> None:
    assert tuple(f"f{tile['m']}_{tile['points']}" for tile in report["winograd"]) == TILES
    for tile in report["winograd"]:
        taps = (tile["m"] + 2) ** 2
        for values in tile["range_map"].values():
            assert sum(map(len, values)) == taps
        sqnr = tile["stage_sqnr_db"]
        assert set(sqnr) == {"input", "v", "u", "m", "all"}
        for stage in ("input", "v", "u", "m"):
            assert all(one > every for one, every in zip(sqnr[stage], sqnr["all"], strict=True))
    page = (done / "report.html").read_text(encoding="utf-8")
    assert page.count("Range of M over the taps of a tile") == 1
    assert "F(4, 3), improved points" in page


def test_multiplications_are_those_counted_by_hand(report: dict[str, Any]) -> None:
    # ResNet-20 at 12, 6 and 3 pixels: 3 -> 16, six 16 -> 16; 16 -> 32, five 32 -> 32; 32 -> 64, five 64 -> 64; 64 -> 3
    strided = 9 * (36 * 16 * 32 + 9 * 32 * 64)
    direct = 144 * 9 * (3 * 16 + 6 * 256) + 36 * 9 * 5 * 1024 + 9 * 9 * 5 * 4096 + strided + 64 * 3
    tiles = {2: (36, 9, 4), 4: (9, 4, 1), 6: (4, 1, 1)}  # at each size, with those that the border cuts
    for m, (large, middle, small) in tiles.items():
        taps = (m + 2) ** 2
        winograd = taps * (large * (3 * 16 + 6 * 256) + middle * 5 * 1024 + small * 5 * 4096) + strided + 64 * 3
        ratio = rows(report)[f"f{m}_standard_closed_form"]["multiplications_ratio"]
        assert ratio == pytest.approx(direct / winograd)
    # F(6,3) with error feedback of V and M: 64 x 63 / 2 products a tile and channel, in and out
    channels = 4 * (3 + 16 + 6 * 32) + 1 * (5 * 64) + 1 * (5 * 128)
    ratio = rows(report)["f6_standard_shaped"]["multiplications_ratio"]
    assert ratio == pytest.approx(direct / (winograd + 2016 * channels))


def test_every_eligible_layer_runs_as_winograd_and_all_others_at_8_bits(
    toy_inputs: Path, report: dict[str, Any]
) -> None:
    cost = CostModel(ResNetCifar(20, str(toy_inputs / "r20.th")).task().layers((3, 12, 12)))
    chosen = allocation(cost, Row("x", BITS, spec=WinogradSpec(4)))
    assert set(chosen.weight_bits) == set(chosen.act_bits) == {8}
    direct = [shape.name for shape, tile in zip(cost.layers, chosen.tiles, strict=True) if tile == 0]
    assert direct == ["layer2.0.conv1", "layer3.0.conv1", "linear"]
    (tile, *_) = report["winograd"]
    assert {layer["name"]: layer["reason"] for layer in tile["ineligible_layers"]} == dict.fromkeys(
        direct[:2], "stride 2x2, needs 1x1"
    )
    assert len(tile["eligible_layers"]) == 17


def test_learning_keeps_both_figures_and_its_curve(report: dict[str, Any]) -> None:
    names = [entry["name"] for entry in report["learning"]]
    assert names == [f"{tile}_learned" for tile in TILES] + ["f4_improved_per_layer"]
    for entry in report["learning"]:
        held_out = entry["held_out_sqnr_db"]
        assert held_out.keys() == {"standard", "closed_form", "learned", "kept"}
        assert len(entry["curve_db"]) == (2 if entry["name"].endswith("learned") else 2 * 3)
        if entry["kept"] in ("learned", "closed_form"):
            assert held_out["kept"] == max(held_out["learned"], held_out["closed_form"])


def test_a_killed_run_ends_as_if_it_had_not_been_killed(
    toy_inputs: Path,
    done: Path,
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    stages = json.loads((copy / "stages.json").read_text())
    del stages["evaluate f4_improved_closed_form"], stages["evaluate f6_standard_shaped"]
    (copy / "stages.json").write_text(json.dumps(stages))
    for name in ("report.json", "report.html"):
        (copy / name).unlink()
    measured: list[str] = []
    real = classification._measure

    def counted(study: Study, row: Row, bar: StageBar) -> dict[str, Any]:
        measured.append(row.name)
        return real(study, row, bar)

    monkeypatch.setattr(classification, "_measure", counted)
    run(toy_inputs, copy, *SMALL)
    assert measured == ["f4_improved_closed_form", "f6_standard_shaped"]
    assert re.search(
        r"^forecast  \d+ images in 2 rows, about \d:\d\d:\d\d here, scales learned$",
        capfd.readouterr().err,
        re.MULTILINE,
    )
    again = json.loads((copy / "report.json").read_text(encoding="utf-8"))
    assert again["classification"] == report["classification"]
    assert again["learning"] == report["learning"]


def test_the_page_needs_nothing_from_elsewhere_and_shows_every_row(done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?!#|data:)[^"'\s>]+|url\(\s*["']?https?:|@import""", page)
    for name in ROWS + FURTHER:
        assert page.count(f"<td>{name}</td>") == 1
        assert f"<title>{name}: " in page
    assert page.count("steps of learning") == 5


def test_a_report_that_misses_something_is_refused(report: dict[str, Any]) -> None:
    validate_classification(report)
    with pytest.raises(ValueError, match=r"report misses the key 'fingerprint'"):
        validate_classification({k: v for k, v in report.items() if k != "fingerprint"})
    first = {k: v for k, v in report["classification"][0].items() if k != "top1"}
    with pytest.raises(ValueError, match=r"report\.classification\[0\] misses the key 'top1'"):
        validate_classification(report | {"classification": [first]})
    with pytest.raises(ValueError, match=r"must have a row named 'float'"):
        validate_classification(report | {"classification": report["classification"][1:]})
    with pytest.raises(ValueError, match=r"report\.schema must be 2, found 1"):
        validate_classification(report | {"schema": 1})


def test_further_rows_take_baselines_and_scales_of_another_run(toy_inputs: Path, done: Path, tmp_path: Path) -> None:
    further = [
        "{name: per_tap, m: 4, winograd: {method: per_tap}}",
        "{name: fsq, m: 4, winograd: {method: fsq_style}}",
        "{name: transferred, m: 4, points: improved, scales: learned, winograd: {scales_from: $FROM}}",
    ]
    listed = ",".join(further).replace("$FROM", str(done / "winograd_scales.json"))
    run(
        toy_inputs,
        tmp_path / "run",
        "classification.tiles=[]",
        f"classification.further=[{listed}]",
        "data.limit=3",
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert list(rows(report)) == ["float", "direct_w8a8", "per_tap", "fsq", "transferred"]
    assert report["num_images"] == 3
    assert report["learning"] == []
    sqnr = {name: entry["sqnr_db"] for name, entry in rows(report).items() if entry["m"]}
    assert min(sqnr.values()) > 12  # standard scales, which both baselines get along without, give -4 dB
    assert sqnr["transferred"] > max(sqnr["per_tap"], sqnr["fsq"]) + 3  # by its points


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (
            ["winograd.act_scales=static"],
            {},
            r"static scales of f2_standard_standard .* test images must not calibrate .*data\.calibration_root",
        ),
        (list(STATIC), {}, r"winograd\.act_scales: static scales of static are measured on images"),
        (
            list(STATIC),
            {"data.calibration_root": "{inputs}/images/cat"},
            r"data\.calibration_root must lie apart from data\.root .*test images must not calibrate",
        ),
        (
            list(STATIC),
            {"data.calibration_root": "{inputs}/nowhere"},
            r"data\.calibration_root: .*nowhere must hold one subfolder of images a class",
        ),
        (
            ["classification.further=[{name: a, winograd: {act_scales: sometimes}}]"],
            {},
            r"classification\.further: a: winograd\.act_scales must be dynamic or static, found 'sometimes'",
        ),
        ([], {"data.root": "{inputs}"}, r"has 1 class folders, model resnet_cifar20 tells 3 classes apart"),
        (
            [],
            {"data.root": "{inputs}/nowhere"},
            r"data\.root: .*nowhere must hold one subfolder of images a class",
        ),
        ([], {"model.checkpoint": "null"}, r"model\.checkpoint must be given"),
        ([], {"model.depth": "32"}, r"first missing key layer1\.3\.bn1\.bias"),
        (["model=ddpm_digits"], {"model.checkpoint": "null"}, r"DigitsDDPM is no classifier"),
        (
            ["task=classify", "model=resnet_cifar", "data=digits", "quant=groupwise"],
            dict.fromkeys(("experiment", "data.root", "data.resize", "data.crop", "data.batch_size"), ""),
            r"data: DigitsData has no test images for task=classify; choose data=image_folder",
        ),
        (["quant=default"], {}, r"quant\.weight\.granularity must be per_group .* choose quant=groupwise"),
        ([], {"winograd.learning.num_steps": "0"}, r"num_steps must be at least 1 where classification has learned"),
        (["winograd.scales_from=x.json"], {}, r"takes scales of another run in rows of classification\.further"),
        (
            ["classification.tiles=[]", "classification.further=[{name: a, points: [1, 1, 2], winograd: {}}]"],
            {},
            r"points must have .* \(row a of classification\)",
        ),
    ],
)
def test_bad_input_is_named(
    toy_inputs: Path, overrides: list[str], changes: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises((UserError, InstantiationException)) as caught:
        run(
            toy_inputs,
            tmp_path / "run",
            *overrides,
            **{k: v.format(inputs=toy_inputs) for k, v in changes.items()},
        )
    assert is_bad_input(caught.value)
    assert re.search(said, explain(caught.value, [], conf_dir()))


@pytest.mark.slow
def test_the_command(toy_inputs: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "tmpq_exp", "experiment=winograd/resnet_cifar", "model.depth=20", "logger=none"),
        *(f"model.checkpoint={toy_inputs}/r20.th", f"data.root={toy_inputs}/images", "data.limit=6"),
        *("winograd.learning.num_steps=1", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(classification.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["num_images"] == 6
    assert set(ROWS) < rows(report).keys()
    for name in rows(report):
        assert len(re.findall(rf"^ {name} ", done.stdout, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr
    (tmp_path / "bad.th").write_bytes(b"no weights")
    command[6] = f"model.checkpoint={tmp_path}/bad.th"
    done = subprocess.run(command[:-1], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tmpq-exp: checkpoint of model resnet_cifar20: ")
    assert "only tensors are read and nothing is unpickled" in line
