"""Owns the exact choice of tiles by noise and cost, the data-free baseline of searching them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

MAX_ROUNDS = 20
"""Most solutions of the integer program: mostly one to find the least noise and one to see that it is."""


def choose_tiles(
    noise: Sequence[Mapping[int, float]], bitops: Sequence[Mapping[int, int]], budget_bitops: int
) -> tuple[int, ...] | None:
    """Tile of every layer so that the layers' noise adds up to the least the budget allows.

    A multiple-choice knapsack, solved as an integer program by branch and bound. The solver works to a millionth of
    what its figures are divided by: of the spare BitOPs, and of the noise above the least that the best choice so far
    has. It is asked again with that of its own choice, and without those of its choices that pass the budget.

    Args:
        noise: For every layer, tile -> power of its output's error over that of the output, finite.
        bitops: For every layer, BitOPs of the same tiles.
        budget_bitops: Most BitOPs of all layers together.

    Returns:
        One tile a layer, or None where even the cheapest tiles cost more than the budget.
    """
    lowest, cheapest = [min(of_layer.values()) for of_layer in noise], [min(of_layer.values()) for of_layer in bitops]
    spare = budget_bitops - sum(cheapest)
    if spare < 0:
        return None
    excess = {
        (layer, tile): (power - lowest[layer], bitops[layer][tile] - cheapest[layer])
        for layer, of_layer in enumerate(noise)
        for tile, power in of_layer.items()
        if bitops[layer][tile] - cheapest[layer] <= spare
    }
    best = [
        min((price, noise[layer][tile], tile) for tile, price in of_layer.items())[-1]
        for layer, of_layer in enumerate(bitops)
    ]
    refused = list[set[tuple[int, int]]]()
    for _ in range(MAX_ROUNDS):
        above = sum(excess[choice][0] for choice in enumerate(best))
        if above == 0:
            break
        taken = _solve({choice: found for choice, found in excess.items() if found[0] <= above}, above, spare, refused)
        if sum(excess[choice][1] for choice in enumerate(taken)) > spare:
            refused.append(set(enumerate(taken)))
        elif sum(excess[choice][0] for choice in enumerate(taken)) >= above:
            break
        else:
            best = taken
    return tuple(best)


def _solve(
    excess: Mapping[tuple[int, int], tuple[float, int]],
    above: float,
    spare: int,
    refused: Sequence[Collection[tuple[int, int]]],
) -> list[int]:
    """Tile of every layer: least noise within the spare BitOPs, both as excess over the least of the layer.

    Args:
        excess: (Layer, tile) -> noise and BitOPs above the layer's least.
        above: Noise to divide by, above 0.
        spare: BitOPs that all layers together may cost above the least, at least 0.
        refused: Choices that must not come back.
    """
    choices = list(excess)
    powers, prices = (np.array(values, dtype=float) for values in zip(*excess.values(), strict=True))
    num_layers = 1 + max(layer for layer, _ in choices)
    one_each = np.array([[layer == row for layer, _ in choices] for row in range(num_layers)], dtype=float)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(prices / max(1, spare), ub=spare / max(1, spare)),
        *(LinearConstraint([float(c in taken) for c in choices], ub=num_layers - 1) for taken in refused),
    ]
    found = milp(
        powers / above,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return [tile for _, tile in sorted(choices[i] for i in np.flatnonzero(found.x > 0.5).tolist())]
