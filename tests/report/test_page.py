"""The page holds everything, escapes what it must, and stays inside one file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from PIL import Image

from tests.report.example import LAYERS, make_report, make_trials, render


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    text, page = render(tmp_path, make_report())
    assert all(address.startswith("data:") for address in page.addresses)
    assert page.tags.count("script") == 2  # data and what draws them, both inside
    assert "<script src" not in text
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
        "measured on unit Gaussian input", "not a 3x3 convolution", "tmpq_exp.load(", "apply_recipe",
        "search-f", "final-f",
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
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert page.tags.count("img") == 1
    assert "svg" not in page.tags


def test_page_shows_an_allocation_per_step(tmp_path: Path) -> None:
    text, page = render(tmp_path, make_report(num_allocations=10), trials=[])
    assert text.count('class="cell" title=') == 10 * 2 * len(LAYERS)
    assert "A t=" in page.text


def embedded(text: str) -> dict[str, Any]:
    """Data of the candidates that the page's script draws."""
    found = re.search(r'<script type="application/json" id="candidates">(.*?)</script>', text)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_page_knows_bits_and_timesteps_of_every_drawn_candidate(tmp_path: Path) -> None:
    trials = make_trials()
    data = embedded(render(tmp_path, make_report(), trials=trials)[0])
    searched = [record for record in trials if record["phase"] == "search"]
    assert set(data["candidates"]) == {str(record["index"]) for record in trials}
    for record in searched:
        shown, (allocation,) = data["candidates"][str(record["index"])], record["candidate"]["allocations"]
        assert shown["timesteps"] == record["candidate"]["timesteps"]
        assert [int(digit, 36) for digit in shown["w"][0]] == allocation["weight_bits"]
        assert [int(digit, 36) for digit in shown["a"][0]] == allocation["act_bits"]
        assert f"fd_digits {record['metrics']['fd_digits']:.4g}" in shown["figures"]
    assert sorted(index for _, indices in data["blocks"] for index in indices) == list(range(len(LAYERS)))
    assert data["candidates"][str(data["best"])]["timesteps"] == make_report()["best"]["timesteps"]
    assert data["last"] == 999


def test_page_data_cannot_end_their_script(tmp_path: Path) -> None:
    report = make_report()
    report["best"]["layers"] = ["</script><b>", *LAYERS[1:]]
    text, _ = render(tmp_path, report)
    assert "</script><b>" not in text
    assert embedded(text)["layers"][0] == "</script><b>"
