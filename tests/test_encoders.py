"""Vectors against sentence-transformers, alone against in company, cached against computed."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_llm import save_tiny_llm

from conf.errors import ArtifactError, ConfigError, EndpointError
from router_models import transformer
from router_models.encoders import (
    Encoder,
    check_encoder,
    encode_views,
    encoder_fingerprint,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.packaged import minilm_directory
from router_models.transformer import Precision, equal_length_batches

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
RECORDS = [json.loads(line) for line in LINES]
TEXTS = [record["text"] for record in RECORDS[::12]] + [record["context"] for record in RECORDS[:9]]
ODD = ["", " ", "Hi", "¿Qué? 東京 🦜", "long " * 2000]

both_precisions = pytest.mark.parametrize("precision", get_args(Precision))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores; threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """What sentence-transformers makes of TEXTS and ODD with the same weights."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_directory()), device="cpu")
    return np.asarray(model.encode([*TEXTS, *ODD], normalize_embeddings=True))


@pytest.fixture
def minilm_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(minilm_directory(), tmp_path / "copy"))


@both_precisions
def test_vectors_are_those_of_sentence_transformers(
    precision: Precision, reference: np.ndarray
) -> None:
    vectors = load_encoder("minilm", precision=precision).encode([*TEXTS, *ODD])
    cosines = (vectors * reference).sum(axis=1)
    assert cosines.min() > (0.999 if precision == "bfloat16" else 0.999999)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert vectors.dtype == np.float32


@both_precisions
def test_a_text_has_the_same_vector_in_any_company(precision: Precision) -> None:
    encoder = load_encoder("minilm", precision=precision)
    together = encoder.encode([*TEXTS, *ODD, *TEXTS])
    alone = np.concatenate([encoder.encode([text]) for text in [*TEXTS[:20], *ODD]])
    expected = np.concatenate([together[:20], together[len(TEXTS) : len(TEXTS) + len(ODD)]])
    assert np.allclose(alone, expected, rtol=0, atol=1e-6)
    assert np.array_equal(together[: len(TEXTS)], together[-len(TEXTS) :])
    assert np.allclose(encoder.encode(TEXTS[::-1])[::-1], together[: len(TEXTS)], atol=1e-6)


def test_the_dimension_is_known_without_texts() -> None:
    encoder = load_encoder("minilm")
    assert encoder.dimension == 384
    assert encoder.encode([]).shape == (0, 384)


def test_the_digest_names_weights_limit_and_precision(minilm_copy: Path) -> None:
    digests = {load_encoder("minilm", precision=chosen).digest for chosen in get_args(Precision)}
    assert len(digests) == 2
    same = load_encoder(str(minilm_copy), precision="float32").digest
    assert same == load_encoder("minilm", precision="float32").digest
    limit = minilm_copy / "sentence_bert_config.json"
    limit.write_text(json.dumps({"max_seq_length": 16}))
    assert load_encoder(str(minilm_copy), precision="float32").digest != same


def test_the_folders_own_limit_and_pooling_are_followed(minilm_copy: Path) -> None:
    (minilm_copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    encoder = load_encoder(str(minilm_copy), precision="float32")
    first, second = encoder.encode(["one two three four five", "one two three four six seven"])
    assert np.array_equal(first, second)  # [CLS], four words, [SEP]
    pooling = minilm_copy / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": "cls"}))
    other = load_encoder(str(minilm_copy), precision="float32").encode(["one two"])
    assert not np.allclose(other, encoder.encode(["one two"]), atol=1e-3)
    pooling.write_text(json.dumps({"pooling_mode": "max"}))
    with pytest.raises(ConfigError, match=r"pools by \['max'\].*Choose another encoder"):
        load_encoder(str(minilm_copy))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", ""])
def test_a_path_that_leads_nowhere_is_explained(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no folder. Expected minilm.*Correct the path"):
        load_encoder(name)


def test_damaged_weights_are_explained(minilm_copy: Path) -> None:
    (minilm_copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"(?s)cannot be loaded.*Expected a transformer"):
        load_encoder(str(minilm_copy))


@both_precisions
def test_a_copied_encoder_gives_the_same_vectors(
    precision: Precision, minilm_copy: Path, tmp_path: Path
) -> None:
    (minilm_copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = load_encoder(str(minilm_copy), precision=precision)
    expected = encoder.encode(TEXTS[:9])
    assert save_encoder(encoder, tmp_path / "router") == ["encoder"]
    shutil.rmtree(minilm_copy)
    saved = json.loads(json.dumps(encoder.description()))
    loaded = load_saved_encoder(tmp_path / "router" / "encoder", description=saved)
    assert loaded.digest == encoder.digest
    assert np.allclose(loaded.encode(TEXTS[:9]), expected, rtol=0, atol=1e-6)


def test_the_packaged_encoder_is_not_copied_but_checked(tmp_path: Path) -> None:
    encoder = load_encoder("minilm")
    assert save_encoder(encoder, tmp_path) == []
    loaded = load_saved_encoder(tmp_path / "encoder", description=encoder.description())
    assert loaded.digest == encoder.digest
    with pytest.raises(ArtifactError, match=r"Expected 0000, with which the router was trained"):
        load_saved_encoder(tmp_path, description=encoder.description() | {"digest": "0000"})


def test_each_distinct_text_is_encoded_once_per_cache(tmp_path: Path) -> None:
    seen: list[str] = []

    def vectors(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([[len(text), 1.0] for text in texts])

    def encoder(digest: str = "d") -> Encoder:
        return Encoder("counting", digest=digest, vectors=vectors, cache=tmp_path)

    first = encoder().encode(["a", "bb", "a"])
    assert seen == ["a", "bb"]
    assert np.array_equal(encoder().encode(["bb", "a", "ccc"])[:2], first[[1, 0]])
    assert seen == ["a", "bb", "ccc"]
    encoder("another").encode(["a"])
    assert seen[-1] == "a"


def test_cached_vectors_are_the_computed_ones(tmp_path: Path) -> None:
    computed = load_encoder("minilm").encode(TEXTS)
    load_encoder("minilm", cache=tmp_path).encode(TEXTS[:30])
    again = load_encoder("minilm", cache=tmp_path).encode(TEXTS)
    assert np.allclose(again, computed, rtol=0, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    batch_tokens=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_text_once_and_no_padding(lengths: list[int], batch_tokens: int) -> None:
    ids = [[row] * length for row, length in enumerate(lengths)]
    seen: list[int] = []
    for rows, batch in equal_length_batches(ids, batch_tokens=batch_tokens):
        assert [list(tokens) for tokens in batch[: len(rows)]] == [ids[row] for row in rows]
        assert batch.size >= transformer.MIN_ROWS
        assert batch.size <= max(batch_tokens, batch.shape[1], 2 * transformer.MIN_ROWS)
        seen.extend(rows.tolist())
    assert sorted(seen) == list(range(len(lengths)))


class Embeddings(BaseHTTPRequestHandler):
    """An embeddings endpoint: (length, 1) per text; it refuses one key and has a broken model."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"]
        self.server.asked.append((asked, key))  # type: ignore[attr-defined]
        answer: dict[str, Any] = {"error": {"message": f"refused {key}"}}
        if key != "Bearer bad-secret":
            rows = [
                {"object": "embedding", "index": at, "embedding": [len(text), 1.0]}
                for at, text in enumerate(asked["input"])
            ]
            if asked["model"] == "broken":
                rows = rows[1:]
            # Endpoints may answer in any order; the index counts.
            answer = {"object": "list", "data": rows[::-1], "model": "m", "usage": {}}
        body = json.dumps(answer).encode()
        self.send_response(401 if "error" in answer else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Embeddings) as running:
        running.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_an_endpoint_embeds_in_batches(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    texts = ["x" * length for length in range(300)]
    encoder = load_encoder(f"openai:{url(server)}#some-model", cache=tmp_path)
    vectors = encoder.encode([*texts, *texts])
    lengths = np.maximum(np.arange(300), 1)  # an empty text is sent as a space
    assert np.allclose(vectors[:300, 0] / vectors[:300, 1], lengths)
    assert np.array_equal(vectors[:300], vectors[300:])
    assert [len(asked["input"]) for asked, _ in server.asked] == [256, 44]
    assert {(asked["model"], key) for asked, key in server.asked} == {
        ("some-model", "Bearer sk-mine")
    }
    assert encoder.dimension == 2
    load_encoder(f"openai:{url(server)}#some-model", cache=tmp_path).encode(texts)
    assert len(server.asked) == 2
    assert load_encoder(f"openai:{url(server)}#other").digest != encoder.digest


def test_an_endpoint_that_refuses_is_explained_without_the_key(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "bad-secret")
    with pytest.raises(EndpointError, match=r"(?s)failed for model 'm'.*OPENAI_API_KEY") as caught:
        load_encoder(f"openai:{url(server)}#m").encode(["a"])
    assert "bad-secret" not in str(caught.value)


def test_an_endpoint_that_answers_too_little_is_explained(server: Any) -> None:
    with pytest.raises(EndpointError, match="answered 1 vectors for 2 texts"):
        load_encoder(f"openai:{url(server)}#broken").encode(["a", "b"])


@pytest.mark.parametrize("name", ["openai:", "openai:localhost#m", "openai:http://x/v1"])
def test_a_name_that_is_no_endpoint_is_explained(name: str) -> None:
    with pytest.raises(ConfigError, match=r"names no endpoint.*Write it so"):
        load_encoder(name)


def test_a_fingerprint_follows_the_files_and_not_the_place(minilm_copy: Path) -> None:
    packaged = encoder_fingerprint("minilm")
    assert encoder_fingerprint(str(minilm_copy)) == packaged
    config = minilm_copy / "config.json"
    config.write_text(config.read_text() + " ")
    other = encoder_fingerprint(str(minilm_copy))
    weights = minilm_copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert len({packaged, other, encoder_fingerprint(str(minilm_copy))}) == 3


def test_a_hub_or_endpoint_name_is_its_own_fingerprint() -> None:
    for name in ("microsoft/deberta-v3-large", "openai:http://localhost:1/v1#m"):
        assert encoder_fingerprint(name) == name
    for bad in ("/no/such/folder", "openai:nowhere"):
        with pytest.raises(ConfigError, match="Expected"):
            encoder_fingerprint(bad)


def test_an_encoder_is_checked_without_its_weights_being_loaded(minilm_copy: Path) -> None:
    for name in ("minilm", str(minilm_copy), "openai:http://localhost:1/v1#m"):
        check_encoder(name)
    (minilm_copy / "model.safetensors").unlink()
    for path in minilm_copy.glob("*.bin"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"cannot be loaded: .*holds no weights"):
        check_encoder(str(minilm_copy))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        check_encoder("no-such/encoder")


def test_layers_after_the_named_one_are_left_out(minilm_copy: Path) -> None:
    model, tokenizer = transformer.load_transformer("minilm")
    text = TEXTS[0]
    with torch.inference_mode():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    expected = states.hidden_states[4][0].mean(dim=0).numpy()
    found = load_encoder("minilm@4", precision="float32").encode([text])[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    assert load_encoder("minilm@4").digest != load_encoder("minilm").digest
    assert encoder_fingerprint("minilm@4") != encoder_fingerprint("minilm")
    copy = load_encoder(f"{minilm_copy}@4", precision="float32").encode([text])[0]
    assert np.array_equal(copy, found)


def test_a_causal_llm_is_an_encoder_without_its_last_normalisation(tmp_path: Path) -> None:
    folder = save_tiny_llm(tmp_path / "llm")
    model, tokenizer = transformer.load_transformer(str(folder))
    with torch.inference_mode():
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    expected = states[0].mean(dim=0).numpy()
    encoder = load_encoder(f"{folder}@1", precision="float32")
    found = encoder.encode([TEXTS[0]])[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-5)
    copied = save_encoder(encoder, tmp_path / "router")
    loaded = load_saved_encoder(tmp_path / "router" / copied[0], description=encoder.description())
    assert np.array_equal(loaded.encode([TEXTS[0]])[0], found)


def test_views_of_one_transformer_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llm(tmp_path / "llm")
    names = [f"{folder}@1", f"{folder}@2:last", f"{folder}@1:last", "minilm"]
    expected = [load_encoder(name).encode(TEXTS) for name in names]
    together = [load_encoder(name, cache=tmp_path / "cache") for name in names]
    passes = []
    views = transformer.LocalModel.views

    def counted(self: Any, texts: list[str], of: Sequence[Any]) -> list[np.ndarray]:
        passes.append((self.layers, len(texts), len(of)))
        return views(self, texts, of)

    monkeypatch.setattr(transformer.LocalModel, "views", counted)
    together[0].encode(TEXTS[:1])
    found = encode_views(together, TEXTS)
    assert passes == [(1, 1, 1), (2, len(TEXTS), 3), (None, len(TEXTS), 1)]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    encode_views(together, TEXTS[::-1])
    assert len(passes) == 3  # from the cache


def test_a_text_without_a_token_has_a_vector_too(tmp_path: Path) -> None:
    """An LLM's tokenizer puts nothing around a text, so of the empty one nothing would be left."""
    folder = save_tiny_llm(tmp_path / "llm")
    found = load_encoder(f"{folder}@1", precision="float32").encode(["", TEXTS[0]])
    assert np.isfinite(found).all()
    assert found[0].any()


@pytest.mark.parametrize("layer", [0, 7])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer {layer}\. Expected one of 1 to 6"):
        load_encoder(f"minilm@{layer}")
