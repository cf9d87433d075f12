"""Owns the exact choice of tiles by noise and cost, the data-free baseline of searching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def choose_tiles(
    noise: Sequence[Mapping[int, float]], bitops: Sequence[Mapping[int, int]], budget_bitops: int
) -> tuple[int, ...] | None:
    """Tile of every layer so that the layers' noise adds up to the least the budget allows.

    An exact optimum: a multiple-choice knapsack, solved as an integer program by branch and bound.

    Args:
        noise: For every layer, tile -> power of its output's error over that of the output, finite.
        bitops: For every layer, BitOPs of the same tiles.
        budget_bitops: Most BitOPs of all layers together.

    Returns:
        One tile a layer, or None where even the cheapest tiles cost more than the budget.
    """
    cheapest = sum(min(of_layer.values()) for of_layer in bitops)
    if cheapest > budget_bitops:
        return None
    choices = [(layer, tile) for layer, of_layer in enumerate(noise) for tile in of_layer]
    layers = np.array([layer for layer, _ in choices])
    powers = np.array([noise[layer][tile] for layer, tile in choices])
    prices = np.array([bitops[layer][tile] for layer, tile in choices], dtype=float)
    slack = budget_bitops - sum(max(of_layer.values()) for of_layer in bitops)
    if slack >= 0:  # the budget binds nothing
        return tuple(min((power, tile) for tile, power in of_layer.items())[1] for of_layer in noise)
    one_each = (layers[None, :] == np.arange(len(noise))[:, None]).astype(float)
    scale = max(1.0, float(prices.max()))
    found = milp(
        powers / max(float(powers.max()), np.finfo(float).tiny),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(prices / scale, ub=budget_bitops / scale)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    taken = [choices[i] for i in np.flatnonzero(found.x > 0.5).tolist()]
    return _within(dict(taken), noise, bitops, budget_bitops)


def _within(
    taken: dict[int, int], noise: Sequence[Mapping[int, float]], bitops: Sequence[Mapping[int, int]], budget: int
) -> tuple[int, ...]:
    """The solver's tiles; cheaper ones where its tolerance let the sum pass the budget by a rounding error."""
    for _ in range(len(noise)):
        if sum(bitops[layer][tile] for layer, tile in taken.items()) <= budget:
            break
        cheaper = [
            (noise[layer][other] - noise[layer][tile], layer, other)
            for layer, tile in taken.items()
            for other in noise[layer]
            if bitops[layer][other] < bitops[layer][tile]
        ]
        _, layer, other = min(cheaper)
        taken[layer] = other
    return tuple(taken[layer] for layer in range(len(noise)))
