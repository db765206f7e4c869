"""Where do the images and latents of a job lie, and under which address does a client find them?"""

from __future__ import annotations


def image_url(job_id: str, index: int, suffix: str = "png") -> str:
    return f"/jobs/{job_id}/images/{index}.{suffix}"


def image_name(index: int, step: int | None = None) -> str:
    """The file of one image: the final one, or the preview of one step."""
    return f"{index}.png" if step is None else f"{index}-{step}.png"


def latent_name(index: int, step: int | None = None) -> str:
    """The file with the latent of that image, little-endian float32 in C order."""
    return f"{index}.f32" if step is None else f"{index}-{step}.f32"
