"""What each command of the command line does: call a flow, and print what came of it.

Heavy imports are made by the command that needs them, so that `turnout --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ConfigError
from flows.terminal import print_rows, print_table, show_preferences, show_run

if TYPE_CHECKING:
    from conf.schema import AnyExperiment
    from tasks.benchmark import BenchmarkReport, PreferenceReport
    from tasks.promotion import Aliases
    from tasks.reporting import RunReport


def run_command(arguments: argparse.Namespace) -> int:
    """Run the experiment that the file describes, and print its report."""
    from conf.schema import PreferenceExperiment

    experiment = _experiment(arguments)
    if isinstance(experiment, PreferenceExperiment):
        from flows.preference_pipeline import preference_pipeline

        return _print_run(arguments, experiment, preference_pipeline(experiment))
    from flows.pipeline import pipeline

    return _print_run(arguments, experiment, pipeline(experiment))


def _print_run(
    arguments: argparse.Namespace,
    experiment: "AnyExperiment",
    report: "RunReport | PreferenceReport",
) -> int:
    from tasks.benchmark import PreferenceReport

    if arguments.json:
        print(json.dumps(report.to_json()))
    elif isinstance(report, PreferenceReport):
        show_preferences(experiment, report)
    else:
        show_run(experiment, report)
    return 0


def retrain_command(arguments: argparse.Namespace) -> int:
    """Run the deployed flow here and print its report."""
    experiment = _experiment(arguments)
    from flows.retrain import retrain

    return _print_run(arguments, experiment, retrain(experiment))


def add_llm_command(arguments: argparse.Namespace) -> int:
    """Teach the pool one more LLM and print what came of it."""
    experiment = _experiment(arguments)
    from flows.add_llm import add_llm

    return _print_run(arguments, experiment, add_llm(experiment, arguments.llm))


def deploy_command(arguments: argparse.Namespace) -> int:
    """Put retraining on a schedule and say how a worker is started."""
    experiment = _experiment(arguments)
    from flows.deploy import deploy

    done = deploy(
        experiment,
        cron=arguments.cron,
        timezone=arguments.timezone,
        pool=arguments.pool,
        max_hours=arguments.max_hours,
    )
    if arguments.json:
        print(json.dumps({**asdict(done), "next": done.worker_command()}))
        return 0
    for line in done.lines():
        print(line)
    print(f"Next, where it is to run: `{done.worker_command()}`")
    return 0


def drift_command(arguments: argparse.Namespace) -> int:
    """Say whether recent queries have drifted and, if it is asked for, retrain."""
    experiment = _experiment(arguments)
    from flows.drift import drift, drift_request, retrained

    request = drift_request(
        arguments.queries,
        router=arguments.router,
        pair=arguments.pair,
        false_alarm_rate=arguments.false_alarm_rate,
        smallest_shift=arguments.smallest_shift,
    )
    report = drift(experiment, request)
    if not arguments.json:
        from rich.console import Console

        console = Console()
        print_table(console, f"Recent queries against those of {report.router}", report.rows())
        console.print(report.summary(), highlight=False)
        console.print(f"Holds if: {report.condition}.", highlight=False)
    started = None
    if arguments.retrain and report.verdict == "drift":
        started = retrained(experiment)
        if not arguments.json:
            print(started)
    if arguments.json:
        print(json.dumps({**report.to_json(), "retrain": started}))
    return 0


def promote_command(arguments: argparse.Namespace) -> int:
    """Make a registered version the champion."""
    experiment = _experiment(arguments)
    from flows.promote import promote

    found = promote(experiment, arguments.version, arguments.pair, arguments.force)
    return _show_aliases(arguments, found)


def rollback_command(arguments: argparse.Namespace) -> int:
    """Make the previous champion the champion again."""
    experiment = _experiment(arguments)
    from flows.promote import rollback

    return _show_aliases(arguments, rollback(experiment, arguments.pair))


def _show_aliases(arguments: argparse.Namespace, found: "Aliases") -> int:
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    print(f"{found.model}: version {found.champion} is the champion.")
    if found.previous is not None:
        print(f"Version {found.previous} is the previous one; `turnout rollback` swaps them.")
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare routers of several runs and print the table."""
    # Runs and settings are both words; only a setting holds an equals sign.
    words = [*arguments.runs, *arguments.overrides]
    arguments.overrides = [word for word in words if "=" in word]
    if arguments.report is not None:
        _check_file(arguments.report, "--report")
    experiment = _experiment(arguments)
    from flows.compare import compare, compare_url

    asked = [word for word in words if "=" not in word]
    found = compare(experiment, asked, pair=arguments.pair, report=arguments.report)
    url = compare_url(experiment, found)
    if arguments.json:
        print(json.dumps({**found.to_json(), "url": url}))
        return 0
    from rich.console import Console

    from tasks.comparison_tables import console_rows

    console = Console(highlight=False)
    title = f"{found.pair.weak} or {found.pair.strong}: {len(found.weak)} queries by {found.metric}"
    print_table(console, title, console_rows(found))
    for letter, run in found.runs.items():
        console.print(f"{letter}  {run.run_id[:8]} {run.name}, {run.started}, {run.evaluated}")
    if found.champion() is not None:
        console.print("★  the champion; differences are paired, on the same queries")
    for note in found.notes:
        console.print(note)
    if arguments.report is not None:
        console.print(f"The report is in {arguments.report}.")
    if arguments.open:
        console.print(url, soft_wrap=True)
        if not url.startswith(experiment.store.mlflow_uri()):
            console.print("`turnout ui` serves that page.")
    return 0


def ui_command(arguments: argparse.Namespace) -> int:
    """Serve MLflow's UI on the experiment's store until interrupted."""
    from tasks.tracking import routers_url

    store = _experiment(arguments).store
    print(f"All routers, best first: {routers_url(store)}", file=sys.stderr)
    if store.mlflow_uri().startswith("http"):
        return 0
    os.execv(
        sys.executable,
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", store.mlflow_uri(), "--host", "127.0.0.1", "--port", "5000"),
        ],
    )


def tables_command(arguments: argparse.Namespace) -> int:
    """Show tables, rows of one, or the result of a query; or prune the store."""
    if arguments.name is not None and "=" in arguments.name:  # a setting, and no name
        arguments.name, arguments.overrides = None, [arguments.name, *arguments.overrides]
    if arguments.name is not None and (arguments.sql is not None or arguments.prune):
        raise ConfigError(
            f"The table {arguments.name!r} is named beside --sql or --prune. Expected one of them: "
            "both speak of the whole warehouse. Leave the other out."
        )
    experiment = _experiment(arguments)
    if arguments.prune:
        return _prune(arguments, experiment)
    from tasks import tables
    from tasks.warehouse import Warehouse

    warehouse = Warehouse(experiment.store.directory, wait_s=2.0)
    if arguments.sql is not None:
        rows = tables.selected(warehouse, arguments.sql, limit=arguments.limit)
    elif arguments.name is not None:
        rows = tables.first_rows(warehouse, arguments.name, limit=arguments.limit)
    else:
        found = tables.summaries(warehouse)
        print_rows(arguments, tables.as_json(found), tables.as_text(found), title="Warehouse")
        return 0
    if rows.note:
        print(f"turnout: {rows.note}", file=sys.stderr)
    print_rows(arguments, rows.to_json(), rows.records(), title=arguments.name or "Result")
    return 0


def _prune(arguments: argparse.Namespace, experiment: "AnyExperiment") -> int:
    from conf.load import load_experiment
    from tasks.retention import prune

    of_store = tuple(each for each in arguments.overrides if each.startswith("store."))
    others = [load_experiment(config, of_store) for config in arguments.also]
    pruned = prune(
        [experiment, *others],
        keep_days=arguments.keep_days,
        keep_runs=arguments.keep_runs,
        dry_run=arguments.dry_run,
    )
    title = "Would be deleted" if pruned.dry_run else "Deleted"
    print_rows(arguments, pruned.to_json(), pruned.rows(), title=title)
    return 0


def benchmark_command(arguments: argparse.Namespace) -> int:
    """Compare routers on a folder of known answers and print the table."""
    if arguments.eval is not None and arguments.folds is not None:
        raise ConfigError(
            "--folds and --eval are given. Expected one of them: with --eval, routers are trained "
            "on the one folder and judged on the other. Leave one out."
        )
    if arguments.figure is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        _check_file(arguments.figure, "--figure", FigureCanvasBase.get_supported_filetypes())
    from conf.load import load_benchmark

    evaluation = {} if arguments.folds is None else {"folds": arguments.folds}
    settings = load_benchmark(
        arguments.routers.split(","),
        {
            "directory": arguments.directory,
            "evaluation_directory": arguments.eval,
            "train_rows": arguments.train_rows,
            "seed": arguments.seed,
            "weak": arguments.weak,
            "strong": arguments.strong,
            "evaluation": evaluation,
        },
        tuple(arguments.overrides),
    )
    from flows.benchmark import benchmark

    report = benchmark(settings)
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        _show_benchmark(report)
    if arguments.figure is not None:
        from tasks.figures import cost_quality

        cost_quality(report.comparison).savefig(arguments.figure)
    return 0


def _show_benchmark(report: "BenchmarkReport") -> None:
    from rich.console import Console

    console = Console()
    comparison = report.comparison
    how = "out of fold" if comparison.out_of_fold else "held out"
    title = f"{comparison.pair.weak} or {comparison.pair.strong}: {comparison.queries} rows, {how}"
    print_table(console, title, report.rows())
    for note in report.notes():
        console.print(note, highlight=False, markup=False)
    console.print(f"`turnout ui` shows run {report.run_id[:8]} with figures and win rates.")


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print the findings; exit code 1 if something needed is missing."""
    from flows.doctor import findings

    found = findings(_experiment(arguments))
    if arguments.json:
        print(json.dumps([finding.__dict__ for finding in found]))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "what", "found", "what to do", title="turnout doctor")
        for finding in found:
            mark = "[green]ok[/]" if finding.ok else "[red]missing[/]"
            table.add_row(mark, finding.what, finding.found, finding.remedy)
        Console().print(table)
    return 0 if all(finding.ok for finding in found) else 1


def calibrate_command(arguments: argparse.Namespace) -> int:
    """Choose and store a threshold, and print what it promises."""
    experiment = _experiment(arguments)
    from flows.calibrate import calibrate, threshold_request

    request = threshold_request(
        arguments.router,
        pair=arguments.pair,
        max_drop=arguments.max_drop,
        confidence=arguments.confidence,
        strong_share=arguments.strong_share,
        data=arguments.data,
        quality_range=arguments.quality_range,
    )
    found = calibrate(experiment, request)
    if arguments.json:
        print(json.dumps(found.to_json()))
    else:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Threshold of {found.router}", box=SIMPLE_HEAD, show_header=False)
        for what, value in found.rows():
            table.add_row(what, value)
        Console().print(table)
    return 0


def _check_file(path: Path, option: str, kinds: Collection[str] = ()) -> None:
    """Raise ConfigError for a file that cannot be written, before work is done whose result it is.

    kinds: what its name may end in; by default anything.
    """
    folder = path.absolute().parent
    flaws = {
        f"{folder} is no folder": not folder.is_dir(),
        "it is a folder": path.is_dir(),
        "that is not allowed": not os.access(path if path.exists() else folder, os.W_OK),
    }
    if why := [flaw for flaw, found in flaws.items() if found]:
        raise ConfigError(
            f"{option} {path} cannot be written: {why[0]}. Expected a file in a folder that exists "
            "and may be written to. Give another path."
        )
    if kinds and path.suffix[1:].lower() not in kinds:
        raise ConfigError(
            f"{option} {path} ends in {path.suffix!r}. Expected one of "
            f"{', '.join(f'.{kind}' for kind in sorted(kinds))}. Rename it."
        )


def _experiment(arguments: argparse.Namespace) -> "AnyExperiment":
    from conf.load import load_experiment

    return load_experiment(arguments.config, tuple(arguments.overrides))
