"""The reference run's data: what is read, in which order, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("segmentation_models_pytorch")
from folders import stems
from PIL import Image

from unfreeze_sched.distill.command.data import (
    CLASS_NAMES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    SegmentationData,
    epoch_generator,
    load_folders,
    load_sample,
)

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a folder of images and masks, a mask holding 0 in its left half and 1 in its right."""

    def make(names: str = "a b c", size: tuple[int, int] = (12, 8), suffix: str = ".png") -> Path:
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
        for i, name in enumerate(names.split()):
            pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{name}{suffix}")
            mask = np.zeros((size[1], size[0]), dtype=np.uint8)
            mask[:, size[0] // 2 :] = 1
            Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
        return tmp_path

    return make


def stored(file: Path) -> "np.ndarray[Any, np.dtype[Any]]":
    with Image.open(file) as image:
        return np.array(image)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# The sample


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("test", 200)])
def test_the_sample_has_its_counts_classes_and_shapes(split: Any, count: int) -> None:
    """A part of the sample gives float images and int64 masks of the requested size, and all five classes."""
    data = load_sample(split, image_size=32)
    assert (len(data), data.classes, data.class_names) == (count, 5, CLASS_NAMES)
    assert stems(data) == tuple(f"{i:04d}" for i in range(count))
    seen = set()
    for index in range(count):
        image, mask = data[index]
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
        assert (mask.shape, mask.dtype) == ((32, 32), torch.int64)
        seen |= set(mask.flatten().tolist())
    assert seen == set(range(5))


def test_the_samples_items_are_kept_decoded() -> None:
    """A second read of an item gives the same tensors, as uint8."""
    data = load_sample("test")
    image, mask = data.raw(3)
    assert image.dtype == mask.dtype == torch.uint8
    assert data.raw(3)[0] is image
    assert data.split(0.5, seed=0)[0].cache is data.cache


# A folder


def load(path: Path, **keywords: Any) -> SegmentationData:
    """The data of a folder."""
    (data,) = load_folders(path, **keywords)
    return data


def test_a_folder_is_sorted_by_stem_and_kept_nowhere(folder: Folder) -> None:
    """Items come in the order of their stems, and a file is read again when it is asked for."""
    data = load(folder("c a b"), image_size=8)
    assert (stems(data), data.class_names, data.cache) == (("a", "b", "c"), ("0", "1"), None)
    assert all(pair.classes == {0, 1} for pair in data.pairs)
    Path(data.pairs[1].image.source).unlink()  # type: ignore[arg-type]  # of a folder
    data[0]
    assert "images/b.png must be a readable image" in refused(lambda: data[1])


def test_a_mask_that_changed_is_refused(folder: Folder) -> None:
    """A value that no mask held when all were looked at has no meaning."""
    data = load(folder("a b"), image_size=8)
    Image.new("L", (12, 8), 7).save(data.pairs[1].mask.source)
    assert refused(lambda: data[1]) == (
        "masks/b.png must stay as it was at the start, got other values; start a new run"
    )


def test_an_image_is_normalised_by_band(folder: Folder) -> None:
    """The item is (v / 255 - mean) / std of the pixels, to the bit."""
    path = folder("a", size=(8, 8))
    pixels = torch.from_numpy(stored(path / "images" / "a.png")).permute(2, 0, 1)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.5, 0.5), (0.5, 0.25, 0.125))):
        image, _ = load(path, image_size=8, mean=mean, std=std)[0]
        expected = (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.equal(image, expected)


def test_other_shapes_are_cut_to_the_central_square(folder: Folder) -> None:
    """A 12 x 8 image loses 2 columns on either side, and so does its mask, before both are scaled."""
    path = folder("a", size=(12, 8))
    pixels = stored(path / "images" / "a.png")
    data = load(path, image_size=8)
    assert np.array_equal(data.raw(0)[0].permute(1, 2, 0).numpy(), pixels[:, 2:10])
    half = load(path, image_size=4)
    assert half.raw(0)[1].tolist() == [[0, 0, 1, 1]] * 4


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".JPG"])
def test_images_of_each_kind_are_read(folder: Folder, suffix: str) -> None:
    """Every suffix the text promises is read, in either case."""
    data = load(folder("a", suffix=suffix), image_size=8)
    assert data.raw(0)[0].shape == (3, 8, 8)


def test_a_mask_of_another_size_is_refused(folder: Folder) -> None:
    """A mask that has not its image's size is refused with both sizes, width first."""
    path = folder("a", size=(12, 8))
    Image.new("L", (8, 12)).save(path / "masks" / "a.png")
    assert refused(lambda: load(path)) == (
        "masks/a.png must have its image's size 12 x 8, got 8 x 12; export the mask at the image's resolution"
    )


def test_a_truncated_image_is_refused(folder: Folder) -> None:
    """A JPEG cut short is refused by name, with the decoder's reason."""
    path = folder("a", size=(64, 64), suffix=".jpg")
    file = path / "images" / "a.jpg"
    file.write_bytes(file.read_bytes()[:900])
    text = refused(lambda: load(path))
    assert text.startswith("images/a.jpg must be a readable image, got: image file is truncated")
    assert text.endswith("; export it anew, or remove it with its pair")


def test_a_truncated_mask_is_refused(folder: Folder) -> None:
    """A PNG cut short is refused by name."""
    path = folder("a", size=(64, 64))
    file = path / "masks" / "a.png"
    file.write_bytes(file.read_bytes()[:60])
    assert refused(lambda: load(path)).startswith("masks/a.png must be a readable image, got: ")


def test_a_file_that_is_no_image_is_refused(folder: Folder) -> None:
    """A text file that calls itself an image is refused."""
    path = folder("a")
    (path / "images" / "a.png").write_text("<svg/>", encoding="utf-8")
    assert refused(lambda: load(path)) == (
        "images/a.png must be a readable image, got: an unknown format; export it anew, or remove it with its pair"
    )


# Splits and epochs


def test_a_split_is_disjoint_complete_and_a_function_of_the_seed() -> None:
    """The two parts share nothing, together are everything, and another seed gives other parts."""
    data = load_sample("train")
    train, validation = data.split(0.2, seed=3)
    assert (len(train), len(validation)) == (320, 80)
    assert sorted(stems(train) + stems(validation)) == list(stems(data))
    assert list(stems(validation)) == sorted(stems(validation))
    assert stems(data.split(0.2, seed=3)[1]) == stems(validation) != stems(data.split(0.2, seed=4)[1])


def batches(data: SegmentationData, seed: int, epoch: int) -> list[torch.Tensor]:
    view = data.epoch(epoch_generator(seed, epoch), jitter=0.3)
    return [tensor for batch in DataLoader(view, batch_size=16) for tensor in batch]


def test_an_epoch_is_a_function_of_seed_and_epoch_alone() -> None:
    """Order and augmentation repeat to the bit, whatever the global generator did, and other epochs differ."""
    data, _ = load_sample("test", image_size=16).split(0.75, seed=0)
    first = batches(data, 5, 2)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(data, 5, 2), strict=True))
    for seed, epoch in ((5, 3), (2, 5)):
        assert not torch.equal(first[1], batches(data, seed, epoch)[1])


def test_an_item_of_a_view_depends_on_its_index_alone() -> None:
    """Items read backwards from a pickled view, as a loader's workers might, are those read in order."""
    data = load_sample("test", image_size=16)
    view = data.epoch(epoch_generator(5, 2), jitter=0.3)
    items = [view[index] for index in range(20)]
    copy = pickle.loads(pickle.dumps(view))  # noqa: S301 - of our own making
    for index in reversed(range(20)):
        assert all(torch.equal(a, b) for a, b in zip(items[index], copy[index], strict=True))


def test_an_epoch_draws_nothing_from_the_global_generator() -> None:
    """Reading a whole epoch leaves the global generator where it was."""
    data = load_sample("test", image_size=16)
    before = torch.random.get_rng_state()
    view = data.epoch(epoch_generator(0, 0), jitter=0.3)
    for index in range(20):
        view[index]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_view_holds_each_item_once_mirrored_with_its_mask() -> None:
    """An epoch is a permutation, and half of its items are the plain ones, the others their mirror images."""
    data = load_sample("test", image_size=16)
    view = data.epoch(epoch_generator(1, 0))
    assert sorted(view.order) == list(range(len(data)))
    assert 0.35 < sum(view.flips) / len(view) < 0.65
    for index, flipped in enumerate(view.flips):
        for seen, plain in zip(view[index], data[view.order[index]], strict=True):
            assert torch.equal(seen, plain.flip(-1) if flipped else plain)
    assert not any(data.epoch(epoch_generator(1, 0), flip=False).flips)


def test_jitter_changes_images_within_its_range_and_never_masks() -> None:
    """Brightness and contrast move by at most the jitter, values stay displayable, masks stay."""
    data = load_sample("test", image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    plain, view = (data.epoch(epoch_generator(1, 0), jitter=j) for j in (0.0, 0.3))
    assert plain.order == view.order
    assert plain.flips == view.flips
    assert all(0.7 <= f <= 1.3 for pair in view.factors for f in pair)
    for index in range(30):
        assert torch.equal(plain[index][1], view[index][1])
        assert not torch.equal(plain[index][0], view[index][0])
        assert 0 <= float(view[index][0].min()) <= float(view[index][0].max()) <= 1
