"""The reference wrapper: the guide's snippets run, its loop's four defects are gone, and the teacher stays a teacher."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

smp = pytest.importorskip("segmentation_models_pytorch")

from unfreeze_sched.distill import DistillationLoss, DistillationUNetWrapper  # noqa: E402  # after the skip
from unfreeze_sched.distill.checkpoints import CheckpointError  # noqa: E402  # likewise
from unfreeze_sched.optimizer.rebuilder import BLOCK_KEY  # noqa: E402  # likewise

pytestmark = pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher's file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(smp.Unet("resnet18", encoder_weights=None).state_dict(), path)
    return path


def make(teacher: Path, *, progressive: bool = True, student: str = "resnet18", **keywords: Any) -> Any:
    keywords = {"student_weights": None, "teacher_encoder": "resnet18", **keywords}
    return DistillationUNetWrapper(
        student_encoder=student, teacher_checkpoint_path=teacher, progressive_unfreeze=progressive, **keywords
    )


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_guides_snippets(tmp_path: Path) -> None:
    """Create, schedule and loop, as the guide has them: its encoders, its Lightning file, its schedule, all 7 blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        unet = smp.Unet("timm-efficientnet-b3", encoder_weights=None)
    lightning = {"state_dict": {f"model.{key}": value for key, value in unet.state_dict().items()}, "epoch": 4}
    torch.save(lightning, tmp_path / "2020-09-23a.pth")

    model = DistillationUNetWrapper(
        student_encoder="timm-efficientnet-b0",
        teacher_checkpoint_path=tmp_path / "2020-09-23a.pth",
        progressive_unfreeze=True,
        student_weights=None,
    )
    assert torch.equal(model.teacher.segmentation_head[0].weight, unet.segmentation_head[0].weight)  # type: ignore[index]
    assert not any(p.requires_grad for p in model.student.encoder.parameters())

    schedule = model.get_progressive_unfreeze_schedule(total_epochs=50, unfreeze_start_epoch=10, unfreeze_rate=5)
    assert [schedule[epoch] for epoch in (0, 9, 10, 14, 15, 39, 40, 49)] == [0, 0, 1, 1, 2, 6, 7, 7]

    optimizer = torch.optim.AdamW(model.student.get_decoder_parameters(), lr=1e-3)
    loss_fn, images, masks = DistillationLoss(), torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    for epoch in (0, 10, 40):
        encoder_params = model.unfreeze_encoder_blocks(
            num_blocks=schedule[epoch], learning_rate_scale=0.1, optimizer=optimizer
        )
        model.train()
        student_logits, teacher_logits = model(images)
        assert student_logits.shape == teacher_logits.shape == (2, 1, 64, 64)
        loss = loss_fn(student_logits, teacher_logits, masks)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in encoder_params)
        optimizer.step()
    # From epoch 40 on all layers are unfrozen, as the guide's table says: all but those that the forward never uses.
    dead = {name for name, p in model.student.encoder.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in dead} == {"conv_head", "bn2"}
    assert [group.get(BLOCK_KEY) for group in optimizer.param_groups] == [
        None,
        *(f"blocks.{i}" for i in range(6, -1, -1)),
    ]


# The four defects of the guide's loop (trap 35).


def test_defect_1_a_resume_in_the_middle_and_a_start_at_zero(teacher: Path) -> None:
    """Any epoch can be the first one: the number of blocks is set, not waited for."""
    model = make(teacher)
    schedule = model.get_progressive_unfreeze_schedule(total_epochs=20, unfreeze_start_epoch=0, unfreeze_rate=5)
    assert len(model.unfreeze_encoder_blocks(schedule[0])) > 0
    resumed = make(teacher)
    trainable = resumed.unfreeze_encoder_blocks(schedule[12])
    stages = {name.split(".")[0] for name, p in resumed.student.encoder.named_parameters() if p.requires_grad}
    assert stages == {"layer2", "layer3", "layer4"}
    assert len(trainable) == sum(p.requires_grad for p in resumed.student.encoder.parameters())


def test_defect_2_moments_and_scheduler_are_kept(teacher: Path) -> None:
    """New blocks join the live optimizer at a fraction of the live rate; its state goes on, and the cosine drives them."""
    model = make(teacher)
    optimizer = torch.optim.AdamW(model.student.get_decoder_parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for epoch in range(3):
        model.unfreeze_encoder_blocks(epoch, 0.5, optimizer=optimizer, lr_schedulers=[scheduler])
        model.train()
        student_logits, _ = model(torch.randn(2, 3, 32, 32))
        optimizer.zero_grad()
        student_logits.square().mean().backward()
        optimizer.step()
        scheduler.step()
        head, *blocks = (group["lr"] for group in optimizer.param_groups)
        assert len(blocks) == epoch
        assert blocks == pytest.approx([head * 0.5] * epoch, rel=1e-12)
    steps = [int(optimizer.state[group["params"][0]]["step"]) for group in optimizer.param_groups]
    assert steps == [3, 2, 1]


def test_defect_3_the_segmentation_head_trains(teacher: Path) -> None:
    """Decoder parameters are those of the decoder and of the segmentation head, and of nothing else."""
    model = make(teacher)
    names = {id(p): name for name, p in model.student.named_parameters()}
    decoder = {names[id(p)] for p in model.student.get_decoder_parameters()}
    assert decoder == {name for name in names.values() if not name.startswith("encoder.")}
    assert any(name.startswith("segmentation_head.") for name in decoder)


def test_defect_4_the_teacher_stays_in_evaluation(teacher: Path) -> None:
    """`train()` leaves the teacher in evaluation, and steps leave its weights and statistics alone, to the bit."""
    model = make(teacher)
    before = statistics(model.teacher)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for _ in range(2):
        model.train()
        assert not any(module.training for module in model.teacher.modules())
        student_logits, teacher_logits = model(torch.randn(2, 3, 32, 32))
        assert not teacher_logits.requires_grad
        student_logits.sum().backward()
        optimizer.step()
    after = statistics(model.teacher)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_teacher_is_no_child(teacher: Path) -> None:
    """The teacher is in no `parameters()` and no `state_dict()`, and follows `to()`, copies and pickles."""
    model = make(teacher)
    student = {f"student.{key}" for key in model.student.state_dict()}
    assert set(model.state_dict()) == student
    assert len(list(model.parameters())) == len(list(model.student.parameters()))
    model.to(torch.float64)
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float64}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # made here
        images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        assert torch.equal(twin.eval()(images)[1], model.eval()(images)[1])
        assert twin.teacher is not model.teacher


# The encoder.


@pytest.mark.parametrize("progressive", [True, False])
def test_frozen_from_the_start_or_not(teacher: Path, progressive: bool) -> None:
    """`progressive_unfreeze` freezes the encoder in the constructor; without it what the forward uses is trainable."""
    model = make(teacher, progressive=progressive)
    assert {p.requires_grad for block in model.blocks for p in block.parameters()} == {not progressive}
    assert all(p.requires_grad for p in model.student.get_decoder_parameters())
    model.train()
    norms = [m.training for m in model.student.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(norms) == {not progressive}


def test_exactly_so_many_blocks(teacher: Path) -> None:
    """Fewer blocks than before refreezes, without an optimizer and with one."""
    model = make(teacher)
    counts = [len(model.unfreeze_encoder_blocks(number)) for number in (4, 1, 0, 2)]
    assert counts[0] > counts[3] > counts[1] > counts[2] == 0
    optimizer = torch.optim.SGD(model.student.get_decoder_parameters(), lr=0.1)
    assert [len(model.unfreeze_encoder_blocks(n, optimizer=optimizer)) for n in (4, 1, 0, 2)] == counts


def backward(model: Any) -> None:
    model.train()
    model(torch.randn(2, 3, 32, 32))[0].square().mean().backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_legitimate_loop_is_not_refused(teacher: Path, *, set_to_none: bool, first: bool) -> None:
    """Gradients cleared before the backward pass or after the step: blocks join from call to call."""
    model = make(teacher)
    optimizer = torch.optim.SGD(model.student.get_decoder_parameters(), lr=0.01)
    for number in range(3):
        model.unfreeze_encoder_blocks(number, optimizer=optimizer)
        gc.collect()
        if first:
            optimizer.zero_grad(set_to_none=set_to_none)
        backward(model)
        optimizer.step()
        if not first:
            optimizer.zero_grad(set_to_none=set_to_none)
    assert len(optimizer.param_groups) == 3


def test_a_call_within_an_accumulation_is_refused(teacher: Path) -> None:
    """As `ProgressiveUnfreezer.apply` does: nothing has changed, and after the step blocks join; also of a copied run."""
    model = make(teacher)
    optimizer = torch.optim.SGD(model.student.get_decoder_parameters(), lr=0.01)
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)
    gc.collect()
    backward(model)
    optimizer.step()
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)
    gc.collect()
    optimizer.zero_grad()
    backward(model)
    trainable = [p.requires_grad for p in model.parameters()]
    for number in (0, 2):
        with pytest.raises(RuntimeError, match="got an accumulation that is not over"):
            model.unfreeze_encoder_blocks(number, optimizer=optimizer)
    assert len(optimizer.param_groups) == 2
    assert [p.requires_grad for p in model.parameters()] == trainable
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)  # changes nothing
    optimizer.step()
    model.unfreeze_encoder_blocks(2, optimizer=optimizer)
    assert len(optimizer.param_groups) == 3


def test_the_first_step_is_watched(teacher: Path) -> None:
    """What a call unfroze is looked at in the step after it, as with an unfreezer that is kept."""
    model = make(teacher)
    optimizer = torch.optim.SGD(model.student.get_decoder_parameters(), lr=0.01)
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)
    gc.collect()
    backward(model)
    for parameter in model.blocks[-1].parameters():
        parameter.grad = None
    with pytest.warns(UserWarning, match="no gradient reached encoder.layer4.0.conv1.weight"):
        optimizer.step()
    optimizer.step()  # warnings are errors


def test_a_wrapper_keeps_no_optimizer(teacher: Path) -> None:
    """What a call leaves behind lies with the optimizer, and goes with it."""
    model = make(teacher)
    optimizer = torch.optim.SGD(model.student.get_decoder_parameters(), lr=0.01)
    model.unfreeze_encoder_blocks(1, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (5, ValueError, r"`num_blocks` must be at most 4, got 5; the encoder has no more blocks"),
        (-1, ValueError, r"`num_blocks` must be an integer of at least 0, got -1; the encoder has 4 blocks"),
        (True, TypeError, r"`num_blocks` must be an integer of at least 0, got True; the encoder has 4 blocks"),
        ("1", TypeError, r"`num_blocks` must be an integer of at least 0, got '1'; the encoder has 4 blocks"),
    ],
)
def test_a_wrong_number_of_blocks(teacher: Path, number: Any, error: type[Exception], message: str) -> None:
    """A number that the encoder does not have is refused by name, and nothing changes."""
    model = make(teacher)
    with pytest.raises(error, match=message):
        model.unfreeze_encoder_blocks(number)
    assert not any(p.requires_grad for p in model.student.encoder.parameters())


def test_schedulers_without_their_optimizer(teacher: Path) -> None:
    """LR schedulers without the optimizer would be ignored in silence; they are refused."""
    model = make(teacher)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.student.get_decoder_parameters()), 1)
    with pytest.raises(ValueError, match=r"`optimizer` must be given with `lr_schedulers`, got None; pass the one"):
        model.unfreeze_encoder_blocks(1, lr_schedulers=[scheduler])
    assert not any(p.requires_grad for p in model.student.encoder.parameters())


def test_another_teacher_cannot_be_assigned(teacher: Path) -> None:
    """Assigning a teacher would make a trained and saved child of it; it is refused."""
    model = make(teacher)
    with pytest.raises(AttributeError, match=r"`teacher` must be the one of the checkpoint, got another; make a new"):
        model.teacher = model.teacher
    assert not any(key.startswith("teacher") for key in model.state_dict())


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"classes": True}, TypeError, r"`classes` must be an integer of at least 1, got True; 1 is a binary mask"),
        ({"classes": 0}, ValueError, r"`classes` must be an integer of at least 1, got 0; 1 is a binary mask"),
        ({"student_weights": True}, TypeError, r"`student_weights` must be 'imagenet', None or a path, got True; None"),
    ],
)
def test_wrong_arguments(teacher: Path, keywords: Any, error: type[Exception], message: str) -> None:
    """Each wrong argument is named with its value and one fix."""
    with pytest.raises(error, match=message):
        make(teacher, **keywords)


# Weights that do not fit, or are not there.


def test_a_teacher_is_needed() -> None:
    """Without a teacher's file the error says how to get one."""
    with pytest.raises(
        ValueError, match=r"`teacher_checkpoint_path` must be the file of a trained teacher, got None; `unf"
    ):
        DistillationUNetWrapper(student_weights=None)


def test_a_teacher_of_other_classes_or_another_encoder(teacher: Path) -> None:
    """A teacher with other classes than the student's, or another encoder than stated, is named for what it is."""
    with pytest.raises(CheckpointError, match=r"file \(1, 16, 3, 3\), model \(5, 16, 3, 3\)"):
        make(teacher, classes=5)
    with pytest.raises(CheckpointError, match="; build the teacher as the file's model was built"):
        make(teacher, teacher_encoder="resnet34")


def test_an_unknown_encoder(teacher: Path) -> None:
    """A name that smp does not know is an error that names it."""
    with pytest.raises(ValueError, match=r"`encoder` must be a name that smp knows, got 'resnet19'; see smp"):
        make(teacher, student="resnet19")


def test_student_weights_from_a_file(teacher: Path, tmp_path: Path) -> None:
    """An encoder's file, or a whole model's, gives the student's encoder its weights."""
    model = make(teacher, student_weights=teacher)
    state = torch.load(teacher, weights_only=True)
    assert torch.equal(model.student.encoder.conv1.weight, state["encoder.conv1.weight"])
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="must fit the encoder, got"):
        make(teacher, student_weights=tmp_path / "broken.pth")


def test_imagenet_weights_without_a_hub(teacher: Path) -> None:
    """Where the hub cannot be reached, the error says what to do instead."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(
        ValueError, match=r"got 'imagenet' for 'resnet18', which cannot be downloaded here .*pass the path of a file"
    ):
        make(teacher, student_weights="imagenet")


def test_blocks_survive_synchronised_norms(teacher: Path) -> None:
    """Converted to SyncBatchNorm by timm, the student computes the same, and its blocks hold the norms that are there."""
    convert = pytest.importorskip("timm.layers").convert_sync_batchnorm
    model = make(teacher, student="timm-efficientnet-b0").eval()
    images = torch.randn(1, 3, 32, 32)
    before, names = model(images)[0], [block.name for block in model.blocks]
    convert(model.student)
    norms = {module for module in model.student.encoder.modules() if isinstance(module, nn.SyncBatchNorm)}
    assert norms
    assert torch.equal(model(images)[0], before)
    model.unfreeze_encoder_blocks(7)
    held = {module for block in model.blocks for member in block.members for module in member.modules()}
    assert {norm for norm in norms if norm not in held} == {model.student.encoder.bn2}  # which no forward uses
    assert [block.name for block in model.blocks] == names
