"""Data sets of other tools are read back, after the import, as they were drawn."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_sets import HW, SQUARE, STRIP, annotation, edit_instances, write_set
from PIL import Image

from segcompass.data.check import check_dataset
from segcompass.data.importing import import_dataset
from segcompass.data.samples import read_dataset
from segcompass.io import masks
from segcompass.io.errors import DataError, UnsafeFileError
from segcompass.types import Sample

SIZE = (20, 30)
BOX = np.zeros(HW, dtype=bool)
BOX[1:4, 2:6] = True  # what SQUARE draws


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = write_set(tmp_path / "coco")
    (root / "refs(unc).p").unlink()
    cup = [{"id": 1, "name": "mug"}, {"id": 2, "name": "traffic light"}]
    edit_instances(
        root,
        categories=lambda _: cup,
        annotations=lambda rows: [rows[0], rows[1] | {"category_id": 2}, *rows[2:]],
    )
    return root


def bring(source: Path, **options: Any) -> tuple[list[Sample], list[str]]:
    """The imported train split, and the names of what was left out."""
    broken: list[str] = []
    out = source.parent / "out"
    around = set(source.parent.iterdir())
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    import_dataset(source, out, on_broken=lambda name, _: broken.append(name), **options)
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before
    assert {*source.parent.iterdir()} == {*around, out}
    assert check_dataset(out).problems == []
    return read_dataset(out, options.get("split", "train")), broken


def drawn(sample: Sample) -> list[np.ndarray]:
    return [masks.decode(rle) for rle in sample.targets]


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_coco_without_instructions_asks_for_every_category(coco: Path) -> None:
    samples, broken = bring(coco)
    assert [s.instruction for s in samples] == ["mug", "traffic light"]
    np.testing.assert_array_equal(drawn(samples[0]), [BOX])
    np.testing.assert_array_equal(drawn(samples[1]), [STRIP])
    assert samples[0].image_path.read_bytes() == (coco / "images" / "p.jpg").read_bytes()
    assert broken == []


def test_coco_with_a_table(coco: Path) -> None:
    path = table(
        coco.parent,
        "image,instruction,targets,split\n"
        'p.jpg,"both, please",11;12,\n'
        "7,the lights,traffic light,train\n"
        "p,a piano,,train\n"
        "p.jpg,the café,mug,val\n"
        "p.jpg,wrong,99,\n"
        "q.jpg,lost,,\n",
    )
    samples, broken = bring(coco, instructions=path)
    assert [s.instruction for s in samples] == ["both, please", "the lights", "a piano"]
    assert [len(s.targets) for s in samples] == [2, 1, 0]
    np.testing.assert_array_equal(drawn(samples[0]), [BOX, STRIP])
    assert broken == ["row 5", "row 6"]
    (other,) = read_dataset(coco.parent / "out", "val")
    assert other.instruction == "the café"
    assert other.target_ids == samples[0].target_ids[:1]  # one annotation, asked for twice


def test_a_json_table_without_targets_asks_for_everything(coco: Path) -> None:
    path = coco.parent / "t.json"
    path.write_text(json.dumps([{"image": 7, "instruction": "all of it"}]))
    (sample,), _ = bring(coco / "instances.json", instructions=path, split="test")
    np.testing.assert_array_equal(drawn(sample), [BOX, STRIP])


def test_coco_pictures_may_lie_zipped_or_elsewhere(coco: Path) -> None:
    original = (coco / "images" / "p.jpg").read_bytes()
    with zipfile.ZipFile(coco / "elsewhere.zip", "w") as archive:
        archive.write(coco / "images" / "p.jpg", "p.jpg")
    (coco / "images" / "p.jpg").unlink()
    samples, _ = bring(coco, images=coco / "elsewhere")
    assert samples[0].image_path.read_bytes() == original


def test_a_picture_with_a_broken_annotation_is_left_out(coco: Path) -> None:
    (coco / "images" / "q.jpg").write_bytes((coco / "images" / "p.jpg").read_bytes())
    more = {"id": 8, "file_name": "q.jpg", "height": HW[0], "width": HW[1]}
    broken = annotation(20, [[1, 1, 5, 1, 5]], image_id=8)
    edit_instances(coco, images=lambda r: [*r, more], annotations=lambda r: [*r, broken])
    samples, left_out = bring(coco)
    assert {s.image_path.name for s in samples} == {"p.jpg"} and left_out == ["image 8"]


def labelme(folder: Path, name: str, *shapes: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(folder / f"{name}.png")
    content = {"imagePath": f"{name}.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content | {"shapes": list(shapes)} | more))
    return path


def shape(label: str, *points: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"label": label, "points": [list(p) for p in points], "group_id": None} | more


def filled(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_labelme_shapes_become_instances(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    labelme(
        source,
        "a",
        shape("the cup", (2, 3), (8, 3), (8, 9), (2, 9), shape_type="polygon"),
        shape("the cup", (10, 3), (14, 9), shape_type="rectangle", group_id=1),
        shape("the cup", (16, 3), (20, 9), shape_type="rectangle", group_id=1),
        shape("a coin", (10, 10), (15, 10), shape_type="circle"),
    )
    (cups, coin), broken = bring(source)
    assert (cups.instruction, coin.instruction, broken) == ("the cup", "a coin", [])
    two_parts = filled(10, 3, 14, 9) | filled(16, 3, 20, 9)
    np.testing.assert_array_equal(drawn(cups), [filled(2, 3, 8, 9), two_parts])
    (disc,) = drawn(coin)
    assert disc.sum() == pytest.approx(np.pi * 25, rel=0.05) and disc[10, 10]


def test_labelme_entries_that_cannot_be_used(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    square = shape("cup", (2, 3), (8, 3), (8, 9))
    labelme(source, "good", square, imagePath="C:\\old\\good.png")  # found by its stem
    labelme(source, "line", shape("cup", (2, 3), (8, 3), shape_type="line"))
    labelme(source, "size", square, imageHeight=7)
    labelme(source, "gone", square, imagePath="../secret.png").with_suffix(".png").unlink()
    labelme(source, "point", shape("cup", (2, 3), (8, 3)))
    labelme(source, "off", shape("cup", (90, 90), (95, 90), (95, 95)))
    labelme(source, "odd", shape("cup", (1, 1), shape_type=3))
    (source / "text.json").write_text("{")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "secret.png")  # outside: not followed
    samples, broken = bring(source)
    assert [s.image_path.name for s in samples] == ["good.png"]
    assert broken == [f"{n}.json" for n in ("gone", "line", "odd", "off", "point", "size", "text")]


def save_mask(path: Path, mask: np.ndarray, high: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * np.uint8(high)).save(path)


def test_pictures_with_masks_in_folders(tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    (source / "images").mkdir(parents=True)
    for name in ("the-red_mug_01", "kitchen", "alone"):
        Image.new("RGB", SIZE[::-1]).save(source / "images" / f"{name}.jpg")
    save_mask(source / "masks" / "the-red_mug_01.png", filled(1, 2, 5, 6), high=1)
    save_mask(source / "masks" / "kitchen" / "a cup.png", filled(3, 3, 9, 9))
    save_mask(source / "masks" / "kitchen" / "a plate.png", filled(12, 3, 19, 9))
    samples, broken = bring(source)
    assert [s.instruction for s in samples] == ["a cup", "a plate", "the red mug"]
    expected = [filled(3, 3, 9, 9), filled(12, 3, 19, 9), filled(1, 2, 5, 6)]
    for sample, mask in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(drawn(sample), [mask])
    assert broken == ["alone.jpg"]


def test_masks_beside_their_pictures_and_a_table(tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    save_mask(source / "a_mask.png", filled(1, 2, 5, 6))
    save_mask(source / "b_mask.png", np.zeros(SIZE, dtype=bool))
    save_mask(source / "c_mask.png", np.ones((5, 5), dtype=bool))
    for name in "abc":
        Image.new("RGB", SIZE[::-1]).save(source / f"{name}.jpg")
    path = table(tmp_path, "image,instruction\na,what to drink from?\n")
    (sample,), broken = bring(source, instructions=path, link=True)
    assert sample.instruction == "what to drink from?"
    np.testing.assert_array_equal(drawn(sample), [filled(1, 2, 5, 6)])
    assert sample.image_path.samefile(source / "a.jpg")  # linked, not copied
    assert broken == ["b.jpg", "c.jpg"]


def test_pictures_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    labelme(source, "a", shape("cup", (2, 3), (8, 3), (8, 9)))
    labelme(source / "more", "a", shape("jug", (2, 3), (8, 3), (8, 9)))
    samples, _ = bring(source)
    assert sorted(s.image_path.name for s in samples) == ["a-2.png", "a.png"]


def test_rows_about_pictures_of_one_name_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    labelme(source, "a", shape("cup", (2, 3), (8, 3), (8, 9)))
    labelme(source / "more", "a", shape("jug", (2, 3), (8, 3), (8, 9)))
    path = table(tmp_path, "image,instruction\na.png,the first\nmore/a.png,the second\n")
    samples, broken = bring(source, instructions=path)
    asked = {s.instruction: s.image_path.name for s in samples}
    assert asked == {"the first": "a.png", "the second": "a-2.png"}
    assert broken == ["more/a.png"]  # its rows may be among the first one's


def test_a_labelme_folder_is_not_left_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "labelme"
    square = shape("cup", (2, 3), (8, 3), (8, 9))
    labelme(source, "a", square, imagePath="../secret.png").with_suffix(".png").unlink()
    labelme(source / "deep", "b", square, imagePath="../deep/b.png")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "secret.png")
    monkeypatch.chdir(source)
    broken: list[str] = []
    out = tmp_path / "out"
    import_dataset(Path(), out, on_broken=lambda name, _: broken.append(name))
    assert [p.name for p in (out / "images").iterdir()] == ["b.png"] and broken == ["a.json"]


@pytest.mark.parametrize(
    "damage",
    [
        {"label": None},
        {"label": " "},
        {"label": "cup", "points": [[1, 1], [10**400, 1], [5, 5]]},
        {"imagePath": "n" * 300},
    ],
)
def test_odd_labelme_files_do_not_stop_the_others(tmp_path: Path, damage: dict[str, Any]) -> None:
    source = tmp_path / "labelme"
    square = shape("cup", (2, 3), (8, 3), (8, 9))
    labelme(source, "good", square)
    path = labelme(source, "odd", square | damage, **damage)
    path.with_suffix(".png").rename(source / "unnamed.png")
    samples, broken = bring(source)
    assert [s.image_path.name for s in samples] == ["good.png"] and broken == ["odd.json"]


@pytest.mark.parametrize("category", [{"id": 1, "name": None}, {"id": 1, "name": ""}])
def test_coco_categories_without_a_name(coco: Path, category: dict[str, Any]) -> None:
    edit_instances(coco, categories=lambda rows: [category, *rows[1:]])
    with pytest.raises(DataError, match="give it a name"):
        import_dataset(coco, coco.parent / "out", on_broken=refuse)


def test_a_category_or_name_of_an_odd_kind_costs_its_own_picture(coco: Path) -> None:
    more = {"id": 8, "file_name": "n" * 300 + ".jpg", "height": HW[0], "width": HW[1]}
    edit_instances(
        coco,
        images=lambda rows: [*rows, more],
        annotations=lambda rows: [rows[0] | {"category_id": [1]}, *rows[1:]],
    )
    names: list[str] = []
    with pytest.raises(DataError, match="could be imported"):
        import_dataset(coco, coco.parent / "out", on_broken=lambda name, _: names.append(name))
    assert names == ["image 7", "image 8"]


def test_files_with_a_byte_order_mark_or_half_characters(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    path = labelme(source, "a", shape("half \ud800 a cup", (2, 3), (8, 3), (8, 9)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (sample,), broken = bring(source)
    assert (sample.instruction, broken) == ("half \ud800 a cup", [])


def test_a_split_may_be_a_number(coco: Path) -> None:
    path = coco.parent / "t.json"
    path.write_text(json.dumps([{"image": 7, "instruction": "all of it", "split": 3}]))
    import_dataset(coco, coco.parent / "out", on_broken=refuse, instructions=path)
    assert len(read_dataset(coco.parent / "out", "3")) == 1


def refuse(name: str, error: DataError) -> None:
    raise error


def test_what_cannot_be_imported_leaves_nothing_behind(coco: Path) -> None:
    out = coco.parent / "out"
    (coco.parent / "empty").mkdir()
    with pytest.raises(DataError, match=r"nothing in .* could be imported"):
        import_dataset(coco.parent / "empty", out, on_broken=refuse)
    with pytest.raises(DataError, match="is no COCO file"):
        import_dataset(coco.parent / "empty", out, on_broken=refuse, form="coco")
    with pytest.raises(DataError, match="choose one of coco, labelme, masks"):
        import_dataset(coco, out, on_broken=refuse, form="voc")
    (coco / "again.json").write_bytes((coco / "instances.json").read_bytes())
    with pytest.raises(DataError, match="several COCO files"):
        import_dataset(coco, out, on_broken=refuse)
    (coco / "again.json").unlink()
    edit_instances(coco, images=lambda rows: [rows[0] | {"file_name": "../p.jpg"}])
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        import_dataset(coco, out, on_broken=refuse)
    assert sorted(p.name for p in coco.parent.iterdir()) == ["coco", "empty"]
    out.mkdir()
    with pytest.raises(DataError, match="exists; choose"):
        import_dataset(coco, out, on_broken=refuse)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"image,text\np.jpg,x\n", "row 1: needs image and instruction"),
        ("t.csv", b"image,instruction\np.jpg,\xe9\n", "another encoding"),
        ("t.json", b"{}", "no list of objects"),
        ("t.json", b'[{"image": "p", "instruction": "x", "targets": 3}]', "targets are a list"),
        ("gone.csv", None, "is missing"),
        ("coco", None, "cannot be read"),
    ],
)
def test_broken_tables_are_named(
    coco: Path, name: str, content: bytes | None, message: str
) -> None:
    path = coco.parent / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_dataset(coco, coco.parent / "out", on_broken=refuse, instructions=path)


def test_polygons_of_coco_stay_polygons(coco: Path) -> None:
    bring(coco)
    tables = json.loads((coco.parent / "out" / "instances.json").read_text())
    assert tables["annotations"][0]["segmentation"] == SQUARE
    assert tables["annotations"][0]["area"] == BOX.sum()
    assert tables["annotations"][0]["bbox"] == [2, 1, 4, 3]
