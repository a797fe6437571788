"""What routers keep on disk: learned state that can be trusted, and vectors that can be lost.

A saved router is a folder of safetensors and JSON, never a pickle. `router.json` names the router
and its format version and holds a digest of every other file; it is written last, so its existence
means that the rest is complete. `VectorCache` is an SQLite file in which each vector carries its
own checksum, so that a damaged one is computed again rather than used.
"""

import hashlib
import json
import sqlite3
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from conf.errors import ArtifactError
from router_models.packaged import file_digest

FORMAT = 1
MANIFEST = "router.json"
ARRAYS = "state.safetensors"


ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class SavedState(Generic[ConfigT]):
    """What `read_state` found: the router's settings, plain JSON values, arrays by name."""

    config: ConfigT
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_state(
    directory: Path,
    *,
    router: str,
    config: Mapping[str, Any],
    values: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    folders: Sequence[str] = (),
) -> None:
    """Save a router in ``directory``.

    config and values: plain JSON; arrays: exact, their dtypes kept; folders: subfolders that the
    router has written itself. Files of an earlier save are replaced one by one, and the manifest
    last. Raises ArtifactError when nothing can be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        save_file(contiguous, directory / f"{ARRAYS}.partial")
        (directory / f"{ARRAYS}.partial").replace(directory / ARRAYS)
        files = [directory / ARRAYS]
        for folder in folders:
            files += [path for path in sorted((directory / folder).rglob("*")) if path.is_file()]
        manifest = {
            "format": FORMAT,
            "router": router,
            "config": dict(config),
            "values": dict(values),
            "files": {path.relative_to(directory).as_posix(): file_digest(path) for path in files},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (directory / f"{MANIFEST}.partial").write_text(text + "\n", encoding="utf-8")
        (directory / f"{MANIFEST}.partial").replace(directory / MANIFEST)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"The router cannot be saved in {directory}: {error}. Expected a writable folder with "
            "enough free space. Free some, or choose another folder."
        ) from error


def read_state(
    directory: Path, *, router: str, config: type[ConfigT], arrays: Sequence[str]
) -> SavedState[ConfigT]:
    """Return what `write_state` saved, every file checked against its digest.

    config: the settings class; arrays: the names that must be there. Raises ArtifactError when the
    folder holds another router, another format, or something that is missing or damaged.
    """
    manifest = _manifest(directory)
    if manifest["router"] != router:
        raise ArtifactError(
            f"{directory} holds a {manifest['router']!r} router. Expected {router!r}. Load it with "
            "router_models.catalog.load_router, which reads the kind from the folder."
        )
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file() or file_digest(directory / name) != digest:
            raise _damaged(directory, f"its file {name} is missing or was changed")
    if ARRAYS not in manifest["files"]:
        raise _damaged(directory, f"{ARRAYS} is not listed in {MANIFEST}")
    try:
        found = load_file(directory / ARRAYS)
        settings = config.model_validate(manifest["config"])
    except (OSError, SafetensorError, ValidationError) as error:
        raise _damaged(directory, f"its contents cannot be used: {error}") from error
    if set(found) != set(arrays):
        raise _damaged(directory, f"{ARRAYS} holds {sorted(found)} instead of {sorted(arrays)}")
    return SavedState(config=settings, values=manifest["values"], arrays=found)


def settings_json(config: BaseModel) -> dict[str, Any]:
    """Return a router's settings as they are saved: without what belongs to this machine."""
    return config.model_dump(mode="json", exclude={"encoder_cache"})


def not_fitted(name: str) -> ArtifactError:
    """Return the error for a router that is asked before it has learned anything."""
    return ArtifactError(
        f"The router {name!r} has learned nothing yet. Expected fit() or load() before win_rate() "
        "and save(). Call one of them first."
    )


def saved_kind(directory: Path) -> str:
    """Return which router (a key of ROUTERS) was saved in ``directory``."""
    return str(_manifest(directory)["router"])


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{MANIFEST} is missing or unreadable: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _damaged(directory, f"{MANIFEST} names no format")
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"The router in {directory} has format {manifest['format']!r}. Expected format "
            f"{FORMAT}. Train it again, or use the release of Turnout that saved it."
        )
    kinds = {"router": str, "config": dict, "values": dict, "files": dict}
    if any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise _damaged(directory, f"{MANIFEST} lacks one of {', '.join(kinds)}")
    return manifest


def _damaged(directory: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"No usable router in {directory}: {what}. Expected the files that save() wrote. "
        "Restore the folder from its source, or train the router again."
    )


class VectorCache:
    """Vectors by text, in one SQLite file per encoder; safe for several processes at once.

    The cache can only make things faster: what it cannot read or write becomes a warning, and the
    vectors are computed.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.path = directory / f"embeddings-{digest}.sqlite"
        self._digest = digest.encode()

    def read(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the vectors that are known, (d,) float32 each, by text."""
        if not self.path.exists():
            return {}
        keys = {self._key(text): text for text in texts}
        try:
            rows = self._select(list(keys))
        except sqlite3.Error as error:
            self._warn_of(error)
            return {}
        found = {keys[key]: data for key, data, check in rows if _checksum(key, data) == check}
        if len(found) < len(rows):
            warnings.warn(
                f"{len(rows) - len(found)} vectors in {self.path} are damaged; they are computed "
                "again.",
                RuntimeWarning,
                stacklevel=3,
            )
        return {text: np.frombuffer(data, dtype="<f4") for text, data in found.items()}

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Keep ``vectors``, (n, d), for ``texts``: all of them or, on an error, none."""
        keys = [self._key(text) for text in texts]
        blobs = [row.tobytes() for row in np.asarray(vectors, dtype="<f4")]
        checks = [_checksum(key, data) for key, data in zip(keys, blobs, strict=True)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connected()) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, data BLOB NOT NULL,"
                    " checksum BLOB NOT NULL) WITHOUT ROWID"
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)",
                    zip(keys, blobs, checks, strict=True),
                )
        except (sqlite3.Error, OSError) as error:
            self._warn_of(error)

    def _select(self, keys: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
        rows: list[tuple[bytes, bytes, bytes]] = []
        with closing(self._connected()) as connection:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, data, checksum FROM vectors WHERE key IN ({marks})"
                rows += connection.execute(query, part).fetchall()
        return rows

    def _connected(self) -> sqlite3.Connection:
        # Short connections: they survive forks, and SQLite's own locks do the rest.
        return sqlite3.connect(self.path, timeout=30)

    def _key(self, text: str) -> bytes:
        return hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), key=self._digest, digest_size=16
        ).digest()

    def _warn_of(self, error: Exception) -> None:
        what = "is left alone"
        # An OperationalError (locked, full disk, no permission) says nothing about the contents.
        if not isinstance(error, sqlite3.OperationalError | OSError):
            what = "is damaged and was set aside"
            self.path.replace(self.path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}"))
        warnings.warn(
            f"The cache of vectors {self.path} {what} ({error}); vectors are computed again.",
            RuntimeWarning,
            stacklevel=4,
        )


def _checksum(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=key, digest_size=8).digest()
