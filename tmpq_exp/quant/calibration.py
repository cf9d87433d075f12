"""Calibration as a LightningModule: quantizer parameters from states of the float sampling trajectory.

One epoch is one calibration unit. The first one is the whole network, whose ranges are estimated in one pass over the
states; with block-wise reconstruction every block is a further one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.quantizer import ActQuantizer
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.quant.units import find_units
from tmpq_exp.seeding import stream
from tmpq_exp.zoo.weights import read_tensors, write_tensors

Reconstruction = Callable[
    [Supernet, Sequence[CalibrationState], CalibrationConfig, int, ActivationStore], BlockwiseReconstruction
]
"""Makes a ``BlockwiseReconstruction`` from its arguments."""


class UnitFiles:
    """What finished epochs of a calibration left on disk, one file each; a killed calibration goes on behind them.

    Args:
        folder: Where they are.
        inputs: Hash of all that the calibration depends on; files of another one are not looked at.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder, self.inputs = folder, inputs

    def read(self, epoch: int) -> tuple[dict[str, Tensor], list[UnitRecord]] | None:
        """Quantizer state and records of an epoch; None if it was not finished, or its file is damaged, and says so."""
        if not self._path(epoch).exists():
            return None
        try:
            state, metadata = read_tensors(self._path(epoch), "finished part of a calibration")
        except ValueError as error:
            print(f"warning: {error}; what it held is found again", file=sys.stderr)
            return None
        if metadata.get("inputs") != self.inputs:
            return None
        return state, [UnitRecord(**record) for record in json.loads(metadata["records"])]

    def write(self, epoch: int, state: dict[str, Tensor], records: Sequence[UnitRecord]) -> None:
        """Keep a finished epoch, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"inputs": self.inputs, "records": json.dumps([asdict(record) for record in records])}
        write_tensors(self._path(epoch), state, metadata)

    def remove(self) -> None:
        """Remove all: the calibration is finished and kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"unit_{epoch:04d}.safetensors"


class CalibrationModule(L.LightningModule):
    """Sets all quantizers of a supernet; manual optimization.

    Args:
        supernet: Its quantizers are set epoch by epoch.
        states: Batches of the first epoch, and what later ones learn from.
        config: Method and its settings.
        seed: Of every draw.
        store: Where reconstruction keeps activations; not needed for ``ranges``.
        files: Where finished epochs are kept; None keeps none.
        reconstruction: Makes what learns block by block.

    Raises:
        ValueError: If a layer's activations held NaN or infinity; the layer and the timestep are named.
    """

    def __init__(
        self,
        supernet: Supernet,
        states: Sequence[CalibrationState],
        config: CalibrationConfig,
        seed: int,
        store: ActivationStore | None = None,
        files: UnitFiles | None = None,
        reconstruction: Reconstruction = BlockwiseReconstruction,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.supernet = supernet
        self._states, self._config, self._seed = list(states), config, seed
        self._store, self._files, self._reconstruction = store, files, reconstruction
        self._layer_names = {q: layer.name for layer in supernet.layers for q in layer.act_quantizers()}
        self._blockwise: BlockwiseReconstruction | None = None
        self._resumed = False
        self._epoch_records: list[UnitRecord] = []
        self.records: list[UnitRecord] = []
        self.progress_note = "ranges"

    @property
    def num_epochs(self) -> int:
        """One for the ranges, and one for every unit that is reconstructed."""
        if self._config.method == "ranges":
            return 1
        return 1 + len(find_units(self.supernet, partial(self._states[0].first_image().run, device=self._device_now())))

    def _device_now(self) -> torch.device:
        return next(self.supernet.network.parameters()).device

    @property
    def blockwise(self) -> BlockwiseReconstruction:
        """The reconstruction; made when the first block is reached, because it looks at estimated ranges."""
        if self._blockwise is None:
            assert self._store is not None, "reconstruction needs a store of activations"
            self._blockwise = self._reconstruction(self.supernet, self._states, self._config, self._seed, self._store)
        return self._blockwise

    def configure_optimizers(self) -> None:
        """None: a block has optimizers of its own."""

    def train_dataloader(self) -> Sequence[int]:
        """Indices of the states for the ranges, then that of a block."""
        return range(len(self._states)) if self.current_epoch == 0 else [self.current_epoch - 1]

    def on_train_epoch_start(self) -> None:
        """Begin to observe, or with a block; what was finished before a kill is taken over."""
        epoch = self.current_epoch
        finished = self._files.read(epoch) if self._files is not None else None
        self._resumed, self._epoch_records = finished is not None, []
        layers = self.supernet.layers
        if epoch > 0:
            unit = self.blockwise.units[epoch - 1]
            self.progress_note, layers = unit.name, unit.layers
            self.blockwise.begin(epoch - 1)
        elif not self._resumed:
            for quantizer in self._layer_names:
                quantizer.start_observing()
        if finished is not None:
            self.supernet.load_quantizer_state(finished[0], "a finished part of the calibration", layers)
            self._epoch_records = finished[1]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One call of the float network under observation, or all passes over a block."""
        if self._resumed:
            return
        if self.current_epoch > 0:
            self._epoch_records += self.blockwise.learn_passes(batch)
            return
        state = self._states[batch]
        generator = stream(self._seed, "calibration values", batch)
        num_values = max(1, self._config.max_values // len(self._states))

        def observe(quantizer: ActQuantizer, x: Tensor) -> None:
            if not x.isfinite().all():
                raise ValueError(
                    f"layer {self._layer_names[quantizer]}: activations held NaN or infinity at timestep "
                    f"{state.timestep} during calibration"
                )
            quantizer.observe(x, num_values, generator)

        with torch.no_grad(), self.supernet.observing(observe):
            state.run(self.supernet, self.device)

    def on_train_epoch_end(self) -> None:
        """Set the ranges, or carry the activations on; then keep what was learned on disk."""
        epoch, layers = self.current_epoch, self.supernet.layers
        if epoch == 0 and not self._resumed:
            estimate_ranges(self.supernet)
        if epoch > 0:
            self.blockwise.finish(epoch - 1)
            layers = self.blockwise.units[epoch - 1].layers
        self.records += self._epoch_records
        if self._files is not None and not self._resumed:
            self._files.write(epoch, self.supernet.quantizer_state(layers), self._epoch_records)


@torch.no_grad()
def estimate_ranges(supernet: Supernet) -> None:
    """Activation ranges from what their quantizers have observed, and weight ranges from the float weights.

    Raises:
        ValueError: If a layer saw nothing, or NaN or infinity; it is named.
    """
    for layer in supernet.layers:
        try:
            for quantizer in layer.act_quantizers():
                quantizer.finish_observing()
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from error
        weights = layer.weight_rows()
        if weights is not None:
            weights[0].estimate(weights[1])
    supernet.quantizers_changed()
