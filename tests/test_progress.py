"""Progress: a bar with ETA in a terminal, lines with ETA elsewhere, silence in other ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tmpq_exp import progress
from tmpq_exp.progress import StageBar, StageProgress


def test_without_a_terminal_a_stage_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with StageBar("calibrate", 3) as bar:
        for _ in range(3):
            bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"calibrate +3/3  in 0:00:00\n", captured.err)


def test_without_a_terminal_long_stages_say_when_they_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StageBar("search", 100) as bar:
        for _ in range(20):
            now += 4
            bar.advance(note="best fd 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "search           3/100  eta 0:06:28  best fd 1.5"
    assert lines[1] == "search           6/100  eta 0:06:16  best fd 1.5"
    assert len(lines) == 7  # one every ten seconds at most, and the last
    assert lines[-1] == "search           20/100  in 0:01:20  best fd 1.5"


def test_a_stage_that_did_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), StageBar("search", 3):
        raise RuntimeError
    assert capsys.readouterr().err == ""


class Module(L.LightningModule):
    progress_note = "a note"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> None:
        return None

    def train_dataloader(self) -> range:
        return range(3)

    def training_step(self, batch: int, batch_idx: int) -> None:
        return None

    def predict_step(self, batch: int, batch_idx: int) -> int:
        return batch


def trainer(callback: StageProgress, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **arguments,
    )


def test_one_bar_counts_all_epochs_of_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(StageProgress("calibrate", 6), max_epochs=2).fit(Module())
    assert re.fullmatch(r"calibrate +6/6  in 0:00:0\d  a note\n", capsys.readouterr().err)


def test_prediction_is_counted_too(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(StageProgress("evaluate w8a8", 4)).predict(Module(), range(4))
    assert re.fullmatch(r"evaluate w8a8 +4/4  in 0:00:0\d  a note\n", capsys.readouterr().err)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    callback = StageProgress("calibrate", 3)
    callback.disable()
    trainer(callback, max_epochs=1).fit(Module())
    assert capsys.readouterr().err == ""


IN_TERMINAL = """
import time
from tmpq_exp.progress import StageBar
with StageBar("search", 4) as bar:
    for i in range(4):
        time.sleep(0.3)
        bar.advance(note=f"best fd {9 - i}")
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_terminal_shows_a_bar_with_eta_and_note(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "120",
        "PYTHONPATH": str(Path(progress.__file__).parents[1]),
    }
    command = [sys.executable, "-c", IN_TERMINAL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, cwd=tmp_path)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == b""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "search" in text
    assert "4/4" in text
    assert re.search(r"eta\s+0:00:0\d", text)
    assert "best fd 6" in text
