"""Owns random search: the baseline that every other search must beat at equal evaluations."""

from __future__ import annotations

import numpy as np

from tmpq_exp.search.algorithm import Origin, Search


class RandomSearch(Search):
    """Random candidates, fitted to the budget as every search does, and nothing learned from scores.

    Args: See ``Search``.
    """

    def _draw_generation(self, rng: np.random.Generator) -> None:
        for _ in range(self.population_size - len(self._pending)):
            self._place(Origin.RANDOM, lambda: self._sample(rng), rng)
