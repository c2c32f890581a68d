"""Model folders: saved, loaded, and refused when their parts do not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model_folder, tiny_sae, tiny_sam
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, SamModel

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.grounding.segmenters import load_segmenter
from segcompass.io import checkpoints
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import CheckpointError
from segcompass.model_folder import (
    ModelConfig,
    build_interface,
    find_model,
    load_model,
    save_model,
)
from segcompass.pipeline import SegCompass

IMAGE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same sizes and other weights."""
    return tiny_model_folder(tmp_path_factory.mktemp("foreign") / "model", seed=7)


def rebind(folder: Path, **changes: object) -> None:
    """Bind a changed folder anew, as someone would who forges a model."""
    content = json.loads((folder / "segcompass.json").read_text())
    checkpoints.write_binding(folder, {**content["config"], **changes}, {})


def test_saved_and_loaded_it_predicts_the_same(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, device="cpu")
    folder = tmp_path / "again"
    binding = json.loads((tiny_model / "segcompass.json").read_text())
    config = ModelConfig.model_validate(binding["config"])
    sam = load_segmenter(tiny_model / "segmenter")
    save_model(folder, config, model.policy, sam, model.interface)
    again = load_model(folder, device="cpu")
    first, second = (m.predict(IMAGE, "the mug", threshold=0.0) for m in (model, again))
    assert first.text == second.text
    assert np.array_equal(first.slot_masks, second.slot_masks)
    assert np.array_equal(first.low_res_logits, second.low_res_logits)
    assert again.name == model.name
    assert not again.training


def test_each_part_opens_in_its_own_ecosystem(tiny_model: Path) -> None:
    policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "policy")
    assert (
        tokenizer.convert_tokens_to_ids("<|slot_6|>")
        < policy.get_input_embeddings().weight.shape[0]
    )
    SamModel.from_pretrained(tiny_model / "segmenter")
    assert SparseAutoencoder.load(tiny_model / "sae").config.d_in == 32
    assert (tiny_model / "README.md").read_text().count("# tiny") == 1
    assert oct(tiny_model.stat().st_mode)[-3:] == "755"
    suffixes = {p.suffix for p in tiny_model.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".jinja", ".txt"}  # nothing that runs


def test_fingerprints_tell_models_apart(tiny_model: Path, foreign: Path, copy: Path) -> None:
    same = load_model(copy, device="cpu").fingerprint
    assert same == load_model(tiny_model, device="cpu").fingerprint
    assert same != load_model(foreign, device="cpu").fingerprint
    rebind(copy, threshold=0.7)
    changed = load_model(copy, device="cpu")
    assert changed.threshold == 0.7
    assert changed.fingerprint != same


def test_saving_replaces_an_older_model_whole(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    (folder / "stale.txt").write_text("old")
    tiny_model_folder(folder, seed=1)
    assert not (folder / "stale.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model-policy"}
    load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "policy/model.safetensors",
        "policy/config.json",
        "policy/tokenizer.json",
        "segmenter/model.safetensors",
        "sae/sae_weights.safetensors",
        "sae/cfg.json",
        "head.safetensors",
    ],
)
class TestEveryFile:
    """Missing, truncated or foreign files are refused by name."""

    def refused(self, folder: Path, name: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            SegCompass.from_pretrained(folder)
        assert str(folder / name) in str(caught.value)
        assert "complete copy" in str(caught.value) or "a model folder holds" in str(caught.value)

    def test_missing(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        self.refused(copy, name)

    def test_truncated(self, copy: Path, name: str) -> None:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        self.refused(copy, name)

    def test_foreign(self, copy: Path, name: str, foreign: Path) -> None:
        if (foreign / name).read_bytes() == (copy / name).read_bytes():
            (copy / name).write_bytes((foreign / name).read_bytes() + b" ")
        else:
            shutil.copyfile(foreign / name, copy / name)
        self.refused(copy, name)


def test_a_file_that_was_not_there_is_refused(copy: Path) -> None:
    """Transformers would read it."""
    (copy / "policy" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not belong"):
        load_model(copy)


def test_notes_beside_the_parts_are_nobodys_business(copy: Path) -> None:
    before = load_model(copy).fingerprint
    (copy / "README.md").write_text("my notes")
    (copy / ".gitattributes").write_text("*")
    assert load_model(copy).fingerprint == before


class TestForgedFolders:
    """Bound by a good hash, but the parts do not fit."""

    def test_head_of_other_sizes(self, copy: Path) -> None:
        content = json.loads((copy / "segcompass.json").read_text())
        rebind(copy, head={**content["config"]["head"], "codebook_width": 32})
        with pytest.raises(CheckpointError, match=r"head\.safetensors: .* has shape"):
            load_model(copy)

    def test_sae_of_another_policy(self, copy: Path) -> None:
        tiny_sae(width=16).save(copy / "sae")
        rebind(copy)
        with pytest.raises(CheckpointError, match=f"{copy}.*width 16, the policy has 32"):
            load_model(copy)

    def test_damaged_sae(self, copy: Path) -> None:
        (copy / "sae" / "sae_weights.safetensors").write_bytes(b"no tensors")
        rebind(copy)
        with pytest.raises(CheckpointError, match="sae_weights"):
            load_model(copy)

    def test_segmenter_is_another_model(self, copy: Path) -> None:
        shutil.rmtree(copy / "segmenter")
        shutil.copytree(copy / "policy", copy / "segmenter")
        rebind(copy)
        with pytest.raises(CheckpointError, match="segmenter"):
            load_model(copy)

    def test_layer_that_does_not_exist(self, copy: Path) -> None:
        content = json.loads((copy / "segcompass.json").read_text())
        rebind(copy, policy={**content["config"]["policy"], "sae_layer": 40})
        with pytest.raises(CheckpointError, match=r"policy.*layers 0 to 2"):
            load_model(copy)

    def test_unknown_settings(self, copy: Path) -> None:
        rebind(copy, colour="red")
        with pytest.raises(CheckpointError, match=r"segcompass\.json.*(?s:.*)colour"):
            load_model(copy)


def test_names_of_models(tiny_model: Path, tmp_path: Path) -> None:
    assert find_model(tiny_model) == tiny_model
    assert find_model(str(tiny_model)) == tiny_model
    for wrong in (tmp_path / "nowhere", "./nowhere/at-all", "nowhere", "a/b/c"):
        with pytest.raises(MissingAssetError, match="not a folder"):
            find_model(wrong)
    with pytest.raises(MissingAssetError, match="reachable on the hub"):
        find_model("somebody/some-model")  # tests are offline


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no segcompass\.json"):
        load_model(tmp_path)


def test_unknown_precision(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="float8"):
        load_model(tiny_model, dtype="float8")


def test_an_interface_needs_matching_parts(tiny_model: Path) -> None:
    model = load_model(tiny_model, device="cpu")
    with pytest.raises(ValueError, match="SAE reads states of width 16"):
        build_interface(ModelConfig(), model.policy, tiny_sam(), tiny_sae(width=16))


def test_parts_are_those_of_the_interface(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    binding = json.loads((folder / "segcompass.json").read_text())
    binding["parts"].remove("head")
    del binding["files"]["head.safetensors"]
    (folder / "segcompass.json").write_text(json.dumps(binding))
    with pytest.raises(CheckpointError, match="concept_slots has policy, segmenter, sae, head"):
        load_model(folder)
