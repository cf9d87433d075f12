"""Owns the protocol of every search: ask for a generation, tell its scores, give the best; and how a search resumes."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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
    GREEDY = "greedy"


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
        num_draws: Candidates drawn.
        num_repairs: Candidates drawn over the budget and lowered below it.
        num_fills: Candidates asked for whose bits or steps were raised towards the ceiling.
        num_duplicates: Candidates drawn again that had been asked before, and thrown away.
        num_capped: Places of a generation left empty because ``max_attempts`` draws held nothing new.
    """

    num_draws: int = 0
    num_repairs: int = 0
    num_fills: int = 0
    num_duplicates: int = 0
    num_capped: int = 0


class Search(ABC):
    """A search by ask and tell: every candidate asked for is within the budget, and none is asked twice.

    ``ask`` gives a generation, ``tell`` takes its scores; nothing else has influence, so the same seed and the same
    scores give the same history on any number of workers. Each generation draws from its own stream, made from the
    seed and its number: a search is resumed by ``load_state_dict``, or by asking and telling again what was recorded.

    A subclass draws a generation (``_draw_generation``) from what was told before (``history``), by ``_place``, and
    adds its own arguments to ``_settings``. It keeps no other state.

    Args:
        space: The search space.
        cost: Prices its candidates.
        budget_bitops: Most BitOPs of a candidate, whole trajectory, one image, guidance included.
        population_size: Most candidates a generation, at least 1.
        num_generations: Generations asked in all, generation 0 included; at least 1.
        max_attempts: Draws for one place of a generation before it stays empty; at least 1.
        seed: At least 0.
        seed_candidates: At most ``population_size``, asked for first; each must lie in the space, and is repaired if it
            costs more than the budget.
        fill: Raise drawn candidates to the ceiling (``Budget.fill``). A filled candidate that was asked before gives
            way to the one it was filled from.
        sample_from: How random candidates come by their bits: ``highest``: the highest of every layer, lowered to the
            budget where they cost most; ``uniform``: drawn, then lowered.

    Raises:
        ValueError: If an argument lies outside its range, or no candidate fits the budget.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: CostModel,
        budget_bitops: int,
        *,
        population_size: int,
        num_generations: int,
        max_attempts: int = 100,
        seed: int = 0,
        seed_candidates: tuple[Candidate, ...] = (),
        fill: bool = True,
        sample_from: str = "highest",
    ) -> None:
        check_at_least(1, population_size=population_size, num_generations=num_generations, max_attempts=max_attempts)
        check_at_least(0, seed=seed)
        if len(seed_candidates) > population_size:
            raise ValueError(
                f"seed_candidates must be at most population_size ({population_size}), found {len(seed_candidates)}"
            )
        for index, candidate in enumerate(seed_candidates):
            if not space.contains(candidate):
                raise ValueError(f"seed_candidates must lie in the search space, found {index} outside: {candidate}")
        if sample_from not in ("highest", "uniform"):
            raise ValueError(f"sample_from must be highest or uniform, found {sample_from!r}")
        self.space, self.budget = space, Budget(space, cost, budget_bitops)
        self.population_size, self.num_generations = population_size, num_generations
        self.max_attempts, self.seed, self.seed_candidates = max_attempts, seed, seed_candidates
        self.fill, self.sample_from = fill, sample_from
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
        return tuple(sorted(self._succeeded(), key=lambda scored: scored.score)[:num])

    def ask(self) -> tuple[Candidate, ...]:
        """Candidates of this generation: distinct, feasible, never asked in an earlier one.

        Asked again before ``tell`` it gives the same ones. It may give fewer than ``population_size``
        (``statistics.num_capped``); empty means that the search is finished.
        """
        if not self._pending and not self.finished:
            rng = np.random.default_rng([self.seed, self._generation])
            if self._generation == 0:
                for candidate in self.seed_candidates:
                    self._accept(self._repair(candidate, rng), Origin.SEED)
            self._draw_generation(rng)
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
            raise ValueError(f"not the state of a search: {error!r} while reading it") from error
        self._history, self.statistics = history, statistics
        self._generation, self._is_exhausted = generation, is_exhausted
        self._pending = {candidate.key(): (candidate, origin) for candidate, origin in drawn}
        self._asked = {scored.candidate.key() for scored in history} | self._pending.keys()

    @abstractmethod
    def _draw_generation(self, rng: np.random.Generator) -> None:
        """Place at most ``population_size`` candidates; the seed candidates of generation 0 are placed already."""

    def _settings(self) -> dict[str, Any]:
        """Arguments as plain values; space, costs and seed candidates as content hashes."""
        return {
            "algorithm": type(self).__name__,
            "space": _digest(self.space),
            "cost": _digest(self.budget.cost),
            "budget_bitops": self.budget.budget_bitops,
            "population_size": self.population_size,
            "num_generations": self.num_generations,
            "max_attempts": self.max_attempts,
            "seed": self.seed,
            "seed_candidates": [candidate.key() for candidate in self.seed_candidates],
            "fill": self.fill,
            "sample_from": self.sample_from,
        }

    def _succeeded(self) -> list[ScoredCandidate]:
        return [scored for scored in self._history if math.isfinite(scored.score)]

    def _sample(self, rng: np.random.Generator) -> Candidate:
        """A random candidate; it may leave the budget."""
        is_highest = self.sample_from == "highest"
        return self.space.sample(rng, highest_bits=is_highest, max_steps=self.budget.max_steps)

    def _place(
        self,
        origin: Origin,
        draw: Callable[[], Candidate],
        rng: np.random.Generator,
        budget_bitops: int | None = None,
    ) -> bool:
        """Fill one place of the generation with a draw: repaired, filled, and new; False if no attempt was new.

        Args:
            origin: Of the candidate.
            draw: Draws a candidate of the space; it may leave the budget.
            rng: Source of randomness of repair and fill.
            budget_bitops: A lower ceiling for this candidate.
        """
        for _ in range(self.max_attempts):
            self.statistics.num_draws += 1
            repaired = self._repair(draw(), rng, budget_bitops)
            if self.fill:
                filled = self.budget.fill(repaired, rng, budget_bitops)
                if self._accept(filled, origin):
                    self.statistics.num_fills += filled != repaired
                    return True
                if filled == repaired:
                    continue
            if self._accept(repaired, origin):
                return True
        self.statistics.num_capped += 1
        return False

    def _repair(self, drawn: Candidate, rng: np.random.Generator, budget_bitops: int | None = None) -> Candidate:
        repaired = self.budget.repair(drawn, rng, budget_bitops)
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


def check_at_least(minimum: int, **values: int) -> None:
    """Raise ``ValueError`` for the first value that is no integer of at least ``minimum``."""
    for name, value in values.items():
        if type(value) is not int:
            raise ValueError(f"{name} must be an integer of at least {minimum}, found {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, found {value}")


def check_probability(name: str, value: float) -> None:
    """Raise ``ValueError`` unless the value lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], found {value}")


def _digest(value: object) -> str:
    """Content hash of a frozen dataclass of plain values, 16 hex digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
