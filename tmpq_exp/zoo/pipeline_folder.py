"""Reading a diffusers pipeline from a local folder or the model hub, part by part; nothing is unpickled or executed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from tmpq_exp.plain_data import parse_json_object
from tmpq_exp.zoo.weights import read_tensors

UNETS = ("UNet2DModel", "UNet2DConditionModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel")
HUB_TIMEOUT_SECONDS = 5.0
CLASS_EMBEDDER = "class_embedder"
"""Folder of a class-conditional latent model: one safetensors file with one matrix ``(classes + 1, width)``."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PARTS = ("unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler", CLASS_EMBEDDER)
_WANTED = ["model_index.json", *(f"{part}/*.{kind}" for part in _PARTS for kind in ("json", "txt", "safetensors"))]
_UNWANTED = ["*.fp16.*", "*.non_ema.*"]
_HOW = (
    "give a local folder: model.path=FOLDER, as pipeline.save_pretrained(FOLDER) of diffusers writes it, with weights "
    "as safetensors"
)


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline on disk.

    Args:
        path: The folder.
        index: Content of its ``model_index.json``: part -> ``[library, class]``.
    """

    path: Path
    index: Mapping[str, Any]

    def class_name(self, part: str) -> str | None:
        """Class of a part; None if the pipeline has none."""
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """Configuration of a part.

        Raises:
            ValueError: If it is missing or no JSON object.
        """
        return _read_json(self.path / part / file, f"{part} of the pipeline")

    def unet_class(self) -> Any:
        """The U-Net's class in diffusers.

        Raises:
            ValueError: If the pipeline has no U-Net, or one of another kind.
        """
        found = self.class_name("unet")
        if found is None:
            parts = sorted(part for part in self.index if not part.startswith("_"))
            raise ValueError(
                f"{self.path} is a {self.index.get('_class_name')} without a U-Net; its parts are {', '.join(parts)}. "
                f"Accepted are pipelines whose part 'unet' is a {' or '.join(UNETS)}"
            )
        return _diffusers_class(found, UNETS, f"{self.path}: unet")

    def unet(self) -> nn.Module:
        """The U-Net with its weights, float32, in eval mode, frozen."""
        return _load_part(self.unet_class(), self.path / "unet", low_cpu_mem_usage=False)

    def bare_unet(self) -> nn.Module:
        """The U-Net without its weights, on the device of the context."""
        network: nn.Module = self.unet_class().from_config(self.config("unet"))
        return network.eval().requires_grad_(False)

    def autoencoder(self) -> nn.Module | None:
        """The autoencoder of a latent model, float32, in eval mode, frozen; None for a pixel model."""
        for part in ("vae", "vqvae"):
            found = self.class_name(part)
            if found is not None:
                cls = _diffusers_class(found, AUTOENCODERS, f"{self.path}: {part}")
                return _load_part(cls, self.path / part, low_cpu_mem_usage=False)
        return None

    def text_encoder(self) -> tuple[nn.Module, Any] | None:
        """CLIP's text encoder and tokenizer; None if the pipeline has none.

        Raises:
            ValueError: If it is another kind of encoder, or a part is missing or damaged.
        """
        found = self.class_name("text_encoder")
        if found is None:
            return None
        if found != "CLIPTextModel":
            raise ValueError(f"{self.path}: text_encoder must be a CLIPTextModel, found {found}")
        from transformers import CLIPTextModel, CLIPTokenizer  # here, because the import takes seconds
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        encoder = _load_part(CLIPTextModel, self.path / "text_encoder")
        folder = self.path / "tokenizer"
        if not folder.is_dir():
            raise ValueError(f"{self.path}: the pipeline has a text encoder, but no folder 'tokenizer'")
        try:
            tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"tokenizer of the pipeline: {folder} cannot be read ({error})") from error
        return encoder, tokenizer

    def class_embeddings(self) -> Tensor | None:
        """Matrix of a class-conditional latent model, ``(classes + 1, width)``; None if there is none."""
        folder = self.path / CLASS_EMBEDDER
        if not folder.is_dir():
            return None
        files = sorted(folder.glob("*.safetensors"))
        tensors = read_tensors(files[0], CLASS_EMBEDDER)[0] if len(files) == 1 else {}
        if len(tensors) != 1 or next(iter(tensors.values())).dim() != 2:
            raise ValueError(f"{folder} must hold one safetensors file with one matrix (classes + 1, width)")
        return next(iter(tensors.values())).float()

    def copy_parts(self, target: Path) -> None:
        """Copy all but the U-Net's weights into another folder, which then is a pipeline but for them."""
        if target.resolve() == self.path.resolve():
            return
        shutil.copyfile(self.path / "model_index.json", target / "model_index.json")
        for part in (name for name in _PARTS if (self.path / name).is_dir()):
            (target / part).mkdir(exist_ok=True)
            files = [self.path / "unet" / "config.json"] if part == "unet" else sorted((self.path / part).iterdir())
            for file in files:
                if file.is_file():  # also a link, as the hub's cache has them
                    shutil.copyfile(file, target / part / file.name)

    def hash_of(self, part: str) -> str:
        """Content hash of all files of a part, 16 hex digits."""
        digest = hashlib.sha256()
        for path in sorted((self.path / part).rglob("*")):
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(self.path).as_posix()}:{content};".encode())
        return digest.hexdigest()[:16]


def open_pipeline(path: str) -> PipelineFolder:
    """The pipeline of a local folder, or of a hub id whose files are in the local cache or can be fetched.

    Args:
        path: Folder, or hub id ``owner/name``.

    Raises:
        ValueError: If there is neither, or the folder is no pipeline; found and accepted are named.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if not is_hub_id(path):
            raise ValueError(f"model.path: there is no folder {path}, and it is no hub id (owner/name); {_HOW}")
        folder = _fetch(path)
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "a file"
        raise ValueError(
            f"model.path: {path} is no diffusers pipeline: it has no model_index.json; found: {found or 'nothing'}. "
            f"Accepted: {_HOW}"
        )
    return PipelineFolder(folder, _read_json(index_path, "pipeline"))


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def _fetch(hub_id: str) -> Path:
    """Folder in the cache with the files of a hub id, downloaded where they are missing."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, etag_timeout=HUB_TIMEOUT_SECONDS
        )
    except Exception as error:  # whatever went wrong on the way, the user has the same two ways out
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model.path: there is no folder {hub_id}, and no such model could be fetched from the hub ({reason}). "
            f"Without network, {_HOW}"
        ) from error
    return Path(found)


def read_prompts(path: str | None) -> tuple[str, ...]:
    """Prompts of a text file, UTF-8, one a line; blank lines are left out.

    Raises:
        ValueError: If there is no file, it is not UTF-8, or it holds no prompt.
    """
    accepted = "a text file in UTF-8 with one prompt a line"
    if path is None:
        raise ValueError(f"model.prompts: this pipeline makes images from text; give {accepted}, found null")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"model.prompts: no file at {path}; accepted: {accepted}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"model.prompts: {path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"accepted: {accepted}"
        ) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise ValueError(f"model.prompts: {path} holds no prompt; accepted: {accepted}")
    return prompts


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        return parse_json_object(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{kind}: no file at {path}") from None
    except ValueError as error:
        raise ValueError(f"{kind}: {path} is no JSON ({error})") from error


def _diffusers_class(name: str, accepted: tuple[str, ...], where: str) -> Any:
    if name not in accepted:
        raise ValueError(f"{where} must be a {' or '.join(accepted)}, found {name}")
    import diffusers  # here, because its import takes seconds

    return getattr(diffusers, name)


def _load_part(cls: Any, folder: Path, **options: Any) -> nn.Module:
    """A network with all of its weights, float32, in eval mode, frozen.

    Raises:
        ValueError: If weights are missing, damaged, not safetensors, or of another shape.
    """
    kind = f"{folder.name} of the pipeline"
    if not list(folder.glob("*.safetensors")):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ValueError(f"{kind}: {folder} holds no safetensors file; found: {found}")
    try:
        network, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{kind}: {folder} cannot be read ({error})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{kind}: {folder} misses {len(missing)} weights, the first is {missing[0]}")
    loaded: nn.Module = network
    return loaded.float().eval().requires_grad_(False)
