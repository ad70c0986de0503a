"""`OptimizerRebuilder`: in place, by identity, validated before anything changes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from oracle import Net
from torch import nn
from torch.optim import lr_scheduler

from unfreeze_sched import Block, GroupChange, OptimizerRebuilder
from unfreeze_sched.model.freezing import freeze, unfreeze
from unfreeze_sched.optimizer.groups import BLOCK_KEY

BLOCK_NAMES = [f"blocks.{i}.{layer}.{kind}" for i in (2, 1, 0) for layer in (0, 1) for kind in ("weight", "bias")]


def step(net: Net, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        net(torch.randn(4, 4, dtype=net.head.weight.dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(
    optimizer_class: Any = torch.optim.AdamW, *, frozen: bool = True, **keywords: Any
) -> tuple[Net, torch.optim.Optimizer, OptimizerRebuilder]:
    net = Net()
    optimizer = optimizer_class(net.head.parameters(), lr=0.5)
    blocks = net.make_blocks()
    if frozen:
        for block in blocks:
            freeze(block)
    return net, optimizer, OptimizerRebuilder(optimizer, blocks, **keywords)


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """All that a refusal must leave alone: object identities, values, and the groups' keys."""
    return (
        id(optimizer.param_groups),
        [
            (
                id(group),
                id(group["params"]),
                [*map(id, group["params"])],
                {k: v for k, v in group.items() if k != "params"},
            )
            for group in optimizer.param_groups
        ],
        {
            id(p): {k: (id(v), v.clone() if isinstance(v, torch.Tensor) else v) for k, v in state.items()}
            for p, state in optimizer.state.items()
        },
    )


def test_a_block_joins_with_its_own_group() -> None:
    """One group a block, deepest first, each tagged and at its own learning rate; the names are the model's."""
    _, optimizer, rebuilder = make(frozen=False, learning_rate_scale=0.5, layer_decay=0.5)
    change = rebuilder.sync()
    assert change == GroupChange(added=tuple(BLOCK_NAMES))
    assert [group.get(BLOCK_KEY) for group in optimizer.param_groups] == [None, "block2", "block1", "block0"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.125, 0.0625]


def test_syncing_twice_changes_nothing() -> None:
    """The second sync is falsy and touches no object."""
    _, optimizer, rebuilder = make(frozen=False)
    assert rebuilder.sync()
    before = snapshot(optimizer)
    assert not rebuilder.sync()
    assert rebuilder.sync() == GroupChange()
    assert snapshot(optimizer) == before


def test_everything_keeps_its_identity() -> None:
    """The optimizer's list, the user's groups and their lists, and the state tensors are the same objects after a join."""
    net, optimizer, rebuilder = make()
    step(net, optimizer, 3)
    groups, group, params = optimizer.param_groups, optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    state = {p: {key: (value, value.clone()) for key, value in optimizer.state[p].items()} for p in params}
    unfreeze(rebuilder.blocks[2])
    rebuilder.sync()
    assert optimizer.param_groups is groups
    assert groups[0] is group
    assert group["params"] is params
    for p, values in state.items():
        for key, (value, copied) in values.items():
            assert optimizer.state[p][key] is value
            assert torch.equal(value, copied)


def test_the_live_template_is_cloned() -> None:
    """A joining group takes the template's live hyperparameters, not the constructor's defaults (trap 14)."""
    _, optimizer, rebuilder = make(frozen=False)
    optimizer.param_groups[0].update(weight_decay=0.7, betas=(0.5, 0.6), lr=0.125)
    rebuilder.sync()
    for group in optimizer.param_groups[1:]:
        assert (group["weight_decay"], group["betas"], group["lr"]) == (0.7, (0.5, 0.6), 0.125 * 0.1)


def test_another_template() -> None:
    """`template` names the group that is cloned."""
    net = Net()
    groups = [{"params": [net.head.weight], "lr": 0.1}, {"params": [net.head.bias], "lr": 0.4, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    OptimizerRebuilder(optimizer, net.make_blocks(), template=1, learning_rate_scale=0.5).sync()
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups[2:]} == {(0.2, 0.0)}


def test_tensor_learning_rates_are_not_shared() -> None:
    """A tensor learning rate is cloned, at scale 1 too, so that a scheduler's in-place update reaches one group (trap 4)."""
    for scale in (1.0, 0.5):
        net = Net()
        optimizer = torch.optim.Adam(net.head.parameters(), lr=torch.tensor(0.5))
        OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=scale).sync()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [float(rate) for rate in rates] == [0.5] + [0.5 * scale] * 3
        assert len({id(rate) for rate in rates} | {id(optimizer.defaults["lr"])}) >= 4


def test_nested_values_are_not_shared() -> None:
    """A list in the template's group is copied for the joining one."""
    _, optimizer, rebuilder = make(frozen=False)
    optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    rebuilder.sync()
    assert optimizer.param_groups[1]["betas"] == [0.9, 0.99]
    assert optimizer.param_groups[1]["betas"] is not optimizer.param_groups[0]["betas"]


def test_parameters_are_told_by_identity() -> None:
    """A block whose parameters equal the head's by value joins all the same (trap 15)."""
    head, twin = nn.LayerNorm(3), nn.LayerNorm(3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    change = OptimizerRebuilder(optimizer, [Block("twin", (twin,))]).sync()
    assert change.added == ("twin/weight", "twin/bias")


def test_hand_made_blocks_name_their_parameters() -> None:
    """Where the model is not known, a name is `block/name`, with the member's place where there are several."""
    net = Net()
    blocks = [Block("stem", (net.blocks[0][0], net.blocks[0][1])), Block("bare", (net.blocks[1][0].weight,))]
    change = OptimizerRebuilder(torch.optim.SGD(net.head.parameters(), lr=0.1), blocks).sync()
    assert change.added == ("bare/0", "stem/0.weight", "stem/0.bias", "stem/1.weight", "stem/1.bias")


def test_a_part_of_a_block() -> None:
    """A parameter that the user keeps frozen stays out, and joins in a group of its own when it becomes trainable."""
    net, optimizer, rebuilder = make()
    unfreeze(rebuilder.blocks[2])
    net.blocks[2][0].bias.requires_grad_(False)
    assert "blocks.2.0.bias" not in rebuilder.sync().added
    net.blocks[2][0].bias.requires_grad_(True)
    assert rebuilder.sync().added == ("blocks.2.0.bias",)
    assert [group.get(BLOCK_KEY) for group in optimizer.param_groups] == [None, "block2", "block2"]


def test_keeping_what_is_frozen_again() -> None:
    """With `keep` a refrozen block stays with its moments, and no step moves it."""
    net, optimizer, rebuilder = make(frozen=False)
    rebuilder.sync()
    step(net, optimizer, 3)
    freeze(rebuilder.blocks[0])
    before = [p.clone() for p in rebuilder.blocks[0].parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in rebuilder.blocks[0].parameters()]
    assert not rebuilder.sync()
    step(net, optimizer, 3)
    for p, weight, moment in zip(rebuilder.blocks[0].parameters(), before, moments, strict=True):
        assert torch.equal(p, weight)
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)


def test_dropping_what_is_frozen_again() -> None:
    """With `drop` the lists are edited in place, the state is freed, and a later thaw fills the same group (trap 19)."""
    net, optimizer, rebuilder = make(frozen=False, on_refreeze="drop")
    rebuilder.sync()
    step(net, optimizer)
    group = optimizer.param_groups[3]
    params = group["params"]
    freeze(rebuilder.blocks[0])
    change = rebuilder.sync()
    assert (change.added, change.dropped) == ((), tuple(BLOCK_NAMES[8:]))
    assert optimizer.param_groups[3] is group
    assert group["params"] is params
    assert params == []
    assert not any(p in optimizer.state for p in rebuilder.blocks[0].parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer)
    unfreeze(rebuilder.blocks[0])
    assert rebuilder.sync().added == tuple(BLOCK_NAMES[8:])
    assert len(optimizer.param_groups) == 4
    step(net, optimizer)


def test_declared_groups_are_there_from_the_start() -> None:
    """With `declared` the groups are made empty, deepest first, and filled in place."""
    net, optimizer, rebuilder = make(membership="declared", learning_rate_scale=0.5)
    assert [(group.get(BLOCK_KEY), len(group["params"])) for group in optimizer.param_groups] == [
        (None, 2), ("block2", 0), ("block1", 0), ("block0", 0)
    ]  # fmt: skip
    group, params = optimizer.param_groups[1], optimizer.param_groups[1]["params"]
    step(net, optimizer)
    unfreeze(rebuilder.blocks[2])
    assert rebuilder.sync().added == tuple(BLOCK_NAMES[:4])
    assert optimizer.param_groups[1] is group
    assert group["params"] is params
    assert len(params) == 4
    step(net, optimizer)


@pytest.mark.parametrize("membership", ["late", "declared"])
def test_named_optimizers_keep_their_names_in_step(membership: str) -> None:
    """An optimizer of named parameters has a name for each parameter, after joins and drops (trap 16)."""
    net = Net()
    optimizer = torch.optim.AdamW(net.head.named_parameters(prefix="head"))
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), on_refreeze="drop", membership=membership)
    net.blocks[1][0].bias.requires_grad_(False)
    rebuilder.sync()
    own = {id(p): name for name, p in net.named_parameters()}
    for _ in range(2):
        for group in optimizer.param_groups:
            assert group["param_names"] == [own[id(p)] for p in group["params"]]
        freeze(rebuilder.blocks[0])
        net.blocks[1][0].weight.requires_grad_(False)
        rebuilder.sync()


def test_a_name_for_loggers() -> None:
    """Where the template's group has a `name`, a block's group has its own, so that loggers tell them apart."""
    net = Net()
    optimizer = torch.optim.SGD([{"params": net.head.parameters(), "name": "head"}], lr=0.1)
    OptimizerRebuilder(optimizer, net.make_blocks()).sync()
    assert [group["name"] for group in optimizer.param_groups] == ["head", "block2", "block1", "block0"]


def test_a_second_rebuilder_goes_on() -> None:
    """Another rebuilder of the same blocks on the same optimizer finds their groups by tag."""
    net, optimizer, rebuilder = make(frozen=False)
    rebuilder.sync()
    again = OptimizerRebuilder(optimizer, net.make_blocks())
    assert not again.sync()


def test_loading_an_optimizer_state_replaces_the_groups() -> None:
    """After `load_state_dict`, whose groups are new objects, a sync finds every parameter in its place (trap 23)."""
    net, optimizer, rebuilder = make(frozen=False)
    rebuilder.sync()
    step(net, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not rebuilder.sync()
    freeze(rebuilder.blocks[0])
    assert not rebuilder.sync()


# What is refused, and that nothing changes by it.


def test_a_block_in_the_optimizer_is_refused() -> None:
    """`AdamW(model.parameters())` is refused by name with the fix."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(
        ValueError,
        match=r"`optimizer` must not hold parameters of the blocks yet, got blocks.0.0.weight and 11 more; if they are the head's, say so: encoder_blocks\(model, head=\[\.\.\.\]\); if not, build it without them, or let ProgressiveUnfreezer.from_model take them out",
    ):
        OptimizerRebuilder(optimizer, net.make_blocks())


def test_another_division_into_blocks_is_refused() -> None:
    """Groups that an earlier rebuilder made for other blocks are not taken for one's own."""
    net, optimizer, rebuilder = make(frozen=False)
    rebuilder.sync()
    with pytest.raises(
        ValueError, match=r"must not hold parameters of the blocks yet, got blocks.2.0.weight and 11 more"
    ):
        OptimizerRebuilder(optimizer, [Block("all", (net.blocks,), ("blocks",))])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"learning_rate_scale": 0.0}, ValueError, r"`learning_rate_scale` must be a number in \(0, 1\], got 0.0; 1 keeps"),
        ({"learning_rate_scale": True}, TypeError, r"`learning_rate_scale` must be a number in \(0, 1\], got True; 1 keeps"),
        ({"layer_decay": 1.5}, ValueError, r"`layer_decay` must be a number in \(0, 1\], got 1.5; 1 keeps"),
        ({"layer_decay": "1"}, TypeError, r"`layer_decay` must be a number in \(0, 1\], got '1'; 1 keeps"),
        ({"template": 1}, ValueError, r"`template` must be below 1, the number of your own groups, got 1; 0 is the head's"),
        ({"template": -1}, ValueError, r"`template` must be an integer of at least 0, got -1; 0 is the head's group"),
        ({"template": "0"}, TypeError, r"`template` must be an integer of at least 0, got '0'; 0 is the head's group"),
        ({"on_refreeze": "forget"}, ValueError, r"`on_refreeze` must be one of keep, drop, got 'forget'; 'keep' is the"),
        ({"membership": "early"}, ValueError, r"`membership` must be one of late, declared, got 'early'; 'late' is the"),
        ({"lr_schedulers": 3}, TypeError, r"`lr_schedulers` must be a sequence or None, got int; put it into a list"),
        ({"lr_schedulers": [3]}, TypeError, r"`lr_schedulers` must be of known classes, got builtins.int; say what it keeps"),
    ],
)  # fmt: skip
def test_wrong_arguments(keywords: Any, error: type[Exception], message: str) -> None:
    """Each wrong argument is named with its value and one fix."""
    with pytest.raises(error, match=message):
        make(**keywords)


def test_an_optimizer_is_needed() -> None:
    """Something else in the optimizer's place is a TypeError."""
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch optimizer, got str; pass the live one"):
        OptimizerRebuilder("adam", Net().make_blocks())  # type: ignore[arg-type]


def test_lbfgs_is_refused() -> None:
    """LBFGS holds one group, and says so at construction (trap 10)."""
    with pytest.raises(ValueError, match=r"`optimizer` must take further param groups, got LBFGS, which holds one"):
        make(torch.optim.LBFGS)


def test_a_scheduler_that_was_not_passed_is_noticed() -> None:
    """An LR scheduler leaves marks on its optimizer; without it new blocks would follow no schedule."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"`lr_schedulers` must hold the LR scheduler that drives this optimizer, got none; pass"
    ):
        rebuilder.sync()
    assert snapshot(optimizer) == before
    with pytest.raises(ValueError, match="or None if it is no longer in use"):
        OptimizerRebuilder(optimizer, net.make_blocks())
    assert OptimizerRebuilder(optimizer, net.make_blocks(), lr_schedulers=[scheduler]).sync()
    assert scheduler.base_lrs == [0.1, 0.1 * 0.1, 0.1 * 0.1, 0.1 * 0.1]


def test_no_scheduler_can_be_said() -> None:
    """`lr_schedulers=None` says that there is none, whatever marks an old one left."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    assert OptimizerRebuilder(optimizer, net.make_blocks(), lr_schedulers=None).sync()


def test_a_scheduler_of_another_optimizer() -> None:
    """A scheduler that drives another optimizer is refused."""
    net = Net()
    other = lr_scheduler.StepLR(torch.optim.SGD(net.blocks.parameters(), lr=0.1), 1)
    with pytest.raises(
        ValueError, match=r"`lr_schedulers` must drive this optimizer, got a StepLR of another one; make"
    ):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters(), lr=0.1), net.make_blocks(), lr_schedulers=[other])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_is_checked_before_anything_changes() -> None:
    """Muon takes matrices alone, which its constructor checks and `add_param_group` does not (trap 9)."""
    net = Net()
    optimizer = torch.optim.Muon([net.head.weight])
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"`blocks.2.0.bias` must fit Muon, got shape \(4,\): .*; leave it out"):
        rebuilder.sync()
    assert snapshot(optimizer) == before
    matrices = [Block(f"block{i}", (block[0].weight,)) for i, block in enumerate(net.blocks)]
    assert OptimizerRebuilder(optimizer, matrices).sync()


def test_a_failing_add_param_group_is_undone() -> None:
    """When the optimizer itself refuses the second of three groups, the first and the schedulers' rows are taken back."""

    class Fussy(torch.optim.SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if param_group.get(BLOCK_KEY) == "block1":
                raise RuntimeError("no block1 here")
            super().add_param_group(param_group)

    net = Net()
    optimizer = Fussy(net.head.parameters(), lr=0.1)
    cosine, chained = lr_scheduler.CosineAnnealingLR(optimizer, 5), lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    chain = lr_scheduler.ChainedScheduler([cosine, chained])
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), lr_schedulers=[chain])
    step(net, optimizer)
    before, rows = snapshot(optimizer), copy.deepcopy((cosine.state_dict(), chained.base_lrs, chain._last_lr))
    with pytest.raises(RuntimeError, match="no block1 here"):
        rebuilder.sync()
    assert snapshot(optimizer) == before
    assert (cosine.state_dict(), chained.base_lrs, chain._last_lr) == rows


def test_a_failing_fill_is_undone() -> None:
    """When the optimizer refuses the second of three declared groups, the first is empty again."""

    class Fussy(torch.optim.SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if param_group.get(BLOCK_KEY) == "block1" and param_group["params"]:
                raise RuntimeError("no block1 here")
            super().add_param_group(param_group)

    net = Net()
    optimizer = Fussy(net.head.parameters(), lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), membership="declared")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no block1 here"):
        rebuilder.sync()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "optimizer_class",
    [
        torch.optim.SGD,
        functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True),
        torch.optim.Adam,
        functools.partial(torch.optim.AdamW, amsgrad=True, foreach=True),
        functools.partial(torch.optim.AdamW, fused=True),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
)
def test_joined_parameters_train(optimizer_class: Any) -> None:
    """After a join, steps move the block and go on moving the head."""
    net, optimizer, rebuilder = make(optimizer_class)
    step(net, optimizer, 2)
    unfreeze(rebuilder.blocks[2])
    rebuilder.sync()
    before = {name: p.clone() for name, p in net.named_parameters()}
    step(net, optimizer, 2)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.weight", "head.bias", *BLOCK_NAMES[:4]}
