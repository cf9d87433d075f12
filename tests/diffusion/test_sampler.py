"""Samplers equal diffusers' on its timesteps, solve what can be solved exactly, and give image i in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.diffusion.sampler import (
    DDIM,
    DPMSolverPP2M,
    NoiseScheduleSampler,
    Prediction,
    RectifiedFlowEuler,
    Sampler,
    ddim_step,
    denoised_and_noise,
    dpm_solver_pp_2m_step,
    initial_noise,
    sample,
)
from tmpq_exp.diffusion.schedule import TimestepSpacing, linear_alphas_cumprod, spaced_timesteps

ALPHAS = linear_alphas_cumprod(1000, 1e-4, 0.02)
SPACINGS = list(TimestepSpacing)
SUBSETS = st.sets(st.integers(0, 999), min_size=1, max_size=12).map(lambda s: sorted(s, reverse=True))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictor(x: Tensor, timestep: int, step_index: int) -> Tensor:
    """Nonlinear stand-in for a network."""
    return torch.tanh(x.flip(-1) * (1 + timestep / 500)) + 0.1 * x


@pytest.mark.parametrize("kind", list(Prediction))
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50])
def test_ddim_equals_diffusers(num_steps: int, clip_sample: bool, set_alpha_to_one: bool, kind: Prediction) -> None:
    scheduler = DDIMScheduler(clip_sample=clip_sample, prediction_type=kind.value)
    final = 1.0 if set_alpha_to_one else float(ALPHAS[0])
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHAS, torch.tensor(final, dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    x = expected = 1.5 * random(2, 3, 4, 4)
    for timestep in timesteps:
        expected = scheduler.step(predictor(expected, timestep, 0), timestep, expected, eta=0.0).prev_sample
    y = sample(DDIM(ALPHAS, kind, clip_sample, final), predictor, x, timesteps)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("kind", list(Prediction))
@pytest.mark.parametrize(
    "timesteps",
    [(999,), (700, 3), (981, 720, 650, 300, 200, 12, 1), *(spaced_timesteps(1000, 20, s) for s in SPACINGS)],
)
def test_dpm_solver_equals_diffusers(timesteps: tuple[int, ...], kind: Prediction) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", prediction_type=kind.value
    )
    scheduler.set_timesteps(timesteps=timesteps)
    sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()
    scheduler.sigmas = torch.cat([sigmas[list(timesteps)], torch.zeros(1)])  # not rounded to float32
    x = expected = 1.5 * random(2, 3, 4, 4)
    for timestep in timesteps:
        expected = scheduler.step(predictor(expected, timestep, 0), timestep, expected).prev_sample
    y = sample(DPMSolverPP2M(ALPHAS, kind), predictor, x, timesteps)
    assert (y - expected).abs().max() <= 5e-6 * expected.abs().max()  # diffusers' states are float32


@pytest.mark.parametrize("num_steps", [1, 4, 7, 25])
def test_rectified_flow_equals_diffusers_at_trailing_timesteps(num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = spaced_timesteps(1000, num_steps, TimestepSpacing.TRAILING)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in timesteps])
    x = expected = 1.5 * random(2, 3, 4, 4)
    for timestep in scheduler.timesteps:  # diffusers' velocity is noise minus data
        velocity = predictor(expected, round(float(timestep)), 0)
        expected = scheduler.step(-velocity, timestep, expected).prev_sample.double()
    y = sample(RectifiedFlowEuler(1000), predictor, x, timesteps)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # diffusers' sigmas and states are float32


@settings(deadline=None)
@given(
    SUBSETS,
    st.sampled_from([DDIM, DPMSolverPP2M]),
    st.sampled_from(Prediction),
    st.booleans(),
)
def test_a_true_prediction_gives_the_clean_image_at_any_timesteps(
    timesteps: list[int], sampler: type[NoiseScheduleSampler], kind: Prediction, clip: bool
) -> None:
    x0, noise = random(2, 1, 4, 4).clamp(-1, 1), random(2, 1, 4, 4, seed=1)

    def predict(x: Tensor, timestep: int, step_index: int) -> Tensor:
        assert timesteps[step_index] == timestep
        alpha = ALPHAS[timestep]
        true_noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return true_noise if kind is Prediction.EPSILON else alpha.sqrt() * true_noise - (1 - alpha).sqrt() * x0

    start = ALPHAS[timesteps[0]].sqrt() * x0 + (1 - ALPHAS[timesteps[0]]).sqrt() * noise
    y = sample(sampler(ALPHAS, kind, clip), predict, start, timesteps)
    torch.testing.assert_close(y, x0, rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(SUBSETS)
def test_a_straight_flow_is_solved_exactly_at_any_timesteps(timesteps: list[int]) -> None:
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    told: list[int] = []

    def predict(x: Tensor, timestep: int, step_index: int) -> Tensor:
        told.append(timestep)
        return x0 - noise

    torch.testing.assert_close(sample(RectifiedFlowEuler(1000), predict, noise, timesteps), x0, rtol=1e-12, atol=1e-12)
    assert told == [timestep + 1 for timestep in timesteps]


def test_dpm_solver_is_of_second_order() -> None:
    """On x0 = e^lambda, where x / sigma is the integral of e^(2 lambda)."""

    def error(num_steps: int) -> float:
        lambdas = [-1 + 2 * i / num_steps for i in range(num_steps + 1)]
        alphas = [1 / (1 + math.exp(-2 * point)) for point in lambdas]
        x, previous, before = torch.zeros(1, dtype=torch.float64), None, None
        for (point, here), there in zip(zip(lambdas, alphas, strict=True), alphas[1:], strict=False):
            x0 = torch.full_like(x, math.exp(point))
            x = dpm_solver_pp_2m_step(x, x0, previous, here, there, before)
            previous, before = x0, here
        return abs(float(x) - math.sqrt(1 - alphas[-1]) * math.sinh(2))

    assert error(400) < 1e-4
    assert error(200) / error(400) == pytest.approx(4, rel=0.1)  # a first-order solver gives 2


def test_v_is_a_rotation_that_also_holds_without_any_signal() -> None:
    x0, noise = random(1, 1, 2, 2), random(1, 1, 2, 2, seed=1)
    for alpha in (0.0, 0.3, 0.99):
        signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
        found = denoised_and_noise(signal * x0 + sigma * noise, signal * noise - sigma * x0, alpha, Prediction.V)
        torch.testing.assert_close(found[0], x0)
        torch.testing.assert_close(found[1], noise)


def test_one_step_by_hand() -> None:
    x, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0]]]])
    # x0 = (2 - 0.6 * 1) / 0.8 = 1.75; next = 0.96 * 1.75 + 0.28 * 1
    assert ddim_step(x, noise, 0.64, 0.9216, clip_sample=False).item() == pytest.approx(1.96)
    assert ddim_step(x, noise, 0.64, 0.9216, clip_sample=True).item() == pytest.approx(1.24)


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(ALPHAS),
        DDIM(ALPHAS, clip_sample=True),
        DDIM(ALPHAS, Prediction.V),
        DPMSolverPP2M(ALPHAS),
        RectifiedFlowEuler(),
    ],
)
def test_states_and_predictions_are_left_as_they_are(sampler: Sampler) -> None:
    x, prediction = 3 * random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    prediction_before = prediction.clone()
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(state: Tensor, timestep: int, step_index: int) -> Tensor:
        seen.append((state, state.clone()))
        return prediction

    result = sample(sampler, predict, x, [900, 100, 3])
    assert torch.equal(prediction, prediction_before)
    assert len(seen) == 3
    assert seen[0][0] is x
    assert all(torch.equal(state, copy) for state, copy in seen)
    assert torch.equal(sample(sampler, predict, x, [900, 100, 3]), result)  # nothing is left of the batch before


def test_what_tells_samplers_apart() -> None:
    samplers = [
        DDIM(ALPHAS),
        DDIM(ALPHAS, clip_sample=True),
        DDIM(ALPHAS, Prediction.V),
        DDIM(ALPHAS, final_alpha_cumprod=0.99),
        DPMSolverPP2M(ALPHAS),
        RectifiedFlowEuler(1000),
    ]
    assert len({sampler.description for sampler in samplers}) == len(samplers)
    assert all(sampler.num_train_timesteps == 1000 == len(sampler.schedule) for sampler in samplers)


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
