"""Weights of concepts and tokens add up however they are grouped; tables, JSON and graph agree."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_prediction

from segcompass.explain.graph import graph, to_dot
from segcompass.explain.integrated_gradients import Attribution
from segcompass.explain.provenance import (
    GROUPS,
    READINGS,
    SlotProvenance,
    provenance,
    table,
    to_json,
    token_groups,
    token_label,
)
from segcompass.io.outputs import dump_json
from segcompass.pipeline import SegCompass
from segcompass.types import SparseCodes, TokenKind


def made_up(**changes: object) -> SlotProvenance:
    """Slot 0 of a made-up prediction, with random weights."""
    prediction = make_prediction(**changes)
    rng = np.random.default_rng(3)
    count = len(prediction.codes.values)
    confidence, mask, read = (rng.normal(size=count) for _ in range(3))
    return SlotProvenance(
        prediction, 0, Attribution(confidence, 2.0, 1.0), Attribution(mask, 9.0, -1.0), read
    )


def test_weights_add_up_in_every_grouping() -> None:
    slot = made_up()
    total = slot.pairs.sum(0)
    np.testing.assert_allclose(slot.concept_weights.sum(0), total)
    np.testing.assert_allclose(slot.token_weights.sum(0), total)
    groups = slot.groups()
    assert tuple(groups) == GROUPS
    for i, reading in enumerate(READINGS):
        assert sum(group[reading] for group in groups.values()) == pytest.approx(total[i])


def test_concepts_and_tokens_by_hand() -> None:
    codes = SparseCodes(
        torch.tensor([0, 0, 1]), torch.tensor([4, 7, 4]), torch.ones(3), n_rows=2, n_columns=9
    )
    weights = np.array([1.0, -5.0, 2.0])
    slot = SlotProvenance(
        make_prediction(codes=codes), 0,
        Attribution(weights, 0, 0), Attribution(weights * 10, 0, 0), weights / 10,
    )  # fmt: skip
    assert slot.concepts() == [(7, -5.0, -50.0, -0.5), (4, 3.0, 30.0, pytest.approx(0.3))]
    assert [w[:2] for w in slot.tokens(by="mask")] == [(0, -4.0), (1, 2.0)]
    assert [w.number for w in slot.concepts(top=1)] == [7]
    with pytest.raises(ValueError, match="choose one of confidence, mask, read"):
        slot.concepts(by="luck")


def test_tokens_are_parted() -> None:
    prediction = make_prediction()
    groups = token_groups(prediction, 0)
    kinds = prediction.token_kinds
    assert set(groups[kinds == TokenKind.INSTRUCTION]) == {"question"}
    assert set(groups[kinds == TokenKind.THOUGHT]) == {"thought"}
    assert set(groups[kinds == TokenKind.IMAGE]) == {"instance", "background"}
    # The disc of slot 0 has its centre at (88, 84): patch (2, 2) of 32 px, row-major of 8.
    image = groups[kinds == TokenKind.IMAGE]
    assert image[2 * 8 + 2] == "instance"
    assert image[-1] == "background"


def test_labels_of_patches_and_words() -> None:
    prediction = make_prediction()
    first = int(np.flatnonzero(prediction.token_kinds == TokenKind.IMAGE)[0])
    assert token_label(prediction, first + 9) == "patch (32, 32)–(64, 64)"
    word = int(np.flatnonzero(prediction.token_kinds == TokenKind.INSTRUCTION)[0])
    assert token_label(prediction, word) == f"{prediction.tokens[word].strip()} [{word}]"


def test_json_and_table_tell_the_same() -> None:
    slot = made_up()
    record = to_json([slot], top=4)
    dump_json(record)
    told = record["slots"][0]
    assert told["confidence"]["change"] == 1.0
    assert told["confidence"]["residual"] == pytest.approx(1.0 - slot.confidence.weights.sum())
    rows = table([slot], top=4)
    assert [int(row["concept"]) for row in rows] == [c["concept"] for c in told["concepts"]]
    assert rows[0]["confidence"] == f"{told['concepts'][0]['confidence']:+.3f}"


def test_every_edge_of_the_graph_joins_two_nodes() -> None:
    drawn = graph([made_up()], top=3)
    ids = [node["id"] for node in drawn["nodes"]]
    assert len(ids) == len(set(ids))
    assert {edge["source"] for edge in drawn["edges"]} <= set(ids)
    assert {edge["target"] for edge in drawn["edges"]} <= set(ids)
    assert sum(edge["source"] == "slot-0" for edge in drawn["edges"]) == 3


def test_dot_survives_any_token() -> None:
    prediction = make_prediction()
    nasty = tuple('"]; evil [\\\n\u202e' for _ in prediction.tokens)
    text = to_dot([replace(made_up(), prediction=replace(prediction, tokens=nasty))])
    strings = re.findall(r'"(?:[^"\\\n]|\\["\\])*"', text)
    outside = re.sub(r'"(?:[^"\\\n]|\\["\\])*"', "", text)
    assert "evil" not in outside
    assert any("evil" in string for string in strings)
    assert "\u202e" not in text


def test_a_model_is_traced(tiny_model: Path) -> None:
    model = SegCompass.from_pretrained(tiny_model, device="cpu")
    image = np.random.default_rng(2).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    prediction = model.predict(image, "the red mug", threshold=1.0)
    (slot,) = provenance(model, prediction)  # nothing is accepted: the most confident one
    assert slot.slot == prediction.slot_scores.argmax()
    # Over all concepts of a token, what was read is the slot's attention to that token.
    fires = np.unique(prediction.codes.rows.numpy())
    np.testing.assert_allclose(
        slot.token_weights[fires, READINGS.index("read")],
        prediction.slot_attention[slot.slot, fires],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="choose some of 0 to 5"):
        provenance(model, prediction, [6])
