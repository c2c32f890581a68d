"""Sample panels: drawn when they are due, and training does not notice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segcompass import SegCompass
from segcompass.data.samples import read_dataset
from segcompass.geometry import Frame
from segcompass.io.images import load_image
from segcompass.learning.config import DataConfig
from segcompass.learning.watching.panels import Panels, choose, panel_samples
from segcompass.types import Sample


@pytest.fixture
def model(tiny_model: Path) -> SegCompass:
    """In the state of training: parts in different modes, layers after the SAE with gradient."""
    loaded = SegCompass.from_pretrained(tiny_model, device="cpu")
    loaded.train()
    loaded.encoder.eval()
    return loaded


@pytest.fixture
def samples(scenes_root: Path) -> list[Sample]:
    return panel_samples(DataConfig(root=scenes_root), count=2)


def train_step(model: SegCompass, sample: Sample) -> list[torch.Tensor]:
    """Loss and gradients of a step through all parts, with random numbers in it."""
    model.zero_grad()
    policy = model.policy
    visuals = [policy.backbone.prepare(load_image(sample.image_path))]
    states, hidden = policy(policy.encode(visuals, [sample.instruction], ["a mug"]), visuals)
    keys = model.encoder(torch.randn(1, 3, model.encoder.side, model.encoder.side))
    frames = [Frame.fit(sample.image_hw, model.encoder.side)]
    alignment = model.interface.align(states, keys, frames=frames)
    logits = model.interface.decode(keys, alignment, frames=frames)
    loss = (logits * torch.randn_like(logits)).square().mean() + hidden.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    parts = {"policy": policy, "encoder": model.encoder, "interface": model.interface}
    grads = {n: [p.grad for p in m.parameters() if p.grad is not None] for n, m in parts.items()}
    assert min(len(part) for part in grads.values()) > 5
    return [loss.detach(), *(grad for part in grads.values() for grad in part)]


def test_a_panel_changes_nothing_of_training(
    model: SegCompass, samples: list[Sample], tmp_path: Path
) -> None:
    """Loss, gradients, modes and random numbers are the same to the bit with and without."""
    panels = Panels(tmp_path, model, samples, every=1)
    torch.manual_seed(3)
    alone = train_step(model, samples[0])
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    panels(1)
    watched = train_step(model, samples[0])
    assert (tmp_path / "panels/step-000001.png").exists()
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert [module.training for module in model.modules()] == modes


def test_panels_are_drawn_when_they_are_due(
    model: SegCompass, samples: list[Sample], tmp_path: Path
) -> None:
    panels = Panels(tmp_path / "joint", model, samples, every=2)
    seen: list[int] = []
    losses = panels.before(lambda step: seen.append(step) or step)  # type: ignore[func-returns-value]
    assert [losses(step) for step in range(4)] == [0, 1, 2, 3] == seen
    files = sorted((tmp_path / "joint/panels").iterdir())
    assert [f.name for f in files] == ["step-000000.png", "step-000002.png"]
    with Image.open(files[0]) as page:
        page.load()
        assert page.height > 2 * 224  # a card for each of two samples


def test_ranks_that_do_not_write_answer_all_the_same(
    model: SegCompass, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = model.predict_batch

    def counted(images: list[Path], instructions: list[str], **options: bool) -> object:
        asked.append(len(images))
        assert options == {"force_format": False} and not model.training
        return answer(images, instructions, **options)

    monkeypatch.setattr(model, "predict_batch", counted)
    Panels(tmp_path, model, samples, every=5, writes=False)(5)
    assert asked == [2] and not list(tmp_path.iterdir())


def test_a_panel_that_fails_does_not_stop_training(
    model: SegCompass, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [replace(samples[0], image_path=tmp_path / "gone.jpg")]
    panels = Panels(tmp_path, model, gone, every=1)
    panels(1)
    panels(2)
    (told,) = [record.getMessage() for record in caplog.records]  # once
    assert "no sample panel at step 1" in told and "gone.jpg: no such file" in told
    assert model.training and not (tmp_path / "panels").exists()


def test_a_full_disk_does_not_stop_training(
    model: SegCompass,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    Panels(tmp_path, model, samples, every=1)(1)
    assert "No space left on device" in caplog.text


def test_the_validation_split_is_looked_at_before_training_samples(
    scenes_root: Path, tmp_path: Path
) -> None:
    found = panel_samples(DataConfig(root=scenes_root))
    assert 0 < len(found) <= 4
    assert {s.sample_id for s in found} <= {s.sample_id for s in read_dataset(scenes_root, "val")}
    alone = tmp_path / "refcoco"
    shutil.copytree(scenes_root / "reasonseg/train", alone / "train")
    trained = panel_samples(DataConfig(root=alone))
    assert trained and {s.image_path.parent for s in trained} == {alone / "train"}
    assert panel_samples(DataConfig(root=tmp_path / "nothing")) == []


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), max_size=20), st.integers(0, 8)
)
def test_choosing_repeats_no_picture_and_prefers_new_kinds(
    rows: list[tuple[int, str]], count: int
) -> None:
    samples = [
        Sample(str(i), Path(str(picture)), picture, (4, 4), "x", (), kind=kind)
        for i, (picture, kind) in enumerate(rows)
    ]
    chosen = choose(samples, count)
    assert len(chosen) == min(count, len({picture for picture, _ in rows}))
    assert len({s.image_path for s in chosen}) == len(chosen)
    kinds = [s.kind for s in chosen]
    fresh = len(dict.fromkeys(kinds))
    assert len(set(kinds[:fresh])) == fresh  # each of them once before any comes again
