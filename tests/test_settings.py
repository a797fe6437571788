"""Settings: every bundled experiment loads, overrides work, and bad ones say what is wrong."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from conf.errors import ConfigError
from conf.llms import LLM, Decoding, Endpoint, Pair
from conf.load import bundled, config_digest, load_experiment
from conf.schema import AnyExperiment, PreferenceExperiment, Store


@pytest.mark.parametrize("name", bundled())
def test_bundled_experiments_load(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.pairs


@pytest.mark.parametrize("name", bundled())
def test_what_a_bundled_experiment_is_dumped_as_is_loaded_again(name: str) -> None:
    experiment = load_experiment(name)
    any_experiment: TypeAdapter[AnyExperiment] = TypeAdapter(AnyExperiment)
    for mode in ("json", "python"):
        # As a run logs it, with what is derived; and as a deployment keeps it, without.
        for round_trip in (False, True):
            dump = experiment.model_dump(mode=mode, round_trip=round_trip)
            assert any_experiment.validate_python(dump) == experiment
            assert type(experiment).model_validate(dump) == experiment
    assert any_experiment.validate_json(experiment.model_dump_json()) == experiment
    assert config_digest(any_experiment.validate_python(dump)) == config_digest(experiment)


def test_a_dump_that_contradicts_itself_is_refused() -> None:
    dump = load_experiment("routellm_paper").model_dump(mode="json")
    bad = {**dump, "pairs": [{"weak": "other", "strong": "LLMs"}]}
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PreferenceExperiment.model_validate(bad)
    # Of the two kinds of experiment, only the one that is meant is spoken of.
    with pytest.raises(ValidationError, match="1 validation error") as refused:
        TypeAdapter(AnyExperiment).validate_python({**dump, "seed": "many"})
    assert "Experiment.llms" not in str(refused.value)


def test_paper_experiment_is_the_papers() -> None:
    paper = load_experiment("hybrid_llm_paper")
    assert paper.queries.limit == {"train": 10_000, "validation": 5_000, "test": 5_000}
    assert paper.generation.samples == 10
    assert [pair.name() for pair in paper.pairs] == [
        "llama-2-7b--llama-2-13b",
        "llama-2-13b--gpt-3.5-turbo",
        "flan-t5-800m--llama-2-13b",
    ]
    hybrids = [router for router in paper.routers if router.router == "hybrid"]
    assert [router.labels for router in hybrids] == [
        "deterministic",
        "probabilistic",
        "transformed",
    ]
    assert {router.encoder for router in hybrids} == {"microsoft/deberta-v3-large"}
    assert {router.trainer.max_epochs for router in hybrids} == {5}


def test_overrides_reach_nested_settings_and_list_entries() -> None:
    experiment = load_experiment(
        overrides=(
            "llms.smollm2.decoding.max_tokens=7",
            "generation.samples=3",
            "pairs.0.weak=smollm2",
        )
    )
    assert experiment.llm("smollm2").decoding.max_tokens == 7
    assert experiment.generation.samples == 3


def test_overrides_reach_entries_whose_names_hold_dots() -> None:
    overrides = ("llms.gpt-3.5-turbo.limits.concurrency=3",)
    paper = load_experiment("hybrid_llm_paper", overrides)
    assert paper.llm("gpt-3.5-turbo").limits.concurrency == 3


def test_an_override_changes_one_of_several_entries_under_an_anchor() -> None:
    overrides = ("routers.hybrid-deterministic.trainer.max_epochs=1",)
    routers = load_experiment("hybrid_llm_paper", overrides).routers
    epochs = [router.trainer.max_epochs for router in routers if router.router == "hybrid"]
    assert epochs == [1, 5, 5]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Decoding().temperature = 1.0


def test_digest_follows_the_settings() -> None:
    same, other = load_experiment(), load_experiment(overrides=("seed=8",))
    assert config_digest(load_experiment()) == config_digest(same)
    assert config_digest(other) != config_digest(same)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.samples=-1", r"generation.samples: .*greater than 0 \(got -1\)"),
        ("generation.sample=4", "generation.sample: no such setting"),
        ("quality.label_metric=gol", "Did you mean 'gold'"),
        ("pairs.0.strong=smollm2", "names 'smollm2' twice"),
        ("pairs.0.strong=gemma", "Unknown LLM 'gemma'. Did you mean 'gemma3-facts'"),
        ("llms.smol.model=x", "Did you mean 'smollm2'"),
        ("pairs=[]", "pairs is empty"),
        ("routers=[]", "Expected at least one"),
        ("routers=[{router: mff}]", r"routers\.0: Unknown router 'mff'\. Did you mean 'mf'\?"),
        ("quality.metrics.0.metric=bart", "Unknown metric 'bart'. Did you mean 'bartscore'"),
        ("llms.smollm2.endpoint={kind: openai}", "has no url"),
        ("llms.smollm2.endpoint={kind: embedded}", "has no weights"),
        ("llms.smollm2.endpoint={url: 'localhost:8000'}", "url is 'localhost:8000'.*Correct"),
        ("llms.smollm2.endpoint={url: 'http://host:port/v1'}", "Expected a base URL"),
        ("llms.smollm2.endpoint.context_tokens=0", "context_tokens: .*greater than 0"),
        (
            "pairs=[{weak: smollm2, strong: gemma3-facts}, {weak: smollm2, strong: gemma3-facts}]",
            "The pair smollm2--gemma3-facts is listed more than once.*Remove it",
        ),
        ("routers.knn.name=oracle", "router name 'oracle' is that of a column.*Rename the router"),
        ("routers.knn.name=text", "is that of a column"),
        ("routers.knn.name=a/b", "router name 'a/b' cannot be used.*Expected up to 100 letters"),
        ("seed", "Expected key=value"),
        ("seed=[", "not readable as YAML"),
        ("seed.deeper=1", "plain value 7"),
    ],
)
def test_bad_settings_are_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(overrides=(override,))


def test_one_llm_is_not_enough(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(
        "llms: [{name: a, model: a, endpoint: {url: http://localhost:1/v1}}]\n"
        "pairs: []\nrouters: [{router: knn}]\n"
    )
    with pytest.raises(ConfigError, match="Expected at least two, with different names"):
        load_experiment(file)


def test_unknown_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'embedded'"):
        load_experiment("embeded")
    with pytest.raises(ConfigError, match="There is no file"):
        load_experiment(tmp_path / "absent.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Goiás".encode("latin-1"))
    with pytest.raises(ConfigError, match="Expected UTF-8 YAML"):
        load_experiment(latin)
    words = tmp_path / "words.yaml"
    words.write_text("just words")
    with pytest.raises(ConfigError, match="Expected a mapping"):
        load_experiment(words)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a/b",
            "a:b",
            "it's",
            'say "x"',
            "`x`",
            " a",
            "a ",
            "a\n",
            "tab\there",
            "nul\0",
            "",
            "..",
        ),
        *("x" * 101, "win_rate", "weak_quality", "query_key"),
    ],
)
def test_names_that_tables_or_mlflow_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"The LLM name .*Expected .*Rename the LLM"):
        LLM(name=name, model="anything/goes:here", endpoint=Endpoint(url="http://localhost/v1"))


@pytest.mark.parametrize("name", ["a", "gpt-3.5-turbo", "Llama 2 7b", "É_1"])
def test_ordinary_names_are_kept(name: str) -> None:
    endpoint = Endpoint(url="http://localhost/v1")
    assert LLM(name=name, model="m", endpoint=endpoint).name == name


def test_a_pairs_name_is_safe_for_the_registry_and_still_its_own() -> None:
    from mlflow.utils.validation import _validate_model_name

    names = {
        Pair(weak=weak, strong="gpt-4").name()
        for weak in ("mistralai/Mixtral-8x7B", "mistralai-Mixtral-8x7B", "mistralai:Mixtral-8x7B")
    }
    assert len(names) == 3
    assert "mistralai-Mixtral-8x7B--gpt-4" in names
    for name in names:
        _validate_model_name(name)


def test_the_tracking_server_is_the_one_set_then_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert Store(directory=tmp_path).mlflow_uri() == own
    assert Store(directory=tmp_path).is_local()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Store(directory=tmp_path).mlflow_uri() == "http://mlflow:5000"
    assert not Store(directory=tmp_path).is_local()
    assert Store(directory=tmp_path, tracking_uri=own).mlflow_uri() == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert Store(directory=tmp_path).is_local()
