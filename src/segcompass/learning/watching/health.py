"""The run's own health check: reads every log row, and says so when training goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segcompass.io.errors import SegCompassError
from segcompass.io.files import write_whole
from segcompass.learning.watching.history import History
from segcompass.learning.watching.symptoms import HealthConfig, Symptom, symptoms

LOG, FINDINGS = "log.jsonl", "health.jsonl"
logger = logging.getLogger(__name__)


class HealthError(SegCompassError):
    """Training went wrong in a way that more steps will not mend."""


class Health:
    """An observer of a loop: warns once of every cause, or ends the run.

    Every onset and every end of a symptom is a row of FOLDER/health.jsonl. A resumed run goes on
    with what the log tells of the steps before, so that an interruption hides nothing; what was
    found by then does not stop it again.

    Args:
        folder: Of the stage, where its log is.
        config: What counts as ill, and what happens then.
        reward_weights: Weights of form and masks in the reward; None leaves that check out.
        learns: Whether the rewards train anything; else they are not judged.
    """

    def __init__(
        self,
        folder: Path,
        config: HealthConfig,
        *,
        reward_weights: tuple[float, float] | None = None,
        learns: bool = True,
    ) -> None:
        self.folder, self.config, self.learns = folder, config, learns
        self.reward_weights = reward_weights
        self.every = max(1, config.window // 8)  # steps from one judgement to the next
        self.history = History(config.window, reward_weights)
        self.active: dict[str, tuple[bool, int]] = {}  # cause: severe, step it was last seen
        self.told: set[tuple[str, bool]] = set()
        self.begun = False

    def __call__(self, step: int, row: dict[str, Any]) -> None:
        """Judge the run after a step.

        Raises:
            HealthError: with ``action: stop``, when a severe symptom sets in.
        """
        if self.config.action == "off":
            return
        if not self.begun:
            self._catch_up(step)
        self._take(row)
        due = step % self.every == 0
        found = symptoms(self.history, self.config, rewards=self.learns, windows=due)
        severe = []
        for symptom in found:
            known, _ = self.active.get(symptom.cause, (None, 0))
            if known is None or symptom.severe > known:
                self._record(step, "began", symptom.cause, symptom)
                self._tell(step, symptom)
                severe += [symptom] if symptom.severe else []
            self.active[symptom.cause] = symptom.severe or bool(known), step
        self._let_go(step)
        if severe and self.config.action == "stop":
            raise HealthError(self._text(step, severe[0]))

    def _take(self, row: dict[str, Any]) -> None:
        """Rows with and without rewards are different phases: nothing of one judges the other."""
        if self.history.rows and ("reward" in row) != ("reward" in self.history.columns):
            self.history = History(self.config.window, self.reward_weights)
        self.history.take(row)

    def _let_go(self, step: int) -> None:
        """A cause that was not seen for a whole window is over, and may come again."""
        over = [c for c, (_, seen) in self.active.items() if step - seen >= self.config.window]
        for cause in over:
            del self.active[cause]
            self._record(step, "over", cause)

    def _record(self, step: int, event: str, cause: str, symptom: Symptom | None = None) -> None:
        row: dict[str, Any] = {"step": step, "event": event, "cause": cause}
        if symptom is not None:
            row |= {"severe": symptom.severe, "window": self.config.window}
            row |= {"figures": {k: round(v, 5) for k, v in symptom.figures.items()}}
            row |= {"found": symptom.found, "way_out": symptom.way_out}
        with (self.folder / FINDINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _tell(self, step: int, symptom: Symptom) -> None:
        if (symptom.cause, symptom.severe) not in self.told:
            self.told.add((symptom.cause, symptom.severe))
            logger.warning("%s", self._text(step, symptom))

    def _text(self, step: int, symptom: Symptom) -> str:
        where = f"{self.folder.name}, step {step}, over {self.config.window} steps"
        return (
            f"{where}: {symptom.found}; {symptom.way_out} (all findings: {self.folder / FINDINGS})"
        )

    def _catch_up(self, step: int) -> None:
        """Take in the steps before the first one seen; drop findings of steps taken again."""
        self.begun = True
        for row in _rows(self.folder / LOG, before=step):
            self._take(row)
        findings = self.folder / FINDINGS
        if not findings.exists():
            return
        kept = list(_rows(findings, before=step))
        for row in kept:
            if row.get("event") == "over":
                self.active.pop(row["cause"], None)
            else:
                self.active[row["cause"]] = bool(row.get("severe")), step - 1
        write_whole(findings, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(path: Path, before: int) -> Iterator[dict[str, Any]]:
    """Whole rows of a JSONL file that tell of earlier steps."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a kill cut it off
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] < before:
            yield row
