"""The model card beside a recipe: what it is, what was measured, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmpq_exp.quant.allocation import DIRECT_TILE, Candidate


def model_card(recipe: Mapping[str, Any]) -> str:
    """Markdown for a ``recipe.json``.

    Args:
        recipe: Its content.
    """
    candidate = Candidate.from_json(recipe["candidate"])
    rows = {
        "float model": f"{recipe['model']}, weights {recipe['weights_hash']}",
        "timesteps": f"{len(candidate.timesteps)} kept: {', '.join(map(str, candidate.timesteps))}",
        "bits of weights": _counts(bits for a in candidate.allocations for bits in a.weight_bits),
        "bits of activations": _counts(bits for a in candidate.allocations for bits in a.act_bits),
        "layers in the Winograd domain": _counts(t for a in candidate.allocations for t in a.tiles if t != DIRECT_TILE),
        "sampler": recipe["sampler"]["sampler"],
        "settings": _plain(recipe["source"].get("settings") or "the model's own"),
        **{f"measured: {key}": _plain(value) for key, value in recipe["evidence"].items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {recipe['model']}, compressed\n\n{_NOTE}\n\n| | |\n| --- | --- |\n{table}\n\n{_usage(recipe)}\n"


_NOTE = (
    "A diffusion model with fewer steps and fewer bits. Quantization is simulated: integers are held in floats, and "
    "nothing here is faster on hardware yet. The float model's licence and limits hold for this one too."
)


def _usage(recipe: Mapping[str, Any]) -> str:
    needs_folder = recipe["source"]["kind"] == "pipeline" and not recipe["packed"] and recipe["source"]["hub"] is None
    argument = ', pipeline="FOLDER_OF_THE_FLOAT_PIPELINE"' if needs_folder else ""
    what = (
        "`recipe.safetensors` holds the weights as packed integers and all scales; the float U-Net is "
        "not needed. Of layers that some step runs as a Winograd tile it holds float32 weights: their integers, n x n "
        "taps for every 3 x 3, would take as much room or more."
        if recipe["packed"]
        else "`recipe.safetensors` holds scales, zero points and learned roundings; weights are the float model's."
    )
    return f'```python\nimport tmpq_exp\n\npipe = tmpq_exp.load("recipe.json"{argument})\n```\n\n{what}'


def _counts(values: Any) -> str:
    """``8 (12 layers), 6 (3 layers)``, largest first."""
    found = list(values)
    return ", ".join(f"{value} ({found.count(value)})" for value in sorted(set(found), reverse=True)) or "none"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
