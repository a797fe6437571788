"""The command line: its words. What each of them does is in commands.py."""

import argparse
import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import TurnoutError
from flows.commands import (
    add_llm_command,
    benchmark_command,
    calibrate_command,
    compare_command,
    deploy_command,
    doctor_command,
    drift_command,
    promote_command,
    retrain_command,
    rollback_command,
    run_command,
    tables_command,
    ui_command,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    _add_llm(command)
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


def _add_llm(command: "Callable[..., argparse.ArgumentParser]") -> None:
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("llm", metavar="NAME", help="the new LLM, as it is called under llms")
    does = "teach the pool one more LLM, without training it again"
    sub = command("add-llm", does, add_llm_command, name)
    sub.description = (
        "Teach the champion of the experiment's pool, an mf, one more LLM. List the LLM under llms "
        "first. It is asked all queries, its answers are scored, and how good it is on which "
        "queries is learnt from how they compare with the others'. What the champion knows of the "
        "others does not change. The result is a new version, judged and promoted as after "
        "`turnout run`."
    )


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


if __name__ == "__main__":
    main()
