"""Working with sparse codes: (token, concept, activation) triplets sorted by token.

The record itself is :class:`segcompass.types.SparseCodes`. Everything here keeps its one
invariant, rows in ascending order, and never builds a tensor of n_rows × n_columns, except
``to_dense``, which exists for tests and for looking at a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from segcompass.types import SparseCodes


def from_dense(activations: Float[Tensor, "n S"], threshold: float = 0.0) -> SparseCodes:
    """Keep the entries of a dense activation matrix that exceed a threshold.

    Source: Eq. 4, with ``> threshold`` in place of ``!= 0``; the two agree at threshold 0 because
    activations are never negative. The values stay differentiable in ``activations``.

    Args:
        activations: SAE activations of n tokens.
        threshold: smallest activation left out, >= 0, in the units of the activations.
    """
    rows, columns = (activations.detach() > threshold).nonzero(as_tuple=True)
    n_rows, n_columns = activations.shape
    return SparseCodes(rows, columns, activations[rows, columns], n_rows, n_columns)


def to_dense(codes: SparseCodes) -> Float[Tensor, "n S"]:
    """Spell the codes out as a dense matrix; differentiable in the values."""
    dense = codes.values.new_zeros(codes.n_rows, codes.n_columns)
    return dense.index_put((codes.rows, codes.columns), codes.values)


def offsets(codes: SparseCodes) -> Int[Tensor, "n"]:
    """Where each row starts among the triplets, the form ``embedding_bag`` reads.

    A row without codes starts where the next one starts, which makes it an empty bag.
    """
    every_row = torch.arange(codes.n_rows, device=codes.rows.device)
    return torch.searchsorted(codes.rows, every_row)


def select_rows(codes: SparseCodes, keep: Bool[Tensor, "n"]) -> SparseCodes:
    """Keep some rows and close the gaps: row r becomes the number of kept rows before it.

    Args:
        codes: codes of n rows.
        keep: which rows stay.

    Raises:
        ValueError: ``keep`` is not a boolean mask with one entry per row.
    """
    _check_mask(keep)
    if keep.shape[0] != codes.n_rows:
        raise ValueError(
            f"the mask has {keep.shape[0]} entries, the codes have {codes.n_rows} rows; "
            "pass one entry per row"
        )
    stays = keep[codes.rows]
    new_index = keep.cumsum(0) - 1
    return codes._replace(
        rows=new_index[codes.rows[stays]],
        columns=codes.columns[stays],
        values=codes.values[stays],
        n_rows=int(keep.sum()),
    )


def spread_rows(codes: SparseCodes, keep: Bool[Tensor, "n"]) -> SparseCodes:
    """Undo ``select_rows``: row i moves to the place of the i-th kept row, the others are empty.

    This is how codes of the real tokens alone (``states[valid]``) are laid out over the padded
    batch without encoding the padding: ``spread_rows(codes, valid.flatten())``.

    Raises:
        ValueError: the mask keeps another number of rows than the codes have.
    """
    _check_mask(keep)
    places = keep.nonzero().squeeze(-1)
    if places.shape[0] != codes.n_rows:
        raise ValueError(
            f"the mask has room for {places.shape[0]} rows, the codes have {codes.n_rows}; "
            "pass the mask the encoded states were selected with"
        )
    return codes._replace(rows=places[codes.rows], n_rows=keep.shape[0])


def select_columns(codes: SparseCodes, keep: Bool[Tensor, "S"]) -> SparseCodes:
    """Keep some concepts; the others fall silent, and the numbering stays.

    Raises:
        ValueError: ``keep`` is not a boolean mask with one entry per concept.
    """
    _check_mask(keep)
    if keep.shape[0] != codes.n_columns:
        raise ValueError(
            f"the mask has {keep.shape[0]} entries, the codes have {codes.n_columns} concepts; "
            "pass one entry per concept"
        )
    stays = keep[codes.columns]
    return codes._replace(
        rows=codes.rows[stays], columns=codes.columns[stays], values=codes.values[stays]
    )


def concat(parts: Sequence[SparseCodes]) -> SparseCodes:
    """Stack the rows of several codes over the same concepts.

    Raises:
        ValueError: no parts, or parts over different numbers of concepts.
    """
    widths = {part.n_columns for part in parts}
    if len(widths) != 1:
        raise ValueError(
            f"expected codes over one dictionary, got concept counts {sorted(widths)}; "
            "encode all parts with the same sparse autoencoder"
        )
    rows, n_rows = [], 0
    for part in parts:
        rows.append(part.rows + n_rows)
        n_rows += part.n_rows
    return SparseCodes(
        torch.cat(rows),
        torch.cat([part.columns for part in parts]),
        torch.cat([part.values for part in parts]),
        n_rows,
        widths.pop(),
    )


def to_host(codes: SparseCodes) -> SparseCodes:
    """Detach the codes and move them to the CPU as float32, as ``Prediction`` carries them."""
    return codes._replace(
        rows=codes.rows.cpu(),
        columns=codes.columns.cpu(),
        values=codes.values.detach().float().cpu(),
    )


def _check_mask(keep: Tensor) -> None:
    if keep.dtype != torch.bool or keep.ndim != 1:
        raise ValueError(
            f"expected a flat boolean mask, got {keep.dtype} of shape {tuple(keep.shape)}; "
            "flatten the batch first"
        )
