"""The ground everything stands on: pins, floors, and what the source never does."""

from __future__ import annotations

import ast
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import segcompass

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "segcompass").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Distribution name to version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    entries = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in entries}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name it goes by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Calls that would run or trust what a file says, or load a checkpoint loosely."""
    for name, call in calls(tree):
        settings = {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}
        if name in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}:
            yield name
        if name == "torch.load" and settings.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if settings.get("trust_remote_code") == "True":
            yield "trust_remote_code=True"
        if name.endswith("load_state_dict") and settings.get("strict") == "False":
            yield "strict=False"


def test_the_version_is_said_once() -> None:
    assert segcompass.__version__ == PROJECT["version"]


def test_every_dependency_has_a_pin_that_it_accepts() -> None:
    known = pins()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        pin = known.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no pin for {requirement.name}"
        assert pin in requirement.specifier, f"{requirement} refuses the pin {pin}"


def test_torch_is_pinned_without_a_local_label() -> None:
    assert pins()["torch"] == "2.13.0"  # "+cpu" would be found on one index only


def test_the_two_commands_of_the_readme_are_make_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)\b", readme))
    assert {"demo", "test"} <= named
    assert {"demo", "test", "check"} <= set(targets)


def test_tests_mirror_the_floors() -> None:
    floors = {p.name for p in (ROOT / "src" / "segcompass").iterdir() if p.is_dir()}
    strays = {p.parent.name for p in (ROOT / "tests").glob("*/test_*.py")} - floors - {"e2e"}
    assert not strays, f"tests/ has folders that src/segcompass has not: {sorted(strays)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_trusts_what_it_reads(path: Path) -> None:
    assert not list(forbidden(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(p)",
        "m.load_state_dict(s, strict=False)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_scan_sees_what_it_looks_for(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


def test_tests_have_no_network() -> None:
    with pytest.raises(OSError, match="tests run offline"), socket.socket() as s:
        s.connect(("192.0.2.1", 80))  # an address reserved for documentation
