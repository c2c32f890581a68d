"""GRPO against a float64 reference in plain loops, and log-probabilities against full softmaxes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from segcompass.learning import grpo
from segcompass.learning.grpo import GrpoConfig, advantages, answer_log_probs, grpo_loss
from segcompass.reasoning.policy import Policy

RATIOS = ("token", "sequence")


def reference_loss(
    new: list[list[float]],
    old: list[list[float]],
    before: list[list[float]] | None,
    mask: list[list[bool]],
    gains: list[float],
    config: GrpoConfig,
) -> list[tuple[float, float, float]]:
    """Loss, KL and share of clipped ratios of each answer, number by number."""
    result = []
    for row, gain in enumerate(gains):
        at = [t for t, counts in enumerate(mask[row]) if counts]
        if config.ratio == "token":
            ratios = [math.exp(new[row][t] - old[row][t]) for t in at]
        else:
            ratios = [math.exp(sum(new[row][t] for t in at) - sum(old[row][t] for t in at))]
        surrogates, clipped = [], 0
        for ratio in ratios:
            low, high = 1 - config.clip, 1 + config.clip
            if gain > 0 and ratio > high:
                surrogates.append(high * gain)
            elif gain < 0 and ratio < low:
                surrogates.append(low * gain)
            else:
                surrogates.append(ratio * gain)
                continue
            clipped += 1
        kl = 0.0
        if before is not None:
            apart = [before[row][t] - new[row][t] for t in at]
            kl = sum(math.exp(d) - d - 1 for d in apart) / len(at)
        objective = sum(surrogates) / len(surrogates) - config.kl * kl
        result.append((-objective, kl, clipped / len(ratios)))
    return result


def answers(seed: int, rows: int = 4, length: int = 7) -> tuple[Tensor, ...]:
    """Log-probabilities of three policies that have parted, a ragged mask, and gains."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    new = -normal(rows, length).abs() - 0.1
    old, before = new + 0.3 * normal(rows, length), new + 0.5 * normal(rows, length)
    mask = torch.rand(rows, length, generator=draw) < 0.6
    mask[torch.arange(rows), torch.randint(length, (rows,), generator=draw)] = True
    return new, old, before, mask, normal(rows)


@pytest.mark.parametrize("ratio", RATIOS)
@given(
    seed=st.integers(0, 10_000), clip=st.floats(0.05, 0.5), kl=st.floats(0, 1), pays=st.booleans()
)
def test_loss_against_plain_loops(
    ratio: str, seed: int, clip: float, kl: float, pays: bool
) -> None:
    new, old, before, mask, gains = answers(seed)
    config = GrpoConfig.model_validate({"clip": clip, "kl": kl, "ratio": ratio})
    found = grpo_loss(new, old, before if pays else None, mask, gains, config)
    rows = [tensor.tolist() for tensor in (new, old, before, mask, gains)]
    expected = reference_loss(*rows[:2], rows[2] if pays else None, *rows[3:], config)
    torch.testing.assert_close(
        torch.stack(list(found), 1), torch.tensor(expected, dtype=torch.float64)
    )
    single = grpo_loss(
        new.float(), old.float(), before.float() if pays else None, mask, gains.float(), config
    )
    torch.testing.assert_close(single.loss.double(), found.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_reference_meets_both_sides_of_the_clip(ratio: str) -> None:
    """Else the test above would not be about clipping."""
    config = GrpoConfig.model_validate({"ratio": ratio})
    seen = set()
    for seed in range(20):
        new, old, _, mask, gains = (tensor.tolist() for tensor in answers(seed))
        for gain, (_, _, clipped) in zip(
            gains, reference_loss(new, old, None, mask, gains, config), strict=True
        ):
            seen.add((gain > 0, clipped > 0))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("ratio", "gain", "surrogate", "slope"),
    [
        (1.0, 1.0, 1.0, 1.0),
        (1.5, 1.0, 1.2, 0.0),  # enough gained already
        (1.5, -1.0, -1.5, -1.5),  # the wrong way: pulled back at full strength
        (0.5, -1.0, -0.8, 0.0),
        (0.5, 1.0, 0.5, 0.5),
        (1.19, 2.0, 2.38, 2.38),
        (0.7, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("kind", RATIOS)
def test_the_clip_by_hand(
    ratio: float, gain: float, surrogate: float, slope: float, kind: str
) -> None:
    """One token; the slope of the surrogate in the log-probability is ratio times gain, or 0."""
    new = torch.tensor([[math.log(ratio) - 2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -2.0, dtype=torch.float64)
    gains = torch.tensor([gain], dtype=torch.float64)
    config = GrpoConfig.model_validate({"ratio": kind})
    found = grpo_loss(new, old, None, torch.ones(1, 1, dtype=torch.bool), gains, config)
    (gradient,) = torch.autograd.grad(found.loss.sum(), [new])
    assert found.loss.item() == pytest.approx(-surrogate)
    assert gradient.item() == pytest.approx(-slope)
    assert found.clipped.item() == float(slope == 0 and gain != 0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_against_finite_differences(ratio: str) -> None:
    new, old, before, mask, gains = answers(5)
    config = GrpoConfig.model_validate({"ratio": ratio, "kl": 0.3})
    kinks = (new - old).exp() if ratio == "token" else (mask * (new - old)).sum(1).exp()
    assert all(((kinks - edge).abs() > 1e-4).all() for edge in (0.8, 1.2))

    def loss(x: Tensor) -> Tensor:
        return grpo_loss(x, old, before, mask, gains, config).loss

    assert torch.autograd.gradcheck(loss, [new.requires_grad_()])


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_first_gradient_is_that_of_reinforce(ratio: str) -> None:
    """Where no policy has moved yet, likelier means gain; the penalty is flat there."""
    new, _, _, mask, gains = answers(1)
    new.requires_grad_()
    config = GrpoConfig.model_validate({"ratio": ratio})
    found = grpo_loss(new, new.detach(), new.detach(), mask, gains, config)
    (gradient,) = torch.autograd.grad(found.loss.sum(), [new])
    per_token = gains / mask.sum(1) if ratio == "token" else gains
    torch.testing.assert_close(gradient, -per_token[:, None] * mask)
    assert found.kl.abs().max() == 0 and found.clipped.max() == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_is_no_answer_does_not_count(ratio: str) -> None:
    new, old, before, mask, gains = answers(2)
    config = GrpoConfig.model_validate({"ratio": ratio})
    expected = grpo_loss(new, old, before, mask, gains, config)
    noisy = [torch.where(mask, t, v) for t, v in ((new, -1e30), (old, 0.0), (before, torch.inf))]
    noisy[0].requires_grad_()
    found = grpo_loss(*noisy, mask, gains, config)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found.loss.sum(), [noisy[0]])
    assert torch.isfinite(gradient).all() and not gradient[~mask].any() and gradient[mask].any()


def test_k3_by_hand() -> None:
    new = torch.full((1, 2), math.log(0.25), dtype=torch.float64)
    before = torch.tensor([[math.log(0.5), math.log(0.25)]], dtype=torch.float64)
    config = GrpoConfig(kl=0.7)
    ones = torch.ones(1, 2, dtype=torch.bool)
    found = grpo_loss(new, new, before, ones, torch.zeros(1, dtype=torch.float64), config)
    expected = (2 - math.log(2) - 1) / 2  # the second token's is 0
    assert found.kl.item() == pytest.approx(expected)
    assert found.loss.item() == pytest.approx(0.7 * expected)


@given(seed=st.integers(0, 10_000))
def test_k3_is_the_divergence_on_average(seed: int) -> None:
    """Weighted by how often each token would be sampled, it sums to KL(new || reference)."""
    draw = torch.Generator().manual_seed(seed)
    new, before = torch.randn(2, 11, generator=draw, dtype=torch.float64).log_softmax(-1)
    one_each = new[:, None], new[:, None], before[:, None], torch.ones(11, 1, dtype=torch.bool)
    found = grpo_loss(*one_each, torch.zeros(11, dtype=torch.float64), GrpoConfig())
    assert (found.kl >= 0).all()
    expected = (new.exp() * (new - before)).sum()
    torch.testing.assert_close((new.exp() * found.kl).sum(), expected)


@given(
    rewards=st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_advantages_against_the_statistics_module(rewards: list[list[float]]) -> None:
    found = advantages(torch.tensor(rewards, dtype=torch.float64))
    for row, group in zip(found.tolist(), rewards, strict=True):
        spread = statistics.pstdev(group)
        if spread < 0.9e-6:
            assert row == [0.0] * 4
        elif spread > 1.1e-6:
            mean = statistics.fmean(group)
            assert row == pytest.approx([(r - mean) / spread for r in group], abs=1e-9)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.9]])
    found = advantages(rewards)
    third = math.sqrt(3)  # deviations -0.2 and 0.6, spread sqrt(0.12)
    expected = [[-1, -1, 1, 1], [0, 0, 0, 0], [-1 / third, -1 / third, -1 / third, third]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert advantages(torch.tensor([[0.7], [0.2]])).tolist() == [[0], [0]]
    equal = torch.full((3, 8), 0.1) + 0.7 * torch.tensor([[0.3], [0.6], [0.9]])
    assert not advantages(equal).any()  # rounding is no difference


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"clip": 1}, {"kl": -0.1}, {"ratio": "word"}])
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GrpoConfig.model_validate(wrong)


def rows_of_tokens(policy: Policy, rows: int = 3, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Final states, tokens that may be sampled, and a ragged mask of answers."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, length, policy.width, generator=draw)
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    allowed = [i for i in range(vocabulary) if i not in policy.backbone.placeholder_ids]
    ids = torch.tensor(allowed)[torch.randint(len(allowed), (rows, length), generator=draw)]
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, (start, end) in enumerate(((4, 9), (2, 5), (8, 9))):
        mask[row, start:end] = True
    return hidden, ids, mask


def full_log_probs(
    policy: Policy, hidden: Tensor, ids: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """Whole softmaxes in float64, one position after the other."""
    head = policy.model.get_output_embeddings().weight.double()
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for row, at in mask.nonzero().tolist():
        logits = hidden[row, at - 1].double() @ head.T / temperature
        for token in policy.backbone.placeholder_ids:
            logits = logits.index_fill(0, torch.tensor(token), -torch.inf)
        result = result.index_put(
            (torch.tensor(row), torch.tensor(at)), logits.log_softmax(0)[ids[row, at]]
        )
    return result


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three positions at a time."""
    monkeypatch.setattr(grpo, "_CHUNK", 3)


@pytest.fixture
def trained_head(policy: Policy) -> Iterator[Tensor]:
    """The language head, with a gradient to be had."""
    head: Tensor = policy.model.get_output_embeddings().weight
    before = head.requires_grad
    yield head.requires_grad_(True)
    head.requires_grad_(before)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradients_are_those_of_whole_softmaxes(
    policy: Policy, temperature: float, trained_head: Tensor
) -> None:
    hidden, ids, mask = rows_of_tokens(policy)
    hidden.requires_grad_()
    found = answer_log_probs(policy, hidden, ids, mask, temperature)
    expected = full_log_probs(policy, hidden, ids, mask, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[~mask].any() and (found[mask] < 0).all()
    weights = torch.randn(mask.shape)
    gradients = [
        torch.autograd.grad((weights * values).sum(), [hidden, trained_head])
        for values in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    told = torch.zeros_like(mask)
    told[:, :-1] = mask[:, 1:]
    assert not gradients[0][0][~told].any()  # only the state before a token tells of it
    assert (gradients[0][0][told] != 0).any(-1).all()


def test_chunks_change_nothing(
    policy: Policy, trained_head: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, ids, mask = rows_of_tokens(policy)
    hidden.requires_grad_()
    results = []
    for chunk in (1, 3, 1000):
        monkeypatch.setattr(grpo, "_CHUNK", chunk)
        values = answer_log_probs(policy, hidden, ids, mask, 0.9)
        gradients = torch.autograd.grad(values.square().sum(), [hidden, trained_head])
        results.append((values, *gradients))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("few")
def test_no_more_logits_than_a_chunk_are_alive(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, ids, mask = rows_of_tokens(policy)
    asked: list[int] = []
    plain = policy.language_logits

    def counted(states: Tensor) -> Tensor:
        asked.append(len(states))
        return plain(states)

    monkeypatch.setattr(policy, "language_logits", counted)
    saved: list[int] = []  # elements kept for the backward pass
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        values = answer_log_probs(policy, hidden.requires_grad_(), ids, mask)
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    assert asked == [3, 3, 3]
    assert max(saved, default=0) < 3 * vocabulary
    values.sum().backward()
    assert asked == [3] * 6  # once more for the backward pass


def test_the_last_state_is_not_needed(policy: Policy) -> None:
    """Generation never reads the last token, so its state is missing."""
    hidden, ids, mask = rows_of_tokens(policy)
    whole = answer_log_probs(policy, hidden, ids, mask)
    torch.testing.assert_close(answer_log_probs(policy, hidden[:, :-1], ids, mask), whole)


def test_probabilities_of_what_may_be_sampled_sum_to_one(policy: Policy) -> None:
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    hidden = torch.randn(1, 1, policy.width).expand(vocabulary, 2, -1)
    ids = torch.arange(vocabulary)[:, None].expand(-1, 2)
    mask = torch.tensor([[False, True]]).expand(vocabulary, -1)
    found = answer_log_probs(policy, hidden, ids, mask, 0.8)[:, 1].detach()
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (found[policy.backbone.placeholder_ids] == -torch.inf).all()


def test_no_answer_has_no_log_prob(policy: Policy) -> None:
    hidden, ids, mask = rows_of_tokens(policy)
    found = answer_log_probs(policy, hidden, ids, torch.zeros_like(mask))
    assert found.shape == mask.shape and not found.any()
