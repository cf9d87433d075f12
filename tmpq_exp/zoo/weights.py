"""Reading and writing weights, with errors that name the file and what was expected; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tmpq_exp.files import replace_file

SEAL = "content_sha256"
"""Key of the metadata under which a file that was written here keeps the hash of all else that it holds."""


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Args:
        path: The file; one that was not written here has no hash and is taken as it is.
        kind: What the file should hold, for the error message.

    Raises:
        ValueError: If the file is missing, truncated, no safetensors file, or no longer what was written.
    """
    if not path.is_file():
        raise ValueError(f"{kind}: no file at {path}; a safetensors file was expected there")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{kind}: {path} is truncated or no safetensors file ({error})") from error
    if metadata.pop(SEAL, None) not in (None, _seal(tensors, metadata)):
        raise ValueError(f"{kind}: {path} is damaged (its content is no longer what was written)")
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: readers see the old file or the whole new one, and notice if a bit of it is changed later."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    replace_file(path, save(contiguous, metadata={**metadata, SEAL: _seal(contiguous, metadata)}))


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    described = json.dumps(sorted(metadata.items())) + content_hash(tensors)
    return hashlib.sha256(described.encode()).hexdigest()


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Fill ``model`` with the weights of a file written for the model called ``name``.

    Raises:
        ValueError: If the file is missing, truncated, of another model, or its tensors do not fit.
    """
    tensors, metadata = read_tensors(path, f"checkpoint of model {name}")
    found = metadata.get("model")
    if found is not None and found != name:
        raise ValueError(f"checkpoint of model {name}: {path} holds weights of model {found}")
    fill(model, tensors, path, name)


def read_state_dict(path: Path, kind: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a ``torch.save`` file that holds weights only.

    A file of the latter kind may hold them under ``state_dict``, beside other plain values. The prefix ``module.`` of a
    network that was trained in parallel is taken off, and counters of batches, which no forward reads, are left out.

    Args:
        path: The file; one that ends in ``.safetensors`` is read as such.
        kind: What the file should hold, for the error message.

    Raises:
        ValueError: If the file is missing, damaged, holds anything but weights, or no weights.
    """
    if path.suffix == ".safetensors":
        loaded: object = read_tensors(path, kind)[0]
    else:
        loaded = _read_torch_file(path, kind)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{kind}: {path} holds no state dict; tensors by name were expected, alone or as 'state_dict'")
    prefix = "module." if all(str(key).startswith("module.") for key in loaded) else ""
    kept = {str(key).removeprefix(prefix): value for key, value in loaded.items()}
    return {key: value for key, value in kept.items() if not _is_batch_counter(key)}


def _read_torch_file(path: Path, kind: str) -> object:
    if not path.is_file():
        raise ValueError(f"{kind}: no file at {path}; a file of weights was expected there")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # such files are refused or fine
            loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise ValueError(
            f"{kind}: {path} is damaged or holds more than weights ({type(error).__name__}); only tensors are read and "
            "nothing is unpickled. Save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    return loaded


def _is_batch_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Fill ``model``, called ``name``, with tensors that were read from ``path``.

    Raises:
        ValueError: If a tensor is missing or too many, or has another shape; the first one is named.
    """
    counters = {key for key in model.state_dict() if _is_batch_counter(key)} - tensors.keys()
    expected = {key: value for key, value in model.state_dict().items() if key not in counters}
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
    fitting = {key: value.to(expected[key].dtype) for key, value in tensors.items()}
    model.load_state_dict(fitting, strict=not counters)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes, 16 hex digits."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}:{tuple(value.shape)}:{value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
