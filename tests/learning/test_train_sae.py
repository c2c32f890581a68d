"""The SAE stage: every remedy does what it says, runs can be killed, ranks equal one process."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ranks import launch
from recipes import stage
from tiny import policy_config, tiny_qwen_policy

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.io.errors import CheckpointError
from segcompass.learning.activations.cache import Tokens
from segcompass.learning.activations.sae_loop import SaeLoop, flat_rate, input_scale, new_sae
from segcompass.learning.activations.stream import StateReader, Statistics
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.stages import SaeStage
from segcompass.learning.train_sae import REPORT, open_states, train_sae
from segcompass.learning.watching.watch import TensorBoard
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy

ALONE = World(0, 1, torch.device("cpu"))
WIDTH, LATENTS = 6, 12


def plan(steps: int = 4, **settings: Any) -> SaeStage:
    return SaeStage.model_validate(
        stage(steps, **{"batch": 16, "latents": LATENTS, "buffer": 64, **settings})
    )


def found_of(states: torch.Tensor) -> Statistics:
    mean, norms = states.mean(0), states.norm(dim=-1)
    spread = float((states - mean).norm(dim=-1).mean())
    return Statistics(mean, spread, float(norms.mean()), float(norms.median()), len(states))


def states(seed: int = 0, n: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator) @ torch.diag(torch.arange(1.0, 7.0)) + 9.0


def tokens(values: torch.Tensor) -> Tokens:
    """Every third one of a picture."""
    return Tokens(values, (1 + (torch.arange(len(values)) % 3 == 0).long()).to(torch.uint8))


def loop_of(folder: Path, settings: SaeStage, world: World = ALONE) -> SaeLoop:
    found = found_of(states())
    scale = input_scale(found, settings)
    sae = new_sae(found, settings, seed=1, scale=scale)
    return SaeLoop(folder, sae, settings, 1, scale, world)


# --- the remedies


def test_inputs_are_scaled_to_the_root_of_their_width() -> None:
    z, found = states(), found_of(states())
    centred = (z - z.mean(0)) * input_scale(found, plan())
    assert float(centred.norm(dim=-1).mean()) == pytest.approx(WIDTH**0.5)
    raw = z * input_scale(found, plan(centre=False))
    assert float(raw.norm(dim=-1).mean()) == pytest.approx(WIDTH**0.5)
    assert input_scale(found, plan(scale_inputs=False)) == 1.0


def test_centring_starts_at_the_mean_and_is_kept_in_the_file() -> None:
    found = found_of(states())
    sae = new_sae(found, plan(), 0, scale=2.0)
    torch.testing.assert_close(sae.b_dec.data, found.mean * 2.0)
    assert sae.config.apply_b_dec_to_input
    plain = new_sae(found, plan(centre=False), 0, scale=2.0)
    assert not plain.b_dec.any() and not plain.config.apply_b_dec_to_input


@pytest.mark.parametrize("unit", [False, True])
def test_the_decoder_starts_at_its_norm_tied_to_the_encoder(unit: bool) -> None:
    found = found_of(states())
    settings = {"decoder_norm": 0.3, "unit_decoder": unit, "weigh_by_decoder": not unit}
    sae = new_sae(found, plan(**settings), 0, scale=1.0)
    norms = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((LATENTS,), 1.0 if unit else 0.3))
    directions = torch.nn.functional.normalize(sae.W_enc.t(), dim=-1)
    torch.testing.assert_close(directions, sae.W_dec / norms[:, None])
    products = sae.W_enc.norm(dim=0) * norms
    torch.testing.assert_close(products, torch.full((LATENTS,), 0.09))
    untied = new_sae(found, plan(**settings, tied_start=False), 0, scale=1.0)
    torch.testing.assert_close(untied.W_dec, sae.W_dec)
    cosines = (torch.nn.functional.normalize(untied.W_enc.t(), dim=-1) * sae.W_dec).sum(-1) / norms
    assert float(cosines.detach().abs().max()) < 0.999


def test_the_penalty_rises_at_first(tmp_path: Path) -> None:
    settings = plan(steps=10, l1_warmup=0.4, l1=2.0)
    batch = tokens(states(n=16))
    for step in range(6):
        loop = loop_of(tmp_path / str(step), settings)
        loop.step = step
        result = loop.losses(batch)
        z = batch.states * loop.scale
        expected = loop.sae.loss(z, 2.0 * min(1.0, (step + 1) / 4), weigh_by_decoder=True)
        torch.testing.assert_close(result["loss"], expected.total)


@pytest.mark.parametrize("weigh", [False, True])
def test_activations_are_weighed_by_decoder_norms_or_not(tmp_path: Path, weigh: bool) -> None:
    loop = loop_of(tmp_path, plan(l1_warmup=0, l1=0.5, weigh_by_decoder=weigh))
    with torch.no_grad():
        loop.sae.W_dec[0] *= 7
    batch = tokens(states(n=16))
    expected = loop.sae.loss(batch.states * loop.scale, 0.5, weigh_by_decoder=weigh)
    torch.testing.assert_close(loop.losses(batch)["loss"], expected.total)


def test_a_unit_decoder_stays_one(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, plan(unit_decoder=True, weigh_by_decoder=False))
    batches = [tokens(states(seed, 16)) for seed in range(4)]
    loop.run(lambda step: loop.losses(batches[step]))
    loop.normalise()
    torch.testing.assert_close(loop.sae.W_dec.norm(dim=-1), torch.ones(LATENTS))


def test_the_rate_can_hold_until_its_last_decline(tmp_path: Path) -> None:
    settings = plan(steps=100, warmup=0.1, decay=0.2, final_division=10, learning_rate=1.0)
    rates = [flat_rate(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == pytest.approx([1.0] * 70)
    assert rates[-1] == pytest.approx(0.1)
    falls = [a - b for a, b in pairwise(rates[80:])]
    assert falls == pytest.approx([0.9 / 20] * 19)
    loop = loop_of(tmp_path, settings)
    batches = [tokens(states(seed, 16)) for seed in range(3)]
    for step in (0, 50, 95):
        loop.step = step
        loop.losses(batches[0])["loss"].backward()
        loop.weights.step(step)
        used = [group["lr"] for group in loop.weights.optimizers[0].param_groups]
        assert used == pytest.approx([rates[step]] * 2)


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="set one of them to false"):
        plan(unit_decoder=True)
    with pytest.raises(ValidationError, match="less than two batches of 16"):
        plan(buffer=31)


# --- dead latents


def silenced(folder: Path, **settings: Any) -> SaeLoop:
    """A loop whose first two latents never fire."""
    loop = loop_of(folder, plan(40, dead_after=32, l1=0.0, learning_rate=0.1, **settings))
    with torch.no_grad():
        loop.sae.b_enc[:2] = -1.0
    return loop


@pytest.mark.parametrize("revive", ["none", "resample", "auxiliary"])
def test_dead_latents_are_counted_and_can_be_revived(tmp_path: Path, revive: str) -> None:
    loop = silenced(tmp_path, revive=revive, revive_every=5, auxiliary=10.0)
    loop.run(lambda step: loop.losses(tokens(states(step, 16))))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["dead"] for row in rows[:2]] == [0.0, pytest.approx(2 / LATENTS, abs=1e-5)]
    assert rows[-1]["dead"] == pytest.approx(2 / LATENTS if revive == "none" else 0, abs=1e-5)


def test_restarted_latents_have_no_past(tmp_path: Path) -> None:
    loop = silenced(tmp_path, revive="resample", revive_every=5)
    for _ in range(5):
        before = {n: p.detach().clone() for n, p in loop.sae.named_parameters()}
        loop._one_step(lambda s: loop.losses(tokens(states(s, 16))))
    sae, moments = loop.sae, loop.weights.optimizers[0].state
    assert float(before["b_enc"][0]) == -1 and not sae.b_enc[:2].any()
    assert not moments[sae.W_dec]["exp_avg"][:2].any() and moments[sae.W_dec]["exp_avg"][2:].any()
    assert not moments[sae.W_enc]["exp_avg_sq"][:, :2].any()
    assert moments[sae.W_enc]["exp_avg_sq"][:, 2:].any()
    torch.testing.assert_close(sae.W_dec[:2].norm(dim=-1), torch.full((2,), 0.1), rtol=0.02, atol=0)
    assert torch.equal(before["W_dec"][0] == sae.W_dec[0], torch.zeros(WIDTH, dtype=torch.bool))
    assert loop.clock.since[:, :2].sum() == 0


# --- the whole stage


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tiny_qwen_policy(tmp_path_factory.mktemp("qwen") / "policy")
    return load_policy(folder, policy_config("qwen2_5_vl"))


def config_of(folder: Path, data: Path, settings: SaeStage) -> RunConfig:
    joint = stage(1)
    return RunConfig.model_validate(
        {"run": folder, "seed": 3, "data": {"root": data}, "train_joint": joint}
        | {"train_sae": settings.model_dump()}
    )


def run(policy: Policy, data: Path, folder: Path, settings: SaeStage) -> SparseAutoencoder:
    return train_sae(policy, config_of(folder, data, settings), settings, folder)


def test_the_sae_reads_unscaled_states(
    policy: Policy, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained on inputs of norm sqrt(D); afterwards it explains the states as they are."""
    torch.manual_seed(0)
    known = 40 + 7 * torch.randn(600, 3) @ torch.randn(3, policy.width)
    known[5] *= 1e4  # an outlier: seen by nobody
    monkeypatch.setattr(StateReader, "_computed", lambda *_: tokens(known))
    settings = plan(200, batch=64, latents=96, l1=0.01, samples=1, held_out=1, buffer=2000)
    sae = run(policy, scenes_root, tmp_path, settings)
    usual = torch.cat([known[:5], known[6:]])
    with torch.no_grad():
        error = (sae(usual).reconstruction - usual).square().sum()
    assert error < 0.1 * (usual - usual.mean(0)).square().sum()


STREAMED = {
    "samples": 6,
    "held_out": 2,
    "sequences": 1,
    "buffer": 128,
    "latents": 40,
    "dead_after": 32,
    "revive": "resample",
    "revive_every": 1,
    "threshold": 0.05,
    "l1": 20.0,
}


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_equals_one_that_was_not(
    policy: Policy,
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    """Across chunks of a buffer much smaller than the data, with latents restarting."""
    cache = {"cache": tmp_path / "cache"} if cached else {}
    settings = plan(12, **STREAMED, **cache)
    whole = run(policy, scenes_root, tmp_path / "whole", settings)
    take_step = SaeLoop._one_step

    def one_step(loop: SaeLoop, losses: Any) -> Any:
        if loop.step == 7:
            raise RuntimeError("killed")
        return take_step(loop, losses)

    monkeypatch.setattr(SaeLoop, "_one_step", one_step)
    with pytest.raises(RuntimeError, match="killed"):
        run(policy, scenes_root, tmp_path / "killed", settings)
    monkeypatch.setattr(SaeLoop, "_one_step", take_step)
    again = run(policy, scenes_root, tmp_path / "killed", settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    rows = [[json.loads(line) for line in log.splitlines()] for log in logs]
    for one, other in zip(*rows, strict=True):
        assert {**one, "s": 0} == {**other, "s": 0}
    assert any(row["dead"] > 0 for row in rows[0])
    reports = [json.loads((tmp_path / n / REPORT).read_text()) for n in ("whole", "killed")]
    assert reports[0] == reports[1]
    assert [p.name for p in (tmp_path / "killed").glob("latents-*")] == ["latents-12.safetensors"]


def test_a_clock_that_is_gone_is_named(policy: Policy, scenes_root: Path, tmp_path: Path) -> None:
    settings = plan(2, **STREAMED)
    run(policy, scenes_root, tmp_path, settings)
    (tmp_path / "latents-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"latents-2\.safetensors is missing"):
        run(policy, scenes_root, tmp_path, settings)


def test_the_report_is_written_and_told(
    policy: Policy, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = plan(3, **STREAMED)
    run(policy, scenes_root, tmp_path, settings)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["training_tokens"] == 3 * 16 and report["l1"] == 20.0
    assert 0 <= report["dead"] <= 1 and report["loss"]["original"] > 0
    told = capsys.readouterr()
    assert "explained variance" in told.err and told.out == ""
    before = (tmp_path / REPORT).stat().st_mtime_ns
    run(policy, scenes_root, tmp_path, settings)  # a finished stage is left alone
    assert (tmp_path / REPORT).stat().st_mtime_ns == before


def test_control_tokens_are_read_where_that_is_wanted(
    policy: Policy, scenes_root: Path, tmp_path: Path
) -> None:
    counts = []
    for masked in (True, False):
        settings = plan(samples=4, held_out=2, sequences=2, mask_control=masked)
        reader, groups = open_states(policy, config_of(tmp_path, scenes_root, settings), settings)
        counts.append(len(reader.read(groups.at(0)).kinds))
    assert plan().mask_control and counts[0] < counts[1]


def test_samples_to_train_on_are_not_held_out(
    policy: Policy, scenes_root: Path, tmp_path: Path
) -> None:
    settings = plan(samples=4, held_out=2, sequences=2)
    _, groups = open_states(policy, config_of(tmp_path, scenes_root, settings), settings)
    assert [len(g.positions) for g in groups.training[0]] == [2, 2]
    assert [g.positions for g in groups.held_out] == [(4, 5)]


def test_all_ranks_together_keep_to_the_cache(
    policy: Policy, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "current", classmethod(lambda _: World(1, 4, torch.device("cpu"))))
    settings = plan(samples=4, held_out=2, cache=tmp_path / "states", cache_gb=2.0)
    reader, _ = open_states(policy, config_of(tmp_path, scenes_root, settings), settings)
    assert reader.cache is not None and reader.cache.room == 500_000_000


def test_figures_go_to_tensorboard_where_that_is_wanted(
    policy: Policy, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(TensorBoard, "__call__", lambda _self, step, _row: seen.append(step))
    settings = plan(2, **STREAMED)
    config = config_of(tmp_path, scenes_root, settings)
    for wanted in (False, True):
        told = config.model_copy(update={"tensorboard": wanted})
        train_sae(policy, told, settings, tmp_path / str(wanted))
    assert seen == [1, 2]


# --- ranks


def test_two_ranks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """Also with slices of unequal length, and with latents that are restarted meanwhile."""
    settings = {"batch": 17, "dead_after": 17, "revive": "auxiliary", "l1": 1.0}
    weights, rows = some_steps(str(tmp_path / "alone"), settings, ALONE)
    ranks = launch(ranked_steps, 2, str(tmp_path / "ranks"), settings)
    for name, value in weights.items():
        torch.testing.assert_close(
            torch.tensor(ranks[0][0][name]), torch.tensor(value), rtol=1e-5, atol=1e-6
        )
    assert ranks[0][0] == ranks[1][0]
    for row, wanted in zip(ranks[0][1], rows, strict=True):
        assert {**row, "s": 0} == pytest.approx({**wanted, "s": 0}, rel=1e-5)
    assert rows[-1]["dead"] > 0


def test_ranks_restart_latents_alike(tmp_path: Path) -> None:
    settings = {"batch": 17, "dead_after": 17, "revive": "resample", "revive_every": 2}
    left, right = launch(ranked_steps, 2, str(tmp_path / "ranks"), settings)
    assert left == right
    assert left[1][1]["dead"] > 0
    assert max(left[0]["b_enc"][:2]) > -0.9  # they begin at -1


def some_steps(folder: str, settings: dict[str, Any], world: World) -> tuple[Any, Any]:
    """Weights after three steps, and what was logged; ranks take slices of the same batch."""
    torch.set_num_threads(1)
    loop = loop_of(Path(folder), plan(4, **settings), world)
    with torch.no_grad():
        loop.sae.b_enc[:2] = -1.0
    rows = []
    for step in range(3):
        own = tokens(states(step, 17)).select(torch.tensor(world.slice(range(17))))
        rows.append({**loop._one_step(lambda _, own=own: loop.losses(own)), "s": 0})
    return {n: p.detach().tolist() for n, p in loop.sae.named_parameters()}, rows


def ranked_steps(folder: str, settings: dict[str, Any]) -> Any:
    with start("cpu") as world:
        return some_steps(folder, settings, world)


def test_a_whole_stage_on_two_ranks(scenes_root: Path, tmp_path: Path) -> None:
    policy = str(tiny_qwen_policy(tmp_path / "policy"))
    settings = {**STREAMED, "revive": "none"}
    left, right = launch(ranked_stage, 2, policy, str(scenes_root), str(tmp_path / "sae"), settings)
    assert left == right
    report = json.loads((tmp_path / "sae" / REPORT).read_text())
    assert report["training_tokens"] == 3 * 16 and report["tokens"] > 0
    assert len((tmp_path / "sae/log.jsonl").read_text().splitlines()) == 3


def ranked_stage(folder: str, data: str, out: str, settings: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    with start("cpu"):
        policy = load_policy(Path(folder), policy_config("qwen2_5_vl"))
        sae = run(policy, Path(data), Path(out), plan(3, **settings))
    return [p.tolist() for p in sae.parameters()]
