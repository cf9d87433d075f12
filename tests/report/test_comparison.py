"""Runs of a sweep in one page and one CSV: what compares stands together, what does not stands apart."""

from __future__ import annotations

import copy
import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.report.conftest import Tab
from tests.report.example import Page, make_report
from tmpq_exp.report.comparison import (
    CSV_COLUMNS,
    ComparedRun,
    comparison_rows,
    groups_of,
    mixed_message,
    write_comparison_csv,
)
from tmpq_exp.report.comparison_page import comparison_html, comparison_tables, run_labels


def compared(
    name: str, quality: float | None = 17.62, fingerprint: str = "final-f", search: str = "search-f", **settings: Any
) -> ComparedRun:
    report = copy.deepcopy(make_report())
    report["best"]["metrics"]["fd_digits"] = quality
    report["fingerprint"] = {"search": search, "final": fingerprint}
    for entry in (report["best"], *report["baselines"]):
        entry["fingerprint"] = fingerprint
    report["fingerprint_parts"] = {"final": {"num_images": 512 if fingerprint == "final-f" else 32, "model": "abc"}}
    return ComparedRun(name, Path("sweep") / name, report, settings, 72)


UNFINISHED = ComparedRun("3_seed=9", Path("sweep/3_seed=9"), None, {"seed": 9}, 5)


def page_of(tmp_path: Path, runs: list[ComparedRun]) -> tuple[str, Page]:
    path = tmp_path / "comparison.html"
    comparison_html(path, runs)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_runs_of_one_fingerprint_stand_in_one_table(tmp_path: Path) -> None:
    runs = [compared("0_budget=w5a5", 9.5, budget="w5a5"), compared("1_budget=w6a6", 7.25, budget="w6a6"), UNFINISHED]
    assert mixed_message(groups_of(runs)) is None
    text, page = page_of(tmp_path, runs)
    assert page.tags.count("svg") == 2
    assert "More than one protocol" not in page.text
    (best,) = re.findall(r'<tr class="best">(.*?)</tr>', text)
    assert "budget=w6a6" in best
    assert "7.25" in best
    assert "sweep/3_seed=9" in page.text
    assert "5 evaluations" in page.text
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text)


def test_mixed_fingerprints_are_split_and_said(tmp_path: Path) -> None:
    runs = [compared("a", 9.0), compared("b", 3.0, "other"), compared("c", 8.0)]
    groups = groups_of(runs)
    assert [(g.fingerprint, [run.name for run in g.runs]) for g in groups] == [
        ("final-f", ["a", "c"]),
        ("other", ["b"]),
    ]
    message = mixed_message(groups)
    assert message is not None
    assert "measured under 2 fingerprints, which differ in: num_images" in message
    assert "\n" not in message
    text, page = page_of(tmp_path, runs)
    assert "Figures measured differently cannot stand in one table or plot" in page.text
    first, second = re.findall(r'<section class="group">(.*?)</section>', text, re.DOTALL)
    assert "9.00" in first
    assert "3.00" not in first
    assert "3.00" in second
    assert len(re.findall('<tr class="best">', text)) == 2, "the best of each table, never of both"
    assert len(comparison_tables(runs)) == 2


def test_searches_on_other_seeds_have_a_plot_of_their_own(tmp_path: Path) -> None:
    runs = [compared("a"), compared("b", search="search-g"), compared("c")]
    text, page = page_of(tmp_path, runs)
    assert page.tags.count("svg") == 3
    assert len(re.findall("<path class=.curve", text)) == 3
    assert groups_of(runs)[0].by_search() == {"search-f": [0, 2], "search-g": [1]}


def test_csv_has_a_row_an_entry_with_its_fingerprint(tmp_path: Path) -> None:
    runs = [compared("a", 9.0, seed=0), compared("b", None, "other", seed=1), UNFINISHED]
    write_comparison_csv(tmp_path / "comparison.csv", runs)
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["entry"] for row in rows[:5]] == ["best", "float_reference", "float_k", "w8a8", "w6a6"]
    assert len(rows) == 2 * 5 + 1
    assert set(CSV_COLUMNS) | {"config.seed"} == set(rows[0])
    assert (rows[0]["quality"], rows[0]["fingerprint"], rows[0]["config.seed"]) == ("9.0", "final-f", "0")
    assert float(rows[4]["quality"]) == 20.4
    assert float(rows[0]["saving"]) == pytest.approx(
        make_report()["baselines"][1]["bitops"] / make_report()["best"]["bitops"], rel=1e-3
    )
    assert (rows[5]["quality"], rows[5]["fingerprint"]) == ("", "other")
    assert (rows[10]["status"], rows[10]["entry"], rows[10]["config.seed"]) == ("not finished", "", "9")
    assert comparison_rows(runs)[0]["seconds"] == 170.5


def test_further_metrics_have_columns_of_their_own() -> None:
    run = compared("a")
    assert run.report is not None
    run.report["best"]["metrics"]["ssim"] = 0.75
    run.report["best"]["further"] = {"ssim": "ssim-f"}
    row = comparison_rows([run])[0]
    assert (row["ssim"], row["fingerprint.ssim"], row["fingerprint"]) == (0.75, "ssim-f", "final-f")


def test_labels_tell_runs_apart() -> None:
    names = ["0_space=joint,tier=smoke", "1_space=joint_k,tier=smoke", "2_ablation=bits_only,tier=smoke"]
    assert run_labels([compared(name) for name in names]) == ["space=joint", "space=joint_k", "ablation=bits_only"]
    assert run_labels([compared("monday", seed=0), compared("tuesday", seed=1)]) == ["seed=0", "seed=1"]
    many = {f"some.long.setting.number_{i}": i for i in range(9)}
    assert run_labels([compared("monday", **many)]) == ["monday"]
    assert run_labels([compared("0_seed=1")]) == ["seed=1"]


def test_a_run_without_a_finite_figure_is_shown_with_a_dash(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, [compared("a", None), compared("b", 4.0)])
    assert "1 a -" in page.text
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(comparison_tables([compared("a", None)])[0])
    assert "fingerprint final-f" in capture.get()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path: Path, open_page: Callable[..., Tab], width: int, scheme: str) -> None:
    runs = [compared(f"{i}_seed={i}", 9.0 + i, "other" if i == 9 else "final-f") for i in range(10)]
    page_of(tmp_path, [*runs, UNFINISHED])
    tab = open_page(tmp_path / "comparison.html", width=width, scheme=scheme)
    assert tab.complaints == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.locator("svg:visible").count() == 4
    assert tab.page.locator("circle.mark").count() == 10
    for text in ("td", ".note", ".warning"):
        assert tab.contrast(text) > 4.5
