"""Shapes read off a network equal what PyTorch counts, and the published cost of a published architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tmpq_exp.attention import AttentionProducts
from tmpq_exp.cost import AttentionShape, ConvShape, LinearShape
from tmpq_exp.trace import trace_layers

META = torch.device("meta")


def run_unet(num_channels: int, size: int) -> Callable[[nn.Module], Any]:
    def run_forward(model: nn.Module) -> Any:
        sample = torch.zeros(1, num_channels, size, size, device=META)
        return model(sample, torch.zeros(1, dtype=torch.long, device=META))

    return run_forward


def small_unet() -> UNet2DModel:
    with META:
        return UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


def test_macs_are_half_of_the_flops_that_pytorch_counts() -> None:
    model, run_forward = small_unet(), run_unet(1, 16)
    with FlopCounterMode(display=False) as counter:
        run_forward(model)
    layers = trace_layers(model, run_forward)
    assert 2 * sum(layer.macs for layer in layers) == counter.get_total_flops()


def test_weights_are_those_of_the_model() -> None:
    model = small_unet()
    layers = trace_layers(model, run_unet(1, 16))
    weights = {name: module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}
    for layer in layers:
        if not isinstance(layer, AttentionShape):
            assert layer.num_weights == weights[layer.name]


def test_order_is_that_of_the_modules_with_products_behind_their_attention() -> None:
    model = small_unet()
    names = [layer.name for layer in trace_layers(model, run_unet(1, 16))]
    expected = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            expected.append(name)
        if name.endswith("to_out.0"):
            expected.append(name.removesuffix("to_out.0") + "products")
    assert names == expected
    assert sum(name.endswith(".products") for name in names) == 4


def test_cifar10_ddim_costs_what_the_method_says() -> None:
    with META:
        model = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            norm_num_groups=32,
            attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(35.7e6, rel=0.01)
    layers = trace_layers(model, run_unet(3, 32))
    assert sum(layer.macs for layer in layers) == pytest.approx(6.22e9, rel=0.01)
    attention = sum(layer.macs for layer in layers if isinstance(layer, AttentionShape))
    assert attention == pytest.approx(0.168e9, rel=0.01)


def test_cross_attention_has_its_own_number_of_keys() -> None:
    with META:
        attention = Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8)
    states, context = torch.zeros(1, 9, 32, device=META), torch.zeros(1, 5, 12, device=META)
    layers = trace_layers(attention, lambda model: model(states, encoder_hidden_states=context))
    assert [layer.name for layer in layers] == ["to_q", "to_k", "to_v", "to_out.0", "products"]
    assert layers[-1] == AttentionShape("products", heads=4, queries=9, keys=5, head_dim=8)
    assert layers == trace_layers(attention, lambda model: model(states, context))


def test_products_that_are_a_module_are_counted_from_their_operands() -> None:
    q, k, v = torch.zeros(1, 4, 9, 8), torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 5, 3)
    model = nn.Sequential(nn.Identity(), AttentionProducts())
    expected = AttentionShape("1", heads=4, queries=9, keys=5, head_dim=8, value_dim=3)
    assert trace_layers(model, lambda m: m[1](q, k, v)) == (expected,)  # type: ignore[index]
    assert trace_layers(model, lambda m: m[1](q, k=k, v=v)) == (expected,)  # type: ignore[index]
    with pytest.raises(ValueError, match="must run batch 1, found queries"):
        trace_layers(model, lambda m: m[1](*(t.expand(2, -1, -1, -1) for t in (q, k, v))))  # type: ignore[index]


def test_attention_over_pixels_counts_every_pixel() -> None:
    with META:
        attention = Attention(query_dim=32, heads=1, dim_head=32)
    layers = trace_layers(attention, lambda model: model(torch.zeros(1, 32, 3, 4, device=META)))
    assert layers[-1] == AttentionShape("products", heads=1, queries=12, keys=12, head_dim=32)
    assert layers[0] == LinearShape("to_q", 32, 32, positions=12)


def test_convolution_settings_are_read() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2), nn.Conv2d(6, 2, 3, padding="same", dilation=2)
    )
    layers = trace_layers(model, lambda m: m(torch.zeros(1, 4, 9, 8)))
    assert layers == (
        ConvShape("0", 4, 6, (3, 1), (2, 1), (1, 0), (1, 1), 2, 5, 8),
        ConvShape("1", 6, 2, (3, 3), (1, 1), (2, 2), (2, 2), 1, 5, 8),
    )


def test_layers_that_are_never_called_are_left_out() -> None:
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 5)])
    layers = trace_layers(model, lambda m: m[1](torch.zeros(1, 3)))  # type: ignore[index]
    assert [layer.name for layer in layers] == ["1"]


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(1, 1, 3), (2, 1, 8, 8), "must run batch 1"),
        (nn.Sequential(nn.Conv1d(1, 1, 3)), (1, 1, 8), "layer '0' is a Conv1d, whose cost is not known"),
        (nn.Sequential(nn.SiLU()), (1, 3), "called no layer"),
    ],
)
def test_what_cannot_be_counted_is_an_error(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_layers(model, lambda m: m(torch.zeros(shape)))


def test_a_layer_called_twice_is_an_error_and_hooks_are_removed() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="called more than once"):
        trace_layers(model, lambda m: m(m(torch.zeros(1, 3))))
    assert len(trace_layers(model, lambda m: m(torch.zeros(1, 3)))) == 1
