"""Schedule and master weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig, learning_rate


def config(steps: int = 10, rate: float = 0.1, **changes: float | str) -> OptimizerConfig:
    return OptimizerConfig(steps=steps, learning_rate=rate, **changes)


def with_gradient(parameter: nn.Parameter, gradient: Tensor | float) -> None:
    parameter.grad = torch.zeros_like(parameter) + gradient


def test_schedule_by_hand() -> None:
    plan = config(steps=21, rate=1.0, warmup=4 / 21, final_division=10.0)
    rates = [learning_rate(plan, step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.55)  # half way down: between 1 and 0.1
    assert rates[20] == pytest.approx(0.1)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(1, 100))
def test_schedule_rises_then_falls_within_its_bounds(
    steps: int, warmup: float, division: float
) -> None:
    plan = config(steps=steps, rate=0.3, warmup=warmup, final_division=division)
    rates = [learning_rate(plan, step) for step in range(steps)]
    assert min(rates) > 0 and max(rates) <= 0.3 * (1 + 1e-9)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == pytest.approx(sorted(rates[top:], reverse=True))
    if warmup * steps < steps - 2:
        assert rates[-1] == pytest.approx(0.3 / division)


def test_bf16_weights_follow_steps_too_small_for_bf16() -> None:
    plan = config(rate=1e-4, warmup=0.0, final_division=1.0, weight_decay=0.0)
    ours, plain = (nn.Linear(8, 8).to(torch.bfloat16) for _ in range(2))
    for layer in (ours, plain):
        nn.init.ones_(layer.weight)
    weights = MasterWeights({"layer": ours}, plan)
    adam = torch.optim.AdamW([plain.weight], lr=1e-4, betas=plan.betas, weight_decay=0.0)
    for step in range(60):
        with_gradient(ours.weight, 1.0)
        with_gradient(plain.weight, 1.0)
        weights.step(step)
        adam.step()
    assert torch.equal(plain.weight, torch.ones_like(plain.weight))  # 1 - 1e-4 rounds to 1
    assert ours.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.weight.float(), torch.full((8, 8), 1 - 60e-4), atol=4e-3, rtol=0
    )
    torch.testing.assert_close(
        weights.master["layer.weight"].detach(), torch.full((8, 8), 1 - 60e-4)
    )


def test_fp32_weights_move_as_under_plain_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    plain = nn.Linear(5, 3)
    plain.load_state_dict(ours.state_dict())
    plan = config(warmup=0.0, final_division=1.0, weight_decay=0.0, clip=1e9)
    weights = MasterWeights({"layer": ours}, plan)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=plan.betas, weight_decay=0.0)
    for step in range(5):
        x = torch.randn(4, 5)
        for layer in (ours, plain):
            layer(x).square().sum().backward()
        weights.step(step)
        adam.step()
        adam.zero_grad()
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.bias, plain.bias)


def test_only_matrices_decay_and_parts_have_their_own_rate() -> None:
    parts = {name: nn.Linear(2, 2) for name in ("fast", "slow", "still")}
    for part in parts.values():
        nn.init.ones_(part.weight)
        nn.init.ones_(part.bias)
    plan = config(warmup=0.0, final_division=1.0, weight_decay=0.5)
    weights = MasterWeights(parts, plan, {"slow": 0.1, "still": 0.0})
    for part in parts.values():
        with_gradient(part.weight, 0.0)
        with_gradient(part.bias, 0.0)
    weights.step(0)
    found = [part.weight[0, 0].item() for part in parts.values()]
    assert found == pytest.approx([1 - 0.1 * 0.5, 1 - 0.01 * 0.5, 1.0])
    assert all(torch.equal(part.bias, torch.ones(2)) for part in parts.values())


def test_frozen_parameters_stay_out() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert MasterWeights({"layer": layer}, config()).master.keys() == {"layer.weight"}


def test_the_norm_is_of_all_parts_before_clipping() -> None:
    left, right = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    weights = MasterWeights({"left": left, "right": right}, config(clip=1.0))
    with_gradient(left.weight, 3.0)
    with_gradient(right.weight, 4.0)
    assert weights.step(0) == pytest.approx(5.0)
    moments = weights.optimizer.state
    first = [moments[weights.master[f"{n}.weight"]]["exp_avg"].item() for n in ("left", "right")]
    assert first == pytest.approx([0.1 * 0.6, 0.1 * 0.8])  # (1 - beta1) of the clipped gradient


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_without_a_norm_changes_nothing(bad: float) -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    weights = MasterWeights({"layer": layer}, config())
    before = {key: value.clone() for key, value in weights.state().items()}
    with_gradient(layer.weight, bad)
    with_gradient(layer.bias, 1.0)
    assert not math.isfinite(weights.step(0))
    after = weights.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_state_survives_the_way_through_a_dictionary() -> None:
    """Also for a parameter that is transposed in memory, as the SAE's encoder is."""
    torch.manual_seed(1)
    start = torch.randn(37, 53)

    def fresh() -> tuple[nn.ParameterList, MasterWeights]:
        module = nn.ParameterList([nn.Parameter(start.clone().t()), nn.Parameter(start.clone())])
        return module, MasterWeights({"part": module}, config(steps=40, rate=0.01))

    def move(module: nn.ParameterList, weights: MasterWeights, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for parameter in module:
                with_gradient(parameter, torch.randn(parameter.shape))
            weights.step(step)

    straight, weights = fresh()
    move(straight, weights, range(30))
    halted, weights = fresh()
    move(halted, weights, range(13))
    kept = {key: value.contiguous() for key, value in weights.state().items()}  # as from a file
    resumed, weights = fresh()
    weights.restore(kept)
    for parameter in resumed:  # mixed layouts are slow, and may round differently
        assert weights.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    move(resumed, weights, range(13, 30))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("other", "odd"),
    [
        (nn.Linear(3, 2, bias=False), r"part\.bias"),
        (nn.Linear(4, 2), r"part\.weight"),
        (nn.Sequential(nn.Linear(3, 2)), r"part\.0\.bias"),
    ],
)
def test_a_foreign_state_is_refused(other: nn.Module, odd: str) -> None:
    layer = nn.Linear(3, 2)
    weights = MasterWeights({"part": layer}, config())
    foreign = MasterWeights({"part": other}, config()).state()
    shapes = {key: tuple(tensor.shape) for key, tensor in foreign.items()}
    with pytest.raises(CheckpointError, match=rf"run/state .*another run.*{odd}.*delete it"):
        weights.check(shapes, Path("run/state"))


class _Words(nn.Module):
    """A table, a matrix and a bias: what Muon leaves alone, moves, and leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)

    def gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)


def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    plan = config(rate=0.02, warmup=0.0, final_division=1.0, weight_decay=0.0, optimizer="muon")
    ours, plain = _Words(), _Words()
    weights = MasterWeights({"words": ours}, plan)
    muon = torch.optim.Muon(
        [plain.mix.weight], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    rest = [plain.embed.weight, plain.mix.bias]
    adam = torch.optim.AdamW(rest, lr=0.02, betas=plan.betas, weight_decay=0.0)
    for step in range(4):
        for words in (ours, plain):
            words.gradients(step)
        weights.step(step)
        nn.utils.clip_grad_norm_(plain.parameters(), plan.clip)
        muon.step()
        adam.step()
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_muon_is_refused_where_matrices_are_sharded() -> None:
    weights = MasterWeights({"words": _Words()}, config(optimizer="muon"))
    weights.starts = {"words.mix.weight": 2}  # as of a second rank
    with pytest.raises(ConfigError, match="adamw, or train with one process"):
        weights._optimizers([])


def test_muon_resumes_to_the_bit() -> None:
    plan = config(optimizer="muon")
    whole, first, second = _Words(), _Words(), _Words()
    weights = {name: MasterWeights({"w": m}, plan) for name, m in (("a", whole), ("b", first))}
    for step in range(6):
        whole.gradients(step)
        weights["a"].step(step)
        if step < 3:
            first.gradients(step)
            weights["b"].step(step)
    resumed = MasterWeights({"w": second}, plan)
    resumed.restore(weights["b"].state())
    for step in range(3, 6):
        second.gradients(step)
        resumed.step(step)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )
