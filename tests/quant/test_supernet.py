"""The supernet is the float network until told otherwise, shares its weights, and leaves no trace of a subnet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.config import Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Candidate
from tmpq_exp.quant.layers import FLOAT, QuantLayer
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.winograd.conv import FLOAT_STAGES, WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales

if TYPE_CHECKING:
    from tests.quant.conftest import Case

GROUPWISE = QuantConfig(
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
)
TIMESTEPS = (800, 300, 20)


def settings(supernet: Supernet) -> list[object]:
    return [layer.setting for layer in supernet.layers]


def test_float_is_bit_equal_to_the_float_network(case: Case) -> None:
    supernet, expected = case.calibrated(), case.run(case.network)
    assert torch.equal(case.run(supernet), expected)
    with supernet.subnet(case.uniform(FLOAT_BITS)):
        assert torch.equal(case.run(supernet), expected)
    with supernet.subnet(case.uniform(4)):
        assert not torch.equal(case.run(supernet), expected)
    assert torch.equal(case.run(supernet), expected)


def test_the_float_network_is_left_as_it_is_and_its_parameters_are_shared(case: Case) -> None:
    modules = {name: module for name, module in case.network.named_modules()}
    expected = case.run(case.network)
    supernet = case.calibrated()
    with supernet.subnet(case.uniform(4)):
        assert torch.equal(case.run(case.network), expected)
    assert {name: module for name, module in case.network.named_modules()} == modules
    assert not any(isinstance(module, QuantLayer) for module in case.network.modules())
    parameters = {parameter.data_ptr() for parameter in case.network.parameters()}
    assert {parameter.data_ptr() for parameter in supernet.parameters()} == parameters
    assert all(a is b for a, b in zip(case.network.parameters(), supernet.parameters(), strict=True))


def test_every_layer_of_the_list_is_replaced(case: Case) -> None:
    supernet = case.supernet()
    assert [layer.name for layer in supernet.layers] == [shape.name for shape in case.layers]
    inside = {id(layer.float_layer) for layer in supernet.layers if hasattr(layer, "float_layer")}
    plain = [m for m in supernet.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in inside]
    assert plain == []


@pytest.mark.parametrize("config", [None, GROUPWISE], ids=["static", "groupwise"])
def test_more_bits_are_closer_to_float(case: Case, config: QuantConfig | None) -> None:
    supernet, expected = case.calibrated(*([config] if config else [])), case.run(case.network)
    sqnr = []
    for bits in (4, 6, 8):
        with supernet.subnet(case.uniform(bits)):
            sqnr.append(sqnr_db(expected, case.run(supernet)))
    assert sqnr == sorted(sqnr)
    assert sqnr[-1] > 20
    assert sqnr[-1] - sqnr[0] > 12


def test_settings_are_restored_also_after_exceptions_and_when_nested(case: Case) -> None:
    supernet = case.calibrated()
    with pytest.raises(RuntimeError, match="inside"), supernet.subnet(case.uniform(4)):
        raise RuntimeError("inside")
    assert settings(supernet) == [FLOAT] * len(case.layers)
    with supernet.subnet(case.uniform(8)):
        before = settings(supernet)
        with supernet.subnet(case.uniform(4)):
            assert settings(supernet) != before
        assert settings(supernet) == before
    with pytest.raises(ValueError, match="found 5"), supernet.subnet(case.uniform(5)):
        case.run(supernet)
    assert settings(supernet) == [FLOAT] * len(case.layers)


@pytest.mark.parametrize("num_layers", [-1, 1])
def test_an_allocation_of_another_network_is_refused_and_changes_nothing(case: Case, num_layers: int) -> None:
    supernet, allocation = case.supernet(), case.uniform(4)

    def resized(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:-1] if num_layers < 0 else (*values, values[-1])

    other = replace(
        allocation,
        weight_bits=resized(allocation.weight_bits),
        act_bits=resized(allocation.act_bits),
        tiles=resized(allocation.tiles),
    )
    with pytest.raises(ValueError, match=f"{len(case.layers)} layers.*{len(other)}"), supernet.subnet(other):
        pass
    assert settings(supernet) == [FLOAT] * len(case.layers)


def test_quantizer_state_round_trip(case: Case) -> None:
    supernet, fresh = case.calibrated(), case.supernet()
    fresh.load_quantizer_state(supernet.quantizer_state(), "state")
    with supernet.subnet(case.uniform(6)), fresh.subnet(case.uniform(6)):
        assert torch.equal(case.run(fresh), case.run(supernet))


def test_loaded_parameters_take_effect_at_once(case: Case) -> None:
    supernet = case.calibrated()
    state = {key: value.clone() for key, value in supernet.quantizer_state().items()}
    with supernet.subnet(case.uniform(6)):
        before = case.run(supernet)
        doubled = {key: value * 2 if key.endswith("scale") else value for key, value in state.items()}
        supernet.load_quantizer_state(doubled, "state")
        assert not torch.equal(case.run(supernet), before)
        supernet.load_quantizer_state(state, "state")
        assert torch.equal(case.run(supernet), before)


def test_a_wrong_state_is_refused_and_changes_nothing(case: Case) -> None:
    supernet = case.calibrated()
    state = {key: value.clone() for key, value in supernet.quantizer_state().items()}
    last = list(state)[-1]
    wrong = {
        "first that differs": {key: 2 * value for key, value in state.items() if key != last},
        "other bit choices": {key: 2 * value for key, value in state.items()} | {last: state[last][:1]},
        "not finite": {key: 2 * value for key, value in state.items()} | {last: state[last] * float("nan")},
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=rf"(?s)some\.file.*{message}"):
            supernet.load_quantizer_state(tensors, "some.file")
        for key, value in supernet.quantizer_state().items():
            assert torch.equal(value, state[key])
    with pytest.raises(ValueError, match="extra"):
        supernet.load_quantizer_state(state | {"extra": torch.zeros(1)}, "some.file")


@pytest.mark.parametrize("tile", [2, 4])
def test_a_tile_changes_only_eligible_layers(case: Case, tile: int) -> None:
    supernet = case.calibrated()
    spec = WinogradSpec(tile)
    supernet.set_winograd({tile: (spec, closed_form_scales(spec.transform()))})
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda layer, args, y: outputs.update({layer.name: (args[0].clone(), y)}))
        for layer in supernet.layers
        if hasattr(layer, "float_layer")
    ]
    with supernet.subnet(case.uniform(8, tile)):
        case.run(supernet)
    for handle in handles:
        handle.remove()
    with supernet.subnet(case.uniform(8)), torch.no_grad():
        for index, layer in enumerate(supernet.layers):
            if layer.name in outputs:
                x, y = outputs[layer.name]
                assert torch.equal(layer(x), y) is not case.is_eligible(index)
                assert sqnr_db(layer(x), y) > 12
    assert any(case.is_eligible(i) for i in range(len(case.layers)))
    assert not all(case.is_eligible(i) for i, shape in enumerate(case.layers) if shape.kind == "conv")


def test_a_tile_in_float_is_the_float_network(case: Case) -> None:
    supernet = case.supernet()
    spec = WinogradSpec(4, **FLOAT_STAGES)
    supernet.set_winograd({4: (spec, closed_form_scales(spec.transform()))})
    with supernet.subnet(case.uniform(FLOAT_BITS, 4)):
        assert sqnr_db(case.run(case.network), case.run(supernet)) > 90


def test_switching_candidates_quantizes_no_cached_weight_again(case: Case) -> None:
    supernet = case.calibrated()
    weighted = sum(shape.kind != "attention" for shape in case.layers)
    before = supernet.cache.num_misses
    for bits in (4, 8, 4, 8, FLOAT_BITS, 4):
        with supernet.subnet(case.uniform(bits)):
            case.run(supernet)
    assert supernet.cache.num_misses - before == 2 * weighted
    total = sum(p.numel() for layer in supernet.layers for n, p in layer.named_parameters() if n.endswith("weight"))
    assert supernet.cache.num_bytes == 2 * 4 * total


def test_a_small_cache_changes_no_result(case: Case) -> None:
    supernet = case.calibrated()
    capped = case.supernet(replace(supernet.config, cache_max_bytes=1000))
    capped.load_quantizer_state(supernet.quantizer_state(), "state")
    with supernet.subnet(case.uniform(6)), capped.subnet(case.uniform(6)):
        assert torch.equal(case.run(supernet), case.run(capped))
    assert capped.cache.num_bytes <= 1000


def candidate(case: Case, bits: Sequence[int]) -> Candidate:
    return Candidate(TIMESTEPS, tuple(case.uniform(b) for b in bits))


@pytest.mark.parametrize("bits", [FLOAT_BITS, 8, 4])
def test_an_image_is_the_same_in_any_batch(module: SupernetModule, digits: Case, bits: int) -> None:
    together = module.images(candidate(digits, [bits]), range(8), seed=3)
    alone = torch.cat([module.images(candidate(digits, [bits]), [i], seed=3) for i in (5, 2)])
    reversed_order = module.images(candidate(digits, [bits]), range(7, -1, -1), seed=3).flip(0)
    # Who else is in the batch changes nothing, to the last bit
    others = module.images(candidate(digits, [bits]), [0, 11, 12, 3, 14, 15, 16, 17], seed=3)
    assert torch.equal(together[[0, 3]], others[[0, 3]])
    if bits == FLOAT_BITS:
        torch.testing.assert_close(together[[5, 2]], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(together, reversed_order, atol=1e-5, rtol=0)
    elif bits == 8:  # where another batch size changes a last bit, a rounding may move by a whole step
        assert (together[[5, 2]] - alone).abs().mean() < 1e-2
    assert torch.equal(together, module.images(candidate(digits, [bits]), range(8), seed=3))
    assert not torch.equal(together, module.images(candidate(digits, [bits]), range(8), seed=4))


def test_float_images_are_the_tasks_own(module: SupernetModule, digits: Case) -> None:
    with torch.inference_mode():
        expected = module.task.sample(module.task.unet, range(4), TIMESTEPS, 3)
    assert torch.equal(module.images(candidate(digits, [FLOAT_BITS]), range(4), seed=3), expected)
    assert 0 <= expected.min() <= expected.max() <= 1


def test_allocations_of_the_steps(module: SupernetModule, digits: Case) -> None:
    shared = module.images(candidate(digits, [6]), range(4), seed=3)
    assert torch.equal(module.images(candidate(digits, [6, 6, 6]), range(4), seed=3), shared)
    mixed = module.images(candidate(digits, [8, 6, 4]), range(4), seed=3)
    last_step: list[int] = []
    layer = module.supernet.layers[0]
    handle = layer.register_forward_pre_hook(lambda layer, _: last_step.append(layer.setting.weight_bits))
    assert torch.equal(module.images(candidate(digits, [8, 6, 4]), range(4), seed=3), mixed)
    handle.remove()
    assert last_step == [8, 6, 4]
    assert not torch.equal(mixed, shared)
    assert settings(module.supernet) == [FLOAT] * len(digits.layers)


def test_predict_makes_the_requested_micro_batches(module: SupernetModule, digits: Case) -> None:
    batches = [range(0, 3), range(3, 5)]
    with module.requesting(candidate(digits, [8]), batches, 7):
        images = [module.predict_step(i, i) for i in range(2)]
    for batch, found in zip(batches, images, strict=True):
        assert torch.equal(found, module.images(candidate(digits, [8]), batch, 7))
    with pytest.raises(AssertionError, match="requesting"):
        module.predict_step(0, 0)


def test_tiles_that_were_not_set_are_refused(case: Case) -> None:
    supernet = case.calibrated()
    with pytest.raises(ValueError, match=r"tile 4 .*conv_in"), supernet.subnet(case.uniform(8, 4)):
        case.run(supernet)
    ineligible = next(i for i in range(len(case.layers)) if not case.is_eligible(i))
    allocation = case.uniform(8)
    tiles = [DIRECT_TILE] * len(allocation)
    tiles[ineligible] = 4
    name = case.layers[ineligible].name
    with pytest.raises(ValueError, match=rf"tile 4 .*{name}"), supernet.subnet(replace(allocation, tiles=tuple(tiles))):
        case.run(supernet)
