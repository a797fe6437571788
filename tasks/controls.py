"""The arms of the gate: what a candidate is held against, trained or scored for the purpose.

kNN, where none was configured; the candidate's twin, trained on shuffled outcomes, which must know
nothing; and the champion, by win rates on queries that it was not trained on. Champion and
candidate are never loaded into one interpreter: MLflow lets code that is already imported win.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.routers import Knn
from conf.routers import Router as RouterSettings
from conf.schema import Evaluation, Store
from router_models.near_copies import near_copy_groups
from router_models.statistics import LEVEL, Bootstrap, bootstrap_metrics
from router_models.training_data import same_prompt
from serving.score import win_rates_in_clean_process
from tasks import tracking
from tasks.evaluation import Comparison, evaluated_queries, flat, groups_of
from tasks.gate import Copies, ShuffledApgr
from tasks.labelling import RatedQueries
from tasks.progress import stage
from tasks.training import TrainedRouter, evaluation_folds, train_router
from tasks.warehouse import Snapshot, Warehouse

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What says which query a row is about; every other column of a labels table is an outcome.
IDENTITY = ("query_key", "query_id", "text", "domain", "split")
BATTLE_IDENTITY = ("preference_key", "source", "dataset", "battle_id", "prompt", "domain")
CONTROL_TAG = "turnout.control"
LOGGED = "win_rates/predictions.parquet"
PROMPTS = "training/prompts.parquet"


@dataclass(frozen=True, eq=False)
class ChampionArm:
    """The champion on the candidate's test queries."""

    version: str
    win_rate: np.ndarray
    """(N,), NaN for queries on which the comparison would not be fair."""
    note: str
    """Where the win rates come from, and what was left out."""

    def fair(self) -> np.ndarray:
        """Return the positions of the queries that it was not trained on."""
        return np.flatnonzero(~np.isnan(self.win_rate))


@dataclass(frozen=True)
class Training:
    """What the routers of a comparison were trained on, so that others can be trained alike."""

    store: Store
    queries: RatedQueries
    evaluation: Evaluation
    seed: int
    parent_id: str
    """The MLflow run whose children the arms become."""
    battles: Snapshot | None = None

    def arm(self, settings: RouterSettings, control: str) -> TrainedRouter:
        """Return a router that is trained to be compared with, not to be served."""
        trained = train_router(
            self.store,
            self.queries,
            settings,
            evaluation=self.evaluation,
            seed=self.seed,
            parent_id=self.parent_id,
            battles=self.battles,
            served=False,
        )
        tracking.client(self.store).set_tag(trained.run_id, CONTROL_TAG, control)
        return trained

    def data_digest(self) -> str:
        """Return the digest of all that the routers learn from and are evaluated on."""
        battles = "" if self.battles is None else self.battles.digest
        return self.queries.labels.digest + battles

    def prompts(self) -> list[str]:
        """Return what the served form of a router learns from, prompt by prompt."""
        labels = self.queries.labels.read()
        if self.battles is not None:
            return list(self.battles.read()["prompt"].to_pylist())
        folds = evaluation_folds(labels, self.evaluation)
        rows = np.arange(labels.num_rows)  # out of fold, it is trained on everything in the end
        if len(folds) == 1:
            rows = np.concatenate([folds[0].train, folds[0].validation])
        return list(labels["text"].take(pa.array(rows)).to_pylist())


def knn_arm(
    training: Training, comparison: Comparison, trained: Sequence[TrainedRouter]
) -> tuple[str, np.ndarray] | None:
    """Return the best kNN's name and win rates on the compared queries; None where it is judged.

    Where the run trained none, one with default settings is trained on the same data and folds.
    """
    table = comparison.table.read()
    known = [router.name for router in trained if router.settings.router == "knn"]
    if comparison.best in known:
        return None
    if known:
        best = max(known, key=lambda name: np.nan_to_num(comparison.estimates[name]["apgr"].value))
        return best, table[best].to_numpy()
    arm = training.arm(Knn(name="gate-knn"), "kNN, trained for the gate")
    rows = evaluated_queries(training.queries, [arm])
    rate = dict(zip(rows["query_key"].to_pylist(), rows[arm.name].to_pylist(), strict=True))
    return arm.name, np.array([rate[key] for key in table["query_key"].to_pylist()])


@dataclass(frozen=True, eq=False)
class Control:
    """The candidate's twin under each shuffle; its replicates are of a router called `shuffled`."""

    shuffles: tuple[Bootstrap, ...]

    def estimate(self, router: str, metric: str, *, level: float = LEVEL) -> ShuffledApgr:
        """Return the estimate of the middle shuffle, by the lower end of its interval.

        An undefined one counts as better than chance: it never passes.
        """
        found = [shuffle.estimate(router, metric, level=level) for shuffle in self.shuffles]
        by_low = sorted(found, key=lambda one: np.nan_to_num(one.interval.low, nan=np.inf))
        middle = by_low[len(by_low) // 2]
        each = tuple(one.value for one in found)
        return ShuffledApgr(middle.value, middle.interval, middle.reason, each)


def shuffled_control(
    training: Training, settings: RouterSettings, *, level: float = LEVEL
) -> Control:
    """Train the candidate's twin on shuffled outcomes and evaluate it on shuffled outcomes.

    If its APGR is above chance at the ``level``, that may be the luck of this shuffle: two more
    are made, and the middle one counts. Usually one training is all.
    """
    shuffles = [_shuffled_twin(training, settings, number=1)]
    if not shuffles[0].estimate("shuffled", "apgr", level=level).interval.low <= 0.5:
        shuffles += [_shuffled_twin(training, settings, number=number) for number in (2, 3)]
    return Control(tuple(shuffles))


def _shuffled_twin(training: Training, settings: RouterSettings, *, number: int) -> Bootstrap:
    """Return the metrics of the twin under one shuffle."""
    store, seed = training.store, training.seed + number - 1
    labels = shuffled_outcomes(training.queries.labels.read(), seed=seed)
    warehouse = Warehouse(store.directory)
    queries = replace(training.queries, labels=warehouse.write_snapshot("shuffled", labels))
    battles = training.battles
    if battles is not None:
        moved = shuffled_battles(battles.read(), labels, strong=queries.pair.strong, seed=seed)
        battles = warehouse.write_snapshot("shuffled_battles", moved)
    again = "" if number == 1 else f"-{number}"
    twin = replace(training, queries=queries, battles=battles).arm(
        settings.model_copy(update={"name": f"{settings.name}-shuffled{again}"}),
        "outcomes shuffled over prompts",
    )
    rows = evaluated_queries(queries, [twin])
    found = bootstrap_metrics(
        {"shuffled": rows[twin.name].to_numpy()},
        rows["weak_quality"].to_numpy(),
        rows["strong_quality"].to_numpy(),
        replicates=training.evaluation.replicates,
        seed=seed,
        groups=groups_of(rows),
    )
    tracking.log_metrics(store, twin.run_id, flat(found.estimates("shuffled")))
    return found


def shuffled_outcomes(labels: pa.Table, *, seed: int) -> pa.Table:
    """Return the labels with outcomes permuted over distinct prompts.

    Labels and qualities move together, and a prompt keeps one outcome wherever it or a near copy
    of it (`near_copy_groups`) occurs, in training as in the test. So a router can do better than
    chance only by meeting, in the test, prompts from its training: had each row its own outcome, or
    were only the training labels shuffled, remembering them would not help in the test and the leak
    would not show. A text that itself tells the outcome is not noticed: nothing ties it to its new
    outcome.
    """
    return _moved(labels, "text", IDENTITY, seed)


def shuffled_battles(battles: pa.Table, labels: pa.Table, *, strong: str, seed: int) -> pa.Table:
    """Return the battles with outcomes permuted over prompts, in agreement with the ``labels``.

    A prompt that is also in the shuffled labels, or that has a near copy there, takes its verdict
    from the qualities there.
    """
    texts, prompts = labels["text"].to_pylist(), battles["prompt"].to_pylist()
    group = near_copy_groups([*texts, *prompts]).tolist()
    moved = _moved(battles, "prompt", BATTLE_IDENTITY, seed)
    gaps = labels["strong_quality"].to_numpy() - labels["weak_quality"].to_numpy()
    gap = dict(zip(map(same_prompt, texts), gaps, strict=True))
    near = dict(zip(group, gaps, strict=False))  # the labels' groups come first
    a_wins = moved["a_wins"].to_numpy().copy()
    sides = zip(prompts, group[len(texts) :], moved["llm_a"].to_pylist(), strict=True)
    for row, (prompt, number, llm_a) in enumerate(sides):
        if (known := gap.get(same_prompt(prompt), near.get(number))) is not None:
            a_wins[row] = 0.5 * (1 + np.sign(known if llm_a == strong else -known))
    position = moved.schema.get_field_index("a_wins")
    return moved.set_column(position, moved.schema.field(position), pa.array(a_wins))


def _moved(rows: pa.Table, text: str, identity: Sequence[str], seed: int) -> pa.Table:
    """Return the rows, all columns but ``identity`` permuted over groups of near copies."""
    group = near_copy_groups(rows[text].to_pylist())
    first = np.unique(group, return_index=True)[1]
    # A group's outcome is that of its first row.
    source = first[np.random.default_rng(seed).permutation(len(first))][group]
    taken = rows.take(pa.array(source))
    for position, field in enumerate(rows.schema):
        if field.name not in identity:
            rows = rows.set_column(position, field, taken[field.name])
    return rows


def duplicated_prompts(training: Training) -> tuple[Copies, int]:
    """Return the evaluated prompts that stand, exactly or nearly, in the training data of the
    router that predicts them, and how many distinct prompts are evaluated.

    What early stopping watches counts as training data. Battles on the very prompts that are
    evaluated are left out of training; those on near copies of them are not.
    """
    labels = training.queries.labels.read()
    texts = np.array(labels["text"].to_pylist(), dtype=object)
    fought = [] if training.battles is None else training.battles.read()["prompt"].to_pylist()
    group = near_copy_groups([*texts, *fought])
    group, of_battles = group[: len(texts)], group[len(texts) :]
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    evaluated: set[str] = set()
    for fold in evaluation_folds(labels, training.evaluation):
        predicted = texts[fold.predicted]
        hidden = {same_prompt(text) for text in predicted}
        evaluated |= hidden
        if training.battles is None:
            learned = np.concatenate([fold.train, fold.validation])
            known = {same_prompt(text) for text in texts[learned]}
            exact |= {normal: text for text in predicted if (normal := same_prompt(text)) in known}
            groups = group[learned]
        else:
            groups = of_battles[[same_prompt(text) not in hidden for text in fought]]
        copied = predicted[np.isin(group[fold.predicted], groups)]
        near |= {same_prompt(text): text for text in copied}
    nearly = tuple(text for normal, text in near.items() if normal not in exact)
    return Copies(tuple(exact.values()), nearly), len(evaluated)


def prompt_hashes(texts: Iterable[str]) -> list[str]:
    """Return a hash of each prompt: enough to recognise it again, not enough to read it."""
    return [
        hashlib.sha256(same_prompt(text).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        for text in texts
    ]


def champion_arm(store: Store, model: str, version: str, comparison: Comparison) -> ChampionArm:
    """Return the champion's win rates on the compared queries.

    Where its run logged one for the query, made without having seen it (held out or out-of-fold),
    that is taken. Else, if the prompt was not in its training data, the registered version scores
    it in a clean process. What remains is left out: it would know the answers.

    Raises ArtifactError when the version has to be scored and cannot be.
    """
    client = tracking.client(store)
    run_id = client.get_model_version(model, version).run_id
    table = comparison.table.read()
    keys, texts = table["query_key"].to_pylist(), table["text"].to_pylist()
    logged = _logged(client, run_id, LOGGED)
    known = {}
    if logged is not None:
        known_keys, known_rates = logged["query_key"].to_pylist(), logged["win_rate"].to_pylist()
        known = dict(zip(known_keys, known_rates, strict=True))
    rates = np.array([known.get(key, np.nan) for key in keys], dtype=np.float64)
    seen = learnt_prompts(client, run_id)
    new = np.array([], dtype=np.int64)
    if seen is not None:
        unseen = np.array([prompt not in seen for prompt in prompt_hashes(texts)])
        new = np.flatnonzero(np.isnan(rates) & unseen)
    if len(new):
        with stage("Scoring the champion in a clean process"):
            rates[new] = win_rates_in_clean_process(
                f"models:/{model}/{version}",
                [texts[row] for row in new],
                tracking_uri=store.mlflow_uri(),
            )
    left_out = int(np.isnan(rates).sum())
    note = (
        f"Champion, version {version}: win rates logged by its own run for "
        f"{len(keys) - len(new) - left_out} of the {len(known)} queries that it was judged on, "
        f"scored in a clean process for {len(new)} others"
    )
    if left_out:
        why = "it was trained on them" if seen is not None else "its training is not recorded"
        note += f"; {left_out} left out of the comparison, since {why}"
    return ChampionArm(version, rates, f"{note}.")


def log_learnt_prompts(client: "MlflowClient", run_id: str, hashes: Iterable[str]) -> None:
    """Record what a version learnt from, as `prompt_hashes`, with the run that it came of."""
    with TemporaryDirectory() as directory:
        file = Path(directory, Path(PROMPTS).name)
        pq.write_table(pa.table({"prompt": sorted(set(hashes))}), file)
        client.log_artifact(run_id, str(file), str(Path(PROMPTS).parent))


def learnt_prompts(client: "MlflowClient", run_id: str | None) -> frozenset[str] | None:
    """Return hashes of the prompts that a version learnt from; None where it is not recorded."""
    table = _logged(client, run_id, PROMPTS)
    return None if table is None else frozenset(table["prompt"].to_pylist())


def _logged(client: "MlflowClient", run_id: str | None, path: str) -> pa.Table | None:
    """Return a Parquet artifact of a run, None where it has none."""
    if not run_id:
        return None
    if path not in [item.path for item in client.list_artifacts(run_id, str(Path(path).parent))]:
        return None
    with TemporaryDirectory() as directory:
        return pq.read_table(client.download_artifacts(run_id, path, directory))
