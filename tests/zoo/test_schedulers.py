"""A sampler follows the scheduler of a pipeline: its schedule, clipping and end; what it cannot follow is named."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from tmpq_exp.diffusion.sampler import DDIM, DPMSolverPP2M, Prediction, RectifiedFlowEuler
from tmpq_exp.zoo.schedulers import FOLLOWED, SamplerName, sampler_of

SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedule_is_that_of_the_scheduler(name: str, beta_schedule: str) -> None:
    config = {"_class_name": name, "beta_schedule": beta_schedule}
    sampler = sampler_of(config, SamplerName.DPM_SOLVER_PP_2M, False, "here")
    assert isinstance(sampler, DPMSolverPP2M)
    expected = getattr(diffusers, name)(beta_schedule=beta_schedule).alphas_cumprod
    torch.testing.assert_close(sampler.alphas_cumprod, expected.double(), rtol=1e-6, atol=1e-6)
    assert isinstance(sampler_of(config, SamplerName.RECTIFIED_FLOW, None, "here"), RectifiedFlowEuler)


def test_a_sampler_clips_and_ends_as_the_scheduler_does() -> None:
    ddpm = sampler_of({"_class_name": "DDPMScheduler"}, SamplerName.DDIM, None, "here")
    pndm = sampler_of({"_class_name": "PNDMScheduler"}, SamplerName.DDIM, None, "here")
    assert isinstance(ddpm, DDIM)
    assert isinstance(pndm, DDIM)
    assert (ddpm.clip_sample, ddpm.final_alpha_cumprod) == (True, 1.0)
    assert (pndm.clip_sample, pndm.final_alpha_cumprod) == (False, float(pndm.alphas_cumprod[0]))
    given = sampler_of({"_class_name": "DDPMScheduler"}, SamplerName.DDIM, False, "here")
    assert isinstance(given, DDIM)
    assert not given.clip_sample
    zero_snr = SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    sampler = sampler_of(zero_snr, SamplerName.DDIM, None, "here")
    assert isinstance(sampler, DDIM)
    assert sampler.prediction is Prediction.V
    assert float(sampler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "follows a FlowMatchEulerDiscreteScheduler; accepted: DDIM",
        ),
        ({"_class_name": None}, "follows a None"),
        ({"beta_schedule": "steep"}, "DDIMScheduler has no noise schedule that is known"),
        ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, found 'sample'"),
        ({"thresholding": True}, "dynamic thresholding"),
        ({"clip_sample": True, "clip_sample_range": 2.0}, r"clip_sample_range must be 1\.0, found 2\.0"),
        ({"rescale_betas_zero_snr": True}, "leaves no signal at the last timestep"),
    ],
)
def test_schedulers_that_no_sampler_follows(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        sampler_of(SCHEDULER | changes, SamplerName.DDIM, None, "scheduler of FOLDER")
    assert str(error.value).startswith("scheduler of FOLDER: ")
