"""What does a stand-in face look like, where no photograph may be had: in tests and in a first try of every command?

Forty attributes in, a drawn face out, in which hair, skin, smile, glasses, hat and the rest can be seen and so learned.
It knows nothing of stores or of real faces.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from core.text.lexicon import ATTRIBUTES

CANVAS = 256  # drawn at twice the size and shrunk: Pillow draws without antialiasing
SIZE = 128
Colour = tuple[int, int, int]


def random_attributes(rng: random.Random) -> dict[str, bool]:
    """Forty attributes that one face can have at once: one hair colour, no beard on women, bald heads without bangs."""

    def chance(p: float) -> bool:
        return rng.random() < p

    has = {name: chance(0.2) for name in ATTRIBUTES}
    male, young, smiling = chance(0.5), chance(0.7), chance(0.5)
    bald = male and chance(0.12)
    hair = rng.choice(("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"))
    beard = rng.choice((None, None, "Goatee", "Mustache", "Sideburns", "5_o_Clock_Shadow")) if male else None
    straight = chance(0.5)
    has.update(
        {name: name == hair and not bald for name in ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")},
        Male=male,
        Young=young and hair != "Gray_Hair" and not bald,
        Smiling=smiling,
        Mouth_Slightly_Open=chance(0.7 if smiling else 0.2),
        High_Cheekbones=smiling,
        Bald=bald,
        Bangs=not bald and chance(0.25),
        Straight_Hair=not bald and straight,
        Wavy_Hair=not bald and not straight,
        Receding_Hairline=not bald and has["Receding_Hairline"],
        Eyeglasses=chance(0.25),
        Blurry=chance(0.05),
        No_Beard=beard is None,
        **{name: beard == name for name in ("Goatee", "Mustache", "Sideburns", "5_o_Clock_Shadow")},
        **{name: not male and chance(0.5) for name in ("Heavy_Makeup", "Wearing_Lipstick", "Wearing_Earrings")},
        Wearing_Necklace=not male and has["Wearing_Necklace"],
        Rosy_Cheeks=not male and has["Rosy_Cheeks"],
        Wearing_Necktie=male and chance(0.3),
    )
    return has


def darker(colour: Colour, share: float) -> Colour:
    return tuple(int(part * share) for part in colour)  # type: ignore[return-value]


def draw_face(has: Mapping[str, bool], rng: random.Random, px: int = SIZE) -> np.ndarray:
    """Draw one face; `rng` gives the small differences between two images of one person. Same input, same image.

    Shapes: -> uint8 [128, 128, 3]; with px < 128 it is shrunk to px and enlarged again, as soft as a small source.
    """
    backdrop = (rng.randrange(90, 220), rng.randrange(90, 220), rng.randrange(90, 220))
    image = Image.new("RGB", (CANVAS, CANVAS), backdrop)
    draw = ImageDraw.Draw(image)
    x, y = 128 + rng.randrange(-5, 6), 132 + rng.randrange(-4, 5)
    skin: Colour = (250, 226, 210) if has["Pale_Skin"] else (224, 178, 145)
    line = darker(skin, 0.6)
    half = 72 if has["Chubby"] or has["Double_Chin"] else 62  # half the width of the head
    tall = 88 if has["Oval_Face"] else 80
    hair: Colour = darker(skin, 0.9)
    for name, colour in (
        ("Black_Hair", (28, 24, 24)),
        ("Brown_Hair", (104, 66, 38)),
        ("Blond_Hair", (232, 200, 110)),
        ("Gray_Hair", (176, 176, 180)),
    ):
        hair = colour if has[name] else hair
    long = 1 if has["Male"] else 2

    # Behind the head: hair and shoulders.
    if not has["Bald"]:
        draw.ellipse((x - half - 16, y - tall - 24, x + half + 16, y + 40 * long), fill=hair)
        if has["Wavy_Hair"]:
            for step in range(-60, 50 * long, 22):
                for side in (-1, 1):
                    middle = x + side * (half + 12)
                    draw.ellipse((middle - 17, y + step - 15, middle + 17, y + step + 15), fill=hair)
    suit = (40, 44, 60) if has["Male"] else (150, 60, 90)
    draw.rounded_rectangle((x - 105, y + tall + 14, x + 105, CANVAS + 40), 40, fill=suit)
    draw.rectangle((x - 24, y + 50, x + 24, y + tall + 28), fill=darker(skin, 0.88))
    if has["Wearing_Necktie"]:
        draw.polygon([(x - 12, y + tall + 12), (x + 12, y + tall + 12), (x, CANVAS)], fill=(170, 30, 36))
    if has["Wearing_Necklace"]:
        draw.arc((x - 40, y + tall - 24, x + 40, y + tall + 30), 10, 170, fill=(240, 206, 80), width=5)

    # The head, its beard and its hair line.
    head = (x - half, y - tall, x + half, y + tall)
    draw.ellipse(head, fill=skin)
    if has["Double_Chin"]:
        draw.arc((x - 34, y + tall - 34, x + 34, y + tall + 6), 20, 160, fill=line, width=4)
    if not has["No_Beard"]:
        shade = darker(skin, 0.75) if has["5_o_Clock_Shadow"] else darker(hair, 0.9)
        draw.chord((x - half + 3, y - tall + 20, x + half - 3, y + tall), 25, 155, fill=shade)
    if has["Goatee"]:
        draw.ellipse((x - 17, y + 56, x + 17, y + tall + 6), fill=darker(hair, 0.8))
    for side in (-1, 1):
        middle = x + side * (half - 5)
        if has["Sideburns"]:
            draw.rectangle((middle - 8, y - 30, middle + 8, y + 34), fill=hair)
        if has["Wearing_Earrings"]:
            draw.ellipse((middle - 7, y + 20, middle + 7, y + 34), fill=(250, 220, 90))
    if not has["Bald"]:
        low = y - (34 if has["Bangs"] else 62 if has["Receding_Hairline"] else 50)
        draw.chord((x - half, y - tall, x + half, 2 * low - (y - tall)), 180, 360, fill=hair)

    # Eyes, brows, nose, cheeks.
    brow = darker(hair if not has["Bald"] else (90, 70, 50), 0.8)
    lid = 4 if has["Narrow_Eyes"] else 9
    for side in (-1, 1):
        eye = x + side * 27
        if has["Heavy_Makeup"]:
            draw.ellipse((eye - 18, y - 22, eye + 18, y + 4), fill=(140, 90, 150))
        draw.ellipse((eye - 14, y - 8 - lid, eye + 14, y - 8 + lid), fill=(250, 250, 250), outline=line)
        draw.ellipse((eye - 6, y - 8 - min(6, lid), eye + 6, y - 8 + min(6, lid)), fill=(50, 60, 80))
        rise = 9 if has["Arched_Eyebrows"] else 0
        thick = 9 if has["Bushy_Eyebrows"] else 4
        points = [(eye - 17, y - 26), (eye, y - 28 - rise), (eye + 17, y - 26)]
        draw.line(points, fill=brow, width=thick, joint="curve")
        if has["Bags_Under_Eyes"]:
            draw.arc((eye - 14, y - 4, eye + 14, y + 12), 20, 160, fill=line, width=3)
        if not has["Young"]:
            draw.arc((eye - 22, y + 14, eye + 22, y + 60), 250 if side < 0 else 200, 340 if side < 0 else 290, line, 3)
        if has["Rosy_Cheeks"]:
            draw.ellipse((x + side * 40 - 13, y + 14, x + side * 40 + 13, y + 34), fill=(238, 140, 130))
        if has["High_Cheekbones"]:
            draw.arc((x + side * 40 - 14, y + 12, x + side * 40 + 14, y + 36), 200, 340, fill=line, width=2)
    if not has["Young"]:
        for step in (0, 9):
            draw.line((x - 26, y - 48 - step, x + 26, y - 48 - step), fill=line, width=2)
    wide = 15 if has["Big_Nose"] else 6 if has["Pointy_Nose"] else 9
    tip = (x, y + (40 if has["Pointy_Nose"] else 26))
    draw.polygon([(x - 3, y), (x + 3, y), (x + wide, y + 26), tip, (x - wide, y + 26)], fill=darker(skin, 0.85))

    # Mouth and what hangs over it.
    lips: Colour = (196, 30, 50) if has["Wearing_Lipstick"] else (176, 96, 88)
    thick = 10 if has["Big_Lips"] else 6
    if has["Smiling"]:
        if has["Mouth_Slightly_Open"]:
            draw.chord((x - 30, y + 20, x + 30, y + 66), 10, 170, fill=(250, 250, 246), outline=lips, width=thick - 2)
        else:
            draw.arc((x - 30, y + 16, x + 30, y + 60), 25, 155, fill=lips, width=thick)
    elif has["Mouth_Slightly_Open"]:
        draw.ellipse((x - 18, y + 40, x + 18, y + 58), fill=(90, 30, 34), outline=lips, width=thick - 2)
    else:
        draw.line((x - 22, y + 49, x + 22, y + 49), fill=lips, width=thick)
    if has["Mustache"]:
        draw.chord((x - 30, y + 27, x + 30, y + 58), 190, 350, fill=darker(hair, 0.8))
    if has["Eyeglasses"]:
        for side in (-1, 1):
            draw.ellipse((x + side * 27 - 23, y - 30, x + side * 27 + 23, y + 14), outline=(20, 20, 24), width=5)
        draw.line((x - 4, y - 8, x + 4, y - 8), fill=(20, 20, 24), width=5)
    if has["Wearing_Hat"]:
        draw.rounded_rectangle((x - half, y - tall - 40, x + half, y - 46), 26, fill=(44, 84, 140))
        draw.rectangle((x - half - 24, y - 56, x + half + 24, y - 44), fill=(30, 60, 104))

    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    if has["Blurry"]:
        image = image.filter(ImageFilter.GaussianBlur(2))
    if px < SIZE:
        image = image.resize((px, px), Image.Resampling.LANCZOS).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image)
