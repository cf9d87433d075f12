"""Owns evolutionary search by ask and tell: what each generation asks for, what it learns, and how it resumes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.budget import Budget
from tmpq_exp.search.space import SearchSpace


class Origin(str, Enum):
    """How a candidate came to be asked for."""

    SEED = "seed"
    RANDOM = "random"
    MUTATION = "mutation"
    CROSSOVER = "crossover"


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate and what it was told: score (lower is better, ``inf`` if it failed), generation, origin."""

    candidate: Candidate
    score: float
    generation: int
    origin: Origin


@dataclass
class SearchStatistics:
    """What the search had to do besides asking.

    Args:
        num_repairs: Candidates drawn over the budget and lowered below it.
        num_duplicates: Candidates drawn again that had been asked before, and thrown away.
        num_capped: Places of a generation left empty because ``max_attempts`` draws held nothing new.
    """

    num_repairs: int = 0
    num_duplicates: int = 0
    num_capped: int = 0


class EvolutionSearch:
    """Mutation, uniform crossover and fresh random candidates, every one within the budget and none asked twice.

    ``ask`` gives a generation, ``tell`` takes its scores; nothing else has influence, so the same seed and the same
    scores give the same history on any number of workers. Each generation draws from its own stream, made from the
    seed and its number: a search is resumed by ``load_state_dict``, or by asking and telling again what was recorded.

    Generation 0 holds the seed candidates, repaired if need be, and random ones. Every later one holds
    ``num_mutants`` mutants of parents drawn uniformly, ``num_crossovers`` crossovers of two different parents, and
    random ones up to ``population_size``. Parents are the ``num_parents`` best so far. Where scores failed and too few
    parents exist, random candidates take the place of mutants and crossovers.

    Args:
        space: The search space.
        cost: Prices its candidates.
        budget_bitops: Most BitOPs of a candidate, whole trajectory, one image, guidance included.
        population_size: Candidates a generation, at least 1.
        num_parents: At least 1.
        num_mutants, num_crossovers: At least 0, together at most ``population_size``.
        num_generations: Generations asked in all, generation 0 included; at least 1.
        mutation_prob: Chance of each gene to be redrawn, in (0, 1].
        max_attempts: Draws for one place of a generation before it stays empty; at least 1.
        seed: At least 0.
        seed_candidates: At most ``population_size``; each must lie in the space, and may cost more than the budget.
        fill: Raise the bits of every candidate but the seeds to the ceiling (``Budget.fill``). A filled candidate that
            was asked before gives way to the one it was filled from.
        sample_from: How random candidates come by their bits: ``highest``: the highest of every layer, lowered to the
            budget where they cost most; ``uniform``: drawn, then lowered.

    Raises:
        ValueError: If an argument lies outside its range, or no candidate fits the budget.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: evolutionary search over timesteps and bits.

    Differs from the authors' release, which draws bits uniformly until a candidate is feasible, without a cap, and
    fills nothing. Its settings: population 50, parents 10, mutants 25, crossovers 10, generations 20,
    mutation_prob 0.25, ``fill=False``, ``sample_from="uniform"``.
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
        max_attempts: int = 100,
        seed: int = 0,
        seed_candidates: tuple[Candidate, ...] = (),
        fill: bool = True,
        sample_from: str = "uniform",
    ) -> None:
        _at_least(1, population_size=population_size, num_parents=num_parents)
        _at_least(1, num_generations=num_generations, max_attempts=max_attempts)
        _at_least(0, num_mutants=num_mutants, num_crossovers=num_crossovers, seed=seed)
        if num_mutants + num_crossovers > population_size:
            raise ValueError(
                f"num_mutants + num_crossovers must be at most population_size ({population_size}), "
                f"found {num_mutants} + {num_crossovers}"
            )
        if not 0 < mutation_prob <= 1:
            raise ValueError(f"mutation_prob must lie in (0, 1], found {mutation_prob}")
        if len(seed_candidates) > population_size:
            raise ValueError(
                f"seed_candidates must be at most population_size ({population_size}), found {len(seed_candidates)}"
            )
        for index, candidate in enumerate(seed_candidates):
            if not space.contains(candidate):
                raise ValueError(f"seed_candidates must lie in the search space, found {index} outside: {candidate}")
        if sample_from not in ("highest", "uniform"):
            raise ValueError(f"sample_from must be highest or uniform, found {sample_from!r}")
        self.space = space
        self.sample_from = sample_from
        self.budget = Budget(space, cost, budget_bitops)
        self.population_size, self.num_parents = population_size, num_parents
        self.num_mutants, self.num_crossovers = num_mutants, num_crossovers
        self.num_generations, self.mutation_prob = num_generations, mutation_prob
        self.max_attempts, self.seed, self.seed_candidates, self.fill = max_attempts, seed, seed_candidates, fill
        self.statistics = SearchStatistics()
        self._generation = 0
        self._history: list[ScoredCandidate] = []
        self._pending: dict[str, tuple[Candidate, Origin]] = {}
        self._asked: set[str] = set()
        self._is_exhausted = False

    @property
    def generation(self) -> int:
        """Number of generations told; the next ``ask`` is for the generation of this number."""
        return self._generation

    @property
    def stop_reason(self) -> str | None:
        """``"generations"``: all were told; ``"space_exhausted"``: nothing new was found; None while searching."""
        if self._generation >= self.num_generations:
            return "generations"
        return "space_exhausted" if self._is_exhausted else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask."""
        return self.stop_reason is not None

    @property
    def history(self) -> tuple[ScoredCandidate, ...]:
        """Everything told, in the order it was asked."""
        return tuple(self._history)

    @property
    def best(self) -> ScoredCandidate | None:
        """Candidate of lowest score, the first of several; None while none has a finite score."""
        return next(iter(self.top(1)), None)

    def top(self, num: int) -> tuple[ScoredCandidate, ...]:
        """At most ``num`` candidates of lowest score, best first, ties in the order asked; failed ones never."""
        succeeded = [scored for scored in self._history if math.isfinite(scored.score)]
        return tuple(sorted(succeeded, key=lambda scored: scored.score)[:num])

    def ask(self) -> tuple[Candidate, ...]:
        """Candidates of this generation: distinct, feasible, never asked in an earlier one.

        Asked again before ``tell`` it gives the same ones. It may give fewer than ``population_size``
        (``statistics.num_capped``); empty means that the search is finished.
        """
        if not self._pending and not self.finished:
            self._draw_generation()
            self._is_exhausted = not self._pending
        return tuple(candidate for candidate, _ in self._pending.values())

    def tell(self, scores: Mapping[str, float]) -> None:
        """Take the scores of the generation last asked for.

        Args:
            scores: ``Candidate.key()`` -> score, lower is better, for each asked candidate and no other. NaN and
                infinities stand for a candidate that failed: it is not asked again and is no parent.

        Raises:
            ValueError: If keys are missing or were not asked for.
        """
        if not self._pending:
            raise ValueError("scores must follow an ask, found that nothing was asked for")
        missing, unknown = self._pending.keys() - scores.keys(), scores.keys() - self._pending.keys()
        if missing or unknown:
            raise ValueError(
                f"scores must hold the {len(self._pending)} candidates asked for: "
                f"missing {sorted(missing)}, not asked for {sorted(unknown)}"
            )
        for key, (candidate, origin) in self._pending.items():
            score = float(scores[key])
            score = score if math.isfinite(score) else math.inf
            self._history.append(ScoredCandidate(candidate, score, self._generation, origin))
        self._pending = {}
        self._generation += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a search of the same arguments needs to go on, as plain values for ``json.dumps``.

        A failed score is null. There is no random state besides the seed and the generation.
        """
        return {
            "settings": self._settings(),
            "generation": self._generation,
            "is_exhausted": self._is_exhausted,
            "statistics": asdict(self.statistics),
            "history": [
                {
                    "candidate": scored.candidate.to_json(),
                    "score": scored.score if math.isfinite(scored.score) else None,
                    "generation": scored.generation,
                    "origin": scored.origin.value,
                }
                for scored in self._history
            ],
            "pending": [{"candidate": c.to_json(), "origin": origin.value} for c, origin in self._pending.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, on a search made with the same arguments.

        Raises:
            ValueError: If the state is of a search with other arguments (named), or is no such state.
        """
        try:
            ours, theirs = self._settings(), dict(state["settings"])
            differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            if differing:
                raise ValueError(f"state is of a search with other arguments: {', '.join(differing)}")
            history = [
                ScoredCandidate(
                    Candidate.from_json(entry["candidate"]),
                    math.inf if entry["score"] is None else float(entry["score"]),
                    int(entry["generation"]),
                    Origin(entry["origin"]),
                )
                for entry in state["history"]
            ]
            drawn = [(Candidate.from_json(entry["candidate"]), Origin(entry["origin"])) for entry in state["pending"]]
            statistics = SearchStatistics(**state["statistics"])
            generation, is_exhausted = int(state["generation"]), bool(state["is_exhausted"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of an evolutionary search: {error!r} while reading it") from error
        self._history, self.statistics = history, statistics
        self._generation, self._is_exhausted = generation, is_exhausted
        self._pending = {candidate.key(): (candidate, origin) for candidate, origin in drawn}
        self._asked = {scored.candidate.key() for scored in history} | self._pending.keys()

    def _settings(self) -> dict[str, Any]:
        """Arguments as plain values; space, costs and seed candidates as content hashes."""
        return {
            "space": _digest(self.space),
            "cost": _digest(self.budget.cost),
            "budget_bitops": self.budget.budget_bitops,
            "population_size": self.population_size,
            "num_parents": self.num_parents,
            "num_mutants": self.num_mutants,
            "num_crossovers": self.num_crossovers,
            "num_generations": self.num_generations,
            "mutation_prob": self.mutation_prob,
            "max_attempts": self.max_attempts,
            "seed": self.seed,
            "seed_candidates": [candidate.key() for candidate in self.seed_candidates],
            "fill": self.fill,
            "sample_from": self.sample_from,
        }

    def _draw_generation(self) -> None:
        rng = np.random.default_rng([self.seed, self._generation])
        if self._generation == 0:
            for candidate in self.seed_candidates:
                self._accept(self._repair(candidate, rng), Origin.SEED)
        parents = [scored.candidate for scored in self.top(self.num_parents)]
        for origin in self._places(len(parents)):
            draw = self._operator(origin, parents, rng)
            for _ in range(self.max_attempts):
                if self._offer(draw(), origin, rng):
                    break
            else:
                self.statistics.num_capped += 1

    def _places(self, num_parents: int) -> Iterator[Origin]:
        """Origin of each place of the generation that is still free."""
        num_mutants = self.num_mutants if num_parents >= 1 else 0
        num_crossovers = self.num_crossovers if num_parents >= 2 else 0
        num_random = self.population_size - len(self._pending) - num_mutants - num_crossovers
        for origin, num in (
            (Origin.MUTATION, num_mutants),
            (Origin.CROSSOVER, num_crossovers),
            (Origin.RANDOM, num_random),
        ):
            for _ in range(num):
                yield origin

    def _operator(self, origin: Origin, parents: list[Candidate], rng: np.random.Generator) -> Callable[[], Candidate]:
        """The draw of an origin; it may leave the budget."""

        def mutate() -> Candidate:
            return self.space.mutate(parents[int(rng.integers(len(parents)))], self.mutation_prob, rng)

        def cross() -> Candidate:
            first, second = rng.choice(len(parents), size=2, replace=False).tolist()
            return self.space.crossover(parents[first], parents[second], rng)

        if origin is Origin.MUTATION:
            return mutate
        return (
            cross
            if origin is Origin.CROSSOVER
            else lambda: self.space.sample(rng, highest_bits=self.sample_from == "highest")
        )

    def _offer(self, drawn: Candidate, origin: Origin, rng: np.random.Generator) -> bool:
        """Repair, fill and accept a draw; False if it was asked before."""
        repaired = self._repair(drawn, rng)
        if self.fill and self._accept(self.budget.fill(repaired, rng), origin):
            return True
        return self._accept(repaired, origin)

    def _repair(self, drawn: Candidate, rng: np.random.Generator) -> Candidate:
        repaired = self.budget.repair(drawn, rng)
        self.statistics.num_repairs += repaired is not drawn
        return repaired

    def _accept(self, candidate: Candidate, origin: Origin) -> bool:
        key = candidate.key()
        if key in self._asked:
            self.statistics.num_duplicates += 1
            return False
        self._asked.add(key)
        self._pending[key] = candidate, origin
        return True


def _at_least(minimum: int, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int:
            raise ValueError(f"{name} must be an integer of at least {minimum}, found {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, found {value}")


def _digest(value: object) -> str:
    """Content hash of a frozen dataclass of plain values, 16 hex digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
