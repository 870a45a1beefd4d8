"""The pictures and captions that the embedded model learns from.

A scene is one thing (an emoji glyph of the Noto Color Emoji font) at one of four placements before one of
ten drawn backgrounds, 64 x 64 pixels. Placements and backgrounds are few and fixed: a model of eight million
parameters learns them in minutes and spends the rest of its training on the things themselves.

A caption names the thing and the place in one of many wordings. Some captions are deliberately vaguer ("an
animal at the beach", "a cat", "an empty desert"), since a public prompt is.
"""

# ruff: noqa: S311 (captions and drawings are drawn by lot, not kept secret)
from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SIZE = 64
"""Width and height of a picture in pixels."""

VARIANTS = 4
"""How many drawings there are of each background."""

_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_GLYPH = 109  # the only size at which the font holds its bitmaps
_CANVAS = 256  # backgrounds are drawn at four times their size and scaled down

Canvas = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


class Thing(msgspec.Struct, frozen=True):
    """What a picture shows: a glyph, the nouns that name it (the first is its name) and its kind."""

    glyph: str
    kind: str
    nouns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The noun that identifies this thing."""
        return self.nouns[0]


class Background(msgspec.Struct, frozen=True):
    """Where a picture is set: wordings that follow a noun, and captions of the place alone."""

    name: str
    places: tuple[str, ...]
    alone: tuple[str, ...]
    draw: Callable[[Canvas, random.Random], None]


class Placement(msgspec.Struct, frozen=True):
    """How large the thing is, where its centre lies (pixels) and what a caption says of that."""

    name: str
    pixels: int
    centre: tuple[int, int]
    adjectives: tuple[str, ...] = ("",)
    positions: tuple[str, ...] = ("",)


class Scene(msgspec.Struct, frozen=True):
    """One picture, by indices into THINGS (None: an empty place), BACKGROUNDS, PLACEMENTS and VARIANTS."""

    thing: int | None
    background: int
    placement: int = 0
    variant: int = 0


class Example(msgspec.Struct, frozen=True):
    """A scene and one caption of it; a vague caption leaves out the place or what exactly the thing is."""

    scene: Scene
    caption: str
    vague: bool = False


class FontNotFound(RuntimeError):
    """The emoji font is not installed."""


# Things with large, plain and different shapes: at 8 x 8 latents a bicycle's spokes are lost.
THINGS: tuple[Thing, ...] = (
    Thing("🐱", "animal", ("cat", "kitten", "kitty")),
    Thing("🐶", "animal", ("dog", "puppy")),
    Thing("🐼", "animal", ("panda", "panda bear")),
    Thing("🐸", "animal", ("frog", "toad")),
    Thing("🐷", "animal", ("pig", "piglet")),
    Thing("🐧", "animal", ("penguin",)),
    Thing("🐟", "animal", ("fish", "blue fish")),
    Thing("🐢", "animal", ("turtle", "tortoise")),
    Thing("🦉", "animal", ("owl",)),
    Thing("🦋", "animal", ("butterfly", "orange butterfly")),
    Thing("🚗", "vehicle", ("car", "red car", "automobile")),
    Thing("🚌", "vehicle", ("bus", "coach")),
    Thing("🚜", "vehicle", ("tractor", "farm tractor")),
    Thing("🚀", "vehicle", ("rocket", "spaceship")),
    Thing("⛵", "vehicle", ("sailboat", "sailing boat")),
    Thing("🍎", "food", ("apple", "red apple")),
    Thing("🍌", "food", ("banana", "ripe banana")),
    Thing("🍓", "food", ("strawberry",)),
    Thing("🍉", "food", ("watermelon", "slice of watermelon")),
    Thing("🍔", "food", ("hamburger", "burger", "cheeseburger")),
    Thing("🍕", "food", ("pizza", "slice of pizza")),
    Thing("🍦", "food", ("ice cream", "ice cream cone")),
    Thing("🎂", "food", ("cake", "birthday cake")),
    Thing("🌵", "plant", ("cactus",)),
    Thing("🌻", "plant", ("sunflower",)),
    Thing("🌹", "plant", ("rose", "red rose")),
    Thing("🍄", "plant", ("mushroom", "toadstool")),
    Thing("🎈", "object", ("balloon", "red balloon")),
    Thing("☂", "object", ("umbrella", "purple umbrella")),
    Thing("🎸", "object", ("guitar", "electric guitar")),
    Thing("⛺", "object", ("tent", "camping tent")),
    Thing("🏠", "object", ("house", "cottage")),
)

_KINDS = {
    "animal": ("animal", "cute animal"),
    "vehicle": ("vehicle", "means of transport"),
    "food": ("food", "something to eat"),
    "plant": ("plant", "something that grows"),
    "object": ("object", "thing"),
}

PLACEMENTS: tuple[Placement, ...] = (
    Placement("middle", 42, (32, 39)),
    Placement("big", 54, (32, 36), adjectives=("big", "large", "huge")),
    Placement("left", 40, (21, 40), positions=("on the left", "on the left side")),
    Placement("right", 40, (43, 40), positions=("on the right", "on the right side")),
)

TEMPLATES: tuple[str, ...] = (
    "{subject} {place}",
    "{subject} {place}",
    "a picture of {subject} {place}",
    "a drawing of {subject} {place}",
    "a colourful illustration of {subject} {place}",
    "{subject} that is {place}",
    "{subject}, {place}",
    "there is {subject} {place}",
)


def _band(draw: Canvas, top: int, bottom: int, above: Colour, below: Colour) -> None:
    """Fill rows top to bottom with a gradient."""
    for y in range(top, bottom):
        a = (y - top) / max(1, bottom - top - 1)
        r, g, b = (round(u + (v - u) * a) for u, v in zip(above, below, strict=True))
        draw.line((0, y, _CANVAS, y), fill=(r, g, b))


def _disc(draw: Canvas, x: float, y: float, radius: float, fill: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _clouds(draw: Canvas, rng: random.Random) -> None:
    for x in (rng.randint(30, 90), rng.randint(150, 220)):
        y = rng.randint(24, 56)
        for dx, r in ((-18, 11), (0, 17), (18, 12)):
            _disc(draw, x + dx, y, r, (250, 252, 255))


def _meadow(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 140, (110, 184, 250), (206, 232, 252))
    _band(draw, 140, 256, (112, 194, 66), (62, 146, 36))
    _clouds(draw, rng)


def _beach(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 84, (96, 184, 240), (186, 224, 246))
    _band(draw, 84, 126, (24, 110, 170), (52, 150, 200))
    _band(draw, 126, 256, (246, 226, 160), (226, 192, 120))
    _disc(draw, rng.choice((40, 212)), 36, 22, (255, 226, 80))


def _snow(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 150, (170, 200, 224), (222, 232, 242))
    _band(draw, 150, 256, (246, 248, 255), (218, 226, 246))
    draw.ellipse((rng.randint(-140, 0), 120, rng.randint(180, 300), 260), fill=(240, 244, 254))
    for _ in range(26):
        _disc(draw, rng.randint(0, 255), rng.randint(0, 150), 3.5, (255, 255, 255))


def _forest(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 130, (150, 196, 160), (96, 150, 100))
    _band(draw, 130, 256, (46, 104, 44), (30, 74, 30))
    for x in range(-10, 280, 34):
        top = rng.randint(6, 46)
        draw.rectangle((x - 4, 120, x + 4, 150), fill=(84, 56, 34))
        draw.polygon(((x, top), (x - 26, 132), (x + 26, 132)), fill=(24, rng.randint(78, 104), 40))


def _desert(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 150, (250, 206, 130), (252, 232, 190))
    x = rng.choice((56, 200))
    _disc(draw, x, 40, 20, (255, 248, 206))
    draw.ellipse((x - 190, 116, x + 130, 330), fill=(214, 156, 76))
    draw.ellipse((256 - x - 160, 134, 256 - x + 170, 380), fill=(200, 138, 58))
    _band(draw, 190, 256, (204, 144, 62), (190, 126, 48))


def _street(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 150, (150, 178, 204), (198, 212, 222))
    for x in range(0, 256, 43):
        top = rng.randint(16, 64)
        grey = rng.randint(104, 132)
        draw.rectangle((x, top, x + 37, 150), fill=(grey, grey - 6, grey + 14))
        for wy in range(top + 10, 140, 22):
            for wx in (x + 7, x + 22):
                draw.rectangle((wx, wy, wx + 8, wy + 10), fill=(250, 226, 130))
    _band(draw, 150, 256, (98, 98, 102), (70, 70, 74))
    draw.rectangle((0, 222, 256, 230), fill=(238, 238, 230))


def _sea(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 220, (36, 136, 204), (10, 50, 126))
    draw.ellipse((-60, 206, 316, 330), fill=(206, 190, 128))
    for _ in range(9):
        x, y = rng.randint(10, 246), rng.randint(12, 150)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline=(170, 216, 244), width=3)
    for x in (18, 238):
        draw.arc((x - 14, 150, x + 14, 190), 90, 270, fill=(40, 150, 84), width=9)
        draw.arc((x - 14, 182, x + 14, 226), 270, 90, fill=(40, 150, 84), width=9)


def _night(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 190, (12, 10, 46), (42, 36, 88))
    _band(draw, 190, 256, (22, 32, 36), (12, 20, 22))
    for _ in range(40):
        _disc(draw, rng.randint(0, 255), rng.randint(0, 180), 2.6, (240, 240, 220))
    _disc(draw, rng.choice((40, 212)), 40, 22, (248, 242, 200))


def _sunset(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 150, (104, 46, 112), (255, 152, 62))
    x = rng.choice((60, 128, 196))
    _disc(draw, x, 130, 34, (255, 214, 96))
    _band(draw, 150, 256, (196, 82, 72), (72, 30, 86))
    for row, y in enumerate(range(160, 240, 18)):
        draw.line((x - 34 + 4 * row, y, x + 34 - 4 * row, y), fill=(255, 196, 104), width=5)


def _room(draw: Canvas, rng: random.Random) -> None:
    _band(draw, 0, 164, (240, 222, 200), (228, 202, 178))
    _band(draw, 164, 256, (160, 104, 70), (132, 82, 54))
    draw.rectangle((0, 160, 256, 168), fill=(250, 244, 236))
    x = rng.choice((14, 178))
    draw.rectangle((x, 20, x + 64, 88), fill=(252, 252, 252))
    for dx in (5, 35):
        draw.rectangle((x + dx, 25, x + dx + 24, 83), fill=(140, 200, 244))
    draw.ellipse((40, 196, 216, 246), fill=(176, 62, 62))


BACKGROUNDS: tuple[Background, ...] = (
    Background(
        "meadow",
        ("in a green meadow", "on the grass", "in a grassy field"),
        ("a green meadow under a blue sky", "an empty grassy field"),
        _meadow,
    ),
    Background(
        "beach",
        ("on a sandy beach", "at the beach", "by the sea"),
        ("an empty sandy beach", "a beach by the sea"),
        _beach,
    ),
    Background(
        "snow",
        ("in the snow", "on a snowy hill", "in a winter landscape"),
        ("a snowy winter landscape", "an empty snowy hill"),
        _snow,
    ),
    Background(
        "forest",
        ("in a forest", "in the woods", "in a pine forest"),
        ("a dark pine forest", "the woods"),
        _forest,
    ),
    Background(
        "desert",
        ("in the desert", "on a sand dune", "in a hot desert"),
        ("an empty desert", "sand dunes in the desert"),
        _desert,
    ),
    Background(
        "street",
        ("on a city street", "downtown", "in front of tall buildings"),
        ("an empty city street", "a town with tall buildings"),
        _street,
    ),
    Background(
        "sea",
        ("underwater", "at the bottom of the sea", "deep in the ocean"),
        ("the bottom of the sea", "an underwater scene"),
        _sea,
    ),
    Background(
        "night",
        ("under a starry night sky", "at night", "in the moonlight"),
        ("a starry night sky with a moon", "an empty field at night"),
        _night,
    ),
    Background(
        "sunset",
        ("at sunset", "in the evening sun", "in front of a setting sun"),
        ("a sunset", "the setting sun over water"),
        _sunset,
    ),
    Background(
        "room",
        ("in a living room", "inside a house", "indoors on a rug"),
        ("an empty living room", "a room with a window and a rug"),
        _room,
    ),
)


def _held_out() -> frozenset[tuple[int, int]]:
    """Four things for each background, by a walk that visits every thing."""
    things = list(range(len(THINGS)))
    random.Random(7).shuffle(things)
    walk = [things[i % len(things)] for i in range(4 * len(BACKGROUNDS))]
    return frozenset((thing, i % len(BACKGROUNDS)) for i, thing in enumerate(walk))


HELD_OUT: frozenset[tuple[int, int]] = _held_out()
"""Combinations of thing and background (indices) that no training picture shows."""


def with_article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    if noun in {"food"} or noun.startswith("something"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def subject(noun: str, adjective: str = "") -> str:
    """Return the noun phrase that a caption uses."""
    return with_article(f"{adjective} {noun}" if adjective else noun)


def caption(scene: Scene, rng: random.Random) -> str:
    """Return one of the wordings that name the scene's thing, place and placement."""
    background = BACKGROUNDS[scene.background]
    if scene.thing is None:
        return rng.choice(background.alone)
    placement = PLACEMENTS[scene.placement]
    noun = rng.choice(THINGS[scene.thing].nouns)
    text = rng.choice(TEMPLATES).format(
        subject=subject(noun, rng.choice(placement.adjectives)), place=rng.choice(background.places)
    )
    position = rng.choice(placement.positions)
    return f"{text}, {position}" if position else text


def vague_caption(scene: Scene, rng: random.Random) -> str:
    """Return a caption that leaves out the place or names only the kind of thing."""
    if scene.thing is None:
        return rng.choice(BACKGROUNDS[scene.background].alone)
    thing = THINGS[scene.thing]
    if rng.random() < 0.4:
        return rng.choice(("{0}", "a picture of {0}")).format(with_article(rng.choice(thing.nouns)))
    kind = with_article(rng.choice(_KINDS[thing.kind]))
    place = rng.choice(BACKGROUNDS[scene.background].places)
    return rng.choice(TEMPLATES).format(subject=kind, place=place)


def held_out_captions(count: int, seed: int = 0) -> list[Example]:
    """Return plain captions of held-out combinations, things and backgrounds as different as possible."""
    rng = random.Random(seed)
    combinations = sorted(HELD_OUT)
    rng.shuffle(combinations)
    if count > len(combinations):
        msg = f"There are {len(combinations)} held-out combinations, so {count} cannot be drawn."
        raise ValueError(msg)
    return [
        Example(
            Scene(thing, background),
            f"{with_article(THINGS[thing].name)} {rng.choice(BACKGROUNDS[background].places)}",
        )
        for thing, background in combinations[:count]
    ]


def training_examples(count: int, seed: int = 0) -> list[Example]:
    """Draw training pairs; no scene is a held-out combination."""
    rng = random.Random(seed)
    examples: list[Example] = []
    while len(examples) < count:
        kind = rng.random()
        background = rng.randrange(len(BACKGROUNDS))
        variant = rng.randrange(VARIANTS)
        if kind < 0.04:
            scene = Scene(None, background, 0, variant)
        else:
            placement = rng.choices(range(len(PLACEMENTS)), weights=(5, 2, 1.5, 1.5))[0]
            scene = Scene(rng.randrange(len(THINGS)), background, placement, variant)
            if (scene.thing, scene.background) in HELD_OUT:
                continue
        vague = kind > 0.9
        text = vague_caption(scene, rng) if vague else caption(scene, rng)
        examples.append(Example(scene, text, vague and scene.thing is not None))
    return examples


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(_FONT), _GLYPH)
    except OSError as error:
        msg = f"The emoji font is not at {_FONT}; install Debian's package fonts-noto-color-emoji."
        raise FontNotFound(msg) from error


@functools.cache
def _glyph(thing: int, pixels: int) -> Image.Image:
    """Return the thing's glyph, cropped to its ink and scaled so that its longer side has `pixels`."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), THINGS[thing].glyph, font=_font(), embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = pixels / max(ink.size)
    size = (math.ceil(ink.width * scale), math.ceil(ink.height * scale))
    return ink.resize(size, Image.Resampling.LANCZOS)


@functools.cache
def _drawing(background: int, variant: int) -> Image.Image:
    canvas = Image.new("RGB", (_CANVAS, _CANVAS))
    place = BACKGROUNDS[background]
    place.draw(ImageDraw.Draw(canvas), random.Random(f"{place.name} {variant}"))
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Returns:
        The picture, uint8 (64, 64, 3).

    Raises:
        FontNotFound: The emoji font is not installed.
    """
    picture = _drawing(scene.background, scene.variant).copy()
    if scene.thing is not None:
        placement = PLACEMENTS[scene.placement]
        glyph = _glyph(scene.thing, placement.pixels)
        x, y = placement.centre
        picture.paste(glyph, (x - glyph.width // 2, y - glyph.height // 2), glyph)
    return np.asarray(picture, dtype=np.uint8)


def render_all(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draw scenes into one array, uint8 (n, 64, 64, 3)."""
    return np.stack([render(scene) for scene in scenes])
