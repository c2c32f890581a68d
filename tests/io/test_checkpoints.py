"""Bindings, hashes and strict loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from segcompass.io.checkpoints import (
    PARTS,
    SEGCOMPASS,
    file_hash,
    fingerprint,
    load_module,
    part_files,
    read_binding,
    read_tensors,
    replace_folder,
    save_module,
    write_binding,
)
from segcompass.io.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts that are files of text, bound together."""
    folder = tmp_path / "model"
    for name in PARTS.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "policy" / "config.json").write_text("{}")
    write_binding(folder, {"name": "x"}, {"torch": "2"})
    return folder


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert file_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_what_is_bound_is_read_back(folder: Path) -> None:
    binding = read_binding(folder)
    assert binding["config"] == {"name": "x"}
    assert binding["versions"] == {"torch": "2"}
    assert set(binding["files"]) == {*(PARTS[p] for p in SEGCOMPASS), "policy/config.json"}
    assert fingerprint(binding) == fingerprint(read_binding(folder))
    binding["config"] = {"name": "y"}
    assert fingerprint(binding) != fingerprint(read_binding(folder))


def test_shards_are_weights(folder: Path) -> None:
    (folder / "policy/model.safetensors").unlink()
    for i in (1, 2):
        (folder / f"policy/model-0000{i}-of-00002.safetensors").write_text(str(i))
    (folder / "policy/model.safetensors.index.json").write_text("{}")
    write_binding(folder, {}, {})
    read_binding(folder)
    (folder / "policy/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing"):
        read_binding(folder)


@pytest.mark.parametrize("name", sorted(PARTS[part] for part in SEGCOMPASS))
def test_a_missing_part_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{folder / name} is missing"):
        part_files(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "has format 'list'"),
        ('{"format": "other/9"}', "has format 'other/9'.*reads 'segcompass.model/1'"),
        ('{"format": "segcompass.model/1"}', "no 'config' section"),
        ('{"format": "segcompass.model/1", "config": {}}', "no 'files' section"),
        ('{"format": "segcompass.model/1", "config": {}, "files": []}', "no 'files' section"),
        ('{"format": "segcompass.model/1", "config": {}, "files": {}}', "does not belong"),
    ],
)
def test_a_damaged_binding(folder: Path, text: str, problem: str) -> None:
    (folder / "segcompass.json").write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        read_binding(folder)


def test_a_binding_that_is_no_text(folder: Path) -> None:
    (folder / "segcompass.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_binding(folder)


def test_a_binding_does_not_reach_outside(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    content = json.loads((folder / "segcompass.json").read_text())
    content["files"]["../secret.json"] = file_hash(folder.parent / "secret.json")
    (folder / "segcompass.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"secret\.json is missing"):
        read_binding(folder)


def test_a_module_is_saved_and_loaded_strictly(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "a.safetensors"
    save_module(first, path)
    load_module(second, path)
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(CheckpointError, match=r"bias is unknown"):
        load_module(nn.Linear(3, 2, bias=False), path)
    with pytest.raises(CheckpointError, match=r"weight has shape \(2, 3\), .* asks for \(2, 4\)"):
        load_module(nn.Linear(4, 2), path)
    with pytest.raises(CheckpointError, match=r"0\.bias is missing"):
        load_module(nn.Sequential(nn.Linear(3, 2)), path)


def test_files_of_tensors_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        read_tensors(tmp_path / "a.safetensors")
    save_module(nn.Linear(30, 20), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for keep in (0, 5, len(content) // 2, len(content) - 1):
        (tmp_path / "b.safetensors").write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged"):
            read_tensors(tmp_path / "b.safetensors")


def test_replacing_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("new", "model", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]
    (tmp_path / "other").mkdir()
    replace_folder(tmp_path / "other", tmp_path / "first")
    assert (tmp_path / "first").is_dir()
