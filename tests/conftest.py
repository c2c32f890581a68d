"""What every test runs under: one thread a process, no network, reproducible examples."""

from __future__ import annotations

import os

# Before torch is imported: processes side by side, each with its own thread pool, slow each other
# down several-fold on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "segcompass",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "25")),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("segcompass")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines; processes on this one may talk (torch.distributed)."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        here = self.family == socket.AF_UNIX or address[0] in {"localhost", "127.0.0.1", "::1"}
        if not here:
            raise OSError(f"tests run offline, but something connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random parts around a Qwen2.5-VL; do not write to it."""
    from tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="session")
def tiny_llava_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random parts around a LLaVA; do not write to it."""
    from tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("llava") / "model", family="llava")


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of every split; do not write to it."""
    from tiny import tiny_scenes

    return tiny_scenes(tmp_path_factory.mktemp("scenes") / "scenes")


@pytest.fixture(scope="session")
def warm_config(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path) -> Path:
    """The config of a run that has all but its joint stage behind it; do not write to RUN."""
    from recipes import write_config

    from segcompass.learning import train

    path = write_config(tmp_path_factory.mktemp("warm"), scenes_root)
    for stage in ("segmenter", "warmup", "sae"):
        train.run(stage, path, [], resume=True)
    return path


@pytest.fixture(scope="session", params=["qwen2_5_vl", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    """Both families of policies, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def policy_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder without concentration tokens; do not write to it."""
    from tiny import write_policy

    return write_policy(tmp_path_factory.mktemp(family) / "policy", family)


@pytest.fixture(scope="session")
def policy(family: str, policy_folder: Path) -> Any:
    """The policy in that folder; do not change it."""
    from tiny import policy_config

    from segcompass.reasoning.loading import load_policy

    return load_policy(policy_folder, policy_config(family, max_new_tokens=60))
