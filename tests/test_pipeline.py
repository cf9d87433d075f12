"""The whole line as a user runs it: what a run leaves behind, that it repeats, and that nothing is lost by a kill."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.config import UserError, register_schema
from tmpq_exp.metrics.frechet import digits_frechet
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.recipe import apply_recipe
from tmpq_exp.report import validate_report
from tmpq_exp.zoo.weights import read_tensors

SMOKE = ("tier=smoke", "logger=none", "num_threads=1")

SCORE = "fd_digits_controlled"
"""What the search ranks candidates by."""
FILES = (
    *(".lock", "config.yaml", "environment.json", "stages.json", "trials.jsonl", "supernet.safetensors"),
    *(
        "winograd_scales.json",
        "recipe.json",
        "recipe.safetensors",
        "model_card.md",
        "report.json",
        "report.html",
        "pareto.png",
        "samples.png",
    ),
)
TIMEOUT = 300


def start(directory: Path, *overrides: str, **arguments: Any) -> subprocess.Popen[str]:
    """A run of the command line in a process group of its own, from a foreign working directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "tmpq_exp", *SMOKE, *overrides, f"hydra.run.dir={directory}"],
        cwd=directory.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **arguments,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, output
    return output


def run_here(directory: Path, *overrides: str) -> None:
    """The same job inside this process, without the seconds of imports."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*SMOKE, *overrides, f"paths.run_dir={directory}"])
    threads = torch.get_num_threads()
    try:
        run_job(composed)
    finally:
        torch.set_num_threads(threads)


def num_trials(directory: Path) -> int:
    path = directory / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(directory: Path, moment: Callable[[], bool], *overrides: str) -> None:
    """Start a run and SIGKILL its process group at a moment, which must come before it ends."""
    process = start(directory, *overrides)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not moment():
            assert process.poll() is None, f"ended before the kill: {process.stdout and process.stdout.read()}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL


def kill_in_calibration(directory: Path) -> None:
    seen: list[float] = []

    def moment() -> bool:
        if not seen and (directory / "environment.json").exists():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + 2

    kill_when(directory, moment)
    assert not (directory / "supernet.safetensors").exists()


@dataclass
class Runs:
    """Runs that go on while other tests do, and that nobody disturbs."""

    unkilled: Future[tuple[Path, str]]
    again: Future[tuple[Path, str]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("runs")

    def whole(name: str) -> tuple[Path, str]:
        return root / name, finish(start(root / name))

    with ThreadPoolExecutor(2) as pool:
        yield Runs(pool.submit(whole, "unkilled"), pool.submit(whole, "again"))


@pytest.fixture(scope="session")
def smoke(runs: Runs) -> Path:
    return runs.unkilled.result()[0]


@pytest.fixture(scope="session")
def report(smoke: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((smoke / "report.json").read_text())
    return content


@pytest.fixture(scope="session")
def trials(smoke: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (smoke / "trials.jsonl").read_bytes().splitlines()]


@pytest.fixture
def copy(smoke: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(smoke, tmp_path / "copy")


def test_a_run_leaves_its_files_and_says_where(smoke: Path, runs: Runs) -> None:
    assert sorted(path.name for path in smoke.iterdir()) == sorted(FILES)
    output = runs.unkilled.result()[1]
    assert str(smoke / "report.html") in output
    assert str(smoke / "recipe.json") in output
    assert "Best found" in output
    assert "Warning" not in output


def test_report_has_the_documented_keys_and_its_entries_agree(report: dict[str, Any]) -> None:
    validate_report(report)
    entries = {entry["name"]: entry for entry in report["baselines"]}
    assert list(entries) == ["float_reference", "float_k", "w8a8", "w6a6"]
    assert len(entries["float_reference"]["timesteps"]) == 8
    for name in ("float_k", "w8a8", "w6a6"):
        assert entries[name]["timesteps"] == entries["float_k"]["timesteps"]
        assert len(entries[name]["timesteps"]) == 4
    assert report["best"]["name"] == "best"
    for entry in (*entries.values(), report["best"]):
        assert entry["num_images"] == 32
        assert entry["metrics"]["fd_digits"] > 0
    assert entries["float_k"]["bitops"] == 1024 * entries["float_k"]["macs"]
    assert entries["float_k"]["weight_bytes"] * 6 == entries["w6a6"]["weight_bytes"] * 32
    assert entries["float_reference"]["metrics"]["psnr_db"] is None  # infinite: it is its own reference
    assert [entries[name]["bits"]["label"] for name in entries] == ["float", "float", "W8A8", "W6A6"]


def test_the_budget_is_what_w6a6_costs_and_is_kept(report: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    (w6a6,) = [entry for entry in report["baselines"] if entry["name"] == "w6a6"]
    assert report["budget"] == {"bitops": w6a6["bitops"], "name": "w6a6"}
    assert report["best"]["bitops"] <= report["budget"]["bitops"]
    assert all(t["bitops"] <= report["budget"]["bitops"] for t in trials if t["phase"] in ("search", "selection"))


def test_search_selection_and_final_images_have_seeds_and_fingerprints_of_their_own(
    report: dict[str, Any], trials: list[dict[str, Any]]
) -> None:
    seeds: dict[str, set[int]] = {}
    fingerprints: dict[str, set[str]] = {}
    for trial in trials:
        phase = "search" if trial["phase"] == "baseline" else trial["phase"]
        seeds.setdefault(phase, set()).add(trial["seed"])
        fingerprints.setdefault(phase, set()).add(trial["fingerprint"])
    for by_phase in (seeds, fingerprints):
        assert set(by_phase) == {"search", "selection", "noise", "final"}
        assert all(len(values) == 1 for values in by_phase.values())
        assert len(set.union(*by_phase.values())) == 4  # type: ignore[arg-type]
    assert report["fingerprint"] == {
        "search": fingerprints["search"].pop(),
        "final": fingerprints["final"].pop(),
    }
    final = seeds["final"].pop()
    assert {entry["seed"] for entry in (*report["baselines"], report["best"])} == {final}
    assert {entry["seed"] for entry in report["front"]} == seeds["search"]


def test_no_candidate_is_scored_twice_under_one_fingerprint(
    report: dict[str, Any], trials: list[dict[str, Any]]
) -> None:
    pairs = [(trial["key"], trial["fingerprint"]) for trial in trials]
    assert len(set(pairs)) == len(pairs)
    assert [trial["index"] for trial in trials] == list(range(len(trials)))
    searched = {trial["key"] for trial in trials if trial["phase"] == "search"}
    assert report["search"]["num_evaluations"] == len(searched) == 20
    assert report["search"]["stop_reason"] == "generations"
    assert all(Candidate.from_json(trial["candidate"]).key() == trial["key"] for trial in trials)


def test_baselines_are_scored_under_the_search_protocol_too(report: dict[str, Any]) -> None:
    names = {entry["name"] for entry in report["search_baselines"]}
    assert names >= {"float_k", "w8a8", "w6a6"}
    assert {entry["num_images"] for entry in report["search_baselines"]} == {16}


def test_the_winner_is_the_better_finalist(report: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    score: Callable[[Mapping[str, Any]], float] = lambda trial: trial["metrics"][SCORE]  # noqa: E731
    searched = sorted((t for t in trials if t["phase"] == "search"), key=score)
    selected = [t for t in trials if t["phase"] == "selection"]
    *finalists, worst = selected
    assert [t["key"] for t in (*finalists[:2], worst)] == [t["key"] for t in (*searched[:2], searched[-1])]
    (uniform,) = finalists[2:]
    assert {b for a in uniform["candidate"]["allocations"] for b in a["act_bits"]} == {6}
    assert Candidate.from_json(report["best"]["candidate"]).key() == min(finalists, key=score)["key"]


def test_the_front_has_no_beaten_member(report: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    searched = [(t["bitops"], t["metrics"][SCORE]) for t in trials if t["phase"] == "search"]
    front = [(entry["bitops"], entry["metrics"][SCORE]) for entry in report["front"]]
    for bitops, quality in front:
        assert not any((b <= bitops and q < quality) or (b < bitops and q <= quality) for b, q in searched)
    assert min(quality for _, quality in searched) == min(quality for _, quality in front)


def test_winograd_is_judged_for_every_tile(report: dict[str, Any]) -> None:
    assert [tile["m"] for tile in report["winograd"]] == [2, 4]
    for tile in report["winograd"]:
        names = [layer["name"] for layer in tile["ineligible_layers"]]
        assert tile["points"] == "standard"
        assert not set(names) & set(tile["eligible_layers"])
        assert "conv_in" in tile["eligible_layers"]
        reasons = {layer["name"]: layer["reason"] for layer in tile["ineligible_layers"]}
        assert "stride" in reasons["down_blocks.0.downsamplers.0.conv"]
        assert "1x1" in reasons["up_blocks.0.resnets.0.conv_shortcut"]
        assert set(tile["sqnr_db"]) == set(tile["sqnr_db_activations"]) == {"standard", "closed_form", "learned"}
        judged = tile["sqnr_db_configured"]
        kept = tile["sqnr_db_kept"]["configured"]
        assert kept == pytest.approx(max(judged["learned"], judged["closed_form"]), abs=1e-6)
    f4 = report["winograd"][1]["sqnr_db"]
    assert f4["standard"] < 5
    assert f4["closed_form"] >= f4["standard"] + 10
    assert f4["learned"] >= f4["closed_form"] - 1e-9


@pytest.mark.slow
def test_scales_of_another_run_are_used(smoke: Path, tmp_path: Path) -> None:
    scales = smoke / "winograd_scales.json"
    finish(start(tmp_path / "run", "winograd=f4", f"winograd.scales_from={scales}"))
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["winograd"]["4"]["scales"] == json.loads(scales.read_text())["tiles"]["4"]["scales"]
    output = finish(start(tmp_path / "other", "winograd=f6", f"winograd.scales_from={scales}"), status=2)
    assert "holds scales for the tiles 2, 4, not for 6" in output


FEW = (
    "space.num_inference_steps=2", "evaluation.reference_steps=2", "evaluation.micro_batch=8",
    "evaluation.num_images=8", "evaluation.num_finalists=1", "objective.num_images=8",
    "objective.control_images=8", "search.population_size=4",
    "search.num_crossovers=4", "winograd.report_tiles=[]", "winograd.learning.num_steps=1", "objective.proxy_images=8",
)  # fmt: skip


@pytest.mark.slow
def test_tiles_are_searched_and_then_alone_for_the_winner(tmp_path: Path) -> None:
    joint, tiles = tmp_path / "joint", tmp_path / "tiles"
    run_here(joint, "experiment=joint_winograd", "space.tiles=[0,2,4]", *FEW)
    report = json.loads((joint / "report.json").read_text())
    names = [entry["name"] for entry in report["baselines"]]
    assert names == ["float_reference", "float_k", "w8a8", "w6a6", "w8a8_f2", "w8a8_f4", "winograd_rule"]
    by_name = {entry["name"]: entry for entry in report["baselines"]}
    assert by_name["winograd_rule"]["bitops"] <= report["budget"]["bitops"]
    assert by_name["w8a8_f4"]["multiplications"] < by_name["w8a8_f2"]["multiplications"] < by_name["w8a8"]["macs"]
    assert by_name["w8a8_f4"]["hadamard_bitops"] < by_name["w8a8_f4"]["bitops"]
    assert report["winograd_choice"].startswith("searched: ")
    assert [tile["m"] for tile in report["winograd"]] == [2, 4]
    assert all(len(tile["stage_sqnr_db"]["all"]) == 26 for tile in report["winograd"])
    seen = {t for line in (joint / "trials.jsonl").read_text().splitlines() for t in layer_tiles(json.loads(line))}
    assert seen == {0, 2, 4}
    recipe = json.loads((joint / "recipe.json").read_text())
    assert set(recipe["winograd"]) == {str(t) for t in layer_tiles(recipe) if t}

    run_here(tiles, "experiment=joint_winograd", "space.tiles=[0,2,4]", f"space.recipe={joint}/recipe.json", *FEW)
    fixed, found = recipe["candidate"], json.loads((tiles / "recipe.json").read_text())["candidate"]
    assert found["timesteps"] == fixed["timesteps"]
    assert [a["weight_bits"] for a in found["allocations"]] == [a["weight_bits"] for a in fixed["allocations"]]
    with pytest.raises(UserError, match="no recipe at"):
        run_here(tmp_path / "other", "experiment=joint_winograd", f"space.recipe={tmp_path}/nothing.json", *FEW)


@pytest.mark.slow
def test_tiles_bring_a_winner_of_few_bits_below_what_the_highest_bits_cost(tmp_path: Path) -> None:
    bits, joint = ["budget.weight_bits=6", "budget.act_bits=6"], "experiment=joint_winograd"
    run_here(tmp_path / "first", joint, "ablation=in_turn_first", *bits, *FEW)
    second = [f"space.recipe={tmp_path}/first/recipe.json", "budget=w5a5"]
    run_here(tmp_path / "second", joint, "ablation=in_turn_second", *second, *FEW)
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    rule = next(entry for entry in report["baselines"] if entry["name"] == "winograd_rule")
    assert report["best"]["bitops"] <= report["budget"]["bitops"] >= rule["bitops"]


def layer_tiles(record: Mapping[str, Any]) -> set[int]:
    """Tiles that any layer of a trial's or a recipe's candidate has."""
    return {tile for allocation in record["candidate"]["allocations"] for tile in allocation["tiles"]}


def test_stages_and_environment_are_recorded(report: dict[str, Any], smoke: Path) -> None:
    assert set(report["stages"]) == {"calibrate", "winograd f2", "winograd f4", "search", "select", "weigh", "evaluate"}
    assert all(seconds >= 0 for seconds in report["stages"].values())
    (only,) = json.loads((smoke / "environment.json").read_text())["starts"]
    assert only == report["environment"]
    assert only["num_threads"] == 1
    assert "torch" in only["packages"]


def test_evidence_agrees_with_the_trials(report: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    evidence, searched = report["evidence"], [t for t in trials if t["phase"] == "search"]
    scores = [trial["metrics"][SCORE] for trial in searched]
    assert evidence["progress"]["search"] == [min(scores[: i + 1]) for i in range(len(scores))]
    assert evidence["progress"]["random"] == []
    noise, best = evidence["score_noise"], Candidate.from_json(report["best"]["candidate"]).key()
    own = next(trial for trial in searched if trial["key"] == best)
    (other,) = [trial for trial in trials if trial["phase"] == "noise"]
    assert other["key"] == best
    assert noise["scores"] == [own["metrics"][SCORE], other["metrics"][SCORE]]
    low, high = noise["over_images"]["interval"]
    assert low < noise["scores"][0] < high
    correlations = {row["between"]: row for row in evidence["rank_correlation"]}
    assert {row["num_candidates"] for name, row in correlations.items() if "same images" in name} == {len(searched)}
    assert all(-1 <= row["tau"] <= 1 for row in correlations.values())
    for entry in (*report["baselines"], report["best"]):
        low, high = entry["intervals"]["fd_digits"]
        assert low < entry["metrics"]["fd_digits"] < high


def test_another_budget_and_a_random_search_reuse_what_was_measured(
    smoke: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    run_here(tmp_path / "run", "budget=w8a8", "evaluation.random_control=true", f"reuse=[{smoke}]")
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    trials = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_bytes().splitlines()]
    for before, now in zip(report["baselines"], again["baselines"], strict=True):
        assert before == now
    assert {t["source"] for t in trials if t["phase"] == "final" and t["name"] != "best"} == {str(smoke)}
    random = [trial for trial in trials if trial["phase"] == "random"]
    assert 0 < len(random) <= again["search"]["num_evaluations"]
    assert all(trial["bitops"] <= again["budget"]["bitops"] for trial in random)
    assert len(again["evidence"]["progress"]["random"]) >= len(random)
    assert again["best"]["bitops"] > report["budget"]["bitops"]


def test_a_winner_calibrated_for_its_own_bits(tmp_path: Path) -> None:
    learned = ("calibration=sampled", "calibration.weight_iterations=4", "calibration.act_iterations=2")
    again = ("evaluation.recalibrate=true", "evaluation.recalibrated_candidates=2", "search.num_generations=1")
    run_here(tmp_path / "run", *learned, *again, f"paths.cache_dir={tmp_path / 'cache'}")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    trials = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_bytes().splitlines()]
    best, recalibration = report["best"], report["best"]["recalibration"]
    scores = recalibration["selection"]
    assert recalibration["shipped"] == min(scores, key=lambda name: scores[name])
    measured = {"supernet": best["metrics_supernet"], "recalibrated": recalibration["metrics_recalibrated"]}
    assert best["metrics"] == measured[recalibration["shipped"]]
    assert measured["supernet"] != measured["recalibrated"]
    (supernet,) = {trial["state"] for trial in trials if trial["phase"] == "search"}
    own = {(trial["key"], trial["state"]) for trial in trials if trial["state"] != supernet}
    assert len(own) == len(dict(own)) in (2, 3)  # each candidate by its own network; the winner may be one of the two
    correlation = report["evidence"]["rank_correlation"][1]
    assert "subnets calibrated for their own bits" in correlation["between"]
    assert correlation["num_candidates"] == 2
    model = apply_recipe(tmp_path / "run" / "recipe.json")
    assert model.sample(4, best["seed"]).isfinite().all()


def test_calibrating_again_needs_a_calibration_that_learns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.recalibrate: calibration=ranges finds the same ranges again"):
        run_here(tmp_path / "run", "calibration=ranges", "evaluation.recalibrate=true")


def test_a_search_seed_of_its_own_changes_the_search_alone(smoke: Path, report: dict[str, Any], tmp_path: Path) -> None:
    run_here(tmp_path / "run", "search_seed=7", f"reuse=[{smoke}]", "search.num_generations=1")
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["fingerprint"]["final"] == report["fingerprint"]["final"]
    assert again["fingerprint"]["search"] != report["fingerprint"]["search"]
    assert again["baselines"] == report["baselines"]


def test_the_page_needs_nothing_from_elsewhere(smoke: Path) -> None:
    page = (smoke / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?!#|data:)[^"'\s>]+|url\(\s*["']?https?:|@import""", page)
    assert page.count("data:image/png;base64,") >= 2


def test_the_recipe_gives_the_reported_figures_back(smoke: Path, report: dict[str, Any]) -> None:
    assert no_warning_of_the_recipe(report)
    best = report["best"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = apply_recipe(smoke / "recipe.json")
        images = model.sample(best["num_images"], best["seed"])
        assert digits_frechet()(images.split(model.micro_batch)) == pytest.approx(
            best["metrics"]["fd_digits"], abs=1e-9, rel=1e-9
        )
    finally:
        torch.set_num_threads(threads)
    assert list(model.timesteps) == best["timesteps"]


@pytest.mark.slow
def test_the_recipe_agrees_where_fewer_images_are_asked_for_than_a_forward_holds(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "quant=groupwise", "winograd=f6", "evaluation.num_images=3", "evaluation.micro_batch=8")
    assert no_warning_of_the_recipe(json.loads((tmp_path / "run" / "report.json").read_text()))


def no_warning_of_the_recipe(report: Mapping[str, Any]) -> bool:
    return not [warning for warning in report["warnings"] if warning.startswith("recipe.json")]


def test_the_same_seed_repeats_in_another_directory(runs: Runs, smoke: Path, report: dict[str, Any]) -> None:
    other = runs.again.result()[0]
    assert (other / "trials.jsonl").read_bytes() == (smoke / "trials.jsonl").read_bytes()
    again = json.loads((other / "report.json").read_text())
    for key in ("best", "baselines", "front", "fingerprint", "winograd"):
        assert again[key] == report[key]
    ours, theirs = (read_tensors(path / "recipe.safetensors", "recipe") for path in (smoke, other))
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert all(value.equal(theirs[0][name]) for name, value in ours[0].items())


def test_a_finished_directory_scores_nothing_again(copy: Path, smoke: Path, report: dict[str, Any]) -> None:
    run_here(copy)
    assert (copy / "trials.jsonl").read_bytes() == (smoke / "trials.jsonl").read_bytes()
    assert (copy / "supernet.safetensors").stat().st_mtime_ns == (smoke / "supernet.safetensors").stat().st_mtime_ns
    again = json.loads((copy / "report.json").read_text())
    assert again["best"] == report["best"]
    assert again["stages"]["calibrate"] == report["stages"]["calibrate"]
    assert len(json.loads((copy / "environment.json").read_text())["starts"]) == 2


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been_killed(smoke: Path, report: dict[str, Any], tmp_path: Path) -> None:
    directory, states = tmp_path / "killed", list[bytes]()
    kill_in_calibration(directory)
    for count in (4, 15):  # in the middle of generation 0, and between the two finalists
        kill_when(directory, lambda count=count: num_trials(directory) >= count)
        states.append((directory / "trials.jsonl").read_bytes())
    finish(start(directory))
    whole = (smoke / "trials.jsonl").read_bytes()
    assert all(whole.startswith(state) and 0 < len(state) < len(whole) for state in states)
    assert (directory / "trials.jsonl").read_bytes() == whole
    assert json.loads((directory / "report.json").read_text())["best"] == report["best"]
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    assert len(json.loads((directory / "environment.json").read_text())["starts"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 6, 12, 14, 17, 19])
def test_a_kill_after_any_trial_changes_nothing(count: int, smoke: Path, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    kill_when(directory, lambda: num_trials(directory) >= count)
    finish(start(directory))
    assert (directory / "trials.jsonl").read_bytes() == (smoke / "trials.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform_prefix", "sampled"])
def test_a_kill_between_blocks_changes_nothing(method: str, tmp_path: Path) -> None:
    learned = [f"calibration={method}", "calibration.weight_iterations=4", "calibration.act_iterations=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *learned))
    for block in (2, 9):
        kill_when(killed, (killed / "calibration" / f"unit_{block:04d}.safetensors").exists, *learned)
        assert not (killed / "supernet.safetensors").exists()
    finish(start(killed, *learned))
    states = [read_tensors(directory / "supernet.safetensors", "quantizers")[0] for directory in (whole, killed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    records = [json.loads((directory / "report.json").read_text())["calibration"] for directory in (whole, killed)]
    assert records[0] == records[1]
    assert len(records[0]) > 0
    assert (killed / "trials.jsonl").read_bytes() == (whole / "trials.jsonl").read_bytes()
    assert not (killed / "calibration").exists()


def test_a_line_cut_by_a_kill_is_repaired_and_said(copy: Path, smoke: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = copy / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    run_here(copy)
    assert path.read_bytes() == whole
    assert "trials.jsonl: its last line was cut" in capfd.readouterr().err
    assert any("was cut" in warning for warning in json.loads((copy / "report.json").read_text())["warnings"])


def test_a_damaged_line_is_said_and_its_candidate_scored_again(
    copy: Path, report: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    path = copy / "trials.jsonl"
    lines = path.read_bytes().split(b"\n")
    lost = json.loads(lines[3])
    lines[3] = lines[3][:50] + b"\0\0\xff" + lines[3][53:]
    path.write_bytes(b"\n".join(lines))
    run_here(copy)
    assert "trials.jsonl: line 4 is damaged" in capfd.readouterr().err
    after = path.read_bytes().split(b"\n")
    assert after[: len(lines) - 1] == lines[:-1]
    (added,) = after[len(lines) - 1 : -1]
    assert json.loads(added) == lost | {"index": len(lines) - 1}
    assert json.loads((copy / "report.json").read_text())["best"] == report["best"]


@pytest.mark.parametrize("name", ["supernet.safetensors", "stages.json", "environment.json"])
def test_a_truncated_file_of_the_run_is_named(name: str, copy: Path, smoke: Path) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=re.escape(str(path)) + r".*; remove it"):
        run_here(copy)
    assert (copy / "trials.jsonl").read_bytes() == (smoke / "trials.jsonl").read_bytes()
    path.unlink()
    run_here(copy)  # the advice helps
    assert (copy / "trials.jsonl").read_bytes() == (smoke / "trials.jsonl").read_bytes()


def test_a_supernet_of_another_calibration_is_refused(copy: Path) -> None:
    shutil.copy(copy / "recipe.safetensors", copy / "supernet.safetensors")
    with pytest.raises(UserError, match=r"supernet\.safetensors was made by another calibration; remove it"):
        run_here(copy)


def test_a_full_disk_loses_no_trial(copy: Path, smoke: Path) -> None:
    path = copy / "trials.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]))
    limit = len(b"".join(lines[:10])) + 100  # neither the eleventh trial fits nor a longer file
    process = start(copy, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output = finish(process, status=2)
    assert "could not be written" in output
    assert "Make room and start again with the same hydra.run.dir" in output
    assert "Traceback" not in output
    assert path.read_bytes() in (b"".join(lines[:count]) for count in range(8, 11))
    run_here(copy)
    assert path.read_bytes() == whole


def test_an_unreachable_budget_is_bad_input_that_says_the_cheapest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be at least \d+ \(the cheapest candidate's BitOPs\), found 1$"):
        run_here(tmp_path / "run", "budget=bitops", "budget.bitops=1")


def test_a_schedule_longer_than_training_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1001"):
        run_here(tmp_path / "run", "space.num_inference_steps=1001")


def test_every_candidate_failing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_images(self: SupernetModule, candidate: Candidate, image_indices: Sequence[int], seed: int) -> Tensor:
        return torch.full((len(image_indices), 1, 16, 16), float("nan"))

    monkeypatch.setattr(SupernetModule, "images", no_images)
    with pytest.raises(UserError, match=r"every candidate of the search failed; trials\.jsonl says why"):
        run_here(tmp_path / "run")
    lines = (tmp_path / "run" / "trials.jsonl").read_bytes().splitlines()
    assert {json.loads(line)["error"] for line in lines} == {"images held NaN or infinity"}
    assert len([line for line in lines if json.loads(line)["phase"] == "search"]) == 20
