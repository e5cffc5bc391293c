"""The image of an example with the patches that each stage keeps: as data, and as part of the page."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from prunepass.plan import PrunePlan
from prunepass.report.data import Drawn, Picture
from prunepass.report.made import MadeTokens

__all__ = ["picture_figures", "picture_of"]

#: the longer side of the picture in a report, in pixels
_SIDE = 336


def picture_of(plan: PrunePlan, made: MadeTokens, inputs: Mapping[str, Any], kept: Sequence[Tensor]) -> Picture | None:
    """The first image of ``inputs``; None where the tokens are no patches in rows and columns, or nothing is pruned.

    Args:
        inputs: of the model, by name.
        kept: one [B, tokens] bool for each stage that prunes.
    """
    image = None if made.image is None else inputs.get(made.image)
    if made.grid is None or not isinstance(image, Tensor) or not kept:
        return None
    rows, columns = made.grid
    stages = [stage for stage in plan.stages if stage.keep < 1]
    drawn = []
    for stage, alive in zip(stages, kept, strict=True):
        patches = alive[0, made.prefix :].nonzero()[:, 0].tolist()
        drawn.append(Drawn(stage.place, tuple(patches), stage.leave == "merge"))
    return Picture(base64.b64encode(_png(_shown(image[0]))).decode(), rows, columns, tuple(drawn))


def _shown(image: Tensor) -> Tensor:
    """[height, width, 3] uint8 of normalised pixels [channels, height, width]: stretched from the least to the
    greatest, which leaves colours alone where channels were normalised by like figures."""
    pixels = image.detach().to(device="cpu", dtype=torch.float32)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    share = _SIDE / max(pixels.shape[1:])
    if share < 1:
        size = [max(1, round(n * share)) for n in pixels.shape[1:]]
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode="area")[0]
    low, high = pixels.amin(), pixels.amax()
    scaled = (pixels - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (scaled * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _png(pixels: Tensor) -> bytes:
    """A PNG file (ISO/IEC 15948) of [height, width, 3] uint8: three chunks, which need no library for images."""
    height, width, _ = pixels.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], dim=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def picture_figures(picture: Picture, name: str = "example") -> str:
    """HTML: the picture once for each stage, patches that left under a shade.

    Args:
        name: of the picture, which no other on the page has.
    """
    wide, high = picture.columns, picture.rows
    source = f'<image href="data:image/png;base64,{picture.png}" width="{wide}" height="{high}" '
    hidden = (
        f'<svg width="0" height="0" aria-hidden="true"><defs><g id="{name}">{source}preserveAspectRatio="none"/></g>'
        "</defs></svg>"
    )
    figures = "\n".join(_figure(picture, drawn, name) for drawn in picture.stages)
    return f'{hidden}\n<div class="pictures">\n{figures}\n</div>'


def _figure(picture: Picture, drawn: Drawn, name: str) -> str:
    wide, high = picture.columns, picture.rows
    kept = set(drawn.kept)
    left = [i for i in range(wide * high) if i not in kept]
    squares = "".join(f"M{i % wide} {i // wide}h1v1h-1z" for i in left)
    style = "merged" if drawn.merges else "dropped"
    said = f"{drawn.place}: {len(kept)} of {wide * high} patches"
    return (
        f'<figure><svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(said)}"><use href="#{name}"/>'
        f'<path class="{style}" d="{squares}"/></svg><figcaption>{escape(said)}</figcaption></figure>'
    )
