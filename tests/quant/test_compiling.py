"""Compiled subnets: one graph for all bits, the same arithmetic, and float outside as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.quant.conftest import BITS, FAST, Case
from tmpq_exp.config import Granularity
from tmpq_exp.quant import supernet as supernet_module
from tmpq_exp.quant.allocation import FLOAT_BITS, Allocation, Candidate
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.zoo.task import DiffusionTask

COMPILED = replace(FAST, compile=True)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs; they run as they were traced, without generated code, so the arithmetic is the same."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        supernet_module, "compiled", lambda network: torch.compile(network, fullgraph=True, backend=counter)
    )
    torch._dynamo.reset()
    return counter


def pair(case: Case, **changes: object) -> tuple[Supernet, Supernet]:
    """A supernet that compiles and one that does not, with the same quantizers."""
    plain, compiling = (case.supernet(replace(COMPILED, compile=flag, **changes)) for flag in (False, True))  # type: ignore[arg-type]
    case.observe(plain)
    compiling.load_quantizer_state(plain.quantizer_state(), "the other")
    return plain, compiling


def mixed(case: Case, first: int) -> Allocation:
    """Bits that change from layer to layer."""
    uniform = case.uniform(8)
    bits = tuple(BITS[(index + first) % len(BITS)] for index in range(len(uniform)))
    return replace(uniform, weight_bits=bits, act_bits=bits[::-1])


def test_one_graph_serves_all_bits_and_another_one_float(digits: Case, graphs: CompileCounterWithBackend) -> None:
    plain, compiling = pair(digits)
    images = []
    for allocation in (digits.uniform(8), mixed(digits, 0), mixed(digits, 1), digits.uniform(FLOAT_BITS)):
        with plain.subnet(allocation), compiling.subnet(allocation):
            images.append(digits.run(compiling))
            assert images[-1].equal(digits.run(plain))
    assert graphs.frame_count == 2
    assert not images[0].equal(images[1])
    assert not images[1].equal(images[2])
    assert digits.run(compiling).equal(digits.run(digits.network))
    assert graphs.frame_count == 2


def test_a_candidate_is_sampled_through_one_graph(
    task: DiffusionTask, module: SupernetModule, graphs: CompileCounterWithBackend, digits: Case
) -> None:
    choices = [BITS] * len(digits.layers)
    compiling = SupernetModule(task, digits.layers, choices, choices, COMPILED)
    compiling.supernet.load_quantizer_state(module.supernet.quantizer_state(), "the other")
    candidate = Candidate((900, 400, 20), (digits.uniform(6), digits.uniform(8), mixed(digits, 0)))
    for indices in ([0, 1], [2, 3]):
        assert compiling.images(candidate, indices, 11).equal(module.images(candidate, indices, 11))
    assert graphs.frame_count == 1


def test_what_cannot_be_held_runs_as_it_is(digits: Case, graphs: CompileCounterWithBackend) -> None:
    plain, capped = pair(digits, cache_max_bytes=1000)
    with plain.subnet(mixed(digits, 0)), capped.subnet(mixed(digits, 0)):
        assert digits.run(capped).equal(digits.run(plain))
    plain, compiling = pair(digits)
    half = replace(digits.uniform(8), act_bits=(FLOAT_BITS,) * len(digits.layers))
    with plain.subnet(half), compiling.subnet(half):
        assert digits.run(compiling).equal(digits.run(plain))
    assert graphs.frame_count == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_scales_share_a_graph_too(digits: Case, graphs: CompileCounterWithBackend, symmetric: bool) -> None:
    act = replace(FAST.act, granularity=Granularity.PER_GROUP.value, symmetric=symmetric, estimator="minmax")
    plain, compiling = pair(digits, act=act)
    images = []
    for allocation in (digits.uniform(8), mixed(digits, 0), mixed(digits, 1)):
        with plain.subnet(allocation), compiling.subnet(allocation):
            images.append(digits.run(compiling))
            assert images[-1].equal(digits.run(plain))
    assert not images[0].equal(images[1])
    assert graphs.frame_count == 1


def test_new_parameters_are_used(digits: Case, graphs: CompileCounterWithBackend) -> None:
    plain, compiling = pair(digits)
    with compiling.subnet(digits.uniform(8)):
        before = digits.run(compiling)
    state = {key: value * 1.5 if key.endswith(".scale") else value for key, value in plain.quantizer_state().items()}
    for supernet in (plain, compiling):
        supernet.load_quantizer_state(state, "wider ranges")
    with plain.subnet(digits.uniform(8)), compiling.subnet(digits.uniform(8)):
        after = digits.run(compiling)
        assert after.equal(digits.run(plain))
        assert not after.equal(before)
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_generated_code_agrees_with_the_network_as_it_is(digits: Case) -> None:
    torch._dynamo.reset()
    plain, compiling = pair(digits)
    for allocation, bound in ((digits.uniform(FLOAT_BITS), 1e-5), (mixed(digits, 0), 0.02)):
        with plain.subnet(allocation), compiling.subnet(allocation):
            error = (digits.run(compiling) - digits.run(plain)).square().mean().sqrt()
            assert error < bound * digits.run(plain).square().mean().sqrt()
