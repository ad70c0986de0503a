"""The history: what it holds, how it is saved and refused, and what table and picture show of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps, rcParams
from matplotlib.colors import LogNorm, to_rgb
from pydantic import ValidationError

from unfreeze_sched.history import History, Transition

NAMES = ["layer4", "layer3", "layer2", "layer1"]
HELD = (
    "OverfitGuard: held at 2 of 4 blocks after 3 checks in a row worse than 0.412, the best since the last transition"
)


def made(*steps: tuple[int, int] | tuple[int, int, str], names: list[str] = NAMES, decay: float = 0.4) -> History:
    """A history of epochs and numbers; learning rates fall from block to block."""
    history = History()
    for epoch, number, *reason in steps:
        rates = {name: 1e-3 * decay**depth for depth, name in enumerate(names[:number])}
        history.add(Transition(epoch, number, len(names), rates, *(reason or ["schedule"])))
    return history


RUN = made((0, 0), (5, 1), (10, 2), (12, 2, HELD), (15, 4), (18, 1))


def test_a_sequence() -> None:
    """Transitions come back in the order in which they were added, by index, slice, iteration and length."""
    assert [transition.epoch for transition in RUN] == [0, 5, 10, 12, 15, 18]
    assert len(RUN) == 6
    assert RUN[-1] == Transition(18, 1, 4, {"layer4": 1e-3}, "schedule")
    assert list(RUN[1:3]) == [RUN[1], RUN[2]]
    assert RUN[3] in RUN
    assert repr(RUN) == "<History of 6 transitions>"
    assert repr(made((0, 0))) == "<History of 1 transition>"
    assert not History()


def test_a_transition_is_its_own() -> None:
    """It is frozen, can be hashed, and shares no dict with its maker."""
    rates = {"layer4": 1}
    transition = Transition(3, 1, 4, rates, "schedule")
    rates["layer4"] = 2
    assert transition == Transition(3, 1, 4, {"layer4": 1.0}, "schedule")
    assert type(transition.learning_rates["layer4"]) is float
    assert hash(transition) == hash(Transition(3, 1, 4, {"layer4": 1.0}, "schedule"))
    with pytest.raises(AttributeError):
        transition.epoch = 4


WRONG: list[tuple[dict[str, Any], tuple[str, ...], str, str]] = [
    ({"epoch": -1}, ("epoch",), "-1", "Input should be greater than or equal to 0"),
    ({"epoch": 1.0}, ("epoch",), "1.0", "Input should be a valid integer"),
    ({"epoch": torch.ones(2).long()}, ("epoch",), "tensor([1, 1])", "Input should be a valid integer"),
    ({"number": True}, ("number",), "True", "Input should be a valid integer"),
    ({"number": 5}, (), "5", "Value error, number=5 of total=4, 1 learning rates"),
    ({"total": 0}, ("total",), "0", "Input should be greater than or equal to 1"),
    ({"learning_rates": None}, ("learning_rates",), "None", "Input should be a valid dictionary"),
    ({"learning_rates": {4: 0.1}}, ("learning_rates", 4, "[key]"), "4", "Input should be a valid string"),
    ({"learning_rates": {"a": "1"}}, ("learning_rates", "a"), "'1'", "Input should be a valid number"),
    ({"learning_rates": {"a": True}}, ("learning_rates", "a"), "True", "Input should be a valid number"),
    ({"learning_rates": {"a": math.nan}}, ("learning_rates", "a"), "nan", "Input should be a finite number"),
    ({"learning_rates": {"a": 1.0, "b": 1.0}}, (), "2", "Value error, number=1 of total=4, 2 learning rates"),
    ({"reason": None}, ("reason",), "None", "Input should be a valid string"),
]
GOOD = {"epoch": 3, "number": 1, "total": 4, "learning_rates": {"layer4": 0.1}, "reason": "schedule"}


@pytest.mark.parametrize(("change", "where", "got", "text"), WRONG)
def test_refused(change: dict[str, Any], where: tuple[Any, ...], got: str, text: str) -> None:
    """A wrong field is refused by name, in a constructor and, with its place, in a saved history; nothing changes."""
    with pytest.raises(ValidationError) as caught:
        Transition(**{**GOOD, **change})
    (told,) = caught.value.errors()
    assert (told["loc"], told["msg"]) == (where, text)
    if where:
        assert repr(told["input"]) == got
    history = made((0, 0))
    place = "".join(f"[{part!r}]" for part in (1, *where))
    with pytest.raises(ValueError, match=r"^`saved") as caught:
        history.load_state_dict([GOOD, {**GOOD, **change}])
    assert str(caught.value).startswith(f"`saved{place}` must be what History.state_dict gave, got ")
    assert str(caught.value).endswith(f"{got if where else ''} ({text}); pass it as it is")
    assert "\n" not in str(caught.value)
    assert list(history) == list(made((0, 0)))


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ({}, "`saved` must be what History.state_dict gave, got {} (Input should be a valid list); pass it as it is"),
        (
            "[]",
            "`saved` must be what History.state_dict gave, got '[]' (Input should be a valid list); pass it as it is",
        ),
        (
            [GOOD, 3],
            "`saved[1]` must be what History.state_dict gave, got 3 (Input should be a dictionary or an instance of Transition); pass it as it is",
        ),
        (
            [{"epoch": 3}],
            "`saved[0]['number']` must be what History.state_dict gave, got {'epoch': 3} (Field required); pass it as it is",
        ),
        ([{}], "`saved[0]['epoch']` must be what History.state_dict gave, got {} (Field required); pass it as it is"),
        (
            [{**GOOD, "more": 1}],
            "`saved[0]['more']` must be what History.state_dict gave, got 1 (Unexpected keyword argument); pass it as it is",
        ),
    ],
)
def test_no_history(saved: Any, text: str) -> None:
    """What is no saved history is refused, and nothing changes."""
    history = made((0, 0))
    with pytest.raises(ValueError, match=r"^`saved") as caught:
        history.load_state_dict(saved)
    assert str(caught.value) == text
    assert list(history) == list(made((0, 0)))


steps = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4), st.sampled_from(["schedule", "resumed", HELD])))


@given(steps, st.floats(0, 1, width=32))
def test_round_trip(run: list[tuple[int, int, str]], decay: float) -> None:
    """By way of JSON a history comes back as it was, in the same object, and goes on from there."""
    history = made(*run, decay=decay)
    other = made((0, 4))
    other.load_state_dict(json.loads(history.to_json()))
    assert list(other) == list(history)
    assert other.state_dict() == json.loads(json.dumps(history.state_dict(), allow_nan=False))
    assert str(other) == str(history)
    other.add(Transition(61, 0, 4, {}, "schedule"))
    assert len(other) == len(history) + 1


def test_json_is_plain() -> None:
    """The JSON of a transition is an object of its fields."""
    assert json.loads(made((5, 2)).to_json()) == [
        {
            "epoch": 5,
            "number": 2,
            "total": 4,
            "learning_rates": {"layer4": 0.001, "layer3": 0.0004},
            "reason": "schedule",
        }
    ]


def test_the_state_is_a_copy() -> None:
    """Whoever changes a saved state changes no history."""
    history = made((5, 1))
    history.state_dict()[0]["learning_rates"]["layer4"] = 7.0
    assert history[0].learning_rates == {"layer4": 1e-3}


TABLE = """\
epoch  blocks  names               learning rate       reason
-----  ------  ------------------  ------------------  -------------------------
    0     0/4  all frozen                              schedule
    5     1/4  + layer4            1.0e-03             schedule
   10     2/4  + layer3            4.0e-04             schedule
                 layer4            1.0e-03
   12     2/4    layer4 to layer3  1.0e-03 to 4.0e-04  OverfitGuard: held at 2
                                                       of 4 blocks after 3
                                                       checks in a row worse
                                                       than 0.412, the best
                                                       since the last transition
   15     4/4  + layer2            1.6e-04             schedule
               + layer1            6.4e-05
                 layer4 to layer3  1.0e-03 to 4.0e-04
   18     1/4  - layer1            frozen              schedule
               - layer2            frozen
               - layer3            frozen
                 layer4            1.0e-03"""


def test_table() -> None:
    """The table tells what joined (+), what froze again (-) and what stayed, with learning rates, within 80 columns."""
    assert str(RUN) == TABLE
    assert str(History()) == "no transitions yet"


def test_many_blocks_at_once() -> None:
    """More than three blocks that join or freeze at once are one line, of the last what differs; a line's rates are a range."""
    names = [f"vit.encoder.layer.{index}" for index in range(23, -1, -1)]
    assert str(made((0, 4), (9, 24), (12, 0), names=names, decay=0.75)).splitlines()[2:] == [
        "    0    4/24  + vit.encoder.layer.23 to 20  1.0e-03 to 4.2e-04  schedule",
        "    9   24/24  + vit.encoder.layer.19 to 0   3.2e-04 to 1.3e-06  schedule",
        "                 vit.encoder.layer.23 to 20  1.0e-03 to 4.2e-04",
        "   12    0/24  - vit.encoder.layer.0 to 23   frozen              schedule",
    ]


def test_without_learning_rates() -> None:
    """Where an optimizer has no learning rates, blocks are called by their place."""
    history = History()
    history.add(Transition(3, 4, 4, {}, "schedule"))
    history.add(Transition(5, 1, 4, {"layer4": 0.1}, "schedule"))
    assert str(history).splitlines()[2:] == [
        "    3     4/4  + layer4 to blocks[0]                 schedule",
        "    5     1/4  - blocks[0]            frozen         schedule",
        "               - blocks[1]            frozen",
        "               - blocks[2]            frozen",
        "                 layer4               1.0e-01",
    ]


@given(
    steps,
    st.lists(st.text("abc.[]_-", min_size=1, max_size=90), min_size=4, max_size=4, unique=True),
    st.text("ab \n", max_size=300),
)
def test_eighty_columns(run: list[tuple[int, int, str]], names: list[str], reason: str) -> None:
    """Whatever names and reasons are, the table is within 80 columns, and no name is lost."""
    history = made(*run, (61, 4, reason), (62, 1, reason), names=names)
    lines = str(history).splitlines()
    assert max(map(len, lines)) <= 80
    start, stop = (sum(map(len, lines[1].split(" ")[:place])) + place for place in (4, 5))
    shown = "".join(line[start:stop].strip() for line in lines)
    assert names[0] in shown


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn while a test runs."""
    drawn: list[Any] = []

    class Noted(matplotlib.figure.Figure):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            drawn.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Noted)
    return drawn


def tiles(figure: Any) -> list[list[tuple[float, float]]]:
    """What is coloured of each row: first epoch and end."""
    return [
        [(box.x0, box.x1) for box in (path.get_extents() for path in row.get_paths())]
        for row in figure.axes[0].collections
    ]


def test_picture(tmp_path: Path, charts: list[Any]) -> None:
    """Rows are blocks by name, deepest on top; tiles their epochs; the colour, on a log scale, the learning rate."""
    RUN.plot(tmp_path / "run.png", total_epochs=20)
    axes, bar = charts[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert tiles(charts[0]) == [
        [(5, 10), (10, 12), (12, 15), (15, 18), (18, 20)],
        [(10, 12), (12, 15), (15, 18)],
        [(15, 18)],
        [(15, 18)],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5", "10", "12", "15", "18", "20"]
    assert axes.get_xlim() == (0, 20)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch (0-based)", "block, deepest on top")
    assert (bar.get_ylabel(), bar.get_yscale()) == ("learning rate", "log")
    assert [label.get_text() for label in bar.get_yticklabels()] == ["1.0e-03", "4.0e-04", "1.6e-04", "6.4e-05"]
    assert axes.get_title(loc="right") == "grey: frozen; dashed: not by the schedule"
    dashed = [line.get_xdata()[0] for line in axes.lines if line.is_dashed()]
    assert dashed == [12]
    darkness = [1 - np.mean(row.get_facecolor()[-1][:3]) for row in axes.collections]
    assert darkness == sorted(darkness, reverse=True)
    assert len({round(value, 3) for value in darkness}) == 4


def test_pixels(tmp_path: Path) -> None:
    """A PNG has the colours that its rates call for, and the grey of frozen blocks."""
    RUN.plot(str(tmp_path / "run.PNG"), 20)
    pixels = matplotlib.image.imread(tmp_path / "run.PNG")[..., :3].reshape(-1, 3)
    norm = LogNorm(6.4e-5 / 2, 1e-3 * 1.2)
    wanted = [colormaps["YlGnBu"](norm(1e-3 * 0.4**depth))[:3] for depth in range(4)]
    for colour in [*wanted, to_rgb("#e8e8e8")]:
        assert (np.abs(pixels - np.array(colour)).max(axis=1) < 1 / 128).sum() > 500


def settings() -> dict[str, Any]:
    return {key: rcParams[key] for key in rcParams if key != "backend"}  # to look at that one would choose it


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    """The suffix says the format; neither pyplot nor matplotlib's settings are touched."""
    before = settings()
    RUN.plot(tmp_path / f"run.{suffix}")
    assert (tmp_path / f"run.{suffix}").read_bytes().startswith(start)
    assert settings() == before


def test_going_back(tmp_path: Path, charts: list[Any]) -> None:
    """A transition takes the place of all that had happened at its epoch or later; without a total the last lasts as long as the one before."""
    history = made((0, 0), (5, 1), (10, 2), (10, 3), (4, 1), (10, 3), (10, 2))
    history.plot(tmp_path / "back.png")
    assert tiles(charts[0])[:3] == [[(4, 10), (10, 16)], [(10, 16)], []]
    assert [label.get_text() for label in charts[0].axes[0].get_xticklabels()] == ["0", "4", "10"]


def test_many_epochs(tmp_path: Path, charts: list[Any]) -> None:
    """Where the transitions' epochs have no room, ticks are round integers; where names have none, some are left out."""
    names = [f"blocks.{index}" for index in range(60, -1, -1)]
    history = made(*((10 * index, index) for index in range(62)), names=names, decay=0.9)
    history.plot(tmp_path / "many.png", 700)
    axes, bar = charts[0].axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["0", "100", "200", "300", "400", "500", "600", "700"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names[::2]
    rates = [float(label.get_text()) for label in bar.get_yticklabels()]
    assert 5 <= len(rates) <= 11
    assert [rates[0], rates[-1]] == [1e-3, float(f"{1e-3 * 0.9**60:.1e}")]


def test_odd_pictures(tmp_path: Path, charts: list[Any]) -> None:
    """A rate of zero, none at all, nothing unfrozen yet, and a long name with what matplotlib takes for a formula can be drawn."""
    history = History()
    history.add(Transition(0, 2, 3, {"a" * 80 + r"$\b$": 0.0, "c": 1e-3}, "resumed"))
    history.plot(tmp_path / "zero.png")
    assert tiles(charts[0]) == [[(0, 1)], [(0, 1)], []]
    assert charts[0].axes[0].collections[0].get_facecolor()[0].tolist() == list(colormaps["YlGnBu"](0.0))
    assert charts[0].axes[0].get_yticklabels()[0].get_text() == "..." + "a" * 33 + r"$\b$"
    assert charts[0].axes[0].get_yticklabels()[2].get_text() == "blocks[0]"
    history = History()
    history.add(Transition(0, 0, 2, {}, "schedule"))
    history.plot(tmp_path / "none.png")
    assert len(charts[1].axes) == 1
    history.add(Transition(4, 1, 2, {}, "schedule"))
    history.plot(tmp_path / "rateless.png")
    assert tiles(charts[2]) == [[(4, 8)], []]
    assert charts[2].axes[0].get_title(loc="right") == "grey: frozen; dark grey: trained, without a learning rate"


@pytest.mark.parametrize(
    ("history", "path", "total", "error", "text"),
    [
        (RUN, "run.bmp", None, ValueError, "`path` must end in one of .png, .svg, .pdf, got run.bmp; name it run.png"),
        (RUN, "run", None, ValueError, "`path` must end in one of .png, .svg, .pdf, got run; name it run.png"),
        (RUN, "run.png", 2.5, TypeError, "`total_epochs` must be an integer of at least 19, got 2.5; pass the run's, whose last transition is at epoch 18, or None"),
        (RUN, "run.png", 18, ValueError, "`total_epochs` must be an integer of at least 19, got 18; pass the run's, whose last transition is at epoch 18, or None"),
        (History(), "run.png", None, RuntimeError, "`plot` must be called after the first transition, got an empty history; apply an epoch"),
    ],
)  # fmt: skip
def test_no_picture(
    history: History,
    path: Any,
    total: Any,
    error: type[Exception],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be drawn is refused, and no file is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        history.plot(path, total)
    assert str(caught.value) == text
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path: Path) -> None:
    """A file that cannot be written is an OSError, and what is no path a TypeError."""
    with pytest.raises(FileNotFoundError):
        RUN.plot(tmp_path / "missing" / "run.png")
    with pytest.raises(TypeError, match="PathLike"):
        RUN.plot(3)


def test_nothing_but_the_core(tmp_path: Path) -> None:
    """The module works without torch, matplotlib and rich; a picture then says what to install; pyplot is never loaded."""
    code = """
import sys
for name in ("torch", "matplotlib", "rich"):
    sys.modules[name] = None
from unfreeze_sched.history import History, Transition
history = History()
history.add(Transition(3, 1, 2, {"layer4": 0.1}, "schedule"))
print(history)
history.load_state_dict(history.state_dict())
try:
    history.plot("run.png")
except ModuleNotFoundError as error:
    print(error)
del sys.modules["matplotlib"]
history.plot(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert sys.modules["torch"] is None
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.png")], check=False, capture_output=True, text=True
    )
    assert (result.returncode, (tmp_path / "run.png").is_file()) == (0, True), result.stderr
    assert result.stdout.splitlines()[2:] == [
        "    3     1/2  + layer4  1.0e-01        schedule",
        "`plot` needs matplotlib, which is not installed; pip install 'unfreeze-sched[plot]'",
    ]
