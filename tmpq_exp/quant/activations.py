"""Owns the activations that calibration carries from unit to unit: kept in memory up to a cap, beyond it on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.units import Call, Unit, replaced_forwards


class ActivationStore:
    """Makes room for activations; a context manager that removes what it wrote.

    Args:
        max_bytes: Most bytes kept where the network runs; what is beyond goes to memory-mapped files.
        folder: Folder of those files; made when the first one is, removed on entering (after a kill) and leaving.
        device: Where the network runs.
    """

    def __init__(self, max_bytes: int, folder: Path, device: torch.device) -> None:
        self.max_bytes, self.folder, self.device = max_bytes, folder, device
        self.num_bytes = self.num_spilled_bytes = self.peak_bytes = self._num_files = 0

    def __enter__(self) -> ActivationStore:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def allocate(self, like: Tensor, count: int) -> Tensor:
        """Room for ``count`` rows with the shape, type and strides of those of ``like``, whose first dimension is rows.

        Raises:
            OSError: If the disk has no room for what does not fit into memory.
        """
        row = like[0].numel()
        size = count * row * like.element_size()
        if self.num_bytes + size <= self.max_bytes:
            self.num_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            flat = torch.empty(count * row, dtype=like.dtype, device=self.device)
        else:
            self.num_spilled_bytes += size
            flat = self._map(size, count * row, like.dtype)
        return flat.as_strided((count, *like.shape[1:]), _row_strides(like))

    def release(self, tensor: Tensor) -> None:
        """Count the room of a tensor that ``allocate`` made as free; the caller drops it."""
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().filename is None:
            self.num_bytes -= size
        else:
            self.num_spilled_bytes -= size

    def _map(self, size: int, count: int, dtype: torch.dtype) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._num_files}.bin"
        self._num_files += 1
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a sparse file would end the process when the disk is full
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:  # it names no file by itself
                    raise OSError(error.errno, error.strerror, str(path)) from error
            else:
                file.truncate(size)
        mapped = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        with suppress(OSError):  # the mapping stays; where an open file cannot be removed, leaving does it
            path.unlink()
        return mapped


def _row_strides(like: Tensor) -> tuple[int, ...]:
    """Strides of ``like`` where its rows lie densely one after the other, else contiguous ones."""
    row = like[0]
    strides = sorted(zip(row.stride(), row.shape, strict=True))
    dense, expected = True, 1
    for stride, size in strides:
        dense = dense and (size == 1 or stride == expected)
        expected *= size
    if dense and (len(like) == 1 or like.stride(0) == row.numel()):
        return (row.numel(), *row.stride())
    return torch.empty(like.shape, device="meta").stride()


def take_rows(tensor: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Rows of a tensor that ``allocate`` made, with its memory format, where the network runs."""
    row = tensor[0].numel()
    flat = tensor.as_strided((len(tensor), row), (row, 1))
    taken = flat.index_select(0, indices.to(tensor.device)).to(device)
    return taken.as_strided((len(indices), *tensor.shape[1:]), (row, *tensor.stride()[1:]))


@dataclass(frozen=True)
class UnitInputs:
    """Arguments of a unit for all states: what differs between images is stacked, the rest is kept as it is.

    Args:
        leaves: The arguments one by one.
        stacked: Which of them are stacked.
        spec: How they are put together.
    """

    leaves: list[Any]
    stacked: list[bool]
    spec: TreeSpec

    def rows(self, indices: Tensor, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for these images."""
        leaves = [
            take_rows(leaf, indices, device) if stacked else leaf
            for leaf, stacked in zip(self.leaves, self.stacked, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    def are_shared(self, batch_size: int) -> bool:
        """Whether all images of a state, ``batch_size`` one after the other and more than one, have the same inputs."""
        per_state = [
            x.unflatten(0, (-1, batch_size)) for x, kept in zip(self.leaves, self.stacked, strict=True) if kept
        ]
        return batch_size > 1 and all(bool((x == x[:, :1]).all()) for x in per_state)

    def release(self, store: ActivationStore) -> None:
        """Count the room of what is stacked as free."""
        for leaf, stacked in zip(self.leaves, self.stacked, strict=True):
            if stacked:
                store.release(leaf)


class _ReachedError(Exception):
    """The unit in question was called; holds its arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs


class Stream:
    """The network's activations under one kind of setting, carried from unit to unit without starting again.

    Only outputs that a later unit still takes are kept. The arguments of the next unit come from a replay of the
    network's forward in which completed units return their kept outputs; the code between units runs again.

    Args:
        network: The network.
        units: Its units in the order of execution.
        last_uses: See ``find_last_uses``.
        states: Inputs of the network; all of the same number of images. They are run batch by batch as they are here.
        store: Where outputs are kept.
    """

    def __init__(
        self,
        network: nn.Module,
        units: Sequence[Unit],
        last_uses: Sequence[int],
        states: Sequence[CalibrationState],
        store: ActivationStore,
    ) -> None:
        self.network, self.units, self.last_uses = network, units, last_uses
        self.states, self.store = states, store
        self.num_completed = 0
        self._outputs: dict[int, Tensor] = {}
        self._shapes: list[torch.Size] = []

    @property
    def batch_size(self) -> int:
        """Images a state."""
        return len(self.states[0].x)

    def output(self, index: int) -> Tensor:
        """Output of a completed unit that is still kept, for all states."""
        return self._outputs[index]

    @torch.no_grad()
    def arguments(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the next unit for one state."""
        stop, size, device = self.num_completed, self.batch_size, self.store.device

        def returning(index: int, _: Call) -> Call:
            def call(*args: Any, **kwargs: Any) -> Tensor:
                if index == stop:
                    raise _ReachedError(args, kwargs)
                if index in self._outputs:
                    return self._outputs[index][batch * size : (batch + 1) * size].to(device)
                return torch.zeros((), device=device).expand(size, *self._shapes[index])  # nobody looks at it again

            return call

        try:
            with replaced_forwards(self.units, returning):
                self.states[batch].run(self.network, device)
        except _ReachedError as reached:
            return reached.arguments
        raise AssertionError(f"{self.units[stop].name} was not reached")

    def inputs(self) -> UnitInputs:
        """Arguments of the next unit for all states; to be released by the caller."""
        leaves: list[Any] = []
        stacked: list[bool] = []
        size, count = self.batch_size, len(self.states) * self.batch_size
        for batch in range(len(self.states)):
            found, spec = tree_flatten(self.arguments(batch))
            if batch == 0:
                stacked = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == size for x in found]
                leaves = [self.store.allocate(x, count) if kept else x for x, kept in zip(found, stacked, strict=True)]
            for leaf, x, kept in zip(leaves, found, stacked, strict=True):
                if kept:
                    leaf[batch * size : (batch + 1) * size].copy_(x)
        return UnitInputs(leaves, stacked, spec)

    @torch.no_grad()
    def advance(self, run: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        """Complete the next unit: ``run`` gets the number of a state and the unit's arguments and gives its output.

        Raises:
            ValueError: If an output held NaN or infinity; unit and timestep are named.
        """
        index, size = self.num_completed, self.batch_size
        kept: Tensor | None = None
        for batch, state in enumerate(self.states):
            output = run(batch, *self.arguments(batch))
            if not output.isfinite().all():
                raise ValueError(
                    f"block {self.units[index].name}: its output held NaN or infinity at timestep {state.timestep} "
                    "during calibration"
                )
            if kept is None:
                kept = self.store.allocate(output, len(self.states) * size)
            kept[batch * size : (batch + 1) * size].copy_(output)
        assert kept is not None
        self._outputs[index] = kept
        self._shapes.append(kept.shape[1:])
        self.num_completed += 1

    def drop_used(self) -> None:
        """Free the outputs that no later unit takes."""
        for index in [i for i in self._outputs if self.last_uses[i] < self.num_completed]:
            self.store.release(self._outputs.pop(index))
