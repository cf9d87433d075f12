"""task=cost: what one image costs under a model's architecture, layer by layer, without weights."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich import box
from rich.console import Console
from rich.table import Table

from tmpq_exp.config import Config, UserError
from tmpq_exp.cost import ConvShape, CostModel, LayerShape, is_eligible, with_error_feedback
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.release_scale import release_bitops, release_macs
from tmpq_exp.rundir import RunDirectory, bad_input, write_json, writing
from tmpq_exp.winograd.transform import ineligible_reason
from tmpq_exp.zoo.task import CostedModel, TrainableModel

COST_SCHEMA = 1


def price(config: Config, resolved: dict[str, Any]) -> None:
    """Print the per-layer table and write ``cost.json`` into the run directory.

    Args:
        config: Checked configuration.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        ValueError: If the model has no architecture that can be built without weights.
    """
    with bad_input():
        model = instantiate(config.model)
        if not isinstance(model, CostedModel):
            raise UserError(f"model: {_why_no_cost(model)}")
        content = cost_content(config, model.name, model.guided, model.layers(), model.diffusers_layers())
    directory = Path(config.paths.run_dir)
    with writing(directory):
        run = RunDirectory.claim(directory, resolved)
        write_json(run.cost, content)
    _print(layer_table(content))
    print("\n".join([*summary_lines(content), f"cost         {run.cost}"]))


def _why_no_cost(model: Any) -> str:
    if isinstance(model, TrainableModel):
        return f"{model.name} makes no images and can only be trained (task=train)"
    return f"{type(model).__name__} cannot be built without its weights; task=cost needs a CostedModel"


def cost_content(
    config: Config,
    name: str,
    guided: bool,
    layers: tuple[LayerShape, ...],
    diffusers_layers: tuple[LayerShape, ...] | None,
) -> dict[str, Any]:
    """Content of ``cost.json``.

    Args:
        config: Gives bits, tile, number of steps and scale.
        name: Name of the model.
        guided: Whether sampling calls the network twice a step.
        layers: Layers of one U-Net call for one image.
        diffusers_layers: The same in diffusers' form of the network, if it is another definition.

    Returns:
        ``macs``, ``bitops`` and ``weight_bytes`` of one image, one U-Net call and no guidance, the rows in ``layers``,
        ``trajectory`` for all steps and calls, and ``winograd``, see ``winograd_content``. ``macs_diffusers`` is there
        where it differs from ``macs``, ``release`` under ``cost.scale=release``.
    """
    layers = with_error_feedback(layers, config.winograd.shaped_stages)
    cost, bits, num_steps = CostModel(layers, 2 if guided else 1), config.cost, config.space.num_inference_steps
    allocation = cost.uniform(bits.weight_bits, bits.act_bits, config.quant.softmax_bits)
    allocation = _with_tiles(allocation, layers, config.winograd.tile)
    table = cost.layer_table(allocation)
    macs = sum(row.macs for row in table)
    trajectory = Candidate(tuple(reversed(range(num_steps))), (allocation,))
    content: dict[str, Any] = {
        "schema": COST_SCHEMA,
        "model": name,
        "weight_bits": bits.weight_bits,
        "act_bits": bits.act_bits,
        "softmax_bits": FLOAT_BITS if bits.weight_bits == FLOAT_BITS else config.quant.softmax_bits,
        "tile": config.winograd.tile,
        "macs": macs,
        "bitops": cost.call_bitops(allocation),
        "weight_bytes": cost.weight_bytes(trajectory),
        "macs_by_kind": _by_kind((row.kind, row.macs) for row in table),
        "trajectory": {
            "num_inference_steps": num_steps,
            "calls_per_step": cost.calls_per_step,
            "macs": cost.macs(trajectory),
            "bitops": cost.bitops(trajectory),
        },
    }
    if diffusers_layers is not None:
        of_diffusers = sum(shape.macs for shape in diffusers_layers)
        content["diffusers_agrees"] = of_diffusers == sum(shape.macs for shape in layers)
        if not content["diffusers_agrees"]:
            content["macs_diffusers"] = of_diffusers
    rows = [{**asdict(row), "macs_share": row.macs / macs} for row in table]
    if bits.scale == "release":
        for row, shape, w, a in zip(rows, layers, allocation.weight_bits, allocation.act_bits, strict=True):
            row |= {"macs_release": release_macs(shape), "bitops_release": release_bitops(shape, w, a)}
        content["release"] = {key: sum(row[f"{key}_release"] for row in rows) for key in ("macs", "bitops")}
    tiles = sorted({*config.winograd.report_tiles, config.winograd.tile} - {DIRECT_TILE})
    return content | {"winograd": winograd_content(layers, tiles), "layers": rows}


def winograd_content(layers: Sequence[LayerShape], tiles: Sequence[int]) -> dict[str, Any]:
    """What Winograd tiles save over all eligible convolutions of one U-Net call for one image.

    Returns:
        ``eligible_layers`` (names), ``ineligible_layers`` (name and reason), ``eligible_macs`` (their MACs if direct),
        and ``tiles``: for each ``m`` the ``multiplications`` of the Hadamard stage and of error feedback, tiles that
        the border cuts counted whole, their ``multiplications_ratio`` (direct over this), and
        ``executed_macs_ratio``, which counts both transforms too. Last, with ``m`` null, the tile of fewest
        multiplications at every layer.
    """
    convs = [shape for shape in layers if isinstance(shape, ConvShape)]
    eligible = [shape for shape in convs if is_eligible(shape)]
    direct = sum(shape.macs for shape in eligible)
    choices: list[tuple[int | None, list[int]]] = [(m, [m] * len(eligible)) for m in tiles]
    if tiles:
        least = [min((DIRECT_TILE, *tiles), key=shape.multiplications) for shape in eligible]
        choices.append((None, least))
    rows = []
    for m, chosen in choices if eligible else ():
        multiplications = sum(shape.multiplications(tile) for shape, tile in zip(eligible, chosen, strict=True))
        executed = sum(shape.executed_macs(tile) for shape, tile in zip(eligible, chosen, strict=True))
        rows.append(
            {
                "m": m,
                "multiplications": multiplications,
                "multiplications_ratio": direct / multiplications,
                "executed_macs_ratio": direct / executed,
            }
        )
    reasons = ((s.name, ineligible_reason(s.kernel_size, s.stride, s.dilation, s.groups)) for s in convs)
    return {
        "eligible_layers": [shape.name for shape in eligible],
        "ineligible_layers": [{"name": name, "reason": reason} for name, reason in reasons if reason is not None],
        "eligible_macs": direct,
        "tiles": rows,
    }


def _with_tiles(allocation: Allocation, layers: Sequence[LayerShape], tile: int) -> Allocation:
    tiles = (tile if isinstance(shape, ConvShape) and is_eligible(shape) else DIRECT_TILE for shape in layers)
    return replace(allocation, tiles=tuple(tiles))


def _by_kind(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals = dict.fromkeys(("conv", "linear", "attention"), 0)
    for kind, count in counts:
        totals[kind] += count
    return totals


def layer_table(content: Mapping[str, Any]) -> Table:
    """The layers of a ``cost.json`` for the terminal: one image, one U-Net call; one KB is 1000 bytes."""
    has_release = "release" in content
    table = Table(title=f"{content['model']}: one image, one U-Net call", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MMACs", "share", "bits W/A", "GBitOPs", "KB", *(["release's GBitOPs"] if has_release else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in content["layers"]:
        table.add_row(
            row["name"] + (f" F({row['tile']}, 3)" if row["tile"] else ""),
            row["kind"],
            f"{row['macs'] / 1e6:,.3f}",
            f"{row['macs_share']:.2%}",
            f"{row['weight_bits']}/{row['act_bits']}",
            f"{row['bitops'] / 1e9:,.4f}",
            f"{row['weight_bytes'] / 1e3:,.1f}",
            *([f"{row['bitops_release'] / 1e9:,.4f}"] if has_release else []),
        )
    return table


def summary_lines(content: Mapping[str, Any]) -> list[str]:
    """The totals of a ``cost.json``, each with what it counts."""
    kinds = ", ".join(f"{kind} {_quantity(macs)}" for kind, macs in content["macs_by_kind"].items())
    bits = f"W{content['weight_bits']}A{content['act_bits']}, softmax {content['softmax_bits']}"
    trajectory = content["trajectory"]
    calls = f"{trajectory['num_inference_steps']} steps"
    if trajectory["calls_per_step"] > 1:
        calls += f" x {trajectory['calls_per_step']} calls (classifier-free guidance)"
    lines = [
        f"one call     {_quantity(content['macs'])}MACs ({kinds})",
        f"             {_quantity(content['bitops'])}BitOPs at {bits}",
        f"             {_quantity(content['weight_bytes'])}B of weights",
        f"one image    {_quantity(trajectory['macs'])}MACs, {_quantity(trajectory['bitops'])}BitOPs: {calls}",
    ]
    if "macs_diffusers" in content:
        lines.append(f"diffusers    its equivalent counts {_quantity(content['macs_diffusers'])}MACs a call")
    elif content.get("diffusers_agrees"):
        lines.append("diffusers    its equivalent counts the same MACs")
    if "release" in content:
        release = content["release"]
        lines.append(
            f"release      {_quantity(release['macs'])}MACs, {_quantity(release['bitops'])}BitOPs on the scale of the "
            "authors' code, for any number of steps"
        )
    return [*lines, *_winograd_lines(content["winograd"])]


def _winograd_lines(winograd: Mapping[str, Any]) -> list[str]:
    reasons = Counter(layer["reason"] for layer in winograd["ineligible_layers"]).most_common()
    num_eligible, num_direct = len(winograd["eligible_layers"]), len(winograd["ineligible_layers"])
    stay = "; ".join(f"{count} with {reason}" for reason, count in reasons)
    lines = [
        f"winograd     {num_eligible} of {num_eligible + num_direct} convolutions are eligible, "
        f"{_quantity(winograd['eligible_macs'])}MACs" + (f"; direct: {stay}" if stay else "")
    ]
    for row in winograd["tiles"]:
        name = "best tile of each layer" if row["m"] is None else f"F({row['m']},3)"
        lines.append(
            f"             {name}: {row['multiplications_ratio']:.2f}x fewer multiplications there, "
            f"{row['executed_macs_ratio']:.2f}x fewer MACs with both transforms"
        )
    return lines


def _quantity(value: int) -> str:
    """Four significant digits and the prefix, with a space between: ``401.6 G``."""
    for factor, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:#.4g} {prefix}"
    return f"{value} "


def _print(table: Table) -> None:
    """Print at full width: a layer's name is never cut."""
    console = Console(file=sys.stdout)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)
