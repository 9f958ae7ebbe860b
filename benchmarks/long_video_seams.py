"""What `long_video.py` measures where clips meet.

A jump is the mean absolute change from one frame to the next, in grey levels of 255. That of the original is motion;
what the reconstruction has more is seen as a jump. The flicker is the same of the error, reconstruction less original:
0 if the reconstruction moves as the original does, however wrong it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from evatok_hf import VideoReadError, VideoTokenizer, load_perceptual
from evatok_hf.perceptual import PerceptualDistance

EXTENSIONS = {".mp4", ".mkv", ".webm", ".avi", ".mpg", ".mov"}


def measure_seams(
    tokenizer: VideoTokenizer, folder: Path, lengths: int | None, overlap: int, max_clips: int, perceptual: str
) -> dict:
    """Every way of putting clips together, over the first clips of every video of a folder.

    Returns:
        Settings, and `ways`: one summary each, with lists by position in the clip.

    Raises:
        ValueError: no readable video of more than a clip.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS)
    size = tokenizer.model.config.num_frames
    metric, found, names = load_perceptual(perceptual), {}, []
    for path in tqdm(paths, desc="videos", file=sys.stderr):
        try:
            for way, tokens, original, shown in ways(tokenizer, path, lengths, overlap, max_clips):
                if len(original) > size:
                    found.setdefault(way, []).append(compare(original, shown, size, metric) | {"tokens": tokens})
        except VideoReadError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        names.append(path.name)
    if not found:
        raise ValueError(f"{folder} has no readable video of more than {size} frames; give a folder of videos.")
    return {
        "videos": names,
        "lengths": lengths or "router",
        "overlap": overlap,
        "max_clips": max_clips,
        "perceptual": perceptual,
        "blocks": tokenizer.model.config.num_blocks,
        "ways": [summarise(way, rows) for way, rows in found.items()],
    }


def ways(
    tokenizer: VideoTokenizer, path: Path, lengths: int | None, overlap: int, max_clips: int
) -> Iterator[tuple[str, float, np.ndarray, np.ndarray]]:
    """Name, tokens a frame, original and reconstruction, uint8 (f, H, W, 3), f the frames that all ways have."""
    size = tokenizer.model.config.num_frames
    clips = {0: max_clips, overlap: 1 + -(-(max_clips - 1) * size // (size - overlap))}
    spent, original = {}, None
    for name, frames_in_common, equal in (("", 0, False), (f"overlap {overlap}", overlap, False), ("", overlap, True)):
        options = {"lengths": lengths}
        if equal:  # the tokens of clips that do not overlap, spread over more of them
            if tokenizer.router is None or tokenizer.router.config.quality is not None or lengths is not None:
                continue
            name, options = f"overlap {overlap}, equal tokens", {"budget": int(spent[""])}
            if spent[""] < min(tokenizer.model.config.block_lengths) * 4 * clips[overlap]:
                continue
        tokens = tokenizer.encode(str(path), **options, max_clips=clips[frames_in_common], overlap=frames_in_common)
        if original is None:
            frames = [
                clip.pixel_values_videos[:, : clip.num_frames]
                for clip in tokenizer.clips(str(path), max_clips=max_clips)
            ]
            original = tokenizer.processor.postprocess(torch.cat(frames, 1))[0].numpy()
        spent[name] = tokens.ids.numel()
        for blend in ("cut", "fade", "carry") if frames_in_common else ("fade", "carry"):
            shown = np.concatenate(list(tokenizer.decode(tokens, blend)))[: len(original)]
            label = name or "apart"
            if frames_in_common or blend == "carry":
                label += f", {blend}"
            yield label, spent[name] / tokens.num_frames, original, shown


def compare(original: np.ndarray, shown: np.ndarray, size: int, metric: PerceptualDistance) -> dict:
    """Of a video, by position in the clip (F,), means over its clips: uint8 (f, H, W, 3) twice."""
    a, b = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1 for frames in (original, shown))
    squares = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)  # values span 2
    with torch.no_grad():
        distance = torch.cat([metric(x, y) for x, y in zip(a.split(64), b.split(64), strict=True)])
    return {
        "psnr": by_position(10 * torch.log10(4 / squares), size),
        "perceptual": by_position(distance, size),
        "jump": by_position(jumps(b), size),
        "jump_original": by_position(jumps(a), size),
        "flicker": by_position(jumps(b - a), size),
    }


def jumps(frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from the frame before, grey levels, (f, 3, H, W) -> (f,); of the first frame NaN."""
    change = frames.diff(dim=0).abs().mean((1, 2, 3)) * 127.5
    return torch.cat([change.new_tensor([torch.nan]), change])


def by_position(values: torch.Tensor, size: int) -> np.ndarray:
    """(f,) -> (F,), means over clips."""
    short = -len(values) % size
    return torch.cat([values, values.new_full((short,), torch.nan)]).view(-1, size).nanmean(0).double().numpy()


def summarise(way: str, rows: list[dict]) -> dict:
    """Means over videos."""
    mean = {name: np.nanmean([row[name] for row in rows], axis=0) for name in rows[0]}
    lists = {name: [round(float(value), 4) for value in mean[name]] for name in mean if name != "tokens"}
    videos = {name: [round(float(np.nanmean(row[name])), 4) for row in rows] for name in ("psnr", "perceptual")}
    return {
        "way": way,
        "tokens_per_frame": float(mean["tokens"]),
        "mean_psnr": float(mean["psnr"].mean()),
        "mean_perceptual": float(mean["perceptual"].mean()),
        "by_position": lists,
        "by_video": videos,
    }


def at_boundaries(row: dict, blocks: int) -> dict[str, float]:
    """Jumps between clips, between blocks of a clip, and inside blocks, each less that of the original; flicker."""
    jump, original, flicker = (np.array(row["by_position"][name]) for name in ("jump", "jump_original", "flicker"))
    span = len(jump) // blocks
    inner = [i for i in range(1, len(jump)) if i % span == 0]
    within = [i for i in range(len(jump)) if i % span]
    excess = jump - original
    return {
        "between clips": excess[0],
        "between blocks": excess[inner].mean(),
        "inside blocks": excess[within].mean(),
        "flicker at clips": flicker[0],
        "flicker": flicker.mean(),
    }


def print_seams(report: dict) -> None:
    print(f"\nseams: {len(report['videos'])} videos, lengths: {report['lengths']}; jumps and flicker in grey levels")
    columns = ["tokens/frame", "PSNR", "worst video", report["perceptual"]]
    columns += ["jump between clips", "blocks", "inside", "flicker at clips", "flicker"]
    table = [["", *columns]]
    plain = np.array(report["ways"][0]["by_video"]["psnr"])
    for row in report["ways"]:
        worst = (np.array(row["by_video"]["psnr"]) - plain).min()
        cells = [f"{row['tokens_per_frame']:.2f}", f"{row['mean_psnr']:.2f}", f"{worst:+.2f}"]
        cells.append(f"{row['mean_perceptual']:.4f}")
        cells += [f"{value:+.2f}" for value in at_boundaries(row, report["blocks"]).values()]
        table.append([row["way"], *cells])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print(" | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print("worst video: PSNR against the first way, of the video that gains least; jumps: more than the original's")


def save_figure(report: dict, path: Path) -> None:
    """PSNR, distance and jumps by position in the clip."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (("psnr", "PSNR, dB"), ("perceptual", report["perceptual"]), ("jump", "change to the frame before"))
    shown = [row for row in report["ways"] if ", cut" not in row["way"]]
    for axis, (name, title) in zip(axes, panels, strict=True):
        for row in shown:
            axis.plot(row["by_position"][name], marker=".", label=row["way"])
        if name == "jump":
            axis.plot(shown[0]["by_position"]["jump_original"], "k--", label="original")
            axis.set_ylim(bottom=0)
        axis.set(xlabel="frame of the clip", title=title)
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
