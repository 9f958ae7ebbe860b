"""Measurements of `long_video.py` where clips meet.

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

from benchmarks.common.benchmark import table
from benchmarks.common.clips import METRIC, frame_distances
from evatok_hf import VideoTokenizer, VideoTokens
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.perceptual import PerceptualDistance
from evatok_hf.pictures.figures import pyplot, save_figure
from evatok_hf.video import VideoReadError, open_video
from evatok_hf.video.source_files import VIDEO_SUFFIXES, list_files

OVERLAP = 4  # frames that clips have in common where they overlap


def measure_seams(tokenizer: VideoTokenizer, folder: Path, lengths: int | None, max_clips: int) -> dict:
    """Every way of putting clips together, over the first clips of every video of a folder: `summarise` of each."""
    size = tokenizer.model.config.num_frames
    metric, found, names = load_perceptual(METRIC), {}, []
    for path in tqdm(list_files(folder, VIDEO_SUFFIXES), desc="videos", file=sys.stderr):
        try:
            with open_video(path) as video:
                if tokenizer.count_clips(video) < 2:
                    raise VideoReadError(f"{path}: has no more frames than a clip")
            shown_ways = list(ways(tokenizer, path, lengths, max_clips))
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
        "overlap": OVERLAP,
        "max_clips": max_clips,
        "perceptual": METRIC,
        "blocks": tokenizer.model.config.num_blocks,
        "ways": [summarise(way, common, rows) for (way, common), rows in found.items()],
    }


def ways(
    tokenizer: VideoTokenizer, path: Path, lengths: int | None, max_clips: int
) -> Iterator[tuple[str, int, float, np.ndarray, np.ndarray]]:
    """Name, frames in common, tokens a frame; original and reconstruction, uint8 (f, H, W, 3), equally long."""
    config, router = tokenizer.model.config, tokenizer.router
    clips = [clip.pixel_values_videos[:, : clip.num_frames] for clip in tokenizer.clips(str(path), max_clips=max_clips)]
    original = tokenizer.processor.postprocess(torch.cat(clips, 1))[0].numpy()

    def shown(name: str, common: int, tokens: VideoTokens) -> Iterator[tuple[str, int, float, np.ndarray, np.ndarray]]:
        for blend in ("cut", "fade", "carry") if common else ("fade", "carry"):
            frames = np.concatenate(list(tokenizer.decode(tokens, blend)))[: len(original)]
            label = f"{name}, {blend}" if common or blend == "carry" else name
            yield label, common, tokens.ids.numel() / tokens.num_frames, original, frames

    apart = tokenizer.encode(str(path), lengths, max_clips=max_clips)
    yield from shown("apart", 0, apart)
    more = 1 + -(-(max_clips - 1) * config.num_frames // (config.num_frames - OVERLAP))
    options = {"max_clips": more, "overlap": OVERLAP}
    yield from shown(f"overlap {OVERLAP}", OVERLAP, tokenizer.encode(str(path), lengths, **options))
    # The tokens of clips that do not overlap, spread over more of them.
    budget = apart.ids.numel()
    chooses = lengths is None and router is not None and router.config.quality is None
    if chooses and budget >= min(config.block_lengths) * 4 * more:
        tokens = tokenizer.encode(str(path), budget=budget, **options)
        yield from shown(f"overlap {OVERLAP}, equal tokens", OVERLAP, tokens)


def compare(
    original: np.ndarray, shown: np.ndarray, size: int, overlap: int, metric: PerceptualDistance
) -> dict[str, np.ndarray]:
    """Of a video, by frame and by place in the clip, uint8 (f, H, W, 3) twice."""
    a, b = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1 for frames in (original, shown))
    squares = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)  # values span 2
    values = {
        "psnr": 10 * torch.log10(4 / squares),
        "perceptual": frame_distances(metric, a, b),
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
        **{name: float(value) for name, value in mean.items() if name.startswith("mean_")},
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
    """The excess of jumps over those of the original: the largest where clips meet, the means between other blocks and
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
    plain, rows = report["ways"][0]["by_video"]["psnr"], []
    for row in report["ways"]:
        worst = min(value - plain[video] for video, value in row["by_video"]["psnr"].items())
        rows.append(row | at_boundaries(row, report["blocks"]) | {"worst": worst})
    columns = [
        (f"{len(report['videos'])} videos, lengths: {report['lengths']}", "{way}"),
        ("tokens a frame", "{tokens_per_frame:.2f}"),
        ("PSNR", "{mean_psnr:.2f}"),
        ("the video that gains least", "{worst:+.2f}"),
        (report["perceptual"], "{mean_perceptual:.4f}"),
        ("jump between clips", "{between clips:+.2f}"),
        ("between blocks", "{between blocks:+.2f}"),
        ("inside", "{inside blocks:+.2f}"),
        ("flicker at clips", "{flicker at clips:+.2f}"),
        ("flicker", "{mean_flicker:.2f}"),
    ]
    return f"{table(columns, rows)}\n\nJumps, those over the original's, and flicker are in grey levels."


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
