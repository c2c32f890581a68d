"""The concentration tokens' own rows of the language head, which train.

The tables stay frozen: training them whole would cost gigabytes and move every word. But a new
token's row starts as a mean of other words' rows, and a mean of logits is never the largest of
them, so a policy that cannot move these rows would never learn to write its tokens. They live
beside the tables, in fp32 and whole on every rank, and stand in for the tables' rows by hooks.

The embedding's rows train only if the lower layers do. Elsewhere they are held: prompts may name
the tokens, so the SAE reads what they say, and their gradient would run through every frozen layer.
Tables that were tied part for that, for good: one row cannot both train and be held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segcompass.reasoning.policy import Policy


class TokenRows(nn.Module):
    """Rows for the K concentration tokens in place of a policy's own, (K, D) each.

    Args:
        policy: Whole, not sharded yet. Its hooks are set here; it holds this module afterwards, as
            ``policy.token_rows``.
        embedded: Whether the embedding's rows train as well. If not, tied tables are parted.
    """

    ids: Tensor

    def __init__(self, policy: Policy, *, embedded: bool) -> None:
        super().__init__()
        if not embedded:
            _part_tables(policy)
        read, write = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
        device = read.weight.device
        ids = torch.tensor(policy.prompt.slot_ids, device=device)
        self.register_buffer("ids", ids, persistent=False)
        tied = write.weight is read.weight
        self.embed = nn.Parameter(read.weight.detach()[ids].float()) if embedded else None
        self.lm_head = None if tied else nn.Parameter(write.weight.detach()[ids].float())
        self.on = True
        if embedded:
            read.register_forward_hook(self._reads)
        write.register_forward_hook(self._writes)
        policy.token_rows = self

    @property
    def written(self) -> nn.Parameter:
        """The rows that logits are made with; tied tables have one set for both."""
        rows = self.embed if self.lm_head is None else self.lm_head
        assert rows is not None
        return rows

    def _reads(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.on or self.embed is None:
            return None
        at = inputs[0][..., None] == self.ids
        rows = at.to(self.embed.dtype) @ self.embed
        return torch.where(at.any(-1, keepdim=True), rows.to(output.dtype), output)

    def _writes(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        output[..., self.ids] = (inputs[0] @ self.written.to(inputs[0].dtype).T).to(output.dtype)
        return output

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the tables' own rows are used: those from before training."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def into(self, table: Tensor, rows: nn.Parameter) -> Tensor:
        """A copy of a table with these rows in it."""
        whole = table.full_tensor() if isinstance(table, DTensor) else table
        return whole.detach().index_copy(0, self.ids.to(whole.device), rows.to(whole))

    def tables(self, policy: Policy) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """The tables whose rows train: name, weight, the rows for it. Tied ones are one."""
        rows = {id(policy.model.get_output_embeddings().weight): self.written}
        if self.embed is not None:
            rows[id(policy.model.get_input_embeddings().weight)] = self.embed
        for name, weight in policy.model.named_parameters():
            if id(weight) in rows:
                yield name, weight, rows[id(weight)]


def _part_tables(policy: Policy) -> None:
    """Give the language head a table of its own, also in what is saved."""
    read, write = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    if write.weight is not read.weight:
        return
    write.weight = nn.Parameter(read.weight.detach().clone(), requires_grad=False)
    for config in (policy.model.config, policy.model.config.get_text_config()):
        config.tie_word_embeddings = False


def with_token_rows(policy: Policy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights of ``policy.model`` with the trained rows in their tables.

    Args:
        policy: It may be sharded, and stays as it is.
        state: Its weights by name; tied ones are one tensor, and stay so. May be empty.
    """
    rows: TokenRows | None = policy.token_rows
    if rows is None or not state:
        return dict(state)
    changed = {
        state[name].data_ptr(): rows.into(state[name], new) for name, _, new in rows.tables(policy)
    }
    return {name: changed.get(value.data_ptr(), value) for name, value in state.items()}
