"""Options that several commands share, and the loading of the model they name."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segcompass.apps import console

if TYPE_CHECKING:
    from segcompass.pipeline import SegCompass

Model = Annotated[
    str, typer.Option(help="nano (bundled), a model folder, a preset (name or .yaml), or a hub id.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: what is there.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="The policy's precision: bfloat16 …; default: float32, or a preset's own."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Threshold = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Confidence above which a mask counts; default: the model's."),
]


class Layout(StrEnum):
    """How a data set lies on disk."""

    REFCOCO = "refcoco"
    GREFCOCO = "grefcoco"
    REASONSEG = "reasonseg"
    PARQUET = "parquet"


DataFolder = Annotated[Path, typer.Option(help="Folder of the data set.")]
DataLayout = Annotated[Layout | None, typer.Option(help="Default: found out from the files.")]
Split = Annotated[str, typer.Option(help="train, val, test, testA or testB.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples at a time.")]


class Paths(StrEnum):
    """What the slot queries are made of."""

    BOTH = "both"
    TOKENS = "tokens"
    CONCEPTS = "concepts"


def load(model: str, device: str | None, dtype: str | None, revision: str | None) -> SegCompass:
    """Load a model; says so to a person who waits."""
    from segcompass.pipeline import SegCompass

    console.note(f"loading {model} …")
    return SegCompass.from_pretrained(model, device=device, dtype=dtype, revision=revision)
