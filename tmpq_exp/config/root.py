"""The whole configuration, and the one door through which it enters."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from tmpq_exp.config.checks import UserError, check_at_least
from tmpq_exp.config.paper import STAND_INS, PaperConfig
from tmpq_exp.config.quantization import CalibrationConfig, Granularity, QuantConfig
from tmpq_exp.config.search import BudgetConfig, CostConfig, EvaluationConfig, ObjectiveConfig, SpaceConfig
from tmpq_exp.config.winograd import ClassificationConfig, WinogradConfig
from tmpq_exp.quant.allocation import DIRECT_TILE


@dataclass
class LoggerConfig:
    """Experiment tracking.

    Args:
        name: ``wandb``, ``csv``, ``tensorboard`` (needs the extra of that name) or ``none``.
        project: W&B project.
        mode: W&B mode: ``offline`` (no prompt, no network), ``online`` or ``disabled``.
        group: W&B group; null: jobs of a sweep share one, named after the sweep's directory.
        tags: W&B tags.
    """

    name: str = "wandb"
    project: str = "tmpq_exp"
    mode: str = "offline"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name not in ("wandb", "csv", "tensorboard", "none"):
            raise UserError(f"logger.name must be wandb, csv, tensorboard or none, found {self.name!r}")
        if self.name == "tensorboard" and find_spec("tensorboard") is None:
            raise UserError(
                "logger=tensorboard needs the package tensorboard, which is not installed: pip install "
                "'tmpq-exp[tensorboard]' (or tensorboard alone), or choose logger=csv"
            )
        if self.mode not in ("offline", "online", "disabled"):
            raise UserError(f"logger.mode must be offline, online or disabled, found {self.mode!r}")


@dataclass
class ExecutorConfig:
    """Who measures candidates.

    Args:
        name: ``local``: the processes of the Trainer; ``ray``: workers of a Ray cluster (needs the extra ``ray``).
        address: A running cluster, as ``auto`` or ``host:port``; null starts one of this host's own for the run.
        num_workers: Workers to ask for, at least 1; those the cluster has no room for wait until there is. null: one
            for every GPU, or for every ``num_threads`` CPUs, that the cluster has, counted anew all the time.
        start_timeout_seconds: How long to wait while there is no worker at all, above 0.
    """

    name: str = "local"
    address: str | None = None
    num_workers: int | None = None
    start_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.name not in ("local", "ray"):
            raise UserError(f"executor.name must be local or ray, found {self.name!r}")
        if self.name == "local" and (self.address is not None or self.num_workers is not None):
            raise UserError(
                "executor.address and executor.num_workers are of executor=ray, found them with executor=local; more "
                "processes on this host come by trainer=ddp or trainer.devices"
            )
        host, _, port = (self.address or "auto").rpartition(":")
        if self.address not in (None, "auto") and not (host and port.isdecimal()):
            raise UserError(f"executor.address must be auto, host:port or null, found {self.address!r}")
        if self.num_workers is not None:
            check_at_least("executor.num_workers", self.num_workers, 1)
        if not self.start_timeout_seconds > 0:
            raise UserError(f"executor.start_timeout_seconds must be above 0, found {self.start_timeout_seconds}")
        if self.name == "ray" and find_spec("ray") is None:
            raise UserError(
                "executor=ray needs the package ray, which is not installed: pip install 'tmpq-exp[ray]' (or ray alone)"
            )


@dataclass
class SweepConfig:
    """How a sweep goes on that was started before; finished jobs are never run again.

    Args:
        retry_failed: Run jobs again that failed before.
    """

    retry_failed: bool = False


@dataclass
class PathsConfig:
    """Where things are.

    Args:
        output_dir: Root of run directories.
        cache_dir: Where calibration states are kept for other runs.
        reference_dir: Where presets look for reference statistics and prompts.
        run_dir: This run's directory; set from Hydra.
    """

    output_dir: str = "outputs"
    cache_dir: str = "outputs/.cache"
    reference_dir: str = "references"
    run_dir: str = MISSING


_TASKS_WITH_WEIGHTS = (
    "tmpq_exp.pipeline.run",
    "tmpq_exp.forecast.forecast",
    "tmpq_exp.states.make_states",
    "tmpq_exp.classify.classify",
)


@dataclass
class Config:
    """Everything a job is told; the groups of ``conf/`` fill it.

    Args:
        task: What to do, a partial ``_target_``: ``run``, ``forecast``, ``report``, ``log``, ``train``, ``states``,
            ``table``, ``classify`` or ``cost``.
        tier: ``full`` or ``smoke``; only its name is kept.
        stand_in: Under ``tier=smoke``, the family of the small model with random weights that runs in the place of one
            that is not given; null: none.
        paper: The row of a paper that a preset reproduces; null in all other jobs.
        executor: Who measures candidates: this process and its ranks, or workers of a cluster.
        model: The float model, a ``_target_``.
        data: Images for training, or test images of a classifier, a ``_target_``.
        search: The search algorithm, a partial ``_target_``.
        trainer: The Lightning Trainer, a partial ``_target_``.
        metrics: Metrics by name, each a ``_target_``; ``evaluation`` chooses among them.
        reuse: Run directories whose calibration, static ranges and evaluations are taken over where protocol and
            quantizers are the same, as they are when only the budget or the search differ.
        runs: Run directories, or directories of sweeps, that ``task=report`` and ``task=table`` compare and
            ``task=log`` logs again.
        seed: Seed of every random stream, at least 0.
        search_seed: Seed of what the search draws and of the images it scores; null: as ``seed``. Runs that differ in
            it alone share calibration, selection and final images.
        num_threads: CPU threads of torch; null leaves torch's choice.
    """

    task: Any = MISSING
    tier: str = "full"
    stand_in: str | None = None
    paper: PaperConfig | None = None
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    model: Any = MISSING
    data: Any = MISSING
    quant: QuantConfig = field(default_factory=QuantConfig)
    winograd: WinogradConfig = field(default_factory=WinogradConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    search: Any = MISSING
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: Any = MISSING
    trainer: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    reuse: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    seed: int = 0
    search_seed: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        again = self.evaluation.recalibrate or self.evaluation.recalibrated_candidates
        if again and self.calibration.method == "ranges":
            raise UserError(
                "evaluation.recalibrate: calibration=ranges finds the same ranges again; choose calibration=sampled "
                "or calibration=uniform_prefix"
            )
        if self.stand_in is not None and self.stand_in not in STAND_INS:
            raise UserError(f"stand_in must be null or one of {', '.join(STAND_INS)}, found {self.stand_in!r}")
        check_at_least("seed", self.seed, 0)
        if self.search_seed is not None:
            check_at_least("search_seed", self.search_seed, 0)
        if self.num_threads is not None:
            check_at_least("num_threads", self.num_threads, 1)
        for row in self.classification.further:
            self.winograd.varied(row)
        self._check_searched_tiles()
        self._check_metrics()
        if self.cost.scale == "release" and self.winograd.tile != 0:
            raise UserError(f"winograd.tile must be 0 under cost.scale=release, found {self.winograd.tile}")

    @property
    def wants_stand_in(self) -> bool:
        """Whether this job runs the stand-in: a smoke tier of a task that needs weights, and none are given."""
        given = self.model.get("path") or self.model.get("checkpoint")
        needed = str(self.task["_target_"]) in _TASKS_WITH_WEIGHTS and not given
        return self.tier == "smoke" and self.stand_in is not None and needed

    def metric_node(self, chosen: Any) -> Any:
        """The ``_target_`` of a metric that is given by name, or itself."""
        return self.metrics[chosen] if isinstance(chosen, str) else chosen

    def _check_metrics(self) -> None:
        """Every metric is known by its name, or is a ``_target_``; none stands twice."""
        if self.evaluation.metric == MISSING:
            return
        further = [("evaluation.further", chosen) for chosen in self.evaluation.further]
        seen: list[Any] = []
        for key, chosen in [("evaluation.metric", self.evaluation.metric), *further]:
            if isinstance(chosen, str) and chosen not in self.metrics:
                raise UserError(f"{key}: no metric {chosen!r}; known: {', '.join(self.metrics)}")
            if not isinstance(chosen, str) and not (isinstance(chosen, dict) and "_target_" in chosen):
                raise UserError(f"{key} must be a name ({', '.join(self.metrics)}) or a _target_, found {chosen!r}")
            if chosen in seen:
                raise UserError(f"{key} must not repeat a metric, found {chosen!r} twice")
            seen.append(chosen)

    def _check_searched_tiles(self) -> None:
        """Where the tile is a gene, direct and Winograd layers have the same kind of quantizers."""
        if not self.space.tiles:
            return
        for name, quantizer in (("weight", self.quant.weight), ("act", self.quant.act)):
            if quantizer.granularity != Granularity.PER_GROUP.value:
                raise UserError(
                    "space.tiles needs the group-wise quantizers of Winograd layers in direct layers too: choose "
                    f"quant=groupwise or experiment=joint_winograd, found quant.{name}.granularity "
                    f"{quantizer.granularity}"
                )
        if self.winograd.tile != DIRECT_TILE:
            raise UserError(
                "winograd.tile must be 0 (winograd=none) where space.tiles lets every layer choose, "
                f"found {self.winograd.tile}"
            )


def register_schema() -> None:
    """Put the schema where the defaults list of ``conf/config.yaml`` finds it."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Composed config -> checked values: the one door through which a configuration enters.

    Raises:
        UserError: If a value is out of range or of the wrong type, or a key was added that nothing reads.
    """
    _refuse_added_keys(composed, "")
    for place in ("weight", "act"):  # a quantizer does not know whose it is
        try:
            OmegaConf.to_object(composed.quant[place])
        except UserError as error:
            raise UserError(f"quant.{place}.{error}") from None
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def from_plain(resolved: dict[str, Any]) -> Config:
    """Checked values of a configuration that was resolved to plain data, as ``config.yaml`` holds it."""
    composed = OmegaConf.merge(OmegaConf.structured(Config), resolved)
    assert isinstance(composed, DictConfig)
    return to_config(composed)


def _refuse_added_keys(node: DictConfig, prefix: str) -> None:
    """``+key=value`` gets past Hydra's check of names; here it is caught wherever the schema names the keys."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    known = [entry.name for entry in fields(schema)]
    for key in map(str, node):
        if key not in known:
            raise UserError(f"{prefix}{key}: no such key; known: {', '.join(known)}")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _refuse_added_keys(node[key], f"{prefix}{key}.")
