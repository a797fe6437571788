"""Settings of experiments and all that they are made of, as frozen pydantic models.

The same models validate the YAML files in this folder, are the parameters of the Prefect flows
(so that the Prefect UI shows them as a form and refuses a bad value), and are logged with each run.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    computed_field,
    field_validator,
    model_validator,
)

from conf.errors import ConfigError, unknown_name
from conf.llms import LLM, Generation, Pair
from conf.preferences import Preferences
from conf.routers import Knn, MatrixFactorization, Router, SimilarityWeighted, check_router_names
from conf.settings import Settings, Share, checked_name


class Store(Settings):
    """Where everything that a run leaves behind lies."""

    directory: Path = Path(".turnout")
    """Holds the DuckDB warehouse, its Parquet snapshots, caches and, by default, MLflow's store."""
    tracking_uri: str | None = None
    """MLflow server; by default $MLFLOW_TRACKING_URI, or else an SQLite file in `directory`."""
    experiment: str = "turnout"
    """MLflow experiment in which runs are compared."""

    def mlflow_uri(self) -> str:
        """Return the tracking URI: the one set here, that of the environment, or the own file's."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or self._own_uri()

    def is_local(self) -> bool:
        """Tell whether runs go to the SQLite file in `directory`, artifacts beside it."""
        return self.mlflow_uri() == self._own_uri()

    def _own_uri(self) -> str:
        return f"sqlite:///{self.directory.resolve() / 'mlflow.db'}"


class Queries(Settings):
    """Which queries the LLMs are asked."""

    source: Literal["bundled", "file", "mixinstruct"] = "bundled"
    """`bundled` is the geography set; `file` reads JSONL, CSV or Parquet; `mixinstruct` the hub."""
    path: str = "llm-blender/mix-instruct"
    """For `file`: the file, or a glob. For `mixinstruct`: a hub name or a local folder."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For `file`: our field (text, id, reference, gold, context, domain, split) to its column."""
    limit: dict[Literal["train", "validation", "test"], PositiveInt] | PositiveInt | None = None
    """At most so many queries, in all or per split, drawn by a hash of their ids."""
    validation_share: Share = 0.15
    """Share held out for early stopping, where the source has no split of its own."""
    test_share: Share = 0.3
    """Share held out for the test, where the source has no split of its own."""


class BartScore(Settings):
    """BARTScore: mean log-likelihood per token of a target text given a source text."""

    metric: Literal["bartscore"] = "bartscore"
    name: str = "bartscore"
    checkpoint: str = "facebook/bart-large-cnn"
    """Hub name, local folder, GGUF file, or `smollm2-135m` for the packaged weights."""
    architecture: Literal["seq2seq", "causal"] = "seq2seq"
    direction: Literal["reference_to_response", "response_to_reference", "f"] = (
        "reference_to_response"
    )
    overlay: str | None = None
    """State dict laid over the checkpoint (the ParaBank weights); path of a .pth file."""
    source_form: str = "{text}"
    """How the source text is put to the scorer; {query} is filled in too."""
    template: str = "{source}\nIn other words:\n"
    """For causal checkpoints: the prompt that holds the source; the target follows it."""
    max_length: PositiveInt = 1024
    """Longest source and target, in tokens."""
    tokens_per_batch: PositiveInt | None = None
    """Tokens in one forward pass, padding included; by default what suits the device."""


class GoldMatch(Settings):
    """1 where the response contains one of the query's gold answers as whole words, else 0."""

    metric: Literal["gold_match"] = "gold_match"
    name: str = "gold"


QualityMetric = Annotated[BartScore | GoldMatch, Field(discriminator="metric")]


class Quality(Settings):
    """Which quality metrics are stored, and which one makes the labels."""

    metrics: tuple[QualityMetric, ...] = (BartScore(),)
    label_metric: str = "bartscore"
    """Name of the metric from which labels, curves and the gate are computed."""

    @model_validator(mode="after")
    def _known(self) -> "Quality":
        names = [metric.name for metric in self.metrics]
        if self.label_metric not in names:
            raise ConfigError(
                unknown_name("quality metric", self.label_metric, names)
                + " Set quality.label_metric to one of them."
            )
        if len(set(names)) != len(names):
            raise ConfigError(
                f"Two quality metrics share a name: {names}. Expected one name each. "
                "Rename one of them."
            )
        return self


class Labels(Settings):
    """How responses become labels."""

    pairing: Literal["all", "matched"] = "all"
    """`all` compares every weak with every strong sample; `matched` equal indices only."""


class Evaluation(Settings):
    """How routers are compared."""

    replicates: PositiveInt = 2000
    """Bootstrap replicates behind every interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_test_queries: PositiveInt = 200
    """With fewer test queries, out-of-fold predictions over all queries are evaluated."""
    folds: int = Field(default=5, ge=2)
    fold_seed: int = 0
    """Which of the ways to divide the queries into folds is taken."""


class Pool(Settings):
    """Choosing among all LLMs: the cheapest whose expected quality is near enough to the best's."""

    margin: Share = 0.05
    """Expected quality (mean win rate against the other LLMs) that may be given up for the price:
    0 takes the best LLM for each query, 1 the cheapest."""
    routers: tuple[str, ...] | None = None
    """Names of the routers that learn to choose; by default all that compare any two LLMs."""


class Gate(Settings):
    """What a candidate must show before it becomes the champion."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the two-sided intervals; widened for the best of several routers (Bonferroni)."""
    min_apgr: Share = 0.5
    """The APGR interval must lie above this; 0.5 is a random router."""
    knn_tolerance: Share = 0.0
    """kNN may be better by this much APGR, with confidence, before the candidate is rejected."""
    max_duplicate_share: Share = 0.01
    """Share of the evaluated prompts that may also stand in the training data."""
    margin: Share = 0.0
    """The lower bound of the APGR gain on the champion must be above minus this. Above 0, versions
    that are not shown to be better get through."""
    min_gain: Share = 0.01
    """Smallest gain in APGR that is worth a promotion."""
    max_false_promotions: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of retrains in which a candidate as good as the champion may replace it, with a margin
    of 0. The nth version judged on the same test queries gets 1/n² of it (`promotion_level`)."""
    min_champion_queries: PositiveInt = 30
    """Fewest queries, new to both, on which candidate and champion are compared."""
    max_latency_ms: float = Field(default=250.0, gt=0)
    """Longest median time for the win rate of one query."""
    reproduce_tolerance: float = Field(default=1e-5, gt=0)
    """Largest difference between logged and registered win rates."""


class Benchmark(Settings):
    """A comparison of routers on known answers, in the layout that RouteLLM publishes."""

    name: str = "routellm"
    seed: int = 7
    """Of the training, and of how rows are divided."""
    store: Store = Store()
    directory: Path
    """Folder of CSVs: `prompt`, then one column for each LLM, True where it answered correctly."""
    evaluation_directory: Path | None = None
    """Another such folder to be judged on; by default rows of `directory` that are held out."""
    train_rows: PositiveInt | None = None
    """Train on so many rows, judge on the rest; by default out-of-fold predictions are judged."""
    weak: str | None = None
    """Column of the weak LLM; of two columns, by default the one that is less often right."""
    strong: str | None = None
    routers: tuple[Router, ...]
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _distinct(self) -> "Benchmark":
        check_router_names(self.routers)
        return self


class ThresholdRequest(Settings):
    """Which router is calibrated, and for what: a largest quality drop or a strong share."""

    router: str
    """A router of the last finished run, or `champion`."""
    pair: str | None = None
    """Name of the pair, as weak--strong, where the router exists for several."""
    max_drop: float | None = None
    """Largest quality drop against all-strong, in the metric's units."""
    max_drop_percent: float | None = None
    """The same in % of the strong LLM's mean quality."""
    confidence: float = 0.95
    """How sure the drop must be within its bound."""
    strong_share: float | None = None
    """Wanted share of queries for the strong LLM, instead of a bound on the drop."""
    data: Path | None = None
    """Parquet, CSV or JSONL to calibrate on; by default the queries of the router's own run."""
    quality_range: tuple[float, float] | None = None
    """Lowest and highest quality there can be. By default what the metric's definition says for
    the run's own queries; for a file [0, 1] is assumed, and said, if its qualities are in it."""

    @model_validator(mode="after")
    def _possible(self) -> "ThresholdRequest":
        asked = {
            name: value
            for name in ("max_drop", "max_drop_percent", "strong_share")
            if (value := self.model_dump()[name]) is not None
        }
        if len(asked) != 1:
            raise ConfigError(
                f"The request names {', '.join(asked) or 'no goal'}. Expected one of max_drop, "
                "max_drop_percent and strong_share. Set exactly one."
            )
        ((name, value),) = asked.items()
        if name == "strong_share" and not 0 <= value <= 1:
            raise ConfigError(
                f"The strong share is {value:g}. Expected a share between 0 and 1, such as 0.3 "
                "or 30%. Correct it."
            )
        if name != "strong_share" and not 0 < value < float("inf"):
            raise ConfigError(
                f"The largest quality drop is {value:g}. Expected a finite number above 0, such "
                "as 0.01 or 1%. Allow a small drop: none at all cannot be certified."
            )
        if not 0 < self.confidence < 1:
            raise ConfigError(
                f"The confidence is {self.confidence:g}. Expected a share between 0 and 1, such "
                "as 0.95 or 95%. Correct it."
            )
        return self


class DriftRequest(Settings):
    """Which queries are held against whose, and how sure a finding must be."""

    queries: Path
    """Recent queries: a JSONL, CSV or Parquet file, or a folder of such files."""
    router: str = "champion"
    """A router of the last finished run, or `champion`."""
    pair: str | None = None
    """Name of the pair, as weak--strong, where the router exists for several."""
    false_alarm_rate: float = Field(default=0.01, gt=0, lt=0.5)
    """How often drift may be reported where there is none, both tests together."""
    smallest_shift: float = Field(default=0.25, gt=0, le=1)
    """Share of the traffic moved across a threshold that must not go unseen: it decides how many
    queries are needed before `no drift` is said."""
    encoder: str = "minilm"
    """What embeds the queries, as in a router's settings."""
    at_most: PositiveInt = 1000
    """Queries of each kind that are compared; of more, so many are drawn."""


class Compute(Settings):
    """Where responses are asked for and scored: in this process, or as shards on a Ray cluster."""

    kind: Literal["local", "ray"] = "local"
    """`compute=ray` for short. The tables are the same either way."""
    address: str | None = None
    """Ray's head, as `host:6379`, `ray://host:10001` or `auto` for the cluster this machine is
    part of; by default a cluster is started on this machine for each stage."""
    shard_queries: PositiveInt = 200
    """Queries whose responses one shard asks for: what may have to be sent to another node."""
    shard_responses: PositiveInt = 5000
    """Responses that one shard scores, rounded up to whole calls of the scorer (1,000)."""
    directory: Path | None = None
    """Folder in which shards leave their Parquet, under the same path on every node; by default
    `shards` in the store's directory."""
    retries: int = Field(default=2, ge=0)
    """How often a shard is run again whose process or node ended under it."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, settings: object) -> object:
        return {"kind": settings} if isinstance(settings, str) else settings


LOCAL = Compute()


class Experiment(Settings):
    """One run of the pipeline, whole."""

    name: str = "embedded"
    seed: int = 7
    store: Store = Store()
    compute: Compute = LOCAL
    queries: Queries = Queries()
    llms: tuple[LLM, ...]
    pairs: tuple[Pair, ...]
    generation: Generation = Generation()
    quality: Quality = Quality()
    labels: Labels = Labels()
    routers: tuple[Router, ...]
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    pool: Pool | None = None
    """With more than two LLMs: also learn, and evaluate, choosing among all of them."""
    preferences: Preferences | None = None
    """Battles of other origin, and a judge's, that join what the responses' scores say in the
    training of mf, sw_ranking, bert and causal_llm; the others learn from labels."""

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        names = [llm.name for llm in self.llms]
        if len(set(names)) < 2 or len(set(names)) != len(names):
            raise ConfigError(
                f"The configured LLMs are {names}. Expected at least two, with different names. "
                "Add a weak and a strong LLM under llms."
            )
        for pair in self.pairs:
            for side in (pair.weak, pair.strong):
                if side not in names:
                    raise ConfigError(unknown_name("LLM", side, names) + " Set pairs.")
        if not self.pairs:
            raise ConfigError("pairs is empty. Expected a weak and a strong LLM. Add one pair.")
        pairs = [pair.name() for pair in self.pairs]
        if twice := {name for name in pairs if pairs.count(name) > 1}:
            raise ConfigError(
                f"The pair {', '.join(sorted(twice))} is listed more than once. Expected each pair "
                "once: its name is that of its registered model. Remove it from pairs."
            )
        check_router_names(self.routers)
        if self.pool is not None:
            self.pool_routers()
        if self.preferences is not None:
            self._check_preferences(self.preferences, names)
        return self

    def _check_preferences(self, preferences: Preferences, llms: list[str]) -> None:
        for name in preferences.names.values():
            if name not in llms:
                raise ConfigError(unknown_name("LLM", name, llms) + " Correct preferences.names.")
        for source in preferences.sources:
            if source.kind != "responses":
                continue
            for name in source.llms:
                if name not in llms:
                    raise ConfigError(
                        unknown_name("LLM", name, llms) + " Correct preferences.sources.llms."
                    )
            if source.llms and any(
                not {pair.weak, pair.strong} <= {*source.llms} for pair in self.pairs
            ):
                raise ConfigError(
                    f"The responses of {', '.join(source.llms)} are to be learnt from, and not of "
                    "every pair. Expected all LLMs of pairs among them. Add them to "
                    "preferences.sources.llms, or leave it out for all LLMs."
                )

    def pool_routers(self) -> "tuple[Knn | MatrixFactorization | SimilarityWeighted, ...]":
        """Return the settings of the routers that learn to choose among all LLMs.

        Raises ConfigError where there are two LLMs only, or no such router.
        """
        if len(self.llms) < 3:
            raise ConfigError(
                f"pool is set, with {len(self.llms)} LLMs. Expected at least three: between two, "
                "a router's threshold decides. Add an LLM, or leave pool out."
            )
        able = {
            router.name: router
            for router in self.routers
            if isinstance(router, Knn | MatrixFactorization | SimilarityWeighted)
        }
        asked = None if self.pool is None else self.pool.routers
        names = tuple(able) if asked is None else asked
        for name in names:
            if name not in able:
                raise ConfigError(
                    unknown_name("pool router", name, able)
                    + " Expected a router of kind knn, mf or sw_ranking, listed under "
                    "routers. Set pool.routers."
                )
        if not names:
            raise ConfigError(
                "pool is set, and no router can choose among its LLMs. Expected one of kind "
                "knn, mf or sw_ranking. Add one under routers."
            )
        return tuple(able[name] for name in names)

    def llm(self, name: str) -> LLM:
        """Return the LLM called ``name``."""
        return next(llm for llm in self.llms if llm.name == name)


class BenchmarkFolder(Settings):
    """Known answers on which routers are judged and never trained."""

    name: str
    """What its figures and metrics are filed under."""
    directory: Path
    """Folder of CSVs: `prompt`, then one column for each LLM, True where it answered correctly."""
    contaminated: Path | None = None
    """JSONL of prompts (eval_prompt) that are left out; by default `contaminated_prompts.jsonl` in
    the folder, where there is one."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return checked_name("benchmark", name)


class PreferenceExperiment(Settings):
    """One run from preference data to a judged router, without asking any LLM."""

    name: str = "routellm_paper"
    seed: int = 7
    store: Store = Store()
    pair: Pair
    """The LLMs to route between, as `benchmarks` call them, or as `preferences.names` does."""
    preferences: Preferences
    """What routers learn from."""
    benchmarks: tuple[BenchmarkFolder, ...] = Field(min_length=1)
    """What they are judged on. The first one decides the gate; all are reported."""
    routers: tuple[Router, ...]
    evaluation: Evaluation = Evaluation()
    """All queries of the benchmarks are a held-out test, so nothing is divided into folds."""
    gate: Gate = Gate()

    @model_validator(mode="before")
    @classmethod
    def _reloaded(cls, settings: object) -> object:
        """Take a dump, such as a run's config.json: it repeats what is derived from the rest.

        What contradicts the rest is left, and refused as no such setting.
        """
        if not isinstance(settings, dict):
            return settings
        pair = settings.get("pair")
        derived = {"pairs": ([pair], (pair,)), "quality": ({"label_metric": "correct"},)}
        return {
            key: value
            for key, value in settings.items()
            if key not in derived or value not in derived[key]
        }

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The only pair, for whoever reads settings of either kind of experiment."""
        return (self.pair,)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def quality(self) -> dict[str, str]:
        """What is judged by, where an `Experiment` says it: whether the answer is correct."""
        return {"label_metric": "correct"}

    @model_validator(mode="after")
    def _consistent(self) -> "PreferenceExperiment":
        check_router_names(self.routers)
        for what, found in (
            ("name", [folder.name for folder in self.benchmarks]),
            ("directory", [str(folder.directory) for folder in self.benchmarks]),
        ):
            if twice := {one for one in found if found.count(one) > 1}:
                raise ConfigError(
                    f"Two benchmarks share the {what} {min(twice)!r}. Expected a different one for "
                    f"each. Correct benchmarks.{what}."
                )
        if own := [source.kind for source in self.preferences.sources if source.path is None]:
            raise ConfigError(
                f"preferences.sources has {own[0]}, which is made of responses, and no LLM is "
                "asked here. Expected arena, gold or alpaca. Take it out, or write an experiment "
                "with llms."
            )
        return self


def experiment_kind(settings: object) -> Literal["generation", "preferences"]:
    """Tell which kind of experiment settings describe, so that only its mistakes are reported.

    >>> experiment_kind({"pair": {}, "preferences": {}, "benchmarks": []})
    'preferences'
    """
    if isinstance(settings, dict):
        learns = "benchmarks" in settings and "llms" not in settings
    else:
        learns = isinstance(settings, PreferenceExperiment)
    return "preferences" if learns else "generation"


AnyExperiment = Annotated[
    Annotated[Experiment, Tag("generation")] | Annotated[PreferenceExperiment, Tag("preferences")],
    Discriminator(experiment_kind),
]
