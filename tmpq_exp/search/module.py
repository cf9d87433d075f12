"""The search as a LightningModule: one epoch is one generation, one batch is one evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L

from tmpq_exp.metrics.names import loss, value_of
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.objective import Objective


@dataclass(frozen=True)
class Proxy:
    """A cheap look at every candidate, which decides whose quality is measured.

    Args:
        objective: Evaluates without the quality metric, on few images.
        metric: ``feature_mse`` (lower is better) or ``psnr_db`` (higher is better).
        promote_fraction: Share of a generation that goes on, in (0, 1]; at least one candidate does.
    """

    objective: Objective
    metric: str
    promote_fraction: float

    def num_promoted(self, num_candidates: int) -> int:
        """Candidates of a generation that go on."""
        return math.ceil(num_candidates * self.promote_fraction)

    def score(self, candidate: Candidate, generation: int) -> float:
        """Proxy of a candidate, lower is better."""
        found = self.objective.evaluate(candidate, "proxy", generation=generation).metrics[self.metric]
        return loss(self.metric, found)


class SearchModule(L.LightningModule):
    """Asks the search for a generation, scores its candidates, and tells the scores when the epoch ends.

    With a proxy every candidate is looked at cheaply first and only the most promising are scored; the others are
    told as failed, so that they are no parents.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1`` and at least as many epochs as there are generations. A
    killed search resumes by running again: every recorded candidate is answered from the trials.

    Args:
        search: Algorithm by ask and tell.
        objective: Scores candidates.
        proxy: The cheap look before; None scores all.
    """

    def __init__(self, search: Search, objective: Objective, proxy: Proxy | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.search, self.objective, self.proxy = search, objective, proxy
        self._scores: dict[str, float] = {}
        self._proxies: dict[str, float] = {}

    @property
    def progress_note(self) -> str:
        """What the progress bar shows."""
        scores = [*self._scores.values(), *([self.search.best.score] if self.search.best else [])]
        metric = self.objective.score.name
        best = value_of(metric, min(scores, default=math.inf))
        return "" if best is None else f"best {metric} {best:.3f}"

    def configure_optimizers(self) -> None:
        """None: evolution needs no gradient."""

    def train_dataloader(self) -> range:
        """Numbers of the evaluations of the generation that is asked for now: the proxy's first, then the scores."""
        size = len(self.search.ask())
        return range(size if self.proxy is None else size + self.proxy.num_promoted(size))

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One evaluation."""
        candidates = self.search.ask()
        if self.proxy is not None and batch < len(candidates):
            candidate = candidates[batch]
            self._proxies[candidate.key()] = self.proxy.score(candidate, self.search.generation)
            return
        trial = self.objective.evaluate(self._promoted(candidates)[batch], "search", generation=self.search.generation)
        self._scores[trial.key] = trial.score(self.objective.score.name)

    def _promoted(self, candidates: tuple[Candidate, ...]) -> dict[int, Candidate]:
        """Number of the evaluation -> candidate whose quality it measures."""
        if self.proxy is None:
            return dict(enumerate(candidates))
        ranked = sorted(candidates, key=lambda candidate: self._proxies[candidate.key()])
        return dict(enumerate(ranked[: self.proxy.num_promoted(len(candidates))], start=len(candidates)))

    def on_train_epoch_end(self) -> None:
        """Tell the generation's scores."""
        self.search.tell({c.key(): self._scores.get(c.key(), math.inf) for c in self.search.ask()})
        self._scores, self._proxies = {}, {}
        self.search.ask()  # an empty answer ends the search before an empty epoch would
        if self.search.finished:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The whole state of the search, as plain values."""
        checkpoint["search"] = self.search.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of ``on_save_checkpoint``."""
        self.search.load_state_dict(checkpoint["search"])
