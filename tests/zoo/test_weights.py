"""Weights on disk: what is written is read, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpq_exp.zoo.weights import content_hash, load_weights, read_tensors, write_tensors


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_tensors(path, network().state_dict(), {"model": "mine", "seed": "3"})
    return path


def test_round_trip(path: Path) -> None:
    model = network(seed=1).to(memory_format=torch.channels_last)
    load_weights(model, path, "mine")
    assert content_hash(model.state_dict()) == content_hash(network().state_dict())
    assert read_tensors(path, "weights")[1] == {"model": "mine", "seed": "3"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint of model mine: no file at .*nowhere\.safetensors"):
        load_weights(network(), tmp_path / "nowhere.safetensors", "mine")


@pytest.mark.parametrize("kept", [0, 1, 7, 100, -1])
def test_truncated_file(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        load_weights(network(), path, "mine")


@pytest.mark.parametrize("part", [b"mine", b'"seed"', None])
def test_a_changed_bit_is_noticed(path: Path, part: bytes | None) -> None:
    content = bytearray(path.read_bytes())
    content[-1 if part is None else content.index(part) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^weights: .*model\.safetensors is damaged \(its content is no longer what"):
        read_tensors(path, "weights")


def test_a_file_of_others_has_no_hash_and_is_read(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path, {"model": "theirs"})
    tensors, metadata = read_tensors(path, "weights")
    assert tensors["weight"].tolist() == [1, 1]
    assert metadata == {"model": "theirs"}


def test_another_kind_of_file(path: Path) -> None:
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        load_weights(network(), path, "mine")


def test_weights_of_another_model(path: Path) -> None:
    with pytest.raises(ValueError, match=r"model yours: .*model\.safetensors holds weights of model mine"):
        load_weights(network(), path, "yours")


def changed(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    if change == "missing":
        return {key: value for key, value in state.items() if key != "2.bias"}
    if change == "extra":
        return state | {"3.bias": torch.zeros(2)}
    return state | {"0.weight": torch.zeros(3, 2, 1, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 keys missing, 0 extra; first missing key 2\.bias"),
        ("extra", r"0 keys missing, 1 extra; first extra key 3\.bias"),
        ("shape", r"0\.weight in .* has shape \(3, 2, 1, 1\), expected \(3, 2, 3, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(path: Path, change: str, message: str) -> None:
    write_tensors(path, changed(network().state_dict(), change), {})
    model = network(seed=1)
    before = content_hash(model.state_dict())
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors.*{message}|{message}.*") as error:
        load_weights(model, path, "mine")
    assert "model.safetensors" in str(error.value)
    assert content_hash(model.state_dict()) == before


@given(st.integers(0, 11), st.integers(0, 31), st.sampled_from([torch.float32, torch.int32]))
def test_any_bit_changes_the_hash(index: int, bit: int, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(12).reshape(3, 4).to(dtype), "b": torch.zeros(2, dtype=torch.bfloat16)}
    flipped = tensors["a"].clone()
    integers = flipped.view(torch.int32).view(-1)
    integers[index] = torch.bitwise_xor(integers[index], torch.tensor(1 << bit).to(torch.int32))
    assert content_hash(tensors | {"a": flipped}) != content_hash(tensors)


def test_hash_depends_on_names_shapes_and_types_but_not_on_order_or_layout() -> None:
    a, b = torch.arange(24.0).reshape(2, 3, 2, 2), torch.zeros(3)
    value = content_hash({"a": a, "b": b})
    assert content_hash({"b": b, "a": a.contiguous(memory_format=torch.channels_last)}) == value
    others = [{"a": a, "c": b}, {"a": a.reshape(2, 12), "b": b}, {"a": a, "b": b.int()}, {"a": a, "b": -b}, {"a": a}]
    assert len({value, *map(content_hash, others)}) == len(others) + 1
    assert len(value) == 16
