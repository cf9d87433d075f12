"""Owns which timesteps a candidate may keep: one or several of each group, within a range of their total number."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb

import numpy as np


@dataclass(frozen=True)
class StepSpace:
    """All sequences that keep ``min_steps_per_group`` to ``max_steps_per_group`` timesteps of every group.

    One step a group and as many steps as groups is the method's rule; 0 to 2 a group searches their number too; a
    single group of all timesteps is the search without groups.

    Args:
        groups: Ascending, non-empty sequences of timesteps; each group lies above the one before it.
        min_steps, max_steps: Range of K, the kept timesteps of a candidate.
        min_steps_per_group, max_steps_per_group: Range of a group's kept timesteps; a group that is smaller keeps all
            of its timesteps at most.

    Raises:
        ValueError: If groups are empty or overlap, a range is empty, or the groups cannot hold so few or so many steps.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: one kept timestep a group.

    Differs from the method where a group may keep none or several: K is then searched.
    """

    groups: tuple[Sequence[int], ...]
    min_steps: int
    max_steps: int
    min_steps_per_group: int = 1
    max_steps_per_group: int = 1

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("timestep_groups must not be empty")
        timesteps = [timestep for group in self.groups for timestep in group]
        if not all(self.groups) or any(low >= high for low, high in pairwise(timesteps)):
            raise ValueError("timestep_groups must be non-empty and ascend, within each group and from one to the next")
        if not 0 <= self.min_steps_per_group <= self.max_steps_per_group:
            raise ValueError(
                "min_steps_per_group must be at least 0 and at most max_steps_per_group, "
                f"found {self.min_steps_per_group} and {self.max_steps_per_group}"
            )
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"min_steps must be at least 1 and at most max_steps, found {self.min_steps} and {self.max_steps}"
            )
        fewest = sum(min(self.min_steps_per_group, len(group)) for group in self.groups)
        most = sum(self._room(group) for group in range(len(self.groups)))
        if self.max_steps < fewest or self.min_steps > most:
            raise ValueError(
                f"{len(self.groups)} groups keep {fewest} to {most} timesteps, which min_steps..max_steps must meet, "
                f"found {self.min_steps}..{self.max_steps}"
            )
        object.__setattr__(self, "min_steps", max(self.min_steps, fewest))
        object.__setattr__(self, "max_steps", min(self.max_steps, most))

    @property
    def num_genes(self) -> int:
        """Groups whose kept timesteps can vary."""
        return sum(
            not (self._floor(group) == self._room(group) == len(self.groups[group]))
            for group in range(len(self.groups))
        )

    def num_sequences(self) -> dict[int, int]:
        """K -> number of distinct sequences of K timesteps, for every K that is allowed."""
        counts = [1]
        for group, timesteps in enumerate(self.groups):
            ways = [comb(len(timesteps), n) if n >= self._floor(group) else 0 for n in range(self._room(group) + 1)]
            longer = [0] * min(len(counts) + len(ways) - 1, self.max_steps + 1)
            for i, before in enumerate(counts):
                for n, way in enumerate(ways[: len(longer) - i]):
                    longer[i + n] += before * way
            counts = longer
        return {k: number for k, number in enumerate(counts) if self.min_steps <= k <= self.max_steps}

    def contains(self, timesteps: Sequence[int]) -> bool:
        """Whether these timesteps, descending, are one of the sequences."""
        kept = self.split(timesteps)
        return (
            sum(map(len, kept)) == len(timesteps)
            and self.min_steps <= len(timesteps) <= self.max_steps
            and all(self._floor(group) <= len(steps) <= self._room(group) for group, steps in enumerate(kept))
            and all(timestep in group for steps, group in zip(kept, self.groups, strict=True) for timestep in steps)
        )

    def group_of(self, timestep: int) -> int:
        """Index of the group whose span holds a timestep, or of the next one."""
        return bisect_left(self.groups, timestep, key=lambda group: group[-1])

    def split(self, timesteps: Sequence[int]) -> list[list[int]]:
        """Timesteps of each group, ascending; those above the last group are left out."""
        kept: list[list[int]] = [[] for _ in self.groups]
        for timestep in reversed(timesteps):
            group = self.group_of(timestep)
            if group < len(kept):
                kept[group].append(timestep)
        return kept

    def first(self, num_steps: int) -> tuple[int, ...]:
        """Sequence of K allowed timesteps: the smallest of each group, then the second smallest, from low groups up."""
        counts = [self._floor(group) for group in range(len(self.groups))]
        for _ in range(num_steps - sum(counts)):
            counts[min((count, group) for group, count in enumerate(counts) if count < self._room(group))[1]] += 1
        return _joined([list(group[:count]) for group, count in zip(self.groups, counts, strict=True)])

    def sample(self, rng: np.random.Generator, max_steps: int) -> tuple[int, ...]:
        """Sequence of K timesteps, K drawn uniformly from ``min_steps..max_steps``, spread over random groups."""
        num_steps = self.min_steps + _draw(rng, min(max_steps, self.max_steps) - self.min_steps + 1)
        counts = [self._floor(group) for group in range(len(self.groups))]
        slots = [group for group, count in enumerate(counts) for _ in range(self._room(group) - count)]
        missing = num_steps - sum(counts)
        chosen = range(len(slots)) if missing == len(slots) else rng.permutation(len(slots))[:missing].tolist()
        for slot in chosen:
            counts[slots[slot]] += 1
        kept: list[list[int]] = []
        for group, count in zip(self.groups, counts, strict=True):
            steps: list[int] = []
            for _ in range(count):
                insort(steps, _unused(group, steps, rng))
            kept.append(steps)
        return _joined(kept)

    def mutate(
        self, timesteps: Sequence[int], mutation_prob: float, rng: np.random.Generator, reach: float = 1.0
    ) -> tuple[int, ...]:
        """Move each timestep within its group, and let each group gain or lose one, with probability ``mutation_prob``.

        A moved timestep may keep its place, as in the release.

        Args:
            timesteps: The sequence.
            mutation_prob: In [0, 1].
            rng: Source of randomness.
            reach: How far a timestep may move, as a share of its group, in (0, 1]. Below 1 is ours.
        """
        kept = self.split(timesteps)
        for group, steps in enumerate(kept):
            for timestep in tuple(steps):
                if rng.random() < mutation_prob:
                    steps.remove(timestep)
                    near = _near(self.groups[group], timestep, reach)
                    insort(steps, _unused(near, [used for used in steps if near[0] <= used <= near[-1]], rng))
            floor, room = self._floor(group), self._room(group)
            if floor < room and rng.random() < mutation_prob:
                if len(steps) == floor or (len(steps) < room and rng.random() < 0.5):
                    insort(steps, _unused(self.groups[group], steps, rng))
                else:
                    del steps[_draw(rng, len(steps))]
        return self._with_legal_number(kept, self.groups, rng)

    def crossover(self, first: Sequence[int], second: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
        """Uniform crossover by group: what both parents keep stays, of the rest each parent gives about half.

        Timesteps that only one parent keeps are paired in order; a fair coin takes one of each pair, and another
        decides over those left without a partner.
        """
        splits = self.split(first), self.split(second)
        kept, pools = [], []
        for one, other in zip(*splits, strict=True):
            common = [timestep for timestep in one if timestep in other]
            short, long = sorted(([t for t in steps if t not in common] for steps in (one, other)), key=len)
            partners = sorted(rng.permutation(len(long))[: len(short)].tolist()) if len(long) > 1 else range(len(short))
            steps = common + [pair[rng.random() < 0.5] for pair in zip(short, (long[i] for i in partners), strict=True)]
            if len(long) > len(short) and rng.random() < 0.5:
                steps += [timestep for i, timestep in enumerate(long) if i not in partners]
            kept.append(sorted(steps))
            pools.append(sorted({*one, *other}))
        return self._with_legal_number(kept, pools, rng)

    def droppable(self, timesteps: Sequence[int], order: Sequence[int]) -> list[int]:
        """Of the indices ``order`` into ``timesteps``, those that can be dropped one after the other."""
        counts = [len(steps) for steps in self.split(timesteps)]
        dropped: list[int] = []
        for index in order:
            group = self.group_of(timesteps[index])
            if counts[group] > self._floor(group) and len(timesteps) - len(dropped) > self.min_steps:
                counts[group] -= 1
                dropped.append(index)
        return dropped

    def with_one_more(self, timesteps: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
        """The sequence and one more timestep, of a random group that has room; K must be below ``max_steps``."""
        kept = self.split(timesteps)
        self._add(kept, self.groups, rng)
        return _joined(kept)

    def counterparts(self, timesteps: Sequence[int], others: Sequence[int]) -> list[int]:
        """For each timestep the index of its counterpart in another sequence: the nearest, of the same group if any."""
        groups = [self.group_of(other) for other in others]

        def nearest(timestep: int) -> int:
            group = self.group_of(timestep)
            return min(range(len(others)), key=lambda i: (groups[i] != group, abs(others[i] - timestep)))

        return [nearest(timestep) for timestep in timesteps]

    def _floor(self, group: int) -> int:
        return min(self.min_steps_per_group, len(self.groups[group]))

    def _room(self, group: int) -> int:
        return min(self.max_steps_per_group, len(self.groups[group]))

    def _with_legal_number(
        self, kept: list[list[int]], pools: Sequence[Sequence[int]], rng: np.random.Generator
    ) -> tuple[int, ...]:
        """Drop or add random timesteps until their number is allowed; those added come from the groups' ``pools``."""
        for _ in range(sum(map(len, kept)) - self.max_steps):
            groups = [group for group, steps in enumerate(kept) for _ in steps if len(steps) > self._floor(group)]
            steps = kept[groups[_draw(rng, len(groups))]]
            del steps[_draw(rng, len(steps))]
        for _ in range(self.min_steps - sum(map(len, kept))):
            self._add(kept, pools, rng)
        return _joined(kept)

    def _add(self, kept: list[list[int]], pools: Sequence[Sequence[int]], rng: np.random.Generator) -> None:
        open_groups = [
            group for group, steps in enumerate(kept) if len(steps) < min(self._room(group), len(pools[group]))
        ]
        group = open_groups[_draw(rng, len(open_groups))]
        insort(kept[group], _unused(pools[group], kept[group], rng))


def _draw(rng: np.random.Generator, count: int) -> int:
    """Uniform integer below ``count``; several times as fast as ``rng.integers`` for one number."""
    return int(rng.random() * count)


def _near(group: Sequence[int], timestep: int, reach: float) -> Sequence[int]:
    """Members of an ascending group at most this share of it away from one of them, at least one on either side."""
    position, distance = bisect_left(group, timestep), max(1, round(reach * len(group)))
    return group[max(0, position - distance) : position + distance + 1]


def _unused(pool: Sequence[int], used: Sequence[int], rng: np.random.Generator) -> int:
    """Uniform member of an ascending pool that is not among ``used``, ascending members of it."""
    position = _draw(rng, len(pool) - len(used))
    for timestep in used:
        position += pool.index(timestep) <= position
    return pool[position]


def _joined(kept: list[list[int]]) -> tuple[int, ...]:
    return tuple(timestep for steps in reversed(kept) for timestep in reversed(steps))
