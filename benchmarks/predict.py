"""What explanation costs: `predict` against plain `generate` of the same tokens plus the encoder.

    python benchmarks/predict.py [--json] [--model nano] [--pictures 8] [--repeats 5]

Both sides load and prepare the same pictures and write the same number of tokens, one picture at
a time, interleaved in one run. The baseline runs no hooks, no SAE, no slots and no decoder.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from measuring import machine, new_parser, present, row
from transformers import GenerationConfig

from segcompass import SegCompass
from segcompass.io.assets import bundled
from segcompass.io.images import load_image


def plain(model: SegCompass, picture: str, instruction: str, tokens: int) -> None:
    """Generate exactly ``tokens`` tokens and encode the picture, nothing else."""
    image = load_image(picture)
    visual = model.policy.backbone.prepare(image)
    prompts = model.policy.encode([visual], [instruction])
    with torch.inference_mode():
        model.policy.model.generate(
            input_ids=prompts.ids,
            attention_mask=prompts.attention,
            generation_config=GenerationConfig(
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=model.policy.tokenizer.pad_token_id,
                eos_token_id=model.policy.prompt.eos_token_id,
            ),
            **model.policy.backbone.image_arguments([visual]),
            **model.policy.backbone.position_arguments(prompts.ids),
        )
        pixels, _ = model.encoder.preprocess([image])
        model.encoder(pixels)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: SegCompass, pictures: int, repeats: int) -> dict[str, object]:
    """Interleave both sides over the demo's pictures; medians of the per-picture means."""
    folder = bundled("demo")
    cases = json.loads((folder / "demo.json").read_text())[:pictures]
    jobs = []
    for case in cases:
        path = str(folder / case["image"])
        result = model.predict(path, case["instruction"], force_format=False)
        prompt = model.policy.encode(
            [model.policy.backbone.prepare(load_image(path))], [case["instruction"]]
        )
        # One token more than was consumed: the end of the text.
        jobs.append((path, case["instruction"], len(result.tokens) - prompt.ids.shape[1] + 1))
    ours, baseline = [], []
    for _ in range(repeats):
        for path, instruction, tokens in jobs:
            ours.append(seconds(partial(model.predict, path, instruction, force_format=False)))
            baseline.append(seconds(partial(plain, model, path, instruction, tokens)))
    medians = statistics.median(ours), statistics.median(baseline)
    rows = [row("predict_vs_generate", "s/picture", *medians)]
    return {"name": "predict", "machine": machine(), "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = SegCompass.from_pretrained(options.model)
    present(measure(model, options.pictures, options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
