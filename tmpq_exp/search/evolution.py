"""Owns evolutionary search: parents are the best so far, offspring their mutants and crossovers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Origin, Search, check_at_least, check_probability
from tmpq_exp.search.space import SearchSpace


class EvolutionSearch(Search):
    """Mutation, uniform crossover and fresh random candidates.

    Generation 0 holds the seed candidates, repaired if need be, ``num_near_seeds`` mutants of them, and random ones.
    Every later one holds
    ``num_mutants`` mutants of parents drawn uniformly, ``num_crossovers`` crossovers of two different parents, and
    random ones up to ``population_size``. Parents are the ``num_parents`` best so far. Where scores failed and too few
    parents exist, random candidates take the place of mutants and crossovers.

    Args:
        space, cost, budget_bitops: See ``Search``, as all others that are not named here.
        num_parents: At least 1.
        num_mutants, num_crossovers: At least 0, together at most ``population_size``.
        mutation_prob: Chance of each gene to be redrawn, in (0, 1].
        mutate_crossovers: Mutate what came of a crossover, so that offspring differ from all parents in some genes.
        step_mutation_prob: Chance of each timestep to move, in (0, 1]; None: ``mutation_prob``.
        step_reach: How far a timestep moves at most, as a share of its group, in (0, 1].
        num_near_seeds: Mutants of the seed candidates in generation 0, at least 0, as far as there is room.

    Raises:
        ValueError: If an argument lies outside its range, or no candidate fits the budget.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: evolutionary search over timesteps and bits.

    Differs from the method by moves within a reach and by a start near the seeds: random timesteps make a ragged
    schedule, from which few evaluations do not find back. Differs from the authors' release, which draws bits
    uniformly until a candidate is feasible, without a cap, and fills nothing. Its settings: population 50, parents 10,
    mutants 25, crossovers 10, generations 20, mutation_prob 0.25, ``fill=False``, ``sample_from="uniform"``.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: CostModel,
        budget_bitops: int,
        *,
        population_size: int = 50,
        num_parents: int = 10,
        num_mutants: int = 25,
        num_crossovers: int = 10,
        num_generations: int = 20,
        mutation_prob: float = 0.25,
        mutate_crossovers: bool = False,
        step_mutation_prob: float | None = None,
        step_reach: float = 1.0,
        num_near_seeds: int = 0,
        max_attempts: int = 100,
        seed: int = 0,
        seed_candidates: tuple[Candidate, ...] = (),
        fill: bool = True,
        sample_from: str = "uniform",
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
        check_at_least(1, num_parents=num_parents)
        check_at_least(0, num_mutants=num_mutants, num_crossovers=num_crossovers)
        if num_mutants + num_crossovers > population_size:
            raise ValueError(
                f"num_mutants + num_crossovers must be at most population_size ({population_size}), "
                f"found {num_mutants} + {num_crossovers}"
            )
        check_probability("mutation_prob", mutation_prob)
        check_probability("step_mutation_prob", mutation_prob if step_mutation_prob is None else step_mutation_prob)
        check_probability("step_reach", step_reach)
        check_at_least(0, num_near_seeds=num_near_seeds)
        self.step_mutation_prob, self.step_reach, self.num_near_seeds = step_mutation_prob, step_reach, num_near_seeds
        self.num_parents, self.num_mutants, self.num_crossovers = num_parents, num_mutants, num_crossovers
        self.mutation_prob, self.mutate_crossovers = mutation_prob, mutate_crossovers

    def _draw_generation(self, rng: np.random.Generator) -> None:
        parents = [scored.candidate for scored in self.top(self.num_parents)]
        places = self.population_size - len(self._pending)
        if self.generation == 0 and self.seed_candidates:
            parents = list(self.seed_candidates)
            num_mutants, num_crossovers = min(self.num_near_seeds, places), 0
        else:
            num_mutants = self.num_mutants if len(parents) >= 1 else 0
            num_crossovers = self.num_crossovers if len(parents) >= 2 else 0

        def cross() -> Candidate:
            first, second = rng.choice(len(parents), size=2, replace=False).tolist()
            child = self.space.crossover(parents[first], parents[second], rng)
            return self._mutated(child, rng) if self.mutate_crossovers else child

        for origin, draw, num_places in (
            (Origin.MUTATION, lambda: self._mutated(parents[int(rng.integers(len(parents)))], rng), num_mutants),
            (Origin.CROSSOVER, cross, num_crossovers),
            (Origin.RANDOM, lambda: self._sample(rng), places - num_mutants - num_crossovers),
        ):
            for _ in range(num_places):
                self._place(origin, draw, rng)

    def _mutated(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        return self.space.mutate(
            candidate,
            self.mutation_prob,
            rng,
            step_mutation_prob=self.step_mutation_prob,
            reach=self.step_reach,
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "num_parents": self.num_parents,
            "num_mutants": self.num_mutants,
            "num_crossovers": self.num_crossovers,
            "mutation_prob": self.mutation_prob,
            "mutate_crossovers": self.mutate_crossovers,
            "step_mutation_prob": self.step_mutation_prob,
            "step_reach": self.step_reach,
            "num_near_seeds": self.num_near_seeds,
        }
