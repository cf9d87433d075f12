"""Static ranges of Winograd layers that an earlier run measured are taken over, where they are those of this run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.running import TINY, run_here
from tmpq_exp import pipeline, ranging
from tmpq_exp.config import UserError
from tmpq_exp.experiment import Experiment
from tmpq_exp.quant.static_ranges import RangesByLayer, measuring_ranges_for_all_bits
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.zoo.weights import read_tensors

STATIC = (*TINY, "winograd=f4", "winograd.act_scales=static", "winograd.learning.num_steps=0", "logger=none")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that ranges are measured."""
    times: list[int] = []

    @contextmanager
    def counted(supernet: Supernet) -> Iterator[RangesByLayer]:
        times.append(len(times))
        with measuring_ranges_for_all_bits(supernet) as found:
            yield found

    monkeypatch.setattr(ranging, "measuring_ranges_for_all_bits", counted)
    return times


class Stopped(Exception):
    """Raised where the search would begin."""


def ranges_of(directory: Path, *overrides: str) -> Path:
    """The file of a run that was stopped when it had its ranges."""

    def stop(experiment: Experiment) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "search", stop)
        with pytest.raises(Stopped):
            run_here(directory, *STATIC, f"paths.cache_dir={directory.parent / 'cache'}", *overrides)
    return directory / "winograd_ranges.safetensors"


def test_ranges_of_an_earlier_run_are_taken_over(measured: list[int], tmp_path: Path) -> None:
    first = ranges_of(tmp_path / "first")
    (tmp_path / "first" / "trials.jsonl").touch()
    reuse = f"reuse=[{tmp_path / 'first'}]"
    assert measured == [0]
    second = ranges_of(tmp_path / "second", "budget=w8a8", reuse)
    assert measured == [0]
    (ranges, metadata), (again, same) = (read_tensors(file, "ranges") for file in (first, second))
    assert (ranges.keys(), metadata) == (again.keys(), same)
    assert all(value.equal(again[key]) for key, value in ranges.items())
    other = ranges_of(tmp_path / "other", "winograd.points=improved", reuse)
    assert measured == [0, 1]  # other points have other ranges
    found = read_tensors(other, "ranges")[0]
    assert found.keys() == ranges.keys()
    assert any(not value.equal(ranges[key]) for key, value in found.items())

    first.write_bytes(b"no ranges")
    with pytest.raises(UserError, match=r"static ranges of Winograd layers: .*first/winograd_ranges.* is truncated"):
        ranges_of(tmp_path / "third", reuse)
