"""Owns the exact choice of tiles by noise and cost, the data-free baseline of searching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

HALVINGS = 100
"""Of the range of the multiplier, down to the rounding of floats."""

ROUNDING = 1e-9
"""Relative error of sums that is allowed for before a choice is ruled out."""


class _Choice(NamedTuple):
    """Tiles of the first layers: their BitOPs and noise together, the last of them, and the ones before it."""

    price: int
    power: float
    tile: int
    before: _Choice | None


def choose_tiles(
    noise: Sequence[Mapping[int, float]], bitops: Sequence[Mapping[int, int]], budget_bitops: int
) -> tuple[int, ...] | None:
    """Tile of every layer so that the layers' noise adds up to the least the budget allows.

    An exact optimum of a multiple-choice knapsack, by dynamic programming over layers in whole BitOPs: of the choices
    for the first layers those stay that no other one beats in both, and that the layers behind them can still complete
    to less noise than a choice that is known. How little noise these must add follows from the Lagrangian relaxation
    of the budget.

    Args:
        noise: For every layer, tile -> power of its output's error over that of the output, finite.
        bitops: For every layer, BitOPs of the same tiles.
        budget_bitops: Most BitOPs of all layers together.

    Returns:
        One tile a layer, or None where even the cheapest tiles cost more than the budget.

    References:
        Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11. A solver of integer programs in floats was
        not exact: choices within its tolerance of the budget were lost.
    """
    layers = [
        _undominated([_Choice(prices[tile], power, tile, None) for tile, power in of_layer.items()])
        for of_layer, prices in zip(noise, bitops, strict=True)
    ]
    cheapest = _sums_behind([choices[0].price for choices in layers])
    if cheapest[0] > budget_bitops:
        return None
    multiplier, known = _relaxed(layers, budget_bitops)
    least = _sums_behind([min(c.power + multiplier * c.price for c in choices) for choices in layers])
    highest = known + ROUNDING * (known + multiplier * budget_bitops)
    states = [_Choice(0, 0.0, 0, None)]
    for index, choices in enumerate(layers):
        most = highest + multiplier * budget_bitops - least[index + 1]
        extended = [
            _Choice(price, power, choice.tile, state)
            for state in states
            for choice in choices
            if (price := state.price + choice.price) + cheapest[index + 1] <= budget_bitops
            and (power := state.power + choice.power) + multiplier * price <= most
        ]
        states = _undominated(extended)
    return _tiles(states[-1], len(layers))


def _undominated(choices: Sequence[_Choice]) -> list[_Choice]:
    """Those of less noise than all that cost no more, by rising price."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: c[:3]):
        if not kept or choice.power < kept[-1].power:
            kept.append(choice)
    return kept


def _sums_behind(values: Sequence[float]) -> list[float]:
    """Sum of the values from each place on, and 0 behind the last."""
    return [*accumulate(reversed(values), initial=0)][::-1]


def _relaxed(layers: Sequence[Sequence[_Choice]], budget: int) -> tuple[float, float]:
    """Noise that a BitOP is worth at the budget, and the noise of a choice within it."""

    def chosen(multiplier: float) -> tuple[int, float]:
        best = [min(choices, key=lambda c: (c.power + multiplier * c.price, c.price)) for choices in layers]
        return sum(c.price for c in best), sum(c.power for c in best)

    low, high = 0.0, 1.0 + sum(choices[0].power for choices in layers)  # at which every layer takes its cheapest tile
    if chosen(low)[0] <= budget:
        return low, chosen(low)[1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if chosen(middle)[0] <= budget else (middle, high)
    return high, chosen(high)[1]


def _tiles(state: _Choice, num_layers: int) -> tuple[int, ...]:
    tiles: list[int] = []
    while len(tiles) < num_layers:
        tiles.append(state.tile)
        assert state.before is not None
        state = state.before
    return tuple(reversed(tiles))
