"""The parts of a run: what its flags make of folders, and what they refuse, in the command's words."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("segmentation_models_pytorch")
from folders import SIDE, blocks, save, stems
from snippets import ROOT, snippets

from unfreeze_sched.cli import main, make_parser
from unfreeze_sched.distill.command.data import SegmentationData, data_of, load_folders
from unfreeze_sched.distill.command.files import DataError

TINY = [
    *("--image-size", "32", "--batch-size", "2", "--epochs", "1", "--student-weights", "none"),
    *("--student-encoder", "resnet18", "--teacher-encoder", "resnet18", "--device", "cpu"),
]


def folder(path: Path, number: int, *values: int) -> Path:
    for place in range(number):
        save(path, f"{place:02}.png", blocks(*(values or (0, 1))))
    return path


def parts(*words: object) -> tuple[tuple[SegmentationData, ...], list[str]]:
    told: list[str] = []
    args = make_parser().parse_args(["distill", *TINY, *map(str, words)])
    return data_of(args, told.append), told


def sizes(*words: object) -> list[int]:
    return [len(part) for part in parts(*words)[0]]


def refused(*words: object) -> str:
    with pytest.raises(DataError) as caught:
        parts(*words)
    return str(caught.value)


def test_fifths_are_held_out_of_a_folder(tmp_path: Path) -> None:
    """A fifth is the test part, and of the rest a fifth validates; the parts are disjoint, and the seed's."""
    whole = folder(tmp_path, 20)
    (training, validation, test), told = parts("--data", whole)
    assert (sizes("--data", whole), told) == ([13, 3, 4], [])
    names = [*stems(training), *stems(validation), *stems(test)]
    assert sorted(names) == list(stems(load_folders(whole)[0]))
    assert stems(parts("--data", whole, "--seed", 1)[0][2]) != stems(test)
    assert {part.image_size for part in (training, validation, test)} == {32}


def test_parts_of_ones_own(tmp_path: Path) -> None:
    """`--val` and `--test` are taken whole, and nothing is held out in their place."""
    data, val, test = (folder(tmp_path / name, number) for name, number in (("d", 10), ("v", 3), ("t", 1)))
    assert sizes("--data", data, "--val", val, "--test", test) == [10, 3, 1]
    assert sizes("--data", data, "--test", test) == [8, 2, 1]
    assert sizes("--data", data, "--val", val) == [8, 3, 2]
    assert parts("--data", data, "--val", val)[0][1].pairs[0].mask.label == f"{val}/masks/00.png"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_to_three_images(tmp_path: Path, number: int) -> None:
    """They are too few to be divided, and the sentence says into what, and the way out."""
    data = folder(tmp_path / "d", number)
    assert refused("--data", data) == (
        "`--data` must hold 4 images or more: two to train on, one to validate, one to test, "
        f"got {number}; add images, or give --val DIR and --test DIR"
    )
    other = folder(tmp_path / "o", 1)
    if number == 1:
        assert refused("--data", data, "--val", other, "--test", other) == (
            "`--data` must hold 2 images or more: two to train on, got 1; add images"
        )
    else:
        assert sizes("--data", data, "--val", other, "--test", other) == [number, 1, 1]
    if number == 2:
        assert refused("--data", data, "--val", other).startswith(
            "`--data` must hold 3 images or more: two to train on, one to test, got 2; add images"
        )
    assert sizes("--data", folder(tmp_path / "d", 4)) == [2, 1, 1]


def test_a_class_that_no_training_image_has(tmp_path: Path) -> None:
    """It is told of in one line, whether it is elsewhere or nowhere."""
    data, test = folder(tmp_path / "d", 10), folder(tmp_path / "t", 2, 0, 2)
    (training, _, _), told = parts("--data", data, "--test", test)
    assert (training.classes, told) == (3, ["no training image has class 2"])
    assert parts("--data", data, "--val", test)[1] == ["no training image has class 2"]
    assert parts("--data", data, "--classes", 4)[1] == ["no training image has class 2, 3"]
    assert parts("--data", data, "--classes", 40)[1] == [
        "no training image has class 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more"
    ]


@pytest.mark.parametrize("flag", ["--val", "--test"])
def test_a_part_that_shows_no_class_is_refused(tmp_path: Path, flag: str) -> None:
    """Nothing could be measured on it, which would come out after the first epoch."""
    data, other = folder(tmp_path / "d", 10, 0, 1, 255), tmp_path / "o"
    save(other, "a.png", blocks(0, 255, 1)[:SIDE])
    name = {"--val": "validation", "--test": "test"}[flag]
    with pytest.raises(DataError) as caught:
        parts("--data", data, flag, other)
    assert str(caught.value) == (
        f"the {name} images must show a class in their central squares, got 255 alone, which is ignored; "
        "add images that do"
    )


def test_mask_values(tmp_path: Path) -> None:
    """A mapping makes classes of values, in its order."""
    data = folder(tmp_path, 10, 0, 127, 255)
    (training, _, _), told = parts("--data", data, "--mask-values", "255,127,0")
    assert (training.classes, told) == (3, ["the masks are mapped: 255 is class 0, 127 is class 1, 0 is class 2"])
    assert set(training[0][1].flatten().tolist()) == {0, 1, 2}
    assert refused("--data", data, "--mask-values", "0,127,255", "--classes", 4) == (
        "`--classes` must be the number of --mask-values, 3, got 4; leave it out"
    )
    assert refused("--data", data).endswith(
        "give --mask-values 0,127,255 if each is a class, --classes 128 if each is an index"
    )


@pytest.mark.parametrize("flag", ["--val", "--test"])
def test_a_part_must_be_another_folder(tmp_path: Path, flag: str) -> None:
    """What is trained on says nothing of what was learnt."""
    data = folder(tmp_path / "d", 10)
    same = tmp_path / "d" / ".." / "d"
    assert refused("--data", data, flag, same) == (
        f"`{flag}` must be another folder than --data, got {same} for both; leave it out"
    )


@pytest.mark.parametrize(
    ("flag", "value"), [("--val", "v"), ("--test", "t"), ("--classes", "3"), ("--mask-values", "0,1")]
)
def test_the_flags_are_of_ones_own_data(flag: str, value: str) -> None:
    """With the embedded sample they mean nothing."""
    assert refused(flag, value) == f"`{flag}` must come with --data, got {value} alone; add --data DIR"


@pytest.mark.parametrize("value", ["", "1", "0,0", "0,x", "0,-1", "0,65536", ",".join(map(str, range(256)))])
def test_mask_values_that_are_none(value: str, capsys: Any) -> None:
    """A listing that is no listing is refused when the words are read."""
    with pytest.raises(SystemExit):
        parts(f"--mask-values={value}")
    error = capsys.readouterr().err
    assert "argument --mask-values: must be 2 to 255 different values from 0 to 65535, such as 0,127,255, got" in error
    assert len(error.splitlines()) == 1


# The command


def run(capsys: Any, *words: object) -> tuple[int, str, str]:
    code = main(["distill", *TINY, *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("values", "words"),
    [((0, 127, 255), ()), ((0, 1, 9), ("--classes", "3")), ((0, 0, 0), ()), ((0, 1, 300), ())],
)
def test_masks_are_refused_before_a_teacher_is_trained(
    tmp_path: Path, values: tuple[int, ...], words: tuple[str, ...], capsys: Any
) -> None:
    """One line, in the command's words, and nothing is trained or written."""
    data = folder(tmp_path / "d", 8, *(value % 256 for value in values[:-1]), 0)
    save(data, "00.png", blocks(*values, dtype=np.uint16))
    code, out, err = run(capsys, "--data", data, *words, "--output", tmp_path / "o")
    assert code == 2
    assert err.startswith("unfreeze-sched: the masks must hold ")
    assert len(err.splitlines()) == 1
    assert "teacher" not in out
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())
    assert not {"validation_fraction", "matrix", "`classes`", "image_size"} & set(err.split())


def test_a_binary_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run on 0 and 255 says what they are, learns two classes, and is resumed with all its flags, from anywhere."""
    monkeypatch.chdir(tmp_path)
    data, test = folder(tmp_path / "d", 6, 0, 255, 0), folder(tmp_path / "t[/b]", 2, 255, 0, 255)
    words = ["--data", data.name, "--test", test.relative_to(tmp_path), "--mask-values", "0,255", "--output", "o"]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "the masks are mapped: 0 is class 0, 255 is class 1\n" in out
    assert "6 training images, 1 of them for validation, 2 for the test; 2 classes" in out
    monkeypatch.chdir("/")
    code, out, err = run(capsys, "--resume", tmp_path / "o")
    assert (code, err) == (0, "")
    assert "2 for the test; 2 classes" in out
    teacher = ["--teacher", tmp_path / "o" / "teacher.pth"]
    code, out, err = run(capsys, "--data", data, "--val", test, *teacher, "--output", tmp_path / "v")
    assert (code, err) == (0, "")
    assert "5 training images, 2 for validation, 1 for the test; 2 classes" in out


# The guide


def test_the_guides_commands(tmp_path: Path) -> None:
    """Each command of the guide reads folders such as it is shown for, and the kinds of files are all named."""
    plain, second, third = (folder(tmp_path / name, 4) for name in "abc")
    greys, gaps = folder(tmp_path / "d", 4, 0, 127, 255), folder(tmp_path / "e", 4, 0, 2, 5)
    commands = [line for block in snippets("your_data.md", "sh") for line in block.splitlines()]
    assert len(commands) == 4
    for command, data in zip(commands, (plain, plain, greys, gaps), strict=True):
        folders = {"DIR": data, "DIR2": second, "DIR3": third}
        program, distill, *words = shlex.split(command)
        assert (program, distill) == ("unfreeze-sched", "distill")
        assert sum(sizes(*(folders.get(word, word) for word in words))) >= 4
    for data in (greys, gaps):
        refused("--data", data)
    text = (ROOT / "distill" / "command" / "your_data.md").read_text()
    for kind in ("PNG", "BMP", "TIFF", "GIF", "JPEG", "WebP"):
        assert kind in text


def test_help_names_the_guide(capsys: Any) -> None:
    """The command's help ends with where the guide lies."""
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    (path,) = re.findall(r"\S+\.md", capsys.readouterr().out)
    assert (ROOT.parent / path).is_file()
