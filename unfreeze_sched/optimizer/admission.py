"""Every refusal of the optimizer side, in words: of engines, optimizers, parameters, schedulers and moments.

Nothing has changed yet when one of these is called, so that a refusal leaves all as it was. Most look for themselves,
and do nothing where all is well; those that never return are called by who has looked.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn
from torch.optim import ASGD, Optimizer, Rprop

from unfreeze_sched._checks import listed, warn
from unfreeze_sched.model.block import Block, Named
from unfreeze_sched.optimizer import rates
from unfreeze_sched.optimizer.counters import written
from unfreeze_sched.optimizer.groups import BLOCK_KEY, class_path, innermost, layers, why_no_rate

# Why no group can join, ever or once training has begun; what the structure tells is asked in `refuse_optimizer`.
_NEVER = {"torch.optim.lbfgs.LBFGS": "which holds one"}
_ONLY_DECLARED = dict.fromkeys(
    (f"pytorch_optimizer.optimizer.emonavi.{name}" for name in ("EmoNavi", "EmoLynx", "EmoFact")),
    "whose average of the loss advances once a group",
)
# Change from step to step, and no check depends on them once they are in use.
_MOVING = frozenset({"lr", "initial_lr"})
_DECLARED = "pass membership='declared', with the rebuilder made before the scheduler's first step"


# --- the engine and the optimizer


def refuse_engine(optimizer: Any, blocks: Iterable[Block]) -> None:
    """Refuse engines that cannot take further parameters once they run; their optimizers need not be torch's.

    Raises:
        ValueError: DeepSpeed, or FSDP1 without the original parameters.
    """
    for layer in layers(optimizer) if isinstance(optimizer, Optimizer) else (optimizer,):
        if type(layer).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(
                f"`optimizer` must take further param groups, got DeepSpeed's {type(layer).__name__}, which lays all "
                "parameters out when it is made; use DDP, or FSDP2's fully_shard"
            )
    for block in blocks:
        named = tuple(block.named_parameters())
        if not named:
            raise ValueError(
                f"`blocks` must hold the model's own parameters, got {block.name!r}, whose modules hold none any more; "
                "if FSDP took them, pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard"
            )
        for name, parameter in named:
            if hasattr(parameter, "ds_id"):
                raise ValueError(
                    f"`blocks` must hold parameters that can join later, got {name}, which DeepSpeed partitions; "
                    "use DDP, or FSDP2's fully_shard"
                )
            if getattr(parameter, "_is_flat_param", False):
                raise ValueError(
                    f"`blocks` must hold the model's own parameters, got {name}, which FSDP made of several; "
                    "pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard"
                )


def refuse_optimizer(
    optimizer: Any, template: int = 0, ratios: Sequence[float] = (), *, late: bool = True, drops: bool = False
) -> None:
    """Refuse an optimizer that cannot take the groups that are to join.

    Args:
        optimizer: The live optimizer.
        template: 0-based index of the group that joining groups are like.
        ratios: Learning rates of theirs over the template's.
        late: Whether they join once training has begun.
        drops: Whether a group is emptied and filled again.

    Raises:
        ValueError: It cannot take them.

    Example:
        >>> import torch
        >>> refuse_optimizer(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]))
        Traceback (most recent call last):
        ...
        ValueError: `optimizer` must take further param groups, got LBFGS, which holds one; use another
    """
    _refuse_forwarding(optimizer)
    for layer in layers(optimizer):
        name = type(layer).__name__
        reason = _NEVER.get(class_path(layer.__class__))
        if reason is None and isinstance(vars(layer).get("model"), nn.Module):
            reason = "which reads the model it was made of"
        if reason is not None:
            raise ValueError(f"`optimizer` must take further param groups, got {name}, {reason}; use another")
        if layer.param_groups is not optimizer.param_groups:
            raise ValueError(
                f"`optimizer` must share its param groups with the {name} that it wraps, got a "
                f"{type(optimizer).__name__} with others; set the inner one's param_groups to the outer's"
            )
        if late and (reason := _ONLY_DECLARED.get(class_path(layer.__class__))):
            raise ValueError(
                f"`membership` must be 'declared' for {name}, {reason}, got 'late'; pass membership='declared'"
            )
        # A relative step writes the learning rate as well, and computes it anew each time.
        writes_rate = "lr" in written(layer.__class__) and "relative_step" not in optimizer.param_groups[template]
        if writes_rate and (late or drops):
            got = "membership='late'" if late else "on_refreeze='drop'"
            raise ValueError(
                "`membership` must be 'declared' and `on_refreeze` 'keep' for "
                f"{name}, whose step writes the learning rate, got {got}; pass both"
            )
    reason = why_no_rate(optimizer, optimizer.param_groups[template])
    wrong = [ratio for ratio in ratios if ratio != 1]
    if reason is not None and wrong:
        raise ValueError(
            f"`learning_rate_scale` and `layer_decay` must be 1 for {type(optimizer).__name__}, {reason}, got a group "
            f"at {wrong[0]} of the template's rate; pass learning_rate_scale=1.0"
        )


def _refuse_forwarding(optimizer: Any) -> None:
    """Refuse an optimizer whose groups and hooks are those of one that `layers` does not know, as Opacus' are."""
    last = innermost(optimizer)
    inner = [
        name
        for name, value in vars(last).items()
        if getattr(value, "param_groups", None) is last.param_groups
        and not any(layer is last for layer in layers(value))  # it wraps this one
    ]
    if inner or "param_groups" not in vars(last):
        raise ValueError(
            f"`optimizer` must hold its param groups itself, got {type(last).__name__}, which forwards to those of "
            f"another; pass {f'its `{inner[0]}`' if inner else 'the optimizer that it wraps'}"
        )


def refuse_taken_names(others: Iterable[Block], blocks: Iterable[Block]) -> None:
    """Refuse names under which another rebuilder of the optimizer holds other parameters: groups go by name.

    Blocks that share parameters with them may come again, as a second unfreezer's that takes over.
    """
    taken = {block.name: set(map(id, block.parameters())) for block in others}
    for block in blocks:
        if block.name in taken and taken[block.name].isdisjoint(map(id, block.parameters())):
            raise ValueError(
                f"`blocks` must have names of their own, got {block.name!r}, under which another unfreezer of this "
                f"optimizer holds other parameters; rename it: Block({'second.' + block.name!r}, block.members)"
            )


def refuse_order(names: Sequence[str]) -> NoReturn:
    """Refuse an optimizer's saved state before the groups that it is of are there, since it is loaded by place."""
    raise ValueError(
        f"`optimizer` must have the saved run's groups when its state is loaded, got {listed(names)} in "
        "another place or in none; load the unfreezer first, then the LR schedulers, then the optimizer"
    )


def refuse_template(optimizer: Optimizer, index: int) -> None:
    """Refuse a template that is none of the user's own groups; `index` is 0-based."""
    groups = optimizer.param_groups
    if index >= len(groups) or BLOCK_KEY in groups[index]:
        own = sum(BLOCK_KEY not in group for group in groups)
        raise ValueError(f"`template` must be below {own}, the number of your own groups, got {index}; 0 is the head's")


def refuse_warmup(optimizer: Any, steps: int, template: int = 0) -> None:
    """Refuse a warm-up where a group has no rate of its own, or builds state from its first, false for good then."""
    reason = why_no_rate(optimizer, optimizer.param_groups[template])
    if isinstance(optimizer, (Rprop, ASGD)):
        reason = "which builds its state from the learning rate"
    if steps and reason is not None:
        raise ValueError(
            f"`warmup_steps` must be 0 for {type(optimizer).__name__}, {reason}, got {steps}; leave it out"
        )


# --- parameters


def refuse_members(optimizer: Optimizer, blocks: Iterable[Block]) -> None:
    """Refuse block parameters in groups that are not their block's: they would be trained twice, or as the head.

    Args:
        optimizer: The live optimizer.
        blocks: The blocks.

    Raises:
        ValueError: There is one, or a group under a block's name holds something else.
    """
    homes = {id(parameter): (name, block.name) for block in blocks for name, parameter in block.all_parameters()}
    names = {name for _, name in homes.values()}
    strangers = [
        homes[id(parameter)][0]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in homes and group.get(BLOCK_KEY) != homes[id(parameter)][1]
    ]
    for group in optimizer.param_groups:
        if group.get(BLOCK_KEY) in names and any(id(parameter) not in homes for parameter in group["params"]):
            raise ValueError(
                f"`blocks` must have names of their own, got {group[BLOCK_KEY]!r}, under which the optimizer holds "
                "other parameters already; rename the block"
            )
    if strangers:
        raise ValueError(
            f"`optimizer` must not hold parameters of the blocks yet, got {listed(strangers)}; if they are the head's, "
            "say so: encoder_blocks(model, head=[...]); if not, build it without them, or let "
            "ProgressiveUnfreezer.from_model take them out"
        )


def refuse_loss(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse to take parameters out of an optimizer where nothing would be left, or a learning rate be lost silently.

    Args:
        optimizer: The live optimizer.
        parameters: Those of the blocks, which are to join again in their turn.

    Raises:
        ValueError: It holds nothing else, or a group of them alone with a learning rate that no other group has.
    """
    out = set(map(id, parameters))
    own = [group for group in optimizer.param_groups if BLOCK_KEY not in group]
    stays = [[id(parameter) not in out for parameter in group["params"]] for group in own]
    if not any(map(any, stays)):
        raise ValueError(
            "`blocks` must leave parameters to the optimizer, got all that it holds; leave the head out of the blocks"
        )
    groups = list(zip(own, stays, strict=True))
    rates_left = [float(group["lr"]) for group, stay in groups if any(stay) and "lr" in group]
    for index, (group, stay) in enumerate(groups):
        if stay and not any(stay) and "lr" in group and float(group["lr"]) not in rates_left:
            raise ValueError(
                f"`optimizer` must not hold a group of block parameters alone with a rate of its own, got group "
                f"{index} at lr={float(group['lr']):g}; leave it out, and pass learning_rate_scale"
            )


def refuse_unfit(
    optimizer: Any, template: Mapping[str, Any], samples: Iterable[Named], admitted: set[Hashable]
) -> None:
    """Refuse what optimizers check in their constructor alone, or in the middle of a step.

    Args:
        optimizer: The live optimizer.
        template: The group that the joining one is like.
        samples: Parameters by name, one of each number of dimensions and type: the checks look at nothing else.
        admitted: What was found to fit, to which this adds: all groups of a run ask for the same.

    Raises:
        ValueError: One of them does not fit.
    """
    hyperparameters = {key: value for key, value in template.items() if key not in {"params", "param_names"}}
    plain = (int, float, str, type(None))
    settings = tuple(
        (key, value) for key, value in hyperparameters.items() if key not in _MOVING and isinstance(value, plain)
    )
    for name, parameter in samples:
        kind = (parameter.ndim, parameter.dtype, parameter.device, settings)
        if kind in admitted:
            continue
        problem: Exception | None = None
        if template.get("use_muon") and parameter.ndim < 2:  # noqa: PLR2004  # matrices and up
            problem = ValueError("a use_muon group takes matrices")
        if template.get("fused") and not parameter.is_floating_point():
            problem = ValueError(f"a fused group takes floating point, not {parameter.dtype}")
        stand_in = nn.Parameter(  # holds one number
            parameter.detach().new_empty(()).expand(parameter.shape), requires_grad=parameter.requires_grad
        )
        for layer in layers(optimizer):
            if type(layer).__module__.startswith("torch.optim"):
                try:
                    layer.__class__([{**hyperparameters, "params": [stand_in]}])
                except (ValueError, RuntimeError, TypeError) as error:
                    problem = error
        if problem is not None:
            raise ValueError(
                f"`{name}` must fit {type(optimizer).__name__}, got shape {tuple(parameter.shape)}: {problem}; "
                "leave it out of the block"
            ) from problem
        admitted.add(kind)


def refuse_replaced(names: Sequence[str]) -> None:
    """Refuse blocks in which other modules lie now: what is trained and held in evaluation would be the old ones."""
    if names:
        raise RuntimeError(
            f"`blocks` must hold the parts that they were given with, got {listed(names)} replaced (as by assigning "
            "a layer, convert_sync_batchnorm or quantization); make optimizer, blocks and unfreezer after that"
        )


def refuse_orphans(orphans: Sequence[str]) -> None:
    """Refuse blocks whose modules do not hold these parameters any more: the optimizer would train the old tensors."""
    if orphans:
        raise RuntimeError(
            f"`blocks` must hold the parameters that they were given with, got {listed(orphans)} in none of "
            "its modules any more (replaced, as by load_state_dict(assign=True), to_empty, weight_norm or "
            "fully_shard); make optimizer and unfreezer after that"
        )


# --- schedulers


def refuse_schedulers(optimizer: Optimizer, schedulers: Sequence[Any] | None) -> None:
    """Refuse what no group can join: a scheduler of an unknown class or another optimizer, or one that was kept back.

    Args:
        optimizer: The live optimizer.
        schedulers: What is to be joined; None says that there is none.

    Raises:
        TypeError: A scheduler of a class that is not known.
        ValueError: A scheduler of another optimizer, or none where one left its marks.
    """
    if schedulers is None:
        return
    if not schedulers and _is_driven(optimizer):
        raise ValueError(
            "`lr_schedulers` must hold the LR scheduler that drives this optimizer, got none; "
            "pass lr_schedulers=[scheduler], or None if it is no longer in use"
        )
    for scheduler in map(rates.unwrapped, schedulers):
        # It may drive the optimizer or one that this wraps.
        if not any(getattr(scheduler, "optimizer", layer) is layer for layer in layers(optimizer)):
            raise ValueError(
                f"`lr_schedulers` must drive this optimizer, got a {type(scheduler).__name__} of another one; "
                "make the scheduler from the optimizer that is passed here"
            )
        for leaf in rates.leaves(scheduler):
            if rates.row_of(leaf.__class__) is rates.UNKNOWN:
                raise TypeError(
                    f"`lr_schedulers` must be of known classes, got {class_path(leaf.__class__)}; say what it keeps "
                    "for each group, by unfreeze_sched.optimizer.rates.register, or pass membership='declared' and "
                    "make the rebuilder before the scheduler, which then is not passed"
                )
        groups = optimizer.param_groups
        if any(len(values) != len(groups) for *_, values in rates.rows(scheduler)):
            refuse_misfit(scheduler, groups)


def refuse_misfit(scheduler: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse lists with too many entries for the groups, or too few where nobody can tell the missing ones.

    So they are after a group of the user's own was added or deleted behind the scheduler's back.
    """
    for part, name, values in rates.rows(scheduler):
        missing = [rates.entry_of_own(part, name, group) for group in groups[len(values) :]]
        if len(values) > len(groups) or None in missing:
            raise ValueError(
                f"`lr_schedulers` must have an entry for each of the {len(groups)} groups, got {len(values)} in "
                f"{type(part).__name__}.{name}: one was added or deleted after the scheduler was made (give the list "
                "its entry, or make the scheduler when all groups are there), or at a resume the scheduler was loaded "
                "before the unfreezer; load unfreezer, scheduler, optimizer in this order"
            )


def _is_driven(optimizer: Optimizer) -> bool:
    """Whether some LR scheduler left its marks: a wrapped `step`, or `initial_lr` in a group; plateaus leave none."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched") or any(
        "initial_lr" in group for group in optimizer.param_groups
    )


def refuse_foreign_rate(found: float, reported: Sequence[float]) -> NoReturn:
    """Refuse a template whose learning rate is not what the LR schedulers set: another hand is at it.

    The rows that the schedulers would get for a joining group are right for rates of their own alone.
    """
    raise ValueError(
        f"`lr_schedulers` must be what sets the learning rate, got a template at {found:g} where "
        f"{'they' if len(reported) > 1 else 'it'} last set {', '.join(f'{rate:g}' for rate in reported)}: another "
        "scheduler took over, a wrapper dampens the rate, it was set by hand, or at a resume the scheduler was loaded "
        "before the unfreezer (load unfreezer, scheduler, optimizer in this order); assign the schedulers in use to "
        "`unfreezer.rebuilder.lr_schedulers`, or None where the loop sets each group's rate"
    )


def refuse_lost_template() -> NoReturn:
    """Refuse joins where the group that they are to be like has gone."""
    raise RuntimeError(
        "`template` must be a group of the optimizer, got one that was taken out of it; make the unfreezer after that"
    )


def refuse_floor(scheduler: Any, floor: float, ratio: float) -> NoReturn:
    """Refuse a late join whose rate depends on what a scheduler with a floor did in the past."""
    raise ValueError(
        f"`learning_rate_scale` must be 1 to join late where a {type(scheduler).__name__} with a floor of {floor} has "
        f"played a part that depends on the past, got a ratio of {ratio}; {_DECLARED}"
    )


def warn_of_floor(scheduler: Any, floor: float) -> None:
    """Say at once what `refuse_floor` may have to say in the middle of a run."""
    warn(
        f"`lr_schedulers` should have no floor where blocks join late, got a {type(scheduler).__name__} with one, or "
        f"with a least step, of {floor:g}: once it has played a part, a transition is refused; set it to 0, pass "
        f"learning_rate_scale=1.0, or {_DECLARED.removeprefix('pass ')}"
    )


# --- moments


def refuse_pending() -> NoReturn:
    """Refuse a change while there are gradients that no step has used."""
    raise RuntimeError(
        "`optimizer` must have used its gradients before blocks join, got an accumulation that is not over; "
        "call optimizer.step() and optimizer.zero_grad() first, or zero_grad() alone to give it up, as for a GAN's "
        "discriminator, in which the generator's loss leaves gradients"
    )


def refuse_captured(left: int) -> NoReturn:
    """Refuse a step that a CUDA graph would repeat at the lowered rate of a warm-up for good."""
    raise RuntimeError(
        f"`warmup_steps` must be over before a step is captured in a CUDA graph, got {left} left, at lowered rates "
        "that each replay would use; run them uncaptured, then capture"
    )


def refuse_differing(names: Sequence[str]) -> NoReturn:
    """Refuse a first step whose gradients are not the same on all ranks."""
    raise RuntimeError(
        f"gradients of newly trainable parameters must be the same on all ranks, got others for "
        f"{listed(names, most=10)}: DistributedDataParallel does not reduce what was frozen when it was made; "
        "wrap anew after each transition, ddp = unfreeze_sched.parallel.rewrap_ddp(ddp), or wrap while "
        "everything is trainable, with find_unused_parameters=True (probe='local' is for local SGD)"
    )
