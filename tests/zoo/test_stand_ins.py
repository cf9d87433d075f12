"""Stand-ins: made once, the same each time, without touching the random state of the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tmpq_exp.zoo.stand_ins import classifier_stand_in, pipeline_stand_in, resnet


@pytest.mark.parametrize("family", ["ldm_of_classes", "stable_diffusion"])
def test_a_stand_in_is_made_once_and_the_same_each_time(family: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    folders = [pipeline_stand_in(family, tmp_path / place) for place in ("a", "b")]
    assert torch.random.get_rng_state().equal(state)
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in folders
    ]
    assert contents[0] == contents[1] != {}
    marker = folders[0] / "pipeline" / "model_index.json"
    before = marker.stat().st_mtime_ns
    assert pipeline_stand_in(family, tmp_path / "a") == folders[0]
    assert marker.stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == [folders[0].name]


def test_an_unknown_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.depth must be one of 18, 34, 50, found 19"):
        classifier_stand_in("resnet_imagenet", 19, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_tells_images_apart() -> None:
    with torch.inference_mode():
        logits = resnet("resnet_cifar", 20)(torch.rand(8, 3, 32, 32))
    assert logits.shape == (8, 3)
    assert logits.std(dim=0).min() > 1e-3
