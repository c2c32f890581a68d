"""The frozen reference of the KL penalty: the policy as it was when reinforcement began (Eq. 11).

It is copied when the stage begins. Where supervised steps come before the first rollouts, it takes
over the policy's weights after them: held to the weights from before, the policy would be drawn
away from what it has just been taught. These weights are written down, so that a resumed run has
the same reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from segcompass.io.errors import CheckpointError
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.optimizer import first_row, local_part
from segcompass.learning.engine.states import SavedState, latest_state, write_state
from segcompass.reasoning.policy import Policy

FOLDER = "reference"  # in the stage's folder


@torch.no_grad()
def renew(reference: Policy, policy: Policy, folder: Path, step: int, world: World) -> None:
    """Give the reference the policy's weights of now, and keep them; all ranks call it.

    Args:
        reference: From `freezing.frozen_copy`, sharded like the policy.
        policy: That trains.
        folder: Of the stage.
        step: Steps that were taken.
        world: All ranks.

    Raises:
        StateError: if they cannot be written.
    """
    kept = folder / FOLDER
    tensors, starts = {}, {}
    for name, frozen, now in _pairs(reference, policy):
        frozen.copy_(local_part(now))
        tensors[name] = frozen
        if isinstance(now.data, DTensor):
            starts[name] = first_row(now.data)
    kept.mkdir(parents=True, exist_ok=True)
    write_state(kept, step, tensors, starts, world)


@torch.no_grad()
def restore(reference: Policy, policy: Policy, folder: Path) -> None:
    """Take up the weights that were kept, whatever number of ranks wrote them.

    Raises:
        CheckpointError: if there are none, or they are damaged.
    """
    path = latest_state(folder / FOLDER)
    if path is None:
        raise CheckpointError(
            f"{folder} has no {FOLDER}/: nothing tells which policy reinforcement began with; "
            "delete the folder to start the stage anew"
        )
    with SavedState(path) as state:
        for name, frozen, now in _pairs(reference, policy):
            start = first_row(now.data) if isinstance(now.data, DTensor) else None
            rows = None if start is None else (start, start + len(frozen))
            frozen.copy_(state.read(name, rows))


def _pairs(reference: Policy, policy: Policy) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, this rank's part in the reference, and the policy's own, of all that trains."""
    frozen = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            yield name, local_part(frozen[name]), parameter
