"""Blocks of the libraries' own models, against an oracle that shares no code with what finds them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from unfreeze_sched.model import Block, encoder_blocks

smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

# smp deprecates the `timm-` prefix, which users still have, in favour of `tu-`.
pytestmark = pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")

SEED = 3


class Case(NamedTuple):
    """A model, its encoder's parameters, and what to feed it."""

    model: nn.Module
    encoder: set[nn.Parameter]
    inputs: dict[str, Tensor]


# --- the oracle


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors(value)


def run(case: Case) -> Any:
    for module in case.model.modules():
        # Some models keep a bias that they computed in evaluation mode, together with its spent autograd graph.
        getattr(module, "attention_bias_cache", {}).clear()
    return case.model(*case.inputs.values()) if "" in case.inputs else case.model(**case.inputs)


def trained(case: Case, trainable: set[nn.Parameter]) -> set[nn.Parameter]:
    """The encoder's parameters that one real backward pass gives a gradient."""
    for parameter in case.model.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(parameter in trainable or parameter not in case.encoder)
    losses = [tensor.abs().mean() for tensor in tensors(run(case)) if tensor.requires_grad]
    if not losses:
        return set()
    torch.autograd.backward(torch.stack(losses).sum())
    return {parameter for parameter in case.encoder if parameter.grad is not None}


def first_calls(case: Case) -> dict[nn.Parameter, int]:
    """The order in which the modules that own the parameters were first called."""
    calls: dict[nn.Parameter, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            calls.setdefault(parameter, len(calls))

    # Layers, padding or activation of their own included; a module above layers runs longer than its parameters' use.
    leaves = [m for m in case.model.modules() if not any(True for child in m.children() for _ in child.parameters())]
    hooks = [module.register_forward_pre_hook(note) for module in leaves]
    with torch.no_grad():
        run(case)
    for hook in hooks:
        hook.remove()
    return calls


def faults(case: Case, blocks: Sequence[Block]) -> list[str]:
    """What is wrong with the blocks, as far as real forward and backward passes can tell."""
    case.model.eval()
    names = {parameter: name for name, parameter in case.model.named_parameters()}
    listed = [parameter for block in blocks for parameter in block.parameters()]
    held = set(listed)
    reached = trained(case, case.encoder)
    found = [f"{names[p]} is in two blocks" for p in held if sum(p is other for other in listed) > 1]
    found += [f"{names[p]} is in a block and never trained" for p in held - reached]
    found += [f"{names[p]} is trained and in no block" for p in reached - held]
    calls = first_calls(case)
    starts = [min(calls[p] for p in block.parameters() if p in calls and p.dim() > 1) for block in blocks]
    for i, (start, following) in enumerate(itertools.pairwise(starts)):
        if start >= following:
            found.append(f"{blocks[i + 1].name} begins before {blocks[i].name}")
    middle = range(len(blocks) + 1) if len(blocks) < 5 else (0, 1, 2, len(blocks) // 2, len(blocks) - 1, len(blocks))
    for n in middle:
        unfrozen = {parameter for block in blocks[len(blocks) - n :] for parameter in block.parameters()}
        if trained(case, unfrozen) != unfrozen:
            found.append(f"with {n} blocks unfrozen, others receive gradients")
    # One activation object may serve every stage; what has a state may not.
    modules = [module for block in blocks for module in set(block.modules()) if any(True for _ in module.buffers())]
    if len(set(modules)) != len(modules):
        found.append("a module is in two blocks")
    return found


# --- the models


def segmenter(name: str, architecture: str = "Unet", size: int = 64, **keywords: Any) -> Case:
    model = getattr(smp, architecture)(name, encoder_weights=None, **keywords)
    return Case(
        model, set(model.encoder.parameters()), {"": torch.randn(1, keywords.get("in_channels", 3), size, size)}
    )


def smp_encoder(name: str, size: int = 64, **keywords: Any) -> Case:
    model = smp.encoders.get_encoder(name, weights=None, **keywords)
    return Case(model, set(model.parameters()), {"": torch.randn(1, 3, size, size)})


def timm_model(name: str, size: int | None = None, **keywords: Any) -> Case:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, **keywords)
    heads = model.get_classifier() if hasattr(model, "get_classifier") else None
    head = (
        nn.ModuleList(heads if isinstance(heads, (tuple, list)) else [heads]) if heads is not None else nn.ModuleList()
    )
    size = size or model.pretrained_cfg["input_size"][-1]
    return Case(model, set(model.parameters()) - set(head.parameters()), {"": torch.randn(1, 3, size, size)})


def torchvision_model(name: str, head: str, size: int = 64, **keywords: Any) -> Case:
    model = torchvision.models.get_model(name, weights=None, **keywords)
    inside = {p for key, p in model.named_parameters() if not key.startswith(head)}
    return Case(model, inside, {"": torch.randn(2, 3, size, size)})


def transformers_model(name: str, config: str, inputs: dict[str, Tensor], **keywords: Any) -> Case:
    model = getattr(transformers, name)(getattr(transformers, config)(**keywords))
    return Case(model, set(model.base_model.parameters()), inputs)


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
PIXELS = {"pixel_values": torch.zeros(1, 3, 32, 32)}
PYRAMID = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}

# Name -> number of blocks: what a user of that library would call the model's stages.
SMP = {
    "resnet18": 4,
    "vgg11_bn": 8,
    "densenet121": 4,
    "mobilenet_v2": 17,
    "mit_b0": 4,
    "mobileone_s1": 5,
    "se_resnet50": 4,
    "timm-efficientnet-b0": 7,
    "timm-tf_efficientnet_lite0": 7,
    "timm-skresnet18": 4,
    "timm-regnetx_002": 4,
    "timm-regnety_002": 4,
    "timm-mobilenetv3_small_100": 6,
    "timm-gernet_s": 5,
    "timm-resnest14d": 4,
    "timm-res2net50_26w_4s": 4,
    "tu-efficientnet_b0": 7,
    "tu-tf_efficientnet_lite0": 7,
    "tu-resnet18": 4,
    "tu-convnext_atto": 4,
    "tu-mobilevit_xxs": 5,
    "tu-edgenext_xx_small": 4,
    "tu-pvt_v2_b0": 4,
    "tu-dla46_c": 4,
    "tu-hrnet_w18_small": 3,
    "tu-mambaout_femto": 4,
    "tu-ghostnet_100": 8,
    "tu-tinynet_e": 7,
}
TIMM = {
    "test_vit": 6,
    "test_byobnet": 4,
    "test_resnet": 4,
    "deit_tiny_distilled_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 4,
    "efficientnet_b0": 7,
    "levit_128s": 3,
    "xcit_nano_12_p16_224": 12,
    "repvit_m0_9": 4,
    "mixer_s32_224": 8,
    "test_efficientnet_ln": 5,
    "test_nfnet": 4,
}
TORCHVISION = {
    "resnet18": (4, "fc."),
    "mobilenet_v3_small": (11, "classifier.3."),
    "vgg11": (8, "classifier.6."),
    "alexnet": (5, "classifier.6."),
    "convnext_tiny": (4, "classifier.2."),
    "squeezenet1_1": (8, "classifier."),
    "efficientnet_b0": (7, "classifier."),
    "shufflenet_v2_x0_5": (3, "fc."),
    "regnet_y_400mf": (4, "fc."),
}
TRANSFORMERS: dict[str, tuple[int, Callable[[], Case]]] = {
    "bert": (3, lambda: transformers_model("BertModel", "BertConfig", IDS, vocab_size=50, **HIDDEN)),
    "bert-tokens": (
        3,
        lambda: transformers_model("BertForTokenClassification", "BertConfig", IDS, vocab_size=50, **HIDDEN),
    ),
    "vit": (
        3,
        lambda: transformers_model(
            "ViTForImageClassification", "ViTConfig", PIXELS, image_size=32, patch_size=8, **HIDDEN
        ),
    ),
    "segformer": (
        4,
        lambda: transformers_model("SegformerForSemanticSegmentation", "SegformerConfig", PIXELS, **PYRAMID),
    ),
    "swin": (
        2,
        lambda: transformers_model(
            "SwinModel",
            "SwinConfig",
            PIXELS,
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
    ),
}
LAYERS = {"encoder_layers": 2, "decoder_layers": 3, "num_attention_heads": 2}
WIDE = {**dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32), **LAYERS}
TEXT = {"vocab_size": 50, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, **HIDDEN}
PIXELS64 = {"pixel_values": torch.zeros(2, 3, 64, 64)}
BOTH = {**IDS, "pixel_values": torch.zeros(2, 3, 32, 32)}


class Parts(NamedTuple):
    """A model of several parts, as a user fine-tunes it: what is its head, and the blocks below that."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    head: tuple[str, ...]
    blocks: list[str]
    known: int | None = None  # the number of blocks without a head, where that is known; else it is asked for


def swin() -> Any:
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "patch_size": 4}
    return transformers.SwinConfig(image_size=64, out_features=[f"stage{i}" for i in range(1, 5)], **sizes)


def maskformer() -> nn.Module:
    wide = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    detr = transformers.DetrConfig(**wide, encoder_layers=1, decoder_layers=2, decoder_attention_heads=2, num_queries=5)
    config = transformers.MaskFormerConfig(
        backbone_config=swin(), decoder_config=detr, fpn_feature_size=32, mask_feature_size=32
    )
    return transformers.MaskFormerForInstanceSegmentation(config)  # type: ignore[no-any-return]


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(backbone_config=swin(), num_queries=5, **WIDE)
    return transformers.Mask2FormerForUniversalSegmentation(config)  # type: ignore[no-any-return]


def oneformer() -> nn.Module:
    text = {"text_encoder_width": 16, "text_encoder_num_layers": 2, "task_seq_len": 8}
    config = transformers.OneFormerConfig(
        backbone_config=swin(), num_queries=5, conv_dim=32, mask_dim=32, hidden_dim=32, **LAYERS, **text
    )
    return transformers.OneFormerForUniversalSegmentation(config)  # type: ignore[no-any-return]


def sam() -> nn.Module:
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = {"image_size": 32, "patch_size": 8}
    config = transformers.SamConfig(
        vision_config={**vision, **image, "window_size": 2, "global_attn_indexes": [2], "num_pos_feats": 4},
        prompt_encoder_config={"hidden_size": 8, "mask_input_channels": 4, **image},
        mask_decoder_config={"hidden_size": 8, "mlp_dim": 16, "iou_head_hidden_dim": 8, "num_attention_heads": 2},
    )
    return transformers.SamModel(config)  # type: ignore[no-any-return]


def towers(name: str) -> nn.Module:
    """An image and a text tower."""
    vision = {"image_size": 32, "patch_size": 8, **HIDDEN}
    text = {**TEXT, "encoder_hidden_size": 16, "sep_token_id": 2, "pad_token_id": 0}
    config = transformers.BlipConfig if name.startswith("Blip") else transformers.CLIPConfig
    return getattr(transformers, name)(  # type: ignore[no-any-return]
        config(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8)
    )


PROJECTIONS = ("visual_projection", "text_projection", "logit_scale")
BACKBONE = "model.pixel_level_module.encoder"
ABOVE = ("model.pixel_level_module.decoder", "model.transformer_module")
PARTS = {
    "maskformer": Parts(
        maskformer,
        PIXELS64,
        (*ABOVE, "class_predictor", "mask_embedder"),
        [f"{BACKBONE}.model.encoder.layers.{i}" for i in range(4)],
        known=6,  # and the two layers of its decoder: all of the base model
    ),
    "mask2former": Parts(
        mask2former,
        PIXELS64,
        (*ABOVE, "class_predictor"),
        [f"{BACKBONE}.swin.encoder.layers.{i}" for i in range(4)],
        known=8,
    ),
    "oneformer": Parts(
        oneformer,
        {**PIXELS64, "task_inputs": torch.zeros(2, 8)},
        (*ABOVE, "model.task_encoder"),
        [f"{BACKBONE}.swin.encoder.layers.{i}" for i in range(4)],
    ),
    "sam": Parts(
        sam,
        {**PIXELS, "input_points": torch.zeros(1, 1, 1, 2)},
        ("prompt_encoder", "mask_decoder"),
        [f"vision_encoder.layers.{i}" for i in range(3)],
    ),
    "clip": Parts(
        lambda: towers("CLIPModel"),
        BOTH,
        PROJECTIONS,
        [f"{tower}_model.encoder.layers.{i}" for i in range(3) for tower in ("vision", "text")],
    ),
    "blip": Parts(
        lambda: towers("BlipForImageTextRetrieval"),
        BOTH,
        ("itm_head", "vision_proj", "text_proj"),
        [
            *(f"vision_model.encoder.layers.{i}" for i in range(3)),
            *(f"text_encoder.encoder.layer.{i}" for i in range(3)),
        ],
    ),
    "blip captions": Parts(
        lambda: towers("BlipForConditionalGeneration"),
        BOTH,
        ("text_decoder.cls",),
        [
            *(f"vision_model.encoder.layers.{i}" for i in range(3)),
            *(f"text_decoder.bert.encoder.layer.{i}" for i in range(3)),
        ],
    ),
}
SPECIAL: dict[str, tuple[int, Callable[[], Case]]] = {
    # One stage fewer is used, and what is past it would be dead.
    "smp depth 3": (2, lambda: segmenter("resnet18", encoder_depth=3, decoder_channels=(16, 16, 16))),
    "smp grey": (7, lambda: segmenter("timm-efficientnet-b0", "FPN", in_channels=1)),
    "smp dilated": (4, lambda: segmenter("resnet18", "DeepLabV3Plus")),
    "smp two heads": (4, lambda: segmenter("resnet18", aux_params={"classes": 2})),
    "smp encoder alone": (7, lambda: smp_encoder("timm-efficientnet-b0")),
    "smp encoder alone, universal": (7, lambda: smp_encoder("tu-tf_efficientnet_lite0")),
    "smp encoder alone, transformer": (4, lambda: smp_encoder("mit_b0")),
    "timm without classifier": (7, lambda: timm_model("efficientnet_b0", 64, num_classes=0)),
    # timm's four ways to take features: flattened, its own class, by hooks, by the model's own method.
    "timm features, flattened": (4, lambda: timm_model("resnet18", 64, features_only=True)),
    "timm features, own": (7, lambda: timm_model("efficientnet_b0", 64, features_only=True)),
    "timm features, hooks": (
        5,
        lambda: timm_model(
            "efficientnet_b0", 64, features_only=True, feature_location="expansion", out_indices=(0, 1, 2, 3)
        ),
    ),
    "timm features, getter": (6, lambda: timm_model("test_vit", features_only=True)),
    # One table of relative positions, of all layers, is first used in the first.
    "timm shared table": (
        3,
        lambda: timm_model(
            "beit_base_patch16_224",
            64,
            img_size=64,
            depth=3,
            embed_dim=24,
            num_heads=2,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
        ),
    ),
    "timm size of its own": (6, lambda: timm_model("test_vit", 96, img_size=96)),
}


QUICK = {
    *(
        "resnet18",
        "mit_b0",
        "timm-efficientnet-b0",
        "tu-tf_efficientnet_lite0",
        "tu-convnext_atto",
        "tu-hrnet_w18_small",
    ),
    *("test_vit", "test_byobnet", "levit_128s", "test_efficientnet_ln"),
    *("mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"),
}


def quick(names: Mapping[str, object]) -> list[Any]:
    """The names, all but a few of each kind marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check(case: Case, blocks: int | None) -> None:
    found = encoder_blocks(case.model)
    assert blocks is None or len(found) == blocks, [block.name for block in found]
    assert faults(case, found) == []


@pytest.mark.parametrize("name", quick(SMP))
def test_smp_models(name: str) -> None:
    """An smp model's blocks are its encoder's stages, and the oracle agrees at every step of unfreezing."""
    if name.startswith("tu-") and not timm.is_model(name.removeprefix("tu-")):
        pytest.skip(f"this timm has no {name}")
    check(segmenter(name), SMP[name])


@pytest.mark.parametrize("name", quick(TIMM))
def test_timm_models(name: str) -> None:
    """A timm model's blocks are its stages or layers, without its classifier."""
    check(timm_model(name), TIMM[name])


@pytest.mark.parametrize("name", quick(TORCHVISION))
def test_torchvision_models(name: str) -> None:
    """A torchvision classifier's blocks are its stages, without its head."""
    blocks, head = TORCHVISION[name]
    check(torchvision_model(name, head), blocks)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models(name: str) -> None:
    """A transformers model's blocks are the layers or stages of its base model."""
    blocks, make = TRANSFORMERS[name]
    check(make(), blocks)


@pytest.mark.parametrize("name", PARTS)
def test_models_of_several_parts(name: str) -> None:
    """The head is known, or asked for by name; with it, the blocks are the stages of what is below it."""
    model, inputs = PARTS[name].make(), PARTS[name].inputs
    if PARTS[name].known is None:
        with pytest.raises(
            ValueError, match=r"^`head` must say what trains .* pass head=\[\.\.\.\] with all that is new"
        ):
            encoder_blocks(model, example_input=inputs)
    else:
        assert len(encoder_blocks(model)) == PARTS[name].known
    parts = dict(model.named_modules()) | dict(model.named_parameters())
    head = [parts[key] for key in PARTS[name].head]
    blocks = encoder_blocks(model, head=head, example_input=inputs)
    assert [block.name for block in blocks] == PARTS[name].blocks
    above = {p for part in head for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
    found = faults(Case(model, set(model.parameters()) - above, inputs), blocks)
    if name == "clip":  # two towers side by side, whose blocks are in the order of depth
        found = [fault for fault in found if "begins before" not in fault]
    assert found == []


@pytest.mark.parametrize("name", SPECIAL)
def test_special_forms(name: str) -> None:
    """Depth, channels, dilation, second heads, feature extractors and shared tables do not confuse the blocks."""
    blocks, make = SPECIAL[name]
    check(make(), blocks)


@pytest.mark.parametrize("variant", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 5))])
def test_lite_encoders_have_seven_blocks(variant: int) -> None:
    """Each of the five lite encoders has one block a stage, the stem in the first, the dead head in none."""
    blocks = encoder_blocks(segmenter(f"timm-tf_efficientnet_lite{variant}").model)
    assert [block.name for block in blocks] == [f"blocks.{index}" for index in range(7)]
    assert blocks[0].member_names == ("encoder.conv_stem", "encoder.bn1", "encoder.blocks.0")
    assert [block.member_names for block in blocks[1:-1]] == [(f"encoder.blocks.{index}",) for index in range(1, 6)]
    # smp keeps the pooling that it never calls; a module without parameters goes with what is registered before it.
    assert blocks[-1].member_names == ("encoder.blocks.6", "encoder.global_pool")


def test_torchvision_segmentation_and_detection() -> None:
    """The encoder is the backbone, below a detector's pyramid, though a detector itself does not run without data."""
    segmentation = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    blocks = encoder_blocks(segmentation)
    assert [block.name for block in blocks] == ["layer1", "layer2", "layer3", "layer4"]
    inputs = {"": torch.randn(1, 3, 64, 64)}
    assert faults(Case(segmentation, set(segmentation.backbone.parameters()), inputs), blocks) == []
    detection = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    blocks = encoder_blocks(detection)
    assert len(blocks) == 15
    assert all(name.startswith("backbone.body.") for block in blocks for name in block.member_names)


# --- drawn at random


def sizes(names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except RuntimeError:  # older timm reads tensors while it builds, so that it takes memory to know
            yield name, math.inf
        else:
            yield name, sum(parameter.numel() for parameter in model.parameters())


def drawn(names: Sequence[str], count: int) -> list[str]:
    return random.Random(SEED).sample(sorted(names), count)  # noqa: S311  # a fixed seed, not a secret


@pytest.mark.slow
def test_drawn_smp_encoders() -> None:
    """What holds for the listed encoders holds for any of smp's; the first few drawn that are small enough to run."""
    cases = ((name, segmenter(name)) for name in drawn(list(smp.encoders.encoders), 30))
    small = (item for item in cases if sum(parameter.numel() for parameter in item[1].encoder) < 12_000_000)
    for name, case in itertools.islice(small, 3):
        assert faults(case, encoder_blocks(case.model)) == [], name


@pytest.mark.slow
def test_drawn_timm_models() -> None:
    """What holds for the listed models holds for any of timm's; the first few drawn that are small enough to run."""
    small = (name for name, size in sizes(drawn(timm.list_models(), 60)) if size < 12_000_000)
    for name in itertools.islice(small, 4):
        case = timm_model(name)
        assert faults(case, encoder_blocks(case.model)) == [], name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(smp.encoders.encoders))
def test_all_smp_encoders(name: str) -> None:
    """Every encoder in smp's registry passes the oracle, where it is not too large to run."""
    case = segmenter(name)
    if sum(parameter.numel() for parameter in case.encoder) > 90_000_000:
        pytest.skip("too large for a real backward pass")
    check(case, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", drawn(timm.list_models(), 150))
def test_many_timm_models(name: str) -> None:
    """Of 150 models drawn from timm's registry, each that is not too large to run passes the oracle."""
    ((_, size),) = sizes([name])
    if size > 40_000_000:
        pytest.skip("too large for a real backward pass, or of a size that this timm does not tell")
    check(timm_model(name), None)


# --- the oracle can fail


@pytest.fixture
def efficient() -> Case:
    return segmenter("timm-efficientnet-b0")


def test_the_oracle_notices_a_dead_parameter(efficient: Case) -> None:
    """A block with the head that the encoder never uses is found out by name."""
    *rest, last = encoder_blocks(efficient.model)
    dead = Block(last.name, (*last.members, efficient.model.get_submodule("encoder.conv_head")))
    assert "encoder.conv_head.weight is in a block and never trained" in faults(efficient, (*rest, dead))


def test_the_oracle_notices_a_missing_parameter(efficient: Case) -> None:
    """A first block without its stem is found out by name."""
    first, *rest = encoder_blocks(efficient.model)
    assert "encoder.conv_stem.weight is trained and in no block" in faults(
        efficient, (Block(first.name, first.members[1:]), *rest)
    )


def test_the_oracle_notices_a_wrong_order(efficient: Case) -> None:
    """Two blocks that changed places are found out."""
    first, second, *rest = encoder_blocks(efficient.model)
    assert faults(efficient, (second, first, *rest)) == ["blocks.0 begins before blocks.1"]


def test_the_oracle_notices_an_overlap(efficient: Case) -> None:
    """A module in two blocks is found out."""
    first, second, *rest = encoder_blocks(efficient.model)
    twice = Block(second.name, (*second.members, first.members[0]))
    assert "encoder.conv_stem.weight is in two blocks" in faults(efficient, (first, twice, *rest))
