"""Ranks started by a plain command: what they are told, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segcompass.learning.engine import launch as launching
from segcompass.learning.engine.launch import RanksError, launch

PARENT = """
import sys
from segcompass.learning.engine.launch import RanksError, launch
try:
    launch([sys.executable, *sys.argv[1:]], 2)
except RanksError as failed:
    sys.exit(failed.code)
"""


def python(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time; rank = os.environ['RANK']; {text}"]


def test_ranks_find_each_other(tmp_path: Path) -> None:
    """A sum over all of them, by torch's own variables."""
    text = (
        "import torch, torch.distributed as dist; dist.init_process_group('gloo'); "
        "mine = torch.tensor(1.0 + dist.get_rank()); dist.all_reduce(mine); "
        f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(mine.item()))"
    )
    launch(python(text), 2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3.0", "3.0"]


def test_threads_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    launch(python(text), 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (tmp_path / "1").read_text() == "2"
    launch(python(text), 2)
    assert (tmp_path / "1").read_text() == "3"


@pytest.mark.parametrize(("codes", "expected"), [((2, 2), 2), ((0, 5), 5), ((3, 1), 3)])
def test_one_exit_code_for_all(codes: tuple[int, int], expected: int) -> None:
    with pytest.raises(RanksError) as failed:
        launch(python(f"sys.exit({codes}[int(rank)])"), 2)
    assert failed.value.code == expected


def test_an_error_that_all_share_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RanksError):
        launch(python("print('out'); print('no such thing', file=sys.stderr); sys.exit(1)"), 2)
    assert capfd.readouterr() == ("out\n", "no such thing\n")


def test_an_error_of_another_rank_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RanksError):
        launch(python("rank == '1' and sys.exit('mine alone')"), 2)
    assert capfd.readouterr().err == "mine alone\n"


def test_a_rank_that_waits_for_a_dead_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_GRACE", 0.2)
    begun = time.monotonic()
    with pytest.raises(RanksError) as failed:
        launch(python("sys.exit(4) if rank == '1' else time.sleep(60)"), 2)
    assert failed.value.code == signal.SIGKILL
    assert time.monotonic() - begun < 30


def test_sigterm_reaches_the_ranks(tmp_path: Path) -> None:
    """Each of them says that it was told, and the parent outlives them."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, sys, time\n"
        "own = sys.argv[1] + os.environ['RANK']\n"
        "def stop(*_):\n    open(own + '.told', 'w'); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(own + '.ready', 'w')\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(rank), str(tmp_path) + os.sep])
    while len(list(tmp_path.glob("*.ready"))) < 2 and parent.poll() is None:
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(30) == 130
    assert sorted(path.name for path in tmp_path.glob("*.told")) == ["0.told", "1.told"]
