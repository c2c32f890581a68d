"""Every sort of problem is named by file and entry, counted, and leaves the rest readable."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from coco_sets import (
    HW,
    SQUARE,
    annotation,
    edit_instances,
    reference,
    write_grefs,
    write_pickle,
    write_set,
)
from PIL import Image

from segcompass.data.check import check_dataset
from segcompass.data.findings import Findings
from segcompass.data.samples import read_dataset
from segcompass.io.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_set(tmp_path / "refcoco")


def found(findings: Findings) -> list[tuple[str, str]]:
    return [(problem.sort.value, problem.entry) for problem in findings.problems]


def test_a_whole_set_has_no_problems(root: Path) -> None:
    findings = check_dataset(root)
    assert found(findings) == [] and findings.counts == {}
    assert [tuple(split) for split in findings.splits] == [
        ("val", 1, 2, 10_834),
        ("testA", 1, 2, 5_657),
    ]
    assert json.loads(json.dumps(findings.as_dict()))["splits"][0]["published"] == 10_834


def test_scenes_have_no_problems(scenes_root: Path) -> None:
    for layout in ("refcoco", "grefcoco", "reasonseg"):
        findings = check_dataset(scenes_root, layout)
        assert found(findings) == []
        for split in findings.splits:
            samples = read_dataset(scenes_root, split.split, layout=layout)
            assert split.samples == len(samples)
            assert split.images == len({s.image_id for s in samples})


BROKEN_MASKS = {
    "five numbers": ([[1, 1, 5, 1, 5]], "broken mask"),
    "seven numbers": ([[1, 1, 5, 1, 5, 5, 2]], "broken mask"),
    "words": ([["a"] * 6], "broken mask"),
    "another size": ({"size": [60, 80], "counts": [0, 4800]}, "broken mask"),
    "too few runs": ({"size": list(HW), "counts": "1"}, "broken mask"),
    "nothing": (None, "broken mask"),
    "off the image": ([[1, 1, 30, 1, 30, 5]], "mask off the image"),
}


@pytest.mark.parametrize("case", BROKEN_MASKS)
def test_broken_masks_are_found_and_the_rest_is_read(root: Path, case: str) -> None:
    segmentation, sort = BROKEN_MASKS[case]
    edit_instances(root, annotations=lambda rows: [annotation(11, segmentation), *rows[1:]])
    findings = check_dataset(root)
    assert found(findings) == [(sort, "annotation 11")]
    readable = 2 if sort == "mask off the image" else 0
    assert [split.samples for split in findings.splits] == [readable, 2]
    named: list[str] = []
    write_pickle(root, [reference(1, 11), reference(2, 12)])
    samples = read_dataset(root, "val", on_broken=lambda name, error: named.append(name))
    assert named == (["1"] if sort == "broken mask" else [])
    assert {s.target_ids for s in samples} >= {(12,)}


def test_an_outline_may_end_a_pixel_outside(root: Path) -> None:
    near = [[-1.0, 0, HW[1] + 1, 0, HW[1] + 1, HW[0] + 1, -1, HW[0] + 1]]
    edit_instances(root, annotations=lambda rows: [annotation(11, near), *rows[1:]])
    assert found(check_dataset(root)) == []


def test_two_points_matter_only_where_they_are_asked_for(root: Path) -> None:
    edit_instances(root, annotations=lambda rows: [*rows, annotation(14, [[1, 1, 2, 2]])])
    assert found(check_dataset(root)) == []
    write_pickle(root, [reference(1, 14)])
    assert found(check_dataset(root)) == [("empty mask", "reference 1")]


def test_pictures_are_found_missing_broken_or_of_another_size(root: Path) -> None:
    def picture(image_id: int, name: Any, height: int = HW[0]) -> dict[str, Any]:
        return {"id": image_id, "file_name": name, "height": height, "width": HW[1]}

    whole = (root / "images" / "p.jpg").read_bytes()
    (root / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    more = [
        picture(1, "gone.jpg"),
        picture(2, "cut.jpg"),
        picture(3, "p.jpg", height=9),
        picture(4, "x.eps"),
        picture(5, "../out.jpg"),
        picture(6, 6),
        {"id": 8, "file_name": "p.jpg"},
    ]
    edit_instances(root, images=lambda rows: rows + more)
    assert found(check_dataset(root)) == [
        ("missing image", "image 1"),
        ("broken image", "image 2"),
        ("wrong size", "image 3"),
        ("unsafe file", "image 4"),
        ("unsafe file", "image 5"),
        ("missing image", "image 6"),
        ("broken entry", "image 8"),
    ]


def test_ids_are_found_twice_or_not_at_all(root: Path) -> None:
    write_pickle(root, [reference(1, 11), reference(1, 99), reference(3, 11, image_id=5)])
    edit_instances(
        root,
        images=lambda rows: rows * 2,
        annotations=lambda rows: [*rows, rows[0], annotation(14, SQUARE, image_id=70), {"id": 15}],
    )
    findings = check_dataset(root)
    assert found(findings) == [
        ("duplicate id", "image 7"),
        ("duplicate id", "annotation 11"),
        ("broken entry", "annotations[5]"),
        ("unknown id", "annotation 14"),
        ("duplicate id", "reference 1"),
        ("unknown id", "reference 1"),
        ("duplicate id", "reference 1"),
        ("duplicate id", "reference 1"),
        ("unknown id", "reference 3"),
        ("broken entry", "reference 3"),
    ]
    assert findings.counts == {"broken entry": 2, "duplicate id": 5, "unknown id": 3}
    assert [(s.split, s.samples) for s in findings.splits] == [("val", 2)]


def test_odd_references_are_named(root: Path) -> None:
    empty = reference(3, 11)
    empty["sentences"][0]["sent"] = empty["sentences"][0]["raw"] = " "
    odd = [{"split": "val"}, reference(2, "x"), empty, reference(4, 11) | {"sentences": []}]
    write_pickle(root, [reference(1, 11), *odd, reference(5, 11) | {"sentences": ["x"]}])
    assert found(check_dataset(root)) == [
        ("broken entry", name)
        for name in ("reference number 1", *(f"reference {n}" for n in (2, 3, 4, 5)))
    ]


class Runs:
    """Pickles into a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_cannot_be_read_do_not_hide_the_others(root: Path, tmp_path: Path) -> None:
    write_pickle(root, [Runs(tmp_path / "owned")])
    (root / "refs(umd).p").write_bytes(b"damaged")
    (root / "instances.json").write_bytes('{"images": "é"}'.encode("cp1252"))
    assert [problem.sort.value for problem in check_dataset(root).problems] == [
        "wrong encoding",
        "unsafe file",
        "unreadable file",
    ]
    assert not (tmp_path / "owned").exists()


def test_without_tables_no_reference_is_blamed(root: Path) -> None:
    (root / "instances.json").write_text("{")
    findings = check_dataset(root)
    assert (findings.counts, findings.splits) == ({"unreadable file": 1}, [])


def test_every_author_is_counted(root: Path) -> None:
    (root / "refs(google).p").write_bytes((root / "refs(unc).p").read_bytes())
    names = [(s.split, s.published) for s in check_dataset(root).splits]
    assert names == [
        ("unc:val", 10_834),
        ("unc:testA", 5_657),
        ("google:val", None),
        ("google:testA", None),
    ]


def test_grefcoco_with_several_and_no_targets(root: Path) -> None:
    (root / "refs(unc).p").unlink()
    write_grefs(root, [reference(1, [11, 12]), reference(2, [-1]), reference(3, [13])])
    findings = check_dataset(root)
    assert found(findings) == []
    assert findings.splits[0].samples == 4 == len(read_dataset(root, "val"))  # 13 is a crowd


def add(root: Path, name: str, note: Any, hw: tuple[int, int] = HW) -> Path:
    folder = root / "val"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", hw[::-1]).save(folder / f"{name}.jpg")
    path = folder / f"{name}.json"
    path.write_bytes(note if isinstance(note, bytes) else json.dumps(note).encode())
    return path


def shapes(*points: list[float]) -> dict[str, Any]:
    return {"text": ["the mug"], "shapes": [{"label": "target", "points": list(points)}]}


def test_reasonseg_problems(tmp_path: Path) -> None:
    add(tmp_path, "a", shapes([1, 1], [3, 1], [3, 3]))
    add(tmp_path, "b", shapes([1, 1], [90, 1], [3, 3]))
    add(tmp_path, "c", shapes([1, 1], [3]))
    add(tmp_path, "d", {"text": []})
    add(tmp_path, "e", b"\xe9\x81")
    add(tmp_path, "f", b"{")
    add(tmp_path, "g", {"text": ["x"]}).with_suffix(".jpg").write_bytes(b"no picture")
    add(tmp_path, "h", {"text": ["x"]}).with_suffix(".jpg").unlink()
    add(tmp_path, "i", {"text": ["x"]}).unlink()
    findings = check_dataset(tmp_path)
    assert sorted(found(findings), key=lambda f: f[1]) == [
        ("mask off the image", "b"),
        ("broken mask", "c"),
        ("broken entry", "d"),
        ("wrong encoding", "e"),
        ("unreadable file", "f"),
        ("broken image", "g"),
        ("missing image", "h"),
        ("broken entry", "i"),
    ]
    assert [tuple(split) for split in findings.splits] == [("val", 1, 1, None)]
    named: list[str] = []
    samples = read_dataset(tmp_path, "val", on_broken=lambda name, _: named.append(name))
    assert sorted(named) == ["c", "d", "e", "f", "g", "h", "i"]
    assert [s.sample_id for s in samples] == ["a-0", "b-0"]  # outside points are cut off


def test_reasonseg_oddities_do_not_stop_the_look(tmp_path: Path) -> None:
    remark = {"label": "Flag", "points": 3}
    add(tmp_path, "a", {"text": ["x"], "shapes": [remark]})
    add(tmp_path, "b", shapes(["1", "2"], ["3", "90"]))  # type: ignore[list-item]
    add(tmp_path, "c", {"text": ["x", " "]})
    add(tmp_path, "d", {"text": ["x"]}).unlink()
    (tmp_path / "val" / "d.json").mkdir()
    add(tmp_path, "e", shapes([10**400, 1], [3, 1], [3, 3]))
    assert sorted(found(check_dataset(tmp_path)), key=lambda f: f[1]) == [
        ("mask off the image", "b"),
        ("broken entry", "c"),
        ("unreadable file", "d"),
        ("broken mask", "e"),
    ]
    named: list[str] = []
    read_dataset(tmp_path, "val", on_broken=lambda name, _: named.append(name))
    assert named == ["d", "e"]


def test_tables_that_are_a_folder_are_named(root: Path) -> None:
    (root / "instances.json").unlink()
    (root / "instances.json").mkdir()
    assert check_dataset(root).counts == {"unreadable file": 1}


def test_zipped_sets_are_read_and_checked(tmp_path: Path, root: Path) -> None:
    expected = read_dataset(root, "val")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        archive.write(root / "images" / "p.jpg", "images/p.jpg")
    (root / "images" / "p.jpg").unlink()
    (root / "images").rmdir()
    samples = read_dataset(root, "val")
    assert [s.targets for s in samples] == [s.targets for s in expected]
    assert samples[0].image_path == root / "images.zip" / "images" / "p.jpg"
    assert found(check_dataset(root)) == []

    note = add(tmp_path / "rs", "a", shapes([1, 1], [3, 1], [3, 3]))
    (plain,) = read_dataset(tmp_path / "rs", "val")
    with zipfile.ZipFile(tmp_path / "rs" / "val.zip", "w") as archive:
        for path in (note, note.with_suffix(".jpg")):
            archive.write(path, f"val/{path.name}")
            path.unlink()
    note.parent.rmdir()
    (zipped,) = read_dataset(tmp_path / "rs", "val")
    assert (zipped.targets, zipped.image_hw) == (plain.targets, plain.image_hw)
    assert found(check_dataset(tmp_path / "rs")) == []


def test_a_folder_of_nothing_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known layout"):
        check_dataset(tmp_path)
