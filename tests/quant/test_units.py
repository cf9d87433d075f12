"""Units cover every layer once, in the order of execution, and know who takes their output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tmpq_exp.config import QuantConfig
from tmpq_exp.cost import LinearShape
from tmpq_exp.quant.seams import find_seams
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.quant.units import Unit, find_last_uses, find_units

if TYPE_CHECKING:
    from tests.quant.conftest import Case


def units_of(case: Case) -> tuple[Unit, ...]:
    return find_units(case.calibrated(), lambda network: network(**case.inputs(1)))


def last_uses(case: Case) -> dict[str, str]:
    units = units_of(case)
    found = find_last_uses(case.calibrated(), units, lambda network: network(**case.inputs(1)))
    return {unit.name: units[index].name for unit, index in zip(units, found, strict=True)}


def test_every_layer_is_in_one_unit(case: Case) -> None:
    inside = [layer.name for unit in units_of(case) for layer in unit.layers]
    assert sorted(inside) == sorted(shape.name for shape in case.layers)


def test_units_of_the_digits_network(digits: Case) -> None:
    kinds = {unit.name: type(unit.module).__name__ for unit in units_of(digits)}
    names = list(kinds)
    assert names[:4] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "down_blocks.0.resnets.0"]
    assert names[-1] == "conv_out"
    assert names.index("up_blocks.0.attentions.0") == names.index("up_blocks.0.resnets.0") + 1
    assert kinds["mid_block.attentions.0"] == "Attention"
    assert kinds["up_blocks.2.resnets.1"] == "ResnetBlock2D"
    assert kinds["down_blocks.0.downsamplers.0.conv"] == "QuantConv2d"


def test_units_with_cross_attention(cross_attention: Case) -> None:
    units = {unit.name: unit for unit in units_of(cross_attention)}
    block = units["down_blocks.1.attentions.0.transformer_blocks.0"]
    assert type(block.module).__name__ == "BasicTransformerBlock"
    assert {"attn1.to_q", "attn2.products", "ff.net.2"} <= {
        layer.name.removeprefix(f"{block.name}.") for layer in block.layers
    }
    assert "down_blocks.1.attentions.0.proj_in" in units


def test_last_uses_of_the_digits_network(digits: Case) -> None:
    found = last_uses(digits)
    assert found["time_embedding.linear_1"] == "time_embedding.linear_2"
    assert found["time_embedding.linear_2"] == "up_blocks.2.resnets.1"
    assert found["conv_in"] == "up_blocks.2.resnets.1"  # as a shortcut
    assert found["down_blocks.1.resnets.0"] == "down_blocks.1.attentions.0"
    assert found["mid_block.resnets.0"] == "mid_block.attentions.0"
    assert found["conv_out"] == "conv_out"


def test_last_uses_with_cross_attention(cross_attention: Case) -> None:
    found = last_uses(cross_attention)
    assert found["conv_in"] == "up_blocks.1.resnets.1"
    # the residual connection of the transformer is added outside of its blocks, and goes into the shortcut as well
    assert found["down_blocks.1.resnets.0"] == "up_blocks.0.resnets.0"
    proj_in = "down_blocks.1.attentions.0.proj_in"
    assert found[proj_in] == "down_blocks.1.attentions.0.transformer_blocks.0"


def test_the_network_runs_as_before(case: Case) -> None:
    expected = case.run(case.network)
    supernet = case.calibrated()
    last_uses(case)
    assert torch.equal(case.run(supernet), expected)


def test_a_layer_that_is_called_twice_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(sample=self.layer(self.layer(x)))

    supernet = Supernet(Twice(), [LinearShape("layer", 3, 3, 1)], [(8,)], [(8,)], QuantConfig())
    with pytest.raises(ValueError, match="block layer is called 2 times"):
        find_units(supernet, lambda network: network(torch.zeros(1, 3)))


def test_seams_lie_where_shortcuts_are_concatenated(digits: Case, cross_attention: Case) -> None:
    found = find_seams(digits.network, lambda network: network(**digits.inputs(1)))
    assert found["up_blocks.0.resnets.1.conv1"] == 64  # 64 from below and 32 from the down path
    assert found["up_blocks.2.resnets.1.conv_shortcut"] == 32
    assert len(found) == 12
    assert all(name.startswith("up_blocks") for name in found)
    found = find_seams(cross_attention.network, lambda network: network(**cross_attention.inputs(1)))
    assert found["up_blocks.0.resnets.0.conv1"] == 16
    assert found["up_blocks.1.resnets.0.conv1"] == 16  # 16 from below, 8 from the down path
    assert found["up_blocks.1.resnets.1.conv1"] == 8
