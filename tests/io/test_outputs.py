"""Outputs: the JSON schema, COCO results, files on disk, and the readings of the concepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import INSTRUCTION, make_prediction, malformed, no_target
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from segcompass.io import masks, outputs
from segcompass.types import Prediction, SparseCodes, TokenKind


def tiny_codes() -> Prediction:
    """Three tokens (image, instruction, thought), three concepts, two slots, worked by hand."""
    full = make_prediction()
    return replace(
        full,
        tokens=("<image>", "red", " mug"),
        token_kinds=np.array([TokenKind.IMAGE, TokenKind.INSTRUCTION, TokenKind.THOUGHT]),
        token_boxes=np.array([[0, 0, 256, 256]], dtype=np.float32),
        codes=SparseCodes(
            torch.tensor([0, 1, 1, 2]),
            torch.tensor([0, 0, 2, 1]),
            torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.bfloat16),
            n_rows=3,
            n_columns=3,
        ),
        slot_attention=np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32),
        slot_scores=full.slot_scores[:2],
        accepted=full.accepted[:2],
        slot_masks=full.slot_masks[:2],
    )


def test_slot_concepts_are_activations_weighted_by_attention() -> None:
    # slot 0: concept 0 = .5·1 + .5·2 = 1.5, concept 2 = .5·.5 = .25; slot 1: concept 1 = 1·4
    assert outputs.slot_concepts(tiny_codes()) == [((0, 1.5), (2, 0.25)), ((1, 4.0),)]
    assert outputs.slot_concepts(tiny_codes(), top=1) == [((0, 1.5),), ((1, 4.0),)]


def test_word_activations_cover_the_text_tokens_only() -> None:
    red, mug = outputs.word_activations(tiny_codes())
    assert (red.text, red.kind, red.total) == ("red", TokenKind.INSTRUCTION, 2.5)
    assert red.concepts == ((0, 2.0), (2, 0.5))
    assert (mug.position, mug.concepts) == (2, ((1, 4.0),))


def test_token_heat_is_the_weighted_mean_of_the_slots_concepts() -> None:
    heat = outputs.token_heat(tiny_codes())
    np.testing.assert_allclose(heat, [[1.5 / 1.75], [0.0]], rtol=1e-6)


def test_readings_agree_with_the_dense_formulation() -> None:
    prediction = make_prediction()
    dense = np.zeros((len(prediction.tokens), prediction.codes.n_columns), dtype=np.float32)
    dense[prediction.codes.rows, prediction.codes.columns] = prediction.codes.values
    weights = prediction.slot_attention @ dense
    for row, concepts in zip(weights, outputs.slot_concepts(prediction, top=5), strict=True):
        assert [c.concept for c in concepts] == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose([c.weight for c in concepts], np.sort(row)[::-1][:5], rtol=1e-5)


def test_codes_of_another_pass_are_refused() -> None:
    prediction = make_prediction()
    with pytest.raises(ValueError, match="same pass"):
        outputs.code_matrix(replace(prediction, tokens=prediction.tokens[1:]))


def test_json_has_the_documented_fields() -> None:
    record = json.loads(outputs.dump_json(outputs.to_json(make_prediction())))
    assert record["schema"] == "segcompass.prediction/1"
    assert (record["status"], record["instruction"]) == ("ok", INSTRUCTION)
    assert record["image"] == {"width": 256, "height": 256}
    slot = record["slots"][0]
    assert (slot["index"], slot["accepted"]) == (0, True)
    assert slot["confidence"] == pytest.approx(0.94)
    assert slot["box"] == [44, 40, 133, 129]  # disc of radius 44 around (88, 84)
    assert slot["concepts"][0].keys() == {"concept", "weight"}
    assert record["slots"][1]["box"] is None
    documented = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
    for name in (*record, *slot):
        assert f"`{name}`" in documented


def test_json_masks_decode_to_the_masks() -> None:
    prediction = make_prediction()
    for slot in outputs.to_json(prediction)["slots"]:
        np.testing.assert_array_equal(
            masks.decode(slot["mask"]), prediction.slot_masks[slot["index"]]
        )
        assert slot["area"] == prediction.slot_masks[slot["index"]].sum()


@pytest.mark.parametrize("make", [no_target, malformed])
def test_json_of_answers_without_masks(make: object) -> None:
    record = outputs.to_json(make())  # type: ignore[operator]
    assert not any(slot["accepted"] for slot in record["slots"])
    assert record["status"] in {"no_target", "malformed"}


@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_becomes_one_line_of_valid_utf8(text: str) -> None:
    prediction = replace(tiny_codes(), instruction=text, source=text, reasoning=text)
    line = outputs.dump_json(outputs.to_json(prediction))
    assert "\n" not in line
    loaded = json.loads(line.encode("utf-8"))
    assert loaded["instruction"] == text.encode("utf-8", "replace").decode()


def test_coco_results_load_in_pycocotools(tmp_path: Path) -> None:
    results = outputs.to_coco([make_prediction(), no_target()], [7, 8])
    assert [entry["image_id"] for entry in results] == [7, 7]
    data = COCO()
    data.dataset = {"info": {}, "images": [{"id": 7, "height": 256, "width": 256}]}
    data.dataset |= {"categories": [{"id": 1}], "annotations": []}
    data.createIndex()
    (tmp_path / "results.json").write_text(json.dumps(results))
    loaded = data.loadRes(str(tmp_path / "results.json"))
    np.testing.assert_array_equal(loaded.annToMask(loaded.anns[1]), make_prediction().slot_masks[0])
    assert loaded.anns[1]["bbox"] == [44, 40, 89, 89]


def test_coco_needs_one_id_per_prediction() -> None:
    with pytest.raises(ValueError, match="1 predictions but 2 image ids"):
        outputs.to_coco([make_prediction()], [1, 2])


def test_saved_files_hold_what_was_predicted(tmp_path: Path) -> None:
    prediction = make_prediction()
    paths = outputs.save(prediction, tmp_path / "new" / "folder")
    assert set(paths) == {"json", "arrays", "union", "overlay", "slot-0", "slot-2"}
    mask = np.asarray(Image.open(paths["slot-2"]))
    np.testing.assert_array_equal(mask, prediction.slot_masks[2] * np.uint8(255))
    union = np.asarray(Image.open(paths["union"])) > 0
    np.testing.assert_array_equal(union, prediction.slot_masks[0] | prediction.slot_masks[2])
    assert np.asarray(Image.open(paths["overlay"])).shape == (256, 256, 3)
    record = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert {paths["json"].parent / name for name in record["files"].values()} == {
        path for what, path in paths.items() if what != "json"
    }
    with np.load(paths["arrays"], allow_pickle=False) as arrays:
        assert arrays["heatmaps"].dtype == np.float16
        np.testing.assert_allclose(arrays["heatmaps"], prediction.slot_heatmaps, atol=1e-3)
        np.testing.assert_array_equal(arrays["head_scores"], prediction.head_scores)
        np.testing.assert_array_equal(arrays["low_res_logits"], prediction.low_res_logits)
        np.testing.assert_array_equal(arrays["code_values"], prediction.codes.values)


def test_saving_again_leaves_no_stale_mask_and_no_part_file(tmp_path: Path) -> None:
    prediction = make_prediction()
    first = outputs.save(prediction, tmp_path)
    accepted = prediction.accepted.copy()
    accepted[2] = False
    outputs.save(replace(prediction, accepted=accepted), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in first.values()} - {
        first["slot-2"].name
    }


def test_a_link_in_the_folder_is_replaced_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "precious.txt"
    outside.write_text("keep me")
    folder.mkdir()
    prediction = make_prediction()
    (folder / f"{outputs.file_stem(prediction)}.json").symlink_to(outside)
    paths = outputs.save(prediction, folder)
    assert outside.read_text() == "keep me"
    assert not paths["json"].is_symlink()


HOSTILE = ["../../etc/passwd", "C:\\a\\..\\b.png", "con.png", "", "...", "a\x00b\n.png", "ü" * 300]


@given(st.sampled_from(HOSTILE) | st.text(alphabet=st.characters(), max_size=60))
def test_names_are_safe_whatever_the_source(source: str) -> None:
    stem = outputs.file_stem(replace(make_prediction(), source=source))
    assert stem.isascii()
    assert stem.replace("-", "").replace("_", "").isalnum()
    assert len(stem) < 80


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = outputs.save(make_prediction(source="../../../evil/../x.png"), folder)
    assert all(path.parent == folder for path in paths.values())
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(paths)


def test_two_questions_about_one_picture_do_not_share_files() -> None:
    other = make_prediction(instruction="the plate")
    assert outputs.file_stem(other) != outputs.file_stem(make_prediction())
    elsewhere = make_prediction(source="other/kitchen.png")
    assert outputs.file_stem(elsewhere) != outputs.file_stem(make_prediction())


def test_every_slot_has_its_own_colour() -> None:
    colours = [outputs.slot_colour(k) for k in range(40)]
    assert len(set(colours)) == 40
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_the_overlay_changes_accepted_masks_only() -> None:
    prediction = make_prediction()
    changed = (outputs.overlay(prediction) != prediction.image_rgb).any(axis=-1)
    union = prediction.slot_masks[prediction.accepted].any(axis=0)
    assert not changed[~union].any()
    assert changed[union].mean() > 0.95
