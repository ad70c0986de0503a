"""What watches a live run: who holds the parameters, which gradients are used, what the first step finds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from operator import is_
from typing import Any, ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from unfreeze_sched import parallel
from unfreeze_sched._checks import listed, warn
from unfreeze_sched.model.admission import gone
from unfreeze_sched.model.block import Block, Named
from unfreeze_sched.optimizer.admission import refuse_differing, refuse_order
from unfreeze_sched.optimizer.groups import tag

Probe = Literal["ranks", "local", "off"]

_Held = tuple[Mapping[str, Any], tuple[nn.Parameter | None, ...]]  # a module's own parameters: the dict, and its values
_Used = tuple[TensorWeakRef, int]  # a gradient, which it does not keep, and torch's count of its changes
_SHOWN = 10
_WITNESSES = 4
_Kind = TypeVar("_Kind", bound="Watcher")
# Norms of equal gradients may differ in their last bits on ranks with unlike hardware; those of other batches differ
# by far more.
_RELATIVE_TOLERANCE = 1e-9


class Owners:
    """Notices a parameter that its block's modules no longer hold, such as after `load_state_dict(assign=True)`.

    The optimizer would go on to train the old tensor, and the model would stand still. So it would where the model has
    something else in a member's place, which only blocks that know their model can tell.

    Args:
        blocks: The blocks, shallow to deep.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> owners, named = Owners([Block("first", layer)]), list(layer.named_parameters())
        >>> layer.weight = nn.Parameter(layer.weight.detach().clone())
        >>> owners.are_in_place(), owners.orphans(0, named)
        (False, ['weight'])
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._held = [_held(block) for block in blocks]
        self._inside = [
            [(module, dict(module._modules)) for module in block.modules() if module._modules]  # noqa: SLF001  # no public name
            for block in blocks
        ]
        self._firsts = [first for held in self._held if (first := _first(held))]
        self._places = _places(blocks)

    def are_in_place(self) -> bool:
        """Whether each block still holds the first of its parameters: cheap, and what replaces one replaces all."""
        return all(parameters.get(key) is parameter for parameters, key, parameter in self._firsts)

    def are_whole(self, indices: Iterable[int]) -> bool:
        """Whether these blocks' modules hold the modules and parameters that they held, and the model all its blocks.

        Tables are compared in one go each, without a loop in Python, since each transition asks it of all modules.

        Args:
            indices: 0-based indices of the blocks to look at.
        """
        return all(getattr(module, table).get(key) is part for module, table, key, part in self._places) and all(
            all(module._modules == was for module, was in self._inside[index])  # noqa: SLF001  # likewise
            and all(len(own) == len(was) and all(map(is_, own.values(), was)) for own, was in self._held[index])
            for index in indices
        )

    def replaced(self, index: int) -> list[str]:
        """The names of modules that lie where others lay, as after `convert_sync_batchnorm`, which keeps parameters."""
        prefixes = {module: prefix for prefix, module in self._blocks[index].module_prefixes()}
        return [
            prefixes.get(module, "") + key
            for module, was in self._inside[index]
            for key in {**was, **module._modules}  # noqa: SLF001  # likewise
            if not _is_or_wraps(module._modules.get(key), was.get(key))  # noqa: SLF001  # likewise
        ]

    def gone(self) -> list[str]:
        """The names of members that the model does not hold any more."""
        return gone(self._blocks)

    def orphans(self, index: int, named: Iterable[Named]) -> list[str]:
        """The names of parameters that the block holds no more; a parametrization keeps its in another module."""
        inside = set(map(id, self._blocks[index].parameters()))
        return [name for name, parameter in named if id(parameter) not in inside]


def _places(blocks: Iterable[Block]) -> list[tuple[nn.Module, str, str, Any]]:
    """What leads from the blocks' model to their members: a module, its table, the key, and what lies there."""
    found: dict[Any, tuple[nn.Module, str, str]] = {}
    for root in dict.fromkeys(block.root for block in blocks if block.root is not None):
        above: dict[Any, tuple[nn.Module, str, str]] = {}
        for module in root.modules():
            for table in ("_modules", "_parameters"):
                for key, part in getattr(module, table).items():
                    above.setdefault(part, (module, table, key))  # the first, so that no way up is a circle
        for member in chain.from_iterable(block.members for block in blocks if block.root is root):
            place: Any = member
            while place is not root and place not in found:
                found[place] = above.get(place, (root, "_modules", ""))  # where nothing is: it is gone already
                place = found[place][0]
    return [(*place, part) for part, place in found.items()]


def _is_or_wraps(module: nn.Module | None, was: nn.Module | None) -> bool:
    """Whether a module is what it was, or wraps that alone, as `torch.compile` and `checkpoint_wrapper` do."""
    if module is None or was is None or module is was:
        return module is was
    return was in set(module.modules()) and set(module.parameters()) == set(was.parameters())


def _held(block: Block) -> list[_Held]:
    held = (module._parameters for module in block.modules())  # noqa: SLF001  # without its children's
    return [(parameters, tuple(parameters.values())) for parameters in held if parameters]


def _first(held: Iterable[_Held]) -> tuple[Mapping[str, Any], str, nn.Parameter] | None:
    """The first parameter that a module holds, with its place."""
    return next(
        ((own, key, parameter) for own, _ in held for key, parameter in own.items() if parameter is not None), None
    )


class Watcher:
    """Something that looks on as an optimizer steps; it lives as long as who made it, in copies and pickles too.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.hooks.add(self, optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a copy: an optimizer leaves its hooks behind."""
        self.__dict__.update(state)
        Watcher.__init__(self, self._optimizer)

    @property
    def hooks(self) -> StepHooks:
        """Those of the optimizer."""
        return StepHooks.on(self._optimizer)

    def stay(self) -> None:
        """Look on when its maker is let go, too."""
        self.hooks.busy.add(self)

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step begins; what is returned takes the place of its arguments, unless it is None."""

    def after_step(self) -> None:
        """A step has ended."""


class StepHooks:
    """The one pair of hooks on an optimizer, whoever looks on; it goes when the last watcher has gone.

    Where that happens within a step it stays, idle, until another has come and gone: torch walks the hooks then.
    """

    # Weak on both sides: the optimizer's own tables keep the hooks, so that a busy watcher keeps no optimizer alive.
    _of: ClassVar[WeakKeyDictionary[Optimizer, ref[StepHooks]]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.busy: set[Watcher] = set()  # kept alive, since they have begun something
        self._watchers: list[ref[Watcher]] = []
        self._handles: list[Any] = []
        self._in_step = False

    @classmethod
    def on(cls, optimizer: Optimizer) -> StepHooks:
        """Those of an optimizer; new ones, where nobody looks on, last as long as somebody does."""
        known = cls._of.get(optimizer)
        hooks = None if known is None else known()
        if hooks is None:
            hooks = cls()
            cls._of[optimizer] = ref(hooks)
        return hooks

    def add(self, watcher: Watcher, optimizer: Optimizer) -> None:
        """Let a watcher look on, which is not kept alive for it."""
        self._watchers.append(ref(watcher, self._forget))
        if not self._handles:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_load))

    def of_kind(self, kind: type[_Kind]) -> Iterator[_Kind]:
        """Those of a kind."""
        return (watcher for watcher in self._live() if isinstance(watcher, kind))

    def first(self, kind: type[Watcher]) -> Watcher | None:
        """The first of a kind, which does for all what must not be done twice."""
        return next(self.of_kind(kind), None)

    def _forget(self, gone: ref[Watcher]) -> None:
        self._watchers.remove(gone)
        while not self._watchers and self._handles and not self._in_step:
            self._handles.pop().remove()

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._in_step, given = True, None
        for watcher in self._live():
            changed = watcher.before_step(args, kwargs)
            if changed is not None:
                given = args, kwargs = changed
        return given

    def _after_step(self, *_: Any) -> None:
        for watcher in self._live():
            watcher.after_step()
        self._in_step = False

    @staticmethod
    def _before_load(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """A state is loaded by place: refuse one of other groups of blocks, of which no place would tell."""
        saved, live = list(map(tag, state_dict["param_groups"])), list(map(tag, optimizer.param_groups))
        differing = [pair for pair in zip_longest(saved, live) if pair[0] != pair[1]]
        if names := [str(known[0]) for pair in differing for known in pair if known is not None]:
            refuse_order(list(dict.fromkeys(names)))

    def _live(self) -> Iterator[Watcher]:
        return (watcher for reference in tuple(self._watchers) if (watcher := reference()) is not None)


class Claim(Watcher):
    """The blocks of a rebuilder, for those that are made later on the same optimizer to see."""

    def __init__(self, optimizer: Optimizer, blocks: Sequence[Block]) -> None:
        super().__init__(optimizer)
        self.blocks = blocks

    @classmethod
    def of_others(cls, optimizer: Optimizer) -> list[Block]:
        """All blocks that are claimed."""
        return [block for claim in StepHooks.on(optimizer).of_kind(cls) for block in claim.blocks]


class Unapplied(Watcher):
    """Warns, once, where an optimizer steps before the unfreezer was applied: let go of it when it is."""

    has_warned = False

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn at the first step."""
        del args, kwargs
        if not self.has_warned:
            self.has_warned = True
            warn(
                "`apply` should be called before the epoch is trained, got a step of the optimizer before any; begin "
                "each epoch with unfreezer.apply(epoch)"
            )


class Accumulation(Watcher):
    """Tells gradients of an accumulation that is not over from gradients that the last step has used.

    A transition in its middle would let the joining parameters see a part of the gradient alone. That a gradient is
    there says nothing: many loops clear it before the backward pass, not after the step. But each backward pass changes
    the gradients that it reaches, so a handful of parameters are witnesses, spread over all groups.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
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
            pairs = zip(self._witnesses, self._used, strict=True)
            unused = [p.grad for p, used in pairs if p.grad is not None and not _is_as_it_was(p.grad, used)]
        else:  # the last step found no gradient at all
            unused = list(self._gradients())
        # They are zero after zero_grad(set_to_none=False).
        if not any(_numbers(gradient).count_nonzero() for gradient in unused):
            return False
        # A step that GradScaler left out, since a gradient overflowed, has used them as well.
        return all(bool(torch.isfinite(_numbers(gradient)).all()) for gradient in self._gradients())

    def after_step(self) -> None:
        """Note the gradients that it has used."""
        used = self._noted()
        # All parameters are walked in the first step after a join, and where no witness has a gradient any more.
        if not any(used) or len(self._optimizer.param_groups) != self._groups:
            self._choose()
            used = self._noted()
        self._used = used

    def _choose(self) -> None:
        """Take as witnesses what has a gradient now, as far as anything has: small ones, from all over the groups."""
        groups = self._optimizer.param_groups
        parameters = (p for group in groups for p in group["params"] if p.requires_grad and not p.is_meta)
        able = [p for p in parameters if not is_lazy(p) and p.numel()]
        able = [p for p in able if p.grad is not None] or able
        share = max(1, -(-len(able) // _WITNESSES))
        self._witnesses = [min(able[i : i + share], key=Tensor.numel) for i in range(0, len(able), share)]
        self._groups = len(groups)

    def _noted(self) -> list[_Used | None]:
        gradients = [parameter.grad for parameter in self._witnesses]
        return [None if g is None else (TensorWeakRef(g), g._version) for g in gradients]  # noqa: SLF001  # no public name

    def _gradients(self) -> Iterator[Tensor]:
        return (p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None)


def _is_as_it_was(gradient: Tensor, used: _Used | None) -> bool:
    return used is not None and gradient is used[0]() and gradient._version == used[1]  # noqa: SLF001  # likewise


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers that a gradient holds, as torch can count them: a sparse one's, float8 as float, on meta none."""
    if gradient.is_meta:
        return torch.empty(0)
    values = gradient.detach()
    if values.layout is not torch.strided:
        values = (values.coalesce() if values.is_sparse else values).values()
    return values.float() if values.element_size() == 1 else values


class FirstStep(Watcher):
    """Looks at the gradients of newly trainable parameters once, before the first step that could use them.

    Did each get one, and the same on all ranks? No gradient is looked at between that step and the next transition.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
        probe: `"ranks"` also compares the gradients across ranks where a process group is up, by one collective call on
            all ranks; `"local"` looks at this process alone, as local SGD needs; `"off"` does not look.
    """

    def __init__(self, optimizer: Optimizer, probe: Probe) -> None:
        super().__init__(optimizer)
        self._probe = probe
        self._watched: list[Sequence[Named]] = []

    def watch(self, named: Sequence[Named]) -> None:
        """Look at those of these parameters that are trainable when the next step begins."""
        if self._probe != "off" and any(parameter.requires_grad for _, parameter in named):
            self._watched.append(named)

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look, or let a step with a closure look when the gradients are there."""
        if not self._watched:
            return None
        optimizer, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._look()
            return None

        def probed() -> Any:  # the gradients come to be within the step
            loss = closure()
            self._look()
            return loss

        return ((optimizer, probed, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": probed})

    def _look(self) -> None:
        watched = {name: parameter for named in self._watched for name, parameter in named if parameter.requires_grad}
        compared = self._probe == "ranks" and parallel.process_group() is not None
        if compared:
            differing, seen = differing_gradients(watched)
            if differing:
                refuse_differing(differing)
            if not seen:
                return  # no gradient but zero on any rank, which tells nothing; all ranks look again
        missing = [name for name, parameter in watched.items() if parameter.grad is None and parameter.numel()]
        if not compared and len(missing) == len(watched) and not self._has_gradients():
            return  # a step without a backward pass
        self._watched.clear()
        self.hooks.busy.discard(self)
        if missing:
            warn(
                f"no gradient reached {listed(missing, _SHOWN)} in the first step after unfreezing, so they do not "
                "train: a branch that the loss does not use, a frozen input of torch.utils.checkpoint, whose fix is "
                "use_reentrant=False, or before torch 2.12 an old graph of torch.compile, whose fix is "
                "torch.compiler.reset() after each transition"
            )

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self._optimizer.param_groups for p in group["params"])


def differing_gradients(named: Mapping[str, nn.Parameter]) -> tuple[list[str], bool]:
    """Compare gradients across ranks by their norms; a collective call.

    Args:
        named: The same parameters, in the same order, on all ranks. Sharded ones are left out: each rank has its own.

    Returns:
        The names of those that differ, and whether any gradient is other than zero on any rank.
    """
    whole = {name: parameter for name, parameter in named.items() if not _is_sharded(parameter)}
    if not whole:
        return [], True
    device = next(iter(whole.values())).device
    norms = torch.stack([_norm(parameter.grad, device) for parameter in whole.values()])
    extremes = torch.cat([norms, -norms])
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    highest, lowest = extremes[: len(whole)].tolist(), (-extremes[len(whole) :]).tolist()
    return (
        [
            name
            for name, high, low in zip(whole, highest, lowest, strict=True)
            if not math.isclose(high, low, rel_tol=_RELATIVE_TOLERANCE)
        ],
        any(highest),
    )


def _norm(gradient: Tensor | None, device: torch.device) -> Tensor:
    """The gradient's 2-norm in double precision; 0 for none, -1 for one that is not finite."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    values = _numbers(gradient)
    norm = torch.linalg.vector_norm(values, dtype=torch.complex128 if values.is_complex() else torch.float64).real
    return torch.where(torch.isfinite(norm), norm, -torch.ones_like(norm)).to(device, torch.float64)


def _is_sharded(parameter: nn.Parameter) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # not loaded, not used
    return (tensor is not None and isinstance(parameter, tensor.DTensor)) or getattr(
        parameter, "_fsdp_flattened", False
    )
