"""Outputs: the JSON schema, COCO results and files on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import DISCS, INSTRUCTION, INTERFACES, make_prediction, malformed, no_target
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from segcompass.io import masks, outputs
from segcompass.types import Prediction


def documented(record: dict[str, Any]) -> bool:
    """Whether docs/outputs.md names every field."""
    text = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
    return all(f"`{name}`" in text for name in record)


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
    assert documented(record) and documented(slot)


def test_json_masks_decode_to_the_masks() -> None:
    prediction = make_prediction()
    for slot in outputs.to_json(prediction)["slots"]:
        np.testing.assert_array_equal(
            masks.decode(slot["mask"]), prediction.slot_masks[slot["index"]]
        )
        assert slot["area"] == prediction.slot_masks[slot["index"]].sum()


@pytest.mark.parametrize("interface", INTERFACES)
def test_json_says_what_the_interface_shows_and_no_more(interface: str) -> None:
    record = json.loads(
        outputs.dump_json(outputs.to_json(make_prediction(interface=interface, fingerprint="f00")))
    )
    assert (record["interface"], record["fingerprint"]) == (interface, "f00")
    concepts = interface in ("concept_slots", "candidate_rerank")
    assert ("active_concepts" in record) == concepts
    assert ("candidates" in record) == (interface == "candidate_rerank")
    for slot in record["slots"]:
        assert ("concepts" in slot) == concepts
        assert ("prompt" in slot) == (interface == "text_readout")
        assert documented(slot)
    assert documented(record)


def test_json_has_boxes_and_points_as_the_answer_names_them() -> None:
    slots = outputs.to_json(make_prediction(interface="text_readout"))["slots"]
    (x, y), radius, _ = DISCS[0]
    corners = [x - radius - 2.5, y - radius, x + radius, y + radius + 3.2]
    assert slots[0]["prompt"]["box"] == pytest.approx(corners)
    np.testing.assert_allclose(slots[0]["prompt"]["points"], [(91.3, 80.0), (70.0, 88.5)])
    assert slots[2]["prompt"]["box"] and slots[2]["prompt"]["points"] == []
    assert slots[1]["prompt"] is None


def test_json_has_all_candidates_and_marks_the_chosen_one() -> None:
    prediction = make_prediction(interface="candidate_rerank")
    candidates = outputs.to_json(prediction)["candidates"]
    assert [one["chosen"] for one in candidates] == [False, True, False, False]
    assert candidates[1]["source"] == "direct" and candidates[1]["score"] == pytest.approx(0.9)
    assert candidates[1]["thought"] == "The mask shows both mugs and nothing else."
    np.testing.assert_array_equal(
        masks.decode(candidates[1]["mask"]), prediction.slot_masks[[0, 2]].any(axis=0)
    )
    assert all(documented(one) for one in candidates)


@pytest.mark.parametrize("make", [no_target, malformed])
def test_json_of_answers_without_masks(make: object) -> None:
    record = outputs.to_json(make())  # type: ignore[operator]
    assert not any(slot["accepted"] for slot in record["slots"])
    assert record["status"] in {"no_target", "malformed"}


@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_becomes_one_line_of_valid_utf8(text: str) -> None:
    prediction = make_prediction(
        interface="latent_query", instruction=text, source=text, reasoning=text
    )
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


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("make", [make_prediction, malformed])
def test_every_interface_is_saved_with_what_it_has(
    tmp_path: Path, interface: str, make: Callable[..., Prediction]
) -> None:
    prediction = make(interface=interface)
    paths = outputs.save(prediction, tmp_path)
    with np.load(paths["arrays"], allow_pickle=False) as arrays:
        names = set(arrays.files)
        assert documented(dict(arrays))
    assert {"low_res_logits", "scores", "accepted", "image", "tokens"} <= names
    assert ("heatmaps" in names) == (prediction.slot_heatmaps is not None)
    assert ("code_rows" in names) == (prediction.codes is not None)
    assert ("concentration_states" in names) == (interface != "text_readout")
    assert ("image_attention" in names) == (interface == "candidate_rerank")


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


def test_the_overlay_shows_boxes_and_points_of_what_counts() -> None:
    prediction = make_prediction(interface="text_readout", accepted=np.arange(6) == 0)
    drawn = outputs.overlay(prediction)
    changed = (drawn != prediction.image_rgb).any(axis=-1)
    (x, y), radius, _ = DISCS[0]
    assert changed[y, x - radius - 2] and changed[y + radius + 3, x]  # sides of the box
    assert not changed[172 - 28, 180]  # the other disc does not count
    assert tuple(drawn[80, 91]) == outputs.slot_colour(0)  # the point
    union = prediction.slot_masks[0]
    assert not (changed & ~union)[y + radius + 8 :].any()
