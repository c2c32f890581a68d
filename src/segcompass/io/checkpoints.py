"""The model folder: every part in its own ecosystem's format, and one file that binds them.

segcompass.json      resolved config, hashes of the parts' files, versions
policy/              plain Hugging Face folder
segmenter/           plain Hugging Face SamModel folder
sae/                 SAELens layout
head.safetensors     codebook, fusion, slot mapper with its confidence head
README.md            model card

Interfaces without concepts have no sae/, those that train nothing of their own no head. A second
policy that judges candidates is in scorer/, as policy/ is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError

BINDING = "segcompass.json"
FORMAT = "segcompass.model/1"
PARTS = {
    "policy": "policy/model.safetensors",
    "segmenter": "segmenter/model.safetensors",
    "sae": "sae/sae_weights.safetensors",
    "head": "head.safetensors",
    "scorer": "scorer/model.safetensors",
}
SEGCOMPASS = ("policy", "segmenter", "sae", "head")  # other interfaces have fewer parts
_BOUND = {".safetensors", ".json", ".txt", ".model", ".jinja"}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def part_files(folder: Path, parts: Collection[str] = SEGCOMPASS) -> list[str]:
    """The files of a model's parts that decide what it does, relative to ``folder``.

    Raises:
        CheckpointError: if a part has no weights; those may be sharded.
    """
    files = []
    for part in parts:
        path = folder / PARTS[part]
        if not path.exists() and not list(path.parent.glob(f"{path.stem}-*{path.suffix}")):
            raise CheckpointError(
                f"{path} is missing; a model folder holds "
                f"{', '.join(PARTS[p] for p in parts)} and {BINDING}"
            )
        files += [path] if path.parent == folder else list(path.parent.iterdir())
    return sorted(f.relative_to(folder).as_posix() for f in files if f.suffix in _BOUND)


def write_binding(
    folder: Path,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    parts: Collection[str] = SEGCOMPASS,
) -> None:
    """Bind the parts that are in ``folder`` together."""
    content = {
        "format": FORMAT,
        "config": config,
        "parts": list(parts),
        "files": {name: file_hash(folder / name) for name in part_files(folder, parts)},
        "versions": dict(versions),
    }
    (folder / BINDING).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_binding(folder: Path) -> dict[str, Any]:
    """Read and check what binds a model folder.

    Raises:
        CheckpointError: if the folder is no model folder, or holds parts of different models.
    """
    path = folder / BINDING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no SegCompass model folder: it has no {BINDING}; "
            "give a folder written by `segcompass train`"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise CheckpointError(f"{path} is damaged ({error}); get a fresh copy") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} has format {found!r}, this version reads {FORMAT!r}")
    for key in ("config", "files"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path} has no {key!r} section; get a fresh copy")
    parts = content.setdefault("parts", list(SEGCOMPASS))  # as all models once were
    if not isinstance(parts, list) or not {*map(str, parts)} <= {*PARTS}:
        raise CheckpointError(f"{path} names parts {parts}, this version knows {', '.join(PARTS)}")
    _check_files(folder, content["files"], parts)
    return content


def folder_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the files of a plain Hugging Face folder that decide what its model does."""
    return {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.suffix in _BOUND}


def fingerprint(binding: Mapping[str, Any]) -> str:
    """A short name for exactly this model: its files and its config."""
    content = json.dumps([binding["config"], binding["files"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_files(folder: Path, expected: Mapping[str, Any], parts: Collection[str]) -> None:
    """Refuse files that are missing, changed, or were not there when the model was saved."""
    found = part_files(folder, parts)
    for name in sorted({*found, *expected}):
        if name not in found:
            problem = "is missing"
        elif name not in expected:
            problem = "does not belong to this model"
        elif file_hash(folder / name) != expected[name]:
            problem = (
                "is not the file that this model was saved with (damaged, truncated, or from "
                "another model)"
            )
        else:
            continue
        raise CheckpointError(f"{folder / name} {problem}; get a complete copy of the folder")


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's parameters as safetensors."""
    save_file({name: t.detach().contiguous() for name, t in module.state_dict().items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Load a module's parameters, strictly.

    Raises:
        CheckpointError: naming the file and the first parameter that is missing or does not fit.
    """
    tensors = read_tensors(path)
    expected = module.state_dict()
    for name in sorted({*tensors, *expected}):
        if name not in tensors or name not in expected:
            kind = "missing" if name not in tensors else "unknown"
            raise CheckpointError(f"{path}: parameter {name} is {kind}; the config does not fit it")
        if tensors[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, "
                f"the config asks for {tuple(expected[name].shape)}"
            )
    module.load_state_dict(tensors, strict=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; get a complete copy of the folder") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get a fresh copy") from error


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one, which is whole until that moment."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink():  # lent by another run, whose it stays
        folder.unlink()
    elif folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
