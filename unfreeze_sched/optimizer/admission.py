"""What is refused before anything changes, in words: engines, optimizers, parameters and LR schedulers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import ASGD, LBFGS, Optimizer, Rprop

from unfreeze_sched._checks import listed
from unfreeze_sched.model.block import Block, Named
from unfreeze_sched.optimizer import rates
from unfreeze_sched.optimizer.groups import BLOCK_KEY, Group, class_path, innermost, layers, why_no_rate, written


def refuse_engine(optimizer: Any, blocks: Iterable[Block]) -> None:
    """Refuse DeepSpeed, and FSDP1 without the original parameters; their optimizers need not be torch's."""
    for layer in layers(optimizer) if isinstance(optimizer, Optimizer) else (optimizer,):
        if type(layer).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(
                f"`optimizer` must take further param groups, got DeepSpeed's {type(layer).__name__}, which lays all "
                "parameters out when it is made; use DDP, or FSDP2's fully_shard"
            )
    for block in blocks:
        named = tuple(block.named_parameters())
        if parted := [name for name, parameter in named if hasattr(parameter, "ds_id")]:
            raise ValueError(
                f"`blocks` must hold parameters that can join later, got {parted[0]}, which DeepSpeed partitions; "
                "use DDP, or FSDP2's fully_shard"
            )
        flat = [name for name, parameter in named if getattr(parameter, "_is_flat_param", False)]
        if flat or not named:
            gone = f"{block.name!r}, which has none any more, as FSDP leaves it"
            got = f"{flat[0]}, which FSDP made of several" if flat else gone
            raise ValueError(
                f"`blocks` must hold the model's own parameters, got {got}; pass use_orig_params=True to "
                "FullyShardedDataParallel, or use fully_shard"
            )


def refuse_optimizer(optimizer: Any, template: int, ratios: Sequence[float], *, late: bool, drops: bool) -> None:
    """Refuse an optimizer that cannot take groups with these ratios of learning rates to the template's.

    `late` are groups that join once training has begun; `drops` says that one may be emptied and filled again.
    """
    groups = optimizer.param_groups
    if template >= len(groups) or BLOCK_KEY in (group := groups[template]):
        own = sum(BLOCK_KEY not in group for group in groups)
        raise ValueError(
            f"`template` must be below {own}, the number of your own groups, got {template}; 0 is the head's"
        )
    _refuse_forwarding(optimizer)
    for layer in layers(optimizer):
        name = type(layer).__name__
        reads_model = isinstance(vars(layer).get("model"), nn.Module)
        if reads_model or isinstance(layer, LBFGS):
            reason = "which reads the model it was made of" if reads_model else "which holds one"
            raise ValueError(f"`optimizer` must take further param groups, got {name}, {reason}; use another")
        if layer.param_groups is not optimizer.param_groups:
            raise ValueError(
                f"`optimizer` must share its param groups with the {name} that it wraps, got a "
                f"{type(optimizer).__name__} with others; set the inner one's param_groups to the outer's"
            )
        if late and type(layer).__module__ == "pytorch_optimizer.optimizer.emonavi":
            raise ValueError(
                f"`membership` must be 'declared' for {name}, whose average of the loss advances once a group, got "
                "'late'; pass membership='declared'"
            )
        # A relative step writes the learning rate as well, and computes it anew each time.
        if (late or drops) and "lr" in written(layer.__class__) and "relative_step" not in group:
            got = "membership='late'" if late else "on_refreeze='drop'"
            raise ValueError(
                f"`membership` must be 'declared' and `on_refreeze` 'keep' for {name}, whose step writes the learning "
                f"rate, got {got}; pass both"
            )
    wrong = [ratio for ratio in ratios if ratio != 1]
    if wrong and (why := why_no_rate(optimizer, group)):
        raise ValueError(
            f"`learning_rate_scale` and `layer_decay` must be 1 for {type(optimizer).__name__}, {why}, got a group at "
            f"{wrong[0]} of the template's rate; pass learning_rate_scale=1.0"
        )


def _refuse_forwarding(optimizer: Any) -> None:
    """Refuse an optimizer whose groups and hooks are those of one that `layers` does not know, as Opacus' are."""
    last = innermost(optimizer)
    inner = [
        name
        for name, value in vars(last).items()
        if getattr(value, "param_groups", None) is last.param_groups and last not in layers(value)  # no wrapper
    ]
    if inner or "param_groups" not in vars(last):
        raise ValueError(
            f"`optimizer` must hold its param groups itself, got {type(last).__name__}, which forwards to those of "
            f"another; pass {f'its `{inner[0]}`' if inner else 'the optimizer that it wraps'}"
        )


def refuse_warmup(optimizer: Any, steps: int, template: int) -> None:
    """Refuse a warm-up where a group has no rate of its own, or builds state from its first, false for good then."""
    builds = "which builds its state from the learning rate" if isinstance(optimizer, (Rprop, ASGD)) else None
    if steps and (why := builds or why_no_rate(optimizer, optimizer.param_groups[template])):
        raise ValueError(f"`warmup_steps` must be 0 for {type(optimizer).__name__}, {why}, got {steps}; leave it out")


def refuse_members(optimizer: Optimizer, blocks: Sequence[Block], claimed: Iterable[Block]) -> None:
    """Refuse block parameters in groups that are not their block's: they would be trained twice, or as the head.

    So are names under which the optimizer holds, or another rebuilder claims, other parameters: groups go by name.
    Blocks that share parameters with claimed ones may come again, as a second unfreezer's that takes over.
    """
    homes = {id(parameter): (name, block.name) for block in blocks for name, parameter in block.all_parameters()}
    names = {block.name for block in blocks}
    strangers: list[str] = []
    for group in optimizer.param_groups:
        own, inside = group.get(BLOCK_KEY), [homes.get(id(parameter)) for parameter in group["params"]]
        if own in names and None in inside:
            raise ValueError(
                f"`blocks` must have names of their own, got {own!r}, under which the optimizer holds other "
                "parameters already; rename the block"
            )
        strangers += [home[0] for home in inside if home and home[1] != own]
    if strangers:
        raise ValueError(
            f"`optimizer` must not hold parameters of the blocks yet, got {listed(strangers)}; if they are the head's, "
            "say so: encoder_blocks(model, head=[...]); if not, build it without them, or let "
            "ProgressiveUnfreezer.from_model take them out"
        )
    taken = {block.name: set(block.parameters()) for block in claimed}
    for block in blocks:
        if block.name in taken and taken[block.name].isdisjoint(block.parameters()):
            raise ValueError(
                f"`blocks` must have names of their own, got {block.name!r}, under which another unfreezer of this "
                f"optimizer holds other parameters; rename it: Block({'second.' + block.name!r}, block.members)"
            )


def refuse_loss(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse to take block parameters out of an optimizer where nothing would be left, or a rate be lost silently."""
    out = set(map(id, parameters))
    own = [group for group in optimizer.param_groups if BLOCK_KEY not in group]
    left = [any(id(parameter) not in out for parameter in group["params"]) for group in own]
    if not any(left):
        raise ValueError(
            "`blocks` must leave parameters to the optimizer, got all that it holds; leave the head out of the blocks"
        )
    rates_left = [float(group["lr"]) for group, stays in zip(own, left, strict=True) if stays and "lr" in group]
    for index, group in enumerate(own):
        if group["params"] and not left[index] and "lr" in group and float(group["lr"]) not in rates_left:
            raise ValueError(
                f"`optimizer` must not hold a group of block parameters alone with a rate of its own, got group "
                f"{index} at lr={float(group['lr']):g}; leave it out, and pass learning_rate_scale"
            )


def refuse_unfit(optimizer: Any, template: Group, samples: Iterable[Named], admitted: set[Hashable]) -> None:
    """Refuse what optimizers check in their constructor alone, or in the middle of a step.

    The samples are of each number of dimensions and type, all that is checked; `admitted`, to which this adds, are the
    kinds that were found to fit.
    """
    hyperparameters = {key: value for key, value in template.items() if key not in {"params", "param_names"}}
    # Rates change from step to step, and no check depends on them once they are in use.
    plain, moving = (int, float, str, type(None)), {"lr", "initial_lr"}
    settings = tuple((k, v) for k, v in hyperparameters.items() if k not in moving and isinstance(v, plain))
    for name, parameter in samples:
        kind = (parameter.ndim, parameter.dtype, parameter.device, settings)
        if kind in admitted:
            continue
        problem: Exception | None = None
        if template.get("use_muon") and parameter.ndim < 2:  # noqa: PLR2004  # matrices and up
            problem = ValueError("a use_muon group takes matrices")
        if template.get("fused") and not parameter.is_floating_point():
            problem = ValueError(f"a fused group takes floating point, not {parameter.dtype}")
        stand_in = nn.Parameter(parameter.detach().new_empty(()).expand(parameter.shape))  # holds one number
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


def refuse_schedulers(optimizer: Optimizer, schedulers: Sequence[Any] | None) -> None:
    """Refuse what no group can join: a scheduler of an unknown class or another optimizer, or one that was kept back.

    So are lists with too many entries for the groups, or too few where nobody can tell the missing ones.
    """
    if schedulers is None:
        return
    groups = optimizer.param_groups
    # The marks that a scheduler leaves, plateaus aside.
    if not schedulers and (hasattr(optimizer.step, "_wrapped_by_lr_sched") or any("initial_lr" in g for g in groups)):
        raise ValueError(
            "`lr_schedulers` must hold the LR scheduler that drives this optimizer, got none; "
            "pass lr_schedulers=[scheduler], or None if it is no longer in use"
        )
    for scheduler in rates.unwrapped(schedulers):
        # It may drive the optimizer or one that this wraps.
        if not any(getattr(scheduler, "optimizer", layer) is layer for layer in layers(optimizer)):
            raise ValueError(
                f"`lr_schedulers` must drive this optimizer, got a {type(scheduler).__name__} of another one; "
                "make the scheduler from the optimizer that is passed here"
            )
        for leaf in rates.leaves([scheduler]):
            if rates.row_of(leaf.__class__) is rates.UNKNOWN:
                raise TypeError(
                    f"`lr_schedulers` must be of known classes, got {class_path(leaf.__class__)}; say what it keeps "
                    "for each group, by unfreeze_sched.optimizer.rates.register, or pass membership='declared' and "
                    "make the rebuilder before the scheduler, which then is not passed"
                )
        for part, name, values in rates.rows([scheduler]):
            missing = [rates.entry_of_own(part, name, group) for group in groups[len(values) :]]
            if len(values) > len(groups) or None in missing:
                raise ValueError(
                    f"`lr_schedulers` must have an entry for each of the {len(groups)} groups, got {len(values)} in "
                    f"{type(part).__name__}.{name}: one was added or deleted since (give the list its entry), or it "
                    "was loaded before the unfreezer; load unfreezer, scheduler, optimizer in this order"
                )
