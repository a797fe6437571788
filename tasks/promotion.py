"""Promotion and rollback: the aliases of a registered model move together, or not at all.

MLflow moves one alias at a time. So what is about to happen is written down first, as a tag of the
registered model (a write-ahead note), and taken away last. The alias `champion` itself moves in one
step, to a version that has just been loaded and asked in a clean process; whenever a process dies,
exactly one loadable champion is there, and the next one that comes (`settle`) reads the note: if
the champion had moved it finishes the rest, if not it puts everything back. An exception, such as a
failing smoke test, undoes the move at once: on-rollback hooks of a Prefect transaction.

One promotion of a model at a time: MLflow cannot compare and set, so the deployment runs one at a
time, and a note of a process that is still alive refuses a second one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.transactions import CommitMode, Transaction, transaction

from conf.errors import ArtifactError, ConfigError, StoreError, unknown_name
from conf.schema import Store
from serving.score import win_rates_in_clean_process
from tasks import tracking
from tasks.gate import Receipt
from tasks.processes import is_gone, this_process
from tasks.progress import stage
from tasks.registry import (
    CHALLENGER,
    CHAMPION,
    PASSED,
    PREVIOUS,
    VERDICT_TAG,
    Version,
    aliased,
)

NOTE = "turnout.promotion"
ALIASES = (PREVIOUS, CHAMPION, CHALLENGER)
SMOKE_QUERIES = ("What is the capital of France?", "Prove that √2 is irrational.", "?")


@dataclass(frozen=True)
class Aliases:
    """Which version each alias of a registered model points to; None for none."""

    model: str
    champion: str | None = None
    previous: str | None = None
    challenger: str | None = None

    def of(self, alias: str) -> str | None:
        """Return the version of one alias."""
        return {
            CHAMPION: self.champion,
            PREVIOUS: self.previous,
            CHALLENGER: self.challenger,
        }[alias]

    def promoted(self, version: str) -> "Aliases":
        """Return them after the promotion of a version: previous ← champion ← version."""
        if version == self.champion:
            return self
        challenger = None if self.challenger == version else self.challenger
        return Aliases(self.model, version, self.champion or self.previous, challenger)

    def swapped(self) -> "Aliases":
        """Return them with champion and previous in each other's place."""
        return Aliases(self.model, self.previous, self.champion, self.challenger)


@dataclass(frozen=True)
class Note:
    """What is under way, written before the first alias moves."""

    before: Aliases
    after: Aliases
    why: str
    process: str
    """Who is at it."""
    at: str

    def to_json(self) -> str:
        """Return the note as the text of a tag."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Note":
        """Return the note that `to_json` wrote."""
        kept = json.loads(text)
        before, after = Aliases(**kept.pop("before")), Aliases(**kept.pop("after"))
        return cls(before, after, **kept)


@task(task_run_name="carry out the verdict on {version.model} version {version.version}")
def carry_out(store: Store, version: Version, receipt: Receipt) -> Aliases:
    """Promote a version that passed the gate; make a sound one that may yet prove better the
    challenger, whose win rates a gateway can record beside the champion's."""
    if receipt.passed():
        return promote(store, version.model, version.version, why="passed the gate")
    if receipt.challenger:
        client = tracking.client(store)
        client.set_registered_model_alias(version.model, CHALLENGER, version.version)
    return aliases(store, version.model)


def promote(store: Store, model: str, version: str, *, why: str) -> Aliases:
    """Make a version the champion; the champion so far becomes the previous one.

    Raises ArtifactError, with everything as it was, when the version fails its smoke test.
    """
    settle(store, model)
    before = aliases(store, model)
    after = before.promoted(version)
    if after != before:
        smoke_test(store, f"models:/{model}/{version}")
        _move(store, _note(before, after, why))
    return after


def rollback(store: Store, model: str, *, why: str = "rolled back") -> Aliases:
    """Swap champion and previous. Raises StoreError where there is no other version."""
    settle(store, model)
    before = aliases(store, model)
    after = before.swapped()
    if before.previous is None or before == after:
        raise StoreError(
            f"{model} has champion {before.champion} and previous {before.previous}. Expected two "
            "different versions to swap. Promote another version with `turnout promote VERSION`."
        )
    smoke_test(store, f"models:/{model}/{before.previous}")
    _move(store, _note(before, after, why))
    return after


def settle(store: Store, model: str) -> str:
    """Finish or undo what a process that died left half done; return what was done.

    `nothing`, `finished` (the champion had moved) or `undone` (it had not, or does not load).
    Raises StoreError while the process is still at it.
    """
    note = _pending(store, model)
    if note is None:
        return "nothing"
    if note.process != this_process() and not is_gone(note.process):
        raise StoreError(
            f"Version {note.after.champion} of {model} is being made the champion since {note.at}, "
            f"by process {note.process}. Expected one promotion at a time. Wait for it; if that "
            f"machine is lost, delete the tag {NOTE} of the registered model."
        )
    if aliases(store, model).champion == note.after.champion != note.before.champion:
        try:
            _finish(store, note)
        except ArtifactError:
            _undo(store, note)
            return "undone"
        return "finished"
    _undo(store, note)
    return "undone"


def smoke_test(store: Store, uri: str) -> None:
    """Load a version in a clean process and ask it something; raises ArtifactError if it fails."""
    with stage(f"Asking {uri}"):
        answers: list[Any] = [
            *win_rates_in_clean_process(uri, SMOKE_QUERIES, tracking_uri=store.mlflow_uri())
        ]
    # A version of a pool's model answers with an LLM's name.
    good = all(answer if isinstance(answer, str) else 0 <= answer <= 1 for answer in answers)
    if len(answers) != len(SMOKE_QUERIES) or not good:
        raise ArtifactError(
            f"{uri} answers {len(SMOKE_QUERIES)} queries with {answers}. Expected a win rate "
            "between 0 and 1, or an LLM's name, for each. Train and register it anew."
        )


def aliases(store: Store, model: str) -> Aliases:
    """Return where the aliases of a model point now."""
    found = {alias: aliased(store, model, alias) for alias in ALIASES}
    versions = {alias: str(one.version) for alias, one in found.items() if one is not None}
    return Aliases(model, **versions)


def check_may_be_promoted(store: Store, model: str, version: str, force: str | None) -> str:
    """Return why a version may be promoted by hand: the gate passed it, or a reason is given.

    Raises ConfigError for a version that is not there, or did not pass and has no reason.
    """
    client = tracking.client(store)
    found = {str(one.version): one for one in client.search_model_versions(f"name = '{model}'")}
    if version not in found:
        raise ConfigError(
            f"{unknown_name('version', version, found)} It is looked for in {model}. Name a "
            "registered version; `turnout ui` lists them."
        )
    if force is not None and not force.strip():
        raise ConfigError(
            "The reason for --force is empty. Expected why the gate is overruled; it is kept with "
            "the version. Write it in a few words."
        )
    verdict = found[version].tags.get(VERDICT_TAG, "not judged")
    if force is not None:
        return f"forced ({verdict} by the gate): {force.strip()}"
    if verdict != PASSED:
        failed = found[version].tags.get("gate.failed")
        raise ConfigError(
            f"Version {version} of {model} is {verdict}{f' for: {failed}' if failed else ''}. "
            f"Expected the gate's verdict to be {PASSED!r}. Promote another version, or give a "
            "reason: --force REASON."
        )
    return "by hand, passed the gate"


def _note(before: Aliases, after: Aliases, why: str) -> Note:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Note(before, after, why, this_process(), now)


def _pending(store: Store, model: str) -> Note | None:
    from mlflow.exceptions import MlflowException

    try:
        tags: Mapping[str, str] = tracking.client(store).get_registered_model(model).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return Note.from_json(tags[NOTE]) if NOTE in tags else None


def _move(store: Store, note: Note) -> None:
    """Write the note, move the aliases, ask the new champion, take the note away; or undo it."""

    def undo(_: Transaction) -> None:
        _undo(store, note)

    # Eager: what is finished stays, whatever the flow around it comes to.
    with transaction(commit_mode=CommitMode.EAGER) as moving:
        moving.stage(note.to_json(), on_rollback_hooks=[undo])
        client = tracking.client(store)
        client.set_registered_model_tag(note.after.model, NOTE, note.to_json())
        _finish(store, note)


def _finish(store: Store, note: Note) -> None:
    """Bring the aliases to where the note wants them; every step may be repeated."""
    client, model = tracking.client(store), note.after.model
    _set(store, note.after, ALIASES)
    smoke_test(store, f"models:/{model}@{CHAMPION}")
    tags = {
        "promotion.why": note.why,
        "promotion.at": note.at,
        "promotion.instead_of": note.before.champion or "none",
    }
    for key, value in tags.items():
        client.set_model_version_tag(model, str(note.after.champion), key, value)
    _mark(store, note.after)
    client.delete_registered_model_tag(model, NOTE)


def _undo(store: Store, note: Note) -> None:
    """Put the aliases back, the champion first, and take the note away if it is there."""
    _set(store, note.before, (CHAMPION, PREVIOUS, CHALLENGER))
    _mark(store, note.before)
    if _pending(store, note.before.model) is not None:
        tracking.client(store).delete_registered_model_tag(note.before.model, NOTE)


def _mark(store: Store, wanted: Aliases) -> None:
    """Show the champion in MLflow's list of runs."""
    found = None
    if wanted.champion is not None:
        found = tracking.client(store).get_model_version(wanted.model, wanted.champion).run_id
    tracking.mark_champion(store, wanted.model, found)


def _set(store: Store, wanted: Aliases, order: tuple[str, ...]) -> None:
    client, now = tracking.client(store), aliases(store, wanted.model)
    for alias in order:
        version = wanted.of(alias)
        if version == now.of(alias):
            continue
        if version is None:
            client.delete_registered_model_alias(wanted.model, alias)
        else:
            client.set_registered_model_alias(wanted.model, alias, version)
