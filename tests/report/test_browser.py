"""The pages in a real headless Chromium: no complaints, every plot there, hover, click, touch, width and colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import Tab
from tests.report.example import LAYERS, make_report, make_trials, render
from tests.report.test_page import with_pictures
from tests.running import TINY, run_here
from tmpq_exp.job_record import JobRecord, JobState, write_record
from tmpq_exp.sweep import conclude

Open = Callable[..., Tab]

PARTS = ("summary", "warnings", "results", "search", "samples", "bits", "timesteps", "winograd", "stages", "use")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The page of a run whose tiles were searched, which shows all parts."""
    trials = [record | {"multiplications": record["bitops"] // 36} for record in make_trials()]
    render(tmp_path, with_pictures(make_report()), trials=trials)
    return tmp_path / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark"), (390, "light")])
def test_every_part_is_there_and_readable(path: Path, open_page: Open, width: int, scheme: str) -> None:
    tab = open_page(path, width=width, scheme=scheme)
    assert tab.complaints == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width, "the page must not scroll sideways"
    for part in (
        "summary",
        "warnings",
        "results",
        "search",
        "samples",
        "bits",
        "timesteps",
        "winograd",
        "stages",
        "use",
    ):
        box = tab.page.locator(f"#{part}").bounding_box()
        assert box is not None, part
        assert box["height"] > 50, part
    plots = tab.page.locator("svg:visible")
    assert plots.count() == 3 + 6 + 3
    for index in range(plots.count()):
        box = plots.nth(index).bounding_box()
        assert box["width"] > 80
        assert box["height"] > 80
    assert tab.page.locator("#search circle").count() == 2 * 72
    for text in (".lead", ".note", "#results td", "#candidate h3", ".warning", ".tick"):
        assert tab.contrast(text) > 4.5, text
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.strip("rgb()").split(","))) < 3 * 64) == (scheme == "dark")


def shown_bits(tab: Tab, row: str) -> list[int]:
    """Bits of the heat map below the charts in the order of the page, of its rows with this label."""
    rows = tab.page.locator("#candidate .row")
    texts = [rows.nth(i).locator("span").all_inner_texts() for i in range(rows.count())]
    return [int(bits) for label, *cells in texts if label == row for bits in cells]


def expected(record: dict[str, Any], name: str, tab: Tab) -> list[int]:
    """Bits of a candidate in the order of the blocks on the page."""
    data = tab.page.evaluate("JSON.parse(document.getElementById('candidates').textContent).blocks")
    (allocation,) = record["candidate"]["allocations"]
    return [allocation[name][layer] for _, layers in data for layer in layers]


def is_shown(tab: Tab, record: dict[str, Any]) -> bool:
    """Whether the page shows exactly this candidate's bits and timesteps."""
    marks = tab.page.locator("#candidate .track i")
    titles = [marks.nth(i).get_attribute("title") for i in range(marks.count())]
    return (
        shown_bits(tab, "W") == expected(record, "weight_bits", tab)
        and shown_bits(tab, "A") == expected(record, "act_bits", tab)
        and titles == [f"t = {t}" for t in record["candidate"]["timesteps"]]
    )


def test_pointing_shows_figures_and_a_click_bits_and_timesteps(path: Path, open_page: Open) -> None:
    tab, trials = open_page(path), make_trials()
    best = min((r for r in trials if r["phase"] == "search"), key=lambda r: r["metrics"]["fd_digits"])
    assert is_shown(tab, best), "before any click the best found is shown"
    tip = tab.page.locator("#tip")
    assert not tip.is_visible()
    for chart in (0, 1):
        x, y = tab.centre(f"#search figure:nth-of-type({chart + 1}) circle.dot", 40 + chart)
        tab.page.mouse.move(x, y)
        assert tip.is_visible()
        tab.page.mouse.click(x, y)
        trial = int(tab.page.locator("#candidate").get_attribute("data-trial"))
        record = trials[trial]
        assert (
            f"fd_digits {record['metrics']['fd_digits']:.4g}, {record['bitops'] / 1e9:,.2f} GBitOPs" in tip.inner_text()
        )
        assert is_shown(tab, record)
        selected = tab.page.locator("svg .selected")
        assert {selected.nth(i).get_attribute("data-trial") for i in range(selected.count())} == {str(trial)}
        assert selected.count() == 3, "in all three charts"
    left = tab.page.evaluate("document.querySelector('#candidate .track i').offsetLeft")
    track = tab.page.locator("#candidate .track").bounding_box()
    first = record["candidate"]["timesteps"][0]
    assert left == pytest.approx((1 - first / 999) * track["width"], abs=3)
    tab.page.mouse.move(5, 5)
    assert not tip.is_visible()
    assert tab.complaints == []


def test_a_baseline_is_a_candidate_too_and_keys_are_enough(path: Path, open_page: Open) -> None:
    tab = open_page(path)
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        label = tab.page.evaluate("document.activeElement.getAttribute('aria-label') || ''")
        if label.startswith("W6A6"):
            break
    assert tab.page.locator("#tip").inner_text().startswith("W6A6: fd_digits 21.1")
    tab.page.keyboard.press("Enter")
    assert tab.page.locator("#candidate h3").inner_text() == "W6A6"
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("#tip").is_visible()


def test_a_tap_on_a_phone_needs_no_aim(path: Path, open_page: Open) -> None:
    tab, trials = open_page(path, width=390, touch=True), make_trials()
    before = tab.page.locator("#candidate").get_attribute("data-trial")
    x, y = tab.centre("#search circle.dot", 0)
    tab.page.touchscreen.tap(x + 9, y - 9)
    after = tab.page.locator("#candidate").get_attribute("data-trial")
    assert after != before
    assert is_shown(tab, trials[int(after)])


def test_bits_of_every_step_have_a_row_each(tmp_path: Path, open_page: Open) -> None:
    trials = make_trials()
    for record in trials:
        allocations = record["candidate"].get("allocations")
        if allocations:
            record["candidate"] = record["candidate"] | {"allocations": allocations * 10}
    render(tmp_path, make_report(num_allocations=10), trials=trials)
    tab = open_page(tmp_path / "report.html")
    tab.page.mouse.click(*tab.centre("#search circle.dot", 3))
    assert tab.page.locator("#candidate .cell").count() == 2 * 10 * len(LAYERS)
    assert tab.complaints == []


def test_without_scripts_the_page_still_says_all_but_the_click(path: Path, chromium: Any) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#search circle title").count() == 2 * 72
    assert not page.locator(".needs-script").first.is_visible()
    assert not page.locator("#candidate").is_visible()
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_pages_that_runs_have_written(written: Path, open_page: Open, width: int, scheme: str) -> None:
    """A run, a comparison, a sweep: not examples, but what the command line leaves."""
    for name in ("run/report.html", "compared/comparison.html", "sweep.html"):
        tab = open_page(written / name, width=width, scheme=scheme)
        assert tab.complaints == [], name
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width, f"{name} scrolls sideways"
    tab = open_page(written / "run" / "report.html", width=width, scheme=scheme)
    for part in ("summary", "results", "search", "samples", "bits", "timesteps", "winograd", "stages", "use"):
        box = tab.page.locator(f"#{part}").bounding_box()
        assert box is not None, part
        assert box["height"] > 50, part


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a comparison, taken for a sweep."""
    folder = tmp_path_factory.mktemp("written")
    run_here(folder / "run", *TINY, "winograd.report_tiles=[2]", "winograd.learning.num_steps=1")
    run_here(folder / "compared", "task=report", f"runs=[{folder / 'run'}]")
    write_record(folder / "run", JobRecord(0, ["seed=0"], "seed=0", JobState.FINISHED, 0))
    conclude(folder)
    return folder
