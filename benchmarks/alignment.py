"""Interpretable alignment: encode -> threshold -> codebook, against the plain dense formulation.

    python benchmarks/alignment.py [--json] [--tokens 128] [--repeats 7]

Measures one step, forward and backward, at the sizes of a 7B policy: hidden states of n tokens go
in, embedded tokens Σ_j h_tj C_j come out, gradients flow to the states and to the codebook. The
autoencoder is frozen, as in joint training. In the same run, on the same weights (fp32):

    ours            SparseAutoencoder.encode_sparse and QueryCodebook.embed
    encode product  z @ W_enc alone, forward only: the least that any formulation must compute
    dense           threshold(z @ W_enc + b_enc) @ C, forward and backward
    release         dense, and the decoder's reconstruction, which is computed and dropped

Time is the median of interleaved repetitions. Memory is the peak of what the allocator handed out
during a step and had taken back when the step ended (events of PyTorch's memory profiler, buffers
inside operators included). What remains, output and gradients, has the same size for all and is
left out. Output and gradients are compared first; beyond 1e-4 relative the script fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import machine, median_seconds, new_parser, report, row, transient_bytes
from torch import Tensor

from segcompass.concepts.query_codebook import QueryCodebook, QueryCodebookConfig
from segcompass.concepts.sparse_autoencoder import (
    DEFAULT_CHUNK,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)

TOLERANCE = 1e-4


class Case(NamedTuple):
    """The weights and inputs that all sides share."""

    sae: SparseAutoencoder
    codebook: QueryCodebook
    states: Tensor  # (n, D), requires grad
    upstream: Tensor  # (n, C), the gradient that reaches the embedded tokens
    threshold: float
    chunk: int

    def ours(self) -> Tensor:
        return self.codebook.embed(self.sae.encode_sparse(self.states, chunk=self.chunk))

    def dense(self) -> Tensor:
        return self._dense_activations() @ self.codebook.codebook

    def release(self) -> Tensor:
        activations = self._dense_activations()
        self.sae.decode(activations)
        return activations @ self.codebook.codebook

    def encode_product(self) -> None:
        with torch.no_grad():
            torch.mm(self.states, self.sae.W_enc)

    def _dense_activations(self) -> Tensor:
        before = F.linear(self.states, self.sae.W_enc.t(), self.sae.b_enc)
        return F.threshold(before, self.threshold, 0.0)  # threshold > 0 makes it a ReLU as well

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Forward and backward; the gradients are left in ``.grad``."""

        def run() -> Tensor:
            output = forward()
            torch.autograd.backward(output, self.upstream)
            return output.detach()

        return run

    def clear(self) -> None:
        self.states.grad = self.codebook.codebook.grad = None


def build_case(options: argparse.Namespace) -> Case:
    """Random weights and states, and a threshold that leaves ``--active`` latents per token."""
    torch.manual_seed(0)
    states = torch.randn(options.tokens, options.d_in, requires_grad=True)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=options.d_in, d_sae=options.d_sae))
    sae.requires_grad_(False)
    sae.W_enc.mul_(10.0)  # unit columns: z @ W_enc is standard normal
    threshold = threshold_for(states.detach() @ sae.W_enc, options.active * options.tokens)
    sae.config = sae.config.model_copy(update={"threshold": threshold})
    codebook = QueryCodebook(
        QueryCodebookConfig(d_sae=options.d_sae, width=options.width, layers=1, heads=1, ffn=1)
    )
    upstream = torch.randn(options.tokens, options.width)
    return Case(sae, codebook, states, upstream, threshold, options.chunk)


def threshold_for(activations: Tensor, keep: int) -> float:
    """A value that about ``keep`` activations exceed, in the widest gap nearby.

    Rounding differs between one product and many chunks; inside a gap it cannot change which
    entries are kept, so that the comparison of the two sides is about arithmetic alone.
    """
    around = max(2, keep // 100)
    top = activations.flatten().topk(keep + around).values[-2 * around :]
    gap = (top[:-1] - top[1:]).argmax()
    return float((top[gap] + top[gap + 1]) / 2)


def check_equal(case: Case) -> float:
    """Largest error of output and gradients against the dense side, relative to its largest entry.

    Raises:
        SystemExit: the two sides disagree.
    """
    results: list[list[Tensor]] = []
    for forward in (case.ours, case.dense):
        case.clear()
        output = case.step(forward)()
        gradients = [case.states.grad, case.codebook.codebook.grad]
        results.append([output, *(g for g in gradients if g is not None)])
    case.clear()
    errors = [
        float((ours - dense).abs().max() / dense.abs().max())
        for ours, dense in zip(*results, strict=True)
    ]
    if not max(errors) <= TOLERANCE:
        sys.exit(f"output and gradients differ from the dense ones by {errors}; nothing is timed")
    return max(errors)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures in the format of all benchmarks."""
    case = build_case(options)
    error = check_equal(case)
    steps: dict[str, Callable[[], object]] = {
        "ours": case.step(case.ours),
        "ours, forward": case.ours,
        "encode product": case.encode_product,
        "dense": case.step(case.dense),
        "release": case.step(case.release),
    }
    seconds = median_seconds(steps, case.clear, options.repeats)
    peak = {}
    for name in ("ours", "dense"):
        case.clear()
        peak[name] = transient_bytes(steps[name])
    rows = [
        row("time_vs_encode_product", "s", seconds["ours"], seconds["encode product"]),
        row("time_vs_dense", "s", seconds["ours"], seconds["dense"]),
        row("time_vs_release", "s", seconds["ours"], seconds["release"]),
        row("memory_vs_dense", "bytes", peak["ours"], peak["dense"]),
        row(
            "forward_time_vs_encode_product",
            "s",
            seconds["ours, forward"],
            seconds["encode product"],
        ),
    ]
    sizes = {name: getattr(options, name) for name in ("tokens", "d_in", "d_sae", "width")}
    active = case.sae.encode_sparse(case.states).values.numel() / options.tokens
    settings = {**sizes, "active": active, "repeats": options.repeats, "relative_error": error}
    return {"name": "alignment", "machine": machine(), "settings": settings, "rows": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; the defaults are the sizes of Qwen2.5-VL-7B with the public release's dictionary."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="tokens n in one step")
    parser.add_argument("--d-in", type=int, default=3584, help="width D of the policy")
    parser.add_argument("--d-sae", type=int, default=65536, help="latents S")
    parser.add_argument("--width", type=int, default=512, help="codebook width C")
    parser.add_argument("--active", type=int, default=64, help="active latents per token")
    parser.add_argument("--chunk", type=int, default=DEFAULT_CHUNK, help="latents per product")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds; the median counts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    report(measure, parse())
