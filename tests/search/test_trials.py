"""trials.jsonl: what was appended is read back, damage is said, a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmpq_exp.config import UserError
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.search.trials import Trial, TrialLog, finite_metrics


def candidate(number: int) -> Candidate:
    return Candidate((number + 1, 0), (Allocation((8,), (6,), (0,)),))


def trial(number: int, **changes: Any) -> Trial:
    arguments: dict[str, Any] = {
        "index": number,
        "phase": "search",
        "name": None,
        "generation": 0,
        "key": candidate(number).key(),
        "candidate": candidate(number).to_json(),
        "bitops": 10**15,
        "macs": 10,
        "weight_bytes": 3,
        "metrics": {"fd": 0.1 + number, "psnr_db": None},
        "num_images": 4,
        "seed": 2**52 + 1,
        "fingerprint": "f",
        "state": "s",
    }
    return Trial(**(arguments | changes))


def written(path: Path, count: int) -> bytes:
    log = TrialLog(path)
    for number in range(count):
        log.append(trial(number))
    return path.read_bytes()


def test_a_log_reads_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    written(path, 3)
    log = TrialLog(path)
    assert log.trials == [trial(0), trial(1), trial(2)]
    assert log.warnings == []
    assert log.num_lines == 3
    assert log.find(candidate(1), "f", "s") == trial(1)
    assert log.find(candidate(1), "another protocol", "s") is None
    assert log.find(candidate(1), "f", "other quantizers") is None
    assert log.of_phase("search", "final") == log.trials
    assert log.of_phase("final") == []


def test_trials_of_other_runs_are_found_apart(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    written(tmp_path / "before" / "trials.jsonl", 3)
    with (tmp_path / "before" / "trials.jsonl").open("ab") as file:
        file.write(b"cut")
    log = TrialLog(tmp_path / "trials.jsonl", [tmp_path / "before"])
    assert log.trials == []
    assert log.warnings == []
    assert (tmp_path / "before" / "trials.jsonl").read_bytes().endswith(b"cut")  # the other run's file stays as it is
    assert log.find(candidate(1), "f", "s") is None
    assert log.find_elsewhere(candidate(1), "f", "s") == trial(1, source=str(tmp_path / "before"))
    assert log.find_elsewhere(candidate(1), "g", "s") is None
    assert log.find_elsewhere(candidate(5), "f", "s") is None
    TrialLog(tmp_path / "before" / "trials.jsonl").append(trial(5))  # the other run goes on
    assert log.find_elsewhere(candidate(5), "f", "s") == trial(5, source=str(tmp_path / "before"))
    with pytest.raises(UserError, match=r"nowhere/trials\.jsonl cannot be read"):
        TrialLog(tmp_path / "trials.jsonl", [tmp_path / "nowhere"])


@settings(max_examples=40, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_metric_survives_the_file(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("log") / "trials.jsonl"
    TrialLog(path).append(trial(0, metrics=finite_metrics({"fd": value})))
    (back,) = TrialLog(path).trials
    assert back.score("fd") == (value if math.isfinite(value) else math.inf)
    assert back.score("unknown") == math.inf


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("log") / "trials.jsonl"
    whole = written(path, 3)
    length = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:length])
    log = TrialLog(path)
    kept = whole[:length].count(b"\n")
    assert log.trials == [trial(number) for number in range(kept)]
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
    cut = length - path.stat().st_size
    assert log.warnings == ([f"trials.jsonl: its last line was cut after {cut} bytes and is left out"] if cut else [])
    for number in range(kept, 3):
        log.append(trial(number))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 40, b"[1]", b"\xff\xfe", b'{"index": 1}', b'{"index": 1, "index": \r 2', b"nonsense", b"null"],
)
def test_a_damaged_line_is_skipped_and_said(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    lines = written(path, 3).split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    log = TrialLog(path)
    assert [t.index for t in log.trials] == [0, 2]
    (warning,) = log.warnings
    assert warning.startswith("trials.jsonl: line 2 is damaged and is left out")
    assert log.num_lines == 3  # the next trial is line 4 of the file, whatever line 2 holds


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 16},
        {"candidate": candidate(7).to_json()},
        {"candidate": {"timesteps": [1, 2], "allocations": []}},
        {"metrics": "good"},
        {"metrics": {"fd": "1.0"}},
        {"unknown": 1},
    ],
)
def test_a_record_that_contradicts_itself_is_skipped(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    record = json.loads(written(path, 1)) | change
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    log = TrialLog(path)
    assert log.trials == []
    assert "line 1 is damaged" in log.warnings[0]


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Make room"), (errno.EROFS, "Make it writable"), (errno.EIO, "See to the disk")],
)
def test_a_disk_that_takes_no_more_keeps_earlier_trials(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trials.jsonl"
    whole = written(path, 2)
    log = TrialLog(path)

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)  # the bytes are in the file, yet not on disk
        said = rf"trial 2 could not be written \({os.strerror(number)}\); the 2 trials before it are safe\. {advice}"
        with pytest.raises(UserError, match=said):
            log.append(trial(2))
    assert path.read_bytes() == whole
    assert log.find(candidate(2), "f", "s") is None
    log.append(trial(2))  # it was seen to
    assert TrialLog(path).trials == [trial(0), trial(1), trial(2)]


FILL = """
import resource, sys
from pathlib import Path
from tmpq_exp.config import UserError
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.search.trials import Trial, TrialLog
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
log = TrialLog(path)
try:
    for i in range(len(log.trials), 1000):
        candidate = Candidate((i + 1, 0), (Allocation((8,) * 50, (6,) * 50, (0,) * 50),))
        log.append(
            Trial(i, "search", None, 0, candidate.key(), candidate.to_json(), 1, 1, 1, {"fd": 1.0}, 4, 0, "f", "s")
        )
except UserError as error:
    print(error)
    sys.exit(2)
"""


def fill(path: Path, limit: int) -> str:
    command = [sys.executable, "-c", FILL, str(path), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    return done.stdout


def test_a_file_size_limit_cuts_no_trial(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    message = fill(path, 20_000)
    log = TrialLog(path)
    assert log.warnings == []
    assert 0 < path.stat().st_size <= 20_000
    assert f"trial {len(log.trials)} could not be written (File too large)" in message
    assert "Make room and start again with the same hydra.run.dir" in message


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"a file system of 64 KB cannot be mounted here ({error})")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], capture_output=True, check=True, timeout=20)


def test_a_real_full_disk_cuts_no_trial(tiny_disk: Path) -> None:
    path = tiny_disk / "trials.jsonl"
    message = fill(path, 0)
    log = TrialLog(path)
    assert log.warnings == []
    assert len(log.trials) > 10
    assert "No space left on device" in message
