"""A calibration that ranks share, here in one process: it finds what one finds, also where widths share a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.quant.conftest import FAST, Case
from tmpq_exp.config import CalibrationConfig
from tmpq_exp.learner import Learner
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.calibration import Reconstruction
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.ranks import Ranks
from tmpq_exp.sharing import Team
from tmpq_exp.worker import Blueprint

CPU = torch.device("cpu")
CONFIG = CalibrationConfig(
    weight_iterations=2, act_iterations=2, batch_size=2, weight_learning_rate=0.3, act_learning_rate=0.01
)


class RanksHere:
    """Stands in for ``Ranks``: the others' learners are called one after the other, behind rank 0."""

    def __init__(self, count: int) -> None:
        self.count, self.learners = count, list[Learner]()
        self.learned: list[list[int]] = []

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], own: Callable[[], Any]) -> list[Any]:
        sent = [copy.deepcopy(each) for each in arguments]
        if method == "learn":
            self.learned.append([len(names) for _, names, _ in sent])
        answers = [own()]
        if method == "learner":
            self.learners = [Learner(*each) for each in sent]
        else:
            answers += [getattr(rank, method)(*each) for rank, each in zip(self.learners, sent, strict=True)]
        return [*answers, *[None] * (self.count - len(answers))]


class Holder(nn.Module):
    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self.supernet = supernet


def fresh(case: Case) -> Supernet:
    """6 and 4 bits, the softmax at 8 alone; nothing is estimated."""
    softmax = [(8,) if shape.name.endswith("products") else (6, 4) for shape in case.layers]
    return Supernet(case.network, case.layers, softmax, [(6, 4)] * len(case.layers), FAST)


def learn(case: Case, make: Reconstruction, folder: Path) -> tuple[dict[str, Tensor], list[list[UnitRecord]]]:
    """State of all quantizers and the records of every unit."""
    supernet = fresh(case)
    case.observe(supernet)
    inputs = case.inputs(2)
    conditioning = {key: value for key, value in inputs.items() if key not in ("sample", "timestep")}
    states = [CalibrationState(inputs["sample"] + t / 100, t, conditioning) for t in (5, 1)]
    with ActivationStore(2**30, folder / "activations", CPU) as store:
        reconstruction = make(supernet, states, CONFIG, 0, store)
        records = []
        for index in range(len(reconstruction.units)):
            reconstruction.begin(index)
            records.append(reconstruction.learn_passes(index))
            reconstruction.finish(index)
    return supernet.quantizer_state(), records


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_learn_what_one_learns(
    cross_attention: Case, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lay_out(blueprint: Blueprint, needed: str) -> SimpleNamespace:
        config, run = SimpleNamespace(calibration=CONFIG, seed=0), SimpleNamespace(calibration=tmp_path)
        return SimpleNamespace(config=config, run=run, device=CPU, module=Holder(fresh(cross_attention)))

    monkeypatch.setattr("tmpq_exp.learner.lay_out", lay_out)
    ranks = RanksHere(count)
    team = Team(cast(Ranks, ranks), Blueprint({}, "", 1))
    state, records = learn(cross_attention, team.reconstruction, tmp_path)
    expected, expected_records = learn(cross_attention, BlockwiseReconstruction, tmp_path)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert records == expected_records
    assert len(ranks.learners) == 1  # there are two widths
    assert len(ranks.learned) > len(records)  # units with a softmax take two rounds
    assert sum(map(sum, ranks.learned)) == len(records)
    assert not list(tmp_path.glob("activations*"))
