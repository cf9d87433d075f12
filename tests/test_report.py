"""The report holds what it promises, refuses what it must, and stays inside one file."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.report import (
    ENTRY_KEYS,
    REPORT_KEYS,
    pareto_png,
    report_html,
    samples_png,
    search_view,
    summary_table,
    validate_report,
    write_report_json,
)
from tmpq_exp.report.charts import Axis
from tmpq_exp.report.content import plain
from tmpq_exp.report.points import Point, pareto_front, spread

LAYERS = [
    "conv_in", "time_embedding.linear_1", "time_embedding.linear_2",
    *(f"{side}_blocks.{i}.resnets.{j}.conv{k}" for side in ("down", "up") for i in range(3)
      for j in (0, 1) for k in (1, 2)),
    *(f"mid_block.attentions.0.to_{name}" for name in ("q", "k", "v")), "mid_block.attentions.0.products", "conv_out",
]  # fmt: skip
WEIGHTED = [not name.endswith("products") for name in LAYERS]
BUDGET = 40_000_000_000
QUADRATIC = (804, 636, 487, 358, 248, 159, 89, 39, 9, 0)


def candidate(seed: int, num_allocations: int = 1) -> Candidate:
    rng = np.random.default_rng(seed)
    steps = tuple(sorted((int(t) for t in rng.choice(1000, 10, replace=False)), reverse=True))
    allocations = tuple(
        Allocation(
            tuple(int(b) for b in rng.integers(4, 9, len(LAYERS))),
            tuple(int(b) for b in rng.integers(4, 9, len(LAYERS))),
            (0,) * len(LAYERS),
        )
        for _ in range(num_allocations)
    )
    return Candidate(steps, allocations)


def entry(
    name: str, bits: float, quality: float, psnr: float | None, steps: tuple[int, ...] = QUADRATIC
) -> dict[str, Any]:
    label = "float" if bits == 32 else f"W{bits:g}A{bits:g}"
    return {
        "name": name, "timesteps": list(steps),
        "bits": {"weight_bits_mean": bits, "act_bits_mean": bits, "label": label},
        "bitops": round(BUDGET / 36 * bits * bits * len(steps) / 10), "macs": BUDGET // 36,
        "hadamard_bitops": BUDGET // 40, "multiplications": BUDGET // 40,
        "weight_bytes": round(150_000 * bits), "metrics": {"fd_digits": quality, "psnr_db": psnr}, "num_images": 512,
        "intervals": {"fd_digits": [quality - 0.375, quality + 0.375]}, "seed": 7,
        "fingerprint": "final-f", "further": {},
    }  # fmt: skip


def trial(index: int, value: float | None, bitops: float, **changes: Any) -> dict[str, Any]:
    proposed = candidate(index)
    return {
        "index": index, "phase": "search", "name": None, "generation": 0, "key": proposed.key(),
        "candidate": proposed.to_json(), "bitops": int(bitops), "macs": 1, "weight_bytes": 1,
        "metrics": {"fd_digits": value}, "num_images": 128, "seed": 1, "fingerprint": "search-f", "error": None,
    } | changes  # fmt: skip


def make_trials(count: int = 72) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = {"float_reference": (16.2, 50), "float_k": (17.4, 10), "w8a8": (18.3, 10), "w6a6": (21.1, 10)}
    costs = {"float_reference": 1024 / 36 * 5, "float_k": 1024 / 36, "w8a8": 64 / 36, "w6a6": 1.0}
    trials = [
        trial(
            i, value, BUDGET * costs[name], phase="baseline", name=name, key=name, candidate={"timesteps": [0] * steps}
        )
        for i, (name, (value, steps)) in enumerate(names.items())
    ]
    for index in range(len(names), count + len(names)):
        share = 1 - 0.45 * rng.random() ** 2
        value = 15.5 + 2.5 / share + 16 * rng.random() ** 2 * math.exp(-index / 40)
        trials.append(trial(index, value, BUDGET * share))
    return trials


def make_report(num_allocations: int = 1) -> dict[str, Any]:
    trials = [record for record in make_trials() if record["phase"] == "search"]
    chosen = min(trials, key=lambda record: record["metrics"]["fd_digits"])
    shipped = candidate(chosen["index"], num_allocations)
    best = entry("best", 5.7, 17.62, 21.4, shipped.timesteps) | {
        "metrics_supernet": {"fd_digits": 17.9}, "recalibration": None,
        "candidate": shipped.to_json(), "layers": LAYERS, "weighted": WEIGHTED,
    }  # fmt: skip
    reason = [
        {"name": "conv_in", "reason": "stride 2"},
        {"name": "time_embedding.linear_1", "reason": "not a 3x3 convolution"},
    ]
    return {
        "schema": 1, "model": "ddpm_digits", "fingerprint": {"search": "search-f", "final": "final-f"},
        "metric": "fd_digits", "further": [], "num_train_timesteps": 1000, "budget": {"bitops": BUDGET, "name": "w6a6"},
        "baselines": [
            entry("float_reference", 32, 15.1, None, tuple(range(980, -1, -20))), entry("float_k", 32, 16.3, 24.8),
            entry("w8a8", 8, 17.1, 24.1), entry("w6a6", 6, 20.4, 19.2),
        ],
        "best": best, "front": [
            entry(f"trial-{i}", 6 - i / 2, 17.6 + i, 20.0) | {"fingerprint": "search-f"} for i in range(3)
        ],
        "calibration": [],
        "winograd": [
            {"m": m, "points": ["0", "1", "-1", "2", "-2", "inf"], "eligible_layers": LAYERS[3:20],
             "ineligible_layers": reason,
             "sqnr_db": {"standard": 3.1 - m, "closed_form": 21.0 - m, "learned": 23.4 - m}}
            for m in (2, 4, 6)
        ],
        "winograd_choice": "none",
        "search": {"metric": "fd_digits", "num_evaluations": 72, "stop_reason": "the evaluation budget is spent",
                   "seconds": 131.4,
                   "num_images": 128, "seed": 1, "statistics": {}},
        "evidence": {
            "seeds": {"search": 1, "selection": 2, "final": 3},
            "score_noise": {"num_images": 128, "seeds": [1, 7, 8], "scores": [17.0, 18.25, 18.75],
                            "over_images": {"interval": [16.5, 17.75], "num_resamples": 100},
                            "over_seeds": {"mean": 18.5, "std": 0.35, "interval": [15.3, 21.7], "num_values": 2}},
            "rank_correlation": [{"between": "psnr_db and search score, same images", "tau": 0.62,
                                  "p_value": 0.0004, "num_candidates": 72}],
            "progress": {"search": [21.0, 17.0], "random": [None, 22.5, 19.125]},
        },
        "search_baselines": [],
        "stages": {"load": 1.2, "calibrate": 6.8, "winograd": 9.1, "search": 131.4, "evaluate": 22.0},
        "warnings": ["Differences of fd_digits below about 0.5 are within the noise of 512 images."],
        "ragged_groups": [{"name": "conv_in", "group_size": 32, "last_group": 1}],
        "environment": {"python": "3.11.9", "torch": "2.15.0", "cpu": "2 cores"},
    }  # fmt: skip


def make_samples() -> list[tuple[str, Any]]:
    base = torch.linspace(0, 1, 10 * 256).reshape(10, 1, 16, 16)
    labels = ("Float, 50 steps", "Float, 10 steps", "W8A8", "W6A6", "Best found")
    return [(label, (base + i * 0.02).clamp(0, 1)) for i, label in enumerate(labels)]


class Page(HTMLParser):
    """Tags, addresses and text of an HTML page; fails on tags that do not close in order."""

    _VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += " ".join(data.split()) + " "


def render(tmp_path: Path, report: dict[str, Any], **options: Any) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    options = {"trials": make_trials(), "pictures": {}, "samples": make_samples()} | options
    report_html(path, report, **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


# report.json


def test_report_json_round_trips_and_infinities_become_null(tmp_path: Path) -> None:
    report = make_report()
    report["best"]["metrics"] |= {"psnr_db": math.inf, "extra": float("nan"), "numpy": np.float32(1.5)}
    report["best"]["metrics"]["t"] = torch.tensor(2)
    report["stages"]["path"] = np.array([1.0, -np.inf])
    write_report_json(tmp_path / "report.json", report)
    text = (tmp_path / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["best"]["metrics"] == {"fd_digits": 17.62, "psnr_db": None, "extra": None, "numpy": 1.5, "t": 2}
    assert found["stages"]["path"] == [1.0, None]
    assert found["front"] == report["front"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_report_json(path, make_report())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tmpq_exp.report.content.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report_json(path, make_report() | {"model": "other"})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("key", REPORT_KEYS)
def test_every_documented_key_is_demanded(key: str) -> None:
    report = make_report()
    del report[key]
    with pytest.raises(ValueError, match=f"report misses the key '{key}'"):
        validate_report(report)


@pytest.mark.parametrize("key", ENTRY_KEYS)
def test_every_entry_key_is_demanded(key: str) -> None:
    for place in ("baselines", "front"):
        report = copy.deepcopy(make_report())
        del report[place][0][key]
        with pytest.raises(ValueError, match=key):
            validate_report(report)


def test_deeper_faults_are_named_by_their_path() -> None:
    def broken(change: Any) -> dict[str, Any]:
        report = make_report()
        change(report)
        return report

    faults = {
        r"named 'w8a8', found \['float_reference', 'float_k', 'w6a6'\]": lambda r: r["baselines"].pop(2),
        r"report.winograd\[1\].sqnr_db misses the key 'learned'": lambda r: r["winograd"][1]["sqnr_db"].pop("learned"),
        "report.best misses the key 'candidate'": lambda r: r["best"].pop("candidate"),
        r"report.front\[0\].metrics misses the key 'fd_digits'": lambda r: r["front"][0]["metrics"].pop("fd_digits"),
        "report.schema must be 1, found 2": lambda r: r.update(schema=2),
        "report.search must be a mapping": lambda r: r.update(search=None),
    }
    for message, change in faults.items():
        with pytest.raises(ValueError, match=message):
            validate_report(broken(change))


def test_a_value_without_a_json_form_is_refused() -> None:
    with pytest.raises(ValueError, match="found <object"):
        plain({"a": object()})


# points


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=40), st.sampled_from(["fd_digits", "psnr_db"])
)
def test_front_is_exactly_the_undominated_values(pairs: list[tuple[int, int]], metric: str) -> None:
    sign = -1 if metric == "psnr_db" else 1
    points = [Point(i, cost, float(value), str(i), "", 1) for i, (cost, value) in enumerate(pairs)]
    undominated = {
        (c, v) for c, v in pairs
        if not any(c2 <= c and sign * v2 <= sign * v and (c2, v2) != (c, v) for c2, v2 in pairs)
    }  # fmt: skip
    front = pareto_front(points, metric)
    assert {(p.bitops, p.value) for p in front} == undominated
    assert [p.bitops for p in front] == sorted({p.bitops for p in front})


def test_view_takes_only_what_was_scored_on_the_search_seeds() -> None:
    trials = [
        trial(0, 9.0, 10, phase="baseline", name="w6a6"), trial(1, 8.0, 12), trial(2, None, 9), trial(3, 7.0, 99),
        trial(4, 6.5, 11), trial(5, 1.0, 1, phase="final", fingerprint="final-f"), trial(6, 0.1, 5, error="nan images"),
    ]  # fmt: skip
    view = search_view(trials, metric="fd_digits", budget_bitops=12)
    assert [p.index for p in view.searched] == [1, 3, 4]
    assert view.num_failed == 2
    assert view.best is not None
    assert view.best.index == 4
    assert view.progress == (8.0, 8.0, 6.5)
    assert [p.name for p in view.baselines] == ["w6a6"]
    assert math.isnan(search_view(trials[3:4], metric="fd_digits", budget_bitops=12).progress[0])


def test_mixed_fingerprints_are_refused_everywhere(tmp_path: Path) -> None:
    mixed = [*make_trials(), trial(99, 1.0, 1e9, fingerprint="other")]
    with pytest.raises(ValueError, match="share one evaluation fingerprint, found 2: other, search-f"):
        pareto_png(tmp_path / "pareto.png", mixed, metric="fd_digits")
    with pytest.raises(ValueError, match="share one evaluation fingerprint"):
        render(tmp_path, make_report(), trials=mixed)
    foreign = make_report() | {"fingerprint": {"search": "foreign", "final": "final-f"}, "front": []}
    with pytest.raises(ValueError, match="search fingerprint 'foreign', found 'search-f'"):
        render(tmp_path, foreign)
    assert not list(tmp_path.iterdir())


@given(st.floats(0.01, 1e6), st.floats(1.001, 1e4), st.booleans())
def test_axis_keeps_values_inside_and_in_order(low: float, ratio: float, is_log: bool) -> None:
    axis = Axis.around([low, low * ratio], 0.0, 100.0, is_log=is_log)
    assert 0 < axis.at(low) <= axis.at(low * math.sqrt(ratio)) <= axis.at(low * ratio) < 100
    assert all(0 <= tick["at"] <= 100 for tick in axis.ticks())


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.5, 20))
def test_spread_labels_keep_their_distance_and_order(positions: list[float], distance: float) -> None:
    moved = spread(positions, distance)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    assert all(moved[b] - moved[a] >= distance - 1e-9 for a, b in itertools.pairwise(order))
    assert sum(moved) == pytest.approx(sum(positions), abs=1e-6)


def test_only_baselines_far_above_the_search_become_lines() -> None:
    view = search_view(make_trials(), metric="fd_digits", budget_bitops=BUDGET)
    assert [p.label for p in view.baselines if view.is_costly(p)] == ["float 50", "float 10", "W8A8"]


# pictures


def test_pareto_png_is_drawn_also_without_a_feasible_candidate(tmp_path: Path) -> None:
    over = [trial(1, 3.0, 9e10), trial(2, 300.0, 8e10)]
    for name, trials in {"full": make_trials(), "none": [], "over": over}.items():
        path = tmp_path / f"{name}.png"
        pareto_png(path, trials, metric="fd_digits", budget_bitops=BUDGET, budget_name="w6a6")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000


def test_samples_png_enlarges_without_smoothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (2, 3, 8, 8)).astype(np.float64) / 255
    samples_png(tmp_path / "samples.png", [("Float", values), ("Best", 1 - values)])
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    expected = np.rint(values[0] * 255).astype(np.uint8).transpose(1, 2, 0).repeat(9, 0).repeat(9, 1)
    left = next(x for x in range(pixels.shape[1]) if np.array_equal(pixels[18:90, x : x + 72], expected))
    assert left > 40


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one pair"),
        ([("a", np.zeros((2, 4, 8, 8)))], r"C 1 or 3, found \(2, 4, 8, 8\)"),
        ([("a", np.full((1, 1, 2, 2), -1.0))], r"must lie in \[0, 1\], found -1 to -1"),
        ([("a", np.zeros((2, 1, 4, 4))), ("b", np.zeros((3, 1, 4, 4)))], "all rows must have as many images"),
    ],
)
def test_wrong_images_are_named(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        samples_png(tmp_path / "samples.png", rows)


# report.html


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    text, page = render(tmp_path, make_report())
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.tags.count("img") == 50
    assert page.tags.count("svg") == 2
    assert page.tags.count("circle") == 2 * 72
    assert text.count('class="cell" title=') == 2 * len(LAYERS)
    assert text.count('title="t = ') == 20


def with_pictures(report: dict[str, Any]) -> dict[str, Any]:
    """A report of searched tiles: maps, stages and learning of each tile."""
    for tile in report["winograd"]:
        n, count = tile["m"] + 2, len(tile["eligible_layers"])
        middle = [10.0 if 0 < i < n - 1 else 1.0 for i in range(n)]
        tile |= {
            "range_map": {"standard": [[a * b for b in middle] for a in middle], "kept": [[1.0] * n] * n},
            "stage_sqnr_db": {"input": [41.0] * count, "v": [None, *[40.5] * (count - 1)], "all": [33.25] * count},
            "kept": "learned", "curve_db": [20.0, 24.5, 24.0],
        }  # fmt: skip
    return report | {"winograd_choice": "searched: 10 direct, 16 f4"}


def test_page_draws_maps_stages_and_learning_of_every_tile(tmp_path: Path) -> None:
    records = [record | {"multiplications": record["bitops"] // 36} for record in make_trials()]
    plain_text, _ = render(tmp_path, make_report(), trials=records)
    text, page = render(tmp_path, with_pictures(make_report()), trials=records)
    taps = sum((m + 2) ** 2 for m in (2, 4, 6))
    assert text.count("<title>tap (") == 2 * taps
    assert text.count("max / min 100.0") == text.count("max / min 1.0") == 3
    assert page.tags.count("polyline") == 3
    added = text.count('class="cell" title=') - plain_text.count('class="cell" title=')
    assert added == 3 * 3 * len(make_report()["winograd"][0]["eligible_layers"])
    assert "V exact" in text
    assert "33.2 dB, all stages" in text
    assert page.tags.count("svg") == 2 + 1 + 6 + 3
    assert "G multiplications" in text
    assert "G multiplications" not in plain_text


def test_page_says_what_was_found_and_how_honest_it_is(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_report())
    for words in (
        "reaches fd_digits 17.62", "reaches 20.40", "13.6 % lower", "better", "simulated", "which the search never saw",
        "measured on unit Gaussian input", "not a 3x3 convolution", "apply_recipe", "search-f", "final-f",
        "within the noise",
        "Short last groups", "the evaluation budget is spent", "mid_block.attentions.0.products",
    ):  # fmt: skip
        assert words in page.text, words


def test_page_shows_intervals_noise_and_the_random_search(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_report())
    for said in (
        "17.25 to 18.00",  # the best found over images of the final seed
        "There the best found scored 17.00 (95 % over images: 16.50 to 17.75)",
        "on other seeds it scores 18.25, 18.75 (mean 18.50, 95 % 15.30 to 21.70)",
        "3 random candidates under the same budget, scored alike: best 19.12; the search's best: 17.00",
        "psnr_db and search score, same images 0.62 0.0004 72",
        "Seeds: search 1, selection 2, final 3",
    ):
        assert said in page.text, said
    assert "Calibrated again" not in page.text
    report = make_report()
    report["best"]["recalibration"] = {
        "shipped": "recalibrated", "selection": {"supernet": 18.5, "recalibrated": 18.25},
        "metrics_recalibrated": {"fd_digits": 17.625},
    }  # fmt: skip
    said = "measures 17.62 on the final seeds, inside the supernet 17.90. Shipped: recalibrated"
    assert said in render(tmp_path, report)[1].text
    report = make_report()
    report["evidence"]["score_noise"] |= {"scores": [17.0], "over_seeds": {"mean": None, "interval": None}}
    report["evidence"]["progress"]["random"] = []
    assert "Against chance" not in render(tmp_path, report)[1].text


def test_page_admits_a_worse_result_and_an_undefined_one(tmp_path: Path) -> None:
    report = make_report()
    report["best"]["metrics"]["fd_digits"] = 25.5
    assert "25.0 % higher, which is worse" in re.sub(r"\s+", " ", render(tmp_path, report)[1].text)
    report["best"]["metrics"]["fd_digits"] = math.nan
    assert "fd_digits is not defined" in render(tmp_path, report)[1].text


def test_page_escapes_text_and_embeds_pictures(tmp_path: Path) -> None:
    picture = tmp_path / "ranges.png"
    Image.new("RGB", (3, 3)).save(picture)
    report = make_report() | {"warnings": ["<script>alert(1)</script>"]}
    text, page = render(tmp_path, report, trials=[], samples=(), pictures={"ranges": picture})
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert page.tags.count("img") == 1
    assert "svg" not in page.tags


def test_page_shows_an_allocation_per_step(tmp_path: Path) -> None:
    text, page = render(tmp_path, make_report(num_allocations=10), trials=[])
    assert text.count('class="cell" title=') == 10 * 2 * len(LAYERS)
    assert "A t=" in page.text


# terminal


def test_summary_table_has_the_five_rows_and_fits_eighty_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(summary_table(make_report()))
    lines = capture.get().splitlines()
    text = "\n".join(lines)
    for words in ("Float, 50 steps", "Float, 10 steps", "W8A8", "W6A6", "Best found", "17.62", "28.4x", "fd_digits"):
        assert words in text, words
    assert "…" not in text
    assert all(len(line) <= 80 for line in lines)


def test_candidates_on_the_ceiling_do_not_look_far_apart() -> None:
    records = [trial(index, 5.0, bitops) for index, bitops in enumerate((9_990_000, 10_000_000))]
    low, high = search_view(records, metric="fd_digits", budget_bitops=10_000_000).cost_range()
    assert (low, high) == (pytest.approx(0.009), pytest.approx(0.01))
