"""Several processes that train together, as torchrun would start them, for tests.

A server process imports the heavy packages once; ranks are forked from it, so that a world of two
starts in a moment.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_PATIENCE = 250  # s; less than a test may take, so that the ranks' words are heard
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "transformers", "tiny"])


def launch(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank and return what each returned, in rank order.

    The results must be picklable. A rank that was killed by SIGKILL returns None.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    # As under torchrun, the store is the parent's: no port can be taken meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = (str(Path(sys.modules[function.__module__].__file__ or "")), function.__name__)
    started = []
    for rank in range(ranks):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank, args=(rank, ranks, store.port, place, args, theirs)
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    results, failures = [], []
    for rank, (process, pipe) in enumerate(started):
        kind, value = "died", None
        try:
            if pipe.poll(_PATIENCE):
                kind, value = pipe.recv()
        except EOFError:  # it ended without a word
            pass
        process.join(10)
        if kind == "failed" or (kind == "died" and process.exitcode != -signal.SIGKILL):
            failures.append(f"rank {rank} {kind} (exit code {process.exitcode}):\n{value}")
            process.kill()
        results.append(value)
    assert not failures, "\n".join(failures)
    return results


def _rank(
    rank: int, ranks: int, port: int, place: tuple[str, str], args: tuple[Any, ...], pipe: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        pipe.send(("done", _function(*place)(*args)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _function(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function
