"""Behind the web page: one model, one question at a time, and none that takes for ever."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from segcompass.apps.report import write_report
from segcompass.apps.web_frames import can_be_changed
from segcompass.explain.intervene import Edit, Intervention, intervene
from segcompass.explain.provenance import SlotProvenance, provenance
from segcompass.io.files import write_whole
from segcompass.io.images import load_image
from segcompass.io.outputs import save
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction

MAX_PIXELS = 16_000_000  # K masks and heatmaps of a picture this large take half a gigabyte
MAX_EDITS = 64

T = TypeVar("T")


class GoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answer:
    """A finished answer and its files."""

    prediction: Prediction
    files: tuple[Path, ...]


class Desk:
    """Answers one question after another.

    Args:
        model: is used by one thread at a time.
        folder: files to download go there.
        timeout: seconds until whoever asked is told that it takes too long.
        max_new_tokens: longest chain of thought; the model's own limit by default.
    """

    def __init__(
        self,
        model: SegCompass,
        folder: Path,
        *,
        timeout: float = 120.0,
        max_new_tokens: int | None = None,
    ) -> None:
        self.model, self.folder = model, folder
        self.timeout, self.max_new_tokens = timeout, max_new_tokens
        self.uploads = folder / "uploads"
        self._busy = threading.Lock()

    def uploaded(self, path: object) -> Path:
        """A picture by the path that the browser names; none but uploads and examples are read.

        Raises:
            ValueError: it is no upload.
        """
        if isinstance(path, str) and "\0" not in path:
            found = Path(path).resolve()
            if found.is_relative_to(self.uploads.resolve()) and found.is_file():
                return found
        raise ValueError("this picture is no longer kept; upload it again")

    def ask(self, picture: Path, instruction: str) -> Iterator[str | Prediction]:
        """Tell the text while it is written, then the prediction.

        Raises:
            ImageError, UnsafeFileError: the picture cannot be read, or must not be.
            ValueError: the instruction is empty or too long.
            TimeoutError: it took too long.
        """
        # Read as bytes: what is said about a picture does not tell where it lies on the server.
        pixels = load_image(picture.read_bytes(), max_pixels=MAX_PIXELS)

        def work(tell: Callable[[Any], None]) -> None:
            prediction = self.model.predict(
                pixels,
                instruction,
                max_new_tokens=self.max_new_tokens,
                on_text=lambda texts: tell(texts[0]),
            )
            tell(replace(prediction, source=picture.name))

        yield from self._told(work)

    def trace(self, prediction: Prediction) -> list[SlotProvenance]:
        """Which concepts made the slots that count; nothing where no slot can be explained."""
        if not prediction.status.well_formed or not can_be_changed(prediction):
            return []
        return self._result(lambda: provenance(self.model, prediction))

    def change(self, prediction: Prediction, factors: Mapping[str, float]) -> Intervention:
        """Run the head again with some concepts multiplied.

        Args:
            prediction: what was found.
            factors: what to multiply each concept with, by its number as text.

        Raises:
            ValueError: a concept does not exist, a factor is none, or there are too many.
        """
        if not 0 < len(factors) <= MAX_EDITS:
            raise ValueError(f"{len(factors)} changes: choose from 1 to {MAX_EDITS} concepts")
        edits = [Edit.scale(int(concept), float(factor)) for concept, factor in factors.items()]
        return self._result(lambda: intervene(self.model, prediction, edits))

    def keep(self, prediction: Prediction) -> Answer:
        """Write what can be downloaded: JSON, masks, arrays, COCO results and the report."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        files = save(prediction, folder)
        coco, report = folder / "coco.json", folder / "report.html"
        write_whole(coco, json.dumps(prediction.to_coco()) + "\n")
        write_report([prediction], report)
        return Answer(prediction, (report, files.pop("json"), coco, *files.values()))

    def _result(self, function: Callable[[], T]) -> T:
        result: T
        (result,) = self._told(lambda tell: tell(function()))
        return result

    def _told(self, work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
        """Run ``work`` in a thread of its own, and yield what it tells.

        Once nobody listens, or the time is up, its next word ends it.
        """
        told: queue.Queue[tuple[bool, Any]] = queue.Queue()
        gone = threading.Event()

        def tell(word: Any) -> None:
            if gone.is_set():
                raise GoneError
            told.put((True, word))

        def run() -> None:
            try:
                with self._busy:
                    work(tell)
                told.put((False, None))
            except Exception as error:  # handed to whoever asked
                told.put((False, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            yield from _until(told, time.monotonic() + self.timeout)
        except queue.Empty:
            raise TimeoutError(
                f"this took longer than {self.timeout:g} seconds; ask again with a smaller "
                "picture, or start the page with a larger --timeout"
            ) from None
        finally:
            gone.set()


def _until(told: queue.Queue[tuple[bool, Any]], deadline: float) -> Iterator[Any]:
    """What is told up to its end; raises what ended it."""
    while True:
        more, word = told.get(timeout=max(0.0, deadline - time.monotonic()))
        if isinstance(word, Exception):
            raise word
        if not more:
            return
        yield word
