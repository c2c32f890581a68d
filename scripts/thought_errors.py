"""Where thoughts about scenes go wrong: in what is seen, or in what is picked from it.

    python scripts/thought_errors.py RUN

A RUN is a folder that `segcompass eval --out RUN` wrote over scenes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from segcompass.data.samples import read_dataset
from segcompass.data.scenes.catalog import SIZES, TEXTURES
from segcompass.data.scenes.grammar import REACH
from segcompass.types import NamedObject, Sample

_LISTING = re.compile(r"I see ([^.]*)\.")
_ENTRY = re.compile(
    rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(TEXTURES)}) )?(\w+) (\w+) ([a-h][1-8])"
)


def listed(thought: str) -> list[NamedObject]:
    """The entries of a thought's listing; what is no entry is left out."""
    listing = _LISTING.search(thought)
    entries = listing.group(1).split(", ") if listing else []
    return [
        NamedObject(0, m[4], m[3], m[1] or "medium", m[2] or "plain", m[5])
        for m in map(_ENTRY.fullmatch, entries)
        if m
    ]


def same(entry: NamedObject, thing: NamedObject) -> bool:
    """Whether an entry tells of a thing: kind and colour agree, the cell to one."""
    rows = abs(ord(entry.cell[0]) - ord(thing.cell[0]))
    columns = abs(int(entry.cell[1]) - int(thing.cell[1]))
    alike = (entry.category, entry.colour) == (thing.category, thing.colour)
    return alike and max(rows, columns) <= REACH


def seen(sample: Sample, thought: str) -> Counter[str]:
    """Counts over the things of a sample: found, and of these size and texture right; invented."""
    counts: Counter[str] = Counter(things=len(sample.objects))
    entries = listed(thought)
    for thing in sample.objects:
        entry = next((e for e in entries if same(e, thing)), None)
        if entry is None:
            continue
        entries.remove(entry)
        counts["found"] += 1
        counts["size"] += entry.size == thing.size
        counts["texture"] += entry.texture == thing.texture
    counts["invented"] = len(entries)
    return counts


def main(run: Path) -> None:
    """Print how well the listings are, and how often the thought is right with and without."""
    settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
    samples = read_dataset(Path(settings["data"]), settings["split"], layout=settings["layout"])
    by_name = {sample.sample_id: sample for sample in samples}
    counts: Counter[str] = Counter()
    thoughts: dict[bool, list[bool]] = {True: [], False: []}
    for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        one = seen(by_name[row["sample_id"]], row["text"])
        counts += one
        flawless = one["things"] == one["found"] == one["size"] == one["texture"]
        thoughts[flawless and not one["invented"]].append(bool(row["reasoning_correct"]))
    print(f"things found: {counts['found'] / counts['things']:.1%} of {counts['things']:,}")
    for word in ("size", "texture"):
        print(f"  {word} right: {counts[word] / counts['found']:.1%}")
    print(f"entries that tell of nothing there: {counts['invented']:,}")
    for flawless, right in thoughts.items():
        name = "without" if flawless else "with"
        share = sum(right) / max(1, len(right))
        print(f"listings {name} a mistake: {len(right):,}, thought right in {share:.1%} of them")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
