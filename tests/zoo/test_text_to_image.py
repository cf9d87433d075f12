"""The embedded text-to-image model: captions reach the network, some are dropped, and guidance follows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.diffusion.schedule import TimestepSpacing, linear_alphas_cumprod, spaced_timesteps
from tmpq_exp.scenes import captions, prompts
from tmpq_exp.zoo.clip import DigitsCLIP, retrieval_percent
from tmpq_exp.zoo.embedded import embedded_file
from tmpq_exp.zoo.task import task_layers
from tmpq_exp.zoo.text import tokenize
from tmpq_exp.zoo.text_to_image import DigitsTextToImage, TextToImageNetwork, TextToImageTraining
from tmpq_exp.zoo.training import Recipe

ALPHAS = linear_alphas_cumprod(1000, 1e-4, 0.02)


class Listener(nn.Module):
    """Notes the tokens it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 1, 1)
        self.heard: list[Tensor] = []

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> SimpleNamespace:
        self.heard.append(tokens)
        return SimpleNamespace(sample=self.body(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_their_rate_and_only_in_training(dropout: float) -> None:
    torch.manual_seed(0)
    network: Any = Listener()
    module = TextToImageTraining(network, Recipe(1, 1e-3), ALPHAS, caption_dropout=dropout)
    labels = torch.arange(4000) % len(captions())
    images = torch.zeros(4000, 1, 2, 2)
    module.loss(images, labels)
    module.average_error(network, [(images, labels)], 1)
    told, expected = network.heard[0], tokenize(captions())[labels]
    dropped = (told == tokenize([""])).all(1)
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.02)
    assert torch.equal(told[~dropped], expected[~dropped])
    assert torch.equal(network.heard[1], expected)


@pytest.mark.parametrize("model", [DigitsTextToImage, DigitsCLIP])
def test_a_training_step_reads_nothing_back(model: type[DigitsTextToImage] | type[DigitsCLIP]) -> None:
    """On the meta device values cannot be read: a step that passes there lets a GPU run ahead."""
    module = model(recipe=Recipe(1, 1e-3)).training_module().to("meta")
    images, labels = torch.zeros(4, 1, 24, 24, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    module.training_step((images, labels), 0).backward()
    module.move_average(0.9)
    assert all(value.grad is not None for value in module.network.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        module.get_buffer("final_loss").item()


@pytest.fixture(scope="module")
def untrained() -> TextToImageNetwork:
    torch.manual_seed(0)
    return DigitsTextToImage().architecture().eval().requires_grad_(False)


def test_layers_are_those_of_the_unet_and_need_no_checkpoint(untrained: TextToImageNetwork) -> None:
    model = DigitsTextToImage("there/is/none.safetensors")
    assert model.layers() == task_layers(model.wrap(untrained))
    assert any("attn2" in shape.name for shape in model.layers())
    with torch.device("meta"):
        assert {value.device.type for value in model.architecture().parameters()} == {"meta"}


def test_an_image_has_the_prompt_of_its_number(untrained: TextToImageNetwork) -> None:
    task = DigitsTextToImage().wrap(untrained)
    states = task.conditioning([0, 3, 110, 113])["encoder_hidden_states"]
    torch.testing.assert_close(states[:2], untrained.embed(tokenize([prompts()[0], prompts()[3]])))
    assert torch.equal(states[2:], states[:2])


def test_guidance_moves_away_from_the_empty_prompt(untrained: TextToImageNetwork) -> None:
    x, timestep = torch.randn(1, 1, 24, 24), torch.tensor([500])
    states = untrained.embed(tokenize(["", prompts()[0]]))
    without, with_prompt = (untrained.unet(x, timestep, encoder_hidden_states=s.unsqueeze(0)).sample for s in states)
    guided = DigitsTextToImage(guidance_scale=3.0).wrap(untrained)
    expected = without + 3 * (with_prompt - without)
    torch.testing.assert_close(guided.guided(torch.cat([without, with_prompt])), expected)
    assert (DigitsTextToImage(guidance_scale=1).guided, DigitsTextToImage(guidance_scale=3).guided) == (False, True)


@pytest.mark.parametrize("scale", [0.5, float("nan")])
def test_guidance_below_one_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.guidance_scale must be at least 1, found {scale}"):
        DigitsTextToImage(guidance_scale=scale)


def test_training_needs_a_recipe() -> None:
    with pytest.raises(ValueError, match=r"model\.recipe is null"):
        DigitsTextToImage().training_module()


def test_generated_scenes_are_recognised() -> None:
    model = DigitsTextToImage()
    task, clip = model.task(), DigitsCLIP().load()
    timesteps = spaced_timesteps(1000, 10, TimestepSpacing.QUADRATIC)
    number = {text: index for index, text in enumerate(captions())}
    with torch.inference_mode():
        images = torch.cat([task.sample(task.unet, range(i, i + 22), timesteps, 0) for i in range(0, 110, 22)])
    assert retrieval_percent(clip, [(images, torch.tensor([number[text] for text in prompts()]))]) >= 80


def test_embedded_weights_are_small_and_frozen() -> None:
    network = DigitsTextToImage().load()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    folders = [embedded_file(name, "") for name in ("sd_digits", "clip_digits")]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12e6
