"""The whole line: float task, supernet, calibration, Winograd stage, search, specialize, evaluate, report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmpq_exp.calibrating import calibrate
from tmpq_exp.config import Config
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.forecast import say_forecast
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.ranging import static_ranges
from tmpq_exp.ranks import RankExecutor, Ranks, started
from tmpq_exp.recipe import apply_recipe, write_recipe
from tmpq_exp.report import further_table, pareto_png, report_html, samples_png, summary_table, write_report_json
from tmpq_exp.results import assemble_report, picture_records, sample_rows
from tmpq_exp.rundir import RunDirectory, writing
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.sharing import Team
from tmpq_exp.stages import Shipped, evaluate, search, select, specialize
from tmpq_exp.terminal import print_table
from tmpq_exp.tiling import winograd_scales
from tmpq_exp.tracking import Job, NullTracker, Tracker, finishing, open_tracker, run_results, say_notice
from tmpq_exp.weighing import weigh
from tmpq_exp.worker import Blueprint


def run(config: Config, resolved: dict[str, Any]) -> None:
    """Search a model and write recipe and report into the run directory; resumes a run that was killed there.

    Of several processes under the Trainer's strategy the first does all that; the others learn bit widths and measure
    candidates for it.

    Args:
        config: Checked configuration.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        ValueError: If the input is bad; nothing that was recorded before is lost.
        ConnectionError: If another of the processes has stopped; likewise.
    """
    quiet_lightning()
    with started(config) as ranks:
        if ranks is not None and ranks.rank > 0:
            ranks.serve()
        else:
            _drive(config, resolved, ranks)


def _drive(config: Config, resolved: dict[str, Any], ranks: Ranks | None) -> None:
    """``run`` in the process that decides and records."""
    with writing(Path(config.paths.run_dir)):
        directory = RunDirectory.claim(Path(config.paths.run_dir), resolved)
        trials = TrialLog(directory.trials, [Path(path) for path in config.reuse])
        for warning in trials.warnings:
            print(f"warning: {warning}", file=sys.stderr)

        tracker: Tracker = NullTracker()
        experiment = prepare(config, directory, trials, on_trial=lambda trial: tracker.log_trial(asdict(trial)))
        for warning in experiment.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        say_forecast(experiment)
        job = Job.of_directory(directory.path, "run", resolved)
        tracker = open_tracker(config.logger, job, map(asdict, trials.trials))
        with finishing(tracker), _executing(experiment, resolved, ranks):
            experiment.ready_metrics()
            calibrate(experiment, None if ranks is None else Team(ranks, Blueprint.here(resolved)))
            winograd = winograd_scales(experiment)
            static_ranges(experiment)
            algorithm, search_objective = search(experiment)
            winner = select(experiment, algorithm)
            evidence = weigh(experiment, algorithm, search_objective, winner)
            shipped = specialize(experiment, winner)
            finals, final_objective = evaluate(experiment, shipped)
            shipping = _ship(experiment, shipped, finals["best"])
            report = assemble_report(
                experiment,
                winograd,
                algorithm,
                shipped,
                finals,
                evidence,
                search_objective,
                final_objective,
                [*trials.warnings, *experiment.warnings, *shipping],
            )
            rows = sample_rows(experiment, shipped, final_objective.protocol.seed)
            records = picture_records(experiment, search_objective)
            _write_pages(directory, report, records, rows, winner)
            tracker.log_results(run_results(directory, [asdict(trial) for trial in trials.trials], report))
    print_table(summary_table(report))
    further = further_table(report)
    if further is not None:
        print_table(further)
    print(f"report  {directory.report_html}\nrecipe  {directory.recipe}")
    say_notice(tracker)


@contextmanager
def _executing(experiment: Experiment, resolved: dict[str, Any], ranks: Ranks | None) -> Iterator[None]:
    """Have candidates measured by whom the configuration names, while inside."""
    if ranks is not None:
        experiment.executor = RankExecutor(ranks, experiment, resolved)
        yield
    elif experiment.config.executor.name == "ray":
        from tmpq_exp.elastic import RayExecutor, cluster  # an extra

        with cluster(experiment.config.executor):
            experiment.executor = RayExecutor(experiment, resolved)
            yield
    else:
        yield


def _ship(experiment: Experiment, shipped: Shipped, trial: Trial) -> list[str]:
    """Write the recipe; a warning if it does not give the winner's images back to the last bit."""
    directory, module = experiment.run, shipped.module
    micro_batch = trial.micro_batch or experiment.micro_batch
    write_recipe(
        directory.recipe,
        directory.recipe_state,
        module,
        shipped.candidate,
        experiment.winograd,
        micro_batch=micro_batch,
        evidence={"metrics": trial.metrics, "num_images": trial.num_images, "seed": trial.seed},
    )
    restored = apply_recipe(directory.recipe, module.task).sample(micro_batch, trial.seed)
    made = module.images(shipped.candidate, range(micro_batch), trial.seed).cpu()
    if restored.equal(made):
        return []
    difference = (restored - made).abs().max()
    warning = f"recipe.json gives the winner's images back only to within {difference:.1g} of a range of 1"
    print(f"warning: {warning}", file=sys.stderr)
    return [warning]


def _write_pages(
    directory: RunDirectory, report: dict[str, Any], records: list[dict[str, Any]], rows: list[Any], winner: Candidate
) -> None:
    """report.json, pareto.png, samples.png and report.html."""
    pareto_png(
        directory.pareto,
        records,
        metric=report["search"]["metric"],
        budget_bitops=report["budget"]["bitops"],
        budget_name=report["budget"]["name"],
        best_key=winner.key(),
        fingerprint=report["fingerprint"]["search"],
    )
    samples_png(directory.samples, rows)
    write_report_json(directory.report_json, report)
    pictures = {"pareto": directory.pareto, "samples": directory.samples}
    report_html(directory.report_html, report, records, pictures, rows)
