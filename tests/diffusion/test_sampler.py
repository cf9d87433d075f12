"""DDIM equals diffusers' on its timesteps, solves what can be solved exactly, and gives image i in any batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.diffusion.sampler import ddim_sample, ddim_step, initial_noise
from tmpq_exp.diffusion.schedule import linear_alphas_cumprod

ALPHAS = linear_alphas_cumprod(1000, 1e-4, 0.02)
SUBSETS = st.sets(st.integers(0, 999), min_size=1, max_size=12).map(lambda s: sorted(s, reverse=True))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictor(x: Tensor, timestep: int, step_index: int) -> Tensor:
    """Nonlinear stand-in for a network."""
    return torch.tanh(x.flip(-1) * (1 + timestep / 500)) + 0.1 * x


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50])
def test_equals_diffusers_on_its_own_timesteps(num_steps: int, clip_sample: bool) -> None:
    scheduler = DDIMScheduler(clip_sample=clip_sample, set_alpha_to_one=True, beta_start=1e-4, beta_end=0.02)
    scheduler.alphas_cumprod = ALPHAS
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    x = expected = 1.5 * random(2, 3, 4, 4)
    for timestep in timesteps:
        expected = scheduler.step(predictor(expected, timestep, 0), timestep, expected, eta=0.0).prev_sample
    y = ddim_sample(predictor, x, timesteps, ALPHAS, clip_sample=clip_sample)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(SUBSETS, st.booleans())
def test_with_the_true_noise_any_subset_of_timesteps_gives_the_clean_image(timesteps: list[int], clip: bool) -> None:
    x0, noise = random(2, 1, 4, 4).clamp(-1, 1), random(2, 1, 4, 4, seed=1)

    def true_noise(x: Tensor, timestep: int, step_index: int) -> Tensor:
        assert timesteps[step_index] == timestep
        return (x - ALPHAS[timestep].sqrt() * x0) / (1 - ALPHAS[timestep]).sqrt()

    start = ALPHAS[timesteps[0]].sqrt() * x0 + (1 - ALPHAS[timesteps[0]]).sqrt() * noise
    y = ddim_sample(true_noise, start, timesteps, ALPHAS, clip_sample=clip)
    torch.testing.assert_close(y, x0, rtol=1e-8, atol=1e-8)


def test_one_step_by_hand() -> None:
    x, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0]]]])
    # x0 = (2 - 0.6 * 1) / 0.8 = 1.75; next = 0.96 * 1.75 + 0.28 * 1
    assert ddim_step(x, noise, 0.64, 0.9216, clip_sample=False).item() == pytest.approx(1.96)
    assert ddim_step(x, noise, 0.64, 0.9216, clip_sample=True).item() == pytest.approx(1.24)


@pytest.mark.parametrize("clip_sample", [False, True])
def test_inputs_are_left_as_they_are(clip_sample: bool) -> None:
    x, noise = 3 * random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    x_before, noise_before = x.clone(), noise.clone()
    ddim_step(x, noise, 0.5, 0.9, clip_sample=clip_sample)
    states: list[tuple[Tensor, Tensor, int]] = []
    ddim_sample(
        lambda *_: noise,
        x,
        [900, 100, 3],
        ALPHAS,
        clip_sample=clip_sample,
        on_state=lambda state, timestep: states.append((state, state.clone(), timestep)),
    )
    assert torch.equal(x, x_before)
    assert torch.equal(noise, noise_before)
    assert [timestep for _, _, timestep in states] == [900, 100, 3]
    assert all(torch.equal(state, copy) for state, copy, _ in states)
    assert torch.equal(states[0][0], x)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), st.integers(0, 10**9))
def test_noise_of_an_image_is_the_same_in_any_batch(indices: list[int], seed: int) -> None:
    noise = initial_noise((2, 3, 3), indices, seed)
    assert noise.shape == (len(indices), 2, 3, 3)
    for row, index in zip(noise, indices, strict=True):
        assert torch.equal(row, initial_noise((2, 3, 3), [index], seed)[0])
        assert not torch.equal(row, initial_noise((2, 3, 3), [index + 1], seed)[0])
        assert not torch.equal(row, initial_noise((2, 3, 3), [index], seed + 1)[0])


def test_noise_is_unit_gaussian() -> None:
    noise = initial_noise((1, 16, 16), range(200), 0)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.15)
