"""The progress bar: silent in a pipe, one line in a terminal, with the figures that matter."""

from __future__ import annotations

import re

import pytest

from segcompass.io.progress import progress, summary

ROLLOUT = {
    "step": 12,
    "loss": 0.41239,
    "policy": -0.001,
    "kl": 0.03127,
    "reward": 0.6249,
    "reward_format": 0.98,
    "reward_mask": 0.4661,
    "iou": 0.713,
    "length": 91.7,
    "well_formed": 0.98,
    "answers": 128,
    "norm": 0.9,
    "s": 10.0,
}


def test_a_rollout_shows_rewards_length_kl_and_throughput() -> None:
    assert summary(ROLLOUT) == (
        "loss 0.4124 · reward 0.625 · form 0.98 · masks 0.47 · IoU 0.713 · KL 0.0313 · 92 tokens "
        "· 12.8 answers/s"
    )


def test_other_stages_show_what_they_have() -> None:
    row = {"step": 1, "loss": 1.0, "accuracy": None, "norm": 1.0, "s": 0.25}
    assert summary(row) == "loss 1.0000 · 4 steps/s"
    assert summary({**row, "accuracy": 0.5}) == "loss 1.0000 · accuracy 0.500 · 4 steps/s"
    assert summary({"step": 1, "loss": 1.0, "s": 0.0}) == "loss 1.0000"
    assert summary({}) == ""


def test_a_pipe_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("joint") as update:
        update(1, 2, summary(ROLLOUT))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("width", [70, 160])
def test_a_terminal_gets_one_line_of_its_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    with progress("joint") as update:
        update(12, 640, summary(ROLLOUT) + " [bold]")
    out, err = capfd.readouterr()
    assert out == ""
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).rstrip("\n\r").splitlines()[-1].rstrip()
    assert last.startswith("joint") and "12/640" in last and "loss 0.4124" in last
    assert len(last) <= width
    assert last.endswith("…") if width == 70 else last.endswith("answers/s [bold]")
