"""Experiment tracking: what a job tells W&B, CSV files or TensorBoard, and that their troubles never stop it."""

from tmpq_exp.tracking.opening import finishing, open_tracker, say_notice
from tmpq_exp.tracking.records import classification_records, classification_results, run_results
from tmpq_exp.tracking.tracker import GuardedTracker, Job, NullTracker, QualityChart, Results, Tracker
from tmpq_exp.tracking.training import TrainingCurve

__all__ = [
    "GuardedTracker",
    "Job",
    "NullTracker",
    "QualityChart",
    "Results",
    "Tracker",
    "TrainingCurve",
    "classification_records",
    "classification_results",
    "finishing",
    "open_tracker",
    "run_results",
    "say_notice",
]
