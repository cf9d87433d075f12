"""A task makes image i in any batch, follows guidance, decodes, and is told apart by all that its images depend on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.cost import CostModel
from tmpq_exp.diffusion.sampler import DDIM, DPMSolverPP2M, Prediction, RectifiedFlowEuler, Sampler
from tmpq_exp.diffusion.schedule import TimestepSpacing, linear_alphas_cumprod
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.zoo.conditioning import ClassLabels, Conditioning, Prompts, Unconditional
from tmpq_exp.zoo.decoding import Autoencoder, Pixels
from tmpq_exp.zoo.task import DiffusionTask, task_layers

ALPHAS = linear_alphas_cumprod(100, 1e-3, 0.1)


class Network(nn.Module):
    """A convolution, moved by the timestep and by whatever condition it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Any:
        self.calls.append(len(x))
        told = timestep.float()
        if "class_labels" in conditioning:
            told = told + conditioning["class_labels"]
        if "encoder_hidden_states" in conditioning:
            told = told + conditioning["encoder_hidden_states"].sum((1, 2))
        return SimpleNamespace(sample=(self.conv(x) + told.view(-1, 1, 1, 1) / 100).tanh())


class Decoding(nn.Module):
    """Stands for an autoencoder: four pixels of three channels for one of two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.ConvTranspose2d(2, 3, 2, stride=2)

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=self.up(latents))


def embed(prompt: str) -> Tensor:
    return torch.tensor([float(ord(letter)) for letter in f"{prompt:5}"]).view(5, 1) / 100


PROMPTS = Prompts(("one", "two", "three"), embed, "letters")
CLASSES = ClassLabels(3, null_label=3)
SAMPLERS = [DDIM(ALPHAS), DDIM(ALPHAS, Prediction.V, True), DPMSolverPP2M(ALPHAS), RectifiedFlowEuler(100)]


def make_task(**changes: Any) -> DiffusionTask:
    facts: dict[str, Any] = {"name": "tiny", "unet": Network(), "sample_shape": (2, 4, 6), "sampler": DDIM(ALPHAS)}
    return DiffusionTask(**(facts | changes))


@torch.no_grad()
def latents(task: DiffusionTask, indices: list[int], timesteps: tuple[int, ...] = (90, 50, 3)) -> Tensor:
    return task.latents(task.unet, indices, timesteps, 7)


@torch.no_grad()
def images(task: DiffusionTask, indices: list[int], timesteps: tuple[int, ...] = (90, 50, 3)) -> Tensor:
    return task.sample(task.unet, indices, timesteps, 7)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.description)
@pytest.mark.parametrize(
    ("conditions", "scale"),
    [(Unconditional(), 1.0), (CLASSES, 1.0), (CLASSES, 3.0), (PROMPTS, 1.0), (PROMPTS, 3.0)],
)
def test_an_image_is_the_same_in_any_batch(sampler: Sampler, conditions: Conditioning, scale: float) -> None:
    task = make_task(sampler=sampler, conditions=conditions, guidance_scale=scale)
    together = latents(task, [4, 0, 2])
    for row, index in zip(together, [4, 0, 2], strict=True):
        torch.testing.assert_close(row, latents(task, [index])[0], rtol=1e-5, atol=1e-5)
    assert not latents(task, [0, 4])[1].equal(latents(task, [0, 1])[1])


@pytest.mark.parametrize(
    ("one", "other"), [(ClassLabels(3), ClassLabels(2)), (PROMPTS, Prompts(("one", "two", "four"), embed, "letters"))]
)
def test_an_image_follows_its_condition(one: Conditioning, other: Conditioning) -> None:
    found = latents(make_task(conditions=one), [0, 2])
    changed = latents(make_task(conditions=other), [0, 2])
    assert found[0].equal(changed[0])
    assert not found[1].isclose(changed[1]).any()


@pytest.mark.parametrize("conditions", [CLASSES, PROMPTS])
def test_guidance_is_one_doubled_call_of_both_predictions(conditions: Conditioning) -> None:
    task = make_task(conditions=conditions, guidance_scale=2.5)
    x = torch.randn(2, 2, 4, 6)
    t = torch.full((2,), 9)
    with torch.no_grad():
        with_condition = task.unet(x, t, **conditions.inputs([0, 1])).sample
        without = task.unet(x, t, **conditions.null_inputs(2)).sample
        torch.testing.assert_close(
            task.guided(torch.cat([without, with_condition])), (1 - 2.5) * without + 2.5 * with_condition
        )
        assert torch.equal(task.guided(torch.cat([without, without])), without)
    task.unet.calls.clear()
    latents(task, [0, 1, 2])
    assert task.unet.calls == [6, 6, 6]
    plain = replace(task, guidance_scale=1.0)
    latents(plain, [0, 1, 2])
    assert task.unet.calls == [6, 6, 6, 3, 3, 3]


def test_guidance_counts_both_halves_of_a_call() -> None:
    task = make_task(conditions=CLASSES)
    costs = []
    for each in (task, replace(task, guidance_scale=2.0)):
        cost = CostModel(task_layers(each), each.calls_per_step)
        costs.append(cost.bitops(Candidate((5, 1), (cost.uniform(8, 8, 8),))))
    assert costs[1] == 2 * costs[0] == 2 * 2 * (2 * 2 * 9 * 4 * 6) * 64


def test_guidance_needs_an_empty_condition() -> None:
    for conditions in (Unconditional(), ClassLabels(3)):
        with pytest.raises(ValueError, match="guidance needs a model with an empty condition"):
            images(make_task(conditions=conditions, guidance_scale=2.0), [0])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.description)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_calibration_sees_what_the_network_is_called_with(sampler: Sampler, scale: float) -> None:
    task = make_task(sampler=sampler, conditions=CLASSES, guidance_scale=scale)
    states = trajectory_states(task, 2, 4, 0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = task.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, kwargs["class_labels"])), with_kwargs=True
    )
    with torch.no_grad():
        for state in states:
            state.run(task.unet, torch.device("cpu"))
        called = seen.copy()
        seen.clear()
        assert len(trajectory_states(task, 2, 4, 0)) == 4
    handle.remove()
    for one, other in zip(called, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    labels = [0, 1] if scale == 1 else [3, 3, 0, 1]
    assert states[0].conditioning["class_labels"].tolist() == labels
    assert called[0][1].tolist() == [100 if isinstance(sampler, RectifiedFlowEuler) else 99] * len(labels)


def test_latents_are_decoded_one_by_one() -> None:
    module = Decoding()
    task = make_task(decoder=Autoencoder(module, 0.5, 2))
    assert task.image_shape == (3, 8, 12)
    with torch.no_grad():
        latents = task.latents(task.unet, [0, 1], (90, 3), 7)
        expected = torch.cat([module.decode(latents[i : i + 1] / 0.5).sample for i in range(2)])
    made = images(task, [0, 1], (90, 3))
    assert made.shape == (2, 3, 8, 12)
    assert torch.equal(made, (expected / 2 + 0.5).clamp(0, 1))
    assert torch.equal(make_task().decode(latents), (latents / 2 + 0.5).clamp(0, 1))


def test_nan_stays_nan() -> None:
    x0 = torch.tensor([[[[0.5, float("nan"), float("inf"), 3.0]]]])
    images = make_task().decode(x0)
    assert images[0, 0, 0].isnan().tolist() == [False, True, True, False]
    assert images[0, 0, 0, 3] == 1


def test_prompts_follow_the_image_index_and_are_embedded_once() -> None:
    asked: list[str] = []

    def noting(prompt: str) -> Tensor:
        asked.append(prompt)
        return embed(prompt)

    prompts = Prompts(["a", "b"], noting, "letters", negative_prompt="bad")
    found = prompts.inputs([0, 3, 2])["encoder_hidden_states"]
    assert torch.equal(found, torch.stack([embed("a"), embed("b"), embed("a")]))
    assert torch.equal(prompts.null_inputs(1)["encoder_hidden_states"][0], embed("bad"))
    assert asked == ["a", "b", "bad"]
    with pytest.raises(ValueError, match="at least one prompt"):
        Prompts([], noting, "letters")


def test_embeddings_follow_the_network_and_are_made_anew_there() -> None:
    class Embedder:
        """Says where it was last moved to."""

        device = "cpu"

        def to(self, device: torch.device) -> None:
            self.device = device.type

        def __call__(self, prompt: str) -> Tensor:
            return torch.full((2, 3), float(len(self.device)))

    prompts = Prompts(["a"], Embedder(), "letters")
    for device, value in (("cpu", 3), ("meta", 4), ("meta", 4), ("cpu", 3)):
        prompts.follow(torch.device(device))
        assert prompts.inputs([0])["encoder_hidden_states"].unique().tolist() == [value]


def test_embedded_classes_are_rows_of_a_table() -> None:
    table = torch.randn(4, 1, 6)
    conditions = ClassLabels(3, null_label=3, embeddings=table)
    assert torch.equal(conditions.inputs([1, 5])["encoder_hidden_states"], table[[1, 2]])
    assert torch.equal(conditions.null_inputs(2)["encoder_hidden_states"], table[[3, 3]])
    with pytest.raises(ValueError, match="num_classes must be at least 1, found 0"):
        ClassLabels(0)


def test_the_fingerprint_changes_with_all_that_images_depend_on() -> None:
    other_network, other_decoder = Network(), Decoding()
    other_network.conv.weight.data += 1
    other_decoder.up.bias.data += 1
    changes: list[dict[str, Any]] = [
        {},
        {"unet": other_network},
        {"sample_shape": (2, 6, 4)},
        *({"sampler": sampler} for sampler in SAMPLERS[1:]),
        {"sampler": DDIM(linear_alphas_cumprod(100, 1e-3, 0.2))},
        {"conditions": ClassLabels(3)},
        {"conditions": ClassLabels(4)},
        {"conditions": ClassLabels(3, null_label=3)},
        {"conditions": ClassLabels(3, embeddings=torch.zeros(3, 1, 2))},
        {"conditions": ClassLabels(3, embeddings=torch.ones(3, 1, 2))},
        {"conditions": PROMPTS},
        {"conditions": Prompts(("one", "two"), embed, "letters")},
        {"conditions": Prompts(("one", "two", "three"), embed, "other letters")},
        {"conditions": Prompts(("one", "two", "three"), embed, "letters", negative_prompt="bad")},
        {"guidance_scale": 2.0},
        {"decoder": Autoencoder(Decoding(), 0.5, 2)},
        {"decoder": Autoencoder(other_decoder, 0.5, 2)},
        {"decoder": Autoencoder(Decoding(), 0.6, 2)},
    ]
    fingerprints = [str(make_task(**change).fingerprint) for change in changes]
    assert len(set(fingerprints)) == len(changes)
    same = make_task(name="another name", decoder=Pixels(), spacing=TimestepSpacing.TRAILING)
    assert str(same.fingerprint) == fingerprints[0]
