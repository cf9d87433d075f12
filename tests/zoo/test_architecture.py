"""Architectures without weights: what they are given is checked, and nothing but shapes is ever made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.cost import ConvShape, LinearShape
from tmpq_exp.zoo.architecture import BareArchitecture
from tmpq_exp.zoo.compvis import CompVisUNet
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import CostedModel, task_layers


class TinyUNet(nn.Module):
    """One convolution over the state and one linear layer over the context; a thousand billion weights if asked."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.linear = nn.Linear(5, 1)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        assert timestep.shape == (1,)
        self.linear(encoder_hidden_states)
        result: Tensor = self.conv(x)
        return result


def architecture(**changes: Any) -> BareArchitecture:
    arguments: dict[str, Any] = {"name": "tiny", "sample_shape": [3, 4, 6], "context_shape": [7, 5], "unet": TinyUNet}
    return BareArchitecture(**(arguments | changes))


def test_layers_are_those_of_one_call_for_one_image() -> None:
    model = architecture()
    assert model.layers() == (
        ConvShape("conv", 3, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, 4, 6),
        LinearShape("linear", 5, 1, positions=7),
    )
    assert (model.name, model.guided, model.diffusers_layers()) == ("tiny", False, None)
    assert architecture(diffusers=TinyUNet).diffusers_layers() == model.layers()


def test_no_memory_is_taken() -> None:
    (conv, _) = architecture(unet=partial(TinyUNet, width=10**11)).layers()
    assert conv.num_weights == 3 * 10**11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sample_shape": [4, 6]},
            r"sample_shape must be \(C, H, W\), all integers of at least 1, found \[4, 6\]",
        ),
        ({"sample_shape": [3, 0, 6]}, r"found \[3, 0, 6\]"),
        ({"sample_shape": [3, 4.5, 6]}, r"found \[3, 4.5, 6\]"),
        ({"context_shape": [7]}, r"context_shape must be \(tokens, channels\)"),
        ({"unet": partial(CompVisUNet, in_channels=3)}, "unet: missing a required argument: 'channels'"),
        ({"diffusers": partial(TinyUNet, **{"widht": 2})}, "diffusers: got an unexpected keyword argument 'widht'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture(**changes)


def test_a_trainable_model_has_the_layers_of_its_loaded_network_without_its_checkpoint() -> None:
    model = DigitsDDPM(checkpoint="there/is/none.safetensors")
    assert isinstance(model, CostedModel)
    assert model.layers() == task_layers(DigitsDDPM().task())
    with torch.device("meta"):
        network = model.architecture()
    assert {value.device.type for value in network.parameters()} == {"meta"}
