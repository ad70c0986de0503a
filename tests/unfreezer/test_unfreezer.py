"""`ProgressiveUnfreezer`: the state after `apply(e)` follows from the schedule and `e`, and equals the oracle's."""

from __future__ import annotations

import copy
import functools
import json
import logging
from typing import Any

import pytest
import torch
from counting import work_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Net, differences, no_schedulers, train_in_lockstep, twins
from strategies import schedules
from torch import nn
from torch.optim import lr_scheduler

from unfreeze_sched import (
    Block,
    GroupChange,
    MilestonePreset,
    OptimizerRebuilder,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
)
from unfreeze_sched.optimizer.groups import BLOCK_KEY

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)
DOWN = UnfreezeSchedule(
    preset=MilestonePreset(milestones={1: 1, 3: 3, 5: 1, 6: 2}), total_blocks=3, total_epochs=8
)  # fmt: skip
OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW with amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "AdamW, foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
}


def cosine(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [lr_scheduler.CosineAnnealingLR(optimizer, 20)]


def cosine_with_floor(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.002)]


def make(schedule: UnfreezeSchedule = RATE, **keywords: Any) -> tuple[Net, torch.optim.Optimizer, ProgressiveUnfreezer]:
    net = Net(schedule.total_blocks)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.5)
    return net, optimizer, ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, **keywords)


def trainable(net: Net) -> list[int]:
    return [i for i, block in enumerate(net.blocks) if all(p.requires_grad for p in block.parameters())]


# Late-join equivalence.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [RATE, DOWN], ids=["rate", "refreezing"])
@pytest.mark.parametrize("membership", ["late", "declared"])
def test_equals_the_oracle_to_the_bit(name: str, schedule: UnfreezeSchedule, membership: str) -> None:
    """Weights, states and learning rates are those of an optimizer that had every parameter from the start (trap 5)."""
    run, oracle = twins(schedule, OPTIMIZERS[name], scale=0.5, layer_decay=0.5, membership=membership)
    assert train_in_lockstep(run, oracle, range(8)) == []


@pytest.mark.parametrize("name", ["SGD", "SGD with momentum", "Adam", "AdamW", "AdamW, fused"])
@pytest.mark.parametrize("make_schedulers", [cosine, cosine_with_floor])
def test_cosine_equals_the_oracle(name: str, make_schedulers: Any) -> None:
    """Under a cosine the run equals the oracle's to the bit at scale 1, and to rounding at others."""
    run, oracle = twins(RATE, OPTIMIZERS[name], make_schedulers)
    assert train_in_lockstep(run, oracle, range(8)) == []
    run, oracle = twins(RATE, OPTIMIZERS[name], make_schedulers, scale=0.1, layer_decay=0.7)
    assert train_in_lockstep(run, oracle, range(8), relative=1e-12) == []
    rates, twin_rates = (r.schedulers[0].get_last_lr() for r in (run, oracle))
    assert rates == pytest.approx(twin_rates, rel=1e-12)
    assert run.schedulers[0].base_lrs == oracle.schedulers[0].base_lrs


@settings(max_examples=25)
@given(schedules(), st.sampled_from(["SGD with momentum", "AdamW"]), st.sampled_from([1.0, 0.5]), st.data())
def test_equals_the_oracle_on_drawn_schedules(
    schedule: UnfreezeSchedule, name: str, scale: float, data: st.DataObject
) -> None:
    """Any schedule, visited at any ascending epochs, equals the oracle to the bit."""
    schedule = schedule.replace(total_epochs=min(schedule.total_epochs, 80))
    epochs = sorted(data.draw(st.sets(st.integers(0, schedule.total_epochs), min_size=1, max_size=6)))
    run, oracle = twins(schedule, OPTIMIZERS[name], scale=scale)
    found = train_in_lockstep(run, oracle, epochs, steps=1)
    # A jump over an epoch at which a block was trainable gives it a group, though it never trained: nothing to compare.
    assert found == []


def recreate(run: Any) -> None:
    """The common recipe: a new optimizer over what is trainable."""
    groups = [dict(group) for group in run.optimizer.param_groups]
    run.optimizer = type(run.optimizer)(groups)


def clear_moments(run: Any) -> None:
    for state in run.optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if key in state:
                state[key].zero_()


def double_a_rate(run: Any) -> None:
    run.optimizer.param_groups[-1]["lr"] *= 1 + 1e-9


def leave_a_gradient(run: Any) -> None:
    for block in run.model.blocks:
        for p in block.parameters():
            if not p.requires_grad:
                p.data.add_(1e-12)


@pytest.mark.parametrize("name", ["SGD with momentum", "Adam", "AdamW"])
@pytest.mark.parametrize("mutation", [recreate, clear_moments, double_a_rate, leave_a_gradient])
def test_the_oracle_can_fail(name: str, mutation: Any) -> None:
    """Re-creating the optimizer, forgetting a moment, or a billionth of a learning rate: the comparison finds each."""
    run, oracle = twins(RATE, OPTIMIZERS[name])
    assert train_in_lockstep(run, oracle, range(4)) == []
    mutation(run)
    assert train_in_lockstep(run, oracle, range(3, 4)) != []


# The state follows from the schedule and the epoch.


@settings(max_examples=60)
@given(schedules(), st.lists(st.integers(0, 90), min_size=1, max_size=8), st.sampled_from(["keep", "drop"]))
def test_state_follows_from_the_epoch(schedule: UnfreezeSchedule, epochs: list[int], on_refreeze: str) -> None:
    """After any ascending calls, model and groups are those of a single call, and a second call changes nothing."""
    epochs = sorted(epochs)
    net, optimizer, unfreezer = make(schedule, on_refreeze=on_refreeze)
    for epoch in epochs:
        unfreezer.apply(epoch)
        assert not unfreezer.apply(epoch)
    single, single_optimizer, single_unfreezer = make(schedule, on_refreeze=on_refreeze)
    single_unfreezer.apply(epochs[-1])

    number, peak = schedule.progress_at(epochs[-1])
    blocks = schedule.total_blocks
    assert trainable(net) == trainable(single) == list(range(blocks - number, blocks))
    tags = [f"block{i}" for i in reversed(range(blocks - peak, blocks))]
    for opt, model in ((optimizer, net), (single_optimizer, single)):
        assert [group[BLOCK_KEY] for group in opt.param_groups[1:]] == tags
        filled = [bool(group["params"]) for group in opt.param_groups[1:]]
        assert filled == [on_refreeze == "keep" or i < number for i in range(peak)]
        names = {id(p): name for name, p in model.named_parameters()}
        assert len({id(p) for group in opt.param_groups for p in group["params"]}) == sum(
            len(group["params"]) for group in opt.param_groups
        )
        for group in opt.param_groups[1:]:
            own = f"blocks.{group[BLOCK_KEY][5:]}."
            assert all(names[id(p)].startswith(own) for p in group["params"])


def test_going_back_refreezes_and_keeps_the_groups() -> None:
    """An earlier epoch freezes the blocks that it has not, and leaves their groups in the optimizer."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(5)
    assert not unfreezer.apply(1)
    assert trainable(net) == [2]
    assert len(optimizer.param_groups) == 4
    assert not unfreezer.apply(5)
    assert trainable(net) == [0, 1, 2]


def test_a_jump_needs_no_previous_call() -> None:
    """The first call may be at any epoch; the guide's loop, which waits for an edge, freezes everything there (trap 25, 35)."""
    net, optimizer, unfreezer = make()
    change = unfreezer.apply(4)
    assert trainable(net) == [1, 2]
    assert [group.get(BLOCK_KEY) for group in optimizer.param_groups] == [None, "block2", "block1"]
    assert len(change.added) == 8


def test_starting_at_epoch_zero() -> None:
    """A start of 0 unfreezes the first block before epoch 0 is trained (trap 35)."""
    net, _, unfreezer = make(RATE.replace(preset=RatePreset(unfreeze_start_epoch=0)))
    assert unfreezer.apply(0)
    assert trainable(net) == [2]


def test_the_first_call_freezes() -> None:
    """Nothing is frozen by construction; the first call freezes what the epoch has not unfrozen, and holds its norms."""
    net, _, unfreezer = make()
    assert trainable(net) == [0, 1, 2]
    assert unfreezer.apply(0) == GroupChange()
    assert trainable(net) == []
    net.train()
    assert [m.training for m in net.modules() if isinstance(m, nn.LayerNorm)] == [False] * 3
    unfreezer.apply(1)
    assert [m.training for m in net.modules() if isinstance(m, nn.LayerNorm)] == [False, False, True]


def test_blocks_that_were_frozen_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """The first call says which blocks were frozen as a whole when it was made, whoever froze them; and once."""
    text = "found frozen as a whole, and the schedule's to unfreeze: "

    def found() -> list[str]:
        messages = [message for message in caplog.messages if "found" in message]
        caplog.clear()
        return messages

    with caplog.at_level(logging.INFO, "unfreeze_sched"):
        net = Net(3)
        net.blocks[0].requires_grad_(False)
        net.blocks[1][0].requires_grad_(False)  # in part
        unfreezer = ProgressiveUnfreezer(net.make_blocks(), torch.optim.AdamW(net.head.parameters()), RATE)
        for epoch in (0, 0, 1, 7, 3):
            unfreezer.apply(epoch)
        assert found() == [text + "block0"]
        again = ProgressiveUnfreezer(net.make_blocks(), torch.optim.AdamW(net.head.parameters()), RATE)
        again.load_state_dict(unfreezer.state_dict())
        again.apply(4)
        assert found() == [text + "block0"]  # which the schedule froze
        make()[2].apply(0)
        assert found() == []


def test_norms_can_be_left_alone() -> None:
    """`norms="train"` leaves the modes of frozen norms to `model.train()`."""
    net, _, unfreezer = make(norms="train")
    unfreezer.apply(0)
    net.train()
    assert all(module.training for module in net.modules())


def test_norms_can_stay_frozen() -> None:
    """`norms="frozen"` keeps the norms of joined blocks in evaluation, while their weights train."""
    net, _, unfreezer = make(norms="frozen")
    unfreezer.apply(5)
    net.train()
    assert not any(m.training for m in net.modules() if isinstance(m, nn.LayerNorm))
    assert all(p.requires_grad for p in net.parameters())


def test_the_preset_gives_the_scale() -> None:
    """Without `learning_rate_scale` the preset's counts, with it the argument."""
    schedule = RATE.replace(preset=RATE.preset.replace(learning_rate_scale=0.25))
    for keywords, rate in (({}, 0.125), ({"learning_rate_scale": 1.0}, 0.5)):
        _, optimizer, unfreezer = make(schedule, **keywords)
        unfreezer.apply(1)
        assert optimizer.param_groups[1]["lr"] == rate


def test_a_hand_thawed_block_is_brought_back() -> None:
    """Groups that another hand added or loaded make the next call look at everything again."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    net.blocks[0].requires_grad_(True)
    optimizer.load_state_dict(optimizer.state_dict())
    unfreezer.apply(1)
    assert trainable(net) == [2]


def test_a_refused_apply_changes_nothing() -> None:
    """When the optimizer's side refuses, the model's flags, gradients and norm modes are as they were."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(0)
    lr_scheduler.StepLR(optimizer, 1)  # not passed, so the next change is refused
    for p in net.blocks.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in net.parameters()]
    with pytest.raises(ValueError, match="`lr_schedulers` must hold the LR scheduler"):
        unfreezer.apply(5)
    assert trainable(net) == []
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    assert not any(m.training for m in net.modules() if isinstance(m, nn.LayerNorm))
    assert len(optimizer.param_groups) == 1


def test_nothing_to_do_is_cheap_at_any_size() -> None:
    """A call that changes nothing does as little with 10,000 parameters as with 10."""
    work = []
    for size in (10, 10_000):
        body = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(size)])
        head = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(head.parameters())
        schedule = RATE.replace(total_blocks=1)
        unfreezer = ProgressiveUnfreezer([Block("body", (body,))], optimizer, schedule)
        unfreezer.apply(3)
        unfreezer.apply(4)  # the first call after a transition looks at the rates
        work.append(work_of(lambda: unfreezer.apply(5)))  # noqa: B023
    assert work[0] == work[1] <= 100


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"schedule": [0, 1]}, TypeError, r"`schedule` must be an UnfreezeSchedule, got list; make one"),
        ({"schedule": RATE.replace(total_blocks=2)}, ValueError, r"`schedule` must be for the 3 blocks given, got total_blocks=2; pass"),
        ({"norms": "cold"}, ValueError, r"`norms` must be one of eval, frozen, fixed, train, got 'cold'; 'eval' is the default"),
    ],
)  # fmt: skip
def test_wrong_arguments(keywords: Any, error: type[Exception], message: str) -> None:
    """Each wrong argument is named with its value and one fix."""
    net = Net()
    arguments = {"blocks": net.make_blocks(), "optimizer": torch.optim.SGD(net.head.parameters()), "schedule": RATE}
    with pytest.raises(error, match=message):
        ProgressiveUnfreezer(**{**arguments, **keywords})


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_apply_takes_an_epoch(epoch: Any, error: type[Exception]) -> None:
    """An epoch is a non-negative integer, and a wrong one changes nothing."""
    net, _, unfreezer = make()
    with pytest.raises(error, match="`epoch` must be an integer of at least 0, got"):
        unfreezer.apply(epoch)
    assert trainable(net) == [0, 1, 2]


# Saving and loading.


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("schedule", [RATE, DOWN], ids=["rate", "refreezing"])
@pytest.mark.parametrize("make_schedulers", [no_schedulers, cosine])
def test_resuming_equals_going_on(at: int, schedule: UnfreezeSchedule, make_schedulers: Any) -> None:
    """Interrupted before any epoch and resumed in new objects, the run equals the uninterrupted one to the bit."""
    make_optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    run, oracle = twins(schedule, make_optimizer, make_schedulers, scale=0.5)
    assert train_in_lockstep(run, oracle, range(at), relative=1e-12) == []
    unfreezer = run.apply.__self__  # type: ignore[attr-defined]  # the bound method's unfreezer
    saved = json.loads(json.dumps(unfreezer.state_dict()))
    parts = copy.deepcopy(
        (run.model.state_dict(), run.optimizer.state_dict(), [s.state_dict() for s in run.schedulers])
    )

    resumed, _ = twins(schedule, make_optimizer, make_schedulers, scale=0.5, seed=7)
    resumed.apply.__self__.load_state_dict(saved)  # type: ignore[attr-defined]
    resumed.model.load_state_dict(parts[0])
    for scheduler, state in zip(resumed.schedulers, parts[2], strict=True):
        scheduler.load_state_dict(state)
    resumed.optimizer.load_state_dict(parts[1])
    assert trainable(resumed.model) == trainable(run.model) or at == 0
    assert train_in_lockstep(resumed, run, range(at, 8), seed=2) == []
    assert differences(resumed, run) == []


def test_function_lambdas_survive_a_resume() -> None:
    """A LambdaLR saves no functions; replaying the groups first gives the loaded one a function for each group (trap 24)."""

    def halve(epoch: int) -> float:
        return 0.5**epoch

    def step_both(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LambdaLR) -> list[float]:
        optimizer.step()
        scheduler.step()
        return [group["lr"] for group in optimizer.param_groups]

    runs = []
    for _ in range(2):
        net = Net()
        optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.5)
        scheduler = lr_scheduler.LambdaLR(optimizer, halve)
        runs.append((optimizer, scheduler, ProgressiveUnfreezer(net.make_blocks(), optimizer, RATE, [scheduler])))
    optimizer, scheduler, unfreezer = runs[0]
    unfreezer.apply(0)
    step_both(optimizer, scheduler)
    unfreezer.apply(3)
    step_both(optimizer, scheduler)
    saved = copy.deepcopy((unfreezer.state_dict(), scheduler.state_dict(), optimizer.state_dict()))
    assert saved[1]["lr_lambdas"] == [None, None, None]
    resumed_optimizer, resumed_scheduler, resumed_unfreezer = runs[1]
    resumed_unfreezer.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    resumed_optimizer.load_state_dict(saved[2])
    assert step_both(resumed_optimizer, resumed_scheduler) == step_both(optimizer, scheduler)


def test_a_state_of_something_else_is_refused() -> None:
    """A state of another schedule, another model or another order of blocks says what differs, and changes nothing."""
    net, _optimizer, unfreezer = make()
    unfreezer.apply(5)
    saved = unfreezer.state_dict()
    other, other_optimizer, other_unfreezer = make(RATE.replace(total_epochs=9))
    with pytest.raises(ValueError, match=r"got schedule\['total_epochs'\] saved as 8, now 9; rebuild what was saved"):
        other_unfreezer.load_state_dict(saved)
    assert len(other_optimizer.param_groups) == 1
    assert trainable(other) == [0, 1, 2]

    blocks = net.make_blocks()
    head = torch.optim.AdamW(net.head.parameters())
    swapped = ProgressiveUnfreezer([blocks[1], blocks[0], blocks[2]], head, RATE)
    with pytest.raises(ValueError, match=r"got blocks saved in the order block0, block1, block2; rebuild"):
        swapped.load_state_dict(saved)
    renamed = ProgressiveUnfreezer([Block("stem", (net.blocks[0],), ("blocks.0",)), *blocks[1:]], head, RATE)
    with pytest.raises(ValueError, match=r"got blocks\['block0'\] saved alone; blocks\['stem'\] not saved; rebuild"):
        renamed.load_state_dict(saved)
    wide = Net(3, width=5)
    wider = ProgressiveUnfreezer(wide.make_blocks(), torch.optim.AdamW(wide.head.parameters()), RATE)
    with pytest.raises(
        ValueError, match=r"blocks\['block0'\]\['blocks.0.0.weight'\] saved as \[4, 4\], now \[5, 5\]; .*more"
    ):
        wider.load_state_dict(saved)


def test_a_wrong_order_at_equal_shapes_is_refused() -> None:
    """Parameters in another order within a block, or within its groups, would get each other's moments (trap 22)."""

    def begin(order: str, bare: str | None = None) -> ProgressiveUnfreezer:
        twins, head = {name: nn.Linear(4, 4, bias=False) for name in "ab"}, nn.Linear(4, 1)
        block = Block("block", tuple(twins[name] for name in order), tuple(order))
        no_decay = None if bare is None else lambda name, _: {"weight_decay": 0.0} if name.startswith(bare) else {}
        schedule = RATE.replace(total_blocks=1)
        return ProgressiveUnfreezer([block], torch.optim.AdamW(head.parameters()), schedule, no_decay=no_decay or False)

    for saving, loading in ((begin("ab"), begin("ba")), (begin("ab", bare="a"), begin("ab", bare="b"))):
        saving.apply(5)
        before = loading.rebuilder.optimizer.state_dict()
        with pytest.raises(
            ValueError,
            match=r"got blocks\['block'\] saved in the order (a.weight, b.weight|b.weight, a.weight); rebuild",
        ):
            loading.load_state_dict(saving.state_dict())
        assert loading.rebuilder.optimizer.state_dict() == before


@pytest.mark.parametrize("strict", [True, False])
def test_another_division_into_blocks_is_refused(*, strict: bool) -> None:
    """The same parameters in other blocks are named, whether or not another schedule may go on."""
    net, _, unfreezer = make()
    unfreezer.apply(5)
    merged = [Block("block0", (net.blocks[0], net.blocks[1]), ("blocks.0", "blocks.1")), net.make_blocks()[2]]
    optimizer = torch.optim.AdamW(net.head.parameters())
    other = ProgressiveUnfreezer(merged, optimizer, RATE.replace(total_blocks=2))
    with pytest.raises(ValueError, match=r"got blocks\['block0'\]\['blocks.1.0.weight'\] not saved; .*rebuild what"):
        other.load_state_dict(unfreezer.state_dict(), strict=strict)
    assert len(optimizer.param_groups) == 1


def test_another_schedule_may_go_on_when_asked() -> None:
    """With `strict=False` a longer or changed schedule goes on from where the saved run stood; other blocks still may not."""
    _, optimizer, unfreezer = make()
    unfreezer.apply(3)
    saved = json.loads(json.dumps(unfreezer.state_dict()))
    longer = RATE.replace(total_epochs=20, preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=8))
    net, resumed, other = make(longer)
    other.load_state_dict(saved, strict=False)
    assert trainable(net) == [1, 2]
    assert [g.get(BLOCK_KEY) for g in resumed.param_groups] == [g.get(BLOCK_KEY) for g in optimizer.param_groups]
    other.apply(4)
    assert trainable(net) == [2]
    del saved["blocks"]["block0"]
    with pytest.raises(ValueError, match=r"got blocks\['block0'\] not saved; rebuild"):
        other.load_state_dict(saved, strict=False)


@pytest.mark.parametrize("applied", [[1], [1, 4], [2, 1], [-1, 0], "12", [1.5, 2], 3, {}])
def test_wrong_numbers_of_blocks(applied: Any) -> None:
    """Numbers that no unfreezer of these blocks saves are refused, and nothing changes."""
    net, optimizer, unfreezer = make()
    state = {**unfreezer.state_dict(), "applied": applied}
    with pytest.raises(
        ValueError,
        match=r"`state_dict` must be one that ProgressiveUnfreezer gave, got applied=",
    ):
        unfreezer.load_state_dict(state)
    assert (trainable(net), len(optimizer.param_groups)) == ([0, 1, 2], 1)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ("state", TypeError, r"`state_dict` must be a mapping, got str; pass a saved state_dict\(\)"),
        (
            {"param_groups": []},
            ValueError,
            r"`state_dict` must have the keys schedule, blocks, applied, groups, history, caps, got 'param_groups'; pass",
        ),
    ],
)
def test_no_state_at_all(state: Any, error: type[Exception], message: str) -> None:
    """Something that no unfreezer saved is refused with what is expected."""
    _, _, unfreezer = make()
    with pytest.raises(error, match=message):
        unfreezer.load_state_dict(state)


def test_rebuilder_and_unfreezer_agree() -> None:
    """A hand-driven `sync` after the same flags gives the groups that `apply` gives."""
    _net, optimizer, unfreezer = make(layer_decay=0.5)
    unfreezer.apply(5)
    other = Net()
    other_optimizer = torch.optim.AdamW(other.head.parameters(), lr=0.5)
    OptimizerRebuilder(other_optimizer, other.make_blocks(), layer_decay=0.5).sync()
    keys = ("lr", BLOCK_KEY, "weight_decay")
    assert [[g.get(k) for k in keys] for g in optimizer.param_groups] == [
        [g.get(k) for k in keys] for g in other_optimizer.param_groups
    ]
