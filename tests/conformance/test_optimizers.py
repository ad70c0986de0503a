"""Late join is exact for every optimizer at hand, or refused by name; the comparison is `optimizers_matrix`."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import optimizers_matrix as matrix
import pytest
from torch import nn

from unfreeze_sched import Block, OptimizerRebuilder
from unfreeze_sched.optimizer import groups

po = pytest.importorskip("pytorch_optimizer")
for package in ("schedulefree", "prodigyopt", "lion_pytorch", "timm", "transformers", "accelerate"):
    pytest.importorskip(package)

CASES = {case.name: case for case in matrix.cases()}
TORCH, TIMM, LISTED = (
    [name for name in CASES if name.startswith(start)] for start in ("torch ", "timm ", "pytorch_optimizer ")
)
OTHERS = [name for name in CASES if name not in {*TORCH, *TIMM, *LISTED}]
# Groups of one learning rate, or none: a scale of 1 alone is taken.
ONE_RATE = "refused: `learning_rate_scale` and `layer_decay` must be 1 for "
NEVER = "refused: `optimizer` must take further param groups, got "
DECLARED = "refused: `membership` must be 'declared' "
NEVER_JOIN = {"torch LBFGS", *(f"pytorch_optimizer {name}" for name in ("lbfgs", "lomo", "adalomo", "adammini"))}
NOT_LATE = {f"pytorch_optimizer {name}" for name in ("asgd", "swats", "emonavi", "emolynx", "emofact")}
AT_ONE = {
    *(name for name, case in CASES.items() if case.why == matrix.D_ADAPTATION),
    "transformers Adafactor, lr=None", "timm adafactor, lr=None", "pytorch_optimizer adafactor",
    "pytorch_optimizer alig",
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


@pytest.mark.parametrize("name", [*TIMM, *LISTED])
def test_trajectories_of_the_listed(name: str) -> None:
    """As above, for all of timm's registry and pytorch-optimizer's list: none is silently wrong."""
    for membership in matrix.MEMBERSHIPS:
        scale = 1.0 if name in AT_ONE else 0.5
        assert verdict(name, membership, scale).startswith(expected(name, membership, scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TIMM, *LISTED])
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


@pytest.mark.skipif(not TIMM, reason="timm before 1.0.12 has no registry")
def test_all_of_timm_is_here() -> None:
    """What is left out of its registry are bindings of two packages for CUDA."""
    listed = importlib.import_module("timm.optim").list_optimizers()
    assert len(TIMM) > 80
    assert all(f"timm {name}" in TIMM or name.startswith(matrix.NEEDS_CUDA) for name in listed)


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


@pytest.mark.parametrize("name", ["accelerate AcceleratedOptimizer(AdamW)", "wrapper Lookahead(AdamW)"])
def test_wrapper_and_wrapped_share_their_groups(name: str) -> None:
    """After a join the groups of both are the same objects."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = matrix.made(CASES[name], [matrix.group_of(net[1], 0.01)])
    OptimizerRebuilder(optimizer, [Block("block", (net[0],))]).sync()
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert len(optimizer.param_groups) == 2


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
