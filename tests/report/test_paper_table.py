"""Published figures beside ours: what is compared, what is only shown, and what is said of it."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from tests.report.example import make_report
from tmpq_exp.config import UserError
from tmpq_exp.config.identity import flatten
from tmpq_exp.report.paper_table import PaperRow, Verdict, latex, markdown, notes_of, paper_rows, terminal_tables
from tmpq_exp.runs import read_run
from tmpq_exp.tabulate import rows_of

METRIC = "fd_digits"
PAPER: dict[str, Any] = {
    "preset": "tmpq_dm/mine",
    "title": "A paper, 50 % & more",
    "row": "Row_1",
    "figures": [
        {"entry": "best", "metric": METRIC, "figure": 17.0, "tolerance": 1.0, "source": "them", "remark": "float16"},
        {"entry": "w6a6", "metric": METRIC, "figure": None, "tolerance": None, "source": "them", "remark": ""},
        {"entry": "nobody", "metric": METRIC, "figure": 1.0, "tolerance": 1.0, "source": "them", "remark": ""},
    ],
    "protocol": {"tier": "full", "evaluation.num_images": 512, "space.weight_bits": [8, 6]},
}


def config_of(tier: str = "full", num_images: int = 512) -> dict[str, Any]:
    settings = {"evaluation": {"num_images": num_images}, "space": {"weight_bits": [8, 6]}}
    return {"tier": tier, **settings, "paper": copy.deepcopy(PAPER)}


def rows(
    name: str = "run", quality: float = 17.5, fingerprint: str = "final-f", finished: bool = True, **changes: Any
) -> list[PaperRow]:
    report = make_report()
    report["best"]["metrics"][METRIC] = quality
    report["best"]["intervals"][METRIC] = [quality - 0.25, quality + 0.25]
    report["best"]["fingerprint"] = fingerprint
    config = config_of(**changes)
    return paper_rows(name, config, report if finished else None, flatten(config))


def test_a_run_under_the_protocol_is_within_or_outside_the_tolerance() -> None:
    best, uniform, missing = rows()
    assert best.difference == pytest.approx(0.5)
    assert best.verdict is Verdict.WITHIN
    assert best.cells()[3:7] == ("17.00", "17.50 (17.25 to 17.75)", "+0.50", "± 1.00")
    assert rows(quality=18.0)[0].verdict is Verdict.WITHIN
    assert rows(quality=15.9)[0].verdict is Verdict.OUTSIDE
    assert (uniform.verdict, uniform.difference) == (Verdict.NOT_PUBLISHED, None)
    assert uniform.ours is not None
    assert missing.verdict is Verdict.NOT_MEASURED


def test_another_protocol_is_named_and_gets_no_verdict() -> None:
    found = rows(num_images=32)
    assert found[0].difference == pytest.approx(0.5)
    assert found[0].verdict is Verdict.OTHER_PROTOCOL
    assert "run: another protocol than the preset's: evaluation.num_images 32 instead of 512." in notes_of(found)


def test_a_smoke_tier_is_never_compared() -> None:
    found = rows(tier="smoke", quality=17.0)
    assert [(row.verdict, row.difference) for row in found] == [(Verdict.SMOKE, None)] * 3
    (note,) = [note for note in notes_of(found) if "tier=smoke" in note]
    assert "mean nothing" in note


def test_an_unfinished_run_is_said() -> None:
    assert {row.verdict for row in rows(finished=False)} == {Verdict.NOT_FINISHED}


def test_figures_of_one_preset_under_two_fingerprints_are_told_apart() -> None:
    same = [*rows("a"), *rows("b")]
    other = [*rows("a")[:1], *rows("b", fingerprint="final-g")[:1]]
    assert not [note for note in notes_of(same[:1] + same[3:4]) if "do not compare" in note]
    (note,) = [note for note in notes_of(other) if "do not compare" in note]
    assert "fd_digits of tmpq_dm/mine was measured under different fingerprints by a, b" in note
    assert {
        "a: fd_digits was measured under fingerprint final-f.",
        "b: fd_digits was measured under fingerprint final-g.",
    } <= set(notes_of(other))


def test_sources_and_remarks_stand_in_the_notes() -> None:
    assert "Row_1: best, fd_digits 17.00: them (float16)" in notes_of(rows())


def test_markdown_has_a_line_for_every_figure_and_the_notes() -> None:
    text = markdown(rows("a|b"))
    lines = text.splitlines()
    assert "## A paper, 50 % & more" in lines
    (best,) = [line for line in lines if "| best |" in line]
    assert best == r"| Row_1 (a\|b) | best | fd_digits | 17.00 | 17.50 (17.25 to 17.75) | +0.50 | ± 1.00 | within |"
    assert len({line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")}) == 1
    assert "- Row_1: best, fd_digits 17.00: them (float16)" in lines


def test_latex_escapes_what_it_prints() -> None:
    lines = latex(rows("a_run")).splitlines()
    (best,) = [line for line in lines if "& best &" in line]
    assert best.startswith(r"Row\_1 (a\_run) & best & fd\_digits & 17.00 &")
    assert best.endswith(r"& $\pm$ 1.00 & within \\")
    assert r"\caption{A paper, 50 \% \& more}" in lines
    assert [line.split("{")[0] for line in lines if line.startswith((r"\begin", r"\end"))] == [r"\begin"] * 2 + [
        r"\end"
    ] * 2


def test_a_name_with_a_line_break_stays_in_its_cell_and_its_comment() -> None:
    found = rows("a\n\\input{x}", tier="smoke")
    assert not [line for line in latex(found).splitlines() if line.startswith("\\input")]
    assert len([line for line in markdown(found).splitlines() if "| best |" in line]) == 1


def test_the_terminal_prints_names_in_brackets_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=160)
    for table in terminal_tables(rows("[red]")):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert "Row_1 ([red])" in console.file.getvalue()


def run_directory(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (path / "report.json").write_text(json.dumps(make_report()))
    return path


def test_rows_of_a_run_directory(tmp_path: Path) -> None:
    config = {**config_of(), "task": {"_target_": "tmpq_exp.pipeline.run"}}
    found = rows_of(read_run(run_directory(tmp_path / "one", config)))
    assert [(row.run, row.entry) for row in found] == [("one", "best"), ("one", "w6a6"), ("one", "nobody")]
    assert found[0].differences == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"paper": None}, "was not made by a preset of a paper"),
        ({"paper": {"preset": "x"}}, "is damaged"),
        (
            {"paper": {**PAPER, "figures": [{"entry": "best", "metric": "fid", "source": "x", "figure": "many"}]}},
            "damaged",
        ),
        ({"task": {"_target_": "tmpq_exp.train.train"}}, "task=table takes runs of task=run and task=classify"),
    ],
)
def test_runs_without_published_figures_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {**config_of(), "task": {"_target_": "tmpq_exp.pipeline.run"}, **changes}
    with pytest.raises(UserError, match=said):
        rows_of(read_run(run_directory(tmp_path / "one", config)))
