"""The alignment benchmark checks itself, counts memory rightly, and prints what it promises."""

from __future__ import annotations

import json

import alignment
import measuring
import pytest
import torch

SMALL = ["--tokens", "64", "--d-in", "16", "--d-sae", "4096", "--width", "8", "--active", "4"]


def test_prints_one_json_object_with_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    options = alignment.parse([*SMALL, "--chunk", "128", "--repeats", "1", "--json"])
    measuring.report(alignment.measure, options)
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "alignment" and result["machine"]
    rows = {row["measure"]: row for row in result["rows"]}
    assert {
        "time_vs_encode_product",
        "time_vs_dense",
        "time_vs_release",
        "memory_vs_dense",
    } <= set(rows)
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["baseline"] / row["ours"])
    assert 3.5 < result["settings"]["active"] < 4.5
    # dense keeps activations and two gradients of [64, 4096] floats at its peak
    assert rows["memory_vs_dense"]["baseline"] >= 3 * 64 * 4096 * 4
    assert rows["memory_vs_dense"]["ratio"] > 5


def test_a_side_that_computes_something_else_is_caught() -> None:
    case = alignment.build_case(alignment.parse(SMALL))
    assert alignment.check_equal(case) < 1e-5
    with pytest.raises(SystemExit, match="differ"):
        alignment.check_equal(case._replace(threshold=case.threshold * 0.9))


def test_only_blocks_taken_and_given_back_count() -> None:
    changes = [
        (1, 100),  # taken, given back below
        (2, 50),  # remains
        (3, 30),
        (9, -500),  # older than the call
        (1, -100),
        (1, 40),  # the same address again
        (3, -30),
        (1, -40),
    ]
    assert measuring.peak_of_freed(changes) == 130


def test_transient_memory_is_what_the_allocator_saw() -> None:
    x = torch.ones(1000)  # 4,000 bytes

    def run() -> torch.Tensor:
        a = x + 1  # temporary
        b = a * 2  # temporary, beside a
        del a
        return b + 1  # kept

    assert measuring.transient_bytes(run) == pytest.approx(8000, abs=200)
