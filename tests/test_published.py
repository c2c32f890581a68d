"""Checkpoints in their published layout, end to end on photographs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from published import sam2_mask, tiny_sam2, write_preset, write_reasoner
from skimage import data
from tiny import WIDTH, tiny_qwen_policy

from segcompass.geometry import Canvas, Frame
from segcompass.grounding.sam2 import Sam2MaskDecoder
from segcompass.interfaces.base import Material
from segcompass.interfaces.text_readout import TextReadout, TextReadoutConfig
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.model_folder import load_model, load_parts
from segcompass.pipeline import SegCompass
from segcompass.presets import describe
from segcompass.published import find_published, preset_names
from segcompass.reasoning import grammars
from segcompass.reasoning.chat import chat_template
from segcompass.reasoning.prompts import OBJECT_QUESTION, ParsedAnswer, Prompt, qwen_template
from segcompass.types import Prediction, Status

SIDE = 840  # px of the canvas of Seg-Zero and VisionReasoner
PHOTOGRAPHS = {"astronaut": (512, 512), "coffee": (400, 600), "chelsea": (300, 451)}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def model(preset: Path) -> SegCompass:
    return SegCompass.from_pretrained(preset, device="cpu")


@pytest.fixture(scope="module")
def predictions(model: SegCompass) -> Iterator[dict[str, Prediction]]:
    """All photographs at once, the answer's form forced; random weights are kept from saying []."""
    plain = grammars._objects

    def something(prompt: Prompt, room: int) -> grammars.Grammar:
        grammar = plain(prompt, room)
        choices = next(grammar)[:1]
        try:
            while True:
                choices = grammar.send((yield choices))
        except StopIteration:
            return

    pictures = [getattr(data, name)() for name in PHOTOGRAPHS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammars, "_objects", something)
        made = model.predict_batch(pictures, ["the one who could fly"] * len(pictures))
    yield dict(zip(PHOTOGRAPHS, made, strict=True))


@pytest.mark.parametrize(("name", "size"), PHOTOGRAPHS.items())
def test_a_photograph_end_to_end(
    model: SegCompass, predictions: dict[str, Prediction], name: str, size: tuple[int, int]
) -> None:
    prediction, (height, width) = predictions[name], size
    conclusion = prediction.text.split("</think>")[1]
    found = json.loads(conclusion.removeprefix("<answer>").removesuffix("</answer>"))
    assert found
    assert prediction.status == Status.OK
    assert (prediction.interface, prediction.model) == ("text_readout", "seg-zero-7b")
    assert prediction.image_rgb.shape == (height, width, 3)
    assert prediction.slot_masks.shape[1:] == (height, width)
    assert prediction.accepted.sum() == len(found)
    prompts = prediction.prompts
    assert prompts is not None
    across = np.array([width, height], dtype=np.float32) / SIDE
    for k, item in enumerate(found):
        box = np.array(item["bbox_2d"], dtype=np.float32).reshape(2, 2)
        box = np.concatenate([box.min(0), box.max(0)])  # random corners come in any order
        point = np.array([item["point_2d"]], dtype=np.float32)
        assert np.abs(prompts.boxes[k] - box * np.tile(across, 2)).max() < 1
        assert np.abs(prompts.points[k, 0] - point[0] * across).max() < 1
        logits, rating = sam2_mask(
            model.encoder.sam, prediction.image_rgb, prompts.boxes[k], prompts.points[k]
        )
        assert ((logits.numpy() > 0) == prediction.slot_masks[k]).mean() > 0.999
        assert prediction.slot_scores[k] == pytest.approx(rating, abs=1e-3)


READOUT = TextReadout.build(
    TextReadoutConfig(canvas=Canvas(SIDE)), Material(Sam2MaskDecoder(tiny_sam2()), WIDTH, 0)
)


@settings(deadline=None, max_examples=100)
@given(
    hw=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    corners=st.tuples(*[st.integers(0, SIDE)] * 4),
    point=st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)),
)
def test_what_is_written_comes_back_to_the_picture(
    hw: tuple[int, int], corners: tuple[int, int, int, int], point: tuple[int, int]
) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    written = json.dumps([{"bbox_2d": [x0, y0, x1, y1], "point_2d": point}])
    answer = ParsedAnswer(Status.OK, "", None, written)
    (prompts,) = READOUT.read([answer], [Frame.stretch(hw, 1024)])
    x, y = hw[1] / SIDE, hw[0] / SIDE
    assert np.abs(prompts.boxes[0] - [x0 * x, y0 * y, x1 * x, y1 * y]).max() < 1
    assert np.abs(prompts.points[0, 0] - [point[0] * x, point[1] * y]).max() < 1


def test_names_of_sizes_and_of_published_models_lead_to_the_right_command() -> None:
    with pytest.raises(MissingAssetError, match=r"doctor --preset qwen2\.5-vl-7b"):
        load_parts("qwen2.5-vl-7b")
    with pytest.raises(MissingAssetError) as other:
        load_parts("no-such-model")
    assert "doctor" not in str(other.value)
    with pytest.raises(ConfigError, match="predict --model seg-zero-7b"):
        describe("seg-zero-7b")


def test_the_presets_of_the_package() -> None:
    assert preset_names() == ["seg-zero-7b", "visionreasoner-7b"]
    for name, hub_id in (
        ("seg-zero-7b", "Seg-Zero-7B"),
        ("visionreasoner-7b", "VisionReasoner-7B"),
    ):
        found = find_published(name)
        assert found is not None
        assert found.policy == f"Ricky06662/{hub_id}"
        assert found.segmenter == "facebook/sam2-hiera-large"
        assert found.source(found.policy) == found.policy
        use = found.model["policy"]
        sides = (
            use["stretch_to"],
            use["prompt"]["canvas_side"],
            found.model["head"]["canvas"]["side"],
        )
        assert sides == (SIDE, SIDE, SIDE)
        with pytest.raises(MissingAssetError, match=f"Ricky06662/{hub_id} is neither a folder"):
            load_parts(name)  # nothing is fetched here
    assert find_published("nano") is None


def test_a_template_given_goes_before_the_folders(preset: Path, tmp_path: Path) -> None:
    found = find_published(preset)
    assert found is not None
    folder = Path(found.source(found.policy))
    own = found.settings(folder)["policy"]["prompt"]["template"]
    assert own == chat_template(folder, OBJECT_QUESTION)
    assert own.startswith("<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Which objects")
    assert own.endswith("<|im_end|>\n<|im_start|>assistant\n")
    asked = found.model_copy(update={"question": "Where is {instruction}?"})
    told = asked.settings(folder)["policy"]["prompt"]["template"]
    assert told == own.replace(OBJECT_QUESTION, "Where is {instruction}?")
    found.model["policy"]["prompt"]["template"] = "{image} {instruction}"
    assert found.settings(folder)["policy"]["prompt"]["template"] == "{image} {instruction}"
    plain = tiny_qwen_policy(tmp_path / "plain")  # has no chat template
    assert chat_template(plain, OBJECT_QUESTION) == qwen_template(OBJECT_QUESTION)


def test_an_unusable_chat_template_is_an_error(tmp_path: Path) -> None:
    folder = write_reasoner(tmp_path / "policy")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('text only') }}")
    with pytest.raises(CheckpointError, match=r"no usable chat template.*text only"):
        chat_template(folder, OBJECT_QUESTION)
    with pytest.raises(CheckpointError, match="nothing has no usable chat template"):
        chat_template(tmp_path / "nothing", OBJECT_QUESTION)


def test_a_model_is_named_by_what_it_is_made_of(preset: Path, model: SegCompass) -> None:
    again = load_model(preset, device="cpu")
    assert again.fingerprint == model.fingerprint != ""
    changed = {**yaml.safe_load(preset.read_text()), "question": "Where is {instruction}?"}
    other = preset.with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert load_parts(other).fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmenter": None}, "segmenter: Input should be a valid string"),
        ({"prompt": "where?"}, "prompt: Extra inputs are not permitted"),
        ({"model": {"interface": "text_readuot"}}, "did you mean text_readout"),
        ({"model": {"interface": "latent_query"}}, "SAM 2 takes points and boxes only"),
    ],
)
def test_wrong_presets_are_refused(preset: Path, change: dict[str, Any], message: str) -> None:
    path = preset.with_name("wrong.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(preset.read_text()), **change}))
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        load_parts(path)
    assert str(path) in str(caught.value)
