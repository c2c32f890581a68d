"""The command line with a made-up model: what is printed where, and every exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from factories import make_prediction, no_target
from PIL import Image
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.io import assets
from segcompass.io.errors import CheckpointError, DataError, ImageError, UnsafeFileError
from segcompass.io.progress import progress
from segcompass.types import Prediction

run = CliRunner()
Install = Callable[..., None]


class FakeModel:
    """Answers at once; refuses empty instructions as the real one does."""

    options: dict[str, Any] = {}  # noqa: RUF012 (what the last call was given, read by the tests)
    calls: list[int] = []  # noqa: RUF012

    def predict_batch(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], **options: Any
    ) -> list[Prediction]:
        FakeModel.options = options
        FakeModel.calls.append(len(images))
        if not all(text.strip() for text in instructions):
            raise ValueError("the instruction is empty; say what to look for")
        return [
            replace(no_target() if "nothing" in text else make_prediction(), instruction=text)
            for text in instructions
        ]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put made-up functions in the place of a module, by name."""

    def put(module: str, **members: Any) -> None:
        fake = ModuleType(module)
        for name, member in members.items():
            setattr(fake, name, member)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


@pytest.fixture
def model(install: Install) -> type[FakeModel]:
    """A model that loads from anything."""
    FakeModel.calls = []
    loader = SimpleNamespace(from_pretrained=lambda name, **options: FakeModel())
    install("segcompass.pipeline", SegCompass=loader)
    return FakeModel


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 24), (40 * i, 80, 120)).save(folder / f"{i}.png")
    return folder


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from segcompass.apps.cli import app\n"
        "for line in ['--help'], ['predict', '--help'], ['data', 'scenes', '--help']:\n"
        "    assert CliRunner().invoke(app, line).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'PIL', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert run.invoke(app, ["--version"]).stdout.strip() == "0.1.0"


def test_predict_prints_one_row_per_picture(model: type[FakeModel], pictures: Path) -> None:
    result = run.invoke(app, ["predict", str(pictures), "-i", "the [red] mug"])
    assert result.exit_code == 0, result.output
    assert [f"{i}.png" in result.stdout for i in range(3)] == [True] * 3
    assert "the [red] mug" in result.stdout  # brackets are no markup
    assert result.stderr == ""  # silent where there is no terminal


def test_predict_json_is_one_object_per_line(model: type[FakeModel], pictures: Path) -> None:
    result = run.invoke(app, ["predict", str(pictures / "*.png"), "-i", "mug", "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(row["source"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["schema"].startswith("segcompass.prediction/") for row in rows)


def test_nothing_found_is_a_result(model: type[FakeModel], pictures: Path) -> None:
    result = run.invoke(app, ["predict", str(pictures / "0.png"), "-i", "nothing here", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["status"] == "no_target"


def test_every_instruction_is_asked_of_every_picture(
    model: type[FakeModel], pictures: Path
) -> None:
    line = ["predict", str(pictures), "-i", "mug", "-i", "hat", "--json", "--batch-size", "4"]
    rows = [json.loads(text) for text in run.invoke(app, line).stdout.splitlines()]
    assert [row["instruction"] for row in rows] == ["mug", "hat"] * 3
    assert model.calls == [4, 2]


def test_options_reach_the_model(model: type[FakeModel], pictures: Path) -> None:
    line = ["predict", str(pictures), "-i", "mug", "--threshold", "0.7", "--no-force-format"]
    assert run.invoke(app, [*line, "--max-new-tokens", "9"]).exit_code == 0
    assert model.options == {"threshold": 0.7, "max_new_tokens": 9, "force_format": False}


def test_predict_writes_files(model: type[FakeModel], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["predict", str(pictures), "-i", "mug", "-i", "hat", "--out", str(out)]
    assert run.invoke(app, line).exit_code == 0
    assert (out / "report.html").stat().st_size > 0
    assert len(list(out.glob("*.npz"))) == 6
    coco = json.loads((out / "coco.json").read_text())
    assert [len(coco[key]) for key in ("images", "categories", "annotations")] == [3, 2, 12]
    truth = make_prediction()
    areas = {entry["area"] for entry in coco["annotations"]}
    assert areas == {int(mask.sum()) for mask in truth.slot_masks[truth.accepted]}
    assert len({entry["id"] for entry in coco["annotations"]}) == 12


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_pairs_from_a_file(
    suffix: str, model: type[FakeModel], pictures: Path, tmp_path: Path
) -> None:
    listing = tmp_path / f"pairs.{suffix}"
    text = {
        "csv": "image,instruction\npictures/1.png,Кружка\npictures/0.png,杯子\n",
        "jsonl": '{"image": "pictures/1.png", "instruction": "Кружка"}\n\n'
        '{"image": "pictures/0.png", "instruction": "杯子"}\n',
    }[suffix]
    listing.write_text("\ufeff" + text, encoding="utf-8")
    result = run.invoke(app, ["predict", "--instructions", str(listing), "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    found = [(Path(row["source"]).name, row["instruction"]) for row in rows]
    assert found == [("1.png", "Кружка"), ("0.png", "杯子")]


@pytest.mark.parametrize(
    "text", ["image\na.png\n", "", "image,instruction\n,mug\n", "image,instruction\na.png\n"]
)
def test_a_listing_without_its_columns(text: str, model: type[FakeModel], tmp_path: Path) -> None:
    listing = tmp_path / "pairs.csv"
    listing.write_text(text)
    result = run.invoke(app, ["predict", "--instructions", str(listing)])
    assert result.exit_code == 1
    assert str(listing) in result.stderr
    assert "instruction" in result.stderr


def test_a_listing_that_is_nested_too_deeply(model: type[FakeModel], tmp_path: Path) -> None:
    listing = tmp_path / "pairs.jsonl"
    listing.write_text("[" * 100_000)
    result = run.invoke(app, ["predict", "--instructions", str(listing)])
    assert result.exit_code == 1
    assert str(listing) in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        ["predict"],
        ["predict", "a.png"],
        ["predict", "-i", "mug"],
        ["predict", "a.png", "-i", "mug", "--instructions", "x.csv"],
        ["predict", "a.png", "-i", "mug", "--threshold", "2"],
        ["train", "everything", "c.yaml"],
        ["train", "sae", "missing.yaml"],
        ["data", "scenes", "--out", "d"],
        ["eval", "--data", "d"],
        ["fly"],
    ],
)
def test_usage_errors(line: list[str]) -> None:
    assert run.invoke(app, line).exit_code == 2


@pytest.mark.parametrize("bad", ["missing.png", "bad.png"])
def test_one_bad_picture_does_not_stop_the_others(
    bad: str, model: type[FakeModel], pictures: Path
) -> None:
    (pictures / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    sources = [str(pictures / name) for name in ("0.png", bad, "1.png")]
    result = run.invoke(app, ["predict", *sources, "-i", "mug", "--json", "--batch-size", "3"])
    assert result.exit_code == 3
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count(bad) == 1
    assert "Traceback" not in result.stderr


def test_one_bad_instruction_does_not_stop_the_others(
    model: type[FakeModel], pictures: Path
) -> None:
    line = ["predict", str(pictures / "0.png"), "-i", "mug", "-i", " ", "--json"]
    result = run.invoke(app, [*line, "--batch-size", "2"])
    assert result.exit_code == 3
    assert len(result.stdout.splitlines()) == 1
    assert "the instruction is empty" in result.stderr


def test_all_inputs_failed(model: type[FakeModel], tmp_path: Path) -> None:
    result = run.invoke(app, ["predict", str(tmp_path / "missing.png"), "-i", "mug"])
    assert result.exit_code == 1
    assert model.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such data"), 1),
        (CheckpointError("half a checkpoint"), 1),
        (ImageError("no picture"), 1),
        (ValueError("unknown key 'lr2', did you mean 'lr'?"), 1),
        (PermissionError(13, "Permission denied", "/model"), 1),
        (assets.MissingAssetError("weights are not here"), 4),
        (UnsafeFileError("a pickle"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, pictures: Path, install: Install) -> None:
    def fail(name: str, **options: Any) -> FakeModel:
        raise error

    install("segcompass.pipeline", SegCompass=SimpleNamespace(from_pretrained=fail))
    result = run.invoke(app, ["predict", str(pictures), "-i", "mug"])
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("place", ["taken.txt", "taken.txt/inside"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    place: str, model: type[FakeModel], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.txt").write_text("keep me")
    out = str(tmp_path / place)
    result = run.invoke(app, ["predict", str(pictures), "-i", "mug", "--out", out])
    assert (result.exit_code, model.calls) == (1, [])
    assert f"{out} cannot be a folder" in result.stderr


def test_an_interrupted_run_keeps_the_whole_of_what_it_has(
    pictures: Path, install: Install, tmp_path: Path
) -> None:
    class Interrupted(FakeModel):
        def predict_batch(self, images: Any, instructions: Any, **options: Any) -> Any:
            if len(FakeModel.calls) == 2:
                raise KeyboardInterrupt
            return super().predict_batch(images, instructions, **options)

    FakeModel.calls = []
    loader = SimpleNamespace(from_pretrained=lambda name, **options: Interrupted())
    install("segcompass.pipeline", SegCompass=loader)
    out = tmp_path / "out"
    result = run.invoke(app, ["predict", str(pictures), "-i", "mug", "--out", str(out)])
    assert result.exit_code == 130 and "1.png" in result.stdout
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 2
    assert (out / "report.html").is_file()


def test_what_is_told_cannot_drive_the_terminal(model: type[FakeModel], pictures: Path) -> None:
    (pictures / "0.png").rename(pictures / "\x1b[31mred.png")
    (pictures / "bad\x1b[2J.png").write_bytes(b"")
    result = run.invoke(app, ["predict", str(pictures), "-i", "mug\u202e"])
    assert result.exit_code == 3
    assert "\x1b" not in result.output and "\u202e" not in result.output
    assert "␛[31mred.png" in result.stdout and "bad␛[2J.png" in result.stderr


def test_pillow_says_nothing_about_large_pictures(
    model: type[FakeModel],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # it warns above
    assert run.invoke(app, ["predict", str(pictures / "0.png"), "-i", "mug"]).exit_code == 0
    assert [str(told.message) for told in recwarn] == []


def test_debug_shows_the_traceback(
    pictures: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, **options: Any) -> FakeModel:
        raise CheckpointError("half a checkpoint")

    monkeypatch.setenv("SEGCOMPASS_DEBUG", "")  # restored afterwards, whatever --debug sets
    install("segcompass.pipeline", SegCompass=SimpleNamespace(from_pretrained=fail))
    result = run.invoke(app, ["--debug", "predict", str(pictures), "-i", "mug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: half a checkpoint"


def test_a_bug_keeps_its_traceback(pictures: Path, install: Install) -> None:
    def fail(name: str, **options: Any) -> FakeModel:
        raise TypeError("ours")

    install("segcompass.pipeline", SegCompass=SimpleNamespace(from_pretrained=fail))
    result = run.invoke(app, ["predict", str(pictures), "-i", "mug"])
    assert isinstance(result.exception, TypeError)


def test_demo(
    model: type[FakeModel], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"{i}.png", "instruction": "the mug"} for i in range(3)]
    (pictures / "demo.json").write_text(json.dumps(rows))
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    pictures.rename(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    result = run.invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "report.html"
    assert (tmp_path / "report.html").is_file()
    assert "#100" in result.stdout  # the concept that the discs are made of


def test_demo_without_its_pictures(
    model: type[FakeModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    result = run.invoke(app, ["demo"])
    assert result.exit_code == 4
    assert "install" in result.stderr


def test_train_hands_on_what_it_was_given(tmp_path: Path, install: Install) -> None:
    calls: list[tuple[Any, ...]] = []
    install("segcompass.learning.train", run=lambda *given: calls.append(given))
    config = tmp_path / "nano.yaml"
    config.write_text("{}")
    line = ["train", "joint", str(config), "--set", "joint.steps=3", "--set", "seed=1", "--resume"]
    assert run.invoke(app, line).exit_code == 0
    assert calls == [("joint", config, ["joint.steps=3", "seed=1"], True)]


def test_data_scenes_hands_on_its_counts(tmp_path: Path, install: Install) -> None:
    calls: list[tuple[Any, ...]] = []

    def write_scenes(
        out: Path, counts: dict[str, int], seed: int, workers: int | None, progress: Any
    ) -> None:
        progress(1, 2)
        calls.append((out, counts, seed, workers))

    install("segcompass.data.scenes.writer", write_scenes=write_scenes)
    line = ["data", "scenes", "--out", str(tmp_path), "--train", "4", "--testB", "2", "--seed", "9"]
    assert run.invoke(app, line).exit_code == 0
    assert calls == [(tmp_path, {"train": 4, "val": 0, "testA": 0, "testB": 2}, 9, None)]


def test_doctor(install: Install) -> None:
    facts = json.loads(run.invoke(app, ["doctor", "--json"]).stdout)
    assert {"torch", "device", "threads", "bundled nano"} <= set(facts)
    install("segcompass.presets", describe=lambda preset: {"policy": {"D": 3584}})
    assert "3,584" in run.invoke(app, ["doctor", "--preset", "qwen2.5-vl-7b"]).stdout


def test_bars_are_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work") as moved:
        moved(1, 2)
    assert capsys.readouterr() == ("", "")
