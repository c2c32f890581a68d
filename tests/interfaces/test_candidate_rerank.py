"""Rerank: equal to its source without a choice; else the best-scored candidate is the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_prediction
from tiny import policy_config, tiny_model_folder

from segcompass.grounding.marking import mark
from segcompass.interfaces.candidate_rerank import (
    CandidateRerank,
    CandidateRerankConfig,
    choose,
)
from segcompass.interfaces.candidates import Candidate, CandidateConfig
from segcompass.io.checkpoints import PARTS
from segcompass.model_folder import ModelConfig, load_parts, save_model
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.prompts import PromptConfig
from segcompass.types import Prediction, Score, Status

Judgement = Callable[[np.ndarray, str], float]


class Judge:
    """Scores by a function, and remembers what it was shown."""

    def __init__(self, judgement: Judgement) -> None:
        self.judgement = judgement
        self.shown: list[np.ndarray] = []

    def score(self, pictures: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Score]:
        self.shown += pictures
        pairs = zip(pictures, instructions, strict=True)
        return [Score(self.judgement(*pair), f"about {pair[1]}", Status.OK) for pair in pairs]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


def reranked(model: SegCompass, judgement: Judgement, **candidates: object) -> SegCompass:
    """The model with a reranking interface around its own."""
    config = CandidateRerankConfig(
        head=model.interface.config, candidates=CandidateConfig(accept=0.0, **candidates)
    )
    interface = CandidateRerank(config, model.interface, Judge(judgement))
    return SegCompass(model.policy, model.encoder, interface, threshold=0.0, name=model.name)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40 + 8 * i, 56, 3), dtype=np.uint8) for i in range(count)]


def refuse(*_: object) -> float:
    raise AssertionError("nobody is to be asked")


def test_with_the_direct_mask_alone_it_is_its_source(model: SegCompass) -> None:
    asked = ["the mug", "a red plate"]
    plain = model.predict_batch(pictures(2), asked, threshold=0.4)
    same = reranked(model, refuse, sources=("direct",)).predict_batch(
        pictures(2), asked, threshold=0.4
    )
    for mine, other in zip(same, plain, strict=True):
        for field in dataclasses.fields(Prediction):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            if field.name in ("timings", "interface", "fingerprint"):
                continue
            if field.name == "codes":
                assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
            elif isinstance(a, np.ndarray):
                assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
            else:
                assert a == b, field.name


def test_the_best_scored_candidate_is_the_answer(model: SegCompass) -> None:
    image = pictures(1)[0]

    def least(picture: np.ndarray, _: str) -> float:
        return 1 - float((picture == image).all(-1).mean())  # the fewer pixels it leaves alone

    wrapped = reranked(model, least)
    result = wrapped.predict(image, "the mug")
    found = result.candidates
    assert found is not None and found.chosen is not None and len(found.masks) >= 3
    assert found.chosen == int(np.argmax(found.scores))
    assert result.masks.any(0).tolist() == found.masks[found.chosen].tolist()
    assert set(result.scores.tolist()) == {float(found.scores[found.chosen])}
    assert set(found.thoughts) == {"about the mug"}
    assert {"candidates", "scoring"} <= set(result.timings)
    scorer = wrapped.interface.scorer
    for shown, mask in zip(scorer.shown, found.masks, strict=True):
        assert np.array_equal(shown, mark(image, mask))
    families = {name.split()[0] for names in found.sources for name in names.split(", ")}
    assert {"direct", "slot", "heatmap"} <= families and "attention" not in families


def test_attention_is_a_source_where_it_can_be_seen(tmp_path: Path, tiny_model: Path) -> None:
    model = SegCompass.from_pretrained(tiny_model, device="cpu")
    model.policy.model.set_attn_implementation({"text_config": "eager"})
    wrapped = reranked(model, lambda *_: 0.5, sources=("attention",), each=8, floor=0.0)
    result = wrapped.predict(pictures(1)[0], "the mug")
    assert result.image_attention is not None and result.candidates is not None
    rows, columns = result.image_attention.shape[1:]
    assert rows * columns == len(result.token_boxes) and len(result.image_attention) == 6
    assert result.candidates.sources[0].startswith("attention 1")


def test_an_unfinished_answer_proposes_nothing(model: SegCompass) -> None:
    result = reranked(model, refuse).predict(
        pictures(1)[0], "the mug", force_format=False, max_new_tokens=4
    )
    assert result.status == Status.TRUNCATED and result.candidates is None
    assert not result.accepted.any()


def candidate(*slots: int, low_res: bool = False, **changes: object) -> Candidate:
    mask = np.zeros((256, 256), dtype=bool)
    mask[: 10 + 10 * slots[0]] = True
    logits = np.full((64, 64), 7.0, dtype=np.float32) if low_res else None
    return Candidate(mask, ("direct",), slots, logits)._replace(**changes)


def test_the_winner_takes_the_place_of_its_slots() -> None:
    prediction = make_prediction(threshold=0.3)
    scores = [Score(0.2, "no", Status.OK), Score(0.6, "yes", Status.OK)]
    result = choose(prediction, [candidate(0, 2), candidate(1, low_res=True)], scores)
    assert result.slot_scores.tolist() == pytest.approx([0, 0.6, 0, 0, 0, 0])
    assert result.accepted.tolist() == [False, True, False, False, False, False]
    assert result.masks[0].sum() == 20 * 256 and (result.low_res_logits[1] == 7).all()
    untouched = [0, 2, 3, 4, 5]
    assert np.array_equal(result.slot_masks[untouched], prediction.slot_masks[untouched])
    assert result.status == Status.OK and result.candidates.chosen == 1

    direct = choose(prediction, [candidate(0, 2), candidate(1)], scores[::-1])
    assert direct.slot_scores.tolist() == pytest.approx([0.6, 0, 0.6, 0, 0, 0])
    assert np.array_equal(direct.masks, prediction.slot_masks[[0, 2]])


def test_below_the_threshold_nothing_matches() -> None:
    scores = [Score(0.3, "", Status.OK), Score(0.1, "", Status.OK)]
    result = choose(make_prediction(threshold=0.3), [candidate(0), candidate(1)], scores)
    assert result.status == Status.NO_TARGET and len(result.masks) == 0
    assert result.slot_scores.max() == pytest.approx(0.3)  # another threshold would accept it
    empty = choose(make_prediction(), [], [])
    assert empty.status == Status.NO_TARGET and empty.candidates.chosen is None
    assert empty.candidates.masks.shape == (0, 256, 256)


def test_a_model_folder_with_a_second_policy(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "source")
    source = load_parts(folder)
    template = source.config.policy.prompt.template
    use = policy_config("qwen2_5_vl", max_new_tokens=80).model_copy(
        update={"prompt": PromptConfig(template=template, form="score")}
    )
    head = CandidateRerankConfig(
        interface="concept_slots", head=source.config.head, scorer=use,
        candidates=CandidateConfig(accept=0.0),
    )  # fmt: skip
    config = ModelConfig(
        name="judged", interface="candidate_rerank", head=head, policy=source.config.policy
    )
    second = load_policy(folder / "policy", use)
    with torch.no_grad():
        second.model.get_output_embeddings().weight.mul_(2)
    results = {}
    for name, judge in (("own", None), ("second", second)):
        interface = CandidateRerank(head, source.interface, Judge(refuse), judge)
        save_model(tmp_path / name, config, source.policy, source.sam, interface)
        assert (tmp_path / name / PARTS["scorer"]).exists() == (judge is not None)
        model = SegCompass.from_pretrained(tmp_path / name, device="cpu")
        assert isinstance(model.interface, CandidateRerank)
        assert model.interface.config == head and model.interface.reads_attention
        torch.manual_seed(0)
        results[name] = model.predict(pictures(1)[0], "the mug", threshold=0.0).candidates
        assert results[name] is not None and (results[name].scores > 0).all()
        assert any("attention" in names for names in results[name].sources)
    assert np.array_equal(results["own"].masks, results["second"].masks)
    assert not np.allclose(results["own"].scores, results["second"].scores)
