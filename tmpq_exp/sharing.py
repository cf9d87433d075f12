"""Shares a calibration's passes out among the ranks of a run, unit by unit.

Every rank carries the activations of its own passes. Rank 0 takes together what was learned of a unit, keeps it on disk
and gives it to all before they go on, so that any number of ranks finds what one process finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.learner import Learned, learn_some, state_on_cpu
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.passes import merged
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.ranks import Ranks
from tmpq_exp.worker import Blueprint


@dataclass(frozen=True)
class Team:
    """Who learns together.

    Args:
        ranks: The processes of the run.
        blueprint: What the others build their supernets from.
    """

    ranks: Ranks
    blueprint: Blueprint

    def reconstruction(
        self,
        supernet: Supernet,
        states: Sequence[CalibrationState],
        config: CalibrationConfig,
        seed: int,
        store: ActivationStore,
    ) -> BlockwiseReconstruction:
        """See ``calibration.Reconstruction``."""
        return SharedReconstruction(self, supernet, states, config, seed, store)


class SharedReconstruction(BlockwiseReconstruction):
    """A reconstruction whose passes are made by the ranks of a run, of which this is the first.

    Args:
        team: They.
        supernet, states, config, seed, store: See ``BlockwiseReconstruction``; the configuration is the run's.
    """

    def __init__(
        self,
        team: Team,
        supernet: Supernet,
        states: Sequence[CalibrationState],
        config: CalibrationConfig,
        seed: int,
        store: ActivationStore,
    ) -> None:
        self._ranks, count = team.ranks, team.ranks.count
        super().__init__(supernet, states, config, seed, store, slice(0, None, count))
        self._shares = [self.passes[rank::count] for rank in range(min(count, len(self.passes)))]
        ranges = {key: value.cpu() for key, value in supernet.quantizer_state().items()}
        self._ranks.call(
            "learner",
            [
                (team.blueprint, list(states), ranges, slice(rank, None, count), f"activations_{rank}")
                for rank in range(1, len(self._shares))
            ],
            lambda: None,
        )

    def begin(self, index: int) -> None:
        """See ``BlockwiseReconstruction.begin``."""
        self._call("begin", [(index,)] * len(self._shares[1:]), partial(super().begin, index))

    def learn_passes(self, index: int) -> list[UnitRecord]:
        """See ``BlockwiseReconstruction.learn_passes``; every rank learns what is its own."""
        records: dict[int | str, list[UnitRecord]] = {}
        for names in self.rounds(index):
            state = state_on_cpu(self.supernet, self, index)
            own, *others = [[name for name in share if name in names] for share in self._shares]
            found: list[Learned] = self._call(
                "learn", [(index, share, state) for share in others], partial(learn_some, self, index, own)
            )
            for of_share, _ in found:
                records |= of_share
            self._take(index, found)
        return [record for name in self.passes for record in records[name]]

    def finish(self, index: int) -> None:
        """See ``BlockwiseReconstruction.finish``."""
        state = state_on_cpu(self.supernet, self, index)
        self._call("finish", [(index, state)] * len(self._shares[1:]), partial(super().finish, index))

    def _take(self, index: int, found: Sequence[Learned]) -> None:
        """Take over what other ranks have learned of a unit."""
        (_, own), *others = found
        learned = [
            (state, frozenset[tuple[str, int]]().union(*(self.touched(index, name).written for name in records)))
            for records, state in others
        ]
        layers = self.units[index].layers
        self.supernet.load_quantizer_state(merged(own, learned), "the calibration of another rank", layers)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]], own: Any) -> list[Any]:
        """Answers of the ranks that learn something."""
        return self._ranks.call(method, arguments, own)[: len(self._shares)]
