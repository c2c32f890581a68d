"""``segcompass analyze``, ``intervene`` and ``provenance``: what made a mask, and what if not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segcompass.apps import console
from segcompass.apps.options import (
    AsJson,
    BatchSize,
    DataFolder,
    DataLayout,
    Device,
    Dtype,
    Limit,
    Model,
    Revision,
    Split,
    Threshold,
    load,
)
from segcompass.io.files import bytes_of, make_folder, write_whole
from segcompass.io.progress import progress

if TYPE_CHECKING:
    from segcompass.explain.concept_cards import Card
    from segcompass.explain.concept_counts import ConceptCounts
    from segcompass.explain.intervene import Edit
    from segcompass.pipeline import SegCompass
    from segcompass.types import Prediction, Sample

app = typer.Typer()
FAITHFULNESS = ("top_tenth", "single_concept", "named_concepts", "residual")  # that are printed

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A picture, or the JSON that predict --out wrote.")
]
Instruction = Annotated[
    str | None, typer.Option("--instruction", "-i", help="What to find; in the JSON already.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the files; made if it is not there.")]


@app.command()
def analyze(
    data: DataFolder,
    out: Annotated[Path, typer.Option(help="Folder for figures, tables and summary.json.")],
    split: Split = "val",
    model: Model = "nano",
    layout: DataLayout = None,
    limit: Limit = None,
    cards: Annotated[
        bool, typer.Option("--cards", help="Also describe every live concept: concepts.html.")
    ] = False,
    faithfulness: Annotated[
        bool, typer.Option("--faithfulness", help="Also measure what deleting concepts does.")
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Folder of answers: those there are read, new ones are written."),
    ] = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Draw the paper's figures from a model's own answers, with their data beside them."""
    from segcompass.data.samples import read_dataset
    from segcompass.explain.analysis import Analysis, answers, panel_ids
    from segcompass.explain.concept_cards import naming, summarise
    from segcompass.explain.figures import check_drawing
    from segcompass.interfaces.concept_slots import with_concepts
    from segcompass.io.errors import DataError
    from segcompass.io.outputs import dump_json

    check_drawing()
    samples = read_dataset(data, split, layout=layout and layout.value, limit=limit)
    if not samples:
        raise DataError(f"{data}: the split {split!r} holds no samples; choose another")
    loaded = load(model, device, dtype, revision)
    if cards or faithfulness:
        with_concepts(loaded.interface)  # refused before anything is answered
    make_folder(out)
    counts = _concept_counts(loaded, data, split, samples) if cards else None
    analysis = Analysis(panel_ids(samples), counts)
    with progress("analyze") as moved:
        for sample, prediction in answers(
            loaded, samples, saved=predictions, batch_size=batch_size, progress=moved
        ):
            analysis.add(sample, prediction)
    summary: dict[str, Any] = {"model": loaded.name, "fingerprint": loaded.fingerprint}
    summary |= {"data": str(data), "split": split} | analysis.write(out)
    named = None
    if counts is not None:
        made = _write_cards(loaded, counts, out)
        summary["concepts"], named = summarise(made, counts.concepts), naming(made)
    if faithfulness:
        with progress("faithfulness") as moved:
            again = answers(loaded, samples, saved=predictions, batch_size=1, progress=moved)
            summary["faithfulness"] = _write_faithfulness(loaded, again, named, out)
    write_whole(out / "summary.json", dump_json(summary, indent=2) + "\n")
    if as_json:
        print(dump_json(summary))
    else:
        _print_figures(summary)
        print(out / "summary.json")


def _concept_counts(
    model: SegCompass, data: Path, split: str, samples: Sequence[Sample]
) -> ConceptCounts:
    """What counts concepts; where the set consists of scenes, with all that is known of them."""
    from segcompass.data.samples import read_images
    from segcompass.explain.concept_counts import ConceptCounts
    from segcompass.interfaces.concept_slots import with_concepts

    scenes = read_images(data, split) if samples[0].objects else []
    width = with_concepts(model.interface).sae.config.d_sae
    return ConceptCounts(width, {scene.image_id: scene for scene in scenes})


def _write_cards(model: SegCompass, counts: ConceptCounts, out: Path) -> list[Card]:
    """Write ``concepts.html`` and ``concepts.csv``; returns the cards."""
    from segcompass.apps.concept_page import write_concept_page
    from segcompass.explain.concept_cards import card_rows, make_cards, summarise
    from segcompass.explain.figures import write_csv
    from segcompass.interfaces.concept_slots import with_concepts

    decoder = with_concepts(model.interface).sae.W_dec.detach().float().cpu().numpy()
    with progress("concept cards") as moved:
        made = make_cards(counts, decoder, moved)
    found = summarise(made, counts.concepts)
    write_csv(out / "concepts.csv", card_rows(made))
    facts = [
        f"{found['live']:,} live concepts of {found['concepts']:,}",
        f"{found['labelled']:,} with a label that holds",
        f"{len(counts.texts):,} answers about {len(counts.pictures):,} pictures",
    ]
    files = {image_id: path for image_id, (_, path) in counts.pictures.items()}
    title = f"Concepts of {model.name}"
    write_concept_page(made, files, out / "concepts.html", title=title, summary=facts)
    return made


def _write_faithfulness(
    model: SegCompass,
    answered: Iterable[tuple[Sample, Prediction]],
    named: Callable[[Sample], list[int]] | None,
    out: Path,
) -> dict[str, Any]:
    """Write ``faithfulness.json`` and its curves; returns the figures without the curves."""
    from segcompass.explain.faithfulness import faithfulness
    from segcompass.explain.figures import write_csv
    from segcompass.io.outputs import dump_json

    result = faithfulness(model, answered, named=named)
    write_whole(out / "faithfulness.json", dump_json(result, indent=2) + "\n")
    write_csv(out / "faithfulness.csv", result["rows"])
    write_csv(out / "thought_consistency.csv", result["thoughts"]["rows"])
    residuals = [{"scalar": name} | figures for name, figures in result["residual"].items()]
    write_csv(out / "residuals.csv", residuals)
    return {name: value for name, value in result.items() if name != "rows"}


def _print_figures(summary: Mapping[str, Any]) -> None:
    """The correlations, what is left out and why, and how faithful the attributions are."""
    lines = [{"figure": name, **console.row(f)} for name, f in _captions(summary).items()]
    console.print_table(lines)
    for part, names in summary["absent"].items():
        print(f"left out, as the answers show no {part}: {', '.join(names)}")
    if "faithfulness" in summary:
        shown = {name: summary["faithfulness"][name] for name in FAITHFULNESS}
        console.print_table(console.listing(shown))


def _captions(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The correlations as a table: n, r and its interval, p."""
    shown = ("n", "r", "r_interval", "p")
    return {
        name: {key: facts.get(key) for key in shown}
        for name, facts in summary["correlations"].items()
    }


@app.command()
def intervene(
    source: Source,
    instruction: Instruction = None,
    ablate: Annotated[
        list[int] | None, typer.Option(metavar="CONCEPT", help="Switch off; repeatable.")
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(metavar="CONCEPT=FACTOR", help="Multiply where it fires; repeatable."),
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(metavar="CONCEPT=±AMOUNT", help="Add on every token read; repeatable."),
    ] = None,
    model: Model = "nano",
    out: Out = None,
    as_json: AsJson = False,
    threshold: Threshold = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Change concepts at the codebook and look again: masks and confidences before and after."""
    from segcompass.explain.intervene import intervene
    from segcompass.io.outputs import dump_json

    edits = _edits(ablate or [], scale or [], steer or [])
    if out is not None:
        make_folder(out)
    loaded = load(model, device, dtype, revision)
    changed = intervene(loaded, _answer(loaded, source, instruction, threshold), edits)
    if out is not None:
        from segcompass.explain.figures import write_csv
        from segcompass.io.outputs import file_stem
        from segcompass.io.sheets import Entry, sheet

        stem = f"{file_stem(changed.before)}.intervention"
        entries = [Entry(changed.before, label="Before"), Entry(changed.after, label="After")]
        picture = sheet(entries, ", ".join(map(str, changed.edits)))
        png = bytes_of(lambda file: picture.save(file, format="PNG"))
        write_whole(out / f"{stem}.png", png)
        write_csv(out / f"{stem}.csv", changed.slot_rows())
        write_whole(out / f"{stem}.json", dump_json(changed.to_json(), indent=2) + "\n")
        console.note(f"wrote {out / stem}.png, .csv and .json")
    if as_json:
        print(dump_json(changed.to_json()))
    else:
        console.print_table([console.row(facts) for facts in changed.slot_rows()])
        print(f"IoU of the answer before and after: {changed.answer_iou:.4f}")


@app.command()
def provenance(
    source: Source,
    instruction: Instruction = None,
    slot: Annotated[
        list[int] | None, typer.Option(min=0, help="Which slot; repeatable. Default: accepted.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Concepts told of each slot.")] = 10,
    model: Model = "nano",
    out: Out = None,
    as_json: AsJson = False,
    threshold: Threshold = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Trace slots back to the concepts and tokens that made them, with signed weights."""
    from segcompass.explain import graph
    from segcompass.explain.provenance import provenance, table, to_json
    from segcompass.io.outputs import dump_json

    if out is not None:
        make_folder(out)
    loaded = load(model, device, dtype, revision)
    traced = provenance(loaded, _answer(loaded, source, instruction, threshold), slot or None)
    record = to_json(traced, top) | {"graph": graph.graph(traced, top)}
    if out is not None:
        from segcompass.io.outputs import file_stem

        stem = f"{file_stem(traced[0].prediction)}.provenance"
        write_whole(out / f"{stem}.json", dump_json(record, indent=2) + "\n")
        write_whole(out / f"{stem}.dot", graph.to_dot(traced, top))
        console.note(f"wrote {out / stem}.json and .dot")
    if as_json:
        print(dump_json(record))
    else:
        console.print_table(table(traced, top))


def _answer(
    model: SegCompass, source: Path, instruction: str | None, threshold: float | None
) -> Prediction:
    """The prediction to explain: read back, or made now."""
    if source.suffix.lower() == ".json":
        from segcompass.io.saved import load_prediction

        if instruction is not None or threshold is not None:
            raise typer.BadParameter(f"{source} holds its own instruction and threshold: drop them")
        return load_prediction(source)
    if instruction is None:
        raise typer.BadParameter('say what to find: SOURCE -i "the red mug"')
    found = model.predict(source, instruction, threshold=threshold)
    return replace(found, source=str(source))


def _edits(ablate: list[int], scale: list[str], steer: list[str]) -> list[Edit]:
    """Ablations first, then scalings, then additions."""
    from segcompass.explain.intervene import Edit

    try:
        edits = [
            *(Edit.ablate(concept) for concept in ablate),
            *(Edit.scale(*_pair(text)) for text in scale),
            *(Edit.steer(*_pair(text)) for text in steer),
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not edits:
        raise typer.BadParameter("say what to change: --ablate, --scale or --steer")
    return edits


def _pair(text: str) -> tuple[int, float]:
    """A concept and a number, "7=0.5" or "99=+3"."""
    concept, _, amount = text.partition("=")
    try:
        return int(concept), float(amount)
    except ValueError:
        raise ValueError(f"{text!r}: expected CONCEPT=NUMBER, such as 7=0.5") from None
