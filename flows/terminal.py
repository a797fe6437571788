"""What the command line prints for people: tables, verdicts, what to do next."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from conf.schema import AnyExperiment
    from tasks.benchmark import PreferenceReport
    from tasks.receipt import Receipt
    from tasks.reporting import RunReport

TABLE_COLUMNS = 4  # more do not fit into 80 characters beside each other


def show_run(experiment: "AnyExperiment", report: "RunReport") -> None:
    """Print the leaderboard, each pair's comparison and verdict, and what to do next."""
    from rich.console import Console

    from flows.retrain import receipts_of
    from tasks.reporting import pool_rows, shown

    console = Console()
    board = report.leaderboard
    brief = [{key: row[key] for key in row if key != "missing"} for row in board.rows(digits=2)]
    print_table(console, "LLMs", brief)
    for standing in board.standings:
        if standing.missing:
            console.print(f"[red]{standing.missing} responses of {standing.llm} are missing[/]")
    for metric, found in board.agreement.items():
        console.print(f"{metric} tells right from wrong answers with AUC {shown(found)}.\n")
    for pair in report.pairs:
        title = f"Routers between {pair.pair.weak} and {pair.pair.strong}, by {pair.metric}"
        print_table(console, title, pair.rows(intervals=("apgr",)))
        _show_receipt(console, pair.receipt)
    if report.pool is not None:
        # With intervals of differences only, it fits into 80 characters.
        brief = [
            {
                key: row[key] if key.startswith("over ") else row[key].partition(" [")[0]
                for key in row
            }
            for row in pool_rows(report.pool)
        ]
        print_table(console, "The cheapest LLM that is good enough, of all", brief)
        for note in report.pool.receipt.notes:
            console.print(note, highlight=False, markup=False)
        _show_receipt(console, report.pool.receipt)
    where = Path(experiment.store.directory)
    _show_next(console, where, report.run_id, receipts_of(report))


def show_preferences(experiment: "AnyExperiment", report: "PreferenceReport") -> None:
    """Print where the battles came from, each benchmark's comparison, the verdict, what is next."""
    from rich.console import Console

    console = Console()
    sources = ("source", "battles", "of the pair", "strong wins")
    battles = [{name: row[name] for name in sources} for row in report.battles.rows()]
    (pair,) = experiment.pairs
    print_table(console, f"Battles for {pair.weak} or {pair.strong}", battles)
    for row in report.battles.rows():
        for heading in ("left out", "remarks"):
            if row[heading]:
                note = f"{row['source']}, {heading}: {row[heading]}"
                console.print(note, highlight=False, markup=False)
    for name, found in report.benchmarks.items():
        title = f"Routers on {name}: {found.comparison.queries} queries"
        print_table(console, title, found.rows())
        for note in found.notes():
            console.print(note, highlight=False, markup=False)
    _show_receipt(console, report.receipt)
    where = Path(experiment.store.directory)
    _show_next(console, where, report.run_id, [report.receipt])


def print_rows(
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
        print_table(console, title, text)
        return
    width = max(map(len, rows[0]))
    for number, row in enumerate(rows, start=1):
        console.print(f"[bold]{title} {number}[/]", highlight=False)
        for key, value in row.items():
            line = f"  {key:<{width}}  {escape(_brief(value))}"
            console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")


def print_table(console: "Console", title: str, rows: list[dict[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
    for heading in rows[0]:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _brief(value: object) -> str:
    """Return a value on one line."""
    return "" if value is None else " ".join(str(value).split())


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
