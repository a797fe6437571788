"""Progress bars for stages that take longer than a moment."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Standard output is for results: `--json` prints one object there and nothing else.
CONSOLE = Console(stderr=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for ``total`` steps; yields a function that moves it on by a number of steps."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=CONSOLE, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Show that a stage without countable steps is under way, and how long it took."""
    with progress(what, 1) as advance:
        yield
        advance(1)
