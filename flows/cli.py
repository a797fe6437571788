"""The command line: its parser first, then one function for each command.

A long file: a command is an entry in the parser and a function that calls a flow and prints what
came of it, and both are looked for in one place. Heavy imports are made by the command that needs
them, so that `turnout --help` answers at once.
"""

import argparse
import atexit
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, TurnoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from conf.schema import AnyExperiment
    from tasks.benchmark import PreferenceReport
    from tasks.gate import Receipt
    from tasks.promotion import Aliases
    from tasks.reporting import RunReport

TABLE_COLUMNS = 4  # more do not fit into 80 characters beside each other

# Quiet and private unless the user has said otherwise. The console stays free for our own report;
# Prefect's UI still gets every log line.
ENVIRONMENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    """Run the command line; exit code 1 for an error with a message, 2 for wrong usage."""
    arguments = parsed(sys.argv[1:])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    code = 1

    def leave() -> None:
        # Registered first, so it runs after all other exit functions. DuckDB's binding would go on
        # to list every object of its own that is alive when the interpreter is taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        code = arguments.command(arguments)
    except TurnoutError as error:
        print(f"turnout: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("turnout: stopped. What was received is kept; run again to go on.", file=sys.stderr)


def parsed(words: "Sequence[str]") -> argparse.Namespace:
    """Return the command and its options; `key=value` may stand anywhere among them."""
    top = parser()
    arguments, others = top.parse_known_args(words)
    if any(word.startswith("-") or "=" not in word for word in others):
        top.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.overrides = [*arguments.overrides, *others]
    return arguments


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="turnout", description="Train, judge, promote and serve LLM routers."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "--config", default="embedded", help="an experiment's name or YAML file (default: embedded)"
    )
    settings.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as generation.samples=4"
    )
    settings.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )

    def command(
        name: str, does: str, run: object, *first: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=does, description=does, parents=[*first, settings])
        sub.set_defaults(command=run)
        return sub

    command("run", "run the whole chain, from queries to a promoted router", run_command)
    command("ui", "open MLflow's UI on this project's runs", ui_command)
    command("doctor", "say what is installed, reachable and configured", doctor_command)
    calibrate = command("calibrate", "choose a router's threshold and store it", calibrate_command)
    calibrate.add_argument("--router", required=True, help="a router of the last run, or champion")
    goal = calibrate.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--max-drop", help="largest quality drop: in quality units, or 1%% of the strong LLM's mean"
    )
    goal.add_argument("--strong-share", help="wanted share of queries for the strong LLM")
    calibrate.add_argument("--confidence", default="0.95", help="of --max-drop (default: 0.95)")
    calibrate.add_argument("--pair", help="weak--strong, where the router exists for several pairs")
    calibrate.add_argument("--data", help="Parquet, CSV or JSONL (default: the run's own queries)")
    calibrate.add_argument(
        "--quality-range",
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="lowest and highest quality there can be, such as 0 10 (default: as the metric says)",
    )
    command("retrain", "run the chain as it is deployed: promote or reject", retrain_command)
    version = argparse.ArgumentParser(add_help=False)
    version.add_argument("version", metavar="VERSION", help="number of a registered version")
    promote = command("promote", "make a version the champion", promote_command, version)
    promote.add_argument("--force", metavar="REASON", help="though the gate did not pass it")
    rollback = command("rollback", "swap the champion and the previous one", rollback_command)
    for sub in (promote, rollback):
        sub.add_argument("--pair", help="weak--strong of several pairs, or pool-NAME for the pool")
    _add_compare(command)
    _add_schedule(command)
    _add_tables(command)
    _add_benchmark(commands)
    return top


def _add_compare(command: "Callable[..., argparse.ArgumentParser]") -> None:
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="name, or beginning of the id, of a run (default: the last one and the champion's)",
    )
    does = "compare routers across runs, on the queries they share"
    sub = command("compare", does, compare_command, runs)
    sub.add_argument("--pair", help="weak--strong, where the runs have several pairs")
    sub.add_argument("--report", type=Path, metavar="FILE", help="also write it as one HTML file")
    sub.add_argument("--open", action="store_true", help="print the address of MLflow's comparison")


def _add_schedule(command: "Callable[..., argparse.ArgumentParser]") -> None:
    deploy = command("deploy", "put retraining on a schedule, on a Prefect server", deploy_command)
    deploy.add_argument("--cron", help='such as "0 3 * * *" (default: as in prefect.yaml)')
    deploy.add_argument("--timezone", help="such as Europe/Berlin (default: as in prefect.yaml)")
    deploy.add_argument("--pool", help="work pool (default: as in prefect.yaml)")
    deploy.add_argument(
        "--max-hours", type=float, help="a run is ended after them (default: as in prefect.yaml)"
    )
    drift = command("drift", "hold recent queries against the champion's", drift_command)
    drift.add_argument(
        "--queries",
        type=Path,
        required=True,
        help="JSONL, CSV or Parquet file, or a folder of them",
    )
    drift.add_argument("--router", default="champion", help="or a router of the last run")
    drift.add_argument("--pair", help="weak--strong, where the router exists for several pairs")
    drift.add_argument(
        "--false-alarm-rate", default="0.01", help="of both tests together (default: 0.01)"
    )
    drift.add_argument(
        "--smallest-shift",
        default="0.25",
        help="share of the traffic whose shift must not go unseen (default: 0.25)",
    )
    drift.add_argument(
        "--retrain", action="store_true", help="on drift, start the deployment, or retrain here"
    )


def _add_tables(command: "Callable[..., argparse.ArgumentParser]") -> None:
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("name", nargs="?", metavar="NAME", help="a table: show its first rows")
    sub = command("tables", "look into the warehouse, or prune it", tables_command, name)
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--sql", metavar="QUERY", help="show what one SELECT gives")
    what.add_argument(
        "--prune", action="store_true", help="delete superseded responses and orphaned files"
    )
    sub.add_argument("--limit", type=int, default=5, help="rows to show (default: 5)")
    sub.add_argument("--dry-run", action="store_true", help="of --prune: only say what would go")
    sub.add_argument(
        "--keep-days", type=float, default=30, help="of --prune: keep what is younger (default: 30)"
    )
    sub.add_argument(
        "--keep-runs", type=int, default=10, help="of --prune: keep the last runs' (default: 10)"
    )
    sub.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="CONFIG",
        help="of --prune: another experiment on this store, whose responses stay too",
    )


def _add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    does = "compare routers on known answers, in the layout that RouteLLM publishes"
    sub = commands.add_parser("benchmark", help=does, description=does)
    sub.add_argument("layout", choices=["routellm"], help="how the folder is laid out")
    sub.add_argument("directory", type=Path, help="folder of CSVs: prompt, a column for each LLM")
    sub.add_argument("--routers", default="kernel_ridge,knn", help="kinds of routers, by comma")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--train-rows", type=int, help="train on so many rows, judge on the rest")
    how.add_argument("--folds", type=int, help="judge out-of-fold predictions (default: 5 folds)")
    sub.add_argument("--eval", type=Path, metavar="DIR", help="judge on this folder instead")
    sub.add_argument("--seed", type=int, default=7, help="of training and division (default: 7)")
    sub.add_argument("--weak", help="column of the weak LLM")
    sub.add_argument("--strong", help="column of the strong LLM")
    sub.add_argument("--figure", type=Path, help="also write the cost-quality figure to this PNG")
    sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as routers.mf.noise=0.5, evaluation.replicates=500, store.directory=X",
    )
    sub.set_defaults(command=benchmark_command)


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
        _show_preferences(experiment, report)
    else:
        _show(experiment, report)
    return 0


def retrain_command(arguments: argparse.Namespace) -> int:
    """Run the deployed flow here and print its report."""
    experiment = _experiment(arguments)
    from flows.retrain import retrain

    return _print_run(arguments, experiment, retrain(experiment))


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
        _table(console, f"Recent queries against those of {report.router}", report.rows())
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
    _table(console, title, console_rows(found))
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
    store = _experiment(arguments).store
    if store.mlflow_uri().startswith("http"):
        print(f"MLflow is served at {store.mlflow_uri()}", file=sys.stderr)
        return 0
    store.directory.mkdir(parents=True, exist_ok=True)
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
        _print_rows(arguments, tables.as_json(found), tables.as_text(found), title="Warehouse")
        return 0
    if rows.note:
        print(f"turnout: {rows.note}", file=sys.stderr)
    _print_rows(arguments, rows.to_json(), rows.records(), title=arguments.name or "Result")
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
    _print_rows(arguments, pruned.to_json(), pruned.rows(), title=title)
    return 0


def _print_rows(
    arguments: argparse.Namespace, plain: object, rows: "list[dict[str, Any]]", *, title: str
) -> None:
    """Print rows as JSON, as a table, or, where that would be too wide, one under the other."""
    if arguments.json:
        print(json.dumps(plain))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not rows:
        console.print(f"{title}: nothing.", highlight=False)
        return
    if len(rows[0]) <= TABLE_COLUMNS:
        text = [{key: escape(_brief(row[key])) for key in row} for row in rows]
        _table(console, title, text)
        return
    width = max(map(len, rows[0]))
    for number, row in enumerate(rows, start=1):
        console.print(f"[bold]{title} {number}[/]", highlight=False)
        for key, value in row.items():
            line = f"  {key:<{width}}  {escape(_brief(value))}"
            console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")


def _brief(value: object) -> str:
    """Return a value on one line."""
    return "" if value is None else " ".join(str(value).split())


def benchmark_command(arguments: argparse.Namespace) -> int:
    """Compare routers on a folder of known answers and print the table."""
    if arguments.eval is not None and arguments.folds is not None:
        raise ConfigError(
            "--folds and --eval are given. Expected one of them: with --eval, routers are trained "
            "on the one folder and judged on the other. Leave one out."
        )
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
    if arguments.figure is not None:
        from tasks.figures import cost_quality

        cost_quality(report.comparison).savefig(arguments.figure)
    if arguments.json:
        print(json.dumps(report.to_json()))
        return 0
    from rich.console import Console

    console = Console()
    comparison = report.comparison
    how = "out of fold" if comparison.out_of_fold else "held out"
    title = f"{comparison.pair.weak} or {comparison.pair.strong}: {comparison.queries} rows, {how}"
    _table(console, title, report.rows())
    for note in report.notes():
        console.print(note, highlight=False, markup=False)
    console.print(f"`turnout ui` shows run {report.run_id[:8]} with figures and win rates.")
    return 0


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


def _experiment(arguments: argparse.Namespace) -> "AnyExperiment":
    from conf.load import load_experiment

    return load_experiment(arguments.config, tuple(arguments.overrides))


def _table(console: "Console", title: str, rows: list[dict[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
    for heading in rows[0]:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _show(experiment: "AnyExperiment", report: "RunReport") -> None:
    """Print the leaderboard, each pair's comparison and verdict, and what to do next."""
    from rich.console import Console

    from flows.retrain import receipts_of
    from tasks.reporting import pool_rows, shown

    console = Console()
    board = report.leaderboard
    brief = [{key: row[key] for key in row if key != "missing"} for row in board.rows(digits=2)]
    _table(console, "LLMs", brief)
    for standing in board.standings:
        if standing.missing:
            console.print(f"[red]{standing.missing} responses of {standing.llm} are missing[/]")
    for metric, found in board.agreement.items():
        console.print(f"{metric} tells right from wrong answers with AUC {shown(found)}.\n")
    for pair in report.pairs:
        title = f"Routers between {pair.pair.weak} and {pair.pair.strong}, by {pair.metric}"
        _table(console, title, pair.rows(intervals=("apgr",)))
        _show_receipt(console, pair.receipt)
    if report.pool is not None:
        _table(console, "The cheapest LLM that is good enough, of all", pool_rows(report.pool))
        _show_receipt(console, report.pool.receipt)
    where = Path(experiment.store.directory)
    _show_next(console, where, report.run_id, receipts_of(report))


def _show_preferences(experiment: "AnyExperiment", report: "PreferenceReport") -> None:
    """Print where the battles came from, each benchmark's comparison, the verdict, what is next."""
    from rich.console import Console

    console = Console()
    sources = ("source", "battles", "of the pair", "strong wins")
    battles = [{name: row[name] for name in sources} for row in report.battles.rows()]
    (pair,) = experiment.pairs
    _table(console, f"Battles for {pair.weak} or {pair.strong}", battles)
    for row in report.battles.rows():
        if row["left out"]:
            console.print(f"{row['source']}, left out: {row['left out']}", highlight=False)
    for name, found in report.benchmarks.items():
        title = f"Routers on {name}, {found.comparison.queries} queries that none has seen"
        _table(console, title, found.rows())
        for note in found.notes():
            console.print(note, highlight=False, markup=False)
    _show_receipt(console, report.receipt)
    where = Path(experiment.store.directory)
    _show_next(console, where, report.run_id, [report.receipt])


def _show_receipt(console: "Console", receipt: "Receipt") -> None:
    console.print(f"{receipt.router} is version {receipt.version} of {receipt.model}")
    for check in receipt.checks:
        mark = "[green]met[/]" if check.passed else "[red]not met[/]"
        console.print(f"  {mark}  {check.name}: {check.value} ({check.bound})")
    console.print(f"  [bold]{receipt.summary()}[/]\n")


def _show_next(console: "Console", store: Path, run_id: str, receipts: "list[Receipt]") -> None:
    console.print(
        f"Next: `turnout ui` shows run {run_id[:8]} with its figures and receipts; the "
        f"tables are in {store / 'warehouse.duckdb'}."
    )
    for receipt in receipts:
        if receipt.passed():
            console.print(f'Load the champion with "models:/{receipt.model}@champion".')


if __name__ == "__main__":
    main()
