"""The search as a LightningModule: one epoch is one generation, one batch is one candidate."""

from __future__ import annotations

from typing import Any

import lightning as L

from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.objective import Objective


class SearchModule(L.LightningModule):
    """Asks the search for a generation, scores its candidates, and tells the scores when the epoch ends.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1`` and at least as many epochs as there are generations. A
    killed search resumes by running again: every recorded candidate is answered from the trials.

    Args:
        search: Algorithm by ask and tell.
        objective: Scores candidates.
    """

    def __init__(self, search: Search, objective: Objective) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.search, self.objective = search, objective
        self._scores: dict[str, float] = {}

    @property
    def progress_note(self) -> str:
        """What the progress bar shows."""
        scores = [*self._scores.values(), *([self.search.best.score] if self.search.best else [])]
        return f"best {self.objective.metric.name} {min(scores):.3f}" if scores else ""

    def configure_optimizers(self) -> None:
        """None: evolution needs no gradient."""

    def train_dataloader(self) -> range:
        """Indices into the generation that is asked for now."""
        return range(len(self.search.ask()))

    def training_step(self, batch: int, batch_idx: int) -> None:
        """Score one candidate."""
        candidate = self.search.ask()[batch]
        trial = self.objective.evaluate(candidate, "search", generation=self.search.generation)
        self._scores[trial.key] = trial.score(self.objective.metric.name)

    def on_train_epoch_end(self) -> None:
        """Tell the generation's scores."""
        self.search.tell(self._scores)
        self._scores = {}
        self.search.ask()  # an empty answer ends the search before an empty epoch would
        if self.search.finished:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The whole state of the search, as plain values."""
        checkpoint["search"] = self.search.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of ``on_save_checkpoint``."""
        self.search.load_state_dict(checkpoint["search"])
