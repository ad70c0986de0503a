"""Late join is exact for every optimizer at hand, or refused by name; the comparison is `optimizers_matrix`."""

from __future__ import annotations

import copy
import functools
from typing import Any

import optimizers_matrix as matrix
import pytest
import torch
from torch import nn

from unfreeze_sched import Block, OptimizerRebuilder
from unfreeze_sched.optimizer import groups

po = pytest.importorskip("pytorch_optimizer")
for package in ("schedulefree", "prodigyopt", "lion_pytorch", "transformers", "accelerate"):
    pytest.importorskip(package)

CASES = {case.name: case for case in matrix.cases()}
TORCH, LISTED = ([name for name in CASES if name.startswith(start)] for start in ("torch ", "pytorch_optimizer "))
OTHERS = [name for name in CASES if name not in TORCH and name not in LISTED]
# Groups of one learning rate, or none: a scale of 1 alone is taken.
ONE_RATE = "refused: `learning_rate_scale` and `layer_decay` must be 1 for "
NEVER = "refused: `optimizer` must take further param groups, got "
DECLARED = "refused: `membership` must be 'declared' "
NEVER_JOIN = {"torch LBFGS", *(f"pytorch_optimizer {name}" for name in ("lbfgs", "lomo", "adalomo", "adammini"))}
NOT_LATE = {f"pytorch_optimizer {name}" for name in ("asgd", "swats", "emonavi", "emolynx", "emofact")}
AT_ONE = {
    *(name for name, case in CASES.items() if case.why == matrix.D_ADAPTATION),
    "transformers Adafactor, lr=None", "pytorch_optimizer adafactor", "pytorch_optimizer alig",
}  # fmt: skip


@functools.cache
def verdict(name: str, membership: str, scale: float) -> str:
    return matrix.verdict(CASES[name], membership, scale)


def expected(name: str, membership: str, scale: float) -> str:
    if name in NEVER_JOIN:
        return NEVER
    if name in NOT_LATE and membership == "late":
        return DECLARED
    return ONE_RATE if name in AT_ONE and scale != 1 else "bit-exact"


@pytest.mark.parametrize("name", [*TORCH, *OTHERS])
@pytest.mark.parametrize("membership", matrix.MEMBERSHIPS)
def test_trajectories(name: str, membership: str) -> None:
    """Through joins, a refreezing and a thaw, weights and states are the target's to the bit, or refused by name."""
    for scale in (1.0, 0.5):
        assert verdict(name, membership, scale).startswith(expected(name, membership, scale))


@pytest.mark.parametrize("name", LISTED)
def test_trajectories_of_the_listed(name: str) -> None:
    """As above, for all of pytorch-optimizer's list: none is silently wrong."""
    for membership in matrix.MEMBERSHIPS:
        scale = 1.0 if name in AT_ONE else 0.5
        assert verdict(name, membership, scale).startswith(expected(name, membership, scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_other_scales_of_the_listed(name: str) -> None:
    """At the scale that the quick run leaves out."""
    for membership in matrix.MEMBERSHIPS:
        scale = 0.5 if name in AT_ONE else 1.0
        assert verdict(name, membership, scale).startswith(expected(name, membership, scale))


def test_how_many_are_right() -> None:
    """Of pytorch-optimizer's list at least 100 join late to the bit; what is refused is refused with its reason."""
    said = {name: verdict(name, "late", 1.0 if name in AT_ONE else 0.5) for name in LISTED}
    listed = {name.removeprefix("pytorch_optimizer ") for name in LISTED}
    assert set(po.get_supported_optimizers()) - listed == set(matrix.MISSING)
    assert [name for name, text in said.items() if not text.startswith(("bit-exact", "refused: "))] == []
    assert sum(text == "bit-exact" for text in said.values()) >= 100
    assert {name for name, text in said.items() if text.startswith("refused: ")} == (NEVER_JOIN | NOT_LATE) - {
        "torch LBFGS"
    }


# What the comparison finds.


def copy_counters(arm: Any) -> None:
    """The new group's counters are the head's."""
    head, group = arm.optimizers[0].param_groups[:2]
    for key in groups.counters(arm.optimizers[0]) & head.keys():
        group[key] = copy.deepcopy(head[key])


def extend(arm: Any) -> None:
    """The new parameters go into the head's group."""
    head, group = arm.optimizers[0].param_groups[:2]
    head["params"].extend(group["params"])
    group["params"].clear()


def scale_a_rate(arm: Any) -> None:
    arm.optimizers[0].param_groups[1]["lr"] *= 1 + 1e-3


def forget_the_head(arm: Any) -> None:
    for state in list(arm.optimizers[0].state.values()):
        for key in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & state.keys():
            state[key].zero_()


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("schedulefree AdamWScheduleFree", copy_counters),
        ("schedulefree SGDScheduleFree", copy_counters),
        ("pytorch_optimizer laprop", copy_counters),
        ("pytorch_optimizer adabelief", copy_counters),
        ("schedulefree AdamWScheduleFree", extend),
        ("pytorch_optimizer laprop", extend),
        ("torch AdamW(fused=True)", scale_a_rate),
        ("torch SGD(fused=True, momentum=0.9)", forget_the_head),
        ("torch Adam(amsgrad=True)", forget_the_head),
        ("wrapper SAM(SGD)", forget_the_head),
    ],
)
def test_the_comparison_can_fail(name: str, mutation: Any) -> None:
    """Extended or copied counters, a rate, a lost moment: each shows."""
    script = matrix.SCRIPT[:2]  # before a sync would find out
    assert matrix.tried(CASES[name], "late", 1.0, script=script) == 0
    assert matrix.tried(CASES[name], "late", 1.0, script=script, mutate=mutation) > 0


@pytest.mark.parametrize("name", ["pytorch_optimizer dadaptadam", "pytorch_optimizer prodigy"])
def test_a_shared_estimate_is_not_reset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that starts with `d0` would not be that of the run that shares one estimate from the start."""
    monkeypatch.setattr(groups, "_SHARED", "none of the keys")
    optimizer = matrix.made(CASES[name], [matrix.group_of(nn.Linear(4, 4), 0.01)])
    optimizer.param_groups[0].update(d=0.5, d_max=0.5)
    assert groups.group_like(optimizer, optimizer.param_groups[0])["d"] != 0.5
    monkeypatch.undo()
    group = groups.group_like(optimizer, optimizer.param_groups[0])
    assert (group["d"], group["d_max"]) == (0.5, 0.5)


# What a joining group holds.


def parts(make: Any = torch.optim.SGD, **keywords: Any) -> tuple[nn.Module, Any, Any]:
    """A network of a block and a head, an optimizer of the head, and a function that gives the rebuilder."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = make(list(net[1].parameters()), **keywords)
    block = Block("block", (net[0],))
    return net, optimizer, functools.partial(OptimizerRebuilder, optimizer, [block])


def step(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()


def test_a_tensor_rate_is_cloned() -> None:
    """Neither the template's tensor nor the constructor's is the joining group's (trap 4)."""
    rate = torch.tensor(0.1)
    _, optimizer, make = parts(lr=rate)
    make(learning_rate_scale=1.0).sync()
    joined = optimizer.param_groups[1]["lr"]
    assert torch.equal(joined, rate)
    assert joined is not rate
    assert joined is not optimizer.param_groups[0]["lr"]


def test_the_live_template_is_copied() -> None:
    """What the user wrote into the template since is copied, the user's own keys too, and copied deeply (trap 14)."""
    _, optimizer, make = parts(lr=0.1, momentum=0.5)
    optimizer.param_groups[0].update(momentum=0.25, mine={"a": [1]})
    make().sync()
    head, group = optimizer.param_groups
    assert (group["momentum"], group["mine"]) == (0.25, {"a": [1]})
    assert group["mine"]["a"] is not head["mine"]["a"]


def test_counters_start_fresh_and_the_mode_is_shared() -> None:
    """The counters of schedulefree are those of a new optimizer, and its mode is the head's (traps 6, 7)."""
    import schedulefree  # noqa: PLC0415

    net, optimizer, make = parts(schedulefree.AdamWScheduleFree)
    optimizer.train()
    for _ in range(3):
        step(net, optimizer)
    make().sync()
    head, group = optimizer.param_groups
    assert (head["k"], group["k"], group["weight_sum"], group["lr_max"]) == (3, 0, 0.0, -1.0)
    assert head["train_mode"] is group["train_mode"] is True
    before = [p.detach().clone() for p in net[0].parameters()]  # type: ignore[index]
    optimizer.eval()
    optimizer.train()
    assert all(map(torch.equal, before, net[0].parameters()))  # type: ignore[index]


@pytest.mark.parametrize("membership", ["declared", "late"])
def test_a_refilled_group_starts_again(membership: Any) -> None:
    """A group that was emptied counted on; filled again it starts as a new one, and stays the same object."""
    net, optimizer, make = parts(po.LaProp)
    rebuilder = make(on_refreeze="drop", membership=membership)
    rebuilder.sync()
    group = optimizer.param_groups[1]
    inside = group["params"]
    step(net, optimizer)
    for trainable in (False, True):
        for parameter in net[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(trainable)
            parameter.grad = None
        rebuilder.sync()
        if not trainable:
            step(net, optimizer)
    assert group is optimizer.param_groups[1]
    assert group["params"] is inside
    assert len(inside) == 2
    assert "step" not in group
    assert optimizer.param_groups[0]["step"] == 2


def test_names_are_kept_in_step() -> None:
    """A named optimizer knows the names of what joined, late and declared (trap 16)."""
    for membership in ("late", "declared"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = torch.optim.SGD(net[1].named_parameters(), lr=0.1)
        OptimizerRebuilder(optimizer, [Block("block", (net[0],))], membership=membership).sync()  # type: ignore[arg-type]
        assert optimizer.param_groups[1]["param_names"] == ["block/weight", "block/bias"]
        assert len(optimizer.param_groups[1]["params"]) == 2


def test_the_optimizers_own_rates_grow_and_shrink() -> None:
    """AdaBound's `base_lrs` get the group's rate, and lose it when the join fails (trap 13)."""
    _, optimizer, make = parts(po.AdaBound, lr=0.1)
    groups.add(optimizer, {"params": [nn.Parameter(torch.ones(2))], "lr": 0.01}, 0, 0.1)
    assert optimizer.base_lrs == [0.1, 0.1 * 0.1]
    groups.take_back(optimizer, 1)
    assert (optimizer.base_lrs, len(optimizer.param_groups)) == ([0.1], 1)
    make(learning_rate_scale=0.5).sync()
    assert optimizer.base_lrs == [0.1, 0.05]


def test_a_failing_fill_is_undone() -> None:
    """When the optimizer refuses the parameters of a declared group, the group stands empty in its place."""

    class Fussy(torch.optim.SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if len(getattr(self, "param_groups", [])) == 1 and param_group["params"]:
                raise RuntimeError("no more")
            super().add_param_group(param_group)

    net, optimizer, make = parts(Fussy, lr=0.1)
    for parameter in net[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(requires_grad=False)
    rebuilder = make(membership="declared")
    group = optimizer.param_groups[1]
    for parameter in net[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(requires_grad=True)
    with pytest.raises(RuntimeError, match="no more"):
        rebuilder.sync()
    assert optimizer.param_groups[1] is group
    assert group["params"] == []


@pytest.mark.parametrize("name", ["accelerate AcceleratedOptimizer(AdamW)", "wrapper Lookahead(AdamW)"])
def test_wrapper_and_wrapped_share_their_groups(name: str) -> None:
    """After a join the groups of both are the same objects."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = matrix.made(CASES[name], [matrix.group_of(net[1], 0.01)])
    OptimizerRebuilder(optimizer, [Block("block", (net[0],))]).sync()
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert len(optimizer.param_groups) == 2


def test_counters_are_read_from_the_source() -> None:
    """Keys that steps write count; what the constructor, `train` or a user writes does not."""
    import schedulefree  # noqa: PLC0415

    _, optimizer, _ = parts(schedulefree.AdamWScheduleFree)
    assert groups.counters(optimizer) == {"k", "weight_sum", "lr_max", "scheduled_lr"}
    _, optimizer, _ = parts(torch.optim.AdamW)
    assert groups.counters(optimizer) == frozenset()


# What is refused.


def refused(make: Any, **keywords: Any) -> str:
    with pytest.raises(ValueError, match=r"^`") as caught:
        make(**keywords)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "keywords", "text"),
    [
        ("torch LBFGS", {}, "`optimizer` must take further param groups, got LBFGS, which holds one; use another"),
        ("pytorch_optimizer adammini", {}, "`optimizer` must take further param groups, got AdamMini, which reads the model it was made of; use another"),
        ("pytorch_optimizer emonavi", {}, "`membership` must be 'declared' for EmoNavi, whose average of the loss advances once a group, got 'late'; pass membership='declared'"),
        ("pytorch_optimizer swats", {}, "`membership` must be 'declared' and `on_refreeze` 'keep' for SWATS, whose step writes the learning rate, got membership='late'; pass both"),
        ("pytorch_optimizer asgd", {"membership": "declared", "on_refreeze": "drop"}, "`membership` must be 'declared' and `on_refreeze` 'keep' for ASGD, whose step writes the learning rate, got on_refreeze='drop'; pass both"),
        ("prodigyopt Prodigy(d0=1e-4)", {}, "`learning_rate_scale` and `layer_decay` must be 1 for Prodigy, whose groups share one learning rate, got a group at 0.1 of the template's rate; pass learning_rate_scale=1.0"),
        ("transformers Adafactor, lr=None", {}, "`learning_rate_scale` and `layer_decay` must be 1 for Adafactor, whose groups have no `lr`, got a group at 0.1 of the template's rate; pass learning_rate_scale=1.0"),
        ("pytorch_optimizer adafactor", {}, "`learning_rate_scale` and `layer_decay` must be 1 for AdaFactor, whose relative step takes no account of `lr`, got a group at 0.1 of the template's rate; pass learning_rate_scale=1.0"),
    ],
)  # fmt: skip
def test_refusals(name: str, keywords: Any, text: str) -> None:
    """What cannot take a group is refused at construction, by name, with the reason and a fix."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = matrix.made(CASES[name], [matrix.group_of(net[1], 0.01)])
    before = len(optimizer.param_groups)
    make = functools.partial(OptimizerRebuilder, optimizer, [Block("block", (net[0],))])
    assert refused(make, **keywords) == text
    assert len(optimizer.param_groups) == before


def test_groups_that_diverged_are_refused() -> None:
    """A wrapper whose groups are no longer those of the wrapped would train half of them (trap 13)."""
    net, _, _ = parts()
    optimizer = po.SAM(net[1].parameters(), torch.optim.SGD, lr=0.1)  # type: ignore[index]
    optimizer.param_groups = list(optimizer.param_groups)
    assert refused(functools.partial(OptimizerRebuilder, optimizer, [Block("block", (net[0],))])) == (  # type: ignore[index]
        "`optimizer` must share its param groups with the SGD that it wraps, got a SAM with others; "
        "set the inner one's param_groups to the outer's"
    )


def test_vectors_do_not_join_a_muon_group() -> None:
    """pytorch-optimizer's Muon fails on them in the middle of a step (trap 9)."""
    _, optimizer, make = parts(lambda params, **_: po.Muon([{"params": [params[0]], "use_muon": True}]))
    assert refused(make().sync) == (
        "`block/bias` must fit Muon, got shape (4,): a use_muon group takes matrices; leave it out of the block"
    )
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_checked_before_anything_changes() -> None:
    """Fused optimizers check dtypes in the middle of a step (trap 9)."""
    block = nn.Module()
    block.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    head = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    assert refused(OptimizerRebuilder(optimizer, [Block("block", (block,))]).sync) == (
        "`block/weight` must fit AdamW, got shape (2, 2): a fused group takes floating point, not torch.complex64; "
        "leave it out of the block"
    )
    assert len(optimizer.param_groups) == 1
