"""The embedded models: the classifier knows digits it never saw, and knows what the generator drew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tmpq_exp.data import DigitsData
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.zoo.digits import DigitsClassifier, DigitsDDPM
from tmpq_exp.zoo.training import Recipe, top1_percent
from tmpq_exp.zoo.weights import content_hash, write_tensors


def test_the_unet_is_small_and_frozen() -> None:
    task = DigitsDDPM().task()
    assert sum(parameter.numel() for parameter in task.unet.parameters()) <= 1.5e6
    assert not any(parameter.requires_grad for parameter in task.unet.parameters())
    assert not any(module.training for module in task.unet.modules())
    assert task.weights_hash == content_hash(task.unet.state_dict())
    assert task.num_train_timesteps == 1000


def test_the_classifier_knows_digits_it_never_saw() -> None:
    data = DigitsData(64, holdout_fraction=0.2)
    assert top1_percent(DigitsClassifier().load(), data.val_dataloader()) >= 95  # 98.6 % measured


def test_generated_digits_are_recognised() -> None:
    task, classifier = DigitsDDPM().task(), DigitsClassifier().load()
    timesteps = spaced_timesteps(1000, 10, TimestepSpacing.QUADRATIC)
    with torch.inference_mode():
        images = torch.cat([task.sample(task.unet, range(i, i + 50), timesteps, 0) for i in range(0, 200, 50)])
        agreement = (classifier(images).argmax(1) == torch.arange(200) % 10).float().mean()
    assert agreement >= 0.97  # 99.0 to 100 % measured at three seeds


def test_labels_follow_the_image_index() -> None:
    task = DigitsDDPM().task()
    assert task.conditioning([0, 9, 10, 123])["class_labels"].tolist() == [0, 9, 0, 3]


@pytest.mark.parametrize("model", [DigitsDDPM, DigitsClassifier])
def test_a_checkpoint_of_ones_own(model: type[DigitsDDPM] | type[DigitsClassifier], tmp_path: Path) -> None:
    network = model().architecture()
    write_tensors(tmp_path / "own.safetensors", network.state_dict(), {"model": model.name})
    loaded = model(checkpoint=str(tmp_path / "own.safetensors")).load()
    assert content_hash(loaded.state_dict()) == content_hash(network.state_dict())
    other = DigitsClassifier if model is DigitsDDPM else DigitsDDPM
    with pytest.raises(ValueError, match=r"own\.safetensors holds weights of model"):
        other(checkpoint=str(tmp_path / "own.safetensors")).load()


@pytest.mark.parametrize("model", [DigitsDDPM, DigitsClassifier])
def test_training_needs_a_recipe(model: type[DigitsDDPM] | type[DigitsClassifier]) -> None:
    with pytest.raises(ValueError, match=r"model\.recipe is null"):
        model().training_module()
    assert model(recipe=Recipe(1, 1e-3)).training_module().recipe.num_steps == 1
