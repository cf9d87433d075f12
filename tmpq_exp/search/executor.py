"""Who measures candidates: one small interface for this process, the ranks of a run, and the workers of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol as Interface

from torch import Tensor

from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Protocol, images_by
from tmpq_exp.search.trials import Trial


class Executor(Interface):
    """Measures candidates and makes images, the same figures and images wherever it does.

    Only the process that drives the run calls one, and it alone records what comes back.
    """

    @property
    def is_local(self) -> bool:
        """Whether this process does all the work."""
        ...

    @property
    def num_workers(self) -> int:
        """How many candidates are measured at a time."""
        ...

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        """Each candidate once with its figures, in the order in which they become known."""
        ...

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """Images of the supernet; see ``tmpq_exp.search.protocol.Images``."""
        ...


class LocalExecutor:
    """Everything in this process, one candidate after the other.

    Args:
        module: The supernet.
    """

    is_local, num_workers = True, 1

    def __init__(self, module: SupernetModule) -> None:
        self._images = images_by(module)

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        """See ``Executor``."""
        for candidate in candidates:
            yield candidate, objective.measure(candidate)

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """See ``Executor``."""
        return self._images(candidate, protocol)


def evaluate_all(
    executor: Executor,
    objective: Objective,
    candidates: Sequence[Candidate],
    phase: str,
    *,
    generation: int | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Trial]:
    """Trials of candidates: the recorded ones first, then the new ones, each on disk when it is given.

    Candidates are shared out over the workers; where there are fewer candidates than workers, the micro-batches of
    each are.

    Args:
        executor: Measures what is not recorded.
        objective: Of the supernet.
        candidates: What to evaluate; what stands there twice is evaluated once.
        phase, generation: See ``Trial``.
        names: Name of each candidate, where they have one.
    """
    named = dict(zip(candidates, names, strict=True)) if names is not None else {}
    missing: list[Candidate] = []
    for candidate in dict.fromkeys(candidates):
        known = objective.recorded(candidate, phase, name=named.get(candidate), generation=generation)
        if known is None:
            missing.append(candidate)
        else:
            yield known
    if len(missing) < executor.num_workers:
        for candidate in missing:
            yield objective.evaluate(candidate, phase, name=named.get(candidate), generation=generation)
        return
    for candidate, measured in executor.measure(objective, missing):
        yield objective.record(candidate, measured, phase, name=named.get(candidate), generation=generation)
