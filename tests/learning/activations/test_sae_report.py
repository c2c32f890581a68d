"""The report's figures, each against its plain definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import policy_config, tiny_qwen_policy

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.data.samples import read_dataset
from segcompass.learning.activations.sae_report import SHARED, as_table, measure_fidelity
from segcompass.learning.activations.sources import SampleSource, pixels_of
from segcompass.learning.activations.stream import Group, Groups, StateReader, Statistics, measure
from segcompass.learning.engine.distributed import World
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tiny_qwen_policy(tmp_path_factory.mktemp("qwen") / "policy")
    return load_policy(folder, policy_config("qwen2_5_vl"))


@pytest.fixture(scope="module")
def reader(policy: Policy, scenes_root: Path) -> StateReader:
    samples = read_dataset(scenes_root, "train")[:4]
    return StateReader(policy, [SampleSource(policy, samples, seed=0)])


GROUPS = [Group(0, (0, 1)), Group(0, (2,))]


@pytest.fixture(scope="module")
def found(reader: StateReader) -> Statistics:
    return measure(reader, Groups([4], 0.5, 2, 1), None, 10_000)


def random_sae(policy: Policy, threshold: float = 0.0) -> SparseAutoencoder:
    torch.manual_seed(1)
    config = SparseAutoencoderConfig(
        d_in=policy.width, d_sae=24, threshold=threshold, apply_b_dec_to_input=True
    )
    sae = SparseAutoencoder(config, mean=torch.randn(policy.width) * 0.1)
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_(std=0.02)
    return sae


def report_of(
    policy: Policy, sae: SparseAutoencoder, reader: StateReader, found: Statistics, **settings: Any
) -> dict[str, Any]:
    return measure_fidelity(
        policy, sae, reader, GROUPS, found, settings.get("outliers"), settings.get("world", ALONE)
    )


def tokens_of(reader: StateReader) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [reader.read(group) for group in GROUPS]
    return torch.cat([p.states for p in parts]), torch.cat([p.kinds for p in parts])


@pytest.mark.parametrize("outliers", [None, 1.05])
def test_variance_and_density_by_their_definitions(
    policy: Policy, reader: StateReader, found: Statistics, outliers: float | None
) -> None:
    sae = random_sae(policy, threshold=0.4)
    report = report_of(policy, sae, reader, found, outliers=outliers)
    states, kinds = tokens_of(reader)
    with torch.no_grad():
        codes = sae.encode(states)
        codes = codes * (codes > 0.4)
        rebuilt = sae.decode(codes)
    usual = states.norm(dim=-1) <= (outliers or float("inf")) * found.median_norm
    assert 0 < usual.double().mean() <= 1 and bool(usual.all()) == (outliers is None)
    for name, chosen in (
        ("explained_variance", usual),
        ("explained_variance_with_outliers", torch.ones_like(usual)),
    ):
        x, y = states[chosen].double(), rebuilt[chosen].double()
        expected = 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()
        assert report[name] == pytest.approx(float(expected), abs=1e-5)
    assert report["outliers"] == pytest.approx(1 - float(usual.double().mean()), abs=1e-9)
    active = codes[usual] > 0
    is_image = kinds[usual] == TokenKind.IMAGE
    assert report["l0"] == pytest.approx(float(active.sum(-1).double().mean()))
    assert report["l0_image"] == pytest.approx(float(active[is_image].sum(-1).double().mean()))
    assert report["l0_text"] == pytest.approx(float(active[~is_image].sum(-1).double().mean()))
    assert report["silent"] == pytest.approx(float((~active.any(0)).double().mean()))
    rates = torch.stack([active[~is_image].double().mean(0), active[is_image].double().mean(0)])
    alive = rates.max(0).values > 0
    shared = alive & (rates.min(0).values >= SHARED * rates.max(0).values)
    assert report["shared"] == pytest.approx(float(shared.sum() / alive.sum()))
    assert report["text_only"] + report["image_only"] + report["shared"] == pytest.approx(1)
    assert report["tokens"] == len(states)


def loss_with(policy: Policy, reader: StateReader, change: Any) -> float:
    """Cross-entropy of the answers when the layers above the SAE layer read changed states.

    An independent way: the layer itself is replaced by one that returns the changed states.
    """
    total, count = 0.0, 0
    for group in GROUPS:
        sequences, rows = reader.batch(group)
        layer = policy.sae_layer
        forward = layer.forward
        readable = (sequences.kinds > 0) & (sequences.kinds < TokenKind.CONCENTRATION)
        for mark in policy.tokenizer.added_tokens_decoder:
            if mark != policy.backbone.image_token_id:
                readable &= sequences.ids != mark
        readable[:, -1] &= sequences.ids[:, -1] != policy.prompt.eos_token_id

        def changed(
            *args: Any, forward: Any = forward, where: Any = readable, **kwargs: Any
        ) -> Any:
            output = forward(*args, **kwargs)
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[where] = change(states[where])
            return (states, *output[1:]) if isinstance(output, tuple) else states

        layer.forward = changed  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                _, hidden = policy(sequences, pixels_of(rows))
                logits = policy.language_logits(hidden)
        finally:
            layer.forward = forward  # type: ignore[method-assign]
        for row, kinds in enumerate(sequences.kinds.tolist()):
            for at, kind in enumerate(kinds):
                if kind >= TokenKind.THOUGHT:
                    target = sequences.ids[row, at]
                    total += float(F.cross_entropy(logits[row, at - 1], target))
                    count += 1
    return total / count


def test_loss_recovered_when_spliced_in(
    policy: Policy, reader: StateReader, found: Statistics
) -> None:
    sae = random_sae(policy)
    report = report_of(policy, sae, reader, found)
    with torch.no_grad():
        expected = {
            "original": loss_with(policy, reader, lambda s: s),
            "reconstructed": loss_with(policy, reader, lambda s: sae(s).reconstruction),
            "zero": loss_with(policy, reader, torch.zeros_like),
        }
    assert report["loss"] == pytest.approx(expected, rel=1e-4)
    gap = expected["zero"] - expected["original"]
    recovered = (expected["zero"] - expected["reconstructed"]) / gap
    assert report["loss_recovered"] == pytest.approx(recovered, rel=0.02)
    assert not policy.sae_layer._forward_hooks  # nothing stays behind


def test_a_perfect_autoencoder_recovers_everything(
    policy: Policy, reader: StateReader, found: Statistics
) -> None:
    width = policy.width
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=2 * width))
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.t())
    report = report_of(policy, sae, reader, found)
    assert report["explained_variance"] == pytest.approx(1)
    assert report["loss_recovered"] == pytest.approx(1)
    assert report["l0"] == pytest.approx(width)


def test_ranks_add_up_to_one_process(
    policy: Policy, reader: StateReader, found: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, parts = random_sae(policy), []
    monkeypatch.setattr(World, "sum", lambda self, value: (parts.append(value.clone()), value)[1])
    whole = report_of(policy, sae, reader, found)
    wanted = parts[:]
    parts.clear()
    for rank in range(2):
        report_of(policy, sae, reader, found, world=World(rank, 2, torch.device("cpu")))
    for one, left, right in zip(wanted, parts[:4], parts[4:], strict=True):
        torch.testing.assert_close(left + right, one)
    assert whole["tokens"] > 0


def test_the_table_tells_every_figure(
    policy: Policy, reader: StateReader, found: Statistics
) -> None:
    report = {**report_of(policy, random_sae(policy), reader, found), "dead": 0.125}
    table = as_table(report)
    assert f"{report['explained_variance']:8.3f}" in table and "0.125" in table
    assert "dead latents" in as_table({**report, "dead": None})
