"""The embedded segmentation sample: what is in it, and that its script makes it."""

import io
import json
import runpy
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "unfreeze_sched" / "distill" / "command" / "sample"
SAMPLE = FOLDER / "sample.zip"
SCRIPT = ROOT / "benchmarks" / "make_sample.py"
COUNTS = {"train": 400, "test": 200}


@pytest.fixture(scope="module")
def entries() -> dict[str, bytes]:
    with zipfile.ZipFile(SAMPLE) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def manifest(entries: dict[str, bytes]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(entries["manifest.json"])
    return loaded


@pytest.fixture(scope="module")
def masks(entries: dict[str, bytes]) -> dict[str, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    found = {name: content for name, content in entries.items() if "/masks/" in name}
    return {name: np.asarray(Image.open(io.BytesIO(content))) for name, content in found.items()}


def test_the_archive_is_sorted_stored_and_at_most_4_mb() -> None:
    """The zip has sorted, uncompressed entries with a fixed time, and stays under 4 MB."""
    with zipfile.ZipFile(SAMPLE) as archive:
        entries = archive.infolist()
    assert [e.filename for e in entries] == sorted(e.filename for e in entries)
    assert {e.compress_type for e in entries} == {zipfile.ZIP_STORED}
    assert {e.date_time for e in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert SAMPLE.stat().st_size <= 4_000_000


@pytest.mark.parametrize("part", COUNTS)
def test_each_part_has_its_images_and_masks(part: str, entries: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """A part holds an image and a mask for each line of the manifest, numbered from 0000."""
    names = [line["name"] for line in manifest[part]]
    assert names == [f"{i:04d}" for i in range(COUNTS[part])]
    assert [n for n in entries if n.startswith(f"{part}/images/")] == [f"{part}/images/{n}.webp" for n in names]
    assert [n for n in entries if n.startswith(f"{part}/masks/")] == [f"{part}/masks/{n}.png" for n in names]


def test_images_are_128_pixel_rgb_and_masks_one_band_of_that_size(entries: dict[str, bytes]) -> None:
    """Every image is 128 x 128 RGB, every mask 128 x 128 of mode L."""
    for name, content in entries.items():
        if name != "manifest.json":
            with Image.open(io.BytesIO(content)) as image:
                assert (image.size, image.mode) == ((128, 128), "RGB" if "/images/" in name else "L"), name


def test_masks_hold_the_manifests_classes_and_the_background(
    masks: dict[str, "np.ndarray[Any, np.dtype[np.uint8]]"], manifest: dict[str, Any]
) -> None:
    """A mask's values are 0 and the classes of its objects, and each class covers at least 160 pixels an object."""
    for part in COUNTS:
        for line in manifest[part]:
            mask = masks[f"{part}/masks/{line['name']}.png"]
            drawn = [o["class"] for o in line["objects"]]
            assert set(np.unique(mask)) == {0, *drawn}
            for index in drawn:
                assert (mask == index).sum() >= 160 * drawn.count(index)


@pytest.mark.parametrize("part", COUNTS)
def test_images_have_one_to_three_objects_and_the_classes_are_balanced(part: str, manifest: dict[str, Any]) -> None:
    """Each image has one to three objects, a third of them each, and each class a quarter of the objects."""
    numbers = [len(line["objects"]) for line in manifest[part]]
    assert set(numbers) == {1, 2, 3}
    assert max(map(numbers.count, (1, 2, 3))) - min(map(numbers.count, (1, 2, 3))) <= 1
    drawn = [o["class"] for line in manifest[part] for o in line["objects"]]
    assert set(drawn) == {1, 2, 3, 4}
    assert max(map(drawn.count, (1, 2, 3, 4))) - min(map(drawn.count, (1, 2, 3, 4))) <= 1


def test_the_parts_share_no_glyph_and_no_photograph(manifest: dict[str, Any]) -> None:
    """No glyph and no background photograph of the test part occurs in the training part."""
    glyphs: dict[str, set[str]] = {}
    photographs: dict[str, set[str]] = {}
    for part in COUNTS:
        glyphs[part] = {o["glyph"] for line in manifest[part] for o in line["objects"]}
        photographs[part] = {line["photograph"] for line in manifest[part]}
    assert not glyphs["train"] & glyphs["test"]
    assert not photographs["train"] & photographs["test"]
    assert (len(glyphs["train"]), len(glyphs["test"])) == (239, 121)
    assert (len(photographs["train"]), len(photographs["test"])) == (8, 5)


def test_a_glyph_has_one_class(manifest: dict[str, Any]) -> None:
    """No glyph is labelled as two classes."""
    labels = {(o["glyph"], o["class"]) for part in COUNTS for line in manifest[part] for o in line["objects"]}
    assert len(labels) == len({glyph for glyph, _ in labels}) == 360


def test_the_readme_and_the_licences_name_what_the_sample_uses(manifest: dict[str, Any]) -> None:
    """Each photograph is in the list of licences, and the glyphs' licence text is there."""
    listed = (FOLDER / "LICENSE-photographs.md").read_text(encoding="utf-8")
    for part in COUNTS:
        for line in manifest[part]:
            assert f"`{line['photograph']}`" in listed
    assert "SIL OPEN FONT LICENSE Version 1.1" in (FOLDER / "LICENSE-noto-emoji.txt").read_text(encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for value in manifest["made_with"].values():
        assert value in readme


def _script() -> dict[str, Any]:
    """The script's names; skips where it cannot make the same bytes."""
    pytest.importorskip("skimage", reason="scikit-image's photographs are the backgrounds")
    script = runpy.run_path(str(SCRIPT))
    if not script["FONT"].is_file():
        pytest.skip(f"{script['FONT']} is missing: Debian's fonts-noto-color-emoji")
    return script


def test_groups_of_look_alike_glyphs_never_part(manifest: dict[str, Any]) -> None:
    """All glyphs of a group, such as a cat and its face, are in one part."""
    script = _script()
    parts = script["split_glyphs"]()
    side = {g: part for part, classes in parts.items() for glyphs in classes.values() for g in glyphs}
    groups = [group for text in script["GLYPHS"].values() for group in text.split()]
    assert {len({side[g] for g in group}) for group in groups} == {1}
    assert len(side) == sum(map(len, groups)) == 360
    for part in COUNTS:
        drawn = {chr(int(o["glyph"].replace("U+", "0x"), 0)) for line in manifest[part] for o in line["objects"]}
        assert {side[g] for g in drawn} == {part}


def test_the_script_makes_the_same_bytes(
    manifest: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` finds the checked-in zip up to date, and tells a changed or missing one by exit status 1 and a line."""
    script = _script()
    photos = script["photographs"]()
    here = script["provenance"](photos)
    if other := [f"{key} {value}" for key, value in here.items() if manifest["made_with"][key] != value]:
        pytest.skip(f"the sample was made with other inputs than {', '.join(other)}")
    assert script["main"](["--check"]) == 0
    assert capsys.readouterr().out.endswith(f"{SAMPLE} is up to date\n")

    data = SAMPLE.read_bytes()
    copy = tmp_path / "copy.zip"
    assert script["checked"](copy, data, here) == 1
    assert capsys.readouterr().out == f"{copy} is missing; run make_sample.py without --check\n"
    copy.write_bytes(b"PK")
    assert script["checked"](copy, data, here) == 1
    assert capsys.readouterr().out == f"{copy} is no zip file; run make_sample.py without --check\n"
    copy.write_bytes(data)
    assert script["checked"](copy, data + b"x", here) == 1
    assert capsys.readouterr().out == (
        f"{copy} differs from what make_sample.py makes, though its inputs are the same\n"
    )
    assert script["checked"](copy, data + b"x", {**here, "pillow": "1.0"}) == 1
    assert capsys.readouterr().out == (
        f"{copy} differs from what make_sample.py makes, with other inputs: pillow {here['pillow']} -> 1.0\n"
    )
