"""Blocks: found by structure, named by patterns, made by hand."""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import unfreeze_sched.model.division
import unfreeze_sched.model.encoder
import unfreeze_sched.model.tracing
from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.block import validate_blocks


def conv_block(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Pyramid(nn.Module):
    """An encoder with each kind of part that can stand beside its stages."""

    def __init__(self, *, head: bool = False) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.layer1 = conv_block()
        self.transition = nn.Conv2d(4, 4, 1)
        self.layer2 = conv_block()
        self.layer3 = conv_block()
        self.norm = nn.BatchNorm2d(4)
        self.side = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2) if head else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x) + self.token)
        x = self.layer2(self.transition(x))
        x = self.norm(self.layer3(x)) + self.side(x).detach()
        return x if self.fc is None else self.fc(x.mean((2, 3)))


class Segmenter(nn.Module):
    def __init__(self, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder or Pyramid()
        self.decoder = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.segmentation_head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.segmentation_head(self.decoder(self.encoder(x)))


def member_names(blocks: tuple[Block, ...]) -> list[tuple[str, ...]]:
    return [block.member_names for block in blocks]


def names(blocks: tuple[Block, ...]) -> list[str]:
    return [block.name for block in blocks]


# --- by structure


def test_every_used_parameter_goes_to_the_last_stage_that_began_before_it() -> None:
    """Stem and bare parameters join the first stage, transitions the stage before, the final norm the last."""
    blocks = encoder_blocks(Pyramid(), head=())
    assert names(blocks) == ["layer1", "layer2", "layer3"]
    assert member_names(blocks) == [("token", "stem", "layer1", "transition"), ("layer2",), ("layer3", "norm")]


def test_parameters_without_a_gradient_are_in_no_block() -> None:
    """A layer that is never called and one whose output is detached belong to no block."""
    held = {name for block in encoder_blocks(Pyramid(), head=()) for name, _ in block.named_parameters()}
    assert not any(name.startswith(("unused", "side")) for name in held)


def test_members_are_the_objects_that_their_names_lead_to() -> None:
    """A member name, followed from the model that was passed, ends at the member itself."""
    model = Segmenter()
    for block in encoder_blocks(model):
        for name, member in zip(block.member_names, block.members, strict=True):
            owner, _, key = name.rpartition(".")
            assert getattr(model.get_submodule(owner), key) is member


def test_an_encoder_beside_a_decoder_is_found() -> None:
    """Blocks are named after the encoder, members after the model, and decoder and head are in none."""
    blocks = encoder_blocks(Segmenter())
    assert names(blocks) == ["layer1", "layer2", "layer3"]
    assert member_names(blocks)[1] == ("encoder.layer2",)
    assert all(name.startswith("encoder.") for block in blocks for name in block.member_names)


def test_only_what_the_loss_can_reach_counts() -> None:
    """A decoder that reads only an early feature leaves the later stages in no block."""

    class Encoder(Pyramid):
        def forward(self, x: Tensor) -> Any:
            shallow = self.layer2(self.transition(self.layer1(self.stem(x))))
            return shallow, self.layer3(shallow)

    class Shallow(Segmenter):
        def forward(self, x: Tensor) -> Any:
            return self.segmentation_head(self.encoder(x)[0])

    assert names(encoder_blocks(Encoder(), head=())) == ["layer1", "layer2", "layer3"]
    assert names(encoder_blocks(Shallow(Encoder()))) == ["layer1", "layer2"]


@pytest.mark.parametrize("siblings", [("backbone", "classifier"), ("encoder", "task")])
def test_a_pretrained_part_beside_a_task_part_is_the_encoder(siblings: tuple[str, str]) -> None:
    """A `backbone`, or an `encoder` that runs first, is the encoder whatever the head is made of."""
    model = nn.Sequential()
    model.add_module(siblings[0], Pyramid())
    model.add_module(siblings[1], nn.Conv2d(4, 2, 3))
    assert names(encoder_blocks(model)) == ["layer1", "layer2", "layer3"]


def test_an_encoder_in_the_middle_is_not_the_whole() -> None:
    """Embeddings that run before a child called `encoder` belong to the first block."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(9, 4)
            self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))

        def forward(self, ids: Tensor) -> Any:
            return self.encoder(self.embeddings(ids))

    blocks = encoder_blocks(Text())
    assert names(blocks) == ["encoder.0", "encoder.1", "encoder.2"]
    assert member_names(blocks)[0] == ("embeddings", "encoder.0")


def test_a_model_that_is_all_head_is_refused() -> None:
    """Nothing is left to unfreeze where the model's own method names its only layer as the classifier."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x)

        def get_classifier(self) -> nn.Module:
            return self.fc

    with pytest.raises(ValueError, match="encoder") as error:
        encoder_blocks(Probe())
    assert str(error.value) == (
        "`model` must leave an encoder below the head, got Probe without one; name the blocks with patterns="
    )


def test_parts_with_names_of_their_own_are_blocks_themselves() -> None:
    """Where no children are alike, every child with a matrix is a block, in the order of execution."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tail = conv_block()
            self.head_norm = nn.BatchNorm2d(4)
            self.middle = conv_block()
            self.entry = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head_norm(self.tail(self.middle(self.entry(x))))

    assert names(encoder_blocks(Named(), head=())) == ["entry", "middle", "tail"]


def test_a_single_layer_is_a_single_block() -> None:
    """A model that is one layer is one block, which holds the model itself."""
    layer = nn.Conv2d(3, 4, 1)
    (block,) = encoder_blocks(layer, head=())
    assert (block.name, block.members, block.member_names) == ("Conv2d", (layer,), ("",))


def test_stems_and_transitions_in_one_row_with_the_stages_are_no_blocks() -> None:
    """In one numbered row, layers between stages of blocks go with the stage before, the first with the first."""

    def stage() -> nn.Sequential:
        return nn.Sequential(conv_block(), conv_block())

    model = nn.Sequential(nn.Conv2d(3, 4, 1), stage(), nn.Conv2d(4, 4, 1), stage())
    assert member_names(encoder_blocks(model, head=())) == [("0", "1", "2"), ("3",)]


def test_torch_transformer_layers_are_found() -> None:
    """The transformer encoder of torch gives one block a layer, without its fused inference path."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    blocks = encoder_blocks(model, example_input=torch.zeros(1, 5, 8), head=())
    assert names(blocks) == ["layers.0", "layers.1", "layers.2"]


def test_recurrent_layers_are_found() -> None:
    """Parameters that an LSTM keeps in lists of its own are seen as used."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn1 = nn.LSTM(6, 6, batch_first=True)
            self.rnn2 = nn.LSTM(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.rnn2(self.rnn1(x)[0])[0]

    blocks = encoder_blocks(Speech(), example_input=torch.zeros(2, 3, 6), head=())
    assert member_names(blocks) == [("rnn1",), ("rnn2",)]


def test_a_module_used_at_every_depth_is_in_one_block() -> None:
    """A layer that runs after each stage belongs to the stage after which it first ran."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2 = conv_block(), conv_block()
            self.mix = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.mix(self.layer2(self.mix(self.layer1(x))))

    assert member_names(encoder_blocks(Reused(), example_input=torch.zeros(1, 4, 8, 8), head=())) == [
        ("layer1", "mix"),
        ("layer2",),
    ]


def test_a_weight_tied_across_stages_is_in_one_block() -> None:
    """A shared weight goes where it is first used, and the other stage is divided around it."""
    convs = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    convs[2].weight = convs[0].weight
    model = nn.Sequential(*(nn.Sequential(conv, conv_block()) for conv in convs))
    assert member_names(encoder_blocks(model, head=())) == [("0",), ("1",), ("2.0.bias", "2.1")]


def test_norms_without_parameters_belong_to_the_block_they_ran_in() -> None:
    """An affine-free norm goes by execution, not by the place of its registration, and to one block only."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.BatchNorm2d(4, affine=False)
            self.early = nn.BatchNorm2d(4, affine=False)
            self.idle = nn.Dropout()
            self.layer1, self.layer2 = conv_block(), conv_block()

        def forward(self, x: Tensor) -> Any:
            return self.late(self.layer2(self.early(self.layer1(x))))

    blocks = encoder_blocks(Bare(), example_input=torch.zeros(1, 4, 8, 8), head=())
    assert member_names(blocks) == [("early", "idle", "layer1"), ("late", "layer2")]


def test_a_list_of_parameterless_modules_is_divided() -> None:
    """Each module of a list that never runs itself goes to the block in which that module ran."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drops = nn.ModuleList([nn.Dropout(), nn.Dropout()])
            self.layer1, self.layer2 = conv_block(), conv_block()

        def forward(self, x: Tensor) -> Any:
            return self.drops[1](self.layer2(self.drops[0](self.layer1(x))))

    blocks = encoder_blocks(Drops(), example_input=torch.zeros(1, 4, 8, 8), head=())
    assert member_names(blocks) == [("drops.0", "layer1"), ("drops.1", "layer2")]


def test_integer_parameters_are_skipped() -> None:
    """A parameter that cannot have a gradient is in no block, and its module is divided around it."""
    model = nn.Sequential(conv_block(), conv_block())
    model[1].register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    assert member_names(encoder_blocks(model, head=())) == [("0",), ("1.0", "1.1", "1.2")]


@pytest.mark.parametrize("old_style", [False, True])
def test_parametrized_weights_are_found(old_style: bool) -> None:
    """The parameters behind a computed weight are in the block, by parametrization and by torch's older hook."""
    stage = conv_block()
    model = nn.Sequential(conv_block(), stage)
    if old_style:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates what users still have
            nn.utils.weight_norm(stage[0])
    else:
        weight_norm(stage[0])
    blocks = encoder_blocks(model, head=())
    assert member_names(blocks) == [("0",), ("1",)]
    assert len(list(blocks[1].parameters())) == 4


def test_a_checkpointed_encoder_is_seen_through() -> None:
    """A reentrant checkpoint, which hides its inside from autograd, is off while the model is looked at."""

    class Checkpointed(Pyramid):
        grad_checkpointing = True

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            for stage in (self.layer1, self.layer2, self.layer3):
                x = checkpoint(stage, x, use_reentrant=True) if self.grad_checkpointing else stage(x)
            return x

    model = Checkpointed()
    assert names(encoder_blocks(model, head=())) == ["layer1", "layer2", "layer3"]
    assert model.grad_checkpointing


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "data_parallel", "compile", "compile_inside", "compile_in_place"])
def test_wrappers_are_looked_through(wrapper: str, process_group: None) -> None:
    """Under DDP and `torch.compile`, at any depth, the blocks and their names are those of the bare model."""
    model = Segmenter()
    bare = encoder_blocks(model)
    wrapped: Any = model
    if wrapper == "ddp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gloo's notices about the local host
            wrapped = nn.parallel.DistributedDataParallel(model)
    elif wrapper == "data_parallel":
        wrapped = nn.DataParallel(model)
    elif wrapper == "compile":
        wrapped = torch.compile(model)
    elif wrapper == "compile_inside":
        model.encoder = torch.compile(model.encoder)  # type: ignore[assignment]
    else:
        model.encoder.compile()
    for found, expected in zip(encoder_blocks(wrapped), bare, strict=True):
        assert (found.name, found.member_names) == (expected.name, expected.member_names)
        assert all(a is b for a, b in zip(found.members, expected.members, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, functools.partial(torch.autocast, "cpu")])
def test_the_surrounding_mode_does_not_matter(context: Callable[[], Any]) -> None:
    """Blocks found without gradients, in inference mode or under autocast are the same."""
    model = Pyramid()
    with context():
        assert names(encoder_blocks(model, head=())) == ["layer1", "layer2", "layer3"]


def test_a_frozen_model_has_the_same_blocks() -> None:
    """What is found does not depend on `requires_grad`, so an encoder may be frozen before."""
    assert member_names(encoder_blocks(Segmenter().requires_grad_(requires_grad=False))) == member_names(
        encoder_blocks(Segmenter())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_found(dtype: torch.dtype) -> None:
    """The guessed input has the type of the model's parameters."""
    assert names(encoder_blocks(Pyramid().to(dtype), head=())) == ["layer1", "layer2", "layer3"]


def test_a_closure_over_the_model_is_refused() -> None:
    """A function that calls the model's own layers past the copy would change their statistics, so it is stopped."""
    stages = [conv_block(3), conv_block(3), conv_block(3)]

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(stages)
            self.last = self.make_last()

        def make_last(self) -> Callable[[Tensor], Any]:
            def last(x: Tensor) -> Any:
                return stages[2](x)

            return last

        def forward(self, x: Tensor) -> Any:
            return self.last(self.stages[1](self.stages[0](x)))

    model = Closed()
    before = snapshot(model)
    with pytest.raises(ValueError, match="must run forward") as error:
        encoder_blocks(model, head=())
    assert str(error.value) == (
        "`model` must run forward on an example input, got RuntimeError: forward reaches past a copy of the model to "
        f"the model itself on (2, 3, 224, 224){FIX}"
    )
    assert same(before, snapshot(model))


# --- the model is untouched


class Watched(Pyramid):
    """A model that draws random numbers, counts its calls and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.seen.append(x)
        return super().forward(x * random.random() + torch.rand(x.shape))  # noqa: S311  # it is the state that matters


def snapshot(model: nn.Module) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": {name: id(tensor) for name, tensor in [*parameters.items(), *model.named_buffers()]},
        "versions": {name: tensor._version for name, tensor in [*parameters.items(), *model.named_buffers()]},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "grads": {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in parameters.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_finding_blocks_leaves_the_model_bit_for_bit() -> None:
    """Values, identities, versions, gradients, flags, modes, hooks, attributes and random state stay as they were."""
    model = Watched()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.layer1.eval()
    model.layer2.requires_grad_(requires_grad=False)
    fired: list[str] = []
    model.layer1.register_forward_hook(lambda *_: fired.append("forward"))
    model.layer2.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.layer3.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.stem.weight.register_hook(lambda _: fired.append("gradient"))  # type: ignore[no-untyped-call]
    before, rng, python_rng = snapshot(model), torch.get_rng_state(), random.getstate()
    encoder_blocks(model, head=())
    assert same(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert random.getstate() == python_rng
    assert (fired, model.calls, len(model.seen)) == ([], 1, 1)


def test_a_changed_model_does_not_pass_for_untouched() -> None:
    """The snapshot notices running statistics and a flag, so that the test above can fail."""
    model = Watched()
    before = snapshot(model)
    model.train()(torch.randn(2, 3, 8, 8))
    assert not same(before["state"], snapshot(model)["state"])
    model.stem.requires_grad_(requires_grad=False)
    assert not same(before["requires_grad"], snapshot(model)["requires_grad"])


def hidden_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of a library's, which shows what it holds, itself included, by its closure alone."""
    cached = functools.lru_cache(maxsize=1)(function)

    def call(*args: Any) -> Any:
        return cached(*args) if callable(call) else None

    return call


@functools.cache
def scale_of(width: int) -> Tensor:
    return torch.ones(width)


class Caching(Pyramid):
    """A model whose code keeps what it has computed for a shape, as the position embeddings of transformers do."""

    @staticmethod
    @hidden_cache
    def positions(shape: torch.Size) -> Tensor:
        return torch.zeros(shape)

    @functools.lru_cache  # noqa: B019  # as people write it
    def offset(self, width: int) -> Tensor:
        return torch.zeros(width)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + self.positions(x.shape) + self.offset(x.shape[-1])) * scale_of(1)


def test_no_cache_of_the_models_code_keeps_a_fake_tensor() -> None:
    """Once blocks were found, a forward pass gives real numbers; what was cached before and not touched stays."""
    other = scale_of(3)
    model, before = Caching(), unrelated()
    blocks = encoder_blocks(model, head=(), example_input=torch.zeros(2, 3, 8, 8))
    assert names(blocks) == ["layer1", "layer2", "layer3"]
    assert type(model(torch.zeros(2, 3, 8, 8))) is Tensor
    assert unrelated() is before
    assert scale_of(3) is not other  # the one cache is forgotten as a whole


@functools.cache
def unrelated() -> object:
    return object()


def test_no_memory_of_the_size_of_the_model_is_allocated() -> None:
    """Weights that claim 40 GB each, from one stored element, are passed through without a copy."""
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.zeros(1).expand(100_000, 100_000))
        layer.in_features = 100_000
    assert names(encoder_blocks(nn.Sequential(*layers), head=layers[2:])) == ["0", "1"]


def test_a_model_on_the_meta_device_has_blocks() -> None:
    """A model whose weights are not loaded yet has the blocks that it will have."""
    with torch.device("meta"):
        model = Segmenter()
    assert names(encoder_blocks(model)) == ["layer1", "layer2", "layer3"]


def test_hooks_that_are_part_of_the_model_run() -> None:
    """A hook that belongs to an object the model holds takes part, as in feature extractors that collect by hooks."""

    class Tap:
        def __init__(self) -> None:
            self.features: list[Tensor] = []

        def collect(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
            self.features.append(output)

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Pyramid()
            self.tap = Tap()
            self.body.layer2.register_forward_hook(self.tap.collect)

        def forward(self, x: Tensor) -> Any:
            self.tap.features.clear()
            self.body(x)
            return self.tap.features

    model = Tapped()
    assert names(encoder_blocks(model, head=())) == ["body.layer1", "body.layer2"]
    assert model.tap.features == []


def test_blocks_survive_copies_and_pickles_with_their_model() -> None:
    """A deep copy or a pickle of model and blocks together keeps the blocks' members the model's own."""
    model = Segmenter()
    blocks = encoder_blocks(model)
    for twin, copies in (copy.deepcopy((model, blocks)), pickle.loads(pickle.dumps((model, blocks)))):  # noqa: S301
        own = {id(parameter) for parameter in twin.parameters()}
        assert all(id(parameter) in own for block in copies for parameter in block.parameters())
        assert member_names(copies) == member_names(blocks)
        assert not own & {id(parameter) for parameter in model.parameters()}


# --- inputs


class Picky(nn.Module):
    """Takes two inputs, one by keyword, of a width that nothing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        return {"nested": [self.layer2(self.layer1(x.reshape(-1, 5))).unsqueeze(0) * scale]}


@pytest.mark.parametrize(
    ("example", "reached"),
    [
        ({"x": torch.zeros(2, 5), "scale": torch.ones(())}, ["layer1", "layer2"]),
        ({"x": torch.zeros(2, 10, dtype=torch.float32), "scale": torch.ones(1)}, ["layer1", "layer2"]),
    ],
)
def test_an_example_input_may_be_keywords(example: dict[str, Tensor], reached: list[str]) -> None:
    """A dict is passed as keyword arguments, and nested outputs are searched for tensors."""
    assert names(encoder_blocks(Picky(), example_input=example, head=())) == reached


def test_an_example_input_may_be_a_tensor_or_a_tuple() -> None:
    """A tensor is the only argument, a tuple the positional ones."""
    pair = nn.Bilinear(3, 4, 5)
    assert len(encoder_blocks(pair, example_input=(torch.zeros(2, 3), torch.zeros(2, 4)), head=())) == 1
    assert len(encoder_blocks(Pyramid(), example_input=torch.zeros(1, 3, 8, 8), head=())) == 3


def test_an_example_input_of_another_type_is_refused() -> None:
    """A list is neither one argument nor several, and the text says what to do."""
    with pytest.raises(TypeError) as error:
        encoder_blocks(Pyramid(), example_input=[torch.zeros(1, 3, 8, 8)], head=())
    assert str(error.value) == (
        "`example_input` must be a tensor, a tuple of positional or a dict of keyword arguments, got list; "
        "wrap a single argument of another type in a tuple"
    )


FIX = (
    "; pass example_input=, a tensor, a tuple of arguments or a dict of keyword arguments that the model accepts, "
    "or name the blocks with patterns="
)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.layer1 = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Any:
        if x.shape[-1] != 5:
            raise RuntimeError("width\nmust be 5")
        return x.detach()


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (Odd(), None, "RuntimeError: width on (2, 3, 224, 224)"),
        (Odd(), torch.zeros(1, 4), "RuntimeError: width on (1, 4)"),
        (Odd(), torch.zeros(1, 5), "an output that depends on no parameter on (1, 5)"),
        (nn.Bilinear(3, 4, 5), None, "none to try"),
    ],
)
def test_a_model_that_does_not_run_is_refused(model: nn.Module, example: Any, text: str) -> None:
    """The text names the first input that was tried and what it met, and asks for another."""
    with pytest.raises(ValueError, match="must run forward") as error:
        encoder_blocks(model, example_input=example, head=())
    assert str(error.value) == f"`model` must run forward on an example input, got {text}{FIX}"


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """The text says why, and points at patterns, which need no copy."""
    model = Pyramid()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="copyable") as error:
        encoder_blocks(model, head=())
    assert str(error.value) == (
        "`model` must be copyable, got TypeError: cannot pickle '_thread.lock' object; "
        "name the blocks with patterns=, which copies nothing"
    )
    assert len(encoder_blocks(model, patterns=[r"layer1", r"layer2"])) == 2


@pytest.mark.parametrize(
    ("model", "keywords", "kind", "text"),
    [
        ("resnet", {}, TypeError, "`model` must be a torch module, got str; pass the model itself"),
        (
            torch.jit.ScriptModule(),
            {},
            TypeError,
            "`model` must be an eager module, got a TorchScript one; find its blocks before scripting it",
        ),
        (
            nn.ReLU(),
            {},
            ValueError,
            "`model` must have parameters, got none; pass the network that is to be fine-tuned",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)),
            {},
            ValueError,
            "`model` must be initialized, got the lazy parameter '1.weight'; run one forward pass first",
        ),
        (
            nn.Linear(2, 2),
            {"patterns": ["weight"], "example_input": torch.zeros(1, 2)},
            ValueError,
            "`example_input` must be left out where patterns are given, got both; patterns need no forward pass",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_models_without_blocks_are_refused(
    model: Any, keywords: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """Each way of having nothing to unfreeze has its text."""
    with pytest.raises(kind) as error:
        encoder_blocks(model, **keywords)
    assert str(error.value) == text


# --- patterns


class Unrunnable(Segmenter):
    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError


def test_patterns_name_the_blocks_without_a_run() -> None:
    """One regex a block, shallow to deep, on qualified names; the model is never called."""
    blocks = encoder_blocks(
        Unrunnable(), patterns=[r"encoder\.(stem|token)", r"encoder\.layer1\.", r"encoder\.layer[23]\."]
    )
    assert member_names(blocks) == [
        ("encoder.token", "encoder.stem"),
        ("encoder.layer1",),
        ("encoder.layer2", "encoder.layer3"),
    ]
    assert names(blocks) == [r"encoder\.(stem|token)", r"encoder\.layer1\.", r"encoder\.layer[23]\."]


def test_blocks_by_patterns_are_named_after_their_modules() -> None:
    """Where each pattern's parameters lie in a module of their own, that module's name is the block's."""
    blocks = encoder_blocks(Unrunnable(), patterns=[r"^encoder\.layer1\.", r"layer2\.0"])
    assert names(blocks) == ["encoder.layer1", "encoder.layer2.0"]


def test_patterns_leave_out_what_they_do_not_match() -> None:
    """Modules without parameters go with the block registered before them, and with none behind a gap."""
    model = nn.Sequential(
        nn.Dropout(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.ReLU(), conv_block()
    )
    assert member_names(encoder_blocks(model, patterns=[r"^1\.", r"^5\."])) == [("1", "2"), ("5",)]


def test_patterns_see_through_wrappers() -> None:
    """Names have no wrapper's prefix, and a pattern may be anchored to them."""
    blocks = encoder_blocks(torch.compile(Unrunnable()), patterns=[r"^encoder\.layer1\."])  # type: ignore[arg-type]
    assert member_names(blocks) == [("encoder.layer1",)]


@pytest.mark.parametrize(
    ("patterns", "kind", "text"),
    [
        (
            r"encoder\.",
            TypeError,
            "`patterns` must be a list of regular expressions, got 'encoder\\\\.'; put a single one in a list",
        ),
        (5, TypeError, "`patterns` must be a list of regular expressions, got 5; put a single one in a list"),
        (
            [],
            ValueError,
            "`patterns` must hold at least one regular expression, got none; leave it out to find blocks",
        ),
        ([5], TypeError, "`patterns` must hold strings, got 5; write each block's regex as a string"),
        (
            ["encoder.("],
            ValueError,
            (
                "`patterns` must be valid regular expressions, got 'encoder.(' "
                "(missing ), unterminated subpattern at position 8); escape special characters"
            ),
        ),
        (
            [r"encoder\.layer9\."],
            ValueError,
            (
                "`patterns` must each match a parameter, got 'encoder\\\\.layer9\\\\.', which matches none; "
                "the nearest names are 'encoder.layer3', 'encoder.layer2', 'encoder.layer1'"
            ),
        ),
        (
            [r"layer1", r"layer[12]"],
            ValueError,
            (
                "`patterns` must not overlap, got 'encoder.layer1.0.weight' matched by 'layer1' and 'layer[12]'; "
                "make one of them narrower"
            ),
        ),
    ],
)
def test_broken_patterns_are_refused(patterns: Any, kind: type[Exception], text: str) -> None:
    """Each mistake in the patterns has its text, with the nearest names where nothing matches."""
    with pytest.raises(kind) as error:
        encoder_blocks(Segmenter(), patterns=patterns)
    assert str(error.value) == text


# --- by hand


def test_hand_made_blocks_pass() -> None:
    """Valid blocks come back as a tuple, in their order."""
    model = Pyramid()
    blocks = [Block("stem", (model.stem, model.token)), Block("rest", (model.layer1,))]
    assert validate_blocks(iter(blocks)) == tuple(blocks)


def inference_layer() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2, bias=False)


def computed() -> nn.Parameter:
    """A parameter that an in-place operation has made the result of another tensor."""
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    parameter.add_(torch.zeros(2, requires_grad=True))
    return parameter


SHARED = nn.Linear(2, 2)
TIED = nn.Linear(2, 2)
TIED.weight = SHARED.weight
CODES = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("blocks", "kind", "text"),
    [
        ((), ValueError, "`blocks` must hold at least one block, got none; make them with encoder_blocks(model)"),
        ((SHARED,), TypeError, "`blocks` must hold Block objects, got Linear; wrap it: Block(name, (module,))"),
        (
            (Block("a", (SHARED,)), Block("a", (nn.Linear(2, 2),))),
            ValueError,
            "`blocks` must have distinct names, got 'a' twice; rename one",
        ),
        (
            (Block("a", (SHARED,)), Block("b", (nn.Linear(2, 2), SHARED))),
            ValueError,
            "`blocks` must not share a parameter, got 'a/weight' in 'a' and 'b'; leave it in one of them",
        ),
        (
            (Block("a", (TIED,), ("net.tied",)), Block("b", (SHARED,))),
            ValueError,
            "`blocks` must not share a parameter, got 'net.tied.weight' in 'a' and 'b'; leave it in one of them",
        ),
        (
            (Block("a", (nn.Linear(2, 2), CODES)),),
            ValueError,
            (
                "`blocks` must hold trainable parameters, got 'a/1', which is of torch.int8; "
                "list the block's other members one by one"
            ),
        ),
        (
            (Block("a", (nn.LazyLinear(2),)),),
            ValueError,
            (
                "`blocks` must hold trainable parameters, got 'a/weight', which is not initialized; "
                "run one forward pass first"
            ),
        ),
        (
            (Block("a", (computed(),)),),
            ValueError,
            (
                "`blocks` must hold trainable parameters, got 'a/0', which is computed from others; "
                "list the parameter that it is computed from"
            ),
        ),
        (
            (Block("a", (inference_layer(),)),),
            ValueError,
            (
                "`blocks` must hold trainable parameters, got 'a/weight', which was made in inference mode; "
                "build the model outside of torch.inference_mode()"
            ),
        ),
    ],
)
def test_blocks_that_cannot_be_unfrozen_are_refused(blocks: Any, kind: type[Exception], text: str) -> None:
    """Each mistake in hand-made blocks has its text, with the parameter and both blocks by name."""
    with pytest.raises(kind) as error:
        validate_blocks(blocks)
    assert str(error.value) == text


# --- no table of names


def words_in_code(path: Path) -> set[str]:
    """All words of names and strings, docstrings aside."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            texts.append(node.value)
        texts += [text for key in ("id", "attr", "arg", "name") if isinstance(text := getattr(node, key, None), str)]
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def test_no_architecture_is_named() -> None:
    """The code that finds blocks mentions no family of models from any library's registry."""
    timm = pytest.importorskip("timm")
    smp = pytest.importorskip("segmentation_models_pytorch")
    torchvision = pytest.importorskip("torchvision")
    registered = [*timm.list_models(), *timm.list_modules(), *smp.encoders.encoders, *torchvision.models.list_models()]
    families = {word for name in registered for word in re.findall(r"[a-z]{4,}", name.lower())[:1]}
    families -= {"base", "next", "timm"}  # English words too, and the prefix of a library
    assert {"resnet", "efficientnet", "swin", "densenet", "convnext", "regnet"} <= families
    for module in (unfreeze_sched.model.encoder, unfreeze_sched.model.division, unfreeze_sched.model.tracing):
        assert module.__file__ is not None
        found = words_in_code(Path(module.__file__)) & families
        assert not found, f"{module.__name__} names {found}"
