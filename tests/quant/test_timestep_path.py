"""Layers that depend on the timestep alone: which they are, and that they are computed once a timestep."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.quant.conftest import BITS, FAST, Case, random
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.layers import QuantLinear
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.quant.timestep_path import find_timestep_layers

EMBEDDING = {"time_embedding.linear_1", "time_embedding.linear_2"}


@contextmanager
def counted(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts how often each linear layer is computed."""
    found: Counter[str] = Counter()
    linear = QuantLinear._linear

    def count(layer: QuantLinear, x: Tensor) -> Tensor:
        found[layer.name] += 1
        return linear(layer, x)

    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "_linear", count)
        yield found


def with_path(case: Case) -> Supernet:
    names = find_timestep_layers(case.network, lambda network: network(**case.inputs(1)))
    choices = [BITS] * len(case.layers)
    supernet = Supernet(case.network, case.layers, choices, choices, FAST, timestep_layers=names)
    supernet.load_quantizer_state(case.calibrated().quantizer_state(), "the supernet without a path")
    return supernet


def test_layers_of_the_timestep_are_the_embedding_and_without_classes_its_projections(
    digits: Case, cross_attention: Case
) -> None:
    assert find_timestep_layers(digits.network, lambda network: network(**digits.inputs(1))) == EMBEDDING
    found = find_timestep_layers(cross_attention.network, lambda network: network(**cross_attention.inputs(1)))
    projections = {name for name, _ in cross_attention.network.named_modules() if name.endswith(".time_emb_proj")}
    assert len(projections) > 4
    assert found == EMBEDDING | projections


class Assigned(nn.Module):
    """Hides the sample from who looks at results alone: it is assigned to a part, and added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.assigned, self.added, self.free = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        base = timestep[:, None].expand(-1, 3).float()
        part, sum_ = base.clone(), base.clone()
        part[:, 0] = x[:, 0]
        sum_ += x
        out: Tensor = self.assigned(part) + self.added(sum_) + self.free(base)
        return out


def test_what_is_written_into_a_tensor_counts_as_its_origin() -> None:
    found = find_timestep_layers(Assigned(), lambda network: network(random(2, 3), torch.ones(2)))
    assert found == {"free"}


def test_a_layer_of_the_timestep_is_computed_once_for_all_micro_batches(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, supernet = case.calibrated(), with_path(case)
    of_path = {layer.name for layer in supernet.layers if isinstance(layer, QuantLinear) and layer.known}
    inputs: list[dict[str, Any]] = [case.inputs(2), case.inputs(2)]
    inputs[1]["sample"] = random(*inputs[1]["sample"].shape, seed=3)
    for bits in (8, 4):
        allocation = case.uniform(bits)
        with torch.inference_mode(), plain.subnet(allocation):
            expected = [plain(**one).sample for one in inputs]
        with torch.inference_mode(), supernet.subnet(allocation), counted(supernet, monkeypatch) as found:
            for one, prediction in zip(inputs, expected, strict=True):
                with supernet.at_timestep(300):
                    assert supernet(**one).sample.equal(prediction)
        assert {name for name, count in found.items() if count == 1} == of_path
        assert all(count == 2 for name, count in found.items() if name not in of_path)


def test_another_timestep_setting_or_number_of_images_is_computed_anew(
    digits: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet, name = with_path(digits), "time_embedding.linear_1"
    calls = [(300, 8, 2), (300, 8, 2), (200, 8, 2), (300, 4, 2), (300, 8, 3), (300, 8, 2), (200, 8, 2)]
    with torch.inference_mode(), counted(supernet, monkeypatch) as found:
        for timestep, bits, num_images in calls:
            one = digits.inputs(num_images)
            one["timestep"].fill_(timestep)
            with supernet.subnet(digits.uniform(bits)):
                expected = supernet(**one).sample
                with supernet.at_timestep(timestep):
                    assert supernet(**one).sample.equal(expected)
    assert found[name] == len(calls) + 4


def test_new_parameters_are_used(digits: Case) -> None:
    supernet = with_path(digits)
    one = digits.inputs(2)
    with torch.inference_mode(), supernet.subnet(digits.uniform(8)), supernet.at_timestep(300):
        before = supernet(**one).sample
        dict(supernet.named_quantizers())["time_embedding.linear_1/weight_quantizer"].scale.mul_(1.5)
        supernet.quantizers_changed()
        assert not supernet(**one).sample.equal(before)


def test_a_watched_layer_is_computed_every_time(digits: Case) -> None:
    supernet, seen = with_path(digits), Counter[str]()
    names = {id(quantizer): name for name, quantizer in supernet.named_quantizers()}
    with torch.inference_mode(), supernet.observing(lambda quantizer, _: seen.update([names[id(quantizer)]])):
        for _ in range(2):
            with supernet.at_timestep(300):
                supernet(**digits.inputs(2))
    assert seen["time_embedding.linear_1/act_quantizer"] == 2


def test_images_of_a_candidate_compute_the_time_embedding_once_a_step(
    module: SupernetModule, digits: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate((900, 400, 20), (digits.uniform(6), digits.uniform(8), digits.uniform(6)))
    with counted(module.supernet, monkeypatch) as found:
        for indices in ([0, 1], [2, 3], [4, 5]):
            module.images(candidate, indices, 11)
    assert [found[name] for name in sorted(EMBEDDING)] == [3, 3]
    projections = {count for name, count in found.items() if name.endswith("time_emb_proj")}
    assert projections == {9}  # the class is added before them
