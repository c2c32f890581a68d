"""A joint step's memory on one GPU and its work, put together from the formulas of `costs.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from segcompass.learning.planning import costs
from segcompass.learning.planning.workload import Workload

PHASES = ("sampling", "policy pass", "optimizer step")


@dataclass(frozen=True)
class Hardware:
    """A GPU's speed, as far as hours are estimated from it. Default: A100 80 GB, data sheet."""

    name: str = "A100 80 GB"
    flops: float = 312e12  # dense bf16, a second
    bandwidth: float = 2.0e12  # bytes a second
    utilisation: float = 0.35  # share of `flops` that long products are assumed to reach


@dataclass(frozen=True)
class Part:
    """Bytes on one GPU; ``phase`` is None for what always lies there."""

    name: str
    bytes: float
    phase: str | None = None


def total(parts: Sequence[Part], phase: str | None) -> float:
    """Bytes of one phase, or of what always lies there."""
    return sum(p.bytes for p in parts if p.phase == phase)


def peak(parts: Sequence[Part]) -> float:
    """Bytes that always lie there, and those of the hungriest phase."""
    return total(parts, None) + max(total(parts, phase) for phase in PHASES)


def memory_of(work: Workload) -> tuple[Part, ...]:
    """Bytes on one GPU by part."""
    return tuple(p for p in (*_always(work), *_phases(work)) if p.bytes > 0)


def _always(work: Workload) -> Iterator[Part]:
    """What lies on a GPU all the time.

    One GPU keeps bf16 weights beside fp32 masters; over several, what trains is kept in fp32 only
    and gathered in bf16 (`sharding.shard`). The frozen layers of the reference are shared with the
    policy on one GPU; over several it is sharded as a whole.
    """
    shape, s, shards = work.shape, work.s, work.gpus
    frozen = shape.weights - (0 if work.lora else work.trained)
    working = work.trained * s if shards == 1 else 0
    masters = costs.MASTER_BYTES if s < 4 or shards > 1 else 0
    yield Part("policy: frozen weights", frozen * s / shards)
    yield Part("policy: trained weights", working)
    yield Part("policy: fp32 masters", work.trained * masters / shards)
    yield Part("policy: Adam moments", work.trained * costs.ADAM_BYTES / shards)
    if work.reference_copy:
        copied = shape.upper_weights if shards == 1 else shape.weights
        yield Part("reference policy", copied * s / shards)
    if shards > 1:
        roots = shape.root_weights * (2 if work.reference_copy else 1)
        yield Part("policy: gathered layers and root", (_units(work) + roots) * s)
    yield Part("sparse autoencoder", 4 * work.sae_weights)
    if not work.precomputed:
        yield Part("segmenter: image encoder", 4 * work.encoder_weights)
    yield Part("head and mask decoder", 4 * work.head_weights)
    yield Part("head and mask decoder: Adam moments", costs.ADAM_BYTES * work.head_trained)


def _units(work: Workload) -> float:
    """Weights of the layers that are gathered at a time: the one at work, and the next one."""
    return 2 * work.shape.upper_weights / max(1, work.shape.upper)


def _phases(work: Workload) -> Iterator[Part]:
    """What comes and goes with the phases of a step."""
    shape, s, n, length = work.shape, work.s, work.micro_rows, work.length
    sampling, passing, stepping = PHASES
    if work.samples:
        if work.gpus > 1:  # `sharding.gathered`
            rest = shape.weights - shape.root_weights - _units(work)
            yield Part("policy: all else gathered", rest * s, sampling)
        cache = costs.cache_bytes(shape, work.sampled_rows, length, s)
        yield Part("key-value cache", cache, sampling)
        tapped = costs.tapped_bytes(shape, work.sampled_rows, length, s)
        yield Part("tapped states", tapped, sampling)
    if not work.precomputed:
        yield Part("image encoder pass", work.encoder_pass_bytes, sampling)
    if work.trained:
        activations = costs.activation_bytes(shape, n, length, s, kept=not work.checkpointing)
        yield Part("policy activations", activations, passing)
    yield Part("log-prob chunk", costs.log_prob_bytes(shape, s), passing)
    yield Part("image keys and features", work.picture_bytes, passing)
    yield Part("head activations", work.head_bytes * n, passing)
    yield Part("mask decoder activations", work.decoder_bytes * n, passing)
    summed = 4 * (work.trained / work.gpus + work.head_trained)
    gradients = summed
    if work.gpus == 1 and s < 4:  # made in the working precision; summed when a pass is over
        gradients += work.trained * (s if n < work.rows else s - 4)
    yield Part("gradients", gradients, passing)
    if work.gpus > 1:  # of one layer before the ranks share them out, as made and in fp32
        yield Part("gradients of a layer", work.trained / shape.upper * (s + 4), passing)
    yield Part("gradients, roots of second moments", 2 * summed, stepping)


def flops_of(work: Workload) -> dict[str, float]:
    """Operations of one step by part, over all GPUs, at the limits of prompt and answer."""
    shape, n, length = work.shape, work.all_rows, work.length
    tokens = n * length
    answered = n * work.answer
    once = costs.layers_flops(shape, shape.layers, tokens, length)
    read = costs.logits_flops(shape, answered)
    through = 0.0
    if work.trained:
        through = costs.backward_flops(shape, tokens, length, lora=work.lora is not None)
        through += work.checkpointing * costs.layers_flops(shape, shape.upper, tokens, length)
    times = 2 if work.samples else 1  # once for the rewards, once for the loss
    flops = {
        "sampling": work.samples * costs.rollout_flops(shape, n, work.prompt, work.answer),
        "policy, forward": once + read,
        # The head's logits are made again for the backward pass, and only their input trains.
        "policy, backward": through + 2 * read,
        "reference policy": (once + read) if work.penalised else 0.0,
        "sparse autoencoder": times * work.sae_flops * tokens,
        "head": (times + 2) * work.head_flops * n,
        "mask decoder": work.decoder_flops * n * (3 * work.targets + work.slots * (times - 1)),
        "vision tower": 0.0 if work.precomputed else work.vision_flops * work.questions,
        "image encoder": 0.0 if work.precomputed else work.encoder_flops * work.questions,
    }
    return {name: count for name, count in flops.items() if count}


def step_seconds(work: Workload, flops: dict[str, float], hardware: Hardware) -> float:
    """A rough estimate: products at ``utilisation``, sampling bound by reading weights and cache.

    Communication, data and the optimizer are left out, so it is rather a lower bound.
    """
    products = sum(count for name, count in flops.items() if name != "sampling")
    seconds = products / (work.gpus * hardware.flops * hardware.utilisation)
    if not work.samples:
        return seconds
    cache = costs.cache_bytes(work.shape, work.rows, work.prompt + work.answer // 2, work.s)
    weights = work.shape.weights * work.s * math.ceil(work.rows / work.sampled_rows)
    token = (weights + cache) / hardware.bandwidth
    prefill = costs.layers_flops(
        work.shape, work.shape.layers, work.rows * work.prompt, work.prompt
    )
    return seconds + work.answer * token + prefill / (hardware.flops * hardware.utilisation)
