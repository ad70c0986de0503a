"""Which parameters a forward pass uses, and what feeds what: the autograd graph of a copy on tensors without memory."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import random
import re
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from itertools import product
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The only part of torch that shares autograd but no data.
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from unfreeze_sched._checks import listed

Call = tuple[tuple[Any, ...], dict[str, Any]]

# `torch.compile`, FSDP1 and `checkpoint_wrapper` keep the wrapped module under these names.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_USUAL_SIZES = (224, 256, 384, 299, 64, 32)
_BATCH = 2  # a batch of one would lose its dimension to a `squeeze()`
_TOKENS = 8
_FRAMES = 16


class TraceError(ValueError):
    """The copy did not run; the text says what was tried and what to do."""


class Trace(NamedTuple):
    """What one forward pass did: its operations, numbered in the order of execution, and who took part in which."""

    uses: dict[nn.Parameter, int]  # for each that can receive a gradient, the first operation that consumes it
    runs: dict[nn.Module, int]  # for each that was called, the operation that followed; past the last, their number
    inputs: list[list[int]]  # for each operation, those whose results it takes

    def feeding(self, parameters: Iterable[nn.Parameter]) -> set[int]:
        """The operations that consume these parameters first, and all on whose results those depend."""
        found: set[int] = set()
        stack = [self.uses[parameter] for parameter in parameters if parameter in self.uses]
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
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(module.module)
    inner = next((child for name, child in module.named_children() if name in _WRAPPED), None)
    return module if inner is None else unwrap(inner)


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the children, each looked at without its wrapper."""
    return ((name, unwrap(child)) for name, child in module.named_children())


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their qualified names, as `named_modules`, but without wrappers and their prefixes."""
    seen: set[nn.Module] = set()
    stack = [("", unwrap(module))]
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

    Its keys are the model's own parameters and modules. Without an example, inputs are tried that the model itself
    suggests, and then usual ones; a TraceError says why none would do.
    """
    # Here, since it loads sympy, which takes longer than all else.
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv  # noqa: PLC0415

    model = unwrap(model)
    with _nothing_left_behind(model):
        # A model may hold small tensors that are not its buffers; sizes that depend on values are symbols.
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
        guard = _Guard({id(tensor) for tensor in (*model.parameters(), *model.buffers())})
        twin, memo = _twin(model, mode)
        fakes = {id(memo[id(parameter)]): parameter for parameter in model.parameters()}
        runs: dict[nn.Module, int] = {}
        for _, module in walk(model):
            memo[id(module)].register_forward_pre_hook(partial(_note_run, runs, module), prepend=True)
        failures: list[str] = []
        for given in _guesses(model, mode) if example_input is None else [_given(example_input)]:
            runs.clear()
            try:
                with mode, guard:
                    args, kwargs = tree_map_only(Tensor, partial(_fake, mode), given)
                    output = twin(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
                raise TraceError(
                    f"`model` must run forward without data, got {_first_line(error)}; no example_input= changes that, "
                    f"so name the blocks with patterns=, one a block, such as patterns=[r'{_pattern(model)}', ...]"
                ) from error
            except Exception as error:  # noqa: BLE001  # whatever a model raises says that this input does not fit
                failures.append(f"{_first_line(error)} on {_shapes(given)}")
                continue
            traced = _read(_tensors(output), fakes, runs)
            if traced.uses:
                if example_input is None:
                    _refuse_half(model, traced, given)
                return traced
            failures.append(f"an output that depends on no parameter on {_shapes(given)}")
    raise TraceError(
        f"`model` must run forward on an example input, got {failures[0] if failures else 'none to try'}; "
        "pass example_input=, a tensor, a tuple of arguments or a dict of keyword arguments that the model accepts, "
        "or name the blocks with patterns="
    )


@contextmanager
def _nothing_left_behind(model: nn.Module) -> Iterator[None]:
    """Autograd as usual, and after it random numbers, torch's log and what the model's code caches as before."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it shows the tracebacks of inputs that do not fit
    was_disabled, state = log.disabled, random.getstate()
    misses = {cache: cache.cache_info().misses for cache in _caches(model)}
    log.disabled = True
    try:
        with torch.inference_mode(mode=False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        log.disabled = was_disabled
        random.setstate(state)
        for cache, before in misses.items():
            if cache.cache_info().misses != before:
                cache.cache_clear()  # the model itself would get the copy's fake tensors from it


def _caches(model: nn.Module) -> Iterator[_lru_cache_wrapper[Any]]:
    """The caches of functions and methods, decorated further or not, where the model's classes are defined."""
    homes = {kind.__module__ for _, module in walk(model) for kind in type(module).__mro__}
    stack = [value for home in homes if home in sys.modules for value in vars(sys.modules[home]).values()]
    seen: set[int] = set()  # closures of recursive functions hold themselves
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _lru_cache_wrapper):
            yield value
        elif isinstance(value, type):
            stack += vars(value).values()
        elif isinstance(value, FunctionType | staticmethod | classmethod | tuple | CellType):
            stack += gc.get_referents(value)


def _pattern(model: nn.Module) -> str:
    """A regex for the first part of the longest list of modules."""
    lists = [(len(module), name) for name, module in walk(model) if isinstance(module, nn.ModuleList)]
    return re.escape(max(lists, default=(0, "layers"))[1] + ".0.")


def _refuse_half(model: nn.Module, traced: Trace, given: Call) -> None:
    """A guess may run half a model, as text alone does where an image may come too; the rest would be in no block."""
    modalities = getattr(model, "input_modalities", ())  # transformers: what the model takes
    if isinstance(modalities, str) or len(modalities) == 1:
        return
    signature = inspect.signature(model.forward)
    passed = signature.bind_partial(*given[0], **given[1]).arguments
    left = [
        f"{key}="
        for key, one in signature.parameters.items()
        if key not in passed and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
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
            f"`model` must run as a whole, got {_shapes(given)} as a guess, which leaves out {idle[0]!r} (and "
            f"{len(idle) - 1} more), as well as {listed(left, 4)}; pass example_input=, a tuple of arguments or a dict "
            "of keyword arguments with all that the model is to be trained on, or name the blocks with patterns="
        )


def _twin(model: nn.Module, mode: FakeTensorMode) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model on fake tensors, and the memo that leads from `id(original)` to its copy."""
    modules = [module for _, module in walk(model)]
    memo = _seeds(modules, mode)
    owners = {id(part) for module in modules for part in (module, *vars(module).values())}
    try:
        # A wrapper's copy is the copy of what it wraps, so that nothing is compiled, gathered or checkpointed.
        for module in reversed(list(model.modules())):
            if unwrap(module) is not module:
                memo[id(module)] = copy.deepcopy(unwrap(module), memo)
        twin: nn.Module = copy.deepcopy(model, memo)
        for module, key in product(modules, ("_forward_hooks", "_forward_pre_hooks")):
            hooks = {handle: hook for handle, hook in vars(module)[key].items() if _is_structural(hook, owners)}
            memo[id(vars(module)[key])].update(copy.deepcopy(hooks, memo))
    except Exception as error:
        raise TraceError(
            f"`model` must be copyable, got {_first_line(error)}; name the blocks with patterns=, which copies nothing"
        ) from error
    for module in twin.modules():
        own = vars(module)
        own["training"] = False  # not `eval()`, which models override
        own.pop("_compiled_call_impl", None)
        for flag in ("grad_checkpointing", "gradient_checkpointing"):
            if getattr(module, flag, False) is True:
                setattr(module, flag, False)  # a reentrant checkpoint hides its inside from the graph
        if getattr(own.get("config"), "_experts_implementation", None) == "grouped_mm":
            own["config"]._experts_implementation = "batched_mm"  # noqa: SLF001  # the other has no fake kernel in float32
    return twin, memo


def _seeds(modules: Iterable[nn.Module], mode: FakeTensorMode) -> dict[int, Any]:
    """The memo in which `deepcopy` finds fake tensors, plain attributes included, and empty tables of hooks."""
    memo: dict[int, Any] = {}
    for module in modules:
        for key, part in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):  # noqa: SLF001
            if isinstance(part, Tensor):
                memo.setdefault(id(part), _fake(mode, part))
            elif key.endswith("_hooks") and isinstance(part, dict):
                memo[id(part)] = OrderedDict()
    return memo


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor, or a parameter, of the same shape, type and device without memory; one on meta comes to the CPU."""
    kind: Any = {"dtype": tensor.dtype, "device": "cpu" if tensor.is_meta else tensor.device}
    with mode:
        if tensor.layout is torch.strided:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), **kind)
        else:
            fake = torch.empty(tensor.shape, **kind)
    if not isinstance(tensor, nn.Parameter):
        return fake
    return nn.Parameter(fake, requires_grad=tensor.is_floating_point() or tensor.is_complex())


def _is_structural(hook: Any, owners: set[int]) -> bool:
    """Whether a hook is part of the model: a part owns it, as timm's, or torch's weight norm; no user's is to run."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    # transformers captures outputs in plain functions, which hold no module.
    return id(owner) in owners or str(getattr(owner, "__module__", "")).split(".")[0] in {"torch", "transformers"}


def _note_run(runs: dict[nn.Module, int], original: nn.Module, _module: nn.Module, _args: Any) -> None:
    runs.setdefault(original, torch._C._autograd._get_sequence_nr())  # noqa: SLF001


def _read(outputs: Iterable[Tensor], parameters: Mapping[int, nn.Parameter], runs: Mapping[nn.Module, int]) -> Trace:
    """The trace behind outputs, of the parameters whose copies have these ids."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = set(stack)
    while stack:
        for source, _ in stack.pop().next_functions:
            if source is not None and source not in nodes and getattr(source, "variable", None) is None:
                nodes.add(source)
                stack.append(source)
    ordered = sorted(nodes, key=lambda node: node._sequence_nr())  # noqa: SLF001
    numbers = [node._sequence_nr() for node in ordered]  # noqa: SLF001
    index = {node: i for i, node in enumerate(ordered)}
    uses: dict[nn.Parameter, int] = {}
    for i, node in enumerate(ordered):
        for source, _ in node.next_functions:
            parameter = parameters.get(id(getattr(source, "variable", None)))
            if parameter is not None:
                uses.setdefault(parameter, i)
    inputs = [[index[source] for source, _ in node.next_functions if source in index] for node in ordered]
    return Trace(uses, {module: bisect_left(numbers, run) for module, run in runs.items()}, inputs)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _given(example_input: Any) -> Call:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    raise TypeError(
        "`example_input` must be a tensor, a tuple of positional or a dict of keyword arguments, "
        f"got {type(example_input).__name__}; wrap a single argument of another type in a tuple"
    )


def _guesses(model: nn.Module, mode: FakeTensorMode) -> Iterator[Call]:
    """Inputs for the first layer, of the sizes that the model states itself and then of the usual ones."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((module for _, module in walk(model) if isinstance(module, kinds)), None)
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Embedding):
        shapes = [(_BATCH, _TOKENS)]
    elif isinstance(first, nn.Linear):
        shapes = [(_BATCH, first.in_features), (_BATCH, _TOKENS, first.in_features)]
    elif first is not None:
        sizes = dict.fromkeys((*_stated_sizes(model), *((size, size) for size in _USUAL_SIZES)))
        # What is registered first need not run first, but nearly every image has three channels.
        channels = dict.fromkeys((first.in_channels, 3))
        extents = [(_FRAMES, *size)[-len(first.kernel_size) :] for size in sizes]
        shapes = [(_BATCH, number, *extent) for number, extent in product(channels, extents)]
    dtype = torch.long if isinstance(first, nn.Embedding) else like.dtype
    for shape in shapes:
        with mode:
            guess = torch.zeros(shape, dtype=dtype, device="cpu" if like.is_meta else like.device)
        yield (guess,), {}
    # transformers' own example, needed where several inputs are.
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield (), dict(dummy)


def _stated_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Image sizes from the attributes by which timm, torchvision and transformers state them."""
    for _, module in walk(model):
        cfg = getattr(module, "pretrained_cfg", None)
        sources = (module, getattr(module, "config", None))
        stated = [getattr(source, key, None) for source in sources for key in ("img_size", "image_size")]
        for size in (*stated, cfg.get("input_size") if isinstance(cfg, Mapping) else None):
            if isinstance(size, int):
                yield size, size
            elif isinstance(size, (list, tuple)) and len(size) > 1 and all(isinstance(s, int) for s in size[-2:]):
                yield size[-2], size[-1]


def _shapes(call: Call) -> str:
    """What was tried, for an error text."""
    shown = [*call[0], *(f"{key}=" for key in call[1])]
    return ", ".join(f"{tuple(item.shape)}" if isinstance(item, Tensor) else str(item) for item in shown)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()
