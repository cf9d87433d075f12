"""Schema of the whole configuration and every range check that needs no network; imports no torch."""

from tmpq_exp.config.checks import MAX_BITS, MIN_BITS, UserError
from tmpq_exp.config.paper import STAND_INS, PaperConfig, PublishedFigure
from tmpq_exp.config.quantization import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.config.root import (
    Config,
    ExecutorConfig,
    LoggerConfig,
    PathsConfig,
    SweepConfig,
    from_plain,
    register_schema,
    to_config,
)
from tmpq_exp.config.search import BudgetConfig, CostConfig, EvaluationConfig, ObjectiveConfig, SpaceConfig
from tmpq_exp.config.winograd import (
    SCALES,
    ClassificationConfig,
    TileConfig,
    VariantConfig,
    WinogradConfig,
    WinogradLearningConfig,
)

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "SCALES",
    "STAND_INS",
    "BudgetConfig",
    "CalibrationConfig",
    "ClassificationConfig",
    "Config",
    "CostConfig",
    "EvaluationConfig",
    "ExecutorConfig",
    "Granularity",
    "LoggerConfig",
    "ObjectiveConfig",
    "PaperConfig",
    "PathsConfig",
    "PublishedFigure",
    "QuantConfig",
    "QuantizerConfig",
    "SpaceConfig",
    "SweepConfig",
    "TileConfig",
    "UserError",
    "VariantConfig",
    "WinogradConfig",
    "WinogradLearningConfig",
    "from_plain",
    "register_schema",
    "to_config",
]
