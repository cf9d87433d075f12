"""A made-up finished run: its report, trials and samples, and a reader of the pages made from them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.report import report_html

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
                   "seconds": 131.4, "num_images": 128, "seed": 1, "statistics": {}},
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
