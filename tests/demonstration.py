"""A router's life on a fresh store, as a user lives it: six commands, each with its receipt.

    python tests/demonstration.py [DIRECTORY] [--markdown FILE]

It writes an experiment and three files of queries into a new folder and runs the flows behind
`turnout run`, `retrain` and `rollback` on them. Exit code 1 when a step ends otherwise than told.

Real: the questions (the bundled geography set), MiniLM's embeddings of them, the routers, labels,
intervals, the gate with its shuffled-label control, registered versions loaded in processes of
their own, Prefect, MLflow and DuckDB. Scripted: the two LLMs. Behind a real HTTP server on
loopback, the weak one is right on the kinds of questions in `WEAK_KNOWS` and seldom on others, the
strong one is nearly always right; which of their answers are right is drawn by a hash. So there is
no download, and the same story every time.
"""

import argparse
import atexit
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from scripted_llm import ScriptedLLM

from conf.errors import ConfigError, TurnoutError
from conf.load import load_experiment
from conf.schema import Experiment
from flows.cli import ENVIRONMENT

if TYPE_CHECKING:
    from tasks.promotion import Aliases
    from tasks.receipt import Receipt

Query = dict[str, Any]

BUNDLED = Path(__file__).parent.parent / "data" / "geography.jsonl"
WEAK_KNOWS = ("capital", "continent", "currency", "language")
FIRST_KINDS = ("capital", "river")
EXPERIMENT = "experiment.yaml"
SAMPLES = 4


@dataclass(frozen=True)
class Step:
    """One thing that a user does, and what has to come of it."""

    title: str
    tells: str
    words: tuple[str, ...]
    """Of the command line, after `turnout`."""
    summary: str
    """How the receipt's summary begins; empty where nothing is judged."""
    champion: str
    previous: str | None = None
    failures: tuple[str, ...] = ()
    """Checks that must be among those not met."""

    def command(self) -> str:
        """Return what a user would type."""
        return " ".join(("turnout", self.words[0], "--config", EXPERIMENT, *self.words[1:]))


STEPS = (
    Step(
        title="A first router",
        tells="Trained on questions about capitals and rivers only; the test asks seven kinds of "
        "questions. That is better than chance, and there is no champion yet: it is promoted.",
        words=("run", "queries.path=first.jsonl"),
        summary="promoted",
        champion="1",
    ),
    Step(
        title="The same data again",
        tells="Nobody has added anything. There is no reason for a new champion, and the gate "
        "says so.",
        words=("retrain", "queries.path=first.jsonl"),
        summary="rejected: not better than champion",
        champion="1",
        failures=("better than the champion",),
    ),
    Step(
        title="New data, with a leak",
        tells="The new training file holds copies of nearly all test questions, under other ids, "
        "as an export from a log easily does. The router has seen the outcomes that it is judged "
        "by, so its own figures shine. The gate trains its twin on shuffled outcomes, which should "
        "know nothing, and finds that it knows the test.",
        words=("retrain", "queries.path=leaked.jsonl"),
        summary="rejected: leak",
        champion="1",
        failures=("chance on shuffled outcomes", "no test prompt in training"),
    ),
    Step(
        title="Better data",
        tells="Training questions of all seven kinds, none of them in the test. The new version "
        "is surely better than the champion on the same test, and takes its place.",
        words=("retrain", "queries.path=better.jsonl"),
        summary="promoted",
        champion="3",
        previous="1",
    ),
    Step(
        title="Back again",
        tells="Something is wrong in production, whatever it is. One command brings the version "
        "before back; a second one would undo it.",
        words=("rollback",),
        summary="",
        champion="1",
        previous="3",
    ),
    Step(
        title="The night after",
        tells="The schedule comes round, on the data that made the version which was rolled back. "
        "Its figures are as good as they were, but a person took it out of service: only a person "
        "can bring it back.",
        words=("retrain", "queries.path=better.jsonl"),
        summary="rejected: rolled back",
        champion="1",
        previous="3",
        failures=("not rolled back",),
    ),
)


@dataclass(frozen=True)
class Chapter:
    """A step as it was taken."""

    step: Step
    receipt: "Receipt | None"
    aliases: "Aliases"
    seconds: float

    def departures(self) -> list[str]:
        """Return how it ended otherwise than told."""
        step, found = self.step, []
        if self.receipt is not None:
            if not self.receipt.summary().startswith(step.summary):
                found.append(f"expected {step.summary!r}, came to {self.receipt.summary()!r}")
            if missing := sorted({*step.failures} - {*self.receipt.failures()}):
                found.append(f"expected these checks to fail: {', '.join(missing)}")
        if (self.aliases.champion, self.aliases.previous) != (step.champion, step.previous):
            found.append(f"expected champion {step.champion} and previous {step.previous}")
        return found


def answers(knows: Callable[[str], float]) -> Callable[[str, int], str]:
    """Answer a question rightly with the probability of its kind; the draw is a hash."""
    questions = {question["text"]: question for question in bundled()}

    def answer(prompt: str, sample: int) -> str:
        question = questions[prompt]
        drawn = int(hashlib.sha256(f"{prompt} {sample}".encode()).hexdigest()[:8], 16) / 16**8
        return str(question["gold"][0]) if drawn < knows(question["domain"]) else "I do not know."

    return answer


@contextmanager
def scripted_pair() -> Iterator[tuple[str, str]]:
    """Serve the weak and the strong LLM; yield their addresses."""
    weak = answers(lambda kind: 0.85 if kind in WEAK_KNOWS else 0.1)
    strong = answers(lambda kind: 0.95)
    with ScriptedLLM(answer=weak) as small, ScriptedLLM(answer=strong) as large:
        yield small.url, large.url


def bundled() -> list[Query]:
    """Return the bundled geography questions."""
    return [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]


def query_files() -> dict[str, list[Query]]:
    """Return the three files of queries: equal tests, different training data."""
    split = ("test", "train", "test", "train", "validation", "train", "test", "train", "test")
    queries = [
        {**query, "split": split[number % len(split)]} for number, query in enumerate(bundled())
    ]
    test = [query for query in queries if query["split"] == "test"]
    better = [query for query in queries if query["split"] != "test"]
    first = [query for query in better if query["domain"] in FIRST_KINDS]
    copies = [{**query, "id": f"log-{query['id']}", "split": "train"} for query in test[20:]]
    return {
        "first.jsonl": first + test,
        "leaked.jsonl": first + copies + test,
        "better.jsonl": better + test,
    }


def prepare(directory: Path, urls: tuple[str, str]) -> None:
    """Write the experiment and its queries into ``directory``."""

    def llm(name: str, url: str, price: float) -> dict[str, Any]:
        prices = {"input_usd_per_million": price, "output_usd_per_million": price}
        return {"name": name, "model": name, "endpoint": {"url": url}, "prices": prices}

    settings = {
        "name": "demonstration",
        "store": {"directory": str(directory / "store")},
        "queries": {"source": "file", "path": str(directory / "first.jsonl")},
        "llms": [llm("small", urls[0], 0.1), llm("large", urls[1], 1.0)],
        "pairs": [{"weak": "small", "strong": "large"}],
        "generation": {"samples": SAMPLES},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [
            {"router": "knn"},
            {"router": "kernel_ridge", "encoders": ["minilm"]},
            {"router": "random"},
        ],
    }
    text = yaml.safe_dump(settings, sort_keys=False)
    (directory / EXPERIMENT).write_text(text, encoding="utf-8")
    for name, queries in query_files().items():
        lines = "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in queries)
        (directory / name).write_text(lines, encoding="utf-8")


def story(directory: Path, *overrides: str) -> Iterator[Chapter]:
    """Take every step on what `prepare` wrote; overrides are settings beside the step's own."""
    for step in STEPS:
        started = time.monotonic()
        receipt, aliases = taken(step, directory, overrides)
        yield Chapter(step, receipt, aliases, time.monotonic() - started)


def taken(
    step: Step, directory: Path, overrides: Iterable[str] = ()
) -> "tuple[Receipt | None, Aliases]":
    """Do what the step's command does; return its receipt, if any, and where the aliases point."""
    from flows.pipeline import pipeline
    from flows.promote import rollback
    from flows.retrain import receipts_of, retrain
    from tasks.promotion import aliases

    own = [word.replace("path=", f"path={directory}/") for word in step.words[1:]]
    experiment = load_experiment(directory / EXPERIMENT, (*own, *overrides))
    assert isinstance(experiment, Experiment)
    if step.words[0] == "rollback":
        return None, rollback(experiment)
    report = pipeline(experiment) if step.words[0] == "run" else retrain(experiment)
    (receipt,) = receipts_of(report)
    return receipt, aliases(experiment.store, receipt.model)


def chapter_page(chapter: Chapter, number: int) -> str:
    """Return a step, its receipt and what the aliases point to as Markdown."""
    step, aliases = chapter.step, chapter.aliases
    receipt = "" if chapter.receipt is None else f"{chapter.receipt.to_markdown()}\n"
    ended = "".join(f"**Not as told**: {text}.\n\n" for text in chapter.departures())
    return (
        f"## {number}. {step.title}\n\n{step.tells}\n\n"
        f"`{step.command()}` ({chapter.seconds:.0f} s)\n\n"
        f"{receipt.replace('# ', '### ', 1)}{ended}"
        f"Now the champion is version {aliases.champion}, "
        f"the previous one {aliases.previous or 'none'}.\n"
    )


def opening_page() -> str:
    """Return what is seen here, on which machine and when, as Markdown."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    machine = f"{os.cpu_count()} {platform.machine()} cores, {platform.system()}"
    files = query_files()
    counts = "; ".join(
        f"`{name}`: {sum(query['split'] != 'test' for query in queries)}"
        for name, queries in files.items()
    )
    test = sum(query["split"] == "test" for query in files["first.jsonl"])
    return (
        "# The life of a router\n\n"
        f"Written by `python tests/demonstration.py` on {now} ({machine}, Python "
        f"{platform.python_version()}). The questions, routers and the gate are real; the two LLMs "
        f"are scripted: `large` is right on 95 % of all questions, `small` on 85 % of those of the "
        f"kinds {', '.join(WEAK_KNOWS)}, on 10 % of others. Each answers {SAMPLES} times.\n\n"
        f"Training questions: {counts}. The same {test} test questions in all of them.\n"
    )


def closing_page(directory: Path, last: Chapter) -> str:
    """Return the aliases as they ended, and where to look, as Markdown."""
    model = last.aliases.model
    return (
        f"## In the end\n\n| alias of `{model}` | version |\n|---|---|\n"
        f"| champion | {last.aliases.champion} |\n| previous | {last.aliases.previous} |\n\n"
        f"To look at it: `turnout ui --config {directory / EXPERIMENT}`, then "
        f"http://127.0.0.1:5000. Under Models, `{model}` lists the versions, each with its "
        "receipt; every run has figures, and its router's run the receipt under gate/.\n"
    )


def fresh(directory: Path | None) -> Path:
    """Return a directory with nothing in it. Raises ConfigError where there is something."""
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="turnout-demonstration-"))
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ConfigError(
            f"{directory} holds something. Expected an empty folder: the story begins on a fresh "
            "store. Name another one, or none for a temporary one."
        )
    return directory.resolve()


def main() -> None:
    """Tell the story on the terminal; exit code 1 where it went another way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, help="an empty folder (default: a new)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write it as one page")
    arguments = parser.parse_args()
    code = 1

    def leave() -> None:  # as `turnout` itself does, and for its reason
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        pages, as_told = told(fresh(arguments.directory))
    except TurnoutError as error:
        print(f"demonstration: {error}", file=sys.stderr)
        return
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(pages), encoding="utf-8")
    code = 0 if as_told else 1


def told(directory: Path) -> tuple[list[str], bool]:
    """Take all steps, show each when it is done; return the pages and whether all ended as told."""
    # Nothing of the user's own is touched: neither a tracking server nor Prefect's history.
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        os.environ.pop(name, None)
    os.environ["PREFECT_HOME"] = str(directory / "prefect")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from rich.console import Console
    from rich.markdown import Markdown

    console, pages = Console(), [opening_page()]
    console.print(Markdown(pages[0]), "")
    chapters: list[Chapter] = []
    with scripted_pair() as urls:
        prepare(directory, urls)
        for chapter in story(directory):
            chapters.append(chapter)
            pages.append(chapter_page(chapter, len(chapters)))
            console.print(Markdown(pages[-1]), "")
    pages.append(closing_page(directory, chapters[-1]))
    console.print(Markdown(pages[-1]))
    return pages, not any(chapter.departures() for chapter in chapters)


if __name__ == "__main__":
    main()
