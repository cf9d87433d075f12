"""Owns NSGA-II: a whole front of quality against BitOPs below the ceiling, ranked by pymoo."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Origin, ScoredCandidate, Search, check_probability
from tmpq_exp.search.space import SearchSpace


class NSGA2Search(Search):
    """Two objectives, the score and the BitOPs; candidates are spread between the cheapest and the ceiling.

    Every candidate has a ceiling of its own to which it is repaired and filled: random ones draw it evenly on a
    logarithmic scale, offspring draw it between their parents' BitOPs, widened by a tenth on either side. Generation 0
    holds the seed candidates and random ones. Later ones hold offspring: two parents, each the winner of a binary
    tournament by rank and crowding, cross, and the child mutates. The population that parents come from is the best
    ``population_size`` by rank and crowding of all that was told, so that a search resumes from its history alone.

    Args:
        space, cost, budget_bitops: See ``Search``, as all others that are not named here.
        mutation_prob: Chance of each gene of a child to be redrawn, in (0, 1].

    Raises:
        ValueError: If an argument lies outside its range, or no candidate fits the budget.

    References:
        Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 6(2), 2002.
        Blank, Deb, "pymoo: Multi-Objective Optimization in Python", IEEE Access 8, 2020: sorting and crowding.

    Differs from NSGA-II in that survivors are chosen among all candidates so far, with ties in the order asked.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: CostModel,
        budget_bitops: int,
        *,
        population_size: int = 20,
        num_generations: int = 10,
        mutation_prob: float = 0.05,
        max_attempts: int = 100,
        seed: int = 0,
        seed_candidates: tuple[Candidate, ...] = (),
        fill: bool = True,
        sample_from: str = "highest",
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
            sample_from=sample_from,
        )
        check_probability("mutation_prob", mutation_prob)
        self.mutation_prob = mutation_prob

    def front(self) -> tuple[ScoredCandidate, ...]:
        """Candidates that no other one beats in both score and BitOPs, cheapest first; of equal ones the first."""
        scored = self._succeeded()
        if not scored:
            return ()
        points = self._points(scored)
        first = NonDominatedSorting().do(points, only_non_dominated_front=True)
        cheapest_first = sorted(first.tolist(), key=lambda i: (points[i, 1], i))
        return tuple({tuple(points[i]): scored[i] for i in reversed(cheapest_first)}.values())[::-1]

    def _draw_generation(self, rng: np.random.Generator) -> None:
        survivors = self._survivors()
        for _ in range(self.population_size - (len(self._pending) if self._generation == 0 else 0)):
            if len(survivors) >= 2:
                first, second = self._tournament(survivors, rng), self._tournament(survivors, rng)
                bitops = sorted(self.budget.cost.bitops(parent) for parent in (first, second))
                ceiling = rng.uniform(bitops[0] / 1.1, bitops[1] * 1.1)
                self._place(Origin.CROSSOVER, partial(self._child, first, second, rng), rng, self._clip(ceiling))
            else:
                low, high = np.log([self.budget.cheapest_bitops, self.budget.budget_bitops])
                ceiling = np.exp(rng.uniform(low, high))
                self._place(Origin.RANDOM, lambda: self._sample(rng), rng, self._clip(ceiling))

    def _child(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        return self.space.mutate(self.space.crossover(first, second, rng), self.mutation_prob, rng)

    def _clip(self, bitops: float) -> int:
        return min(max(int(bitops), self.budget.cheapest_bitops), self.budget.budget_bitops)

    def _points(self, scored: list[ScoredCandidate]) -> NDArray[np.float64]:
        return np.array([[s.score, self.budget.cost.bitops(s.candidate)] for s in scored], dtype=np.float64)

    def _survivors(self) -> list[Candidate]:
        """At most ``population_size`` candidates, best first: by rank, within a rank by crowding distance."""
        scored = self._succeeded()
        if not scored:
            return []
        points, survivors = self._points(scored), []
        for front in NonDominatedSorting().do(points, n_stop_if_ranked=self.population_size):
            crowding = calc_crowding_distance(points[front]) if len(front) > 2 else np.full(len(front), np.inf)
            survivors += front[np.argsort(-crowding, kind="stable")].tolist()
        return [scored[i].candidate for i in survivors[: self.population_size]]

    @staticmethod
    def _tournament(survivors: list[Candidate], rng: np.random.Generator) -> Candidate:
        """The better one of two different candidates, drawn uniformly."""
        return survivors[int(rng.choice(len(survivors), size=2, replace=False).min())]

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"mutation_prob": self.mutation_prob}
