"""Owns the search space: which candidates exist, how they are drawn and varied, and their form as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation, Candidate
from tmpq_exp.search.steps import StepSpace

Genes: TypeAlias = NDArray[np.int64]
"""Indices into a layer's choices, ``(3, S, L)``: weight bits, activation bits and tile; steps (1 if shared); layers."""


class BitsPerStep(str, Enum):
    """Whether the steps of a candidate share one allocation."""

    SHARED = "shared"
    PER_STEP = "per_step"


@dataclass(frozen=True)
class SearchSpace:
    """All candidates that keep some timesteps of each group and give each layer one of its choices.

    A gene is a kept timestep, or the weight bits, activation bits or tile of a layer, at all steps or at one. A gene
    with a single choice is fixed: groups of one timestep fix the schedule, single choices fix a layer.

    Args:
        timestep_groups: Ascending, non-empty sequences of timesteps; each group lies above the one before it.
        weight_choices, act_choices, tile_choices: One entry a layer: the distinct values it may take.
        min_steps, max_steps: Range of K; None: as many steps as there are groups.
        min_steps_per_group, max_steps_per_group: Range of the steps of one group.
        bits_per_step: ``shared``: one allocation for all steps; ``per_step``: one each. Steps that agree in everything
            are written as one shared allocation, so that equal candidates have equal keys.

    Raises:
        ValueError: If ``StepSpace`` refuses the groups, the three choices differ in length, or a layer has no choice or
            the same one twice.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: genome of grouped timesteps and per-layer bits.

    Differs from the method, which fixes K and shares bits, where it is told to.
    """

    timestep_groups: tuple[Sequence[int], ...]
    weight_choices: tuple[tuple[int, ...], ...]
    act_choices: tuple[tuple[int, ...], ...]
    tile_choices: tuple[tuple[int, ...], ...]
    min_steps: int | None = None
    max_steps: int | None = None
    min_steps_per_group: int = 1
    max_steps_per_group: int = 1
    bits_per_step: BitsPerStep = BitsPerStep.SHARED
    steps: StepSpace = field(init=False, repr=False, compare=False)
    values: Genes = field(init=False, repr=False, compare=False)
    """``(3, L, C)``: choices of every layer, ascending; the highest repeated where a layer has fewer than C."""
    num_choices: Genes = field(init=False, repr=False, compare=False)
    """``(3, 1, L)``: number of choices of every layer."""
    _indices: Genes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_groups = len(self.timestep_groups)
        fewest, most = (num_groups if bound is None else bound for bound in (self.min_steps, self.max_steps))
        steps = StepSpace(self.timestep_groups, fewest, most, self.min_steps_per_group, self.max_steps_per_group)
        lengths = [len(self.weight_choices), len(self.act_choices), len(self.tile_choices)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"weight_choices, act_choices and tile_choices must have one entry a layer each, found {lengths}"
            )
        for name in ("weight_choices", "act_choices", "tile_choices"):
            for index, choices in enumerate(getattr(self, name)):
                if not choices or len(set(choices)) != len(choices):
                    raise ValueError(
                        f"{name} of layer {index} must be distinct and at least one, found {list(choices)}"
                    )
        kinds = [[sorted(choices) for choices in kind] for kind in self._kinds]
        longest = max(len(choices) for kind in kinds for choices in kind)
        values = np.array([[c + c[-1:] * (longest - len(c)) for c in kind] for kind in kinds])
        indices = np.full((3, lengths[0], int(values.max()) + 1), -1)
        for position in reversed(range(longest)):
            np.put_along_axis(indices, values[..., position, None], position, axis=-1)
        num_choices = np.array([[list(map(len, kind))] for kind in kinds])
        object.__setattr__(self, "bits_per_step", BitsPerStep(self.bits_per_step))
        for name, value in (("steps", steps), ("values", values), ("num_choices", num_choices), ("_indices", indices)):
            object.__setattr__(self, name, value)

    @property
    def _kinds(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return self.weight_choices, self.act_choices, self.tile_choices

    @property
    def is_shared(self) -> bool:
        """Whether all steps share one allocation."""
        return self.bits_per_step is BitsPerStep.SHARED

    @property
    def num_layers(self) -> int:
        """Layers of every allocation."""
        return len(self.weight_choices)

    @property
    def num_genes(self) -> int:
        """Genes that can vary, with the bits of ``max_steps`` steps where steps have their own."""
        num_varied = sum(len(choices) > 1 for kind in self._kinds for choices in kind)
        return self.steps.num_genes + num_varied * (1 if self.is_shared else self.steps.max_steps)

    @property
    def num_candidates(self) -> int:
        """Distinct candidates, whatever they cost."""
        num_allocations = prod(len(choices) for kind in self._kinds for choices in kind)
        return sum(
            num_sequences * num_allocations ** (1 if self.is_shared else num_steps)
            for num_steps, num_sequences in self.steps.num_sequences().items()
        )

    def sample(
        self, rng: np.random.Generator, *, highest_bits: bool = False, max_steps: int | None = None
    ) -> Candidate:
        """Candidate with every gene drawn uniformly, and first of all the number of its steps.

        Args:
            rng: Source of randomness.
            highest_bits: Every layer has its highest bits instead, for ``Budget.repair`` to lower: layers that cost
                little then keep them. Ours.
            max_steps: Most steps, within the range of the space.
        """
        timesteps = self.steps.sample(rng, max_steps or self.steps.max_steps)
        genes = self._draw_genes(self._num_rows(timesteps), rng)
        if highest_bits:
            genes[:2] = self.num_choices[:2] - 1
        return self.decode(timesteps, genes)

    def mutate(
        self,
        candidate: Candidate,
        mutation_prob: float,
        rng: np.random.Generator,
        *,
        step_mutation_prob: float | None = None,
        reach: float = 1.0,
    ) -> Candidate:
        """Redraw each gene uniformly with probability ``mutation_prob``; see ``StepSpace.mutate`` for timesteps.

        A redrawn gene may keep its value, as in the release. A step that is new starts with the allocation of its
        counterpart.

        Args:
            candidate: Candidate of this space.
            mutation_prob: Of bits and tiles, in [0, 1].
            rng: Source of randomness.
            step_mutation_prob: Of timesteps; None: as the others.
            reach: See ``StepSpace.mutate``.
        """
        step_prob = mutation_prob if step_mutation_prob is None else step_mutation_prob
        timesteps = self.steps.mutate(candidate.timesteps, step_prob, rng, reach)
        genes = self._genes_at(candidate, timesteps)
        redrawn = self._draw_genes(genes.shape[1], rng)
        return self.decode(timesteps, np.where(rng.random(genes.shape) < mutation_prob, redrawn, genes))

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """Uniform crossover: every gene from one of two parents, by a fair coin; see ``StepSpace.crossover``.

        Where steps have their own bits, a step takes those of its counterparts in the parents.
        """
        timesteps = self.steps.crossover(first.timesteps, second.timesteps, rng)
        one, other = (self._genes_at(parent, timesteps) for parent in (first, second))
        return self.decode(timesteps, np.where(rng.random(one.shape) < 0.5, one, other))

    def contains(self, candidate: Candidate) -> bool:
        """Whether every gene of a candidate is one of the choices here."""
        if self.is_shared and len(candidate.allocations) != 1:
            return False
        if any(len(allocation) != self.num_layers for allocation in candidate.allocations):
            return False
        return self.steps.contains(candidate.timesteps) and bool((self._lookup(candidate) >= 0).all())

    def uniform(self, timesteps: tuple[int, ...], weight_bits: int, act_bits: int) -> Candidate:
        """Candidate with the same bits at every layer, for seeds and baselines.

        A layer whose gene is fixed keeps its only choice, and a layer that may be direct is. The timesteps need not be
        of this space's groups.

        Raises:
            ValueError: If a layer with several choices does not have the bits among them.
        """
        allocation = Allocation(
            tuple(_pick(choices, weight_bits, "weight_bits") for choices in self.weight_choices),
            tuple(_pick(choices, act_bits, "act_bits") for choices in self.act_choices),
            tuple(DIRECT_TILE if DIRECT_TILE in choices else choices[0] for choices in self.tile_choices),
        )
        return Candidate(timesteps, (allocation,))

    def cheapest(self, cost: CostModel) -> Candidate:
        """Candidate of fewest BitOPs: the fewest steps, each group's smallest timesteps; of tying choices the first."""
        settings = [
            min(product(*choices), key=lambda setting, layer=layer: cost.layer_bitops(layer, *setting))  # type: ignore[misc]
            for layer, choices in enumerate(zip(*self._kinds, strict=True))
        ]
        weight_bits, act_bits, tiles = zip(*settings, strict=True)
        return Candidate(self.steps.first(self.steps.min_steps), (Allocation(weight_bits, act_bits, tiles),))

    def encode(self, candidate: Candidate) -> Genes:
        """Genes of a candidate of this space, ``(3, S, L)``: S is 1 if steps share bits, else the number of steps."""
        genes = self._lookup(candidate)
        return np.broadcast_to(genes, (3, self._num_rows(candidate.timesteps), self.num_layers))

    def decode(self, timesteps: tuple[int, ...], genes: Genes) -> Candidate:
        """Inverse of ``encode``; steps that agree in everything share one allocation."""
        if genes.shape[1] > 1 and (genes == genes[:, :1]).all():
            genes = genes[:, :1]
        bits = self.values.ravel()[genes + self._offsets(self.values)].tolist()
        return Candidate(timesteps, tuple(Allocation(*map(tuple, rows)) for rows in zip(*bits, strict=True)))

    def _num_rows(self, timesteps: Sequence[int]) -> int:
        return 1 if self.is_shared else len(timesteps)

    def _genes_at(self, candidate: Candidate, timesteps: Sequence[int]) -> Genes:
        """Genes of a candidate moved to other timesteps: each takes those of its counterpart."""
        genes = self.encode(candidate)
        if self.is_shared or tuple(timesteps) == candidate.timesteps:
            return genes
        return genes[:, self.steps.counterparts(timesteps, candidate.timesteps)]

    def _draw_genes(self, num_rows: int, rng: np.random.Generator) -> Genes:
        drawn = rng.random((3, num_rows, self.num_layers)) * self.num_choices
        return drawn.astype(np.int64)

    def _lookup(self, candidate: Candidate) -> Genes:
        """Position of each value among its choices, ``(3, allocations, L)``; -1 where it is none of them."""
        rows = [(a.weight_bits, a.act_bits, a.tiles) for a in candidate.allocations]
        values = np.array(rows).transpose(1, 0, 2)
        highest = self._indices.shape[-1] - 1
        known = self._indices.ravel()[values.clip(0, highest) + self._offsets(self._indices)]
        return np.where((values < 0) | (values > highest), -1, known)

    def _offsets(self, table: Genes) -> Genes:
        """Where each layer's entries of a ``(3, L, C)`` table begin, ``(3, 1, L)``."""
        return np.arange(0, table.size, table.shape[-1]).reshape(3, 1, self.num_layers)


def _pick(choices: tuple[int, ...], bits: int, name: str) -> int:
    if len(choices) == 1:
        return choices[0]
    if bits not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, found {bits}")
    return bits
