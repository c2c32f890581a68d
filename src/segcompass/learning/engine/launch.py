"""Start the ranks of one machine by a plain command, as torchrun would: for a laptop's cores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from segcompass.io.errors import SegCompassError

_GRACE = 60.0  # s that ranks get to end by themselves once one of them has failed


class RanksError(SegCompassError):
    """Processes that were started have ended with an error, and said which."""

    def __init__(self, code: int) -> None:
        super().__init__(f"training ended with exit code {code}; the reason stands above")
        self.code = code


def wanted_ranks(processes: int) -> int:
    """How many processes are to be started: one where torchrun did it, or where a GPU computes."""
    return 1 if "RANK" in os.environ or torch.cuda.is_available() else processes


def launch(command: Sequence[str], ranks: int) -> None:
    """Run a command on several ranks side by side, and wait for all of them.

    They find each other by torchrun's variables. Ctrl-C reaches them from the terminal, SIGTERM is
    passed on; what they do then is theirs. Rank 0 speaks as the command alone would; of the others
    is shown what they write to stderr, where they end otherwise than rank 0.

    Args:
        command: Program and arguments, the same for all.
        ranks: How many.

    Raises:
        RanksError: with the exit code of rank 0, or if that is 0, the first other than 0.
    """
    # The store is the parent's, so that no other program can take its port meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, ranks)]
        stack.enter_context(_signals_passed_on(started))
        for rank in range(ranks):
            place = _place(rank, ranks, store.port)
            out, said = (subprocess.DEVNULL, words[rank - 1]) if rank else (None, None)
            started.append(subprocess.Popen(command, env=place, stdout=out, stderr=said))
        codes = _wait(started)
        for code, said in zip(codes[1:], words, strict=True):
            if code != codes[0]:
                said.seek(0)
                shutil.copyfileobj(said, sys.stderr.buffer)
    if any(codes):
        raise RanksError(next(abs(code) for code in codes if code))


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one rank; threads are shared out, unless that is settled already."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextmanager
def _signals_passed_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within the block, this process outlives its ranks."""

    def stop(*_: object) -> None:
        for process in started:
            process.terminate()

    # Not SIG_IGN, which the ranks would inherit.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: stop}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes; once a rank has failed, the others are not waited for without end."""
    failed_at = None
    while None in (codes := [process.poll() for process in started]):
        now = time.monotonic()
        if failed_at is None and any(codes):
            failed_at = now
        if failed_at is not None and now > failed_at + _GRACE:
            for process in started:
                process.kill()
        time.sleep(0.05)
    return [process.returncode for process in started]
