"""Rerank: the source's answer stands unless a candidate is rated above it by more than a margin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_prediction, no_target
from tiny import policy_config, tiny_model_folder

from segcompass.grounding.marking import mark
from segcompass.interfaces.candidate_rerank import (
    CandidateRerank,
    CandidateRerankConfig,
    choose,
)
from segcompass.interfaces.candidates import Candidate, CandidateConfig, iou
from segcompass.interfaces.concept_slots import with_concepts
from segcompass.io.checkpoints import PARTS
from segcompass.io.errors import ConfigError
from segcompass.model_folder import ModelConfig, load_parts, save_model
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import (
    NANO_TEMPLATE,
    OBJECT_QUESTION,
    SCORE_TEMPLATES,
    PromptConfig,
    qwen_template,
)
from segcompass.reasoning.scorer import PolicyScorer
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


def reranked(
    model: SegCompass, judgement: Judgement, margin: float = 0.0, **candidates: object
) -> SegCompass:
    """The model with a reranking interface around its own."""
    config = CandidateRerankConfig(
        head=model.interface.config, candidates=CandidateConfig(**candidates), margin=margin
    )
    interface = CandidateRerank(config, model.interface, Judge(judgement))
    return SegCompass(model.policy, model.encoder, interface, threshold=0.0, name=model.name)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40 + 8 * i, 56, 3), dtype=np.uint8) for i in range(count)]


def refuse(*_: object) -> float:
    raise AssertionError("nobody is to be asked")


def assert_same(mine: Prediction, other: Prediction, but: Sequence[str] = ()) -> None:
    """All fields are equal, but for the time it took and those named."""
    for field in dataclasses.fields(Prediction):
        a, b = getattr(mine, field.name), getattr(other, field.name)
        if field.name in ("timings", "interface", "fingerprint", *but):
            continue
        if field.name == "codes":
            assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        elif isinstance(a, np.ndarray):
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
        else:
            assert a == b, field.name


ASKED = ["the mug", "a red plate"]


def test_it_is_not_explained_by_its_sources_concepts(model: SegCompass) -> None:
    assert with_concepts(model.interface) is model.interface
    interface = reranked(model, refuse).interface
    with pytest.raises(ValueError, match=r"chooses among candidates.*explain that one"):
        with_concepts(interface)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_with_the_direct_mask_alone_it_is_its_source(model: SegCompass, threshold: float) -> None:
    plain = model.predict_batch(pictures(2), ASKED, threshold=threshold)
    same = reranked(model, refuse, sources=("direct",)).predict_batch(
        pictures(2), ASKED, threshold=threshold
    )
    for mine, other in zip(same, plain, strict=True):
        assert_same(mine, other)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_the_source_stands_with_the_widest_margin_and_before_a_judge_that_knows_nothing(
    model: SegCompass, threshold: float
) -> None:
    plain = model.predict_batch(pictures(2), ASKED, threshold=threshold)
    draw = np.random.default_rng(0)
    for judgement, margin in ((lambda *_: float(draw.integers(2)), 1.0), (lambda *_: 0.4, 0.0)):
        same = reranked(model, judgement, margin).predict_batch(
            pictures(2), ASKED, threshold=threshold
        )
        for mine, other in zip(same, plain, strict=True):
            assert_same(mine, other, but=["candidates"])
            assert mine.candidates is not None and len(mine.candidates.masks) > 1
            direct = 0 if "direct" in mine.candidates.sources[0] else None
            assert mine.candidates.chosen == direct
            assert (direct is None) == (threshold == 1.0)


def test_a_source_that_is_never_compared_with_is_refused() -> None:
    with pytest.raises(ValueError, match="direct must be among"):
        CandidateConfig(sources=("slot", "heatmap"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_the_judge_is_asked_for_a_score_in_the_chat_of_the_source(family: str) -> None:
    use = policy_config(family, max_new_tokens=77)
    asked = CandidateRerankConfig().asking(use)
    assert (asked.prompt.form, asked.prompt.template) == ("score", SCORE_TEMPLATES[family])
    source = use.prompt.model_dump(include={"form", "template"})
    as_source = asked.prompt.model_copy(update=source)
    assert asked.model_copy(update={"prompt": as_source}) == use


def test_a_source_that_is_asked_for_objects_has_a_judge_that_is_asked_for_a_score() -> None:
    prompt = PromptConfig(template=qwen_template(OBJECT_QUESTION), form="objects")
    asked = CandidateRerankConfig().asking(PolicyConfig(prompt=prompt, stretch_to=840))
    assert asked.prompt.template == SCORE_TEMPLATES["qwen2_5_vl"]
    assert (asked.prompt.form, asked.stretch_to) == ("score", 840)


def test_nanos_judge_is_asked_without_words() -> None:
    asked = CandidateRerankConfig().asking(PolicyConfig())
    assert asked == PolicyConfig(prompt=PromptConfig(form="score"))
    assert asked.prompt.template == NANO_TEMPLATE


def test_a_source_with_a_chat_of_its_own_does_not_tell_how_to_ask_the_judge() -> None:
    use = PolicyConfig(prompt=PromptConfig(template="{image} Where is {instruction}?"))
    with pytest.raises(ConfigError, match=r"Where is .* head\.scorer"):
        CandidateRerankConfig().asking(use)
    own = PolicyConfig(prompt=PromptConfig(form="score"))
    assert CandidateRerankConfig(scorer=own).asking(use) == own


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
    plain = model.predict(image, "the mug", threshold=0.0)
    assert found.chosen > 0 and found.masks[0].tolist() == plain.masks.any(0).tolist()
    assert set(result.scores.tolist()) == {float(plain.scores.max())}
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
    sources = ("direct", "attention")
    wrapped = reranked(model, lambda *_: 0.5, sources=sources, each=8, floor=0.0)
    result = wrapped.predict(pictures(1)[0], "the mug")
    assert result.image_attention is not None and result.candidates is not None
    rows, columns = result.image_attention.shape[1:]
    assert rows * columns == len(result.token_boxes) and len(result.image_attention) == 6
    assert any("attention 1" in names for names in result.candidates.sources)


def test_an_unfinished_answer_proposes_nothing(model: SegCompass) -> None:
    result = reranked(model, refuse).predict(
        pictures(1)[0], "the mug", force_format=False, max_new_tokens=4
    )
    assert result.status == Status.TRUNCATED and result.candidates is None
    assert not result.accepted.any()


def candidate(source: str, *slots: int, low_res: bool = False) -> Candidate:
    """Stands for slots, and is the higher the first of them is."""
    mask = np.zeros((256, 256), dtype=bool)
    mask[: 10 + 10 * slots[0]] = True
    logits = np.full((64, 64), 7.0, dtype=np.float32) if low_res else None
    return Candidate(mask, (source,), slots, logits)


def rated(*values: float) -> list[Score]:
    return [Score(value, "", Status.OK) for value in values]


def test_the_winner_takes_the_place_of_its_slots() -> None:
    prediction = make_prediction(threshold=0.3)  # accepts 0.94, 0.81 and 0.33
    found = [candidate("direct", 0, 2, 4), candidate("heatmap 1", 1, low_res=True)]
    result = choose(prediction, found, rated(0.2, 0.6), margin=0.25)
    assert result.slot_scores.tolist() == pytest.approx([0, 0.94, 0, 0, 0, 0])
    assert result.accepted.tolist() == [False, True, False, False, False, False]
    assert result.masks[0].sum() == 20 * 256 and (result.low_res_logits[1] == 7).all()
    untouched = [0, 2, 3, 4, 5]
    assert np.array_equal(result.slot_masks[untouched], prediction.slot_masks[untouched])
    assert result.status == Status.OK and result.candidates.chosen == 1
    assert result.candidates.scores.tolist() == pytest.approx([0.2, 0.6])

    for scores, margin in ((rated(0.2, 0.6), 0.45), (rated(0.6, 0.2), 0.0), (rated(0.5, 0.5), 0.0)):
        direct = choose(prediction, found, scores, margin)
        assert_same(direct, prediction, but=["candidates"])
        assert direct.candidates.chosen == 0


def test_where_the_source_finds_nothing_a_candidate_must_pass_threshold_and_margin() -> None:
    nothing = no_target()  # at a threshold of 0.5
    found = [candidate("slot 1", 3), candidate("heatmap 1", 1, low_res=True)]
    result = choose(nothing, found, rated(0.1, 0.8), margin=0.25)
    assert result.status == Status.OK and result.candidates.chosen == 1
    assert result.slot_scores.tolist() == pytest.approx([0, 0.8, 0, 0, 0, 0])
    assert result.masks.sum() == 20 * 256
    for scores, margin in ((rated(0.1, 0.8), 0.35), (rated(0.4, 0.5), 0.0), (rated(1, 1), 0.5)):
        same = choose(nothing, found, scores, margin)
        assert_same(same, nothing, but=["candidates"])
        assert same.candidates.chosen is None


def test_a_perfect_judge_makes_the_choice_of_the_oracle() -> None:
    draw = np.random.default_rng(0)
    target = np.zeros((256, 256), dtype=bool)
    target[40:180] = True
    names = ("direct", "slot 1", "heatmap 1", "heatmap 2")
    for _ in range(20):
        slots = draw.permutation(6)[:4].tolist()
        found = [
            candidate(name, slot, low_res=name != "direct")
            for name, slot in zip(names, slots, strict=True)
        ]
        ious = [iou(one.mask, target) for one in found]
        result = choose(make_prediction(), found, rated(*ious))
        assert iou(found[result.candidates.chosen].mask, target) == max(ious)
        if result.candidates.chosen:
            assert iou(result.masks.any(0), target) == max(ious)


def test_without_candidates_the_source_stands() -> None:
    nothing = no_target()
    empty = choose(nothing, [], [])
    assert_same(empty, nothing, but=["candidates"])
    assert empty.candidates.chosen is None and empty.candidates.masks.shape == (0, 256, 256)


def test_a_model_folder_with_a_second_policy(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "source")
    source = load_parts(folder)
    head = CandidateRerankConfig(
        interface="concept_slots", head=source.config.head, together=5, margin=0.3
    )
    config = ModelConfig(
        name="judged", interface="candidate_rerank", head=head, policy=source.config.policy
    )
    second = load_policy(folder / "policy", head.asking(source.config.policy))
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
        assert isinstance(model.interface.scorer, PolicyScorer)
        assert model.interface.scorer.together == 5
        torch.manual_seed(0)
        results[name] = model.predict(pictures(1)[0], "the mug", threshold=0.0).candidates
        assert results[name] is not None and (results[name].scores > 0).all()
        assert any("attention" in names for names in results[name].sources)
    assert np.array_equal(results["own"].masks, results["second"].masks)
    assert not np.allclose(results["own"].scores, results["second"].scores)
