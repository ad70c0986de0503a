"""Where the encoder ends: known from the libraries, stated with `head=`, or asked for."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.freezing import freeze, unfreeze

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")


class Heads(nn.Module):
    """Stages, and two heads on top of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))
        self.age = nn.Linear(4, 1)
        self.sex = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        x = x.mean((2, 3))
        return self.age(x), self.drop(self.sex(x))


def members(blocks: tuple[Block, ...]) -> list[tuple[str, ...]]:
    return [block.member_names for block in blocks]


def names(blocks: tuple[Block, ...]) -> set[str]:
    return {name for block in blocks for name, _ in block.named_parameters()}


def adamw(*parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for group in parameters for p in group])


# --- stated

STAGES = [("stem", "layers.0"), ("layers.1",), ("layers.2",)]
STATED: dict[str, Callable[[Heads], Any]] = {
    "modules": lambda net: [net.age, net.sex],
    "a generator": lambda net: (module for module in (net.age, net.sex)),
    "parameters": lambda net: [*net.age.parameters(), *net.sex.parameters()],
    "both": lambda net: (net.age, *net.sex.parameters()),
    "an optimizer": lambda net: adamw(net.age.parameters(), net.sex.parameters()),
    "an optimizer with more": lambda net: adamw(
        net.age.parameters(), net.sex.parameters(), nn.Linear(1, 1).parameters()
    ),
}


@pytest.mark.parametrize("form", STATED)
def test_a_stated_head_is_in_no_block(form: str) -> None:
    """However it is stated, blocks are the stages below it, and what is without parameters above it is in none."""
    net = Heads()
    assert members(encoder_blocks(net, head=STATED[form](net))) == STAGES


def test_one_module_or_parameter_may_be_the_head() -> None:
    """A single part needs no list, and what is not stated is in a block."""
    net = Heads()
    assert "sex.1.weight" in names(encoder_blocks(net, head=net.age))
    assert "age.weight" not in names(encoder_blocks(net, head=net.age))
    found = names(encoder_blocks(net, head=net.age.weight))
    assert "age.bias" in found
    assert "age.weight" not in found


def test_an_empty_head_says_that_all_is_encoder() -> None:
    """With `()` each parameter is in a block."""
    net = Heads()
    assert names(encoder_blocks(net, head=())) == {name for name, _ in net.named_parameters()}


FIX = "pass the modules that train from the start, such as head=[model.fc]"


@pytest.mark.parametrize(
    ("head", "kind", "text"),
    [
        (lambda net: "age", TypeError, f"`head` must be modules, parameters or an optimizer, got 'age'; {FIX}"),
        (lambda net: 3, TypeError, f"`head` must be modules, parameters or an optimizer, got 3; {FIX}"),
        (lambda net: ["age"], TypeError, f"`head` must hold modules or parameters, got str; {FIX}"),
        (
            lambda net: [nn.Linear(4, 1)],
            ValueError,
            f"`head` must hold parts of the model, got a Linear whose 'weight' is not in it; {FIX}",
        ),
        (
            lambda net: [nn.Parameter(torch.zeros(3))],
            ValueError,
            f"`head` must hold parts of the model, got a parameter of shape (3,) that is not in it; {FIX}",
        ),
        (
            lambda net: [nn.Identity()],
            ValueError,
            "`head` must hold parameters, got a Identity without any; leave it out of the list",
        ),
        (
            lambda net: [net.age, net.drop],
            ValueError,
            "`head` must hold parameters, got a Dropout without any; leave it out of the list",
        ),
        (
            lambda net: adamw(net.parameters()),
            ValueError,
            (
                f"`head` must hold just the head, got AdamW with all that trains of the model; {FIX}, and let "
                "ProgressiveUnfreezer.from_model take the blocks out of the optimizer"
            ),
        ),
        (
            lambda net: adamw(nn.Linear(1, 1).parameters()),
            ValueError,
            f"`head` must hold parts of the model, got AdamW with none of its parameters; {FIX}",
        ),
        (
            lambda net: net,
            ValueError,
            "`head` must leave an encoder below the head, got Heads without one; leave the encoder out of it",
        ),
    ],
)
def test_what_is_no_head_is_refused(head: Callable[[Heads], Any], kind: type[Exception], text: str) -> None:
    """Each way of not stating the head has its text."""
    net = Heads()
    with pytest.raises(kind) as error:
        encoder_blocks(net, head=head(net))
    assert str(error.value) == text


def with_fixed_tables(kind: str) -> nn.Module:
    """A model with sin-cos tables: bare parameters, or embeddings, that are not trainable."""
    if kind == "ViTMAE":
        return transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION))  # type: ignore[no-any-return]
    text = {"vocab_size": 30, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "d_model": 16}
    layers = {
        f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2))
    }
    return transformers.MarianModel(transformers.MarianConfig(**text, **layers))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["ViTMAE", "Marian"])
def test_an_optimizer_of_all_that_trains_holds_no_head(kind: str) -> None:
    """Where tables of positions alone are left, which do not train, nothing is left for blocks."""
    model = with_fixed_tables(kind)
    optimizer = adamw(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert len(optimizer.param_groups[0]["params"]) < len(list(model.parameters()))
    with pytest.raises(ValueError, match="with all that trains of the model"):
        encoder_blocks(model, head=optimizer)


def test_an_optimizer_beside_a_frozen_encoder_holds_the_head() -> None:
    """An encoder that was frozen before is no table: all that trains is the head then."""
    net = Heads()
    net.stem.requires_grad_(requires_grad=False)
    net.layers.requires_grad_(requires_grad=False)
    assert members(encoder_blocks(net, head=adamw(p for p in net.parameters() if p.requires_grad))) == STAGES


@pytest.mark.parametrize("head", [lambda vit: [vit], lambda vit: [vit.patch_embed, vit.blocks, vit.norm, vit.head]])
def test_a_head_of_all_modules_leaves_no_encoder(head: Callable[[Any], Any]) -> None:
    """A class token and a table of positions, which lie outside of all modules, are no encoder."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=2)
    with pytest.raises(
        ValueError, match=r"^`head` must leave an encoder below the head, got VisionTransformer without one"
    ):
        encoder_blocks(vit, head=head(vit))


def test_patterns_and_a_head_are_refused() -> None:
    """Patterns name all that is unfrozen, so a head beside them would say nothing."""
    net = Heads()
    with pytest.raises(ValueError, match="head") as error:
        encoder_blocks(net, patterns=[r"layers\."], head=[net.age])
    assert str(error.value) == (
        "`head` must be left out where patterns are given, got both; what no pattern matches is head"
    )


# --- asked


def test_an_unknown_head_is_asked_for() -> None:
    """The text shows the last children with their sizes, and both ways to answer."""
    with pytest.raises(ValueError, match="head") as error:
        encoder_blocks(nn.Sequential(Heads()))
    assert str(error.value) == (
        "`head` must say what trains from the start, got None for a Heads, whose last children are model[0].layers "
        "(84), model[0].age (5), model[0].sex (10) (parameters); pass head=[...] with all that is new, or head=() "
        "where the model is all encoder"
    )
    with pytest.raises(ValueError, match=r"got None for a Linear, which has no children; pass head=\[\.\.\.\]"):
        encoder_blocks(nn.Linear(2, 2))


class Custom(torchvision.models.ResNet):  # type: ignore[misc]
    """A user's class on top of a library's: what it added is not known."""

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"image_size": 32, "patch_size": 8, **SIZES}
IDS = torch.zeros(2, 6, dtype=torch.long)
PIXELS = torch.zeros(2, 3, 32, 32)


def clip() -> nn.Module:
    text = {"vocab_size": 50, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make", [Custom, clip, lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])]
)
def test_what_only_looks_known_is_asked_for(make: Callable[[], nn.Module]) -> None:
    """A subclass of a library's model, its parts taken apart, and two towers side by side have no known head."""
    with pytest.raises(ValueError, match="`head` must say what trains from the start"):
        encoder_blocks(make())


# --- known


def used(model: nn.Module, pixels: Tensor) -> set[str]:
    """The parameters that one real backward pass gives a gradient."""
    output = model.eval()(pixels)
    output = next(iter(output.values())) if isinstance(output, dict) else output
    while not isinstance(output, Tensor):
        output = output[0]
    output.abs().mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def replaced(model: nn.Module) -> nn.Module:
    model.classifier[6] = nn.Linear(4096, 3)
    return model


def with_token(head: str | None = None) -> nn.Module:
    config = transformers.DINOv3ViTConfig(**VISION)
    return getattr(transformers, head or "DINOv3ViTModel")(config)  # type: ignore[no-any-return]


KNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dinov3": (with_token, r"^$"),
    "dinov3 backbone": (lambda: with_token("DINOv3ViTBackbone"), r"^$"),
    "a former, which is no task": (
        lambda: transformers.PoolFormerModel(transformers.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4)),
        r"^$",
    ),
    "alexnet": (torchvision.models.alexnet, r"^classifier\.6\."),
    "alexnet with a new last layer": (lambda: replaced(torchvision.models.alexnet()), r"^classifier\.6\."),
    "two classifiers": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2), r"^head"),
    "an auxiliary classifier": (
        lambda: timm.create_model("volo_d1_224", img_size=64),
        r"^(aux_)?head\.",
    ),
    "a new fc of two layers": (lambda: with_fc(nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 2))), r"^fc\."),
    "without an fc": (lambda: with_fc(nn.Identity()), r"^$"),
    "inside of a wrapper": (lambda: nn.Sequential(torchvision.models.resnet18()), r"^0\.fc\."),
    "segmentation": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None),
        r"^classifier",
    ),
    "video": (torchvision.models.video.r3d_18, r"^fc\."),
    "a task model": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        r"^classifier\.",
    ),
    "a task model around timm's": (
        lambda: transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(architecture="resnet18", num_labels=3)
        ),
        r"^timm_model\.fc\.",
    ),
}


def with_fc(fc: nn.Module) -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = fc
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", KNOWN)
def test_known_heads(name: str) -> None:
    """Each parameter that the forward pass uses is in a block or in the head that its library states."""
    make, head = KNOWN[name]
    with torch.device("meta"):  # what gets a gradient takes no numbers, and these are large
        model = make()
        size = 32 if isinstance(model, transformers.PreTrainedModel) else 64
        pixels = torch.zeros((2, 3, 4, 32, 32) if name == "video" else (2, 3, size, size))
    expected = {key for key in used(model, pixels) if not re.search(head, key)}
    held = names(encoder_blocks(model))
    # What only training uses, such as a classifier beside the first, is in no block either.
    assert held == expected


class Backbone(nn.Module):
    """A `backbone` with an adapter below it, and parts beside it that run first."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = nn.Linear(3, 4)
        self.adapter = nn.Conv2d(1, 3, 1)
        self.backbone = Heads()
        self.backbone.age, self.backbone.sex = nn.Linear(4, 4), nn.Identity()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        meta = self.meta(x.new_zeros(len(x), 3))
        return self.head(torch.cat([meta, self.backbone(self.adapter(x))[0]], 1))


def test_what_feeds_a_named_backbone_is_in_a_block() -> None:
    """All of the backbone is encoder and so is what runs on its way in; a branch beside it is head, run it first or not."""
    with pytest.raises(ValueError, match="must run forward on an example input"):
        encoder_blocks(Backbone())  # what runs before a backbone cannot be told from the backbone alone
    blocks = encoder_blocks(Backbone(), example_input=torch.zeros(2, 1, 8, 8))
    assert members(blocks) == [
        ("adapter", "backbone.stem", "backbone.layers.0"),
        ("backbone.layers.1",),
        ("backbone.layers.2", "backbone.age"),
    ]


def test_the_last_stages_parts_are_not_lost() -> None:
    """The hidden layers of a pretrained classifier, fc6 and fc7, are in the last block."""
    last = encoder_blocks(replaced(torchvision.models.alexnet()))[-1]
    assert {"classifier.1.weight", "classifier.4.weight"} <= {name for name, _ in last.named_parameters()}


@pytest.mark.slow
def test_a_detectors_backbone_may_be_two_rows() -> None:
    """The features and the extra layers of a detector that has no pyramid are blocks one by one."""
    blocks = encoder_blocks(torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None))
    assert len(blocks) == 15
    assert all(name.startswith("backbone.") for name in names(blocks))


# --- two towers


def test_two_towers_give_their_blocks_in_the_order_of_depth() -> None:
    """Counted from the output, the n-th blocks of both towers follow each other, each with its own embeddings."""
    model: Any = clip()
    blocks = encoder_blocks(
        model,
        head=[model.visual_projection, model.text_projection, model.logit_scale],
        example_input={"input_ids": IDS, "pixel_values": PIXELS},
    )
    assert [block.name for block in blocks] == [
        f"{tower}_model.encoder.layers.{index}" for index in range(3) for tower in ("vision", "text")
    ]
    assert all(name.startswith("vision_model.") for name, _ in blocks[0].named_parameters())
    assert "text_model.embeddings" in blocks[1].member_names


def test_one_tower_at_a_time() -> None:
    """The blocks of a tower alone are the same ones."""
    model: Any = clip()
    blocks = encoder_blocks(model.vision_model)
    assert [block.name for block in blocks] == ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]


# --- inputs and hooks of transformers


def llava() -> nn.Module:
    text = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES)
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(  # type: ignore[no-any-return]
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, image_seq_length=16)
    )


def test_half_a_model_is_refused() -> None:
    """A guess of text alone would leave the vision part in no block; the text names it, and what was left out."""
    with pytest.raises(ValueError, match="as a whole") as error:
        encoder_blocks(llava())
    assert str(error.value).startswith(
        "`model` must run as a whole, got input_ids= as a guess, which leaves out 'model.vision_tower.embeddings' (and "
    )
    assert "as well as pixel_values=, attention_mask=" in str(error.value)
    assert "; pass example_input=, a tuple of arguments or a dict of keyword arguments with all" in str(error.value)


def test_sizes_that_depend_on_values_are_found() -> None:
    """With its image, a model that counts tokens by their values gives the blocks of both parts."""
    ids = torch.tensor([[1, *[5] * 16, 2, 3]])
    blocks = encoder_blocks(llava(), example_input={"input_ids": ids, "pixel_values": PIXELS[:1]})
    assert {"vision_tower.encoder.layers.0", "language_model.layers.2"} <= {block.name for block in blocks}
    assert "model.vision_tower.embeddings" in blocks[0].member_names


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_are_found(kind: str) -> None:
    """Experts, which are called by values, are traced all at once; their implementation stays what it was."""
    more = (
        {"num_local_experts": 4}
        if kind == "Mixtral"
        else {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    )
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, num_key_value_heads=2, **more, **SIZES)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    before = model.config._experts_implementation
    blocks = encoder_blocks(model)
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert any("experts" in name for name, _ in blocks[0].named_parameters())
    assert model.config._experts_implementation == before


def longformer() -> nn.Module:
    config = transformers.LongformerConfig(vocab_size=50, attention_window=4, max_position_embeddings=32, **SIZES)
    return transformers.LongformerForSequenceClassification(config)  # type: ignore[no-any-return]


def test_a_forward_that_branches_on_values_is_refused() -> None:
    """The text says that no example helps, and the pattern that it shows is one that works."""
    model = longformer()
    with pytest.raises(ValueError, match="without data") as error:
        encoder_blocks(model)
    assert re.fullmatch(
        r"`model` must run forward without data, got GuardOnDataDependentSymNode: .*; no example_input= changes that, so "
        r"name the blocks with patterns=, one a block, such as patterns=\[r'longformer\\\.encoder\\\.layer\\\.0\\\.', \.\.\.\]",
        str(error.value),
    )
    (block,) = encoder_blocks(model, patterns=[r"longformer\.encoder\.layer\.0\."])
    assert block.member_names == ("longformer.encoder.layer.0",)


def test_a_call_that_succeeds_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The tracebacks of fake tensors on inputs that do not fit stay out of stderr."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Any:
            return self.layers(x) @ torch.zeros(32, 2)

    handler = logging.StreamHandler()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        encoder_blocks(Sized(), head=())
        assert not log.disabled
    finally:
        log.removeHandler(handler)
    assert capfd.readouterr().err == ""


def test_hooks_that_capture_outputs_are_carried() -> None:
    """A model of transformers that ran once, and so holds output-capturing hooks, has the blocks that it had before."""
    config = transformers.DPTConfig(
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        **(VISION | {"num_hidden_layers": 4}),
    )
    model = transformers.DPTForDepthEstimation(config)
    before = members(encoder_blocks(model))
    model(PIXELS)
    assert members(encoder_blocks(model)) == before
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(out_features=["stage1", "stage3"], **VISION))
    assert len(encoder_blocks(backbone)) == 3


# --- what is held fixed


@pytest.fixture
def mae() -> nn.Module:
    config = transformers.ViTMAEConfig(**VISION)
    return transformers.ViTMAEModel(config)  # type: ignore[no-any-return]


def test_what_is_held_fixed_is_in_no_block(mae: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """A sin-cos table, which is a parameter that is not trainable, is in no block, and the log names it."""
    with caplog.at_level(logging.INFO, logger="unfreeze_sched"):
        blocks = encoder_blocks(mae)
    assert "embeddings.position_embeddings" not in names(blocks)
    assert "embeddings.cls_token" in names(blocks)
    assert caplog.messages == ["held fixed, and so in no block: embeddings.position_embeddings"]


def test_blocks_found_again_are_the_same(mae: nn.Module) -> None:
    """Whatever the schedule froze or unfroze since, the blocks are the same, and what is held fixed stays out."""
    first = encoder_blocks(mae)
    for block in first:
        freeze(block)
    for number in range(len(first) + 1):
        for block in first[len(first) - number :]:
            unfreeze(block)
        assert members(encoder_blocks(mae)) == members(first)


def test_a_user_may_hold_a_part_fixed() -> None:
    """A frozen stem or norm within a trainable block stays as it is; on a frozen copy its block is the schedule's."""
    net = Heads()
    head = [net.age, net.sex]
    net.stem.requires_grad_(requires_grad=False)
    net.layers[1][1].requires_grad_(requires_grad=False)
    assert members(encoder_blocks(net, head=head)) == [("layers.0",), ("layers.1.0",), ("layers.2",)]
    net.layers.requires_grad_(requires_grad=False)
    assert members(encoder_blocks(net, head=head)) == [("layers.0",), ("layers.1.0",), ("layers.2",)]
    net.stem.requires_grad_(requires_grad=True)  # given back by the user
    twin = copy.deepcopy(net)
    assert members(encoder_blocks(twin, head=[twin.age, twin.sex]))[1:] == STAGES[1:]


def test_a_frozen_feature_encoder_stays_frozen() -> None:
    """What `freeze_feature_encoder` froze is a part of the first block, and so in none."""
    config = transformers.Wav2Vec2Config(
        vocab_size=20, conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SIZES
    )
    model = transformers.Wav2Vec2ForCTC(config)
    example = torch.zeros(2, 4000)
    assert "wav2vec2.feature_extractor" in encoder_blocks(model, example_input=example)[0].member_names
    model.freeze_feature_encoder()
    blocks = encoder_blocks(model, example_input=example)
    assert [block.name for block in blocks] == [f"encoder.layers.{i}" for i in range(3)]
    assert not any("feature_extractor" in name for name in names(blocks))


def test_a_block_frozen_as_a_whole_is_kept() -> None:
    """The schedule's own freezing looks like that."""
    net = Heads()
    net.layers[1].requires_grad_(requires_grad=False)
    assert members(encoder_blocks(net, head=[net.age, net.sex])) == STAGES


def test_patterns_leave_out_what_is_held_fixed(mae: nn.Module) -> None:
    """By patterns, too, the table is in no block."""
    (block,) = encoder_blocks(mae, patterns=[r"^embeddings\."])
    assert "embeddings.position_embeddings" not in {name for name, _ in block.named_parameters()}
