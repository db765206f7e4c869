"""How does an image of any size, mode and orientation become 128x128 RGB?

CelebA's aligned images have their window, shards are cut already, and a person's own images are cut as `CROPS` says. It
does not know where images come from or what is said of them.

The window is cut from CelebA's aligned images: https://arxiv.org/abs/1411.7766
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

SIZE = 128  # side of every prepared image
ALIGNED = (178, 218)  # width and height of CelebA's aligned images
WINDOW = (9, 44, 169, 204)  # 160x160 centred on (89, 124): whole head, eyes at 42 % of the height
EYES = 38.5  # pixels between the eyes in aligned images, whose middle lies at 42 % of the window's height
SMALLEST = 16  # pixels on the shorter side of a person's own image
CROPS = {
    "center": "the central square", "top": "the square at the top (of a tall image, of a wide one the centre)",
    "pad": "the whole image, on white", "face": "the window of CelebA around the eyes, where landmarks are given",
}
Box = tuple[float, float, float, float]  # left, top, right, bottom


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode, any EXIF orientation -> upright RGB; transparency lies on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def face_window(left_eye: tuple[float, float], right_eye: tuple[float, float]) -> Box:
    """The square around a face that has its eyes where CelebA's window has them; it may reach beyond the image.

    Units: pixels of the upright image. Raises ValueError where both eyes are at one place.
    """
    distance = ((left_eye[0] - right_eye[0]) ** 2 + (left_eye[1] - right_eye[1]) ** 2) ** 0.5
    if distance < 1:
        raise ValueError(f"the eyes are at {left_eye} and {right_eye}; a face has them apart")
    side = distance * (WINDOW[2] - WINDOW[0]) / EYES
    x, y = (left_eye[0] + right_eye[0]) / 2, (left_eye[1] + right_eye[1]) / 2
    left, top = x - side / 2, y - 0.42 * side
    return left, top, left + side, top + side


def square(size: tuple[int, int], crop: str) -> Box:
    """The square that "center" or "top" keeps of an image of (width, height)."""
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, 0 if crop == "top" else (height - side) // 2
    return left, top, left + side, top + side


def cut(image: Image.Image, kind: str, px: int, crop: str = "center", window: Box | None = None
        ) -> tuple[np.ndarray, int]:
    """Cut the window and bring it to 128x128, antialiased; also returns the px of the source.

    CelebA's aligned images get the window; shards are cut already and only enlarged to size; a person's own images
    are cut as ``crop`` says, at ``window`` where their landmarks gave one. The filter sees the few pixels around the
    window, as it did when the shards were cut. Raises ValueError where the size is not what the source promises.
    Shapes: RGB image of any size -> uint8 [128, 128, 3].
    """
    width, height = image.size
    side = min(width, height)
    box = square(image.size, crop)
    if window is None and (kind in ("kaggle", "official") or (kind == "captions" and image.size == ALIGNED)):
        if image.size != ALIGNED:
            raise ValueError(f"wrong size {width}x{height}, expected {ALIGNED[0]}x{ALIGNED[1]}")
        box, side = WINDOW, SIZE
    elif kind == "shards" and image.size != (px, px):
        raise ValueError(f"wrong size {width}x{height}, expected {px}x{px}")
    elif side < SMALLEST:
        raise ValueError(f"wrong size {width}x{height}, expected at least {SMALLEST}x{SMALLEST}")
    elif window is not None:
        image, box = surrounded(image, window)
        side = int(window[2] - window[0])
    elif crop == "pad" and width != height:
        side = max(width, height)
        whole = Image.new("RGB", (side, side), "white")
        whole.paste(image, ((side - width) // 2, (side - height) // 2))
        image, box = whole, (0, 0, side, side)
    if image.size != (SIZE, SIZE) or box != (0, 0, SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image), min(side, SIZE)


def surrounded(image: Image.Image, window: Box) -> tuple[Image.Image, Box]:
    """An image whose border is repeated outwards until a window lies inside it, and where the window is then.

    Raises ValueError where the window is more than three times as large as the image, or none of it lies in it.
    """
    width, height = image.size
    left, top, right, bottom = window
    if right <= 0 or bottom <= 0 or left >= width or top >= height or right - left > 3 * max(width, height):
        raise ValueError(f"its landmarks ask for a window {tuple(map(round, window))} in an image of {width}x{height}")
    before, above = max(0, int(-left) + 1), max(0, int(-top) + 1)
    after, below = max(0, int(right - width) + 1), max(0, int(bottom - height) + 1)
    pixels = np.pad(np.asarray(image), ((above, below), (before, after), (0, 0)), mode="edge")
    return Image.fromarray(pixels), (left + before, top + above, right + before, bottom + above)
