"""Settings of routers: one class for each kind, told apart by `router`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from conf.errors import ConfigError
from conf.settings import Settings, Share, checked_name


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


def _with_defaults(router: type[Settings], given: Any) -> Any:
    """Return trainer settings in which the router's own defaults fill what is not set."""
    if isinstance(given, Trainer):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given, dict):
        return given
    defaults: Trainer = router.model_fields["trainer"].default
    return defaults.model_dump() | given


class RouterKind(Settings):
    """What the settings of all routers say about the kind of router, not about one of them."""

    battles_of: ClassVar[Literal["all", "pair"]] = "pair"
    """Whose battles it learns from: all LLMs', each of which it rates, or the routed pair's."""
    joins_battles: ClassVar[bool] = False
    """Whether, where LLMs were asked too, battles join what their scores say. Such are the routers
    of RouteLLM; the others learn from the labels alone."""


class Hybrid(RouterKind):
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


class Knn(RouterKind):
    """Similarity-weighted nearest neighbours on frozen embeddings."""

    battles_of: ClassVar[Literal["all", "pair"]] = "all"
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


class KernelRidge(RouterKind):
    """Kernel ridge regression on the hidden states of a small LLM, frozen."""

    router: Literal["kernel_ridge"] = "kernel_ridge"
    name: str = "kernel-ridge"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoders: tuple[str, ...] = Field(
        default=("smollm2-135m@18", "smollm2-135m@30:last"), min_length=1
    )
    """Views of a query, each an encoder: `minilm`, a folder, a hub name; `@18` cuts off layers."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = (0.8, 0.2)
    """How much each view counts; alike, where only encoders are given."""
    encoder_cache: Path | None = None
    """Folder where computed embeddings are kept between runs."""
    gamma: float = Field(default=2.0, gt=0)
    """Of the kernel exp(−γ |x − z|²) between vectors of length 1."""
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0), min_length=1
    )
    """Candidates for the penalty λ; the one with the best leave-one-out error is taken."""
    max_queries: PositiveInt = 10_000
    """Of more training queries, so many are drawn: time grows with their cube."""

    @model_validator(mode="before")
    @classmethod
    def _alike_unless_weighed(cls, given: Any) -> Any:
        encoders = given.get("encoders") if isinstance(given, dict) else None
        if isinstance(encoders, list | tuple) and "weights" not in given:
            return given | {"weights": [1.0] * len(encoders)}
        return given

    @model_validator(mode="after")
    def _one_weight_each(self) -> "KernelRidge":
        if len(self.weights) != len(self.encoders):
            raise ConfigError(
                f"There are {len(self.encoders)} encoders and {len(self.weights)} weights. "
                "Expected one weight for each encoder. Set weights."
            )
        return self


class Length(RouterKind):
    """Control: the longer the query, the higher the win rate (or the reverse, as fitted)."""

    router: Literal["length"] = "length"
    name: str = "length"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"


class Random(RouterKind):
    """Control: a win rate drawn from a hash of the query and the seed."""

    router: Literal["random"] = "random"
    name: str = "random"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"


class MatrixFactorization(RouterKind):
    """RouteLLM's matrix factorisation: a vector for every LLM, on frozen embeddings."""

    battles_of: ClassVar[Literal["all", "pair"]] = "all"
    joins_battles: ClassVar[bool] = True
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
        return _with_defaults(cls, given)


class SimilarityWeighted(RouterKind):
    """RouteLLM's similarity-weighted ranking: Bradley-Terry ratings for every query."""

    battles_of: ClassVar[Literal["all", "pair"]] = "all"
    joins_battles: ClassVar[bool] = True
    router: Literal["sw_ranking"] = "sw_ranking"
    name: str = "sw-ranking"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoder: str = "minilm"
    """`minilm`, a hub name, a local folder, or `openai:<base_url>#<model>` for an endpoint."""
    encoder_cache: Path | None = None
    """Folder where computed embeddings are kept between runs."""
    tiers: int = Field(default=10, ge=2)
    """Groups of about equally strong LLMs; with fewer LLMs, each is a group of its own."""


class Bert(RouterKind):
    """RouteLLM's BERT classifier: an encoder fine-tuned on three verdicts."""

    joins_battles: ClassVar[bool] = True
    router: Literal["bert"] = "bert"
    name: str = "bert"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    encoder: str = "minilm"
    """`minilm` for the packaged MiniLM-L6, a hub name, or a local folder."""
    trained_layers: PositiveInt | None = 2
    """How many of the encoder's last layers are trained; null for all, embeddings included."""
    max_length: PositiveInt = 256
    """Longest query, in tokens; the rest is cut off."""
    dropout: Share = 0.1
    """Dropout before the layer on top; the encoder's own stands in its configuration."""
    tie_share: Share = 0.5
    """How much of a tie counts as a win of the strong LLM; RouteLLM's released code has 0."""
    trainer: Trainer = Trainer()


class CausalLLM(RouterKind):
    """RouteLLM's causal LLM: a language model asked for a verdict, tuned with LoRA."""

    joins_battles: ClassVar[bool] = True
    router: Literal["causal_llm"] = "causal_llm"
    name: str = "causal-llm"
    labels: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    model: str = "smollm2-135m"
    """`smollm2-135m` for the packaged weights, a hub name, or a local folder."""
    template: str = (
        "{query}\n\nWould a strong assistant answer this better than a weak one? "
        "A: yes. B: no difference. C: no."
    )
    """What the model is asked; {query} stands in it once."""
    chat: bool = True
    """Put it into the chat template of the model's tokenizer, where that has one."""
    label_tokens: tuple[str, str, str] = ("A", "B", "C")
    """The answers for strong wins, tie and weak wins, each a single token of the model."""
    max_length: PositiveInt = 256
    """Longest query, in tokens, the template not counted; the rest is cut off."""
    rank: PositiveInt = 8
    """Rank of LoRA's update of each linear layer."""
    alpha: PositiveInt = 16
    """LoRA's update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the inputs of LoRA's update."""
    tie_share: Share = 0.5
    """How much of a tie counts as a win of the strong LLM."""
    trainer: Trainer = Trainer(max_epochs=3, batch_size=8, learning_rate=5e-4)
    """One rate for all: there is no layer on top."""

    @field_validator("template")
    @classmethod
    def _one_query(cls, template: str) -> str:
        if template.count("{query}") != 1:
            raise ConfigError(
                f"The template {template!r} holds {{query}} {template.count('{query}')} times. "
                "Expected it once, where the query goes. Correct template."
            )
        return template

    @field_validator("trainer", mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        """Keep the defaults above, not Trainer's, for what is not set."""
        return _with_defaults(cls, given)


Router = Annotated[
    Hybrid
    | Knn
    | KernelRidge
    | Length
    | Random
    | MatrixFactorization
    | SimilarityWeighted
    | Bert
    | CausalLLM,
    Field(discriminator="router"),
]


def check_router_names(routers: "tuple[Router, ...]") -> None:
    """Raise ConfigError unless there are routers, under different names that tables can carry."""
    names = [checked_name("router", router.name) for router in routers]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f"The configured routers are {names}. Expected at least one, with different names. "
            "Set routers."
        )
