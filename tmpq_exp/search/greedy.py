"""Owns layer-wise greedy search: bits go where a block gains the most quality for the BitOPs they cost."""

from __future__ import annotations

import math

import numpy as np

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Origin, Search
from tmpq_exp.search.space import Genes, SearchSpace

_GAIN_OF_NEXT_LEVEL = 0.25
"""Gain of one more bit over that of the bit before: the power of rounding noise falls fourfold."""


class GreedySearch(Search):
    """From the lowest bits upwards: each round tries every unit one level higher and raises those that gain most.

    A unit is the weights or the activations of layers with about equally many MACs; there are as many units as a
    generation has room for, at most two a layer. A round begins with the state reached, from the lowest bits on. After
    it the unit of the highest gain per BitOP is raised, again and again, until this round's share of the budget is used
    up; a unit's next level is taken to gain a quarter of the one before. The last round, and places that are left over
    in others, ask for the state filled to the ceiling, and for it with two random units a level lower before it is
    filled. Kept timesteps are those of the first seed candidate: what is greedy here is the choice of bits.

    Args:
        space, cost, budget_bitops: See ``Search``, as all others.

    Raises:
        ValueError: If an argument lies outside its range, or no candidate fits the budget.

    References:
        Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", arXiv 1905.03696:
        bits by block-wise sensitivity.

    Differs from the usual greedy descent from the highest bits, whose trials lie above the budget: going up, every
    trial is feasible and counts at equal evaluations.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: CostModel,
        budget_bitops: int,
        *,
        population_size: int = 16,
        num_generations: int = 5,
        max_attempts: int = 100,
        seed: int = 0,
        seed_candidates: tuple[Candidate, ...] = (),
        fill: bool = True,
    ) -> None:
        super().__init__(
            space,
            cost,
            budget_bitops,
            population_size=population_size,
            num_generations=num_generations,
            max_attempts=max_attempts,
            seed=seed,
            seed_candidates=seed_candidates,
            fill=fill,
        )
        self._units = self._make_units(max(1, population_size - len(seed_candidates) - 1))

    def _make_units(self, num_units: int) -> list[tuple[int, list[int]]]:
        """Units as (0: weights or 1: activations, layers), about ``num_units`` with equally many genes each."""
        by_cost = np.array(sorted(range(self.space.num_layers), key=lambda i: self.budget.cost.layers[i].macs))
        free = [by_cost[kind[0, by_cost] > 1] for kind in self.space.num_choices[:2]]
        num_free = sum(map(len, free))
        units = []
        for kind, layers in enumerate(free):
            if len(layers):
                share = max(1, num_units * len(layers) // num_free)
                units += [(kind, run.tolist()) for run in np.array_split(layers, min(share, len(layers)))]
        return units

    def _draw_generation(self, rng: np.random.Generator) -> None:
        timesteps, genes = self._start()
        for generation in range(self._generation):
            genes = self._after_round(generation, timesteps, genes)
        state = self.space.decode(timesteps, genes)
        if self._generation < self.num_generations - 1:
            trials = (self._trial(timesteps, genes, unit) for unit in range(len(self._units)))
            for candidate in [state, *filter(self.budget.is_feasible, trials)]:
                if len(self._pending) < self.population_size and candidate.key() not in self._asked:
                    self._accept(candidate, Origin.GREEDY)

        def vary() -> Candidate:
            units = rng.choice(len(self._units), size=min(2, len(self._units)), replace=False).tolist()
            varied = genes
            for unit in units:
                varied = self._moved(varied, unit, -1)
            return self.space.decode(timesteps, varied)

        num_free = self.population_size - len(self._pending)
        if num_free:
            self._place(Origin.GREEDY, lambda: state, rng)
        for _ in range(num_free - 1):
            self._place(Origin.GREEDY, vary, rng)

    def _start(self) -> tuple[tuple[int, ...], Genes]:
        """Timesteps of the first seed candidate that the budget can pay at the lowest bits, and those bits."""
        cheapest = self.space.cheapest(self.budget.cost)
        for seed in self.seed_candidates:
            if len(seed.timesteps) <= self.budget.max_steps:
                cheapest = Candidate(seed.timesteps, cheapest.allocations)
                break
        return cheapest.timesteps, self.space.encode(cheapest)

    def _trial(self, timesteps: tuple[int, ...], genes: Genes, unit: int, levels: int = 1) -> Candidate:
        return self.space.decode(timesteps, self._moved(genes, unit, levels))

    def _moved(self, genes: Genes, unit: int, levels: int = 1) -> Genes:
        """Genes with a unit some levels higher, each layer as far as its choices go."""
        kind, layers = self._units[unit]
        moved = genes.copy()
        highest = self.space.num_choices[kind][:, layers] - 1
        moved[kind][:, layers] = np.clip(moved[kind][:, layers] + levels, 0, highest)
        return moved

    def _after_round(self, generation: int, timesteps: tuple[int, ...], genes: Genes) -> Genes:
        """Genes after the raises that the scores of a round decide."""
        scores = {scored.candidate.key(): scored.score for scored in self._history if scored.generation <= generation}
        start = self._bitops(*self._start())
        share = (generation + 1) / (self.num_generations - 1)
        target = start + int((self.budget.budget_bitops - start) * share)
        before = scores.get(self.space.decode(timesteps, genes).key(), math.nan)
        gains = [before - scores.get(self._trial(timesteps, genes, u).key(), math.nan) for u in range(len(self._units))]
        gains = [gain if math.isfinite(gain) else -math.inf for gain in gains]
        open_units = set(range(len(self._units)))
        for _ in range(len(self._units) * self.space.values.shape[-1]):
            present = self._bitops(timesteps, genes)
            added = {u: self._bitops(timesteps, self._moved(genes, u)) - present for u in sorted(open_units)}
            open_units = {u for u, bitops in added.items() if 0 < bitops <= target - present}
            if not open_units:
                break
            unit = max(sorted(open_units), key=lambda u: gains[u] / added[u])
            genes = self._moved(genes, unit)
            gains[unit] *= _GAIN_OF_NEXT_LEVEL
        return genes

    def _bitops(self, timesteps: tuple[int, ...], genes: Genes) -> int:
        return self.budget.cost.bitops(self.space.decode(timesteps, genes))
