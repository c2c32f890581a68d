"""The SAELens folder layout, written and read strictly.

A folder holds ``cfg.json`` and ``sae_weights.safetensors`` with exactly W_enc [D, S], b_enc [S],
W_dec [S, D] and b_dec [D]. What SAELens has no field for goes into ``metadata``.
Source: https://github.com/decoderesearch/SAELens, architecture "standard", version 6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
SAE_LENS_VERSION = "6.54.0"  # the layout that is written; without it SAELens assumes an old one
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Fields that change what an SAE computes, with the one value that is supported.
_REQUIRED = {
    "architecture": "standard",
    "normalize_activations": "none",
    "reshape_activations": "none",
}


class SaeFiles(NamedTuple):
    """Content of an SAE folder."""

    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]
    weights: dict[str, Tensor]


def write_sae_files(folder: Path, files: SaeFiles) -> None:
    """Write the folder so that SAELens and this package can read it.

    ``apply_b_dec_to_input`` is always spelled out, because SAELens takes it as true when absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **_REQUIRED,
        "d_in": files.d_in,
        "d_sae": files.d_sae,
        "dtype": str(files.weights["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": files.apply_b_dec_to_input,
        "metadata": {**files.metadata, "sae_lens_version": SAE_LENS_VERSION},
    }
    text = json.dumps(config, indent=2) + "\n"  # before any file is touched: metadata may be bad
    weights = {name: value.detach().cpu().contiguous() for name, value in files.weights.items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_sae_files(folder: Path) -> SaeFiles:
    """Read and check a folder.

    Raises:
        ValueError: a file is missing or damaged, describes another kind of SAE, or the weights do
            not have the names, shapes and common dtype that the config promises.
    """
    path = folder / CONFIG_NAME
    config = _read_config(path)
    for name, supported in _REQUIRED.items():
        # The two conventions may be absent, which means "none"; the architecture may not.
        found = config.get(name, "missing" if name == "architecture" else "none")
        if found != supported:
            raise ValueError(
                f"{path}: {name} is {found!r}, only {supported!r} can be used here; "
                "convert the SAE to the standard architecture first"
            )
    d_in, d_sae = (_positive(path, config, name) for name in ("d_in", "d_sae"))
    centred = config.get("apply_b_dec_to_input", True)  # absent means true, as in SAELens
    if not isinstance(centred, bool):
        raise ValueError(f"{path}: apply_b_dec_to_input is {centred!r}; write true or false")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = _read_weights(folder / WEIGHTS_NAME, shapes)
    return SaeFiles(d_in, d_sae, centred, config["metadata"], weights)


def _read_config(path: Path) -> dict[str, Any]:
    _check_exists(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise ValueError(
            f"{path}: not a JSON file ({error}); write the folder again or fetch it anew"
        ) from error
    metadata = config.get("metadata") if isinstance(config, dict) else None
    if not isinstance(metadata, dict) or "sae_lens_version" not in metadata:
        raise ValueError(
            f"{path}: no metadata.sae_lens_version, so it is of a layout older than SAELens 6; "
            "load it with SAELens 6 and save it again"
        )
    assert isinstance(config, dict)  # it has metadata
    return config


def _positive(path: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}; it must be a positive whole number")
    return value


def _read_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(shapes):
                raise ValueError(
                    f"{path}: holds tensors {sorted(names)}, expected exactly {sorted(shapes)}; "
                    "another architecture, or not an SAE"
                )
            for name, shape in shapes.items():
                part = file.get_slice(name)
                _check_tensor(path, name, tuple(part.get_shape()), part.get_dtype(), shape)
            weights = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it may be cut off, fetch it anew"
        ) from error
    dtypes = {str(value.dtype) for value in weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{path}: mixes {sorted(dtypes)}; store all four tensors in one dtype")
    return weights


def _check_tensor(
    path: Path, name: str, found: tuple[int, ...], dtype: str, expected: tuple[int, ...]
) -> None:
    if found != expected:
        raise ValueError(
            f"{path}: {name} has shape {list(found)}, but {CONFIG_NAME} asks for "
            f"{list(expected)}; the two files do not belong together"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} is stored as {dtype}; store it as {', '.join(_DTYPES)}")


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; an SAE folder holds {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
