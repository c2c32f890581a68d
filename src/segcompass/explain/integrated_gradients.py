"""Which (token, concept) pairs carried a slot's confidence and mask, by integrated gradients.

Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (arXiv:1703.01365). The path
runs from no concepts (y = 0 on every token) straight to the codebook's output y; the scalars are
read behind the codebook's encoder, the fusion, the slot mapper and the mask decoder. Because
y_t = Σ_j h_tj C_j is additive, the gradient of a token splits exactly among its concepts.

The integral is the sum of Gauss-Legendre panels. What a panel should add up to is known, the
scalar at its end less that at its start, so its error is measured and the worst panel is halved
until the whole is good enough. The blocks normalise before they attend, which makes scalars change
fast where the concepts are still faint: the first panels are laid geometrically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segcompass.explain.replay import HeadInputs
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.types import SparseCodes

EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)  # of the first panels
NODES = 6  # of one panel
MOST_PANELS = 48
TOLERANCE = 0.01  # of the change: sum of the panels' errors at which to stop
NEGLIGIBLE = 1e-2  # logits; smaller changes are held to the tolerance of this one


@dataclass(frozen=True)
class Attribution:
    """A change of one scalar, shared out among the (token, concept) pairs of the codes."""

    weights: np.ndarray  # float64 (nnz,), in logits, in the order of the codes
    value: float  # of the scalar, with all concepts
    baseline: float  # of the scalar, without any

    @property
    def change(self) -> float:
        """What the concepts did to the scalar, in logits."""
        return self.value - self.baseline

    @property
    def residual(self) -> float:
        """The part of the change that the weights do not add up to, in logits."""
        return self.change - float(self.weights.sum())

    @property
    def residual_share(self) -> float:
        """The residual as a share of the change, >= 0; of :data:`NEGLIGIBLE` where that is more."""
        return abs(self.residual) / max(abs(self.change), NEGLIGIBLE)


class _Panel(NamedTuple):
    start: float
    end: float
    weights: Float[Tensor, "n nnz"]
    errors: Float[Tensor, "n"]


def integrated_gradients(
    interface: ConceptSlots, inputs: HeadInputs, slots: Sequence[int]
) -> tuple[list[Attribution], list[Attribution]]:
    """Attribute the confidence logits and the masks of some slots to (token, concept) pairs.

    A mask is summed up as its mean logit, at the decoder's resolution, over the cells it covers
    with all concepts there; an empty mask by its mean logit over the whole frame.

    Args:
        interface: head and decoder.
        inputs: of one picture.
        slots: which ones, at least one.

    Returns:
        For every slot the attribution of its confidence logit, and that of its mask.
    """
    path = _Path(interface, inputs, slots)
    first, last = path.values(0.0), path.values(1.0)
    allowed = TOLERANCE * (last - first).abs().clamp(min=NEGLIGIBLE)
    panels = _until_complete(path, allowed)
    weights = torch.stack([panel.weights for panel in panels]).sum(0).cpu().numpy()
    found = [
        Attribution(row, float(value), float(baseline))
        for row, value, baseline in zip(weights, last, first, strict=True)
    ]
    return found[: len(slots)], found[len(slots) :]


def _until_complete(path: _Path, allowed: Float[Tensor, "n"]) -> list[_Panel]:
    """Panels over [0, 1] whose errors stay within what is allowed, or as many as may be."""
    panels = [path.panel(start, end) for start, end in pairwise(EDGES)]
    while len(panels) < MOST_PANELS:
        errors = torch.stack([panel.errors.abs() for panel in panels]) / allowed  # (panels, n)
        if (errors.sum(0) <= 1).all():
            break
        worst = panels.pop(int(errors.amax(1).argmax()))
        middle = (worst.start + worst.end) / 2
        panels += [path.panel(worst.start, middle), path.panel(middle, worst.end)]
    return panels


class _Path:
    """The scalars and their gradients on the way from no concepts to all of them."""

    def __init__(self, interface: ConceptSlots, inputs: HeadInputs, slots: Sequence[int]) -> None:
        self.interface, self.inputs = interface, inputs
        self.slots = torch.tensor(list(slots), device=inputs.keys.device)
        self._known: dict[float, Tensor] = {}  # values: panels share their ends
        with torch.no_grad():
            self.y = interface.codebook.embed(inputs.codes)  # (L, C)
            _, low_res = self._run(self.y.expand(len(slots), -1, -1))
            covered = low_res > 0  # (n, 4h, 4w)
            covered |= ~covered.any(-1, keepdim=True).any(-2, keepdim=True)
        self.regions = covered / covered.sum((-1, -2), keepdim=True)
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        self.nodes, self.node_weights = (nodes + 1) / 2, weights / 2  # over [0, 1]

    def scalars(self, y: Float[Tensor, "Nn L C"]) -> tuple[Float[Tensor, "N n"], ...]:
        """Confidence logits of the slots, and mean logits of their masks; each has its own y."""
        confidence, low_res = self._run(y)
        low_res = low_res.view(-1, *self.regions.shape)
        masks = (low_res * self.regions).sum((-1, -2))
        return confidence.view_as(masks), masks

    @torch.no_grad()
    def values(self, at: float) -> Float[Tensor, "2n"]:
        """The scalars at one point of the path, in double precision."""
        if at not in self._known:
            y = (at * self.y).expand(len(self.slots), -1, -1)
            self._known[at] = torch.cat(self.scalars(y), 1)[0].double()
        return self._known[at]

    def panel(self, start: float, end: float) -> _Panel:
        """Integrate from ``start`` to ``end``."""
        at = self.y.new_tensor(start + (end - start) * self.nodes)
        node_weights = self.y.new_tensor((end - start) * self.node_weights)
        y = (at[:, None, None] * self.y).repeat_interleave(len(self.slots), dim=0).requires_grad_()
        confidences, masks = self.scalars(y)  # slots share no y: one pass back serves all of them
        rows: list[Tensor] = []
        for total, more in ((confidences.sum(), True), (masks.sum(), False)):
            (gradient,) = torch.autograd.grad(total, y, retain_graph=more)
            gradient = gradient.view(NODES, -1, *self.y.shape)
            rows += map(self._share_out, torch.einsum("n,nklc->klc", node_weights, gradient))
        weights = torch.stack(rows)
        return _Panel(start, end, weights, self.values(end) - self.values(start) - weights.sum(1))

    def _share_out(self, gradient: Float[Tensor, "L C"]) -> Float[Tensor, "nnz"]:
        """h_tj C_j · gradient_t for every triplet, exactly: the codebook is a sum."""
        codes, codebook = self.inputs.codes, self.interface.codebook.codebook.detach()
        along = (gradient[codes.rows] * codebook[codes.columns]).double().sum(-1)
        return codes.values.double() * along

    def _run(
        self, y: Float[Tensor, "Nn L C"]
    ) -> tuple[Float[Tensor, "Nn"], Float[Tensor, "Nn 4h 4w"]]:
        """Confidence logit and mask logits of one slot of each row, the chosen ones in turn.

        Slots are grounded independently of each other, so each row grounds its own alone.
        """
        inputs, rows = self.inputs, len(y)
        keys = inputs.keys.expand(rows, -1, -1, -1)
        readable = inputs.readable.expand(rows, -1)
        concepts = self.interface.codebook.aggregate(y, readable)
        tokens = inputs.tokens.to(y.dtype).expand(rows, -1, -1)
        queries = self.interface.fusion(tokens, concepts.vectors, inputs.gates)
        own = torch.arange(rows, device=y.device), self.slots.repeat(rows // len(self.slots))
        frames = [inputs.frame] * rows
        found = self.interface.ground(queries[own][:, None], keys, frames)
        low_res = self.interface.decode(keys, found, frames=frames)
        return found.confidence_logits[:, 0], low_res[:, 0]


def codebook_shares(interface: ConceptSlots, codes: SparseCodes) -> np.ndarray:
    """How much of each token's codebook output every concept makes up, signed and exact.

    The share of concept j in token t is h_tj C_j · y_t / |y_t|²; the shares of a token add up to 1.

    Returns:
        float64 (nnz,), in the order of the codes.
    """
    with torch.no_grad():
        y = interface.codebook.embed(codes).double()
        rows = interface.codebook.codebook[codes.columns].double()
        along = (rows * y[codes.rows]).sum(-1) / y.square().sum(-1)[codes.rows]
        return np.asarray((codes.values.double() * along).cpu().numpy())
