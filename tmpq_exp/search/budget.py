"""Owns the ceiling on a trajectory's BitOPs: whether a candidate keeps it, and how one is lowered or raised to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.space import Genes, SearchSpace


class Budget:
    """A ceiling on the BitOPs of a whole trajectory, and the means to bring a candidate of a space to it.

    Args:
        space: The search space.
        cost: Prices its candidates; one layer for each layer of the space.
        budget_bitops: Most BitOPs a feasible candidate may cost, whole trajectory, one image, guidance included.

    Raises:
        ValueError: If space and cost differ in their number of layers, or even the cheapest candidate costs more.
    """

    def __init__(self, space: SearchSpace, cost: CostModel, budget_bitops: int) -> None:
        if space.num_layers != len(cost):
            raise ValueError(f"space has {space.num_layers} layers and cost has {len(cost)}; they must be the same")
        self.space, self.cost, self.budget_bitops = space, cost, budget_bitops
        cheapest = space.cheapest(cost)
        self.cheapest_bitops = cost.bitops(cheapest)
        if budget_bitops < self.cheapest_bitops:
            raise ValueError(
                f"budget_bitops must be at least {self.cheapest_bitops} (the cheapest candidate's BitOPs), "
                f"found {budget_bitops}"
            )
        self._max_level = space.values.shape[-1]
        self._is_tile_free = bool((space.num_choices[2] > 1).any())
        table = [
            [[[cost.layer_bitops(layer, w, a, t) for t in tiles] for a in acts] for w in weights]
            for layer, (weights, acts, tiles) in enumerate(zip(*space.values.tolist(), strict=True))
        ]
        self._bitops = np.array(table).ravel()
        self._strides = np.array([self._max_level**2, self._max_level, 1])
        self._first = np.arange(space.num_layers) * self._max_level**3

    @property
    def max_steps(self) -> int:
        """Most steps that the budget pays for at the lowest bits."""
        per_step = self.cheapest_bitops // self.space.steps.min_steps
        return min(self.space.steps.max_steps, self.budget_bitops // per_step)

    def is_feasible(self, candidate: Candidate) -> bool:
        """Whether a candidate costs no more than the budget."""
        return self.cost.bitops(candidate) <= self.budget_bitops

    def repair(self, candidate: Candidate, rng: np.random.Generator, budget_bitops: int | None = None) -> Candidate:
        """Lower bits and drop steps until the candidate is feasible; one that is feasible comes back as it is.

        A move takes one gene to its next lower bits, or drops a step. Every move waits for a random time, exponential
        with a rate of the BitOPs it saves, and moves happen in the order of time until the budget is met: the most
        expensive layers give way first and small ones keep their bits. What a dropped step saves is divided by the
        number of the candidate's genes, so that steps do not fall before bits have a chance. Tiles are kept, unless
        the lowest bits and the fewest steps are not enough. Costs rise with either bit width at any tile, so that this
        always ends.

        Args:
            candidate: One of the space.
            rng: Source of randomness.
            budget_bitops: Ceiling for this call, at least ``cheapest_bitops``; None takes the budget's.

        Differs from the release, which draws again until a candidate is feasible.
        """
        ceiling = self.budget_bitops if budget_bitops is None else budget_bitops
        genes, timesteps = self.space.encode(candidate), candidate.timesteps
        if self._total(genes, len(timesteps)) <= ceiling:
            return candidate
        times, drops = self._move_times(genes, rng), self._drop_times(genes, timesteps, rng)
        moments, bitops = self._bitops_over_time(genes, times, drops)
        is_met = bitops <= ceiling
        now = moments[int(is_met.argmax())] if is_met.any() else np.finfo(np.float64).max
        kept = np.flatnonzero(drops > now).tolist()
        genes = np.concatenate([genes[:2] - (times <= now).sum(axis=0), genes[2:]])
        genes = genes if self.space.is_shared else genes[:, kept]
        genes = self._with_cheap_tiles(genes, len(kept), ceiling, rng)
        assert self._total(genes, len(kept)) <= ceiling, "moves did not reach the budget"
        return self.space.decode(tuple(timesteps[i] for i in kept), genes)

    def fill(self, candidate: Candidate, rng: np.random.Generator, budget_bitops: int | None = None) -> Candidate:
        """Raise bits of a feasible candidate in random order, as far as the budget goes; then add steps.

        A move takes one gene to its next higher bits; in each round a layer has one. Where all have their highest bits
        and a whole step can still be paid, steps are added. Ours: a candidate far below the ceiling wastes an
        evaluation, because more bits seldom hurt.

        Args:
            candidate: A feasible one of the space.
            rng: Source of randomness.
            budget_bitops: Ceiling for this call; None takes the budget's.
        """
        ceiling = self.budget_bitops if budget_bitops is None else budget_bitops
        timesteps = candidate.timesteps
        genes = self._raised(self.space.encode(candidate), len(timesteps), ceiling, rng)
        for _ in range(self.space.steps.max_steps - len(timesteps)):
            more = self.space.steps.with_one_more(timesteps, rng)
            rows = genes if self.space.is_shared else genes[:, self.space.steps.counterparts(more, timesteps)]
            if self._total(rows, len(more)) > ceiling:
                break
            timesteps, genes = more, rows
        return self.space.decode(timesteps, genes)

    def _raised(self, genes: Genes, num_steps: int, ceiling: int, rng: np.random.Generator) -> Genes:
        genes, slack = genes.copy(), ceiling - self._total(genes, num_steps)
        factor = self._factor(num_steps)
        for _ in range(2 * self._max_level * genes[0].size):
            index = self._index(genes)
            is_raisable = genes[:2] < self.space.num_choices[:2] - 1
            prices = self._bitops[index + is_raisable * self._strides[:2, None, None]] - self._bitops[index]
            prices *= factor
            keys = rng.random(prices.shape)
            keys[~is_raisable | (prices > slack)] = 2.0
            kinds = keys.argmin(axis=0).ravel()
            keys, prices = keys.min(axis=0).ravel(), np.where(kinds, prices[1].ravel(), prices[0].ravel())
            order = keys.argsort(kind="stable")[: int((keys < 2).sum())]
            taken = []
            for place, price in zip(order.tolist(), prices[order].tolist(), strict=True):
                if price <= slack:
                    slack -= price
                    taken.append(place)
            if not taken:
                break
            steps, layers = np.unravel_index(taken, genes.shape[1:])
            genes[kinds[taken], steps, layers] += 1
        return genes

    def _move_times(self, genes: Genes, rng: np.random.Generator) -> NDArray[np.float64]:
        """When each gene is lowered for the first, second, ... time, ``(levels, 2, S, L)``; infinite if it cannot.

        A gene's savings are those at the present bits of the layer's other operand.
        """
        levels = np.arange(self._max_level)[:, None, None, None]
        steps_down = np.minimum(levels, genes[:2]) * self._strides[:2, None, None]
        paths = self._bitops[self._index(genes) - steps_down]
        savings = paths[:-1] - paths[1:]
        waits = rng.standard_exponential(savings.shape)
        with np.errstate(divide="ignore"):
            times: NDArray[np.float64] = np.cumsum(waits / savings, axis=0)  # what saves nothing never happens
        return times

    def _bitops_over_time(
        self, genes: Genes, times: NDArray[np.float64], drops: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], Genes]:
        """Moments of all moves, ascending, and the candidate's BitOPs after each."""
        strides, present = self._strides[:2, None, None], self._index(genes)
        num_other = (times[:, None, ::-1] < times[None]).sum(axis=0)  # moves of the other operand before each move
        index = present - num_other * strides[::-1]
        levels = np.arange(self._max_level)[:, None, None, None]
        down = np.minimum(levels, genes[:2]) * strides
        savings = self._bitops[index - down[:-1]] - self._bitops[index - down[1:]]
        moments = np.concatenate([times.ravel(), drops])
        order = moments.argsort()
        calls = self._bitops[present].sum(axis=-1)
        if self.space.is_shared:
            saved = np.concatenate([savings.ravel(), np.zeros(len(drops), dtype=np.int64)])
            num_dropped = (order >= savings.size).cumsum()
            bitops = (calls - saved[order].cumsum()) * (len(drops) - num_dropped)
        else:
            savings = np.where(times < drops[:, None], savings, 0)
            saved = np.concatenate([savings.ravel(), calls - savings.sum(axis=(0, 1, 3))])
            bitops = calls.sum() - saved[order].cumsum()
        is_move = np.isfinite(moments[order])
        return moments[order][is_move], bitops[is_move] * self.cost.calls_per_step

    def _drop_times(self, genes: Genes, timesteps: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
        """When each step is dropped, infinite where it must be kept."""
        times = np.full(len(timesteps), np.inf)
        if len(timesteps) > self.space.steps.min_steps:
            savings = self._bitops[self._index(genes)].sum(axis=-1) * self._factor(1) / self._factor(len(timesteps))
            waits = rng.standard_exponential(len(timesteps)) * genes[:2].size / savings
            dropped = self.space.steps.droppable(timesteps, waits.argsort().tolist())
            times[dropped] = waits[dropped]
        return times

    def _with_cheap_tiles(self, genes: Genes, num_steps: int, ceiling: int, rng: np.random.Generator) -> Genes:
        """Give layers the tile that is cheapest at their bits, in random order, until the budget is met."""
        excess = self._total(genes, num_steps) - ceiling
        if excess <= 0 or not self._is_tile_free:
            return genes
        index = self._index(genes)
        prices = self._bitops[(index - genes[2])[..., None] + np.arange(self._max_level)]
        cheapest = np.minimum(prices.argmin(axis=-1), self.space.num_choices[2] - 1)
        savings = (self._bitops[index] - prices.min(axis=-1)).ravel() * self._factor(num_steps)
        order = rng.permutation(savings.size)
        moved = order[: int(np.searchsorted(savings[order].cumsum(), excess)) + 1]
        tiles = genes[2].flatten()
        tiles[moved] = cheapest.ravel()[moved]
        return np.stack([genes[0], genes[1], tiles.reshape(genes.shape[1:])])

    def _factor(self, num_steps: int) -> int:
        """U-Net calls that one row of genes stands for."""
        return self.cost.calls_per_step * (num_steps if self.space.is_shared else 1)

    def _total(self, genes: Genes, num_steps: int) -> int:
        return int(self._bitops[self._index(genes)].sum()) * self._factor(num_steps)

    def _index(self, genes: Genes) -> Genes:
        """Where the BitOPs of each layer's setting stand, ``(S, L)``; ``_strides`` away from those of the next ones."""
        weights, acts, tiles = self._strides.tolist()
        index: Genes = self._first + genes[0] * weights + genes[1] * acts + genes[2] * tiles
        return index
