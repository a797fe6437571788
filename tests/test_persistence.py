"""Saved state comes back exactly or not at all; cached vectors come back right or not at all."""

import json
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import ArtifactError
from conf.routers import Random
from router_models.persistence import VectorCache, read_state, saved_kind, write_state

ARRAYS: dict[str, np.ndarray] = {
    "weights": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "counts": np.array([1, 2**62], dtype=np.int64),
    "third": np.array(1 / 3),
}


def save(directory: Path, **changes: Any) -> None:
    saved: dict[str, Any] = {
        "router": "random",
        "config": {"name": "chance"},
        "values": {"exact": 0.1 + 0.2, "text": "é"},
        "arrays": ARRAYS,
    }
    write_state(directory, **(saved | changes))


def read(directory: Path, *, router: str = "random") -> Any:
    return read_state(directory, router=router, config=Random, arrays=list(ARRAYS))


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "router")
    state = read(tmp_path / "deep" / "router")
    assert state.config == Random(name="chance")
    assert state.values == {"exact": 0.1 + 0.2, "text": "é"}
    for name, array in ARRAYS.items():
        assert state.arrays[name].dtype == array.dtype
        assert np.array_equal(state.arrays[name], array)
    assert saved_kind(tmp_path / "deep" / "router") == "random"
    assert sorted(path.name for path in (tmp_path / "deep" / "router").iterdir()) == [
        "router.json",
        "state.safetensors",
    ]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path)
    save(tmp_path, values={"exact": 1.0})
    assert read(tmp_path).values == {"exact": 1.0}


@pytest.mark.parametrize("name", ["router.json", "state.safetensors"])
def test_a_missing_file_is_noticed(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=r"(?s)No usable router.*missing.*train the router"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, r"has format 99. Expected format 1. Train it again"),
        ({"format": None}, r"has format None"),
        ({"values": None}, r"lacks one of"),
        ({"config": {"surprise": 1}}, r"(?s)cannot be used.*surprise"),
        ({"files": {}}, r"is not listed"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path)
    manifest = json.loads((tmp_path / "router.json").read_text(encoding="utf-8"))
    (tmp_path / "router.json").write_text(json.dumps(manifest | change), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\udce9"])
def test_a_manifest_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "router.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match="No usable router"):
        saved_kind(tmp_path)


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    save(tmp_path, arrays={"weights": np.zeros(2)})
    with pytest.raises(ArtifactError, match=r"holds \['weights'\] instead of"):
        read(tmp_path)


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"cannot be saved.*Expected a writable folder"):
        save(tmp_path / "file")


TEXTS = [f"text {row} é" for row in range(1200)]
VECTORS = np.random.default_rng(0).normal(size=(1200, 4)).astype(np.float32)


def test_vectors_come_back_exactly(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path / "deep", "digest")
    assert cache.read(TEXTS) == {}
    assert not cache.path.exists()
    cache.write(TEXTS[:1000], VECTORS[:1000])
    found = cache.read(TEXTS)
    assert list(found) == TEXTS[:1000] or set(found) == set(TEXTS[:1000])
    assert all(np.array_equal(found[text], VECTORS[at]) for at, text in enumerate(TEXTS[:1000]))
    assert VectorCache(tmp_path / "deep", "another encoder").read(TEXTS) == {}
    assert cache.read(["never seen", "\ud800"]) == {}


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_a_changed_vector_is_not_used(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "digest")
    cache.write(TEXTS[:3], VECTORS[:3])
    with sqlite3.connect(cache.path) as connection:
        key = connection.execute("SELECT key FROM vectors").fetchone()[0]
        wrong = np.zeros(4, dtype=np.float32).tobytes()
        connection.execute("UPDATE vectors SET data = ? WHERE key = ?", (wrong, key))
    connection.close()
    with pytest.warns(RuntimeWarning, match="1 vectors in .* are damaged"):
        found = cache.read(TEXTS[:3])
    assert len(found) == 2
    cache.write(TEXTS[:3], VECTORS[:3])
    assert len(cache.read(TEXTS[:3])) == 3


@pytest.mark.parametrize("damage", ["garbage", "cut", "scrambled", "empty", "other table"])
def test_a_damaged_file_is_never_believed(damage: str, tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "digest")
    cache.write(TEXTS, VECTORS)
    original = cache.path.read_bytes()
    if damage == "garbage":
        cache.path.write_bytes(b"no database at all" * 500)
    elif damage == "cut":
        cache.path.write_bytes(original[: len(original) // 2])
    elif damage == "scrambled":
        noise = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8).tobytes()
        cache.path.write_bytes(original[:8192] + noise + original[12288:])
    elif damage == "empty":
        cache.path.write_bytes(b"")
    else:
        cache.path.unlink()
        with sqlite3.connect(cache.path) as connection:
            connection.execute("CREATE TABLE vectors (something)")
        connection.close()
    with pytest.warns(RuntimeWarning, match="damaged|left alone"):
        found = cache.read(TEXTS)
    assert all(np.array_equal(vector, VECTORS[TEXTS.index(text)]) for text, vector in found.items())


def test_a_damaged_file_is_rebuilt(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "digest")
    cache.path.write_bytes(b"no database at all" * 500)
    with pytest.warns(RuntimeWarning, match="is damaged and was set aside"):
        assert cache.read(TEXTS) == {}
    cache.write(TEXTS, VECTORS)
    assert len(cache.read(TEXTS)) == len(TEXTS)


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="is left alone"):
        VectorCache(tmp_path / "file", "digest").write(TEXTS, VECTORS)


def _write_and_read(directory: str, start: int) -> int:
    cache = VectorCache(Path(directory), "digest")
    for at in range(start, start + 200, 20):
        cache.write(TEXTS[at : at + 20], VECTORS[at : at + 20])
        found = cache.read(TEXTS)
        assert all(np.array_equal(found[text], VECTORS[TEXTS.index(text)]) for text in found)
    return len(cache.read(TEXTS[start : start + 200]))


def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        done = pool.starmap(_write_and_read, [(str(tmp_path), start) for start in (0, 100, 300)])
    assert done == [200, 200, 200]
    assert len(VectorCache(tmp_path, "digest").read(TEXTS)) == 500
