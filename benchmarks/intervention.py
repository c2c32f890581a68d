"""What an intervention costs: `intervene` at the codebook against `predict` of the same question.

    python benchmarks/intervention.py [--json] [--model nano] [--repeats 7]

Both sides answer the demo's first question, interleaved in one run. Ours switches off the concept
that fires most; the image is encoded, and head and decoder are run with and without the edit. That
no part of the policy runs meanwhile is asserted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from measuring import machine, median_seconds, new_parser, present, row
from torch import nn

from segcompass import SegCompass
from segcompass.explain.intervene import Edit, Intervention, intervene
from segcompass.io.assets import bundled


@contextmanager
def silenced(policy: nn.Module) -> Iterator[None]:
    """Raise AssertionError as soon as any part of the policy runs."""

    def refuse(module: nn.Module, _inputs: Any) -> None:
        raise AssertionError(f"the policy was run: {type(module).__name__}")

    hooks = [module.register_forward_pre_hook(refuse) for module in policy.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: SegCompass, repeats: int) -> dict[str, Any]:
    """Medians of both sides, taken in turn."""
    folder = bundled("demo")
    case = json.loads((folder / "demo.json").read_text())[0]
    asked = str(folder / case["image"]), case["instruction"]
    answer = model.predict(*asked)
    assert answer.codes is not None
    strongest = int(answer.codes.columns[answer.codes.values.argmax()])

    def ours() -> Intervention:
        with silenced(model.policy):
            return intervene(model, answer, [Edit.ablate(strongest)])

    sides = {"intervene": ours, "predict": lambda: model.predict(*asked)}
    seconds = median_seconds(sides, lambda: None, repeats)
    rows = [row("intervene_vs_predict", "s", seconds["intervene"], seconds["predict"])]
    return {"name": "intervention", "machine": machine(), "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = SegCompass.from_pretrained(options.model)
    present(measure(model, options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
