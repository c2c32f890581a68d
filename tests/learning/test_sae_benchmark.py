"""The SAE training benchmark: both sides learn the same, and it prints what it promises."""

from __future__ import annotations

import json
import sys

import measuring
import pytest
import sae_train

SIZES = {"--steps": 24, "--batch": 128, "--d-in": 16, "--d-sae": 64, "--shards": 4, "--active": 3}
SMALL = [str(part) for pair in SIZES.items() for part in pair] + ["--warmup", "4"]


def test_prints_one_json_object_with_every_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # installed or not: the plain side here
    measuring.report(sae_train.measure, sae_train.parse([*SMALL, "--json"]))
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "sae_train" and result["machine"]
    assert result["settings"]["baseline"] == "plain dense formulation"
    rows = {row["measure"]: row for row in result["rows"]}
    assert set(rows) == {"tokens_per_second", "tokens_per_second_late", "memory"}
    for name, row in rows.items():
        better = (
            (row["baseline"], row["ours"]) if name == "memory" else (row["ours"], row["baseline"])
        )
        assert row["ratio"] == pytest.approx(better[0] / better[1])
    learned = [result["settings"][f"{side}_learned"] for side in ("ours", "baseline")]
    assert learned[0] == pytest.approx(learned[1], rel=1e-3)  # the same trajectory


def test_saelens_is_the_other_side_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    pytest.importorskip("sae_lens", reason="pip install segcompass[interop]")
    settings = sae_train.measure(sae_train.parse(SMALL))["settings"]
    assert settings["baseline"].startswith("sae-lens 6.")
    assert settings["ours_learned"] == pytest.approx(settings["baseline_learned"], rel=1e-3)


def test_sides_that_learned_different_things_are_caught() -> None:
    good = {"explained_variance": 0.9, "l0": 20.0}
    sae_train.check_equal(good, {"explained_variance": 0.91, "l0": 20.1})
    for bad in (
        {**good, "explained_variance": 0.8},
        {**good, "l0": 25.0},
        {**good, "l0": float("nan")},
    ):
        with pytest.raises(SystemExit, match="learned different things"):
            sae_train.check_equal(bad, good)
