"""Activations carried from unit to unit are those of a plain forward, to the last bit, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tmpq_exp.quant.activations import ActivationStore, Stream, take_rows
from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.units import Unit, find_last_uses, find_units, replaced_forwards

if TYPE_CHECKING:
    from tests.quant.conftest import Case

CPU = torch.device("cpu")


def states_of(case: Case) -> list[CalibrationState]:
    states = []
    for seed, timestep in enumerate((900, 10)):
        inputs = dict(case.inputs(3))
        x = inputs.pop("sample") + seed
        inputs.pop("timestep")
        states.append(CalibrationState(x, timestep, inputs))
    return states


def prepared(case: Case, store: ActivationStore) -> tuple[Stream, tuple[Unit, ...]]:
    def forward(network: Any) -> Any:
        return network(**case.inputs(1))

    supernet = case.calibrated()
    units = find_units(supernet, forward)
    return Stream(supernet, units, find_last_uses(supernet, units, forward), states_of(case), store), units


def plain_outputs(case: Case, units: tuple[Unit, ...], bits: int) -> list[Tensor]:
    """Output of every unit in a plain forward of all states."""
    found: dict[int, list[Tensor]] = {}

    def noting(index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            found.setdefault(index, []).append(output.clone())
            return output

        return call

    supernet = case.calibrated()
    with torch.no_grad(), supernet.subnet(case.uniform(bits)), replaced_forwards(units, noting):
        for state in states_of(case):
            state.run(supernet, CPU)
    return [torch.cat(found[index]) for index in range(len(units))]


@pytest.mark.parametrize("max_bytes", [2**30, 20_000, 0], ids=["memory", "both", "disk"])
@pytest.mark.parametrize("bits", [FLOAT_BITS, 4])
def test_streams_equal_a_plain_forward(case: Case, bits: int, max_bytes: int, tmp_path: Path) -> None:
    with ActivationStore(max_bytes, tmp_path / "spill", CPU) as store:
        stream, units = prepared(case, store)
        for index, (unit, expected) in enumerate(zip(units, plain_outputs(case, units, bits), strict=True)):

            def run(_: int, args: Any, kwargs: Any, unit: Unit = unit) -> Tensor:
                with case.calibrated().subnet(case.uniform(bits)):
                    output: Tensor = unit.module(*args, **kwargs)
                return output

            stream.advance(run)
            assert torch.equal(stream.output(index), expected), unit.name
            stream.drop_used()
            assert store.num_bytes <= max_bytes
        assert (store.num_bytes, store.num_spilled_bytes) == (0, 0)  # nobody takes the last outputs
        assert (store.peak_bytes > 0) == (max_bytes > 0)
    assert not (tmp_path / "spill").exists()


def test_inputs_of_all_states_come_in_rows(digits: Case, tmp_path: Path) -> None:
    with ActivationStore(2**30, tmp_path, CPU) as store:
        stream, units = prepared(digits, store)
        while units[stream.num_completed].name != "down_blocks.1.resnets.0":
            module = units[stream.num_completed].module
            stream.advance(lambda _, args, kwargs, module=module: module(*args, **kwargs))
        before = store.num_bytes
        inputs = stream.inputs()
        (x, temb), kwargs = inputs.rows(torch.tensor([5, 0]), CPU)
        first, last = (stream.arguments(batch)[0] for batch in (0, 1))
        assert torch.equal(x, torch.stack([last[0][2], first[0][0]]))
        assert torch.equal(temb, torch.stack([last[1][2], first[1][0]]))
        assert x.is_contiguous(memory_format=torch.channels_last) == first[0].is_contiguous(
            memory_format=torch.channels_last
        )
        assert kwargs == {}
        inputs.release(store)
        assert store.num_bytes == before


@pytest.mark.parametrize("max_bytes", [10**6, 0])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_room_keeps_the_memory_format(max_bytes: int, memory_format: torch.memory_format, tmp_path: Path) -> None:
    like = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    with ActivationStore(max_bytes, tmp_path / "spill", CPU) as store:
        room = store.allocate(like, 6)
        room[2:4] = like
        assert room.is_contiguous(memory_format=memory_format)
        taken = take_rows(room, torch.tensor([3, 2]), CPU)
        assert torch.equal(taken, like.flip(0))
        assert taken.is_contiguous(memory_format=memory_format)
        size = 6 * 3 * 4 * 5 * 4
        assert (store.num_bytes, store.num_spilled_bytes) == ((size, 0) if max_bytes else (0, size))
        store.release(room)
        assert (store.num_bytes, store.num_spilled_bytes) == (0, 0)


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    (folder / "0.bin").write_bytes(b"left over")
    with ActivationStore(0, folder, CPU):
        assert not folder.exists()


def test_nan_names_the_block_and_the_timestep(digits: Case, tmp_path: Path) -> None:
    with ActivationStore(2**30, tmp_path, CPU) as store:
        stream, units = prepared(digits, store)
        with pytest.raises(ValueError, match=r"block time_embedding.linear_1: .*NaN or infinity at timestep 10 "):
            stream.advance(
                lambda batch, args, kwargs: units[0].module(*args, **kwargs) * (float("nan") if batch else 1.0)
            )
