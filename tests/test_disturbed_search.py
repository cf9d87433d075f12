"""Too little memory and NaN amid a search, by one process and by several: what they cost is two records."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.disturbances import break_candidates, injected
from tests.running import TIMEOUT, TINY, run_here, sorted_trials, start

ALONE = (*TINY, "num_threads=1")
RANKS = ("trainer.devices=2",)
RAY = ("executor=ray", "executor.num_workers=2")

ROOM = 4
"""Images a forward for which there is memory, half of the micro-batch of ``TINY``."""


def trials_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("search") / "undisturbed"
    run_here(directory, *ALONE)
    return directory


@pytest.fixture(scope="module")
def chosen(undisturbed: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A candidate of the first generation, and one of the last that nothing comes from.

    Of two ranks, the first measures the one and the second the other.
    """
    trials = trials_of(undisturbed)
    large, broken = trials[2], trials[8]
    assert (large["phase"], large["generation"]) == ("search", 0)
    assert (broken["phase"], broken["generation"]) == ("search", 1)
    assert [trial["key"] for trial in trials].count(broken["key"]) == 1
    return large, broken


def disturbed(directory: Path, large: dict[str, Any], broken: dict[str, Any], *overrides: str) -> str:
    """A whole run in which memory runs out over one candidate and the images of another are NaN; what it printed."""
    prepare = partial(break_candidates, large["key"], broken["key"], large["seed"], ROOM)
    process = start(directory, *ALONE, *overrides, **injected(prepare))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def one_process(
    chosen: tuple[dict[str, Any], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A disturbed run, and what it printed."""
    directory = tmp_path_factory.mktemp("disturbed") / "one"
    return directory, disturbed(directory, *chosen)


@pytest.mark.slow
def test_a_search_goes_on_behind_candidates_that_are_too_large_or_break_down(
    undisturbed: Path, chosen: tuple[dict[str, Any], dict[str, Any]], one_process: tuple[Path, str]
) -> None:
    (directory, output), (large, broken) = one_process, chosen
    assert output.count(f"evaluation of {large['key']}: out of memory at 8 images a forward") == 1
    found, expected = ([t for t in trials_of(place) if t["phase"] == "search"] for place in (directory, undisturbed))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs["key"] == large["key"]:
            assert ours == theirs | {"micro_batch": ROOM, "metrics": ours["metrics"]}
            assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3)
        elif theirs["key"] == broken["key"]:
            assert ours["error"] == "images held NaN or infinity"
            assert set(ours["metrics"].values()) == {None}
            assert ours == theirs | {"error": ours["error"], "metrics": ours["metrics"]}
        else:
            assert ours == theirs
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, undisturbed)]
    assert [report["search"]["num_failed"] for report in reports] == [1, 0]
    assert reports[0]["best"] == reports[1]["best"]
    assert any(warning.startswith("1 evaluations ran at fewer images a forward") for warning in reports[0]["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [RANKS, RAY], ids=["ranks", "ray"])
def test_two_workers_say_of_such_candidates_what_one_process_says(
    workers: tuple[str, ...],
    chosen: tuple[dict[str, Any], dict[str, Any]],
    one_process: tuple[Path, str],
    tmp_path: Path,
) -> None:
    if workers == RAY:
        pytest.importorskip("ray", reason="the extra ray is not installed")
    directory = tmp_path / "run"
    output = disturbed(directory, *chosen, *workers)
    assert workers == RAY or "out of memory at 8 images a forward" in output
    if workers == RANKS:
        assert (directory / "trials.jsonl").read_bytes() == (one_process[0] / "trials.jsonl").read_bytes()
    assert sorted_trials(directory) == sorted_trials(one_process[0])
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, one_process[0])]
    assert all(reports[0][key] == reports[1][key] for key in ("best", "baselines", "front"))
