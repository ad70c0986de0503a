"""The training loop: accumulation, clipping, precision and workers, each also interrupted and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from torch.nn import functional as F  # noqa: N812  # torch's own habit

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("PIL.Image")

from tiny import InterruptedRunError, Interrupting, arm  # after the skips

from unfreeze_sched.distill.command.data import SegmentationData, load_sample
from unfreeze_sched.distill.command.training import Settings, Training

PLAIN = Settings(lr=0.01, batch_size=4, seed=0, device="cpu")


@pytest.fixture(scope="module")
def data() -> SegmentationData:
    """Ten images of 16 pixels: batches of 4, 4 and 2."""
    whole = load_sample("train", image_size=16)
    return replace(whole, pairs=whole.pairs[:10])


def mean_loss(logits: torch.Tensor, _: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """A mean over pixels, which Dice is not: the same for a batch as over its parts."""
    return F.cross_entropy(logits, masks)


def new_arm(seed: int = 0, norms: Any = "eval", loss: Any = mean_loss) -> Any:
    return replace(arm(seed, norms, classes=5), loss=loss)


def trained(data: SegmentationData, settings: Settings, folder: Path, norms: Any = "eval") -> Training:
    """A whole run."""
    own = new_arm(norms=norms)
    training = Training(own, data, data, settings)
    training.run(folder, Interrupting(last=99))
    return training


def states(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "last.pth", weights_only=True)
    for record in found["records"]:
        del record["seconds"]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"gradient_clip": 0.01},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"num_workers": 2},
        {"accumulate": 2, "gradient_clip": 0.01, "precision": "fp16", "num_workers": 1},
    ],
    ids=str,
)
def test_interrupted_and_resumed(changes: dict[str, Any], data: SegmentationData, tmp_path: Path) -> None:
    """With each of these a run that was interrupted after its second epoch ends as the whole one, to the bit."""
    settings = replace(PLAIN, **changes)
    trained(data, settings, tmp_path / "whole")
    own = new_arm()
    with pytest.raises(InterruptedRunError):
        Training(own, data, data, settings).run(tmp_path / "run", Interrupting())
    again = new_arm(1)  # other weights, which the checkpoint replaces
    resumed = Training(again, data, data, settings, checkpoint=tmp_path / "run" / "last.pth")
    assert resumed.done == resumed.steps * 2 // 3
    resumed.run(tmp_path / "run", Interrupting(last=99))
    assert differences(states(tmp_path / "run"), states(tmp_path / "whole")) == []
    plain = trained(data, PLAIN, tmp_path / "plain").parts["model"].state_dict()
    assert bool(differences(dict(plain), dict(states(tmp_path / "whole")["model"]))) == (changes != {"num_workers": 2})


def test_accumulated_batches_are_one(data: SegmentationData, tmp_path: Path) -> None:
    """Two batches of 4 are one of 8, and the last of 2 stands alone, where norms do not look at the batch."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        runs = [
            trained(data, replace(PLAIN, **changes), tmp_path / str(index), "frozen").parts
            for index, changes in enumerate(({"accumulate": 2}, {"batch_size": 8}, {}))
        ]
    finally:
        torch.set_default_dtype(default)
    accumulated, joint, plain = (run["model"].state_dict() for run in runs)
    for key, value in joint.items():
        torch.testing.assert_close(accumulated[key], value, atol=1e-9, rtol=1e-9, msg=key)
    assert runs[0]["scheduler"].state_dict() == runs[1]["scheduler"].state_dict()
    assert runs[0]["scheduler"].last_epoch == 6
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(dict(plain), dict(joint), atol=1e-4, rtol=1e-4)


def test_no_transition_within_an_accumulation(data: SegmentationData, tmp_path: Path) -> None:
    """An epoch ends with a step, so no gradient waits when blocks join."""
    own, waiting, told = new_arm(), [], []

    class Watching(Interrupting):
        def tell(self, line: str) -> None:
            told.append(line)
            waiting.extend(p for p in own.unet.parameters() if p.grad is not None)

    Training(own, data, data, replace(PLAIN, accumulate=2)).run(tmp_path, Watching(last=99))
    assert [line.partition(" joins")[0] for line in told if " joins " in line] == [
        "student, epoch 1: stage1",
        "student, epoch 2: stage0",
    ]
    assert waiting == []
    assert [record["optimizer_step"] for record in states(tmp_path)["records"]] == [0, 2, 4]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(precision: str, data: SegmentationData, tmp_path: Path) -> None:
    """No step sees gradients of a larger norm, which fp16's scale is taken out of first; without the flag they are."""
    for clip in (None, 0.01):
        norms: list[float] = []
        own = new_arm()
        training = Training(own, data, data, replace(PLAIN, gradient_clip=clip, precision=precision))

        def note(*_: Any, own: Any = own, norms: list[float] = norms) -> None:
            gradients = [p.grad for p in own.unet.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        training.parts["optimizer"].register_step_pre_hook(note)
        training.run(tmp_path / str(clip), Interrupting(last=99))
        assert len(norms) >= 8  # fp16 finds its scale
        assert (max(norms) <= 0.01 * (1 + 1e-5)) == (clip is not None)
        assert max(norms) < 10


def test_an_overflow_takes_no_step(data: SegmentationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that fp16 cannot hold halves the scale, and neither optimizer nor LR schedule moves."""
    monkeypatch.setattr(Settings, "scaler", lambda _: torch.amp.GradScaler("cpu", init_scale=1024.0))
    calls = []

    def overflowing(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return mean_loss(*tensors) * (1e38 if len(calls) == 2 else 1)

    training = Training(new_arm(loss=overflowing), data, data, replace(PLAIN, precision="fp16"))
    training.run(tmp_path, Interrupting(last=99))
    saved = states(tmp_path)
    assert saved["scaler"]["scale"] == 512
    assert saved["scaler"]["_growth_tracker"] == 7
    assert saved["scheduler"]["last_epoch"] == 8
    assert [record["optimizer_step"] for record in saved["records"]] == [0, 2, 5]


def test_the_loss_of_an_epoch_is_that_of_its_images(data: SegmentationData, tmp_path: Path) -> None:
    """Batches of 4, 4 and 2 count by their images, not one as much as another."""
    seen = []

    def noted(logits: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        loss = mean_loss(logits, targets, masks)
        seen.append((float(loss.detach()), len(masks)))
        return loss

    training = Training(new_arm(loss=noted), data, data, PLAIN)
    training.run(tmp_path, Interrupting(last=99))
    recorded = [record["train_loss"] for record in states(tmp_path)["records"]]
    for epoch, loss in enumerate(recorded):
        batches = seen[6 * epoch : 6 * epoch + 3]  # then those of the validation
        assert [number for _, number in batches] == [4, 4, 2]
        assert loss == pytest.approx(sum(each * number for each, number in batches) / 10, rel=1e-12)
