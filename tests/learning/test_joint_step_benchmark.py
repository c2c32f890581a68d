"""The benchmark of the joint step compares like with like, and prints what it promises."""

from __future__ import annotations

import json

import joint_step
import measuring
import pytest
import torch
from torch import Tensor

SMALL = [
    *("--length", "100", "--image-tokens", "16", "--group", "2", "--layers", "2", "--heads", "4"),
    *("--d-in", "48", "--ffn", "64", "--vocabulary", "700", "--d-sae", "4096", "--width", "16"),
    *("--active", "6", "--repeats", "1", "--slots", "3"),
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("bench") / "scenes"
    return joint_step.build_case(joint_step.parse(SMALL), folder)


def test_prints_one_json_object_with_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    measuring.report(joint_step.measure, joint_step.parse([*SMALL, "--steps", "0", "--json"]))
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "joint_step" and result["machine"]
    rows = {row["measure"]: row for row in result["rows"]}
    assert rows.keys() == {"time", "memory"}
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["baseline"] / row["ours"])
    settings = result["settings"]
    assert settings["rollout_s"] > 0 and 5 < settings["active"] < 7
    assert "pip install trl" in settings["trl"]


def test_both_sides_compute_the_same(case: object) -> None:
    assert joint_step.check_equal(case) < joint_step.TOLERANCE
    sequences, answers = case.rollouts.sequences, case.rollouts.is_answer
    assert sequences.ids.shape[0] == 2 and 90 < sequences.ids.shape[1] <= 100
    assert case.rollouts.well_formed.all() and answers.any(1).all()
    reached = {name.partition(".")[0] for name in case.trained()}
    assert reached == {"policy", "interface"}


@pytest.mark.parametrize("weight", ["rl_weight", "dice_weight"])
def test_a_side_that_computes_something_else_is_caught(weight: str, case: object) -> None:
    plain = case.plain
    stage = plain.stage
    plain.stage = stage.model_copy(update={weight: 1.1 * getattr(stage, weight)})
    try:
        with pytest.raises(SystemExit, match="differs from the plain one"):
            joint_step.check_equal(case)
    finally:
        plain.stage = stage


def test_the_sides_are_what_they_are_said_to_be(case: object) -> None:
    """Passes with gradient, and rows of logits: one and the answers' against two and all."""
    policy, found = case.ours.policy, {}
    tokens, said = case.rollouts.sequences.ids.numel(), int(case.rollouts.is_answer.sum())
    for name, side in (("ours", case.ours), ("plain", case.plain)):
        passes: list[bool] = []
        logits: list[int] = []
        norm = policy.backbone.final_norm
        handles = [
            norm.register_forward_hook(lambda *a, seen=passes: seen.append(a[2].requires_grad)),
            policy.model.lm_head.register_forward_hook(
                lambda *a, seen=logits: seen.append(rows_of(a[2]))
            ),
        ]
        case.clear()
        case.step(side)()
        for handle in handles:
            handle.remove()
        found[name] = (passes, logits)
    assert found["ours"] == ([True], [said, said])  # the second time for the backward pass
    assert found["plain"] == ([True, True], [tokens, tokens])


def rows_of(logits: Tensor) -> int:
    return logits.numel() // logits.shape[-1]


def test_beside_trl(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="a benchmark dependency")
    import language_step

    torch.manual_seed(0)
    options = joint_step.parse([*SMALL, "--steps", "1", "--json"])
    measuring.report(language_step.measure, options)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["measure"] == "language_step_vs_trl" and row["ratio"] > 0
