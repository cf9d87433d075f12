"""An evaluation that memory does not suffice for: smaller micro-batches, the same trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.search.conftest import REFERENCE, Setup, candidate
from tmpq_exp.config import UserError
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.memory import is_out_of_memory
from tmpq_exp.search.protocol import Protocol
from tmpq_exp.search.trials import TrialLog


def test_out_of_memory_halves_the_micro_batch_of_that_candidate_alone(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = Protocol(num_images=6, seed=3, micro_batch=5)
    undisturbed = setup.objective(protocol=protocol, trials=TrialLog(setup.trials.path.with_name("other.jsonl")))
    expected = [undisturbed.evaluate(candidate(bits), "search", generation=0) for bits in (8, 6)]
    setup.supernet.large, setup.supernet.room = (candidate(8),), 2
    setup.supernet.calls.clear()
    objective = setup.objective(protocol=protocol)
    fed: list[int] = []

    def feed(wanted: Candidate, take: Callable[[Tensor], None]) -> None:
        fed.append(1)
        for indices in protocol.micro_batches():
            take(setup.supernet.images(wanted, indices, protocol.seed))

    found = [objective.evaluate(candidate(bits), "search", generation=0, feed=feed) for bits in (8, 6)]
    assert [trial.micro_batch for trial in found] == [2, None], "5 does not fit, 2 does; the next starts at 5 again"
    assert found == [replace(expected[0], micro_batch=2), expected[1]]
    assert len(fed) == 2, "what feeds has the full micro-batch, and is left out behind the first attempt"
    made = [batch for key, batch, _ in setup.supernet.calls if key == candidate(8).key()]
    assert made == [(0, 1, 2, 3, 4), (0, 1), (2, 3), (4, 5)]
    assert "out of memory at 5 images a forward" in capsys.readouterr().err
    assert TrialLog(setup.trials.path).trials == found


def test_memory_for_not_even_one_image_ends_the_search_and_records_nothing(setup: Setup) -> None:
    objective = setup.objective()
    objective.evaluate(candidate(6), "search")
    setup.supernet.large, setup.supernet.room = (candidate(8),), 0
    with pytest.raises(UserError, match=r"out of memory even at one image a forward; all evaluations before it are"):
        objective.evaluate(candidate(8), "search")
    assert [trial.key for trial in TrialLog(setup.trials.path).trials] == [candidate(6).key()]


def test_memory_that_the_reference_needs_is_halved_too(setup: Setup) -> None:
    setup.supernet.large = (REFERENCE,)
    trial = setup.objective().evaluate(candidate(8), "search")
    assert trial.micro_batch == 1
    assert trial.metrics["psnr_db"] == pytest.approx(-20 * torch.log10(torch.tensor(24 / 64)).item(), abs=1e-4)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried ..."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_this_machines_own_words_are_known() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
