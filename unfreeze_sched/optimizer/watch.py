"""What watches a live run: who holds the parameters, which gradients are used, what the first step finds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from operator import is_
from typing import Any, Literal, TypeVar
from weakref import ref

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from unfreeze_sched import parallel
from unfreeze_sched._checks import listed, warn
from unfreeze_sched.model.block import Block, Named, gone
from unfreeze_sched.optimizer.groups import tag

Probe = Literal["ranks", "local", "off"]

# Under it a group keeps [steps taken, steps in all], saved and loaded with it; it stays when the warm-up is over, since
# torch.distributed.checkpoint loads into the keys that a replayed group has.
WARMUP_KEY = "unfreeze_warmup"

_SHOWN = 10
_Kind = TypeVar("_Kind", bound="Watcher")
_Place = tuple[dict[str, Any], str, Any]  # a table, a key, and what lies there
_Used = tuple[TensorWeakRef, int]  # a gradient, which it does not keep, and torch's count of its changes


class Owners:
    """Notices a part of a block that is not where it was, such as a parameter after `load_state_dict(assign=True)`.

    The optimizer would go on to train the old tensor, and the model would stand still. So it would where the model has
    something else in a member's place, which only blocks that know their model can tell.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._named = [tuple(block.named_parameters()) for block in blocks]
        # Where something lies within a block: the module's prefix, the table, and what was in it.
        self._held = [
            [(prefix, table, dict(table)) for prefix, m in block.module_prefixes() for table in _tables(m) if table]
            for block in blocks
        ]
        self._firsts: list[_Place] = []
        for held in self._held:
            places = ((table, key, part) for _, table, was in held for key, part in was.items())
            self._firsts += islice((place for place in places if isinstance(place[2], nn.Parameter)), 1)
        self._ways = tuple(_ways(blocks))

    def are_in_place(self) -> bool:
        """Whether each block still holds the first of its parameters: cheap, and what replaces one replaces all."""
        return all(table.get(key) is part for table, key, part in self._firsts)

    def are_whole(self, indices: Iterable[int]) -> bool:
        """Whether the blocks of these 0-based indices hold all that they held, and the model all its blocks."""
        # Without a loop in Python within a table, since each transition asks it of all modules.
        return all(table.get(key) is part for table, key, part in self._ways) and all(
            len(table) == len(was) and all(map(is_, table.values(), was.values()))
            for index in indices
            for _, table, was in self._held[index]
        )

    def refuse_changes(self, indices: Iterable[int]) -> None:
        """Refuse blocks that are not whole, by the names of what was replaced, or is held no more."""
        for index in indices:
            places = (
                (prefix + key, table.get(key), was.get(key))
                for prefix, table, was in self._held[index]
                for key in {**was, **table}
            )
            _refuse_replaced([name for name, part, was in places if not _is_or_wraps(part, was)])
            inside = set(map(id, self._blocks[index].parameters()))  # a parametrization keeps its deeper
            if orphans := [name for name, parameter in self._named[index] if id(parameter) not in inside]:
                raise RuntimeError(
                    f"`blocks` must hold the parameters that they were given with, got {listed(orphans)} in none of "
                    "its modules any more (replaced, as by load_state_dict(assign=True), to_empty, weight_norm or "
                    "fully_shard); make optimizer and unfreezer after that"
                )
        _refuse_replaced(gone(self._blocks))


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module's own children and parameters lie."""
    return module._modules, module._parameters  # noqa: SLF001  # no public name


def _ways(blocks: Iterable[Block]) -> Iterator[_Place]:
    """What leads from the blocks' model to their members."""
    for root in dict.fromkeys(block.root for block in blocks if block.root is not None):
        names: dict[Any, str] = {part: name for name, part in (*root.named_modules(), *root.named_parameters())}
        for member in chain.from_iterable(block.members for block in blocks if block.root is root):
            if member not in names:  # it is gone already
                yield {}, "", member
                continue
            place: Any = root
            for key in filter(None, names[member].split(".")):
                table = next(table for table in _tables(place) if key in table)
                place = table[key]
                yield table, key, place


def _is_or_wraps(part: Any, was: Any) -> bool:
    """Whether a module is what it was, or wraps that alone, as `torch.compile` and `checkpoint_wrapper` do."""
    are_modules = isinstance(part, nn.Module), isinstance(was, nn.Module)
    if part is was or not any(are_modules):  # a parameter may lie deeper now
        return True
    return all(are_modules) and was in set(part.modules()) and set(part.parameters()) == set(was.parameters())


def _refuse_replaced(names: Sequence[str]) -> None:
    """Refuse members in whose places others lie: what is trained and held in evaluation would be the old ones."""
    if names:
        raise RuntimeError(
            f"`blocks` must hold the parts that they were given with, got {listed(names)} replaced (as by assigning "
            "a layer, convert_sync_batchnorm or quantization); make optimizer, blocks and unfreezer after that"
        )


class Watcher:
    """Looks on as an optimizer steps, the innermost of its wrappers, as long as who made it lives, in copies too."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.hooks.add(self, optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a copy: an optimizer leaves its hooks behind."""
        self.__dict__.update(state)
        self.hooks.add(self, self._optimizer)

    @property
    def hooks(self) -> StepHooks:
        """The optimizer's."""
        return StepHooks.on(self._optimizer)

    def stay(self) -> None:
        """Look on when its maker is let go, too."""
        self.hooks.busy.add(self)

    def gradients(self) -> Iterator[Tensor]:
        """Those of all that the optimizer holds."""
        return (p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None)

    def before_step(self) -> None:
        """A step begins."""

    def after_step(self) -> None:
        """A step has ended."""


class StepHooks:
    """The one pair of hooks on an optimizer, whoever looks on; it goes when the last watcher has gone.

    Where that happens within a step, as torch walks the hooks, it stays, idle, until another has come and gone.
    """

    def __init__(self) -> None:
        self.busy: set[Watcher] = set()  # kept alive, since they have begun something
        self._watchers: list[ref[Watcher]] = []
        self._handles: list[Any] = []
        self._in_step = False
        self.has_closure = False  # in the present step, or the last one

    @classmethod
    def on(cls, optimizer: Optimizer) -> StepHooks:
        """Those in an optimizer's own table, the only one that keeps them; new ones, where nobody looks on."""
        table = optimizer._optimizer_step_pre_hooks.values()  # noqa: SLF001  # no public name
        owners = (getattr(hook, "__self__", None) for hook in table)
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls()

    def add(self, watcher: Watcher, optimizer: Optimizer) -> None:
        """Let a watcher look on, which is not kept alive for it."""
        self._watchers.append(ref(watcher, self._forget))
        if not self._handles:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_pre_hook(_refuse_order),
            ]

    def _forget(self, gone: ref[Watcher]) -> None:
        self._watchers.remove(gone)
        while not self._watchers and self._handles and not self._in_step:
            self._handles.pop().remove()

    def of_kind(self, kind: type[_Kind]) -> Iterator[_Kind]:
        """The watchers of a kind."""
        return (watcher for known in tuple(self._watchers) if isinstance(watcher := known(), kind))

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_step, self.has_closure = True, any(value is not None for value in (*args[1:2], kwargs.get("closure")))
        for watcher in self.of_kind(Watcher):
            watcher.before_step()

    def _after_step(self, *_: Any) -> None:
        for watcher in self.of_kind(Watcher):
            watcher.after_step()
        self._in_step = False


def _refuse_order(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse a saved state of other groups of blocks: it is loaded by place, of which no place would tell."""
    pairs = zip_longest(map(tag, state_dict["param_groups"]), map(tag, optimizer.param_groups))
    if names := dict.fromkeys(str(known[0]) for pair in pairs if pair[0] != pair[1] for known in pair if known):
        raise ValueError(
            f"`optimizer` must have the saved run's groups when its state is loaded, got {listed(list(names))} in "
            "another place or in none; load the unfreezer first, then the LR schedulers, then the optimizer"
        )


class Claim(Watcher):
    """The blocks of a rebuilder, for those that are made later on the same optimizer to see."""

    def __init__(self, optimizer: Optimizer, blocks: Sequence[Block]) -> None:
        super().__init__(optimizer)
        self.blocks = blocks


class Unapplied(Watcher):
    """Warns, once, where an optimizer steps before the unfreezer was applied, which then lets it go."""

    has_warned = False

    def before_step(self) -> None:
        """Warn at the first step."""
        if not self.has_warned:
            self.has_warned = True
            warn(
                "`apply` should be called before the epoch is trained, got a step of the optimizer before any; begin "
                "each epoch with unfreezer.apply(epoch)"
            )


class Accumulation(Watcher):
    """Tells gradients of an accumulation that is not over from gradients that the last step has used.

    A transition in its middle would let the joining parameters see a part of the gradient alone. That a gradient is
    there says nothing: many loops clear it before the backward pass. But each backward pass changes the gradients that
    it reaches, so a handful of parameters are witnesses, spread over all groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._witnesses: Sequence[Tensor] = ()
        self._groups = 0  # their number when the witnesses were chosen
        self.after_step()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: its parameters have no gradients."""
        return type(self), (self._optimizer,)

    @classmethod
    def on(cls, optimizer: Optimizer) -> Accumulation:
        """The one of an optimizer, for all that change it: a later one is to know of the steps before."""
        return next(StepHooks.on(optimizer).of_kind(cls), None) or cls(optimizer)

    def is_pending(self) -> bool:
        """Whether there are gradients that no step has used."""
        if any(self._used):
            now = zip((p.grad for p in self._witnesses), self._used, strict=True)
            unused = [g for g, used in now if g is not None and not (used and g is used[0]() and g._version == used[1])]  # noqa: SLF001  # likewise
        else:  # the last step found no gradient at all
            unused = list(self.gradients())
        # They are zero after zero_grad(set_to_none=False).
        if not any(_numbers(gradient).count_nonzero() for gradient in unused):
            return False
        # A step that GradScaler left out, since a gradient overflowed, has used them as well.
        return all(bool(torch.isfinite(_numbers(gradient)).all()) for gradient in self.gradients())

    def after_step(self) -> None:
        """Note the gradients that it has used."""
        self._used, groups = self._noted(), self._optimizer.param_groups
        if any(self._used) and len(groups) == self._groups:
            return
        # All parameters are walked in the first step after a join, and where no witness has a gradient any more. Those
        # with a gradient become witnesses, as far as any has one: small ones, from all over the groups.
        parameters = (p for group in groups for p in group["params"] if p.requires_grad and not p.is_meta)
        able = [p for p in parameters if not is_lazy(p) and p.numel()]
        able = [p for p in able if p.grad is not None] or able
        share = max(1, -(-len(able) // 4))  # of each of four
        self._witnesses = [min(able[i : i + share], key=Tensor.numel) for i in range(0, len(able), share)]
        self._groups, self._used = len(groups), self._noted()

    def _noted(self) -> list[_Used | None]:
        gradients = [parameter.grad for parameter in self._witnesses]
        return [None if g is None else (TensorWeakRef(g), g._version) for g in gradients]  # noqa: SLF001  # no public name


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers that a gradient holds, as torch can count them: a sparse one's, float8 as float, on meta none."""
    if gradient.is_meta:
        return torch.empty(0)
    values = gradient.detach()
    if values.layout is not torch.strided:
        values = (values.coalesce() if values.is_sparse else values).values()
    return values.float() if values.element_size() == 1 else values


class Warmup(Watcher):
    """Lets step i (0-based) of a group's first k run at `(i + 1) / k` of its learning rate.

    A fresh Adam state otherwise begins with sign-like steps of full size. The rate is lowered when a step begins and is
    the scheduler's own again, to the bit, when it ends.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        super().__init__(optimizer)
        self.steps = steps
        self._own: list[tuple[dict[str, Any], Any]] = []

    def begin(self, groups: Iterable[dict[str, Any]]) -> None:
        """Start the warm-up of groups that have just joined; it goes on where the unfreezer is let go."""
        for group in groups:
            group[WARMUP_KEY] = [0, self.steps]
            self.stay()

    def before_step(self) -> None:
        """Lower the rates of all groups that warm up, whichever rebuilder began it: two would lower them twice."""
        if next(self.hooks.of_kind(Warmup)) is not self:
            return
        self._restore_rates()  # a step that failed has not done so
        for group in self._optimizer.param_groups:
            taken, total = group.get(WARMUP_KEY, (0, 0))
            if taken >= total:
                continue
            # Without CUDA torch raises where it is asked.
            may_ask = not torch.compiler.is_compiling() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            if may_ask and torch.cuda.is_current_stream_capturing():
                self._restore_rates()
                raise RuntimeError(
                    f"`warmup_steps` must be over before a step is captured in a CUDA graph, got {total - taken} left, "
                    "at lowered rates that each replay would use; run them uncaptured, then capture"
                )
            rate = group["lr"]
            self._own.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            group["lr"] *= (taken + 1) / total  # a tensor in place
        if not self._own:
            self.hooks.busy -= {watcher for watcher in self.hooks.busy if isinstance(watcher, Warmup)}

    def after_step(self) -> None:
        """Give the rates back, and count the step."""
        # A fused step is told by GradScaler to change nothing, where another one is not called at all.
        if self._own and not getattr(self._optimizer, "found_inf", None):
            for group, _ in self._own:
                taken, total = group[WARMUP_KEY]
                group[WARMUP_KEY] = [taken + 1, total]
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, rate in self._own:
            group["lr"] = group["lr"].copy_(rate) if isinstance(group["lr"], Tensor) else rate
        self._own.clear()


class FirstStep(Watcher):
    """Looks at the gradients of newly trainable parameters once, before the first step that could use them.

    Did each get one, and, with `"ranks"` where a process group is up, by one collective call, the same on all ranks?
    `"local"` looks at this process alone, as local SGD needs; `"off"` does not look.
    """

    def __init__(self, optimizer: Optimizer, probe: Probe) -> None:
        super().__init__(optimizer)
        self._probe = probe
        self._watched: list[Sequence[Named]] = []

    def watch(self, named: Sequence[Named]) -> None:
        """Look at those of these parameters that are trainable when the next step begins."""
        if self._probe != "off" and any(parameter.requires_grad for _, parameter in named):
            self._watched.append(named)

    def before_step(self) -> None:
        """Look, unless the gradients come to be within the step."""
        if self._watched and not self.hooks.has_closure:
            self._look()

    def after_step(self) -> None:
        """Look where a closure has made them."""
        if self._watched and self.hooks.has_closure:
            self._look()

    def _look(self) -> None:
        watched = {name: parameter for named in self._watched for name, parameter in named if parameter.requires_grad}
        compared = self._probe == "ranks" and parallel.process_group() is not None
        missing = [name for name, parameter in watched.items() if parameter.grad is None and parameter.numel()]
        differing, seen = differing_gradients(watched) if compared else ([], len(missing) < len(watched))
        if differing:
            raise RuntimeError(
                "gradients of newly trainable parameters must be the same on all ranks, got others for "
                f"{listed(differing, _SHOWN)}: DistributedDataParallel does not reduce what was frozen when it was "
                "made; wrap anew after each transition, ddp = unfreeze_sched.parallel.rewrap_ddp(ddp), or wrap "
                "while everything is trainable, with find_unused_parameters=True (probe='local' is for local SGD)"
            )
        # No gradient, or none but zero on any rank, tells nothing, as in a step without a backward pass: look again.
        if not seen and (compared or not any(True for _ in self.gradients())):
            return
        self._watched.clear()
        self.hooks.busy.discard(self)
        if missing:
            warn(
                f"no gradient reached {listed(missing, _SHOWN)} in the first step after unfreezing, so they do not "
                "train: a branch that the loss does not use, a frozen input of torch.utils.checkpoint, whose fix is "
                "use_reentrant=False, or before torch 2.12 an old graph of torch.compile, whose fix is "
                "torch.compiler.reset() after each transition"
            )


def differing_gradients(named: Mapping[str, nn.Parameter]) -> tuple[list[str], bool]:
    """The names of gradients that differ across ranks, by their norms, and whether any is other than zero on any rank.

    A collective call, of the same parameters in the same order on all ranks; sharded ones, a rank's own, are left out.
    """
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())  # not loaded, not used
    names = [n for n, p in named.items() if not (isinstance(p, sharded) or getattr(p, "_fsdp_flattened", False))]
    if not names:
        return [], True
    device = named[names[0]].device
    norms = torch.stack([_norm(named[name].grad, device) for name in names])
    extremes = torch.stack([norms, -norms])
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    highest, lowest = extremes.tolist()
    extremes_of = zip(names, highest, lowest, strict=True)
    # Norms of equal gradients may differ in their last bits on unlike hardware; those of other batches, by far more.
    differing = [name for name, high, low in extremes_of if not math.isclose(high, -low, rel_tol=1e-9)]
    return differing, any(highest)


def _norm(gradient: Tensor | None, device: torch.device) -> Tensor:
    """The gradient's 2-norm in double precision; 0 for none, -1 for one that is not finite."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    values = _numbers(gradient)
    norm = torch.linalg.vector_norm(values, dtype=torch.complex128 if values.is_complex() else torch.float64).real
    return torch.where(torch.isfinite(norm), norm, -torch.ones_like(norm)).to(device, torch.float64)
