"""report.json holds what it promises, and the terminal table says the same."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.report.example import make_report
from tmpq_exp.report import ENTRY_KEYS, REPORT_KEYS, summary_table, validate_report, write_report_json
from tmpq_exp.report.content import plain


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
