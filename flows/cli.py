"""The command line: `turnout run`, `turnout ui`, `turnout doctor`.

Heavy imports are made by the command that needs them, so that `turnout --help` answers at once.
"""

import argparse
import atexit
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import TurnoutError

if TYPE_CHECKING:
    from conf.schema import Experiment
    from tasks.reporting import RunReport

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
    arguments = parser().parse_args()
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

    def command(name: str, does: str, run: object) -> None:
        sub = commands.add_parser(name, help=does, description=does, parents=[settings])
        sub.set_defaults(command=run)

    command("run", "run the whole chain, from queries to a promoted router", run_command)
    command("ui", "open MLflow's UI on this project's runs", ui_command)
    command("doctor", "say what is installed, reachable and configured", doctor_command)
    return top


def run_command(arguments: argparse.Namespace) -> int:
    """Run the pipeline and print its report."""
    experiment = _experiment(arguments)
    from flows.pipeline import pipeline

    report = pipeline(experiment)
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        _show(experiment, report)
    return 0


def ui_command(arguments: argparse.Namespace) -> int:
    """Serve MLflow's UI on the experiment's store until interrupted."""
    store = _experiment(arguments).store
    if store.tracking_uri and store.tracking_uri.startswith("http"):
        print(f"MLflow is served at {store.tracking_uri}", file=sys.stderr)
        return 0
    store.directory.mkdir(parents=True, exist_ok=True)
    os.execv(
        sys.executable,
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", store.mlflow_uri(), "--host", "127.0.0.1", "--port", "5000"),
        ],
    )


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


def _experiment(arguments: argparse.Namespace) -> "Experiment":
    from conf.load import load_experiment

    return load_experiment(arguments.config, tuple(arguments.overrides))


def _show(experiment: "Experiment", report: "RunReport") -> None:
    """Print the leaderboard, each pair's comparison and verdict, and what to do next."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from tasks.reporting import shown

    console = Console()

    def show(title: str, rows: list[dict[str, str]]) -> None:
        table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
        for heading in rows[0]:
            table.add_column(heading, no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)

    board = report.leaderboard
    brief = [{key: row[key] for key in row if key != "missing"} for row in board.rows(digits=2)]
    show("LLMs", brief)
    for standing in board.standings:
        if standing.missing:
            console.print(f"[red]{standing.missing} responses of {standing.llm} are missing[/]")
    for metric, found in board.agreement.items():
        console.print(f"{metric} tells right from wrong answers with AUC {shown(found)}.\n")
    for pair in report.pairs:
        title = f"Routers between {pair.pair.weak} and {pair.pair.strong}, by {pair.metric}"
        show(title, pair.rows(intervals=("apgr",)))
        receipt = pair.receipt
        console.print(f"{pair.best} is version {receipt.version} of {receipt.model}")
        for check in receipt.checks:
            mark = "[green]met[/]" if check.passed else "[red]not met[/]"
            console.print(f"  {mark}  {check.name}: {check.value} ({check.bound})")
        console.print(f"  [bold]{receipt.verdict()}[/]\n")
    where = Path(experiment.store.directory)
    console.print(
        f"Next: `turnout ui` shows run {report.run_id[:8]} with its figures and receipts; the "
        f"tables are in {where / 'warehouse.duckdb'}."
    )
    for pair in report.pairs:
        if pair.receipt.passed():
            console.print(f'Load the champion with "models:/{pair.receipt.model}@champion".')


if __name__ == "__main__":
    main()
