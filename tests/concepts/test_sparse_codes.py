"""Triplets laid out, selected, spread and stacked equal the dense matrix they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcompass.concepts.sparse_codes import (
    concat,
    from_dense,
    offsets,
    select_columns,
    select_rows,
    spread_rows,
    to_dense,
    to_host,
)
from segcompass.types import SparseCodes

HAND_MADE = torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])


def random_dense(seed: int, rows: int, columns: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).relu()


def test_from_dense_lists_entries_above_the_threshold_in_order() -> None:
    codes = from_dense(HAND_MADE, threshold=0.5)
    assert codes.rows.tolist() == [0, 2, 2]
    assert codes.columns.tolist() == [1, 0, 2]
    assert codes.values.tolist() == [2.0, 1.0, 3.0]
    assert (codes.n_rows, codes.n_columns) == (3, 3)


def test_offsets_make_rows_without_codes_empty_bags() -> None:
    assert offsets(from_dense(HAND_MADE)).tolist() == [0, 2, 2]
    assert offsets(from_dense(torch.zeros(2, 3))).tolist() == [0, 0]


def test_round_trip_is_differentiable_where_entries_are_kept() -> None:
    dense = HAND_MADE.clone().requires_grad_()
    (to_dense(from_dense(dense, threshold=0.5)) * 2).sum().backward()
    assert dense.grad is not None
    assert dense.grad.tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), keep=st.lists(st.booleans(), min_size=1, max_size=8))
def test_selecting_and_spreading_rows_equals_indexing(seed: int, keep: list[bool]) -> None:
    dense, mask = random_dense(seed, len(keep)), torch.tensor(keep)
    selected = select_rows(from_dense(dense), mask)
    torch.testing.assert_close(to_dense(selected), dense[mask], rtol=0, atol=0)
    spread = spread_rows(selected, mask)
    torch.testing.assert_close(to_dense(spread), dense * mask[:, None], rtol=0, atol=0)
    assert bool((spread.rows.diff() >= 0).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), keep=st.lists(st.booleans(), min_size=9, max_size=9))
def test_selecting_columns_equals_zeroing(seed: int, keep: list[bool]) -> None:
    dense, mask = random_dense(seed, 5), torch.tensor(keep)
    selected = select_columns(from_dense(dense), mask)
    torch.testing.assert_close(to_dense(selected), dense * mask, rtol=0, atol=0)
    with pytest.raises(ValueError, match="8 entries, the codes have 9 concepts"):
        select_columns(selected, mask[:8])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_concat_equals_stacking(seed: int, sizes: list[int]) -> None:
    parts = [random_dense(seed + i, size) for i, size in enumerate(sizes)]
    stacked = concat([from_dense(part) for part in parts])
    torch.testing.assert_close(to_dense(stacked), torch.cat(parts), rtol=0, atol=0)


def test_masks_that_do_not_fit_are_refused() -> None:
    codes = from_dense(HAND_MADE)
    with pytest.raises(ValueError, match="2 entries, the codes have 3 rows"):
        select_rows(codes, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="room for 1 rows, the codes have 3"):
        spread_rows(codes, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="boolean mask"):
        select_rows(codes, torch.tensor([0, 1, 2]))


def test_codes_of_different_dictionaries_do_not_stack() -> None:
    with pytest.raises(ValueError, match=r"concept counts \[3, 4\]"):
        concat([from_dense(HAND_MADE), from_dense(torch.ones(1, 4))])


def test_to_host_leaves_plain_float32() -> None:
    dense = HAND_MADE.to(torch.bfloat16).requires_grad_()
    host: SparseCodes = to_host(from_dense(dense))
    assert host.values.dtype == torch.float32
    assert not host.values.requires_grad
