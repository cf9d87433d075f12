"""Prompt scores on a small CLIP that is saved and read as transformers does it, against torchmetrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tests.metrics.conftest import natural_images
from tmpq_exp.data import to_uint8
from tmpq_exp.metrics.clip import ImageTextEncoder, LocalClip, PromptScore, clip_digits, clip_score
from tmpq_exp.metrics.metric import Batch, MissingWeights
from tmpq_exp.scenes import CaptionedDigits, captions
from tmpq_exp.zoo.clip import DigitsCLIP
from tmpq_exp.zoo.weights import write_tensors

PROMPTS = ("a cat", "two cats on a mat", "a cat", "the mat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, a byte-level tokenizer without merges, and 32-pixel images."""
    path = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(words), "max_position_embeddings": 24},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


class Unwrapped:
    """A CLIP whose features come as tensors, as torchmetrics expects them."""

    def __init__(self, model: CLIPModel) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> Unwrapped:
        return self

    def eval(self) -> Unwrapped:
        return self

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        return tensor(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        return tensor(self.model.get_text_features(*inputs))


def tensor(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output.pooler_output
    assert isinstance(found, Tensor)
    return found


def test_the_score_is_torchmetrics(folder: Path) -> None:
    images = natural_images(4, 40, 0)
    model, processor = Unwrapped(CLIPModel.from_pretrained(folder)), CLIPProcessor.from_pretrained(folder)
    theirs = CLIPScore(lambda: (model, processor))  # type: ignore[arg-type, return-value]
    one_by_one = []
    for image, prompt in zip((images * 255).round().to(torch.uint8), PROMPTS, strict=True):
        theirs.reset()
        theirs.update(image[None], [prompt])  # alone: padded prompts differ in the last bits
        one_by_one.append(float(theirs.score))
    metric = clip_score(str(folder))
    noisy = images + 0.3 / 255  # as made, before they are rounded
    assert metric.values(Batch(noisy, prompts=PROMPTS)).tolist() == pytest.approx(one_by_one, rel=1e-4, abs=1e-3)
    assert max(one_by_one) - min(one_by_one) > 1
    measurement = metric.start()
    for part in (slice(0, 3), slice(3, 4)):
        measurement.update(Batch(noisy[part], prompts=PROMPTS[part]))
    assert measurement.value() == pytest.approx(sum(one_by_one) / 4, rel=1e-4, abs=1e-3)
    low, high = measurement.interval(50, 0) or (0, 0)
    assert low < measurement.value() < high


class Leaving(TorchFunctionMode):
    """Notes calls that copy a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_images_stay_where_they_are(folder: Path) -> None:
    encoder = LocalClip(folder)
    pixels = to_uint8(natural_images(3, 40, 0, channels=1))
    with torch.inference_mode(), Leaving() as leaving:
        encoder.image_features(pixels)
    assert leaving.found == []
    with leaving:
        pixels.cpu().numpy()
    assert leaving.found == ["cpu", "numpy"]


@pytest.mark.parametrize("shape", [(40, 40), (40, 64), (24, 24), (32, 32)])
def test_pixels_are_those_of_pil_within_two_gray_levels(shape: tuple[int, int], folder: Path) -> None:
    """Weights of a resize have 8 bits in PIL and 16 or more in torch, and each of its two passes rounds to bytes."""
    processor = LocalClip(folder).processor.image_processor
    pixels = to_uint8(natural_images(3, 64, 0)[..., : shape[0], : shape[1]])
    found = processor(list(pixels), return_tensors="pt")["pixel_values"]
    level = 1 / (255 * torch.tensor(processor.image_std).view(3, 1, 1))
    difference = ((found - torch.stack([by_pil(image, processor) for image in pixels])) / level).abs()
    assert found.shape == (3, 3, 32, 32)
    assert difference.max() < 2.01
    assert difference.mean() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_pixels_of_a_gpu_are_those_of_a_cpu_within_a_gray_level(folder: Path) -> None:
    processor = LocalClip(folder).processor.image_processor
    pixels = to_uint8(natural_images(3, 40, 0))
    here, there = (processor(list(images), return_tensors="pt")["pixel_values"] for images in (pixels, pixels.cuda()))
    assert there.device.type == "cuda"
    level = 1 / (255 * torch.tensor(processor.image_std).view(3, 1, 1))
    assert ((there.cpu() - here) / level).abs().max() < 1.01


def by_pil(image: Tensor, processor: Any) -> Tensor:
    """Pixels that the model gets of a colour image, by PIL: shorter side to 32, centre crop of 32, normalized."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = min(picture.size)
    width, height = (length * 32 // side for length in picture.size)
    left, top = (width - 32) // 2, (height - 32) // 2
    cut = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    scaled = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (scaled - mean) / std


def test_long_prompts_are_cut_and_gray_images_are_coloured(folder: Path) -> None:
    metric = clip_score(str(folder))
    gray = natural_images(2, 40, 0, channels=1)
    prompts = ("the " * 30 + "cat", "the " * 30 + "mat")
    one, other = metric.values(Batch(gray, prompts=prompts)).tolist()
    colour = metric.values(Batch(gray.expand(-1, 3, -1, -1), prompts=(prompts[0], prompts[0]))).tolist()
    assert [one, other] == pytest.approx(colour, abs=1e-4)


def test_the_fingerprint_knows_weights_and_processor(folder: Path, tmp_path: Path) -> None:
    base = clip_score(str(folder)).fingerprint()
    resized = Path(shutil.copytree(folder, tmp_path / "resized"))
    (settings,) = (
        path for path in resized.iterdir() if path.name in ("preprocessor_config.json", "processor_config.json")
    )
    changed = json.loads(settings.read_text(encoding="utf-8"))
    (changed.get("image_processor") or changed)["do_center_crop"] = False
    settings.write_text(json.dumps(changed), encoding="utf-8")
    other = clip_score(str(resized)).fingerprint()
    assert {key for key in base if base[key] != other[key]} == {"resize"}
    model = CLIPModel.from_pretrained(folder)
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path / "resized")
    assert clip_score(str(resized)).fingerprint()["extractor"] != base["extractor"]


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    del tensors["logit_scale"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing or of another size, first logit_scale"):
        clip_score(str(other))


def test_a_folder_that_is_missing_or_no_clip(folder: Path, tmp_path: Path) -> None:
    for path in (None, str(tmp_path / "nowhere")):
        with pytest.raises(MissingWeights, match=r"no folder of a CLIP at .* \(metrics\.clip_score\.path\)"):
            clip_score(path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json"):
        part = Path(shutil.copytree(folder, tmp_path / name))
        (part / name).unlink()
        with pytest.raises(ValueError, match=r"metrics\.clip_score\.path: .* must hold a CLIP with tokenizer"):
            clip_score(str(part))


class Brightness(ImageTextEncoder):
    """Angle by brightness of the image, and by length of the prompt."""

    def image_features(self, images: Tensor) -> Tensor:
        angle = images.float().mean((1, 2, 3)) / 255
        return torch.stack([angle.cos(), angle.sin()], 1)

    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        angle = torch.tensor([float(len(prompt)) for prompt in prompts])
        return torch.stack([angle.cos(), angle.sin()], 1)

    def fingerprint(self) -> dict[str, Any]:
        return {"extractor": "b"}


def test_scores_of_another_encoder_by_hand() -> None:
    metric = PromptScore("clip_brightness", Brightness(), (1, 2, 2))
    batch = Batch(torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(-1, -1, 2, 2), prompts=("", "", "x"))
    angles = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(metric.values(batch), 100 * angles.cos(), rtol=1e-6, atol=1e-6)
    assert metric.higher_is_better
    assert metric.fingerprint() == {"metric": "clip_brightness", "extractor": "b"}
    with pytest.raises(ValueError, match=r"clip_brightness takes images of shape \(1, 2, 2\), found \(3, 2, 2\)"):
        metric.check_images((3, 2, 2))


def test_the_embedded_clip_prefers_what_is_shown() -> None:
    metric = clip_digits()
    pixels, labels = CaptionedDigits(1, num_images=1, reference_images=1).reference_set
    shown = [captions()[label] for label in labels]
    metric.check_images((1, 24, 24))

    def score(prompts: Sequence[str]) -> Tensor:
        return metric.values(Batch(pixels.float() / 255, prompts=prompts))

    with torch.inference_mode():
        agreeing, differing = score(shown), score([*shown[-1:], *shown[:-1]])
    assert ((agreeing > differing).float().mean()) > 0.95
    assert agreeing.mean() > differing.mean() + 20
    assert (metric.name, metric.higher_is_better) == ("clip_digits", True)
    with pytest.raises(ValueError, match="does not know 'cat'"):
        score(["a cat"] * len(shown))


def test_the_fingerprint_of_the_embedded_clip_knows_its_weights(tmp_path: Path) -> None:
    network = DigitsCLIP().architecture()
    write_tensors(tmp_path / "other.safetensors", network.state_dict(), {"model": "clip_digits"})
    other, base = clip_digits(str(tmp_path / "other.safetensors")).fingerprint(), clip_digits().fingerprint()
    assert {key for key in base if base[key] != other[key]} == {"extractor"}
