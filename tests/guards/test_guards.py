"""Guard and trigger: against brute-force twins, through every save and load, on two ranks, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unfreeze_sched import parallel
from unfreeze_sched.guards import Cap, OverfitGuard, PlateauTrigger

TOTAL = 4
Event = tuple[str, Any]

# Eighths, so that a twin may subtract in any order; few of them, so that ties and plateaus are common.
metrics = st.one_of(
    st.integers(-4, 4).map(lambda eighths: eighths / 8), st.sampled_from([math.nan, math.inf, -math.inf])
)
events = st.lists(
    st.one_of(st.tuples(st.just("follow"), st.integers(0, TOTAL)), *[st.tuples(st.just("step"), metrics)] * 4),
    max_size=40,
)
settings_of_both = {
    "patience": st.integers(1, 4),
    "mode": st.sampled_from(["min", "max"]),
    "min_delta": st.sampled_from([0, 0.125, 0.25]),
}
guards = st.builds(OverfitGuard, **settings_of_both)
triggers = st.builds(PlateauTrigger, **settings_of_both, start=st.integers(0, TOTAL))


def play(cap: Any, event: Event) -> int | None:
    if event[0] == "follow":
        cap.follow(event[1], TOTAL)
    else:
        cap.step(event[1])
    return cap.cap


def loss(metric: float, mode: str) -> float:
    """The lower the better, and positive infinity for what is no better than anything."""
    return math.inf if math.isnan(metric) else metric if mode == "min" else -metric


def number_and_checks(past: list[Event], mode: str) -> tuple[int | None, list[float], list[float]]:
    """The blocks unfrozen in the end, the checks before the last transition, and those since."""
    number, before, since = None, [], []
    for kind, value in past:
        if kind == "step":
            since.append(loss(value, mode))
        elif value != number:
            number, before, since = value, before + since, []
    return number, before, since


def guard_twin(past: list[Event], patience: int, mode: str, delta: float) -> int | None:
    """The cap, found by looking at every window of `patience` checks of every beginning of the past."""
    for end in range(1, len(past) + 1):
        number, before, since = number_and_checks(past[:end], mode)
        checks = before[-1:] + since
        worse = [x == math.inf or (i > 0 and x > min(checks[:i]) + delta) for i, x in enumerate(checks)][-len(since) :]
        if number and any(all(worse[i : i + patience]) for i in range(len(since) - patience + 1)):
            return number
    return None


def trigger_twin(past: list[Event], patience: int, mode: str, delta: float, start: int) -> list[int]:
    """The cap after each event, by recounting the checks since the last transition or rise each time."""
    caps, cap, number, checks = [], start, None, [math.inf]
    for kind, value in past:
        if kind == "follow" and value != number:
            number, checks = value, checks[-1:]
        elif kind == "step":
            waits = number != cap or number == TOTAL
            checks = [loss(value, mode)] if waits else [*checks, loss(value, mode)]
            best, flat = checks[0], 0
            for check in checks[1:]:
                best, flat = (check, 0) if check < best - delta else (best, flat + 1)
            if flat == patience:
                cap += 1
        caps.append(cap)
    return caps


@given(guards, events)
def test_the_guard_equals_its_twin(guard: OverfitGuard, past: list[Event]) -> None:
    """The guard trips exactly where a search of all windows says, and holds for good."""
    for end, event in enumerate(past, 1):
        cap = play(guard, event)
        assert cap == guard_twin(past[:end], guard.patience, guard.mode, guard.min_delta)
        assert bool(guard.reason) is (cap is not None)


@given(triggers, events)
def test_the_trigger_equals_its_twin(trigger: PlateauTrigger, past: list[Event]) -> None:
    """The cap rises exactly where a recount says."""
    caps = [play(trigger, event) for event in past]
    assert caps == trigger_twin(past, trigger.patience, trigger.mode, trigger.min_delta, trigger.start)


def test_the_twins_can_fail() -> None:
    """With another patience, mode, margin or start the twins say something else."""
    past: list[Event] = [("follow", 1), *(("step", x) for x in (0.5, 0.625, 0.75, 0.875))]
    assert guard_twin(past, 3, "min", 0) == 1
    assert guard_twin(past, 4, "min", 0) is guard_twin(past, 3, "max", 0) is guard_twin(past, 3, "min", 0.125) is None
    assert trigger_twin(past, 3, "min", 0, 1)[-1] == 2
    assert trigger_twin(past, 4, "min", 0, 1)[-1] == trigger_twin(past, 3, "max", 0, 1)[-1] == 1
    assert trigger_twin(past, 3, "min", 0, 0)[-1] == 0


@given(st.one_of(guards, triggers), events, st.data())
def test_a_round_trip_at_any_moment_changes_nothing(cap: Any, past: list[Event], data: st.DataObject) -> None:
    """Saved, sent through strict JSON and loaded by a fresh object: caps, reasons and states go on the same."""
    cut = data.draw(st.integers(0, len(past)))
    for event in past[:cut]:
        play(cap, event)
    fresh = type(cap)(cap.patience, cap.mode, cap.min_delta)
    fresh.load_state_dict(json.loads(json.dumps(cap.state_dict(), allow_nan=False)))
    for event in [*past[cut:], ("step", 0.0)]:
        assert (play(fresh, event), fresh.reason) == (play(cap, event), cap.reason)
        assert fresh.state_dict() == cap.state_dict()


@given(st.one_of(guards, triggers), events)
def test_following_is_idempotent(cap: Any, past: list[Event]) -> None:
    """To be told the same number again and again changes nothing."""
    for event in past:
        play(cap, event)
        before = cap.state_dict()
        if before["number"] is not None:
            cap.follow(before["number"], TOTAL)
        assert cap.state_dict() == before


def run(schedule: list[int], losses: list[float], *caps: Any) -> list[int]:
    """The numbers of unfrozen blocks of a loop that checks once an epoch."""
    numbers = []
    for epoch, metric in enumerate(losses):
        number = min([schedule[epoch], *(cap.cap for cap in caps if cap.cap is not None)])
        for cap in caps:
            cap.follow(number, TOTAL)
        numbers.append(number)
        for cap in caps:
            cap.step(metric)
    return numbers


def test_the_guard_holds_in_a_loop() -> None:
    """Three checks worse than before the transition hold the second block back for good, however good later ones."""
    guard = OverfitGuard(patience=3)
    schedule = [0, 0, 1, 1, 1, 2, 2, 3, 4]
    assert run(schedule, [0.9, 0.5, 0.6, 0.6, 0.55, 0.1, 0.1, 0.1, 0.1], guard) == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert run(schedule, [0.9, 0.5, 0.6, 0.5, 0.55, 0.1, 0.1, 0.1, 0.1], OverfitGuard(patience=3)) == schedule


def test_the_guard_waits_for_the_first_transition() -> None:
    """While no block is unfrozen, however bad the checks, it does not trip; the last of them is the reference then."""
    guard = OverfitGuard(patience=1)
    assert run([0] * 5 + [1] * 3, [0.1, 0.2, 0.9, math.nan, 0.8, 0.7, 0.7, 0.75], guard)[-1] == 1
    assert guard.cap == 1
    assert "worse than 0.7," in guard.reason


def test_a_refreeze_is_a_transition() -> None:
    """The count starts afresh when blocks are frozen again, and at 0 blocks nothing trips."""
    guard = OverfitGuard(patience=2)
    run([2, 2, 1, 1, 0, 0, 0], [0.1, 0.2, 0.3, 0.2, 0.4, 0.5, 0.6], guard)
    assert guard.cap is None


def test_the_guard_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """One warning with all the figures, equal to the reason, and nothing when it goes on."""
    guard = OverfitGuard(patience=2, mode="max", min_delta=0.01)
    with caplog.at_level(logging.DEBUG, "unfreeze_sched"):
        run([1] * 8, [0.70, 0.75, 0.745, 0.6, 0.5, 0.1, 0.1, 0.1], guard)
    text = (
        "held at 1 of 4 blocks after 2 checks in a row worse than 0.75, the best since the last transition, "
        "the last 0.5 (mode='max', min_delta=0.01)"
    )
    assert guard.reason == text
    assert caplog.record_tuples == [("unfreeze_sched", logging.WARNING, f"OverfitGuard: {text}")]


def test_the_trigger_in_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Every plateau allows one more block, up to all of them, and says so at INFO."""
    trigger = PlateauTrigger(patience=2)
    with caplog.at_level(logging.INFO, "unfreeze_sched"):
        assert run([4] * 11, [0.5] * 11, trigger) == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert trigger.cap == TOTAL
    assert caplog.messages[0] == (
        "PlateauTrigger: block 1 of 4 may join, no longer held at 0 of 4 blocks until 2 checks in a row bring no "
        "improvement on 0.5, the best since the last transition, 2 so far (mode='min', min_delta=0)"
    )
    assert len(caplog.messages) == TOTAL


def test_plateaus_of_the_waiting_time_do_not_add_up() -> None:
    """Where the schedule holds back, the trigger is one block ahead at most, and then counts from the transition."""
    trigger = PlateauTrigger(patience=2)
    assert run([0] * 20 + [4] * 4, [0.5] * 24, trigger) == [0] * 20 + [1, 1, 2, 2]
    assert (trigger.cap, trigger.reason[:22]) == (3, "")


def test_a_later_start() -> None:
    """The trigger allows `start` blocks from the beginning, and more than there are is all of them."""
    assert run([4] * 6, [0.5] * 6, PlateauTrigger(patience=2, start=2)) == [2, 2, 2, 3, 3, 4]
    assert run([4] * 6, [0.5] * 6, PlateauTrigger(patience=2, start=9)) == [4] * 6


def test_reasons_of_the_trigger() -> None:
    """It gives a reason exactly while it is what holds blocks back."""
    trigger = PlateauTrigger(patience=2, min_delta=0.05)
    assert trigger.reason == ""
    trigger.follow(0, TOTAL)
    trigger.step(math.nan)
    assert trigger.reason == (
        "held at 0 of 4 blocks until 2 checks in a row bring no improvement, 1 so far (mode='min', min_delta=0.05)"
    )
    trigger.step(0.5)
    assert trigger.reason == (
        "held at 0 of 4 blocks until 2 checks in a row bring no improvement on 0.5, the best since the last "
        "transition, 0 so far (mode='min', min_delta=0.05)"
    )
    trigger.step(0.47)
    trigger.step(0.46)
    assert (trigger.cap, trigger.reason) == (1, "")


def test_guard_and_trigger_together() -> None:
    """The least of schedule and caps counts: the trigger lets blocks in until the guard holds."""
    guard, trigger = OverfitGuard(patience=2), PlateauTrigger(patience=2)
    assert run([4] * 10, [0.5, 0.5, 0.5, 0.4, 0.45, 0.46, 0.47, 0.48, 0.5, 0.6], guard, trigger) == [0] * 3 + [1] * 7
    assert (guard.cap, trigger.cap) == (1, 2)


@pytest.mark.parametrize("make", [OverfitGuard, PlateauTrigger])
def test_both_are_caps(make: Callable[[], Any]) -> None:
    """Guard and trigger are instances of the protocol that an unfreezer asks for."""
    assert isinstance(make(), Cap)
    assert not isinstance(object(), Cap)


def run_without_a_number(guard: OverfitGuard) -> str:
    run([1] * 3, [math.nan, math.inf, math.nan], guard)
    return guard.reason


def test_checks_without_a_number() -> None:
    """NaN and the wrong infinity count as worse even when nothing was better; the good infinity is a best."""
    assert run_without_a_number(OverfitGuard()) == (
        "held at 1 of 4 blocks after 3 checks in a row without a number, the last nan (mode='min', min_delta=0)"
    )
    one = OverfitGuard(patience=1, mode="max")
    run([1] * 3, [1.0, math.inf, 5.0], one)
    assert one.reason.startswith("held at 1 of 4 blocks after 1 check in a row worse than 1.79769e+308, ")


class Net(nn.Module):
    """A weight, a norm's buffers, and an extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.extra = nn.Linear(2, 2), nn.BatchNorm1d(2), {"calls": 0}

    def get_extra_state(self) -> dict[str, int]:
        return self.extra

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.extra = state

    def set_to(self, value: float) -> None:
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                tensor.fill_(value)
        self.extra["calls"] += 1


def filled(net: Net) -> set[float]:
    return {x for tensor in (*net.parameters(), net.norm.running_mean) for x in tensor.flatten().tolist()}


def train(net: Net, guard: OverfitGuard, losses: list[float], first: int = 0) -> None:
    """Epoch `e` fills the model with `e`; two blocks are unfrozen from epoch 2 on."""
    for epoch, metric in enumerate(losses, first):
        guard.follow(2 if epoch >= 2 else 0, TOTAL)
        net.set_to(epoch)
        guard.step(metric)


LOSSES = [0.9, 0.3, 0.8, 0.5, 0.6, 0.7]  # the best is at epoch 1, from before the transition


def test_the_best_weights_come_back(caplog: pytest.LogCaptureFixture) -> None:
    """Parameters, buffers and extra state of the best check of the run are loaded in place, and the copy is let go."""
    net = Net()
    held = dict(net.named_parameters())
    guard = OverfitGuard(patience=4, model=net)
    train(net, guard, LOSSES[:-1])
    assert filled(net) == {4.0}
    train(net, guard, LOSSES[-1:], first=5)
    assert filled(net) == {1.0}
    assert net.extra == {"calls": 2}
    assert all(held[name] is p and p.requires_grad for name, p in net.named_parameters())
    assert guard.reason.endswith(
        "the last 0.7 (mode='min', min_delta=0); the weights of the best check, 0.3, are restored"
    )
    assert guard.state_dict()["weights"] is None
    net.set_to(6)
    guard.step(0.9)
    assert filled(net) == {6.0}
    assert len(caplog.messages) == 1


def test_no_weights_to_restore() -> None:
    """Where no check was finite, the weights stay and the reason says so."""
    net = Net()
    net.set_to(7)
    reason = run_without_a_number(OverfitGuard(model=net))
    assert reason.endswith("; no check was finite, so no weights are restored")
    assert filled(net) == {7.0}


@pytest.mark.parametrize("cut", range(len(LOSSES) + 1))
def test_the_weights_are_in_the_state(cut: int, tmp_path: Path) -> None:
    """Saved by torch, read with `weights_only`, at any epoch: the resumed guard restores the same weights."""
    net = Net()
    guard = OverfitGuard(patience=4, model=net)
    train(net, guard, LOSSES[:cut])
    torch.save((guard.state_dict(), net.state_dict()), tmp_path / "state.pt")
    saved, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh_net = Net()
    fresh_net.load_state_dict(weights)
    fresh = OverfitGuard(patience=4, model=fresh_net)
    fresh.load_state_dict(saved)
    for kept in (saved["weights"] or {}).values():
        if isinstance(kept, torch.Tensor):
            kept.zero_()  # the guard has its own
    train(fresh_net, fresh, LOSSES[cut:], first=cut)
    assert (filled(fresh_net), fresh.cap) == ({1.0}, 2)
    train(net, guard, LOSSES[cut:], first=cut)
    assert fresh.reason == guard.reason


@pytest.mark.parametrize(
    "metric",
    [
        *(2, 2.0, Decimal(2), np.float32(2), np.int64(2), np.array([2.0]), np.array(2)),
        *(torch.tensor(2), torch.tensor([[2.0]], requires_grad=True), torch.tensor(2.0, dtype=torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("make", [OverfitGuard, PlateauTrigger])
def test_numbers_of_all_kinds(make: Callable[[], Any], metric: Any) -> None:
    """Python's, NumPy's and torch's single numbers are metrics, kept as a float."""
    cap = make()
    cap.step(metric)
    assert (cap.state_dict()["last"], type(cap.state_dict()["last"])) == (2.0, float)


@pytest.mark.parametrize(
    ("metric", "got"),
    [
        (True, "True"),
        ("0.5", "'0.5'"),
        (None, "None"),
        (1j, "1j"),
        ([0.5], r"\[0\.5\]"),
        (10**400, "1000"),
        (np.bool_(True), r"np\.True_"),
        (np.str_("1"), r"np\.str_\('1'\)"),
        (np.complex128(1), "np.complex"),
        (np.array([1.0, 2.0]), r"array\(\[1\., 2\.\]\)"),
        (torch.tensor(True), r"tensor\(True\)"),
        (torch.tensor([1.0, 2.0]), r"tensor\(\[1\., 2\.\]\)"),
        (torch.eye(2), r"tensor\(\[\[1"),
        (torch.empty((), device="meta"), r"tensor\("),
    ],
)
@pytest.mark.parametrize("make", [OverfitGuard, PlateauTrigger])
def test_what_is_no_metric(make: Callable[[], Any], metric: Any, got: str) -> None:
    """Anything but one real number is refused on one line, and no state changes."""
    cap = make()
    with pytest.raises(
        TypeError, match=rf"^`metric` must be a number, got {got}.*; pass one number, such as loss"
    ) as info:
        cap.step(metric)
    assert "\n" not in str(info.value)
    assert cap.state_dict() == make().state_dict()


@pytest.mark.parametrize("make", [OverfitGuard, PlateauTrigger])
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"patience": 0}, ValueError, r"`patience` must be an integer of at least 1, got 0; it is a number of checks"),
        ({"patience": True}, TypeError, r"`patience` must be an integer of at least 1, got True; it is a number"),
        ({"patience": 2.0}, TypeError, r"`patience` must be an integer of at least 1, got 2.0; it is a number"),
        (
            {"mode": "low"},
            ValueError,
            r"`mode` must be 'min' or 'max', got 'low'; 'min' suits a loss, 'max' an accuracy",
        ),
        ({"mode": ["min"]}, ValueError, r"`mode` must be 'min' or 'max', got \['min'\]; 'min' suits a loss"),
        ({"min_delta": "0"}, TypeError, r"`min_delta` must be a number, got '0'; 0.0 counts any difference"),
        ({"min_delta": -0.1}, ValueError, r"`min_delta` must be finite and at least 0, got -0.1; 0.0 counts any"),
        ({"min_delta": math.nan}, ValueError, r"`min_delta` must be finite and at least 0, got nan; 0.0 counts any"),
        ({"min_delta": math.inf}, ValueError, r"`min_delta` must be finite and at least 0, got inf; 0.0 counts any"),
    ],
)
def test_arguments_refused(
    make: Callable[..., Any], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong setting is named with its value and one fix."""
    with pytest.raises(error, match=message):
        make(**keywords)


def test_arguments_of_one_refused() -> None:
    """The trigger's start is a count; the guard's model has to save and load."""
    with pytest.raises(ValueError, match=r"`start` must be an integer of at least 0, got -1; it is a number of blocks"):
        PlateauTrigger(start=-1)
    with pytest.raises(
        TypeError, match=r"`model` must have state_dict and load_state_dict, got dict; pass an nn.Module"
    ):
        OverfitGuard(model={})


@pytest.mark.parametrize("make", [OverfitGuard, PlateauTrigger])
def test_one_unfreezer_each(make: Callable[[], Any]) -> None:
    """Another number of blocks, as from a second unfreezer, is refused, and the state stays."""
    cap = make()
    cap.follow(1, 4)
    before = cap.state_dict()
    text = rf"^`total` must stay 4, got 5; make a {make.__name__} for each unfreezer$"
    with pytest.raises(ValueError, match=text):
        cap.follow(2, 5)
    assert cap.state_dict() == before


GUARD_KEYS = "mode, number, total, last, best, count, cap, reason, kept"


def quoted(keys: str) -> str:
    return ", ".join(map(repr, keys.split(", ")))


TAMPERED = [
    ({"count": -1}, r"one that OverfitGuard gave, got count=-1; pass a saved"),
    ({"count": True}, r"one that OverfitGuard gave, got count=True; pass"),
    ({"count": 1.5}, r"one that OverfitGuard gave, got count=1.5; pass"),
    ({"best": math.nan}, r"one that OverfitGuard gave, got best=nan; pass"),
    ({"best": "0.5"}, r"one that OverfitGuard gave, got best='0.5'; pass"),
    ({"last": [1]}, r"one that OverfitGuard gave, got last=\[1\]; pass"),
    ({"mode": "low"}, r"one that OverfitGuard gave, got mode='low'; pass"),
    ({"mode": "max"}, r"of mode 'min', got 'max'; make the OverfitGuard with that mode"),
    (
        {"kept": 0.1},
        r"with weights where it has a check|weights where it has a check that they belong to, got kept=0.1 with no weights; pass",
    ),
    (
        {"colour": 1},
        rf"the keys {GUARD_KEYS}, got {quoted(GUARD_KEYS)}, 'colour'; pass a saved .* to a OverfitGuard",
    ),
    ({"weights": {}}, r"without weights, got those of a guard with a model; pass model= to this one too"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED)
def test_states_refused(change: dict[str, Any], message: str) -> None:
    """A state that no guard of this kind gave is refused with what is wrong, and nothing changes."""
    guard = OverfitGuard(patience=3)
    run([0, 2, 2], [0.9, 0.5, 0.6], guard)
    before = guard.state_dict()
    with pytest.raises(ValueError, match=rf"^`state_dict` must (be|have) .*{message}"):
        guard.load_state_dict({**before, **change})
    assert guard.state_dict() == before


def test_states_of_another_kind_refused() -> None:
    """A trigger's state is no guard's, an empty one is nobody's, and a list is no mapping."""
    with pytest.raises(
        ValueError, match=rf"the keys {GUARD_KEYS}, got {quoted('mode, number, total, last, best, count, cap')}; pass"
    ):
        OverfitGuard().load_state_dict(PlateauTrigger().state_dict())
    with pytest.raises(
        ValueError, match=r"the keys mode, number, total, last, best, count, cap, got none; pass a saved"
    ):
        PlateauTrigger().load_state_dict({})
    for cap in (OverfitGuard(), OverfitGuard(model=Net()), PlateauTrigger()):
        with pytest.raises(
            TypeError, match=r"`state_dict` must be a mapping, got list; pass a saved state_dict\(\) as it"
        ):
            cap.load_state_dict([])  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["weights"].pop("layer.bias"),
            r"got nothing for layer.bias, where it has a tensor of \[2\]; build",
        ),
        (
            lambda s: s["weights"].update(more=torch.ones(3)),
            r"got a tensor of \[3\] for more, where it has nothing; build",
        ),
        (lambda s: s["weights"].update({"layer.bias": [0.0, 0.0]}), r"got an object for layer.bias, where it has a"),
        (lambda s: s["weights"].update({"layer.bias": torch.ones(3)}), r"got a tensor of \[3\] for layer.bias, where"),
        (lambda s: s.update(weights=3), r"got nothing for _extra_state, where it has an object; build"),
        (lambda s: s.update(weights=None), r"got kept=0.3 with no weights; pass a saved"),
        (lambda s: s.update(kept=None), r"got kept=None with weights; pass a saved"),
        (
            lambda s: s.pop("weights"),
            r"must have the kept weights, got one of a guard without a model; leave model= out",
        ),
    ],
)
def test_weights_refused(change: Callable[[Any], Any], message: str) -> None:
    """Weights of another model, or none where there have to be some, are refused, and nothing changes."""
    net = Net()
    guard = OverfitGuard(model=net)
    train(net, guard, LOSSES[:3])
    saved = guard.state_dict()
    other = OverfitGuard(model=net)
    change(saved)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert other.state_dict() == OverfitGuard(model=net).state_dict()
    assert "layer.bias" in guard.state_dict()["weights"]


def test_caps_leave_torch_alone() -> None:
    """Importing and using guard and trigger loads no torch."""
    code = (
        "import sys; from unfreeze_sched.guards import OverfitGuard, PlateauTrigger\n"
        "for cap in (OverfitGuard(), PlateauTrigger()):\n"
        "    cap.follow(0, 4); cap.step(0.5); cap.load_state_dict(cap.state_dict())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


RANK = """
import json, logging, os, sys
import torch.distributed as dist
from unfreeze_sched import parallel
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("unfreeze_sched").addHandler(handler)

def caps(worse):
    guard, trigger = OverfitGuard(patience=2), PlateauTrigger(patience=2, start=1)
    for epoch in range(6):
        for cap in (guard, trigger):
            cap.follow(1, 4)
            # Rank 0 gets worse and worse, rank 1 better and better; or the other way round.
            cap.step((epoch if rank == worse else -epoch) / 8)
    return guard.cap, trigger.cap, guard.state_dict(), trigger.state_dict()

agreed = caps(0), caps(1)
said = list(lines)
parallel.agreed = lambda metric: metric
print(json.dumps([agreed, said, caps(0)[:2]]), flush=True)
os._exit(0)  # on torch 2.6 gloo's destroy_process_group waits for good now and then
"""


def test_ranks_decide_alike(tmp_path: Path) -> None:
    """Two processes with opposite metrics decide as rank 0 does, and rank 0 alone says so; unasked they would differ."""
    words = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen(
            [*words, rank, str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    (agreed, said, alone), (agreed_1, said_1, alone_1) = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert agreed == agreed_1
    assert [caps[:2] for caps in agreed] == [[1, 2], [None, 1]]
    assert (alone, alone_1) == ([1, 2], [None, 1])
    assert [line.partition(":")[0] for line in said] == ["OverfitGuard"]
    assert said_1 == []


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a process group, and in a group of one, no collective is called."""

    def refuse(*args: Any, **keywords: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", refuse)
    assert parallel.agreed(0.5) == 0.5
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert parallel.agreed(0.5) == 0.5
    finally:
        torch.distributed.destroy_process_group()
