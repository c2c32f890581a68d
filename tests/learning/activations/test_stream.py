"""The stream of tokens: which ones, how they mix, how many are held, and that it can be resumed."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import QWEN_CONTROL, policy_config, tiny_llava_policy, tiny_qwen_policy

from segcompass.data.documents import DocumentsConfig, DocumentSet
from segcompass.data.samples import read_dataset
from segcompass.io.errors import DataError
from segcompass.learning.activations.cache import ActivationCache, Tokens, weights_identity
from segcompass.learning.activations.sources import DocumentSource, SampleSource, pixels_of
from segcompass.learning.activations.stream import (
    Group,
    Groups,
    StateReader,
    StreamPlan,
    TokenStream,
    measure,
    plan_stream,
)
from segcompass.learning.corpus import visual_memo
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.prompts import concentration_tokens
from segcompass.types import Sample, TokenKind


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tiny_qwen_policy(tmp_path_factory.mktemp("qwen") / "policy")
    return load_policy(folder, policy_config("qwen2_5_vl", max_new_tokens=40))


@pytest.fixture(scope="module")
def samples(scenes_root: Path) -> list[Sample]:
    return read_dataset(scenes_root, "train")[:5]


def source_of(policy: Policy, samples: list[Sample], **settings: Any) -> SampleSource:
    """In the order of the list."""
    source = SampleSource(policy, samples, seed=0, **settings)
    source.samples = list(samples)
    return source


# --- which tokens


@pytest.mark.parametrize("masked", [True, False])
def test_tokens_are_those_of_prompt_and_thought(
    masked: bool, qwen: Policy, samples: list[Sample]
) -> None:
    """Without control tokens: seven marks of the chat, and the K tokens that the prompt names.

    Image tokens stay, whose id is that of a control token.
    """
    names = [*QWEN_CONTROL, *concentration_tokens(6)]
    marks = {*qwen.tokenizer.convert_tokens_to_ids(names)} - {qwen.backbone.image_token_id}
    visuals = visual_memo(qwen.backbone)
    states, kinds = [], []
    for sample in samples[:3]:  # alone, so that nothing is padded
        picture = visuals(sample.image_path)
        sequences = qwen.encode([picture], [sample.instruction], [sample.thought or ""])
        first = sequences.kinds[0].tolist().index(TokenKind.CONCENTRATION)
        ids = sequences.ids[0, :first].tolist()
        kept = [i for i, token in enumerate(ids) if not masked or token not in marks]
        assert len(ids) - len(kept) == (7 + 6 if masked else 0)
        with torch.no_grad():
            states.append(qwen(sequences, [picture])[0].sae_states[0, kept])
        kinds += sequences.kinds[0, kept].tolist()
    reader = StateReader(qwen, [source_of(qwen, samples)], mask_control=masked)
    found = reader.read(Group(0, (0, 1, 2)))
    torch.testing.assert_close(found.states, torch.cat(states), atol=1e-4, rtol=1e-4)
    assert found.kinds.tolist() == kinds
    assert set(kinds) == {
        TokenKind.TEMPLATE,
        TokenKind.IMAGE,
        TokenKind.INSTRUCTION,
        TokenKind.THOUGHT,
    }


def test_a_sample_without_an_answer_is_read_as_its_prompt(
    qwen: Policy, samples: list[Sample]
) -> None:
    bare = [replace(samples[0], thought=None)]
    (row,) = source_of(qwen, bare).rows([0])
    assert row.encoded == qwen.prompt.encode(samples[0].instruction, len(row.visuals[0].boxes))


def test_answers_can_be_the_policys_own(qwen: Policy, samples: list[Sample]) -> None:
    (row,) = source_of(qwen, samples, answers="generated").rows([0])
    prompt = qwen.prompt.encode(samples[0].instruction, len(row.visuals[0].boxes))
    assert row.encoded.ids[: len(prompt.ids)] == prompt.ids
    with torch.no_grad():
        written = qwen.generate(row.visuals, [samples[0].instruction], force_form=True)
    answer = qwen.tokenizer.decode(row.encoded.ids[len(prompt.ids) :])
    assert answer == written.texts[0]
    assert row.encoded.kinds.count(TokenKind.CONCENTRATION) == qwen.slots
    assert TokenKind.PADDING not in row.encoded.kinds


def test_a_sample_that_cannot_be_asked_is_named(qwen: Policy, samples: list[Sample]) -> None:
    long = replace(samples[0], instruction="mug " * 2000)
    with pytest.raises(DataError, match=rf"sample {long.sample_id} of .* the limit is 600"):
        source_of(qwen, [long]).rows([0])


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    rows = [
        {"texts": ["a red mug", None, None, "and a"], "images": [None, "a.png", "b.png", None]},
        {"texts": ["no picture here"], "images": [None]},
        {"texts": [None, "green <|im_end|>"], "images": ["c.png", None]},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def document_rows(policy: Policy, path: Path, max_tokens: int = 500) -> list[tuple[Any, ...]]:
    source = DocumentSource(policy, DocumentSet(DocumentsConfig(root=path)), max_tokens)
    rows = source.rows(range(len(source)))
    return sorted((row.encoded.ids, row.encoded.kinds, len(row.visuals)) for row in rows)


def test_documents_become_interleaved_sequences(qwen: Policy, documents: Path) -> None:
    config, prompt = qwen.model.config, qwen.prompt
    start, end = [config.vision_start_token_id], [config.vision_end_token_id]
    picture = [config.image_token_id] * 4  # 40 px: 2x2 merged patches of 16 px at this size
    text = prompt.encode_instruction
    first = [*text("a red mug"), *start, *picture, *end, *start, *picture, *end, *text("and a")]
    second = [*start, *picture, *end, *text("green <|im_end|>")]
    found = document_rows(qwen, documents)
    assert sorted(ids for ids, _, _ in found) == sorted([first, second])
    assert prompt.eos_token_id not in second  # typed control text stays plain
    for ids, kinds, visuals in found:
        assert visuals == (2 if ids == first else 1)
        assert [k == TokenKind.IMAGE for k in kinds] == [i == picture[0] for i in ids]
        marks = {*start, *end}
        assert [k == TokenKind.TEMPLATE for k in kinds] == [i in marks for i in ids]


def test_documents_are_cut_at_whole_pictures(qwen: Policy, documents: Path) -> None:
    whole = document_rows(qwen, documents)
    for limit in range(1, 30):
        for ids, kinds, visuals in document_rows(qwen, documents, limit):
            assert len(ids) <= limit
            assert any(ids == full[: len(ids)] for full, _, _ in whole)
            assert kinds.count(TokenKind.IMAGE) == 4 * visuals > 0


def test_several_pictures_a_row_give_the_states_of_their_own(
    qwen: Policy, documents: Path, tmp_path: Path
) -> None:
    """In a padded batch with other rows as alone; each picture's tokens show that picture."""
    source = DocumentSource(qwen, DocumentSet(DocumentsConfig(root=documents)), 500)
    reader = StateReader(qwen, [source])
    together = reader.read(Group(0, (0, 1, 2)))
    alone = [reader.read(Group(0, (i,))) for i in range(3)]
    assert together.kinds.tolist() == [k for part in alone for k in part.kinds.tolist()]
    expected = torch.cat([part.states for part in alone])
    torch.testing.assert_close(together.states, expected, atol=1e-4, rtol=1e-4)
    assert sorted(len(part.kinds) for part in alone)[0] == 0  # the one without a picture


def test_llava_reads_documents_too(documents: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_llava_policy(tmp_path / "llava"), policy_config("llava"))
    found = document_rows(policy, documents)
    assert [visuals for _, _, visuals in found].count(2) == 1
    source = DocumentSource(policy, DocumentSet(DocumentsConfig(root=documents)), 500)
    tokens = StateReader(policy, [source]).read(Group(0, (0, 1, 2)))
    assert tokens.kinds.tolist().count(TokenKind.IMAGE) == 3 * 16


# --- the order of groups


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.75]),
    size=st.integers(1, 7),
    held_out=st.integers(1, 30),
)
def test_groups_visit_everything_in_turn_and_hold_some_out(
    counts: list[int], share: float, size: int, held_out: int
) -> None:
    groups = Groups(counts, share, size, held_out)
    kept = {(g.source, p) for g in groups.held_out for p in g.positions}
    trained = {(g.source, p) for gs in groups.training for g in gs for p in g.positions}
    assert trained | kept == {(s, p) for s, n in enumerate(counts) for p in range(n)}
    assert kept and (not trained & kept or max(counts) == 1)
    turns = 200
    seen = Counter(groups.at(n) for n in range(turns))
    for source, expected in enumerate([share] if len(counts) == 1 else [1 - share, share]):
        visits = [seen[g] for g in groups.training[source]]
        assert max(visits) - min(visits) <= 1  # round after round
        if len(counts) == 2:
            assert sum(visits) == pytest.approx(expected * turns, abs=1)


# --- the stream


def numbered(number: int, size: int = 10) -> Tokens:
    """Group n holds the tokens 10·n … 10·n + 9, written into their states."""
    values = torch.arange(size) + size * number
    return Tokens(values[:, None].float(), torch.full((size,), 2, dtype=torch.uint8))


def ids(tokens: Tokens) -> list[int]:
    return [int(value) for value in tokens.states[:, 0]]


def stream_of(plan: StreamPlan, seed: int = 0, **settings: Any) -> TokenStream:
    return TokenStream(numbered, plan, seed, **settings)


PLAN = StreamPlan(groups=4, steps=5, batch=8, limit=1000, shuffle=True)


def test_a_batch_is_a_function_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = stream_of(PLAN)
    batches = [ids(straight.batch(step)) for step in range(23)]
    for step in (22, 4, 17, 5, 0):  # anew, as a resumed run does, and out of order
        assert ids(stream_of(PLAN).batch(step)) == ids(straight.batch(step)) == batches[step]
    assert ids(stream_of(PLAN, seed=1).batch(0)) != batches[0]


def test_every_token_is_served_once_and_batches_mix_the_sequences() -> None:
    stream = stream_of(PLAN)
    served = [ids(stream.batch(step)) for step in range(5 * 6)]
    counts = Counter(i for batch in served for i in batch)
    assert set(counts.values()) == {1}
    # All of the chunks between the first and the last; those lend half of their tokens each.
    assert {i for i in counts if 40 <= i < 240} == set(range(40, 240))
    assert len(counts) == 6 * 40
    for batch in served:
        assert len({i // 10 for i in batch}) >= 4  # of eight tokens


def test_without_shuffling_tokens_come_in_their_order() -> None:
    stream = stream_of(PLAN._replace(shuffle=False))
    assert [i for step in range(10) for i in ids(stream.batch(step))] == list(range(80))


def test_a_block_that_is_too_small_begins_again() -> None:
    stream = stream_of(PLAN._replace(steps=12))
    counts = Counter(i for step in range(12) for i in ids(stream.batch(step)))
    assert set(counts.values()) == {2, 3} and len(counts) == 40


def test_ranks_read_different_groups_that_are_all_groups() -> None:
    plan = PLAN._replace(shuffle=False)
    streams = [stream_of(plan, rank=rank, size=2) for rank in range(2)]
    served = [{i for step in range(10) for i in ids(s.batch(step))} for s in streams]
    assert not served[0] & served[1]
    assert served[0] | served[1] == set(range(160))


@pytest.mark.parametrize("buffer", [60, 100, 400])
def test_the_buffer_bounds_what_is_held(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    plan = plan_stream(1000, 10.0, buffer=buffer, batch=8, shuffle=True)
    stream = TokenStream(lambda n: numbered(n, size=10 + n % 7), plan, seed=0)
    for step in range(200):
        stream.batch(step)
        assert stream._pool is not None and stream._late is not None
        alive.append(len(stream._pool.kinds) + len(stream._late[1].kinds))
    assert max(alive) <= buffer
    assert max(alive) >= 0.6 * buffer


def test_a_set_smaller_than_the_buffer_is_one_chunk() -> None:
    assert plan_stream(7, 10.0, buffer=10_000, batch=8, shuffle=True).groups == 7
    assert plan_stream(1000, 10.0, buffer=400, batch=8, shuffle=True) == StreamPlan(
        groups=20, steps=25, batch=8, limit=200, shuffle=True
    )


def test_data_without_tokens_is_named() -> None:
    stream = TokenStream(lambda _: numbered(0, size=0), PLAN, seed=0)
    with pytest.raises(DataError, match="gave no token"):
        stream.batch(0)


# --- statistics and outliers


class Fixed:
    """A reader of given states."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def read(self, group: Group) -> Tokens:
        states = self.states[list(group.positions)]
        return Tokens(states, torch.full((len(states),), 2, dtype=torch.uint8))


def test_statistics_leave_outliers_out() -> None:
    torch.manual_seed(0)
    states = torch.randn(100, 3) + torch.tensor([5.0, 0.0, 0.0])
    states[7] *= 1000
    groups = Groups([100], 0.5, 10, 1)
    found = measure(Fixed(states), groups, 10.0, tokens=10_000)  # type: ignore[arg-type]
    usual = torch.cat([states[:7], states[8:99]]).double()  # the last one is held out
    mean = usual.mean(0)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert found.spread == pytest.approx(float((usual - mean).norm(dim=-1).mean()), rel=1e-5)
    assert found.norm == pytest.approx(float(usual.norm(dim=-1).mean()), rel=1e-5)
    assert found.tokens == pytest.approx(98 / 10)
    assert found.is_usual(states, 10.0).tolist() == [i != 7 for i in range(100)]
    assert found.is_usual(states, None).all()


def test_statistics_need_a_token() -> None:
    with pytest.raises(DataError, match="no sequence could be read"):
        nothing = Fixed(torch.empty(0, 3))
        nothing.read = lambda group: numbered(0, size=0)  # type: ignore[method-assign]
        measure(nothing, Groups([3], 0.5, 1, 1), None, 10)  # type: ignore[arg-type]


# --- memory and cache


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    forward = Policy.forward

    def count(self: Policy, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Policy, "forward", count)
    return passes


def test_memory_is_bounded_and_given_back(
    qwen: Policy, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    one, two = Group(0, (0,)), Group(0, (1,))
    size = len(StateReader(qwen, [source_of(qwen, samples)]).read(one).kinds)
    reader = StateReader(qwen, [source_of(qwen, samples)], memory=size)
    passes.clear()
    for group in (one, two, one, two):
        reader.read(group)
    assert len(passes) == 3  # the first is remembered, the second has no room
    reader.forget()
    reader.read(one), reader.read(one)
    assert len(passes) == 5


def test_a_second_run_reads_the_cache_and_gets_the_same(
    qwen: Policy, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    group = Group(0, (0, 1))

    def read() -> Tokens:
        cache = ActivationCache(tmp_path / "cache", budget=1 << 30)
        return StateReader(qwen, [source_of(qwen, samples)], cache).read(group)

    first, second = read(), read()
    assert len(passes) == 1
    assert first.states.dtype == torch.bfloat16  # the first run uses what later ones will read
    assert torch.equal(first.states, second.states) and torch.equal(first.kinds, second.kinds)
    exact = StateReader(qwen, [source_of(qwen, samples)]).read(group)
    torch.testing.assert_close(first.states.float(), exact.states, rtol=2**-8, atol=1e-6)
    (shard,) = (tmp_path / "cache").iterdir()
    assert shard.suffix == ".safetensors"


def test_the_cache_knows_weights_layer_mask_and_content(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_qwen_policy(tmp_path / "policy")
    other = replace(samples[0], instruction=samples[0].instruction + " now")
    answer = replace(samples[0], thought="Nothing.")

    def read(policy: Policy, sample: Sample, **masks: bool) -> None:
        cache = ActivationCache(tmp_path / "cache", budget=1 << 30)
        StateReader(policy, [source_of(policy, [sample])], cache, **masks).read(Group(0, (0,)))

    for layer, sample in ((1, samples[0]), (1, other), (1, answer), (0, samples[0])):
        config = policy_config("qwen2_5_vl", sae_layer=layer)
        read(load_policy(folder, config), sample)
    changed = load_policy(folder, policy_config("qwen2_5_vl"))
    with torch.no_grad():
        next(changed.model.model.language_model.layers[0].parameters())[0] += 1e-3
    read(changed, samples[0])
    read(changed, samples[0], mask_control=False)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_weights_are_told_apart_by_value_and_place() -> None:
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = weights_identity(module)
    assert weights_identity(module) == before
    with torch.no_grad():
        module.weight[0, 0], module.weight[1, 2] = module.weight[1, 2].clone(), module.weight[0, 0]
    swapped = weights_identity(module)
    with torch.no_grad():
        module.bias[1] += 1
    assert len({before, swapped, weights_identity(module)}) == 3


def test_a_damaged_shard_is_computed_again(
    qwen: Policy,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    group = Group(0, (0,))
    reader = StateReader(qwen, [source_of(qwen, samples)], ActivationCache(tmp_path, 1 << 30))
    right = reader.read(group)
    (shard,) = tmp_path.iterdir()
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    for damaged, message in ((whole[:-5], "is damaged"), (bytes(flipped), "was changed")):
        shard.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            again = reader.read(group)
        assert message in caplog.text
        assert torch.equal(again.states, right.states)
        assert reader.cache is not None
        assert reader.cache.read(shard.stem, qwen.width) is not None  # mended


def test_a_full_cache_takes_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = Tokens(torch.zeros(4, 8), torch.zeros(4, dtype=torch.uint8))
    cache = ActivationCache(tmp_path / "small", budget=4 * 8 * 2 + 4)
    cache.write("a", tokens)
    cache.write("b", tokens)
    assert cache.read("a", 8) is not None and cache.read("b", 8) is None
    gone = ActivationCache(tmp_path / "gone", budget=1 << 20)
    gone.folder.rmdir()
    with caplog.at_level(logging.WARNING):
        gone.write("a", tokens)
        gone.write("b", tokens)
    assert len(caplog.records) == 1 and "takes no more states" in caplog.text


def test_writers_share_what_is_left_of_the_cache(tmp_path: Path) -> None:
    tokens = Tokens(torch.zeros(64, 64), torch.zeros(64, dtype=torch.uint8))
    shard = 64 * 64 * 2 + 64 + 512  # with the file's header
    ActivationCache(tmp_path, shard).write("before", tokens)
    ranks = [ActivationCache(tmp_path, 5 * shard, writers=2) for _ in range(2)]
    for number in range(3):
        for rank, cache in enumerate(ranks):
            cache.write(f"{rank}-{number}", tokens)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"before", "0-0", "0-1", "1-0", "1-1"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * shard


def test_states_beyond_half_precision_survive(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, 1 << 20)
    cache.write("a", Tokens(torch.full((1, 2), 3e5), torch.zeros(1, dtype=torch.uint8)))
    found = cache.read("a", 2)
    assert found is not None and found.states.float().tolist() == [[299008.0, 299008.0]]


def test_rows_and_pictures_line_up(qwen: Policy, samples: list[Sample]) -> None:
    reader = StateReader(qwen, [source_of(qwen, samples)])
    sequences, rows = reader.batch(Group(0, (2, 0)))
    assert len(sequences.ids) == len(rows) == len(pixels_of(rows)) == 2
