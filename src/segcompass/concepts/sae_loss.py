"""Eq. 7 and its gradients in one go, within a byte budget, sparse where the activations are.

`SparseAutoencoder.loss` is the plain formulation: autograd keeps every [n, S] tensor and multiplies
all of them densely. This one takes tokens in blocks that fit the budget and writes the gradients
straight away. Once few latents are active, which is so for all but the first steps, only the encode
product stays dense: decoding and the four gradient products read the active entries alone. Values
and gradients equal the plain ones up to float order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder

BUDGET = 1 << 28  # bytes of [rows, S] buffers alive at once
SPARSE_BELOW = 0.05  # share of active entries under which gathering beats dense products


class FusedLoss(NamedTuple):
    """Eq. 7 and what there is to know about the batch; means over tokens."""

    total: Float[Tensor, ""]  # reconstruction + l1 · sparsity; the one with a gradient
    reconstruction: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    errors: Float[Tensor, "n"]  # squared error of each token
    fired: Int[Tensor, "G S"]  # tokens of each group on which each latent exceeds the threshold


def fused_loss(
    sae: SparseAutoencoder,
    z: Float[Tensor, "n D"],
    l1: float,
    *,
    weigh_by_decoder: bool = False,
    groups: Int[Tensor, "n"] | None = None,
    n_groups: int = 1,
    budget: int = BUDGET,
) -> FusedLoss:
    """The loss of :meth:`SparseAutoencoder.loss`, differentiable in the SAE's parameters only.

    Source: Eq. 7.

    Args:
        sae: In float32 or float64, like ``z``.
        z: hidden states of real tokens, in the scale the SAE is trained in.
        l1: coefficient α, >= 0.
        weigh_by_decoder: multiply each activation by the norm of its decoder row.
        groups: to which of ``n_groups`` each token belongs, for counting; all to one by default.
        n_groups: G.
        budget: bytes of [rows, S] buffers alive at once; a single row is always taken.

    Raises:
        ValueError: there are no tokens, or they have another width than the SAE.
    """
    if z.ndim != 2 or len(z) == 0 or z.shape[1] != sae.config.d_in:
        raise ValueError(
            f"expected states [n, {sae.config.d_in}] of at least one token, got {tuple(z.shape)}"
        )
    if groups is None:
        groups = torch.zeros(len(z), dtype=torch.long, device=z.device)
    settings = _Settings(
        l1, weigh_by_decoder, sae.config.apply_b_dec_to_input, sae.config.threshold, budget
    )
    total, *rest = _Fused.apply(  # type: ignore[no-untyped-call]
        sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, z.detach(), groups, n_groups, settings
    )
    return FusedLoss(total, *rest)


class _Settings(NamedTuple):
    l1: float
    weigh: bool
    centre: bool
    threshold: float
    budget: int


class _Fused(torch.autograd.Function):
    """Computes the gradients while it computes the loss; backward only hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        w_enc: Tensor,  # (D, S), contiguous by latent
        b_enc: Tensor,
        w_dec: Tensor,  # (S, D)
        b_dec: Tensor,
        z: Tensor,
        groups: Tensor,
        n_groups: int,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        n, width = len(z), len(w_dec)
        norms = w_dec.norm(dim=-1) if settings.weigh else torch.ones_like(b_enc)
        fired = groups.new_zeros(n_groups, width)
        state = _Pass(w_enc.t(), w_dec, norms, settings.l1 / n, 2.0 / n, fired, settings.threshold)
        errors = z.new_empty(n)
        rows = max(1, settings.budget // (2 * width * z.element_size()))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            centred = z[part] - b_dec if settings.centre else z[part]
            activations = torch.addmm(b_enc, centred, w_enc).relu_()
            error = state.block(activations, centred, z[part] - b_dec, groups[part])
            errors[part] = error.square().sum(-1)
        sparsity = torch.dot(state.mass, norms) / n
        reconstruction = errors.mean()
        if settings.weigh:  # d norm / d row = row / norm
            state.grad_w_dec += w_dec * (state.mass * state.l1 / norms.clamp_min(1e-12))[:, None]
        grad_b_dec = state.grad_b_dec
        if settings.centre:
            grad_b_dec = grad_b_dec - w_enc @ state.grad_b_enc
        ctx.gradients = (state.grad_w_enc.t(), state.grad_b_enc, state.grad_w_dec, grad_b_dec)
        ctx.mark_non_differentiable(reconstruction, sparsity, errors, fired)
        total = reconstruction + settings.l1 * sparsity
        return total, reconstruction, sparsity, errors, fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients were handed out already; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None  # as large as the weights: never twice
        return *(gradient.mul_(grads[0]) for gradient in gradients), None, None, None, None


class _Pass:
    """Gradients that grow block by block. Those of the encoder are kept by latent, [S, D]."""

    def __init__(
        self,
        w_enc: Tensor,  # (S, D)
        w_dec: Tensor,
        norms: Tensor,
        l1: float,  # over the number of tokens, like `scale`
        scale: float,
        fired: Tensor,
        threshold: float,
    ) -> None:
        self.w_dec, self.norms, self.l1, self.scale = w_dec, norms, l1, scale
        self.fired, self.threshold = fired, threshold
        self.grad_w_enc, self.grad_w_dec = torch.zeros_like(w_enc), torch.zeros_like(w_dec)
        self.grad_b_enc, self.mass = torch.zeros_like(norms), torch.zeros_like(norms)
        self.grad_b_dec = norms.new_zeros(w_dec.shape[1])

    def block(self, activations: Tensor, inputs: Tensor, target: Tensor, groups: Tensor) -> Tensor:
        """One block's share of everything; returns its reconstruction errors (r, D).

        Args:
            activations: (r, S).
            inputs: what was encoded, (r, D).
            target: states without ``b_dec``, (r, D).
            groups: (r,).
        """
        if int(activations.count_nonzero()) < SPARSE_BELOW * activations.numel():
            return self._sparse(activations, inputs, target, groups)
        members = F.one_hot(groups, len(self.fired)).t().to(activations.dtype)
        self.fired += (members @ (activations > self.threshold).to(activations.dtype)).long()
        error = torch.addmm(target, activations, self.w_dec, beta=-1)
        signal = error * self.scale
        self.mass += activations.sum(0)
        self.grad_w_dec.addmm_(activations.t(), signal)
        inner = torch.addmm(self.norms, signal, self.w_dec.t(), beta=self.l1)
        inner.masked_fill_(activations == 0, 0)
        self.grad_w_enc.addmm_(inner.t(), inputs)
        self._biases(inner.sum(0), signal)
        return error

    def _sparse(
        self, activations: Tensor, inputs: Tensor, target: Tensor, groups: Tensor
    ) -> Tensor:
        count, width = activations.shape
        active = activations.flatten().nonzero().squeeze(-1)
        rows, columns = active.div(width, rounding_mode="floor"), active.remainder(width)
        with torch.enable_grad():  # the bag's own backward is the quickest sum over gathered rows
            values = activations.flatten()[active].requires_grad_()
            starts = torch.searchsorted(rows, torch.arange(count, device=rows.device))
            decoded = _bags(columns, self.w_dec, starts, values)
            error = decoded.detach() - target
            signal = error * self.scale
            (inner,) = torch.autograd.grad(decoded, values, signal)
        values = values.detach()
        inner = inner.add(self.norms[columns], alpha=self.l1)
        seen = (groups[rows] * width + columns)[values > self.threshold]
        self.fired += torch.bincount(seen, minlength=self.fired.numel()).view_as(self.fired)
        columns, order = torch.sort(columns, stable=True)  # now by latent, then by token
        rows, values, inner = rows[order], values[order], inner[order]
        starts = torch.searchsorted(columns, torch.arange(width, device=rows.device))
        ones = signal.new_ones(count, 1)
        self.mass += _bags(rows, ones, starts, values).squeeze(-1)
        self.grad_w_dec += _bags(rows, signal, starts, values)
        self.grad_w_enc += _bags(rows, inputs, starts, inner)
        self._biases(_bags(rows, ones, starts, inner).squeeze(-1), signal)
        return error

    def _biases(self, latents: Tensor, signal: Tensor) -> None:
        self.grad_b_enc += latents
        self.grad_b_dec += signal.sum(0)


def _bags(indices: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a table's rows; bag i goes from ``starts[i]`` to the next start."""
    return F.embedding_bag(indices, table, starts, mode="sum", per_sample_weights=weights)
