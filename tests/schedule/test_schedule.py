"""Presets and the schedule: the golden tables, the maths against a brute-force twin, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import pydoc
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from counting import work_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from strategies import schedules

import unfreeze_sched
from unfreeze_sched import (
    LARGE,
    MEDIUM,
    SMALL,
    FractionPreset,
    MilestonePreset,
    RatePreset,
    UnfreezeSchedule,
    preset_for,
)

GUIDE = UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)


def twin(schedule: UnfreezeSchedule) -> list[int]:
    """The numbers for the epochs of the run, by counting epoch after epoch instead of by formula."""
    preset, blocks, epochs = schedule.preset, schedule.total_blocks, schedule.total_epochs
    numbers, current = [], 0
    for epoch in range(epochs):
        if isinstance(preset, RatePreset):
            due = epoch >= preset.unfreeze_start_epoch
            if due and (epoch - preset.unfreeze_start_epoch) % preset.unfreeze_rate == 0 and current < blocks:
                current += 1
        elif isinstance(preset, MilestonePreset):
            current = preset.milestones.get(epoch, current)
        else:
            start = Fraction(Decimal(str(preset.start))) * epochs
            end = Fraction(Decimal(str(preset.end))) * epochs
            # Block k, 0-based, joins once the run is k / blocks of the way from start to end.
            current = sum(epoch >= start + Fraction(k, blocks) * (end - start) for k in range(blocks))
        numbers.append(current)
    return numbers


def test_guide_example() -> None:
    """The guide's example gives its table, and all seven blocks from epoch 40 on."""
    expected = [0] * 10 + [n for n in range(1, 7) for _ in range(5)] + [7] * 10
    assert list(GUIDE) == expected
    assert GUIDE.transitions() == ((10, 1), (15, 2), (20, 3), (25, 4), (30, 5), (35, 6), (40, 7))
    assert [GUIDE.blocks_at(epoch) for epoch in (49, 50, 51, 10**9)] == [7, 7, 7, 7]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (RatePreset(unfreeze_start_epoch=0, unfreeze_rate=2), [1, 1, 2, 2, 3, 3, 3, 3]),
        (RatePreset(unfreeze_start_epoch=7, unfreeze_rate=1), [0] * 7 + [1]),
        (MilestonePreset(milestones={2: 3, 4: 1, 6: 2}), [0, 0, 3, 3, 1, 1, 2, 2]),
        (MilestonePreset(milestones={0: 2}), [2] * 8),
        (FractionPreset(start=0.25, end=0.75), [0, 0, 1, 1 + 3 // 4, 1 + 6 // 4, 1 + 9 // 4, 3, 3]),
        (FractionPreset(start=0.0, end=1.0), [1, 1, 1, 2, 2, 2, 3, 3]),
    ],
)
def test_golden_tables(preset: Any, expected: list[int]) -> None:
    """Each kind gives the table worked out by hand, and stays at its last number past the end."""
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=8)
    assert list(schedule) == expected
    assert {schedule.blocks_at(epoch) for epoch in range(8, 40)} == {expected[-1]}


def test_a_fraction_is_the_decimal_that_was_written() -> None:
    """`start=0.2` of 50 epochs is epoch 10, though the float 0.2 is a little more than a fifth."""
    schedule = UnfreezeSchedule(preset=FractionPreset(start=0.2, end=0.8), total_blocks=6, total_epochs=50)
    assert schedule.transitions() == ((10, 1), (15, 2), (20, 3), (25, 4), (30, 5), (35, 6))


@given(schedules())
def test_equals_the_twin(schedule: UnfreezeSchedule) -> None:
    """The formulas and the brute-force count agree at every epoch of the run."""
    assert list(schedule) == twin(schedule)


def test_the_twin_can_fail() -> None:
    """A schedule that is off by one epoch does not equal the twin of the right one."""
    late = GUIDE.replace(preset=MEDIUM.replace(unfreeze_start_epoch=11))
    assert list(late) != twin(GUIDE)


@given(schedules(), st.integers(0, 10**12))
def test_range_and_flatness(schedule: UnfreezeSchedule, epoch: int) -> None:
    """Every epoch from 0 on has a number of blocks, and past the end it is the last one."""
    assert 0 <= schedule.blocks_at(epoch) <= schedule.total_blocks
    assert schedule.blocks_at(schedule.total_epochs + epoch) == schedule[schedule.total_epochs - 1]


@given(schedules(kinds=("rate", "fraction")))
def test_monotone(schedule: UnfreezeSchedule) -> None:
    """A rate or a fraction never refreezes."""
    numbers = list(schedule)
    assert numbers == sorted(numbers)


@given(schedules(), st.lists(st.integers(0, 200), max_size=20))
def test_pure(schedule: UnfreezeSchedule, epochs: list[int]) -> None:
    """A number does not depend on what was asked before, nor on the object that is asked."""
    fresh = UnfreezeSchedule(**schedule.model_dump())
    answers = [schedule.blocks_at(epoch) for epoch in epochs]
    assert answers[::-1] == [fresh.blocks_at(epoch) for epoch in epochs[::-1]]


@given(schedules())
def test_round_trips(schedule: UnfreezeSchedule) -> None:
    """JSON, plain dicts and pickles give back an equal schedule with an equal hash."""
    by_json = UnfreezeSchedule.model_validate_json(schedule.model_dump_json())
    by_json_dict = UnfreezeSchedule(**json.loads(json.dumps(schedule.model_dump(mode="json"))))
    by_dict = UnfreezeSchedule(**schedule.model_dump())
    by_pickle = pickle.loads(pickle.dumps(schedule))  # noqa: S301  # made here
    for back in (by_json, by_json_dict, by_dict, by_pickle):
        assert back == schedule
        assert hash(back) == hash(schedule)
        assert list(back) == list(schedule)


@given(schedules())
def test_transitions_are_the_differences(schedule: UnfreezeSchedule) -> None:
    """A transition stands at each epoch whose number is not the one before, the run beginning from 0 blocks."""
    numbers = list(schedule)
    differences = [(e, n) for e, (n, before) in enumerate(zip(numbers, [0, *numbers], strict=False)) if n != before]
    assert list(schedule.transitions()) == differences


@given(schedules(), st.integers(0, 200))
def test_progress_knows_the_largest_number_so_far(schedule: UnfreezeSchedule, epoch: int) -> None:
    """The second number of `progress_at` is the largest up to the epoch, jumps included."""
    assert schedule.progress_at(epoch) == (
        schedule.blocks_at(epoch),
        max(schedule.blocks_at(earlier) for earlier in range(epoch + 1)),
    )


@pytest.mark.parametrize(
    "make", [lambda _: MEDIUM, lambda _: FractionPreset(), lambda n: MilestonePreset(milestones={5: 1, n // 10: 7})]
)
def test_a_distant_epoch_is_answered_at_once(make: Any) -> None:
    """Epoch 10**9 of a run of 10**9 epochs costs no walk through them, but what epoch 1000 of 1000 costs."""

    def last(epochs: int) -> int:
        return UnfreezeSchedule(preset=make(epochs), total_blocks=7, total_epochs=epochs).blocks_at(epochs)

    assert last(10**9) == last(1000) == 7
    assert work_of(lambda: last(10**9)) == work_of(lambda: last(1000)) < 1000


def test_a_schedule_is_a_sequence() -> None:
    """Length, iteration and indexing agree, and an epoch past the end is an IndexError that points at `blocks_at`."""
    assert len(GUIDE) == 50
    assert [GUIDE[epoch] for epoch in range(50)] == list(GUIDE)
    with pytest.raises(IndexError, match=r"`epoch` must be below `total_epochs`, 50, got 50; use blocks_at"):
        GUIDE[50]


@pytest.mark.parametrize("epoch", [True, 1.0, "3", None, float("nan")])
def test_an_epoch_is_an_integer(epoch: Any) -> None:
    """Anything but an integer is no epoch."""
    with pytest.raises(TypeError, match=r"`epoch` must be an integer of at least 0, got .*; epochs are 0-based"):
        GUIDE.blocks_at(epoch)


def test_a_negative_epoch() -> None:
    """A negative epoch is refused rather than counted from the end."""
    with pytest.raises(ValueError, match=r"`epoch` must be an integer of at least 0, got -1; epochs are 0-based"):
        GUIDE[-1]


@pytest.mark.parametrize(
    ("n_images", "preset"),
    [(1, SMALL), (999, SMALL), (1_000, MEDIUM), (10_000, MEDIUM), (10_001, LARGE), (10**7, LARGE)],
)
def test_preset_for(n_images: int, preset: RatePreset) -> None:
    """The guide's bounds: under 1,000 small, to 10,000 medium, above large."""
    assert preset_for(n_images) is preset


def test_preset_values() -> None:
    """The three presets are the guide's."""
    values = [(p.unfreeze_start_epoch, p.unfreeze_rate, p.learning_rate_scale) for p in (SMALL, MEDIUM, LARGE)]
    assert values == [(20, 10, 0.01), (10, 5, 0.1), (5, 3, 0.3)]


@pytest.mark.parametrize(
    ("n_images", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1e3, TypeError)]
)
def test_preset_for_refuses(n_images: Any, error: type[Exception]) -> None:
    """A number of images is a positive integer."""
    with pytest.raises(error, match=r"`n_images` must be an integer of at least 1, got .*; count the training images"):
        preset_for(n_images)


NOT_COUNTS = [True, 3.0, "3", -1, float("nan"), None, [3]]
NOT_SCALES = [True, "0.5", 0, 0.0, -0.1, 1.5, float("nan"), float("inf"), None]


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("field", ["unfreeze_start_epoch", "unfreeze_rate"])
def test_rate_fields_are_strict(field: str, value: Any) -> None:
    """Bools, floats, strings and negatives are no epochs."""
    with pytest.raises(ValidationError, match=rf"`{field}` must be an integer of at least [01], got .*; .*such as"):
        RatePreset(**{field: value})


@pytest.mark.parametrize("value", NOT_SCALES)
@pytest.mark.parametrize("make", [RatePreset, FractionPreset, lambda **k: MilestonePreset(milestones={1: 1}, **k)])
def test_scales_are_strict(make: Any, value: Any) -> None:
    """A scale is a number in (0, 1]."""
    with pytest.raises(ValidationError, match=r"`learning_rate_scale` must be a number in \(0, 1\], got .*; 0.1 gives"):
        make(learning_rate_scale=value)


def test_an_integer_scale() -> None:
    """The integer 1 is a scale, stored as a float."""
    scale = RatePreset(learning_rate_scale=1).learning_rate_scale
    assert (scale, type(scale)) == (1.0, float)


@pytest.mark.parametrize("value", [True, "0.5", -0.1, 1.5, float("nan"), None])
@pytest.mark.parametrize("field", ["start", "end"])
def test_shares_are_strict(field: str, value: Any) -> None:
    """A share of the run is a number in [0, 1]."""
    with pytest.raises(ValidationError, match=rf"`{field}` must be a number in \[0, 1\], got .*; it is a share"):
        FractionPreset(**{field: value})


def test_a_fraction_starts_before_it_ends() -> None:
    """A start at or past the end is refused."""
    with pytest.raises(ValidationError, match=r"`start` must be below `end`, got 0.8 and 0.8; lower `start`"):
        FractionPreset(start=0.8)


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ({}, r"`milestones` must map epochs to numbers of blocks, got \{\}; pass a dict such as"),
        ([(1, 1)], r"`milestones` must map epochs to numbers of blocks, got \[\(1, 1\)\]; pass a dict"),
        ({10: 1, 5: 2}, r"`milestones` must have ascending epochs, got 5 after 10; sort them"),
        ({"10": 1, 10: 2}, r"`milestones` must have ascending epochs, got 10 after 10; sort them"),
        ({-1: 1}, r"`milestones` must be an integer of at least 0, got -1; its keys are 0-based epochs"),
        ({True: 1}, r"`milestones` must be an integer of at least 0, got True; its keys"),
        ({"1.0": 1}, r"`milestones` must be an integer of at least 0, got '1.0'; its keys"),
        ({"٣": 1}, r"`milestones` must be an integer of at least 0, got '٣'; its keys"),
        ({"1" * 5000: 1}, r"`milestones` must be an integer of at least 0, got '1+\.\.\.1+'; its keys"),
        ({"03": 1}, r"`milestones` must be an integer of at least 0, got '03'; its keys"),
        ({1: "1"}, r"`milestones\[1\]` must be an integer of at least 0, got '1'; it is a number of blocks"),
        ({1: 1.0}, r"`milestones\[1\]` must be an integer of at least 0, got 1.0; it is a number"),
        ({1: -1}, r"`milestones\[1\]` must be an integer of at least 0, got -1; it is a number"),
    ],
)
def test_milestones_refused(milestones: Any, message: str) -> None:
    """Each wrong milestone is named with its value and one fix."""
    with pytest.raises(ValidationError, match=message):
        MilestonePreset(milestones=milestones)


def test_milestones_are_immutable_and_read_json_keys() -> None:
    """Milestones keep their own copy, allow no assignment, hash, and equal the dict they came from."""
    given_dict = {"10": 1, 20: 4}
    preset = MilestonePreset(milestones=given_dict)  # type: ignore[arg-type]  # JSON's keys
    given_dict["10"] = 7
    assert preset.milestones == {10: 1, 20: 4}
    assert hash(preset) == hash(MilestonePreset(milestones={10: 1, 20: 4}))
    with pytest.raises(TypeError, match=r"`milestones` must stay as they are, got a change; use preset\.replace"):
        preset.milestones[10] = 2  # type: ignore[index]
    for change in (lambda m: m.update({10: 2}), lambda m: m.pop(10), lambda m: m.clear(), lambda m: m.setdefault(5, 1)):
        with pytest.raises(TypeError, match="`milestones` must stay as they are"):
            change(preset.milestones)
    assert preset.milestones == {10: 1, 20: 4}
    for copied in (copy.copy(preset), copy.deepcopy(preset), pickle.loads(pickle.dumps(preset))):  # noqa: S301  # made here
        assert copied == preset
        assert hash(copied) == hash(preset)
        assert type(copied.milestones) is type(preset.milestones)


@pytest.mark.parametrize("preset", [MEDIUM, MilestonePreset(milestones={1: 1}), FractionPreset(), GUIDE])
def test_models_are_frozen(preset: Any) -> None:
    """No field can be assigned, and an unknown key is refused with what is known."""
    with pytest.raises(ValidationError, match="frozen"):
        preset.learning_rate_scale = 0.5
    with pytest.raises(ValidationError, match=r"`colour` must not be given to \w+, got 'red'; it takes "):
        preset.replace(colour="red")


def test_an_unknown_key_names_the_nearest() -> None:
    """A misspelt key is met with the field that was probably meant."""
    with pytest.raises(
        ValidationError, match=r"`unfreeze_rat` must not be given to RatePreset, got 3; it takes unfreeze_rate"
    ):
        RatePreset(unfreeze_rat=3)  # type: ignore[call-arg]  # the point


def test_replace_validates() -> None:
    """`replace` checks what `model_copy(update=...)` would let through."""
    with pytest.raises(ValidationError, match="`unfreeze_rate` must be"):
        MEDIUM.replace(unfreeze_rate=0)


@pytest.mark.parametrize("value", [*NOT_COUNTS, 0])
@pytest.mark.parametrize("field", ["total_blocks", "total_epochs"])
def test_totals_are_strict(field: str, value: Any) -> None:
    """The totals are positive integers."""
    with pytest.raises(ValidationError, match=rf"`{field}` must be an integer of at least 1, got .*; "):
        GUIDE.replace(**{field: value})


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            MEDIUM.replace(unfreeze_start_epoch=50),
            r"`unfreeze_start_epoch` must start before `total_epochs`, 50, got 50; ",
        ),
        (MilestonePreset(milestones={60: 1}), r"`milestones` must start before `total_epochs`, 50, got 60; no block"),
        (MilestonePreset(milestones={6: 8}), r"`milestones\[6\]` must be at most `total_blocks`, 7, got 8; lower it"),
        ({"unfreeze_rate": 3}, r"`preset` must have a `kind` among rate, milestones, fraction, got None; add 'kind'"),
        ({"kind": "cosine"}, r"`preset` must have a `kind` among rate, milestones, fraction, got 'cosine'; add"),
        ("medium", r"`preset` must be a preset or its dict, got 'medium'; pass MEDIUM or a RatePreset"),
    ],
)
def test_schedule_refuses_a_preset_that_does_not_fit(preset: Any, message: str) -> None:
    """A preset that can never act, or asks for more blocks than there are, is refused with the totals."""
    with pytest.raises(ValidationError, match=message):
        GUIDE.replace(preset=preset)


def test_a_schedule_leaves_torch_alone() -> None:
    """Importing and using presets and schedule loads no torch."""
    code = (
        "import sys; from unfreeze_sched import UnfreezeSchedule, MEDIUM, preset_for;"
        "UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)[10];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- help, and YAML


def test_help_names_what_is_public() -> None:
    """`help(unfreeze_sched)` has every public name, and a preset's fields with their defaults."""
    text = pydoc.plain(pydoc.render_doc(unfreeze_sched))
    assert {*unfreeze_sched.__all__, "blocks_at", "transitions", "replace"} <= {*re.findall(r"\w+", text)}
    fields = "*, kind: Literal['rate'] = 'rate', unfreeze_start_epoch: int = 10, unfreeze_rate: int = 5"
    assert f"RatePreset({fields}" in text


Schedule = UnfreezeSchedule | RatePreset | MilestonePreset | FractionPreset
MILESTONES = MilestonePreset(milestones={10: 1, 20: 4})


class Trains:
    def __init__(self, schedule: Schedule, rate: float = 1.0) -> None:
        self.schedule, self.rate = schedule, rate


def trains(schedule: Schedule) -> Schedule:
    return schedule


class TrainsByDefault:
    def __init__(self, schedule: Schedule = MILESTONES) -> None:
        self.schedule = schedule


YAML = [
    ("class_path: unfreeze_sched.RatePreset, init_args: {unfreeze_rate: 3}", RatePreset(unfreeze_rate=3)),
    ("class_path: unfreeze_sched.MilestonePreset, init_args: {milestones: {10: 1, 20: 4}}", MILESTONES),
    ("class_path: unfreeze_sched.FractionPreset, init_args: {start: 0.1}", FractionPreset(start=0.1)),
    ("kind: milestones, milestones: {10: 1, 20: 4}", MILESTONES),
    (
        "class_path: unfreeze_sched.UnfreezeSchedule, init_args: {total_blocks: 5, total_epochs: 50, preset: {class_path: unfreeze_sched.MilestonePreset, init_args: {milestones: {10: 1, 20: 4}}}}",
        UnfreezeSchedule(preset=MILESTONES, total_blocks=5, total_epochs=50),
    ),
    (
        "preset: {kind: fraction}, total_blocks: 5, total_epochs: 50",
        UnfreezeSchedule(preset=FractionPreset(), total_blocks=5, total_epochs=50),
    ),
]


def parser_of(kind: str) -> Any:
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    if kind == "function":
        parser.add_function_arguments(trains, "it")
    elif kind == "class":
        parser.add_class_arguments(Trains, "it")
    else:  # as Lightning's CLI has its model and its callbacks
        parser.add_subclass_arguments(Trains, "it")
    return parser


@pytest.mark.parametrize("kind", ["function", "class", "subclass"])
@pytest.mark.parametrize(("text", "expected"), YAML)
def test_yaml_by_jsonargparse(text: str, expected: Any, kind: str) -> None:
    """Every preset and a whole schedule are read from YAML as Lightning's CLI does, and written and read again."""
    parser = parser_of(kind)
    own = f"schedule: {{{text}}}"
    config = parser.parse_string(
        f"it: {{class_path: {__name__}.Trains, init_args: {{{own}}}}}" if kind == "subclass" else f"it: {{{own}}}"
    )
    again = parser.parse_string(parser.dump(config))
    for parsed in (config, again):
        made = parser.instantiate(parsed).it
        assert (made.schedule if kind != "function" else made["schedule"]) == expected


def test_a_preset_as_a_default_for_jsonargparse() -> None:
    """A parameter whose default is a preset keeps it, also through a written configuration."""
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainsByDefault, "it")
    config = parser.parse_string("{}")
    assert parser.instantiate(config).it.schedule == MILESTONES
    assert parser.instantiate(parser.parse_string(parser.dump(config))).it.schedule == MILESTONES


def test_jsonargparse_tells_our_error() -> None:
    """A wrong value in YAML is met with our own words."""
    parser = parser_of("class")
    config = parser.parse_string(
        "it: {schedule: {class_path: unfreeze_sched.RatePreset, init_args: {unfreeze_rate: 0}}}"
    )
    with pytest.raises(
        ValueError, match="`unfreeze_rate` must be an integer of at least 1, got 0; it is a whole number"
    ):
        parser.instantiate(config)


def test_long_tables_take_linear_work() -> None:
    """20,000 milestones and 300,000 blocks are looked up as any others; a square of them would take minutes."""
    milestones = {epoch: epoch % 7 for epoch in range(0, 40_000, 2)}
    schedule = UnfreezeSchedule(preset=MilestonePreset(milestones=milestones), total_blocks=7, total_epochs=40_000)
    assert list(schedule)[1::2] == [epoch % 7 for epoch in range(0, 40_000, 2)]
    shares = UnfreezeSchedule(preset=FractionPreset(start=0.1, end=0.9), total_blocks=300_000, total_epochs=10**6)
    assert (shares.blocks_at(99_999), shares.blocks_at(100_000), shares.blocks_at(900_000)) == (0, 1, 300_000)
    assert shares.blocks_at(500_000) == 150_001


def test_a_copy_with_changes_is_validated_and_computed_anew() -> None:
    """`model_copy(update=...)` after a look-up has the new table, and refuses what the constructor refuses."""
    schedule = UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)
    assert schedule.blocks_at(10) == 1
    copied = schedule.model_copy(update={"preset": LARGE})
    assert copied.transitions()[0] == (5, 1)
    assert copied.blocks_at(5) == 1
    with pytest.raises(ValidationError, match="`total_blocks` must be an integer of at least 1, got 0"):
        schedule.model_copy(update={"total_blocks": 0})
    assert schedule.model_copy() == schedule


def test_a_subclass_with_its_own_numbers_is_refused() -> None:
    """It would be ignored; the message offers milestones. One that adds something else is welcome."""
    with pytest.raises(TypeError, match=r"`blocks_at` must not be overridden by Mine, .* MilestonePreset\(milestones="):

        class Mine(UnfreezeSchedule):
            def blocks_at(self, epoch: int) -> int:
                return epoch

    class Named(UnfreezeSchedule):
        name: str = "run"

    assert Named(preset=MEDIUM, total_blocks=7, total_epochs=50).blocks_at(10) == 1


@pytest.mark.parametrize("kind", [["rate"], {"a": 1}, 3, None, "rates"])
def test_an_odd_kind_is_named(kind: Any) -> None:
    """Whatever stands under `kind`, the error is the model's own."""
    with pytest.raises(ValidationError, match="`preset` must have a `kind` among rate, milestones, fraction, got "):
        UnfreezeSchedule(preset={"kind": kind}, total_blocks=7, total_epochs=50)


@pytest.mark.parametrize("value", ["x" * 10**6, "\x1b[31m" * 10, list(range(10**5))])
def test_values_in_errors_are_short_and_printable(value: Any) -> None:
    """A megabyte is cut, and escape codes are spelled out."""
    for make in (
        lambda: RatePreset(learning_rate_scale=value),
        lambda: RatePreset(unfreeze_rate=value),
        lambda: MilestonePreset(milestones=value),
        lambda: UnfreezeSchedule(preset=value, total_blocks=1, total_epochs=100),
        lambda: RatePreset(rate=value),
    ):
        with pytest.raises(ValidationError) as caught:
            make()
        text = caught.value.errors()[0]["msg"]
        assert len(text) < 500
        assert text.isprintable()
