"""Makes the embedded sample, ``unfreeze_sched/distill/command/sample/sample.zip``, byte for byte the same each time.

Emoji glyphs (Noto Color Emoji) are pasted on crops of scikit-image's bundled photographs. The two parts share no glyph,
no group of look-alike glyphs and no photograph. Run it with the ``dev`` extra and Debian's ``fonts-noto-color-emoji``:

    python benchmarks/make_sample.py [--output ZIP] [--check] [--sheet PNG]
"""

import argparse
import functools
import hashlib
import io
import json
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, features

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "unfreeze_sched" / "distill" / "command" / "sample" / "sample.zip"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the font's only bitmap size; glyphs come out at up to 136 x 128 pixels

SIDE = 128
COUNTS = {"train": 400, "test": 200}
CLASSES = ("background", "animal", "food", "vehicle", "face")
PALETTE = ((0, 0, 0), (230, 60, 60), (70, 200, 70), (70, 110, 255), (250, 210, 40))  # of the contact sheet
OPAQUE = 128  # of 255: a pixel belongs to an object from half coverage on
QUALITY = 90  # WebP
LONG_SIDE = (34, 84)  # pixels of a glyph's longer side, before it is occluded
TILT = 50  # degrees to either side
MIN_VISIBLE = 0.5  # of an object's pixels within the frame; below it the objects are placed anew
MIN_PIXELS = 160

# A word is a group of look-alikes, which never parts: 🐱 and 🐈, the cars in profile, the smiles with open mouths.
# Left out: framed scenes and glyphs of two classes (😺 🦀 🤖 🎃 🌝 ☕ 🚇 🛫).
GLYPHS = {
    "animal": (
        "🐵🐒 🦍🦧 🐶🐕🐩🦮 🐺 🦊 🦝🦡 🐱🐈 🦁 🐯🐅🐆 🐴🐎🦄 🦓 🦌 🦬🐂🐃🐄🐮 🐷🐖🐗 🐏🐑🐐 🐪🐫 🦙 🦒 🐘🦣 "
        "🦏🦛 🐭🐁🐀🐹 🐰🐇 🐿🦫 🦔 🦇 🐻 🐨 🐼 🦥 🦦 🦨 🦘 🦃 🐔🐓 🐣🐤🐥 🐦🕊 🐧 🦅 🦆🦢 🦉 🦩 🦚 🦜 🦤 🐸 "
        "🐊 🐢 🦎 🐍 🐲🐉 🦕🦖 🐳🐋🐬 🦭 🐟🐠 🐡 🦈 🐙 🦑 🐌 🦋 🐛 🐜 🐝 🪲 🐞 🦗 🕷 🦂 🦟"
    ),
    "food": (
        "🍇 🍈 🍉 🍊 🍋 🍌 🍍 🥭 🍎🍏 🍐 🍑 🍒 🍓 🫐 🥝 🍅 🫒 🥥 🥑 🍆 🥔🍠 🥕 🌽 🌶 🫑 🥒 🥬 🥦 🧄 🧅 🥜 🌰 "
        "🍞 🥐 🥖 🥨 🥯🍩 🥞 🧇 🧀 🍖🍗 🥩 🥓 🍔 🍟 🍕 🌭 🥪 🌮🥙 🌯🫔 🥚🍳 🥘🫕 🍲🥣🍜 🥗 🍿 🧈 🍱 🍘🍙 "
        "🍚🍛 🍝 🍢🍡 🍣 🍤 🥮 🥟 🍦🍧🍨 🍪 🎂🍰 🧁 🥧 🍫 🍬🍭 🍮"
    ),
    "vehicle": (
        "🚂 🚃🚋 🚄🚅 🚆🚈🚊 🚝 🚌🚎 🚍 🚐🚑 🚒 🚓🚕🚗🚙 🚔🚖🚘 🛻 🚚🚛 🚜 🏎 🏍🛵 🛺 🚲 🛴 ⛵ 🛶 🚤🛥 "
        "🛳⛴🚢 ✈🛩 🚁 🚠🚡 🚀 🛸 🦽🦼"
    ),
    "face": (
        "😀😃😄😁😆😅 🤣😂 🙂🙃☺😊 😉 😇 🥰😍😘😗😚😙 🤩 🥲😢😥😰😓 😋😛😜🤪😝 🤑 🤗🤭 🤫🤔 🤐 🤨😐😑😶 "
        "😏😒🙄 😬 🤥 😌😔😞😪 🤤 😴 😷 🤒🤕 🤢🤮 🤧 🥵 🥶 🥴😵 🤯 🤠 🥳 🥸🤓 😎 🧐 😕😟🙁☹ 😮😯😲😦😧😨 "
        "😳🥺 😭 😱 😖😣😩😫 🥱 😤😡😠🤬 😈👿 🤡 👶 👦👧🧒 👨👩🧑🧔👱 👴👵🧓 👳🧕 👮👷💂 👸🤴 🎅🤶"
    ),
}
TEST_SHARE = 1 / 3  # of each class's glyphs

# Photographs that scikit-image ships in its wheel and documents as free of copyright restrictions (which leaves out
# moon, page and stereo_motorcycle), with the regions to crop from: (left, top, right, bottom), None for all of it.
# The regions keep out what would be a class: the astronaut's face, her badge and the shuttle behind her; the
# cameraman; the coffee in the cup; the rocket; the black rim of the retina. Left out whole: chelsea (a cat), coins and
# lfw_subset (faces), horse, and what is no photograph.
Box = tuple[int, int, int, int]
PHOTOGRAPHS: dict[str, dict[str, tuple[Box, ...] | None]] = {
    "train": {
        "astronaut": ((230, 290, 512, 512),),
        "brick": None,
        "cell": None,
        "clock": None,
        "gravel": None,
        "hubble_deep_field": None,
        "immunohistochemistry": None,
        "rocket": ((0, 0, 290, 427), (360, 0, 640, 427)),
    },
    "test": {
        "camera": ((340, 0, 512, 512),),
        "coffee": ((410, 0, 600, 400), (0, 0, 170, 400)),
        "grass": None,
        "retina": ((210, 210, 1200, 1200),),
        "text": None,
    },
}


def photographs() -> dict[str, Image.Image]:
    """The photographs by name, as RGB; a grey one has three equal bands."""
    names = (name for part in PHOTOGRAPHS.values() for name in part)
    return {name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names}


def provenance(photos: dict[str, Image.Image]) -> dict[str, str]:
    """What the bytes depend on; where any of it differs, other bytes are no surprise."""
    digest = hashlib.sha256()
    for name, photo in sorted(photos.items()):
        digest.update(name.encode() + photo.tobytes())
    return {
        "font_sha256": hashlib.sha256(FONT.read_bytes()).hexdigest(),
        "photographs_sha256": digest.hexdigest(),
        "pillow": str(features.version("pil")),
        "libwebp": str(features.version("webp")),
        "zlib": str(features.version("zlib_ng") or features.version("zlib")),
        "scikit_image": version("scikit-image"),
    }


def split_glyphs() -> dict[str, dict[str, list[str]]]:
    """Part -> class -> glyphs: each class's groups, shuffled, go to the test part until it has its share."""
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name, text in GLYPHS.items():
        groups = text.split()
        random.Random(f"unfreeze-sched/split/{name}").shuffle(groups)  # noqa: S311 - reproducible, not secret
        total = sum(map(len, groups))
        test: list[str] = []
        while len(test) < round(total * TEST_SHARE):
            test += groups.pop()
        parts["train"][name], parts["test"][name] = sorted("".join(groups)), sorted(test)
    return parts


@functools.cache
def glyph(character: str) -> Image.Image:
    """A glyph as straight RGBA, cropped to what is drawn."""
    canvas = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(FONT, STRIKE)
    ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
    # On a transparent canvas PIL leaves the colours multiplied by alpha; taken as straight they'd give dark fringes.
    straight = Image.frombytes("RGBa", canvas.size, canvas.tobytes()).convert("RGBA")
    return straight.crop(straight.getbbox())


def jittered(image: Image.Image, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation changed a little."""
    for enhancer, low, high in (
        (ImageEnhance.Brightness, 0.75, 1.15),
        (ImageEnhance.Contrast, 0.8, 1.15),
        (ImageEnhance.Color, 0.6, 1.2),
    ):
        image = enhancer(image).enhance(rng.uniform(low, high))
    return image


def background(photo: Image.Image, region: Box, rng: random.Random) -> tuple[Image.Image, Box]:
    """A square crop from the region at a third of its resolution to all of it, flipped and tinted, and its box."""
    left, top, right, bottom = region
    side = rng.randint(SIDE, max(SIDE, min(384, right - left, bottom - top)))
    x, y = rng.randint(left, right - side), rng.randint(top, bottom - side)
    box = (x, y, x + side, y + side)
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BOX if side > 2 * SIDE else Image.Resampling.BICUBIC, box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # The tint keeps "grey is background" from being the whole answer.
    tables = [[round(v * scale) for v in range(256)] for scale in (rng.uniform(0.55, 1.0) for _ in range(3))]
    return crop.point([v for table in tables for v in table]), box


def layer(character: str, rng: random.Random) -> Image.Image:
    """A glyph on a transparent SIDE x SIDE layer: flipped, turned, scaled, jittered, anywhere near the inside."""
    image = glyph(character)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getbbox())
    scale = rng.uniform(*LONG_SIDE) / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    image = jittered(image, rng)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    centre = [round(rng.uniform(0.14, 0.86) * SIDE) for _ in range(2)]
    canvas.paste(image, (centre[0] - image.width // 2, centre[1] - image.height // 2))
    return canvas


def compose(base: Image.Image, objects: list[tuple[int, str]], rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """The image and its mask, later objects in front; placed anew until each object shows enough of itself."""
    while True:
        layers = [layer(character, rng) for _, character in objects]
        owner = np.zeros((SIDE, SIDE), dtype=np.uint8)  # 1-based index of the object seen at a pixel
        sizes = []
        for i, image in enumerate(layers, start=1):
            solid = np.asarray(image.getchannel("A")) >= OPAQUE
            owner[solid] = i
            sizes.append(int(solid.sum()))
        seen = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
        if all(n >= max(MIN_PIXELS, MIN_VISIBLE * size) for n, size in zip(seen, sizes, strict=True)):
            break
    result = base.convert("RGBA")
    for image in layers:
        result.alpha_composite(image)
    classes = np.array([0, *(index for index, _ in objects)], dtype=np.uint8)
    return result.convert("RGB"), Image.fromarray(classes[owner])


def deck(items: list[Any], rng: random.Random) -> Iterator[Any]:
    """Shuffled rounds of all items, so that each comes up equally often."""
    while True:
        yield from rng.sample(items, len(items))


@dataclass(frozen=True)
class Example:
    """One image, its mask and its line in the manifest."""

    image: Image.Image
    mask: Image.Image
    line: dict[str, Any]


def examples(part: str, photos: dict[str, Image.Image]) -> Iterator[Example]:
    """A part's examples, in order."""
    rng = random.Random(f"unfreeze-sched/{part}")  # noqa: S311 - reproducible, not secret
    numbers = deck([1, 2, 3], rng)
    kinds = deck(list(CLASSES[1:]), rng)
    glyphs = {name: deck(characters, rng) for name, characters in split_glyphs()[part].items()}
    sources = deck(list(PHOTOGRAPHS[part]), rng)
    for i in range(COUNTS[part]):
        photo = next(sources)
        regions = PHOTOGRAPHS[part][photo] or ((0, 0, *photos[photo].size),)
        base, box = background(photos[photo], rng.choice(regions), rng)
        names = [next(kinds) for _ in range(next(numbers))]
        objects = [(CLASSES.index(name), next(glyphs[name])) for name in names]
        image, mask = compose(base, objects, rng)
        line = {
            "name": f"{i:04d}",
            "photograph": photo,
            "box": box,
            "objects": [{"class": index, "glyph": f"U+{ord(character):04X}"} for index, character in objects],
        }
        yield Example(image, mask, line)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def archive(parts: dict[str, list[Example]], made_with: dict[str, str]) -> bytes:
    """The zip: sorted, stored, without a clock or a file mode of this machine."""
    lines = {part: [example.line for example in content] for part, content in parts.items()}
    manifest = {"classes": CLASSES, "made_with": made_with, **lines}
    files = {"manifest.json": (json.dumps(manifest, separators=(",", ":")) + "\n").encode()}
    for part, content in parts.items():
        for example in content:
            name = example.line["name"]
            files[f"{part}/images/{name}.webp"] = encoded(example.image, "WEBP", quality=QUALITY)
            files[f"{part}/masks/{name}.png"] = encoded(example.mask, "PNG", optimize=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as output:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            output.writestr(info, files[name])
    return buffer.getvalue()


def sheet(parts: dict[str, list[Example]], columns: int = 8, rows: int = 6) -> Image.Image:
    """The first examples of each part, each with its mask laid over a copy."""
    result = Image.new("RGB", (2 * columns * (SIDE + 2), len(parts) * rows * (SIDE + 2)))
    colours = np.array(PALETTE, dtype=np.float64)
    for p, content in enumerate(parts.values()):
        for i, example in enumerate(content[: columns * rows]):
            x, y = i % columns * 2 * (SIDE + 2), (i // columns + p * rows) * (SIDE + 2)
            pixels, mask = np.asarray(example.image), np.asarray(example.mask)
            mixed = np.where(mask[..., None] > 0, 0.35 * pixels + 0.65 * colours[mask], 0.5 * pixels)
            result.paste(example.image, (x, y))
            result.paste(Image.fromarray(mixed.astype(np.uint8)), (x + SIDE, y))
    return result


def summary(parts: dict[str, list[Example]], data: bytes) -> str:
    """Counts, shares of pixels and the size, as text."""
    lines = [f"{len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}"]
    for part, content in parts.items():
        masks = np.stack([np.asarray(e.mask) for e in content])
        pixels = np.bincount(masks.ravel(), minlength=len(CLASSES))
        objects = Counter(o["class"] for e in content for o in e.line["objects"])
        photos = Counter(e.line["photograph"] for e in content)
        lines.append(f"{part}: {len(content)} images, {objects.total()} objects")
        for index, name in enumerate(CLASSES):
            glyphs = len(split_glyphs()[part].get(name, ()))
            share = pixels[index] / (len(content) * SIDE**2)
            lines.append(f"  {index} {name:<10} {share:6.1%} of pixels, {objects[index]:3} objects, {glyphs:2} glyphs")
        lines.append("  on " + ", ".join(f"{name} {n}" for name, n in sorted(photos.items())))
    return "\n".join(lines)


def checked(output: Path, data: bytes, made_with: dict[str, str]) -> int:
    """0 if the file holds exactly these bytes, else 1 with a line that says what differs."""
    if not output.is_file():
        print(f"{output} is missing; run {Path(__file__).name} without --check")
        return 1
    if output.read_bytes() == data:
        print(f"{output} is up to date")
        return 0
    if not zipfile.is_zipfile(output):
        print(f"{output} is no zip file; run {Path(__file__).name} without --check")
        return 1
    with zipfile.ZipFile(output) as stored:
        then = json.loads(stored.read("manifest.json"))["made_with"]
    changed = [f"{key} {then.get(key)} -> {value}" for key, value in made_with.items() if then.get(key) != value]
    reason = "with other inputs: " + ", ".join(changed) if changed else "though its inputs are the same"
    print(f"{output} differs from what {Path(__file__).name} makes, {reason}")
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the embedded segmentation sample.")
    parser.add_argument("--output", type=Path, default=SAMPLE, help="the zip to write, or to check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the zip differs")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet with the masks laid over the images")
    options = parser.parse_args(arguments)
    if not FONT.is_file():
        parser.error(f"{FONT} is missing; install Debian's fonts-noto-color-emoji")
    photos = photographs()
    made_with = provenance(photos)
    parts = {part: list(examples(part, photos)) for part in COUNTS}
    data = archive(parts, made_with)
    if options.sheet:
        sheet(parts).save(options.sheet)
    if not options.check:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(data)
    print(summary(parts, data))
    return checked(options.output, data, made_with) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
