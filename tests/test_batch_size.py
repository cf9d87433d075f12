"""How many images a forward takes where the machine decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.running import TINY, run_here
from tmpq_exp import batch_size
from tmpq_exp.batch_size import fitting_micro_batch, free_memory
from tmpq_exp.config import UserError
from tmpq_exp.cost import AttentionShape, ConvShape, LinearShape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LAYERS = (
    ConvShape("conv", 8, 16, (3, 3), (2, 2), (1, 1), (1, 1), 1, 4, 4),  # reads 8 x 8 x 8
    LinearShape("linear", 32, 8, 16),  # 32 x 16
    AttentionShape("attention", 2, 16, 16, 16),  # 3 x 16 x 32, and 2 x 16 x 16 scores
)
VALUES = 512 + 512 + 1536 + 512


@pytest.mark.parametrize(
    ("images", "calls", "expected"), [(4, 1, 4), (7.9, 1, 4), (8, 1, 8), (8, 2, 4), (0.1, 1, 1), (10**6, 1, 64)]
)
def test_half_of_the_free_memory_is_filled(
    images: float, calls: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda device: int(2 * images * 4 * VALUES))
    assert fitting_micro_batch(LAYERS, calls, CPU) == expected


def test_a_gpu_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 10**12)
    assert fitting_micro_batch(LAYERS, 1, CUDA) == 1024


def test_the_host_has_free_memory() -> None:
    assert 10**7 < free_memory(CPU) < 10**14


def test_a_run_keeps_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, automatic = tmp_path / "run", (*TINY, "evaluation.micro_batch=null")
    monkeypatch.setattr("tmpq_exp.experiment.fitting_micro_batch", lambda layers, calls, device: 8)
    run_here(directory, *automatic, "search.num_generations=1")
    trials = (directory / "trials.jsonl").read_bytes()
    assert json.loads((directory / "recipe.json").read_text())["micro_batch"] == 8
    monkeypatch.setattr("tmpq_exp.experiment.fitting_micro_batch", lambda layers, calls, device: 2)
    (directory / "report.json").unlink()
    run_here(directory, *automatic, "search.num_generations=1")
    assert (directory / "trials.jsonl").read_bytes() == trials
    run_here(tmp_path / "told", *TINY, "search.num_generations=1")
    assert (tmp_path / "told" / "trials.jsonl").read_bytes() == trials


def test_no_more_are_chosen_than_a_candidate_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpq_exp.experiment.fitting_micro_batch", lambda layers, calls, device: 1024)
    run_here(tmp_path, *TINY, "evaluation.micro_batch=null", "search.num_generations=1")
    parts = json.loads((tmp_path / "report.json").read_text())["fingerprint_parts"]
    assert [part["micro_batch"] for part in parts.values()] == [16, 16]
    assert json.loads((tmp_path / "recipe.json").read_text())["micro_batch"] == 16


def test_lower_precision_is_for_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision must be 32-true .* found bf16-mixed; .*task=train"):
        run_here(tmp_path / "run", *TINY, "+trainer.precision=bf16-mixed")


def test_a_number_has_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.micro_batch must be at least 1, found 0"):
        run_here(tmp_path / "run", *TINY, "evaluation.micro_batch=0")
