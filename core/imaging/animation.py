"""How do images become an animation?

As an animated WebP or GIF: every image, frames faded between neighbours, then all of it backwards, so that it runs in
a loop without a jump. It does not know where images come from; `core.imaging.image_io` reads them.

https://developers.google.com/speed/webp/docs/riff_container#animation
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from core.imaging.file_sanitizer import PictureError
from core.imaging.image_io import read_image
from core.imaging.png_metadata import XMP

MAX_FRAMES = 256


def frames(pictures: Sequence[np.ndarray], between: int) -> list[np.ndarray]:
    """The images with `between` faded frames after each but the last, then back to the second.

    Shapes: uint8 [H, W, 3] each.
    """
    there: list[np.ndarray] = []
    for one, other in zip(pictures, pictures[1:], strict=False):
        shares = np.arange(between + 1)[:, None, None, None] / (between + 1)
        there += list((one + shares * (other.astype(float) - one)).round().astype(np.uint8))
    there.append(pictures[-1])
    return there + there[-2:0:-1]


def animation(pngs: Sequence[bytes], kind: str, *, frame_ms: int, between: int) -> bytes:
    """An animation of images of one size, `kind` WEBP or GIF, that runs forward and back for ever; `frame_ms` a frame.

    Raises PictureError as `read_image`, without an image, for images of several sizes, and beyond MAX_FRAMES.
    """
    pictures = [read_image(png) for png in pngs]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise PictureError(f"an animation needs images of one size; got {len(pictures)} of {len(sizes)} sizes")
    found = frames(pictures, between)
    if len(found) > MAX_FRAMES:
        raise PictureError(f"the animation would have {len(found)} frames; at most {MAX_FRAMES} are possible")
    images = [Image.fromarray(one) for one in found]
    if kind == "GIF":  # one palette for all, of the images that were generated: frames of their own palettes flicker
        tall = Image.fromarray(np.concatenate(pictures))
        palette = tall.quantize(256, method=Image.Quantize.MEDIANCUT)
        images = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
        options = {"comment": b"DigitalSourceType: trainedAlgorithmicMedia", "optimize": False, "disposal": 1}
    else:
        options = {"quality": 85, "method": 2, "xmp": XMP.encode()}
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=frame_ms, loop=0, **options)
    return buffer.getvalue()
