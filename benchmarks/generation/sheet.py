"""A contact sheet of generated clips: a row a class, some samples each, a frame and the tokens of every block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _MUTED, _RULE, _BAR = "#ffffff", "#1c2430", "#6b7686", "#d5dae1", "#2563c9"


def contact_sheet(
    rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]], longest: int, title: str, subtitle: str = "", cell: int = 72
) -> Image.Image:
    """Draws the sheet.

    Args:
        rows: of each class its name, its clips (n, F, 3, H, W) in [-1, 1], and their tokens by block (n, T) int64.
        longest: the largest candidate, whose bar is as wide as a frame.
        title, subtitle: two lines above.
        cell: side of a frame in the picture, pixels.

    Returns:
        The picture; shown of every block is the frame in its middle.
    """
    gap, group, margin, names = 3, 22, 24, 190
    fonts = {size: ImageFont.load_default(size=size) for size in (12, 14, 15, 24)}
    blocks, samples = rows[0][2].shape[1], max(len(clips) for _, clips, _ in rows)
    wide, step = blocks * (cell + gap) - gap, cell + 40
    head = margin + (66 if subtitle else 42)
    width = max(names + samples * (wide + group) - group, int(fonts[24].getlength(title)) + 1)
    width = max(width, int(fonts[15].getlength(subtitle)) + 1)
    image = Image.new("RGB", (2 * margin + width, head + len(rows) * step + margin), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((margin, margin), title, fill=_INK, font=fonts[24])
    draw.text((margin, margin + 36), subtitle, fill=_MUTED, font=fonts[15])
    for row, (name, clips, lengths) in enumerate(rows):
        top = head + row * step
        draw.line((margin, top - 8, margin + width, top - 8), fill=_RULE)
        draw.text((margin, top + cell / 2 - 10), name.replace("_", " "), fill=_INK, font=fonts[14], anchor="lm")
        mean = f"{float(lengths.sum(-1).double().mean()):.0f} tokens a sample"
        draw.text((margin, top + cell / 2 + 10), mean, fill=_MUTED, font=fonts[12], anchor="lm")
        frames = ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)  # (n, F, 3, H, W)
        per_block = frames.shape[1] // blocks
        for sample in range(len(clips)):
            left = margin + names + sample * (wide + group)
            for block in range(blocks):
                x, length = left + block * (cell + gap), int(lengths[sample, block])
                pixels = frames[sample, block * per_block + per_block // 2].permute(1, 2, 0).numpy()
                picture = Image.fromarray(np.ascontiguousarray(pixels))
                image.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (x, top))
                draw.rectangle((x, top + cell + 2, x + max(1, round(cell * length / longest)), top + cell + 5), _BAR)
                text = (x + cell / 2, top + cell + 9)
                draw.text(text, str(length), fill=_INK, font=fonts[12], anchor="ma")
    return image
