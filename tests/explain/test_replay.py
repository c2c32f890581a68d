"""A replay finds what the live run found, without the policy, and from files as from memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from segcompass.explain.replay import head_inputs, replay
from segcompass.io.outputs import save
from segcompass.io.saved import load_prediction
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Status

BY_THE_HEAD = (
    "slot_scores", "slot_heatmaps", "heatmap_logits", "head_scores", "low_res_logits",
    "slot_queries", "concept_vectors", "slot_attention",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def live(model: SegCompass) -> Prediction:
    image = np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    return model.predict(image, "the red mug", threshold=0.0)


@pytest.fixture
def mute(model: SegCompass, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no pass of the policy go unnoticed."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the policy was run")

    for part in (model.policy, model.policy.model, model.policy.model.model):
        monkeypatch.setattr(part, "forward", refuse)
    monkeypatch.setattr(model.policy, "generate", refuse)


def assert_same_outcome(first: Prediction, second: Prediction) -> None:
    for name in BY_THE_HEAD:
        a, b = getattr(first, name), getattr(second, name)
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=name)
    assert (first.slot_masks == second.slot_masks).mean() > 0.999
    assert first.status == second.status
    assert first.accepted.tolist() == second.accepted.tolist()


@pytest.mark.usefixtures("mute")
def test_a_replay_finds_what_was_found(model: SegCompass, live: Prediction) -> None:
    (again,) = replay(model, live, [live.codes])
    assert_same_outcome(again, live)
    assert (again.text, again.tokens, again.instruction) == (
        live.text, live.tokens, live.instruction,
    )  # fmt: skip


@pytest.mark.parametrize("paths", ["tokens", "concepts"])
def test_a_replay_keeps_the_paths(model: SegCompass, live: Prediction, paths: str) -> None:
    one_path = model.predict(live.image_rgb, live.instruction, threshold=0.0, paths=paths)
    assert not np.allclose(one_path.slot_queries, live.slot_queries)
    (again,) = replay(model, one_path, [one_path.codes])
    assert_same_outcome(again, one_path)


@pytest.mark.usefixtures("mute")
def test_saved_and_live_predictions_replay_alike(
    model: SegCompass, live: Prediction, tmp_path: Path
) -> None:
    back = load_prediction(save(live, tmp_path)["json"])
    (from_file,) = replay(model, back, [back.codes])
    (from_memory,) = replay(model, live, [live.codes])
    for name in BY_THE_HEAD:
        assert np.array_equal(getattr(from_file, name), getattr(from_memory, name)), name


def test_many_variants_are_replayed_as_each_alone(model: SegCompass, live: Prediction) -> None:
    codes = live.codes
    variants = [codes._replace(values=codes.values * factor) for factor in range(11)]
    together = list(replay(model, live, variants))
    assert len(together) == len(variants)
    for variant, found in zip(variants, together, strict=True):
        (alone,) = replay(model, live, [variant])
        assert_same_outcome(found, alone)
    assert not np.allclose(together[0].concept_vectors, together[1].concept_vectors)


def test_an_answer_that_accepts_nothing_becomes_no_target(
    model: SegCompass, live: Prediction
) -> None:
    strict = dataclasses.replace(live, threshold=1.0)
    (found,) = replay(model, strict, [strict.codes])
    assert found.status == Status.NO_TARGET
    (again,) = replay(model, dataclasses.replace(found, threshold=0.0), [found.codes])
    assert again.status == Status.OK


def test_predictions_that_cannot_be_replayed(model: SegCompass, live: Prediction) -> None:
    malformed = dataclasses.replace(live, status=Status.MALFORMED)
    with pytest.raises(ValueError, match="malformed"):
        head_inputs(model, malformed)
    foreign = dataclasses.replace(live, codes=live.codes._replace(n_columns=7))
    with pytest.raises(ValueError, match="7 concepts"):
        head_inputs(model, foreign)
    twin = dataclasses.replace(live, fingerprint="of another model of equal sizes")
    with pytest.raises(ValueError, match="of another model of equal sizes"):
        head_inputs(model, twin)
    head_inputs(model, dataclasses.replace(live, fingerprint=""))  # saved before there was one


def test_nothing_stays_behind(model: SegCompass, live: Prediction) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(replay(model, live, [live.codes]))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
