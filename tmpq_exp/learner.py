"""What learns some bit widths of a calibration for another process: a supernet of its own, unit by unit as told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.worker import Blueprint, lay_out

Learned = tuple[dict[int | str, list[UnitRecord]], dict[str, Tensor]]
"""Records of every pass over a unit, and the state of the unit's quantizers behind them."""


def state_on_cpu(supernet: Supernet, reconstruction: BlockwiseReconstruction, index: int) -> dict[str, Tensor]:
    """A copy of the state of a unit's quantizers, to be sent."""
    state = supernet.quantizer_state(reconstruction.units[index].layers)
    return {key: value.cpu().clone() for key, value in state.items()}


def learn_some(reconstruction: BlockwiseReconstruction, index: int, names: Sequence[int | str]) -> Learned:
    """Make these passes over a unit, one after the other."""
    records = {name: reconstruction.learn(index, name) for name in names}
    return records, state_on_cpu(reconstruction.supernet, reconstruction, index)


class Learner:
    """Makes some passes of a calibration; of the run directory it uses a folder for spilled activations alone.

    Args:
        blueprint: What its supernet is built from.
        states: Inputs of the network.
        ranges: State of all quantizers, whose ranges are estimated.
        share: Which of the passes it makes.
        folder: Name of its folder.

    Raises:
        UserError: If the run directory is not there.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        states: Sequence[CalibrationState],
        ranges: Mapping[str, Tensor],
        share: slice,
        folder: str,
    ) -> None:
        experiment = lay_out(blueprint, "config")
        config, device = experiment.config, experiment.device
        self._supernet = experiment.module.to(device).supernet
        self._supernet.load_quantizer_state(ranges, "the ranges of rank 0")
        self._open = ExitStack()
        place = experiment.run.calibration / folder
        store = self._open.enter_context(ActivationStore(config.calibration.max_cache_bytes, place, device))
        self._reconstruction = BlockwiseReconstruction(
            self._supernet, states, config.calibration, config.seed, store, share
        )

    def begin(self, index: int) -> None:
        """See ``BlockwiseReconstruction.begin``."""
        self._reconstruction.begin(index)

    def learn(self, index: int, names: Sequence[int | str], state: Mapping[str, Tensor]) -> Learned:
        """Make these passes over a unit whose quantizers have this state."""
        self._load(index, state)
        return learn_some(self._reconstruction, index, names)

    def finish(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Carry the activations through a unit whose quantizers have this state; behind the last nothing is kept."""
        self._load(index, state)
        self._reconstruction.finish(index)
        if index + 1 == len(self._reconstruction.units):
            self._open.close()

    def _load(self, index: int, state: Mapping[str, Tensor]) -> None:
        layers = self._reconstruction.units[index].layers
        self._supernet.load_quantizer_state(state, "the calibration of rank 0", layers)
