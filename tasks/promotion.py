"""Promotion and rollback: the aliases of a registered model move together, or not at all.

MLflow moves one alias at a time. So what is about to happen is written down first, as a tag of the
registered model (a write-ahead note), and taken away last. The alias `champion` itself moves in one
step, to a version that has just been loaded and asked in a clean process; whenever a process dies,
exactly one loadable champion is there, and the next one that comes (`settle`) reads the note: if
the champion had moved it finishes the rest, if not it puts everything back. An exception, such as a
failing smoke test, undoes the move at once: on-rollback hooks of a Prefect transaction.

One promotion of a model at a time: in a local store behind a file lock. A server's store has no
lock, and MLflow cannot compare and set: there a note is read back before anything moves, and nobody
touches another's note, unless its process is gone or an hour has passed (a promotion takes
minutes). What remains is the instant between two reads; the deployment runs one at a time.
"""

import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prefect import task
from prefect.transactions import CommitMode, Transaction, transaction

from conf.errors import ArtifactError, ConfigError, StoreError, unknown_name
from conf.schema import Store
from serving.score import win_rates_in_clean_process
from tasks import gate, tracking
from tasks.aliases import Aliases, Kind, Note
from tasks.progress import stage
from tasks.receipt import Receipt
from tasks.registry import (
    CHALLENGER,
    CHAMPION,
    PASSED,
    PREVIOUS,
    PROMOTED_AT,
    ROLLED_BACK,
    VERDICT_TAG,
    Version,
    aliased,
    log_receipt,
    tag_verdict,
)

NOTE = "turnout.promotion"
ALIASES = (PREVIOUS, CHAMPION, CHALLENGER)
SMOKE_QUERIES = ("What is the capital of France?", "Prove that √2 is irrational.", "?")
PROMOTED_WHY, INSTEAD_OF = "promotion.why", "promotion.instead_of"
PROMOTION_TAGS = (PROMOTED_AT, PROMOTED_WHY, INSTEAD_OF, ROLLED_BACK)
ANY = "any"  # champion: it does not matter which one it is

_log = logging.getLogger(__name__)


class OvertakenError(StoreError):
    """Somebody else has moved the aliases, or is moving them."""


@task(task_run_name="carry out the verdict on {version.model} version {version.version}")
def carry_out(store: Store, version: Version, receipt: Receipt, *, run_id: str) -> Receipt:
    """Promote a version that passed the gate; make a sound one that may yet prove better the
    challenger, whose win rates a gateway can record beside the champion's.

    Return the receipt as it came out, and log it in the run ``run_id`` that was judged: what passed
    is rejected after all when it does not answer, or the champion is another than it was.
    """
    model = version.model
    if not receipt.passed():
        if receipt.challenger:
            tracking.client(store).set_registered_model_alias(model, CHALLENGER, version.version)
        return receipt
    try:
        promote(store, model, version.version, why="passed the gate", expected=receipt.champion)
    except OvertakenError as error:
        receipt = receipt.but(gate.champion_unchanged(error))
    except ArtifactError as error:
        receipt = receipt.but(gate.answers_at_promotion(error))
    receipt = replace(receipt, pending=False)
    log_receipt(store, run_id, receipt)
    tag_verdict(store, Version(model, version.version, run_id), receipt)
    return receipt


def promote(
    store: Store,
    model: str,
    version: str,
    *,
    why: str,
    expected: str | None = ANY,
    forced: bool = False,
) -> Aliases:
    """Make a version the champion; the champion so far becomes the previous one.

    expected: the champion that it is to replace, None for none.
    forced: whether it may have been rolled back, which is forgotten then.
    Raises ArtifactError when the version fails its smoke test, and OvertakenError when the champion
    is not the expected one or somebody else is at it; everything is as it was then.
    """
    smoke_test(store, f"models:/{model}/{version}")
    with _alone(store):
        _settle(store, model)
        before = aliases(store, model)
        if expected not in (ANY, before.champion):
            raise OvertakenError(
                f"Version {before.champion} is the champion of {model}. Expected "
                f"{expected or 'none'}, which version {version} was held against. Run again."
            )
        after = before.promoted(version)
        if after != before:
            _move(store, _note(store, before, after, why, "forced" if forced else "promotion"))
        elif forced:
            tracking.client(store).delete_model_version_tag(model, version, ROLLED_BACK)
    return after


def rollback(store: Store, model: str, *, why: str = "rolled back") -> Aliases:
    """Swap champion and previous; the version it leaves is not promoted again by itself.

    Raises StoreError where there is no other version.
    """
    previous = aliases(store, model).previous
    if previous is not None:
        smoke_test(store, f"models:/{model}/{previous}")
    with _alone(store):
        _settle(store, model)
        before = aliases(store, model)
        after = before.swapped()
        if before.previous is None or before == after:
            raise StoreError(
                f"{model} has champion {before.champion} and previous {before.previous}. Expected "
                "two different versions to swap. Promote another version with "
                "`turnout promote VERSION`."
            )
        if before.previous != previous:
            raise OvertakenError(
                f"The previous version of {model} is {before.previous} now. Expected {previous}, "
                "which was asked whether it answers. Run again."
            )
        _move(store, _note(store, before, after, why, "rollback"))
    return after


def settle(store: Store, model: str) -> str:
    """Finish or undo what a process that died left half done; return what was done.

    `nothing`, `finished` (the champion had moved), `undone` (it had not, or does not load) or
    `dropped` (somebody has since set the champion by hand, which stays).
    Raises OvertakenError while the process may still be at it.
    """
    if _pending(store, model) is None:  # the usual case, for which nobody need wait
        return "nothing"
    with _alone(store):
        return _settle(store, model)


def _settle(store: Store, model: str) -> str:
    note = _pending(store, model)
    if note is None:
        return "nothing"
    if not note.is_abandoned():
        raise OvertakenError(
            f"Version {note.after.champion} of {model} is being made the champion since {note.at}, "
            f"by process {note.process}. Expected one promotion at a time. Wait for it; an hour "
            "after that time it counts as abandoned."
        )
    champion = aliases(store, model).champion
    if champion == note.after.champion:
        try:
            _finish(store, note)
        except ArtifactError:
            _undo(store, note)
            return "undone"
        return "finished"
    if champion == note.before.champion:
        _undo(store, note)
        return "undone"
    _log.warning(
        "%s: version %s was being made the champion, but somebody has set it to %s since. The "
        "aliases stay as they are.", model, note.after.champion, champion,
    )  # fmt: skip
    _drop(store, note)
    return "dropped"


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

    Raises ConfigError for a version that is not there, and for one that did not pass or was rolled
    back where no reason is given.
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
    tags = found[version].tags
    verdict = tags.get(VERDICT_TAG, "not judged")
    if force is not None:
        return f"forced ({verdict} by the gate): {force.strip()}"
    if verdict != PASSED:
        failed = tags.get("gate.failed")
        raise ConfigError(
            f"Version {version} of {model} is {verdict}{f' for: {failed}' if failed else ''}. "
            f"Expected the gate's verdict to be {PASSED!r}. Promote another version, or give a "
            "reason: --force REASON."
        )
    if ROLLED_BACK in tags:
        raise ConfigError(
            f"Version {version} of {model} was rolled back ({tags[ROLLED_BACK]}). Expected one "
            "that nobody took out of service. Promote another version, or give a reason: "
            "--force REASON."
        )
    return "by hand, passed the gate"


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Wait for, and keep, the lock of a local store; a server's has none."""
    if not store.is_local():
        yield
        return
    store.directory.mkdir(parents=True, exist_ok=True)
    with open(store.directory / "promotion.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process has ended
        yield


def _pending(store: Store, model: str) -> Note | None:
    from mlflow.exceptions import MlflowException

    try:
        tags: Mapping[str, str] = tracking.client(store).get_registered_model(model).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return Note.from_json(tags[NOTE]) if NOTE in tags else None


def _note(store: Store, before: Aliases, after: Aliases, why: str, kind: Kind) -> Note:
    tags = {
        version: _promotion_tags(store, before.model, version)
        for version in (before.champion, after.champion)
        if version is not None
    }
    return Note(before, after, why, kind, tags=tags)


def _promotion_tags(store: Store, model: str, version: str) -> dict[str, str]:
    tags = tracking.client(store).get_model_version(model, version).tags
    return {tag: tags[tag] for tag in PROMOTION_TAGS if tag in tags}


def _move(store: Store, note: Note) -> None:
    """Write the note and read it back, move the aliases, ask the new champion, take the note away.

    Undo it all if that fails.
    """

    def undo(_: Transaction) -> None:
        _undo(store, note)

    client, model = tracking.client(store), note.after.model
    client.set_registered_model_tag(model, NOTE, note.to_json())
    if _pending(store, model) != note or aliases(store, model) != note.before:
        _drop(store, note)
        raise OvertakenError(
            f"Somebody else is moving the aliases of {model}. Expected them as they were, "
            f"{note.before}. Run again."
        )
    # Eager: what is finished stays, whatever the flow around it comes to.
    with transaction(commit_mode=CommitMode.EAGER) as moving:
        moving.stage(note.to_json(), on_rollback_hooks=[undo])
        _finish(store, note)


def _finish(store: Store, note: Note) -> None:
    """Bring the aliases to where the note wants them; every step may be repeated."""
    client, model, new = tracking.client(store), note.after.model, str(note.after.champion)
    _set(store, note.after, ALIASES)
    smoke_test(store, f"models:/{model}@{CHAMPION}")
    tags = {
        PROMOTED_WHY: note.why,
        PROMOTED_AT: note.at,
        INSTEAD_OF: note.before.champion or "none",
    }
    for key, value in tags.items():
        client.set_model_version_tag(model, new, key, value)
    if note.kind == "forced":
        client.delete_model_version_tag(model, new, ROLLED_BACK)
    if note.kind == "rollback" and note.before.champion is not None:
        left = f"{note.at}: {note.why}"
        client.set_model_version_tag(model, note.before.champion, ROLLED_BACK, left)
    _mark(store, note.after)
    _drop(store, note)


def _undo(store: Store, note: Note) -> None:
    """Put all back, the champion first, and take the note away; not if it is another's."""
    client, model = tracking.client(store), note.before.model
    if _pending(store, model) != note:
        return
    _set(store, note.before, (CHAMPION, PREVIOUS, CHALLENGER))
    for version, before in note.tags.items():
        now = _promotion_tags(store, model, version)
        for tag in now.keys() - before.keys():
            client.delete_model_version_tag(model, version, tag)
        for tag, value in before.items():
            if now.get(tag) != value:
                client.set_model_version_tag(model, version, tag, value)
    _mark(store, note.before)
    _drop(store, note)


def _drop(store: Store, note: Note) -> None:
    """Take the note away if it is this one."""
    if _pending(store, note.before.model) == note:
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
