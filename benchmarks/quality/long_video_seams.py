"""What `long_video.py` measures where clips meet.

A jump is the mean absolute change from one frame to the next, in grey levels of 255. That of the original is motion;
what the reconstruction has more is seen as a jump. The flicker is the same of the error, reconstruction less original:
0 if the reconstruction moves as the original does, however wrong it is.

Places count from the first frame of a clip. Where clips overlap by k frames, a frame belongs to the earlier clip as
long as that lasts, so that places run from k to the end; but for the first clip, whose first k are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from evatok_hf import VideoTokenizer
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.perceptual import PerceptualDistance
from evatok_hf.pictures.figures import pyplot, save_figure
from evatok_hf.video import VideoReadError, open_video
from evatok_hf.video.source_files import VIDEO_SUFFIXES, list_files
from training.common.result_pages import markdown


def measure_seams(
    tokenizer: VideoTokenizer, folder: Path, lengths: int | None, overlap: int, max_clips: int, perceptual: str
) -> dict:
    """Every way of putting clips together, over the first clips of every video of a folder.

    Returns:
        Settings, and `ways`: one summary each, with lists by place in the clip.

    Raises:
        ValueError: no readable video of more than a clip.
    """
    paths = list_files(folder, VIDEO_SUFFIXES)
    size = tokenizer.model.config.num_frames
    metric, found, names = load_perceptual(perceptual), {}, []
    for path in tqdm(paths, desc="videos", file=sys.stderr):
        try:
            with open_video(path) as video:
                if tokenizer.count_clips(video) < 2:
                    raise VideoReadError(f"{path}: has no more frames than a clip")
            shown_ways = list(ways(tokenizer, path, lengths, overlap, max_clips))
        except VideoReadError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        names.append(path.name)
        for way, common, tokens, original, shown in shown_ways:
            row = compare(original, shown, size, common, metric) | {"tokens": tokens}
            found.setdefault((way, common), {})[path.name] = row
    if not found:
        raise ValueError(f"{folder} has no readable video of more than {size} frames; give a folder of videos.")
    return {
        "videos": names,
        "lengths": lengths or "router",
        "overlap": overlap,
        "max_clips": max_clips,
        "perceptual": perceptual,
        "blocks": tokenizer.model.config.num_blocks,
        "ways": [summarise(way, common, rows) for (way, common), rows in found.items()],
    }


def ways(
    tokenizer: VideoTokenizer, path: Path, lengths: int | None, overlap: int, max_clips: int
) -> Iterator[tuple[str, int, float, np.ndarray, np.ndarray]]:
    """Name, frames in common, tokens a frame, original and reconstruction.

    Both are uint8 (f, H, W, 3), of the frames that all ways have.
    """
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
            yield label, frames_in_common, spent[name] / tokens.num_frames, original, shown


def compare(
    original: np.ndarray, shown: np.ndarray, size: int, overlap: int, metric: PerceptualDistance
) -> dict[str, np.ndarray]:
    """Of a video, by frame and by place in the clip, uint8 (f, H, W, 3) twice."""
    a, b = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1 for frames in (original, shown))
    squares = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)  # values span 2
    with torch.no_grad():
        distance = torch.cat([metric(x, y) for x, y in zip(a.split(64), b.split(64), strict=True)])
    values = {
        "psnr": 10 * torch.log10(4 / squares),
        "perceptual": distance,
        "jump": jumps(b),
        "jump_original": jumps(a),
        "flicker": jumps(b - a),
    }
    means = {f"mean_{name}": values[name].nanmean().item() for name in ("psnr", "perceptual", "flicker")}
    return means | {name: by_place(value, size, overlap) for name, value in values.items()}


def jumps(frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from the frame before, grey levels, (f, 3, H, W) -> (f,); of the first frame NaN."""
    change = frames.diff(dim=0).abs().mean((1, 2, 3)) * 127.5
    return torch.cat([change.new_tensor([torch.nan]), change])


def by_place(values: torch.Tensor, size: int, overlap: int = 0) -> np.ndarray:
    """(f,) -> (F,), means over clips; NaN for the first `overlap` places."""
    step, rest = size - overlap, values[overlap:]
    short = -len(rest) % step
    means = torch.cat([rest, rest.new_full((short,), torch.nan)]).view(-1, step).nanmean(0)
    return torch.cat([means.new_full((overlap,), torch.nan), means]).double().numpy()


def summarise(way: str, overlap: int, videos: dict[str, dict]) -> dict:
    """Means over videos."""
    rows = list(videos.values())
    mean = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    places = {name: value for name, value in mean.items() if np.ndim(value)}
    return {
        "way": way,
        "overlap": overlap,
        "tokens_per_frame": float(mean["tokens"]),
        "mean_psnr": float(mean["mean_psnr"]),
        "mean_perceptual": float(mean["mean_perceptual"]),
        "mean_flicker": float(mean["mean_flicker"]),
        "by_place": {
            name: [None if np.isnan(value) else round(float(value), 4) for value in values]
            for name, values in places.items()
        },
        "by_video": {
            name: {video: round(row[f"mean_{name}"], 4) for video, row in videos.items()}
            for name in ("psnr", "perceptual")
        },
    }


def at_boundaries(row: dict, blocks: int) -> dict[str, float]:
    """What jumps have more than those of the original: the largest where clips meet, the means between other blocks and
    inside blocks; and the largest flicker where clips meet."""
    names = ("jump", "jump_original", "flicker")
    jump, original, flicker = (np.array(row["by_place"][name], dtype=float) for name in names)
    size, overlap, excess = len(jump), row["overlap"], jump - original
    span = size // blocks
    meet = [overlap, *range(size - overlap, size)]  # without overlap the first place alone
    inner = [place for place in range(overlap, size) if place not in meet and place % span == 0]
    within = [place for place in range(overlap, size) if place not in meet and place % span]
    return {
        "between clips": excess[meet].max(),
        "between blocks": excess[inner].mean() if inner else float("nan"),
        "inside blocks": excess[within].mean() if within else float("nan"),
        "flicker at clips": flicker[meet].max(),
    }


def show_seams(report: dict) -> str:
    table, plain = [], report["ways"][0]["by_video"]["psnr"]
    for row in report["ways"]:
        worst = min(value - plain[video] for video, value in row["by_video"]["psnr"].items())
        cells = [f"{row['tokens_per_frame']:.2f}", f"{row['mean_psnr']:.2f}", f"{worst:+.2f}"]
        cells.append(f"{row['mean_perceptual']:.4f}")
        cells += [f"{value:+.2f}" for value in at_boundaries(row, report["blocks"]).values()]
        table.append([row["way"], *cells, f"{row['mean_flicker']:.2f}"])
    headers = [f"{len(report['videos'])} videos, lengths: {report['lengths']}", "tokens a frame", "PSNR"]
    headers += ["the video that gains least", report["perceptual"]]
    headers += ["jump between clips", "between blocks", "inside", "flicker at clips", "flicker"]
    return f"{markdown(headers, table)}\n\nJumps, those over the original's, and flicker are in grey levels."


def draw_seams(report: dict, path: Path) -> None:
    """PSNR, distance and jumps by place in the clip."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (("psnr", "PSNR, dB"), ("perceptual", report["perceptual"]), ("jump", "change to the frame before"))
    shown = [row for row in report["ways"] if ", cut" not in row["way"]]
    for axis, (name, title) in zip(axes, panels, strict=True):
        for row in shown:
            axis.plot(np.array(row["by_place"][name], dtype=float), marker=".", label=row["way"])
        if name == "jump":
            axis.plot(shown[0]["by_place"]["jump_original"], "k--", label="original")
            axis.set_ylim(bottom=0)
        axis.set(xlabel="frame of the clip", title=title)
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
