"""The search as a LightningModule: one epoch is one generation, one batch is one evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L

from tmpq_exp.metrics.names import loss, value_of
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.executor import Executor, evaluate_all
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.trials import Trial


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

    def score(self, trial: Trial) -> float:
        """Proxy of a candidate, lower is better."""
        return loss(self.metric, trial.metrics[self.metric])


class SearchModule(L.LightningModule):
    """Asks the search for a generation, scores its candidates, and tells the scores when the epoch ends.

    With a proxy every candidate is looked at cheaply first and only the most promising are scored; the others are
    told as failed, so that they are no parents.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1`` and at least as many epochs as there are generations. A
    killed search resumes by running again: every recorded candidate is answered from the trials. The scores of a
    generation may become known in any order; the search is told them all at once.

    Args:
        search: Algorithm by ask and tell.
        objective: Scores candidates.
        executor: Measures them, here or elsewhere.
        proxy: The cheap look before; None scores all.
    """

    def __init__(self, search: Search, objective: Objective, executor: Executor, proxy: Proxy | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.search, self.objective, self.executor, self.proxy = search, objective, executor, proxy
        self._running: Iterator[Trial] = iter(())
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
        """The next evaluation that is done."""
        if batch == 0:
            self._running = self._evaluations()
        next(self._running)

    def _evaluations(self) -> Iterator[Trial]:
        """Those of the generation: the proxy's of all candidates, then the scores of those that go on."""
        candidates, generation = self.search.ask(), self.search.generation
        if self.proxy is not None:
            for trial in evaluate_all(self.executor, self.proxy.objective, candidates, "proxy", generation=generation):
                self._proxies[trial.key] = self.proxy.score(trial)
                yield trial
            candidates = self._promoted(candidates, self.proxy)
        for trial in evaluate_all(self.executor, self.objective, candidates, "search", generation=generation):
            self._scores[trial.key] = trial.score(self.objective.score.name)
            yield trial

    def _promoted(self, candidates: tuple[Candidate, ...], proxy: Proxy) -> tuple[Candidate, ...]:
        """The candidates of the best proxies, best first."""
        ranked = sorted(candidates, key=lambda candidate: self._proxies[candidate.key()])
        return tuple(ranked[: proxy.num_promoted(len(candidates))])

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
