"""Networks as people write them, against an oracle that shares no code with what finds their blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfreeze_sched.model import Block, encoder_blocks

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")
from trial_networks import CASES, Case  # it imports these

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]

KNOWN = {
    *("nnunet-2d", "nnunet-3d", "siamese", "multitask-backbone", "wrapped-resnet-fc", "wrapped-resnet-mlp-fc"),
    *("vae-timm-encoder", "dict-batch", "list-of-images", "dino-multicrop-list", "mmseg-encoder-decoder"),
    *("mmseg-mode-tensor", "whisper-like", "whisper-encoder-classifier", "ternausnet-resnet", "detr-demo"),
}
"""Those that name an `encoder` or `backbone` beside other parts, or are a library's model in a plain wrapper."""
TOWERS = {"two-tower"}  # the order of their blocks is no order of execution


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors(value)


def run(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def trained(model: nn.Module, inputs: Any, trainable: set[nn.Parameter]) -> set[nn.Parameter]:
    """The parameters that one real backward pass gives a gradient."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter in trainable)
    losses = [tensor.abs().mean() for tensor in tensors(run(model, inputs)) if tensor.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return {parameter for parameter in model.parameters() if parameter.grad is not None}


def starts(model: nn.Module, inputs: Any, blocks: Sequence[Block]) -> list[int]:
    """For each block, when the first of its matrices was used."""
    calls: dict[nn.Parameter, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            calls.setdefault(parameter, len(calls))

    leaves = [m for m in model.modules() if not any(True for child in m.children() for _ in child.parameters())]
    hooks = [module.register_forward_pre_hook(note) for module in leaves]
    with torch.no_grad():
        run(model, inputs)
    for hook in hooks:
        hook.remove()
    return [min(calls[p] for p in block.parameters() if p in calls and p.dim() > 1) for block in blocks]


def head_of(case: Case, model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if any(re.search(regex, name) for regex in case.head)]


def faults(name: str, model: nn.Module, inputs: Any, blocks: Sequence[Block]) -> list[str]:
    """What is not as a person would want it, as far as real forward and backward passes can tell."""
    case = CASES[name]
    model.eval()
    names = {parameter: key for key, parameter in model.named_parameters()}
    held = [parameter for block in blocks for parameter in block.parameters()]
    head = set(head_of(case, model))
    everything = trained(model, inputs, set(names))
    found = [f"{names[p]} is in two blocks" for p in set(held) if sum(p is other for other in held) > 1]
    found += [f"{names[p]} of the head is in a block" for p in head.intersection(held)]
    found += [f"{names[p]} is trained, and in neither" for p in everything - head - set(held)]
    found += [f"{names[p]} is in a block and never trained" for p in set(held) - everything]
    for n in range(len(blocks) + 1):
        unfrozen = {parameter for block in blocks[len(blocks) - n :] for parameter in block.parameters()}
        if trained(model, inputs, unfrozen | (set(names) - set(held))) & set(held) != unfrozen:
            found.append(f"with {n} blocks unfrozen, others receive gradients")
    if name not in TOWERS:
        order = starts(model, inputs, blocks)
        found += [f"{i + 1} begins before {i}" for i, (a, b) in enumerate(itertools.pairwise(order)) if a >= b]
    sizes = [len(list(block.parameters())) for block in blocks]
    if max(sizes) > 0.8 * sum(sizes):
        found.append("one block holds nearly all")
    if case.blocks not in {None, len(blocks)}:
        found.append(f"there are {len(blocks)} blocks, not {case.blocks}")
    return found


def found_blocks(name: str, model: nn.Module, inputs: Any) -> tuple[Block, ...]:
    """The blocks: without a head where it is known, else with the network's own, after the question for it."""
    if name in KNOWN:
        return encoder_blocks(model, example_input=inputs)
    with pytest.raises(ValueError, match=r"pass head=\[\.\.\.\] with all that is new, or head=\(\) where"):
        encoder_blocks(model, example_input=inputs)
    return encoder_blocks(model, head=head_of(CASES[name], model), example_input=inputs)


# Those with large encoders, or whose kind is there already, are left to the slow run.
SLOW = {
    *(
        "unet-inc-down-up-bilinear",
        "list-unet-downs-ups",
        "nnunet-3d",
        "resnet-lstm-2fc",
        "siamese",
        "siamese-pytorch-example",
    ),
    *(
        "multitask-backbone",
        "multitask-resnet-named",
        "wrapped-resnet-fc",
        "feature_extractor-fc1-fc2",
        "moco",
        "detr-demo",
    ),
    *("vae-timm-encoder", "dict-batch", "list-of-images", "mmseg-mode-tensor", "ternausnet-resnet", "resnet-unet"),
    *("bert-bilstm", "reid-base-bnneck", "two-tower", "hrnet-keypoint"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_networks_as_people_write_them(name: str) -> None:
    """Known or stated, the head is in no block, each other parameter that trains is in one, and the order is that of depth."""
    torch.manual_seed(0)
    model, inputs = CASES[name].make(), CASES[name].inputs()
    assert faults(name, model, inputs, found_blocks(name, model, inputs)) == []


def test_the_oracle_can_fail() -> None:
    """A head in the last block, a stem in none, a wrong order and one lump are found out."""
    name = "unet-inc-down-up"
    torch.manual_seed(0)
    model, inputs = CASES[name].make(), CASES[name].inputs()
    first, *middle, last = found_blocks(name, model, inputs)
    outc = model.get_submodule("outc")
    headed = Block(last.name, (*last.members, outc))
    assert "outc.conv.weight of the head is in a block" in faults(name, model, inputs, (first, *middle, headed))
    bare = Block(first.name, first.members[1:])
    assert "inc.double_conv.0.weight is trained, and in neither" in faults(name, model, inputs, (bare, *middle, last))
    assert "3 begins before 2" in faults(name, model, inputs, (first, middle[0], last, middle[1]))
    lump = Block("lump", tuple(member for block in (first, *middle, last) for member in block.members))
    assert faults(name, model, inputs, (lump,)) == ["one block holds nearly all", "there are 1 blocks, not 4"]
