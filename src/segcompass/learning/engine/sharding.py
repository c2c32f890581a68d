"""The policy over many processes with FSDP2: sharded weights, gathered layer by layer.

Call order: freeze, :func:`shard`, then build the `Loop`. Whatever copies the policy (a frozen
reference) does so before, and is sharded for itself. All ranks run the policy the same number of
times, and in a step with gradient add :func:`anchor` to their loss.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from segcompass.learning.engine.distributed import World
from segcompass.reasoning.policy import Policy


def shard(policy: Policy, world: World) -> None:
    """Spread a policy's weights over all ranks; with one rank, leave it as it is.

    Gathered at a time: a decoder layer, a block or another part of the vision tower, and as the
    root everything else: embeddings, final norm and language head. The root stays gathered
    from the first pass of a step to its backward pass, so that `Policy.language_logits` is right in
    between. A policy in bf16 computes in bf16, but what trains is kept in fp32, and so are the sums
    of gradients.
    """
    if world.size == 1:
        return
    # Some parts of vision towers return views. Nothing changes those in place, the warning's case.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    dtype = policy.model.dtype
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else mixed
    mesh = init_device_mesh(world.device.type, (world.size,))
    units = _units(policy)
    # A few rows that train are cheaper whole on every rank, in fp32.
    beside = set(policy.token_rows.parameters()) if policy.token_rows is not None else set()
    for unit in [*units, policy]:
        for parameter in unit.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        inner = unit in units
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=inner,
            ignored_params=beside,
        )
    root: Any = policy
    # Ranks must agree on what has a gradient: here also what no loss reaches, such as an unused
    # language head, has one of 0. (So it decays if it is to train, unlike on one process.)
    root.set_reduce_scatter_unused_params(True)
    register_fsdp_forward_method(policy, "generate")
    # FSDP takes for the root what runs first, which could be the vision tower by itself.
    root.run_nothing = lambda: None
    register_fsdp_forward_method(policy, "run_nothing")
    root.run_nothing()
    del root.run_nothing
    root.reshard()


def anchor(hidden: Float[Tensor, "B L D"]) -> Float[Tensor, ""]:
    """0, from the policy's last states; with it, a loss reaches every layer.

    Layers sum their gradients over ranks on their way back. If one rank's loss came from the SAE's
    layer only (no answer of its slice was well formed, say), its sums would meet those of other
    layers, and all ranks would hang.
    """
    return hidden[:, :0].sum()


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Keep what the policy gathers until the end of the block, as long as no weight changes.

    Sampling gathers every layer for every token otherwise. Costs the memory of a whole policy in
    its computing precision.
    """
    units = [m for m in _units(policy) if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def full_state(policy: Policy, world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights of ``policy.model`` by name, as ``dtype``, on the CPU of rank 0.

    All ranks must call it; the others get nothing. Tied weights are one tensor, as they were.
    """
    whole: dict[int, Tensor | None] = {}  # by parameter, so that tied ones are gathered once
    for value in policy.model.state_dict(keep_vars=True).values():
        if id(value) not in whole:
            full = value.full_tensor() if isinstance(value, DTensor) else value
            kind = dtype if full.is_floating_point() else full.dtype
            whole[id(value)] = full.detach().to("cpu", kind) if world.is_main else None
    names = policy.model.state_dict(keep_vars=True)
    return {name: full for name, value in names.items() if (full := whole[id(value)]) is not None}


def enable_checkpointing(policy: Policy) -> None:
    """Compute every block's inner states anew in the backward pass instead of keeping them.

    The forward method is replaced inside the block: hooks on it, FSDP's and those that read states,
    run once, and `generate` with its cache is not concerned.
    """
    for block in _blocks(policy):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(policy: Policy) -> list[nn.Module]:
    """Decoder layers and vision blocks."""
    rows = [m for m in policy.backbone.vision.modules() if isinstance(m, nn.ModuleList)]
    blocks = [block for row in [policy.backbone.layers, *rows] for block in row]
    return [block for block in blocks if not _holds_blocks(block)]


def _units(policy: Policy) -> list[nn.Module]:
    """What is gathered at a time, but for the root: all blocks, and what stands beside them.

    Models themselves are left out: transformers knows them by their class, which FSDP replaces.
    """
    return [*policy.backbone.layers, *_leaves(policy.backbone.vision)]


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if _holds_blocks(module):
        for child in module.children():
            yield from _leaves(child)
    elif any(True for _ in module.parameters()):
        yield module


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(m, nn.ModuleList) for m in module.modules())
