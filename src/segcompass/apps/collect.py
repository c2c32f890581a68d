"""What becomes of predictions as they arrive: JSON lines, files, rows of a table, a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from segcompass.apps import console
from segcompass.apps.runs import Failure, summary
from segcompass.io import masks
from segcompass.io.files import write_whole
from segcompass.io.outputs import dump_json, save, to_coco, to_json

if TYPE_CHECKING:
    from segcompass.types import Prediction

IN_REPORT = 60  # predictions with all their layers: more make a page that no browser enjoys


class Collector:
    """Takes results one by one, so that a long run shows and keeps what it has so far.

    Args:
        out: folder for the files of each prediction; None writes none.
        as_json: print every prediction as a line of JSON.
    """

    def __init__(self, *, out: Path | None = None, as_json: bool = False) -> None:
        self.out = out
        self.as_json = as_json
        self.rows: list[dict[str, str]] = []
        self.failures: list[Failure] = []  # every one of them was told to the person
        self.for_report: list[Prediction] = []
        self._images: dict[str, dict[str, Any]] = {}
        self._categories: dict[str, int] = {}
        self._annotations: list[dict[str, Any]] = []

    def take(self, result: Prediction | Failure) -> None:
        """Print, save and remember one result."""
        if isinstance(result, Failure):
            self.failures.append(result)
            console.complain(result.error, result.source)
            return
        if self.as_json:
            print(dump_json(to_json(result)), flush=True)
        if self.out is not None:
            save(result, self.out)
            self._annotate(result)
        self.rows.append(summary(result))
        if len(self.for_report) < IN_REPORT:
            self.for_report.append(result)

    def write_coco(self, path: Path) -> None:
        """Write all accepted masks as one COCO data set; the categories are the instructions."""
        categories = [{"id": i, "name": name} for name, i in self._categories.items()]
        record = {
            "images": list(self._images.values()),
            "annotations": self._annotations,
            "categories": categories,
        }
        write_whole(path, dump_json(record) + "\n")

    def write_report(self, folder: Path, title: str) -> Path:
        """Write ``report.html`` and return its path."""
        from segcompass.apps.report import write_report

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.html"
        write_report(self.for_report, path, title=title)
        if len(self.rows) > len(self.for_report):
            console.note(f"{path} shows the first {IN_REPORT} of {len(self.rows)} predictions")
        return path

    def conclude(self) -> None:
        """Print the table, and write what is about all predictions together."""
        if not self.as_json:
            console.print_table(self.rows)
        if self.out is not None and self.rows:
            self.write_coco(self.out / "coco.json")
            report = self.write_report(self.out, "SegCompass")
            console.note(f"wrote {report} and the files beside it")

    def finish(self) -> None:
        """Leave with the exit code that the failures ask for, if there were any."""
        if self.failures and self.rows:
            raise typer.Exit(console.SOME_FAILED)
        if self.failures:
            raise typer.Exit(console.exit_code(self.failures[0].error) or console.FAILED)

    def _annotate(self, prediction: Prediction) -> None:
        height, width = prediction.image_rgb.shape[:2]
        name = prediction.source or f"image {len(self._images) + 1}"
        image = self._images.setdefault(
            name,
            {"id": len(self._images) + 1, "file_name": name, "width": width, "height": height},
        )
        category = self._categories.setdefault(prediction.instruction, len(self._categories) + 1)
        for entry in to_coco([prediction], [image["id"]], category):
            extra = {"id": len(self._annotations) + 1, "area": masks.area(entry["segmentation"])}
            self._annotations.append(entry | extra | {"iscrowd": 0})
