"""From the scheduler of a diffusers pipeline to a sampler that follows the same schedule at any kept timesteps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from tmpq_exp.diffusion.sampler import DDIM, DPMSolverPP2M, Prediction, RectifiedFlowEuler, Sampler

FOLLOWED = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of a discrete variance-preserving schedule; the network does not know which of them asks it."""


SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Settings that make the schedule; the same in all of these schedulers."""


class SamplerName(str, Enum):
    """Samplers that a pipeline may run with."""

    DDIM = "ddim"
    DPM_SOLVER_PP_2M = "dpm_solver_pp_2m"
    RECTIFIED_FLOW = "rectified_flow"


def sampler_of(config: Mapping[str, Any], name: SamplerName, clip_sample: bool | None, source: str) -> Sampler:
    """The sampler of this name on the schedule of a scheduler.

    Args:
        config: Content of ``scheduler_config.json``.
        name: Sampler. A rectified flow takes the length of the schedule only: its pipelines carry the scheduler of the
            model they were made from.
        clip_sample: Whether the predicted x_0 is clipped to [-1, 1]; None asks the scheduler.
        source: Where the config is from, for messages.

    Raises:
        ValueError: If the scheduler has no such schedule, or does something that the sampler does not.
    """
    class_name = config.get("_class_name")
    if class_name not in FOLLOWED:
        raise ValueError(f"{source}: no sampler here follows a {class_name}; accepted: {', '.join(FOLLOWED)}")
    settings = _defaults(str(class_name)) | dict(config)
    if name is SamplerName.RECTIFIED_FLOW:
        return RectifiedFlowEuler(int(settings["num_train_timesteps"]))
    alphas_cumprod = _alphas_cumprod(settings, source)
    prediction = _prediction(settings, source)
    if float(alphas_cumprod[-1]) <= 0 and (name is not SamplerName.DDIM or prediction is not Prediction.V):
        raise ValueError(
            f"{source}: rescale_betas_zero_snr=true leaves no signal at the last timestep; only sampler ddim with "
            f"prediction_type v_prediction can start there, found {name.value} with {prediction.value}"
        )
    clip = _clips(settings, source) if clip_sample is None else clip_sample
    if name is SamplerName.DPM_SOLVER_PP_2M:
        return DPMSolverPP2M(alphas_cumprod, prediction, clip)
    final = 1.0 if settings.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
    return DDIM(alphas_cumprod, prediction, clip, final)


def _defaults(class_name: str) -> dict[str, Any]:
    """What a scheduler takes for settings that its config leaves out."""
    import diffusers  # here, because its import takes seconds

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _alphas_cumprod(settings: Mapping[str, Any], source: str) -> Tensor:
    """Cumulative alphas as diffusers computes them, in float64 but rounded to its float32."""
    from diffusers import DDIMScheduler

    try:
        scheduler = DDIMScheduler(**{key: settings[key] for key in SCHEDULE_KEYS if key in settings})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{source}: {settings['_class_name']} has no noise schedule that is known ({error})"
        ) from error
    alphas_cumprod: Tensor = scheduler.alphas_cumprod.double().cpu()
    return alphas_cumprod


def _prediction(settings: Mapping[str, Any], source: str) -> Prediction:
    found = settings.get("prediction_type", Prediction.EPSILON.value)
    try:
        return Prediction(found)
    except ValueError:
        accepted = ", ".join(kind.value for kind in Prediction)
        raise ValueError(f"{source}: prediction_type must be one of {accepted}, found {found!r}") from None


def _clips(settings: Mapping[str, Any], source: str) -> bool:
    """Whether the scheduler clips x_0 to [-1, 1]."""
    if settings.get("thresholding", False):
        raise ValueError(f"{source}: thresholding=true (dynamic thresholding) is not followed; accepted is false")
    clips = bool(settings.get("clip_sample", False))
    if clips and settings.get("clip_sample_range", 1.0) != 1.0:
        found = settings["clip_sample_range"]
        raise ValueError(f"{source}: clip_sample_range must be 1.0, found {found}; or set model.clip_sample=false")
    return clips
