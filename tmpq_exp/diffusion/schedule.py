"""Owns the time axis: the noise schedule, the groups that timesteps are chosen from, and evenly laid sequences."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Choice = TypeVar("_Choice", bound=Enum)


class TimestepRule(str, Enum):
    """How the training timesteps are cut into groups."""

    QUADRATIC = "quadratic"
    UNIFORM = "uniform"


class TimestepSpacing(str, Enum):
    """How a sequence of kept timesteps is laid without a search."""

    QUADRATIC = "quadratic"
    LEADING = "leading"
    TRAILING = "trailing"


def linear_alphas_cumprod(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Share of signal variance left after each timestep, ``prod(1 - beta)`` over linearly spaced betas.

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: Variance of the noise added at timestep 0, in (0, 1).
        beta_end: Variance of the noise added at timestep T - 1, in ``[beta_start, 1)``.

    Returns:
        ``(T,)``, float64, on the CPU, strictly decreasing within (0, 1).

    Raises:
        ValueError: If an argument lies outside its range.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, section 4 and equation 4.

    Differs from diffusers' schedulers, which multiply in float32.
    """
    import torch  # here, because a configuration is checked with this module and should not wait for torch

    _check_num_train_timesteps(num_train_timesteps)
    if not 0 < beta_start < 1:
        raise ValueError(f"beta_start must lie in (0, 1), found {beta_start}")
    if not beta_start <= beta_end < 1:
        raise ValueError(f"beta_end must lie in [beta_start, 1) = [{beta_start}, 1), found {beta_end}")
    betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    return (1 - betas).cumprod(dim=0)


def timestep_groups(num_train_timesteps: int, num_groups: int, rule: TimestepRule) -> tuple[range, ...]:
    """Partition ``0..T-1`` into K non-empty runs of consecutive timesteps, one kept timestep each.

    ``quadratic`` starts group j at ``floor(0.8 T j^2 / (K-1)^2)``, so that fine detail (small timesteps) gets narrow
    groups; where two starts coincide the later is raised by as little as keeps every group non-empty.
    ``uniform`` starts group j at ``floor(T j / K)``.

    Args:
        num_train_timesteps: T, at least 1.
        num_groups: K, the number of inference steps, in 1..T.
        rule: The cut rule.

    Returns:
        K ranges, ascending; together they are ``range(T)``.

    Raises:
        ValueError: If K lies outside 1..T or the rule is unknown.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: non-uniform grouping.

    Differs from the authors' release, which squares floats (off by one at some K) and loses groups at large K.
    """
    _check_num_inference_steps(num_train_timesteps, num_groups)
    rule = _member(TimestepRule, rule, "timestep_rule")
    if rule is TimestepRule.UNIFORM:
        starts = [j * num_train_timesteps // num_groups for j in range(num_groups)]
    else:
        starts = [0]
        for j in range(1, num_groups):
            cut = 4 * num_train_timesteps * j * j // (5 * (num_groups - 1) ** 2)
            starts.append(max(cut, starts[-1] + 1))
    return tuple(range(low, high) for low, high in zip(starts, [*starts[1:], num_train_timesteps], strict=True))


def group_minima(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Smallest timestep of each ascending group, in sampling order (descending)."""
    return tuple(min(group) for group in reversed(groups))


def standing_timestep(group: range, spacing: TimestepSpacing) -> int:
    """The timestep of an ascending group where none is searched: its largest for ``trailing``, else its smallest."""
    return group[-1] if spacing is TimestepSpacing.TRAILING else group[0]


def spaced_timesteps(num_train_timesteps: int, num_steps: int, spacing: TimestepSpacing) -> tuple[int, ...]:
    """Kept timesteps of a fixed schedule, in sampling order.

    Args:
        num_train_timesteps: T, at least 1.
        num_steps: K, in 1..T.
        spacing: ``quadratic``: the minima of the quadratic groups, which is DDIM's quadratic schedule. ``leading``:
            multiples of ``T // K`` from 0. ``trailing``: ``round(T i / K) - 1`` (ties to even), so that the last
            training timestep is always the first.

    Returns:
        K timesteps, strictly descending, each in 0..T-1.

    Raises:
        ValueError: If K lies outside 1..T or the spacing is unknown.

    References:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502, appendix D.2 (quadratic);
        Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", arXiv 2305.08891, table 2
        (leading and trailing).

    Differs from diffusers in that ``trailing`` is rounded in rationals, not in floats.
    """
    _check_num_inference_steps(num_train_timesteps, num_steps)
    spacing = _member(TimestepSpacing, spacing, "timestep_spacing")
    if spacing is TimestepSpacing.QUADRATIC:
        return group_minima(timestep_groups(num_train_timesteps, num_steps, TimestepRule.QUADRATIC))
    if spacing is TimestepSpacing.LEADING:
        return tuple(j * (num_train_timesteps // num_steps) for j in reversed(range(num_steps)))
    return tuple(round(Fraction(num_train_timesteps * i, num_steps)) - 1 for i in range(num_steps, 0, -1))


def _check_num_train_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, found {num_train_timesteps}")


def _check_num_inference_steps(num_train_timesteps: int, num_inference_steps: int) -> None:
    _check_num_train_timesteps(num_train_timesteps)
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be in 1..{num_train_timesteps} (num_train_timesteps), "
            f"found {num_inference_steps}"
        )


def _member(choices: type[_Choice], value: object, name: str) -> _Choice:
    """Enum member of a value, so that a plain string works and a misspelt one is an error."""
    try:
        return choices(value)
    except ValueError:
        accepted = ", ".join(str(choice.value) for choice in choices)
        raise ValueError(f"{name} must be one of {accepted}, found {value!r}") from None
