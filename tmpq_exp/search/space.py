"""Owns the search space: which candidates exist, how they are drawn and varied, and how one is fitted to a budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from typing import TypeAlias

import numpy as np

from tmpq_exp.cost import CostModel
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation, Candidate

LayerSetting: TypeAlias = tuple[int, int, int]
"""``(weight_bits, act_bits, tile)`` of one layer."""


@dataclass(frozen=True)
class SearchSpace:
    """All candidates that keep one timestep a group and give each layer one of its choices, the same at all steps.

    A gene is a kept timestep, or the weight bits, activation bits or tile of a layer. A gene with a single choice is
    fixed: groups of one timestep fix the schedule, single choices fix a layer.

    Args:
        timestep_groups: One ascending, non-empty sequence of timesteps a kept step; each group lies above the one
            before it.
        weight_choices, act_choices, tile_choices: One entry a layer: the distinct values it may take.

    Raises:
        ValueError: If groups are empty or overlap, the three choices differ in length, or a layer has no choice or the
            same one twice.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: genome of grouped timesteps and per-layer bits.
    """

    timestep_groups: tuple[Sequence[int], ...]
    weight_choices: tuple[tuple[int, ...], ...]
    act_choices: tuple[tuple[int, ...], ...]
    tile_choices: tuple[tuple[int, ...], ...]
    _genes: tuple[Sequence[int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.timestep_groups:
            raise ValueError("timestep_groups must not be empty")
        timesteps = [timestep for group in self.timestep_groups for timestep in group]
        if not all(self.timestep_groups) or any(low >= high for low, high in pairwise(timesteps)):
            raise ValueError("timestep_groups must be non-empty and ascend, within each group and from one to the next")
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
        genes = (*reversed(self.timestep_groups), *self.weight_choices, *self.act_choices, *self.tile_choices)
        object.__setattr__(self, "_genes", genes)

    @property
    def num_steps(self) -> int:
        """Kept timesteps of every candidate."""
        return len(self.timestep_groups)

    @property
    def num_layers(self) -> int:
        """Layers of every allocation."""
        return len(self.weight_choices)

    @property
    def num_genes(self) -> int:
        """Genes that can vary."""
        return sum(len(choices) > 1 for choices in self._genes)

    @property
    def num_candidates(self) -> int:
        """Distinct candidates, whatever they cost."""
        return math.prod(len(choices) for choices in self._genes)

    def sample(self, rng: np.random.Generator, *, highest_bits: bool = False) -> Candidate:
        """Candidate with every gene drawn uniformly.

        With ``highest_bits`` every layer has its highest bits instead, for ``Budget.repair`` to lower: layers that
        cost little then keep them. Ours.
        """
        draws = rng.random(len(self._genes)).tolist()
        candidate = self._candidate([self._choose(gene, draw) for gene, draw in enumerate(draws)])
        if not highest_bits:
            return candidate
        weight_bits, act_bits = (tuple(map(max, choices)) for choices in (self.weight_choices, self.act_choices))
        tiles = candidate.allocations[0].tiles
        return Candidate(candidate.timesteps, (Allocation(weight_bits, act_bits, tiles),))

    def mutate(self, candidate: Candidate, mutation_prob: float, rng: np.random.Generator) -> Candidate:
        """Redraw each gene uniformly with probability ``mutation_prob``, a timestep within its group.

        A redrawn gene may keep its value, as in the release.
        """
        values = self._values(candidate)
        redrawn = (rng.random(len(values)) < mutation_prob).tolist()
        draws = rng.random(len(values)).tolist()
        return self._candidate(
            [self._choose(gene, draws[gene]) if redrawn[gene] else value for gene, value in enumerate(values)]
        )

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """Uniform crossover: every gene from one of two parents, by a fair coin."""
        pairs = zip(self._values(first), self._values(second), strict=True)
        coins = rng.random(len(self._genes)).tolist()
        return self._candidate([pair[coin < 0.5] for pair, coin in zip(pairs, coins, strict=True)])

    def contains(self, candidate: Candidate) -> bool:
        """Whether every gene of a candidate is one of the choices here."""
        allocation = candidate.allocations[0]
        if len(candidate.allocations) != 1 or len(candidate.timesteps) != self.num_steps:
            return False
        if len(allocation) != self.num_layers:
            return False
        return all(value in choices for value, choices in zip(self._values(candidate), self._genes, strict=True))

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
        """Candidate of fewest BitOPs; where several tie, the first choices and the smallest timesteps."""
        settings = [self._cheapest_setting(layer, cost) for layer in range(self.num_layers)]
        return Candidate(tuple(group[0] for group in reversed(self.timestep_groups)), (_allocation(settings),))

    def _cheapest_setting(self, layer: int, cost: CostModel) -> LayerSetting:
        settings = product(self.weight_choices[layer], self.act_choices[layer], self.tile_choices[layer])
        return min(settings, key=lambda setting: cost.layer_bitops(layer, *setting))

    def _choose(self, gene: int, draw: float) -> int:
        choices = self._genes[gene]
        return choices[int(draw * len(choices))]

    def _values(self, candidate: Candidate) -> list[int]:
        """Genes in order: timesteps (descending), weight bits, activation bits, tiles."""
        allocation = candidate.allocations[0]
        return [*candidate.timesteps, *allocation.weight_bits, *allocation.act_bits, *allocation.tiles]

    def _candidate(self, values: list[int]) -> Candidate:
        first, layers = self.num_steps, self.num_layers
        weight_bits, act_bits, tiles = (tuple(values[first + i * layers : first + (i + 1) * layers]) for i in range(3))
        return Candidate(tuple(values[:first]), (Allocation(weight_bits, act_bits, tiles),))


class Budget:
    """A ceiling on the BitOPs of a whole trajectory, and the means to bring a candidate of a space below it.

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
        self.cheapest_bitops = cost.bitops(space.cheapest(cost))
        if budget_bitops < self.cheapest_bitops:
            raise ValueError(
                f"budget_bitops must be at least {self.cheapest_bitops} (the cheapest candidate's BitOPs), "
                f"found {budget_bitops}"
            )
        self._call_budget = budget_bitops // (space.num_steps * cost.calls_per_step)
        self._moves: dict[tuple[bool, int, LayerSetting], list[tuple[int, LayerSetting]]] = {}

    def is_feasible(self, candidate: Candidate) -> bool:
        """Whether a candidate costs no more than the budget."""
        return self.cost.bitops(candidate) <= self.budget_bitops

    def repair(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Lower genes until the candidate is feasible; one that is feasible comes back as it is.

        A move takes one gene of a layer to its next cheaper choice. Moves are drawn with probability proportional to
        the BitOPs they save, so that the most expensive layers give way first and small ones keep their bits. Costs
        rise with either bit width at any tile, so moves lead to the cheapest candidate at the latest.

        Differs from the release, which draws again until a candidate is feasible.
        """
        settings = _settings(candidate)
        excess = self._call_bitops(settings) - self._call_budget
        if excess <= 0:
            return candidate
        moves = [self._layer_moves(i, setting, cheaper=True) for i, setting in enumerate(settings)]
        savings = [sum(saving for saving, _ in layer) for layer in moves]
        for _ in range(self._num_moves):
            total = list(accumulate(savings))
            assert total[-1] > 0, "an infeasible candidate that nothing makes cheaper"
            layer = bisect_right(total, int(rng.integers(total[-1])))
            saving, settings[layer] = _weighted(moves[layer], rng)
            excess -= saving
            if excess <= 0:
                break
            moves[layer] = self._layer_moves(layer, settings[layer], cheaper=True)
            savings[layer] = sum(s for s, _ in moves[layer])
        assert excess <= 0, "moves did not reach the budget"
        return Candidate(candidate.timesteps, (_allocation(settings),))

    def fill(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Raise genes of a feasible candidate, in random order, until no single one can be raised within the budget.

        A move takes one gene of a layer to its next costlier choice. Ours: a candidate far below the ceiling wastes an
        evaluation, because more bits seldom hurt.
        """
        settings = _settings(candidate)
        slack = self._call_budget - self._call_bitops(settings)
        for _ in range(self._num_moves):
            raised = False
            for layer in rng.permutation(self.space.num_layers).tolist():
                moves = [m for m in self._layer_moves(layer, settings[layer], cheaper=False) if -m[0] <= slack]
                if moves:
                    saving, settings[layer] = moves[int(rng.integers(len(moves)))]
                    slack += saving
                    raised = True
            if not raised:
                break
        return Candidate(candidate.timesteps, (_allocation(settings),))

    @property
    def _num_moves(self) -> int:
        """Moves that take every gene through all of its choices: no fitting needs more."""
        space = self.space
        return sum(map(len, (*space.weight_choices, *space.act_choices, *space.tile_choices)))

    def _call_bitops(self, settings: list[LayerSetting]) -> int:
        return sum(self.cost.layer_bitops(i, *setting) for i, setting in enumerate(settings))

    def _layer_moves(self, layer: int, setting: LayerSetting, *, cheaper: bool) -> list[tuple[int, LayerSetting]]:
        """Next cheaper (or next costlier) choice of each gene of a layer: BitOPs it saves (negative: adds), setting."""
        key = (cheaper, layer, setting)
        if key not in self._moves:
            self._moves[key] = self._find_moves(layer, setting, cheaper)
        return self._moves[key]

    def _find_moves(self, layer: int, setting: LayerSetting, cheaper: bool) -> list[tuple[int, LayerSetting]]:
        w, a, tile = setting
        space, now = self.space, self.cost.layer_bitops(layer, *setting)
        variants: tuple[list[LayerSetting], ...] = (
            [(choice, a, tile) for choice in space.weight_choices[layer]],
            [(w, choice, tile) for choice in space.act_choices[layer]],
            [(w, a, choice) for choice in space.tile_choices[layer]],
        )
        moves = []
        for settings in variants:
            savings = [(now - self.cost.layer_bitops(layer, *other), other) for other in settings]
            savings = [move for move in savings if (move[0] > 0 if cheaper else move[0] < 0)]
            if savings:
                moves.append(min(savings, key=lambda move: abs(move[0])))
        return moves


def _weighted(moves: list[tuple[int, LayerSetting]], rng: np.random.Generator) -> tuple[int, LayerSetting]:
    """One move, with probability proportional to the BitOPs it saves."""
    total = list(accumulate(saving for saving, _ in moves))
    return moves[bisect_right(total, int(rng.integers(total[-1])))]


def _settings(candidate: Candidate) -> list[LayerSetting]:
    allocation = candidate.allocations[0]
    return list(zip(allocation.weight_bits, allocation.act_bits, allocation.tiles, strict=True))


def _allocation(settings: list[LayerSetting]) -> Allocation:
    weight_bits, act_bits, tiles = zip(*settings, strict=True)
    return Allocation(weight_bits, act_bits, tiles)


def _pick(choices: tuple[int, ...], bits: int, name: str) -> int:
    if len(choices) == 1:
        return choices[0]
    if bits not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, found {bits}")
    return bits
