"""The SAELens folder: a hand-made one is read, ours is exactly that, broken ones are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig

# As sae-lens 6 writes a standard SAE.
CONFIG: dict[str, Any] = {
    "d_in": 2,
    "d_sae": 3,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.0",
        "sae_lens_training_version": "6.54.0",
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_post",
    },
    "architecture": "standard",
}
WEIGHTS = {
    "W_enc": torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]),
    "b_enc": torch.tensor([0.0, -1.0, 0.5]),
    "W_dec": torch.tensor([[1.0, 0.0], [0.0, 0.5], [2.0, 2.0]]),
    "b_dec": torch.tensor([1.0, 1.0]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cfg.json").write_text(json.dumps(CONFIG))
    save_file(WEIGHTS, tmp_path / "sae_weights.safetensors")
    return tmp_path


def test_a_hand_made_folder_computes_what_saelens_computes(folder: Path) -> None:
    sae = SparseAutoencoder.load(folder)
    output = sae(torch.tensor([[3.0, 2.0]]))
    # centred (2, 1); before the ReLU (2, 2 - 1, -2 + 1 + 0.5)
    assert output.activations.tolist() == [[2.0, 1.0, 0.0]]
    assert output.reconstruction.tolist() == [[3.0, 1.5]]
    assert sae.config == SparseAutoencoderConfig(d_in=2, d_sae=3, apply_b_dec_to_input=True)
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.W_enc.t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_the_saelens_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    config = SparseAutoencoderConfig(d_in=2, d_sae=3, threshold=0.25)
    sae = SparseAutoencoder(config).to(dtype)
    sae.save(tmp_path / "sae", {"model_name": "nano", "hook_name": "layers[1]"})
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text()) == {
        "architecture": "standard",
        "d_in": 2,
        "d_sae": 3,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": "nano",
            "hook_name": "layers[1]",
            "threshold": 0.25,
            "sae_lens_version": "6.54.0",
        },
    }
    stored = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "W_enc": (2, 3),
        "b_enc": (3,),
        "W_dec": (3, 2),
        "b_dec": (2,),
    }
    again = SparseAutoencoder.load(tmp_path / "sae")
    assert again.config == config
    assert again.W_enc.t().is_contiguous()
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_metadata_survives_loading_and_saving(folder: Path, tmp_path: Path) -> None:
    SparseAutoencoder.load(folder).save(tmp_path / "again")
    metadata = json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]
    assert metadata == {**CONFIG["metadata"], "threshold": 0.0}


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change fields of cfg.json; None removes one."""

    def apply(folder: Path) -> None:
        config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        (folder / "cfg.json").write_text(json.dumps(config))

    return apply


def store(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Change or add tensors of the weights file."""
    return lambda folder: save_file({**WEIGHTS, **tensors}, folder / "sae_weights.safetensors")


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Cut a file off after some bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "cfg.json").unlink(), r"cfg\.json: no such file"),
    "no weights": (
        lambda f: (f / "sae_weights.safetensors").unlink(),
        r"sae_weights\.safetensors: no such file",
    ),
    "cut config": (cut("cfg.json", 40), r"cfg\.json: not a JSON file"),
    "binary config": (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe\x00"), "not a JSON file"),
    "deep config": (
        lambda f: (f / "cfg.json").write_text('{"a":' * 100_000),
        "not a JSON file",
    ),
    "a list": (lambda f: (f / "cfg.json").write_text("[1, 2]"), "older than SAELens 6"),
    "old layout": (edit(metadata={"model_name": "x"}), "older than SAELens 6"),
    "cut weights": (cut("sae_weights.safetensors", 300), "not a whole safetensors file"),
    "empty weights": (cut("sae_weights.safetensors", 0), "not a whole safetensors file"),
    "pickled weights": (
        lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x80\x04\x95" * 100),
        "not a whole safetensors file",
    ),
    "topk": (edit(architecture="topk"), "architecture is 'topk', only 'standard'"),
    "no architecture": (edit(architecture=None), "architecture is 'missing'"),
    "layer norm": (edit(normalize_activations="layer_norm"), "normalize_activations is 'layer_"),
    "hook_z": (edit(reshape_activations="hook_z"), "reshape_activations is 'hook_z'"),
    "text size": (edit(d_in="2"), "d_in is '2'; it must be a positive whole number"),
    "other size": (edit(d_sae=4), r"W_enc has shape \[2, 3\], but cfg\.json asks for \[2, 4\]"),
    "text flag": (edit(apply_b_dec_to_input="yes"), "apply_b_dec_to_input is 'yes'"),
    "negative threshold": (
        edit(metadata={"sae_lens_version": "6.54.0", "threshold": -1}),
        "metadata cannot be used",
    ),
    "extra tensor": (store(scaling_factor=torch.ones(1)), "scaling_factor"),
    "transposed": (
        store(W_dec=torch.zeros(2, 3)),
        r"W_dec has shape \[2, 3\], but cfg\.json asks for \[3, 2\]",
    ),
    "whole numbers": (store(b_dec=torch.zeros(2, dtype=torch.int32)), "b_dec is stored as I32"),
    "mixed dtypes": (store(b_dec=torch.zeros(2).half()), "one dtype"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_by_name(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        SparseAutoencoder.load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_field_means_what_it_means_in_saelens(folder: Path) -> None:
    edit(apply_b_dec_to_input=None, normalize_activations=None)(folder)
    assert SparseAutoencoder.load(folder).config.apply_b_dec_to_input is True


def test_metadata_that_is_not_json_leaves_the_old_files_alone(folder: Path) -> None:
    before = (folder / "sae_weights.safetensors").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        SparseAutoencoder(SparseAutoencoderConfig(d_in=2, d_sae=3)).save(folder, {"a": object()})
    assert (folder / "sae_weights.safetensors").read_bytes() == before
