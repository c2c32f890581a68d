"""The small tokenizer and policy that nano begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import TEXTS

from segcompass.io.errors import ConfigError
from segcompass.reasoning.from_scratch import CONTROL, ScratchConfig, build_tokenizer
from segcompass.reasoning.loading import load_policy, new_policy, save_policy
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import concentration_tokens
from segcompass.types import Status

SMALL = ScratchConfig(
    width=48,
    layers=2,
    heads=4,
    ffn=32,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    vision_ffn=16,
    image_side=32,
    vocabulary=420,
)
USE = PolicyConfig(sae_layer=0, pad_to_square=True, max_new_tokens=30)
TOKENIZER = build_tokenizer(TEXTS, 420, slots=6)


@pytest.fixture(scope="module")
def fresh() -> Policy:
    return new_policy(SMALL, USE, list(TEXTS), seed=0)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_no_text_is_unknown(text: str) -> None:
    import unicodedata

    composed = unicodedata.normalize("NFC", text)
    decoded = TOKENIZER.decode(encode(text), clean_up_tokenization_spaces=False)
    assert decoded.strip() == composed.strip()


def test_known_words_digits_and_marks_are_whole() -> None:
    assert len(encode("the red mug")) == 3
    assert len(encode("b3")) == 2
    pieces = TOKENIZER.convert_ids_to_tokens(encode('{"a":12}'))
    assert [piece for piece in pieces if piece != "▁"] == list('{"a":12}')
    assert len(encode("zzz")) > 1


def test_the_vocabulary_keeps_its_size_and_is_the_same_each_time() -> None:
    texts = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
    for size in (420, 700):
        assert len(build_tokenizer(texts, size, slots=6)) <= size
    again = build_tokenizer(TEXTS, 420, slots=6)
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_control_tokens_are_single_and_distinct() -> None:
    tokens = [*CONTROL, "<think>", "</think>", *concentration_tokens(6)]
    ids = [TOKENIZER.encode(token, add_special_tokens=False) for token in tokens]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(tokens)


def test_a_new_policy_runs_and_is_reproducible(fresh: Policy) -> None:
    again = new_policy(SMALL, USE, list(TEXTS), seed=0)
    other = new_policy(SMALL, USE, list(TEXTS), seed=1)
    weights = [
        p.model.model.language_model.layers[0].mlp.up_proj.weight for p in (fresh, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert fresh.model.get_input_embeddings().weight.shape == (len(fresh.tokenizer), SMALL.width)
    visual = fresh.backbone.prepare(np.zeros((50, 40, 3), np.uint8))
    assert visual.grid == (2, 2)  # 32 px, patches of 8, merged by 2
    result = fresh.generate([visual], ["the mug"], force_form=True)
    assert result.answers[0].status == Status.OK


def test_the_smallest_sizes_that_are_allowed_can_be_built_and_run() -> None:
    ones = {"layers": 1, "vision_layers": 1, "ffn": 1, "vision_ffn": 1, "vocabulary": 365}
    heads = {"width": 6, "heads": 3, "vision_width": 12, "vision_heads": 3}
    small = ScratchConfig(**ones, **heads, patch=4, image_side=8)
    policy = new_policy(small, USE, list(TEXTS), seed=0)
    assert len(policy.tokenizer) == 365
    visual = policy.backbone.prepare(np.zeros((50, 40, 3), np.uint8))
    assert policy.generate([visual], ["the mug"], force_form=True).answers[0].status == Status.OK


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 0}, "heads\n.*greater than or equal to 1"),
        ({"patch": 0}, "patch\n.*greater than or equal to 1"),
        ({"width": 50}, r"width must be a multiple of 2·heads = 8, got 50"),
        ({"width": 44}, r"width must be a multiple of 2·heads = 8, got 44"),
        ({"vision_width": 12}, r"vision_width must be a multiple of 4·vision_heads = 8, got 12"),
        ({"image_side": 15}, r"image_side must be at least 2·patch = 16, got 15"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ScratchConfig(**SMALL.model_dump() | changes)


def test_a_vocabulary_without_room_for_bytes_and_letters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"364 entries .* policy\.scratch\.vocabulary to 365"):
        build_tokenizer(TEXTS, 364, slots=6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_it_answers_the_same(
    fresh: Policy, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    save_policy(fresh, tmp_path / "policy", dtype)
    loaded = load_policy(tmp_path / "policy", USE)
    assert loaded.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    embeddings, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert embeddings.weight is head.weight  # tied
    visual = fresh.backbone.prepare(np.full((30, 30, 3), 90, np.uint8))
    assert torch.equal(
        loaded.backbone.prepare(np.full((30, 30, 3), 90, np.uint8)).pixels, visual.pixels
    )
    batch = fresh.encode([visual], ["the mug"], ["There is a mug."])
    states = [p.eval()(batch, [visual])[0].sae_states for p in (fresh, loaded)]
    torch.testing.assert_close(*states, atol=1e-5 if dtype is None else 0.1, rtol=1e-4)
    size = sum(file.stat().st_size for file in (tmp_path / "policy").glob("*.safetensors"))
    count = sum(p.numel() for p in fresh.model.parameters())
    assert size == pytest.approx(count * (4 if dtype is None else 2), rel=0.1)  # nothing twice
