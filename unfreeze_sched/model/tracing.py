"""Which parameters a model's forward pass uses, and what feeds what: found on a copy that holds no data.

The copy's tensors are fake: they have a shape, a type and a device, and no memory. Running it builds a real autograd
graph, and that graph is the answer: a parameter from which no path leads to the output never receives a gradient.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import re
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import _lru_cache_wrapper, partial
from itertools import product
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (  # the only part of torch that shares autograd but no data
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Call = tuple[tuple[Any, ...], dict[str, Any]]

# `torch.compile`, FSDP1 and `checkpoint_wrapper` keep the wrapped module under these names.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_USUAL_SIZES = (224, 256, 384, 299, 64, 32)
_BATCH = 2  # a batch of one would lose its dimension to a `squeeze()`
_TOKENS = 8
_FRAMES = 16
_SIZE_KEYS = ("img_size", "image_size")  # timm's, torchvision's and transformers' names


_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class TraceError(ValueError):
    """The copy did not run; the text says what was tried and what to do."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass did: its operations, numbered in the order of execution, and who took part in which.

    Args:
        uses: For each parameter that can receive a gradient, the first operation that consumes it.
        runs: For each module that was called, the operation that followed its first call; past the last, their number.
        inputs: For each operation, those whose results it takes.
    """

    uses: dict[nn.Parameter, int]
    runs: dict[nn.Module, int]
    inputs: list[list[int]]

    def feeding(self, operations: Iterable[int]) -> set[int]:
        """The operations on whose results any of these depends, itself included."""
        found: set[int] = set()
        stack = list(operations)
        while stack:
            operation = stack.pop()
            if operation not in found:
                found.add(operation)
                stack += self.inputs[operation]
        return found


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops the copy from reaching the model itself, as through a closure, which `deepcopy` does not follow."""

    def __init__(self, originals: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._originals = originals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(id(leaf) in self._originals for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError("forward reaches past a copy of the model to the model itself")
        return func(*args, **kwargs or {})


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel, `torch.compile`, FSDP1 or a checkpoint wrapper, or the module itself."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
            continue
        inner = next((child for name, child in module.named_children() if name in _WRAPPED), None)
        if inner is None:
            return module
        module = inner


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the children, each looked at without its wrapper."""
    for name, child in module.named_children():
        yield name, unwrap(child)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their qualified names, as `named_modules`, but without wrappers and their prefixes."""
    seen: set[nn.Module] = set()
    stack = [(prefix, unwrap(module))]
    while stack:
        name, current = stack.pop()
        if current not in seen:
            seen.add(current)
            yield name, current
            stack += reversed([(join(name, key), child) for key, child in children(current)])


def join(prefix: str, key: str) -> str:
    """The qualified name of a child."""
    return f"{prefix}.{key}" if prefix else key


def trace(model: nn.Module, example_input: Any = None) -> Trace:
    """Run a copy of the model that holds no data, in evaluation mode, and read the autograd graph.

    Args:
        model: The model; it is left untouched.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments; `None` tries inputs that the
            model's own attributes suggest, and then usual ones.

    Returns:
        The uses of the parameters and the runs of the modules, keyed by those of `model`.

    Raises:
        TypeError: `example_input` is of another type.
        TraceError: The model cannot be copied, runs on none of the inputs, or its output needs no gradient.
    """
    model = unwrap(model)
    # Fake tensors draw no random numbers, but a model's own Python code may.
    python_random = random.getstate()
    try:
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            _quiet(),
            _uncached(model),
        ):
            # A model may hold small tensors that are not its buffers.
            try:
                return _run(model, example_input, FakeTensorMode(allow_non_fake_inputs=True))
            except _NEEDS_DATA:  # sizes that depend on values can be symbols; loading those takes a second
                from torch.fx.experimental.symbolic_shapes import (  # noqa: PLC0415
                    GuardOnDataDependentSymNode,
                    ShapeEnv,
                )

                fatal = (*_NEEDS_DATA, GuardOnDataDependentSymNode)
                try:
                    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
                    return _run(model, example_input, mode, fatal)
                except fatal as error:
                    raise TraceError(
                        f"`model` must run forward without data, got {_first_line(error)}; no example_input= changes "
                        "that, so name the blocks with patterns=, one a block, such as "
                        f"patterns=[r'{_pattern(model)}', ...]"
                    ) from error
    finally:
        random.setstate(python_random)


def _run(
    model: nn.Module, example_input: Any, mode: FakeTensorMode, fatal: tuple[type[Exception], ...] = _NEEDS_DATA
) -> Trace:
    calls: Iterable[Callable[[], Call]] = _guesses(model) if example_input is None else [_given(example_input)]
    guard = _Guard({id(tensor) for tensor in (*model.parameters(), *model.buffers())})
    failures: list[str] = []
    twin, memo = _twin(model, mode)
    originals = {id(memo[id(module)]): module for _, module in walk(model)}
    fakes = {id(memo[id(p)]): p for p in model.parameters()}
    runs: dict[nn.Module, int] = {}
    for module in twin.modules():
        module.register_forward_pre_hook(partial(_note_run, runs, originals), prepend=True)
    for make_call in calls:
        runs.clear()
        with mode:
            args, kwargs = make_call()
        try:
            with mode, guard:
                args, kwargs = tree_map_only(torch.Tensor, partial(_fake, mode), (args, kwargs))
                output = twin(*args, **kwargs)
        except fatal:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model raises says that this input does not fit
            failures.append(f"{_first_line(error)} on {_shapes(args, kwargs)}")
            continue
        traced = _read(_tensors(output), fakes, runs)
        if traced.uses:
            if example_input is None:
                _refuse_half(model, traced, args, kwargs)
            return traced
        failures.append(f"an output that depends on no parameter on {_shapes(args, kwargs)}")
    raise TraceError(
        f"`model` must run forward on an example input, got {failures[0] if failures else 'none to try'}; "
        "pass example_input=, a tensor, a tuple of arguments or a dict of keyword arguments that the model accepts, "
        "or name the blocks with patterns="
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the tracebacks of attempts that do not fit."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _uncached(model: nn.Module) -> Iterator[None]:
    """Forget what an `lru_cache` of the model's own code keeps of the copy: the model would get its fake tensors."""
    before = {cache: cache.cache_info().misses for cache in _caches(model)}
    try:
        yield
    finally:
        for cache, misses in before.items():
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(model: nn.Module) -> Iterator[_lru_cache_wrapper[Any]]:
    """The caches of functions and methods, decorated further or not, where the model's classes are defined."""
    homes = {kind.__module__ for _, module in walk(model) for kind in type(module).__mro__}
    values = [value for home in homes if home in sys.modules for value in vars(sys.modules[home]).values()]
    stack = values + [part for value in values if isinstance(value, type) for part in vars(value).values()]
    seen: set[int] = set()  # closures of recursive functions hold themselves
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _lru_cache_wrapper):
            yield value
        elif isinstance(value, staticmethod | classmethod):
            stack.append(value.__func__)
        elif isinstance(value, FunctionType):
            stack += [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]


def _pattern(model: nn.Module) -> str:
    """A regex for the first part of the longest list of modules."""
    lists = [(len(module), name) for name, module in walk(model) if isinstance(module, nn.ModuleList)]
    return re.escape(max(lists, default=(0, "layers"))[1] + ".0.")


def _refuse_half(model: nn.Module, traced: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A guess may run half a model, as text alone does where an image may come too; the rest would be in no block."""
    modalities = getattr(model, "input_modalities", ())  # transformers: what the model takes
    if isinstance(modalities, str) or len(modalities) == 1:
        return
    taken = inspect.signature(model.forward).parameters
    given = {*list(taken)[: len(args)], *kwargs}
    left = [
        key for key, one in taken.items() if key not in given and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    idle = [
        name
        for name, module in walk(model)
        if module not in traced.runs
        and any(True for _ in module.parameters(recurse=False))
        and traced.uses.keys().isdisjoint(module.parameters())
    ]
    if left and idle:
        raise TraceError(
            f"`model` must run as a whole, got {_shapes(args, kwargs)} as a guess, which leaves out {idle[0]!r} (and "
            f"{len(idle) - 1} more), as well as {_some(left)}; pass example_input=, a tuple of arguments or a dict of "
            "keyword arguments with all that the model is to be trained on, or name the blocks with patterns="
        )


def _some(names: list[str]) -> str:
    most = 4
    return ", ".join(f"{name}=" for name in names[:most]) + (", ..." if len(names) > most else "")


def _twin(model: nn.Module, mode: FakeTensorMode) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model on fake tensors, and the memo that leads from `id(original)` to its copy."""
    memo: dict[int, Any] = {}
    modules = [module for _, module in walk(model)]
    for module in modules:
        _seed_tensors(module, mode, memo)
    hooks = _seed_hooks(modules, memo)
    try:
        # A wrapper's copy is the copy of what it wraps, so that nothing is compiled, gathered or checkpointed.
        for module in reversed(list(model.modules())):
            if unwrap(module) is not module:
                memo[id(module)] = copy.deepcopy(unwrap(module), memo)
        twin: nn.Module = copy.deepcopy(model, memo)
        for target, kept in hooks:
            target.update(copy.deepcopy(kept, memo))
    except Exception as error:
        raise TraceError(
            f"`model` must be copyable, got {_first_line(error)}; name the blocks with patterns=, which copies nothing"
        ) from error
    for module in twin.modules():
        module.training = False  # not `eval()`, which models override
        module.__dict__.pop("_compiled_call_impl", None)
        for flag in ("grad_checkpointing", "gradient_checkpointing"):
            if getattr(module, flag, False) is True:
                setattr(module, flag, False)  # a reentrant checkpoint hides its inside from the graph
        if getattr(vars(module).get("config"), "_experts_implementation", None) == "grouped_mm":
            module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]  # noqa: SLF001  # the other has no fake kernel in float32
    return twin, memo


def _seed_tensors(module: nn.Module, mode: FakeTensorMode, memo: dict[int, Any]) -> None:
    """Let `deepcopy` find a fake tensor for each of the module's own tensors, plain attributes included."""
    for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):  # noqa: SLF001
        if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
            fake = _fake(mode, tensor)
            differentiable = tensor.is_floating_point() or tensor.is_complex()
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=differentiable) if parameter else fake


def _seed_hooks(modules: list[nn.Module], memo: dict[int, Any]) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Let `deepcopy` find empty tables of hooks; returned are those tables with the hooks that belong in them.

    A forward hook is part of the model if its owner is, as timm's feature hooks are, or torch's weight norm; any other
    is the user's, and its side effects are not ours to cause.
    """
    members = {id(part) for module in modules for part in (module, *vars(module).values())}
    kept = []
    for module in modules:
        for key, hooks in vars(module).items():
            if key.endswith("_hooks") and isinstance(hooks, dict):
                memo[id(hooks)] = OrderedDict()
                if key in {"_forward_hooks", "_forward_pre_hooks"}:
                    ours = {handle: hook for handle, hook in hooks.items() if _is_structural(hook, members)}
                    kept.append((memo[id(hooks)], ours))
    return kept


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, type and device without memory; one on the meta device comes to the CPU."""
    device = "cpu" if tensor.is_meta else tensor.device
    with mode:
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def _is_structural(hook: Any, members: set[int]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    # transformers captures outputs in plain functions, which hold no module.
    home = getattr(owner, "__module__", None) or type(owner).__module__
    return id(owner) in members or home.split(".")[0] in {"torch", "transformers"}


def _note_run(runs: dict[nn.Module, int], originals: dict[int, nn.Module], module: nn.Module, _: Any) -> None:
    if id(module) in originals:
        runs.setdefault(originals[id(module)], torch._C._autograd._get_sequence_nr())  # noqa: SLF001


def _read(
    outputs: Iterable[torch.Tensor], parameters: Mapping[int, nn.Parameter], runs: Mapping[nn.Module, int]
) -> Trace:
    """The trace behind outputs, of the parameters whose copies have these ids."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = set(stack)
    consumed: dict[Any, list[nn.Parameter]] = {}
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            leaf = getattr(source, "variable", None)
            if leaf is not None and id(leaf) in parameters:
                consumed.setdefault(node, []).append(parameters[id(leaf)])
            elif leaf is None and source is not None and source not in nodes:
                nodes.add(source)
                stack.append(source)
    ordered = sorted(nodes, key=lambda node: node._sequence_nr())  # noqa: SLF001
    index = {node: i for i, node in enumerate(ordered)}
    numbers = [node._sequence_nr() for node in ordered]  # noqa: SLF001
    uses: dict[nn.Parameter, int] = {}
    for node in ordered:
        for parameter in consumed.get(node, ()):
            uses.setdefault(parameter, index[node])
    inputs = [[index[source] for source, _ in node.next_functions if source in index] for node in ordered]
    return Trace(uses, {module: bisect_left(numbers, run) for module, run in runs.items()}, inputs)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _given(example_input: Any) -> Callable[[], Call]:
    if isinstance(example_input, torch.Tensor):
        return lambda: ((example_input,), {})
    if isinstance(example_input, tuple):
        return lambda: (example_input, {})
    if isinstance(example_input, Mapping):
        return lambda: ((), dict(example_input))
    raise TypeError(
        "`example_input` must be a tensor, a tuple of positional or a dict of keyword arguments, "
        f"got {type(example_input).__name__}; wrap a single argument of another type in a tuple"
    )


def _guesses(model: nn.Module) -> Iterator[Callable[[], Call]]:
    """Inputs for the first layer, of the sizes that the model states itself and then of the usual ones."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((module for _, module in walk(model) if isinstance(module, kinds)), None)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = "cpu" if reference is None or reference.is_meta else reference.device
    dtype = torch.float32 if reference is None else reference.dtype

    def call(*shape: int, kind: torch.dtype = dtype) -> Callable[[], Call]:
        return lambda: ((torch.zeros(shape, dtype=kind, device=device),), {})

    if isinstance(first, nn.Embedding):
        yield call(_BATCH, _TOKENS, kind=torch.long)
    elif isinstance(first, nn.Linear):
        yield call(_BATCH, first.in_features)
        yield call(_BATCH, _TOKENS, first.in_features)
    elif isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = dict.fromkeys((*_stated_sizes(model), *((size, size) for size in _USUAL_SIZES)))
        # What is registered first need not run first, but nearly every image has three channels.
        for channels, size in product(dict.fromkeys((first.in_channels, 3)), sizes):
            extent = {1: size[-1:], 2: size, 3: (_FRAMES, *size)}[len(first.kernel_size)]
            yield call(_BATCH, channels, *extent)
    # transformers' own example, needed where several inputs are.
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield lambda: ((), dict(dummy))


def _stated_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Image sizes from the attributes by which timm, torchvision and transformers state them."""
    for _, module in walk(model):
        cfg = getattr(module, "pretrained_cfg", None)
        stated = [
            getattr(source, key, None) for source in (module, getattr(module, "config", None)) for key in _SIZE_KEYS
        ]
        for size in (*stated, cfg.get("input_size") if isinstance(cfg, Mapping) else None):
            if isinstance(size, int):
                yield size, size
            elif isinstance(size, (list, tuple)) and len(size) > 1 and all(isinstance(s, int) for s in size[-2:]):
                yield size[-2], size[-1]


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What was tried, for an error text."""
    shown = [*args, *(f"{key}=" for key in kwargs)]
    return ", ".join(f"{tuple(item.shape)}" if isinstance(item, torch.Tensor) else str(item) for item in shown)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()
