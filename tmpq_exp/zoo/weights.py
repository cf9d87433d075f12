"""Reading and writing weights as safetensors, with errors that name the file and what was expected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tmpq_exp.files import replace_file


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Args:
        path: The file.
        kind: What the file should hold, for the error message.

    Raises:
        ValueError: If the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{kind}: no file at {path}; a safetensors file was expected there")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{kind}: {path} is truncated or no safetensors file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: readers see the old file or the whole new one."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    replace_file(path, save(contiguous, metadata=dict(metadata)))


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Fill ``model`` with the weights of a file written for the model called ``name``.

    Raises:
        ValueError: If the file is missing, truncated, of another model, or its tensors do not fit.
    """
    tensors, metadata = read_tensors(path, f"checkpoint of model {name}")
    found = metadata.get("model")
    if found is not None and found != name:
        raise ValueError(f"checkpoint of model {name}: {path} holds weights of model {found}")
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        first = f"first missing key {missing[0]}" if missing else f"first extra key {extra[0]}"
        raise ValueError(
            f"checkpoint of model {name}: {path} does not fit: {len(missing)} keys missing, {len(extra)} extra; {first}"
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"checkpoint of model {name}: {key} in {path} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in tensors.items()})


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes, 16 hex digits."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}:{tuple(value.shape)}:{value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
