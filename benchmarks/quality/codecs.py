"""A tokenizer beside conventional codecs at the same bits: H.264, HEVC and AV1, on clips that trained nothing.

    python benchmarks/quality/codecs.py --data VIDEOS --output out/codecs

Each clip is tokenized at uniform lengths and, with a router, at its lengths for some w_q. Its bits are those of its
ids, log2 of the codebook each, and of its lengths, log2 of the candidates for each block. A codec then encodes the same
clip, at the resolution of the tokenizer, at the finest setting that needs no more bits (its slices alone: headers are
left out). Where its coarsest setting needs more, that is taken and counted. Prints a table of PSNR, SSIM and perceptual
distances, means over clips, and writes `codecs.json` and `codecs.png`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from evatok_hf import EvatokModel, EvatokRouter, default_checkpoint
from evatok_hf.data.streaming import ClipConfig, collate, evaluation_clips, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics import load_perceptual, psnr
from evatok_hf.metrics.pixels import ssim
from evatok_hf.pictures.figures import pyplot, save_figure
from evatok_hf.video.codecs import CODECS, CodecBaseline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import command_line, machine_name, print_table, write_json

ALL_CLIPS = 10**6
COLOURS = {"tokens": "tab:red", "h264": "tab:grey", "hevc": "tab:blue", "av1": "tab:green"}


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of videos that trained nothing."})
    model: str = field(
        default_factory=default_checkpoint, metadata={"help": "Checkpoint folder with tokenizer/ and perhaps router/."}
    )
    split: str = field(default="val", metadata={"help": "Split, where the source is divided into splits."})
    lengths: list[int] = field(default_factory=list, metadata={"help": "Uniform lengths; all candidates by default."})
    qualities: list[float] = field(
        default_factory=lambda: [0.8, 1.0, 1.2, 1.4, 1.6], metadata={"help": "Preferences w_q of the router."}
    )
    codecs: list[str] = field(default_factory=lambda: list(CODECS), metadata={"help": f"Of {', '.join(CODECS)}."})
    clips_per_video: int = field(default=0, metadata={"help": "Clips evenly spaced over each video; 0: all of them."})
    perceptual: list[str] = field(
        default_factory=lambda: ["perceptual-effnet-lite0"], metadata={"help": "Perceptual distances to measure."}
    )
    output: str = field(default="out/codecs", metadata={"help": "Folder for the table and the picture."})

    def __post_init__(self):
        if unknown := [name for name in self.codecs if name not in CODECS]:
            raise ValueError(f"--codecs must be of {', '.join(CODECS)}, got {', '.join(unknown)}.")


def token_bits(lengths: torch.Tensor, model: EvatokModel) -> torch.Tensor:
    """Bits of each clip's ids and lengths: (B, T) -> (B,)."""
    config = model.config
    side = config.num_blocks * math.log2(len(config.block_lengths))
    return lengths.sum(-1) * math.log2(config.codebook_size) + side


def measure(video: torch.Tensor, shown: torch.Tensor, metrics: dict) -> dict[str, torch.Tensor]:
    """PSNR, SSIM and distances of each clip; both uint8 (B, F, 3, H, W)."""
    values = {"psnr": psnr(video, shown), "ssim": ssim(video, shown)}
    for name, metric in metrics.items():
        pairs = zip(to_float(video).split(8), to_float(shown).split(8), strict=True)
        with torch.no_grad():
            values[name] = torch.cat([metric.video(a, b) for a, b in pairs])
    return values


def reconstruct(model: EvatokModel, video: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """uint8 (B, F, 3, H, W) -> the same, through the tokens."""
    made = [
        model.decode(model.encode(to_float(clip[None]), own))
        for clip, own in zip(tqdm(video, desc="tokens", file=sys.stderr, leave=False), lengths, strict=True)
    ]
    return ((torch.cat(made) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    folder = Path(args.model)
    model = EvatokModel.from_pretrained(folder / "tokenizer", dtype=torch.float32).eval()
    config = model.config
    clip = ClipConfig(num_frames=config.num_frames, image_size=config.image_size)
    items = list(evaluation_clips(args.data, clip, args.clips_per_video or ALL_CLIPS, split=args.split))
    video = collate(items)["pixel_values_videos"]  # (B, F, 3, H, W) uint8
    metrics = {name: load_perceptual(name) for name in args.perceptual}

    points = {
        f"uniform {length}": torch.full((len(video), config.num_blocks), length)
        for length in args.lengths or config.block_lengths
    }
    if (folder / "router").is_dir():
        router = EvatokRouter.from_pretrained(folder / "router", dtype=torch.float32).eval()
        for quality in args.qualities:
            points[f"router {quality}"] = router.assign(to_float(video), quality)
    baselines = {
        codec: [
            CodecBaseline(frames.permute(0, 2, 3, 1).numpy(), codec, item["fps"])
            for frames, item in zip(video, items, strict=True)
        ]
        for codec in args.codecs
    }

    report_points = []
    for point, lengths in points.items():
        bits = token_bits(lengths, model)
        shown = measure(video, reconstruct(model, video, lengths), metrics)
        row = {
            "point": point,
            "tokens": float(lengths.sum(-1).double().mean()),
            "systems": {"tokens": {"bits": float(bits.double().mean())} | means(shown)},
        }
        for codec, clips in baselines.items():
            pairs = tqdm(zip(clips, bits, strict=True), f"{point}, {codec}", len(clips), file=sys.stderr)
            made = [baseline.at_bits(float(limit)) for baseline, limit in pairs]
            frames = torch.from_numpy(np.stack([each.frames for each in made])).permute(0, 1, 4, 2, 3)
            theirs = measure(video, frames, metrics)
            row["systems"][codec] = {
                "bits": float(np.mean([each.bits for each in made])),
                "too_large": sum(each.bits > limit for each, limit in zip(made, bits.tolist(), strict=True)),
                "tokens_ahead": {
                    key: int((shown[key] > theirs[key] if key in ("psnr", "ssim") else shown[key] < theirs[key]).sum())
                    for key in shown
                },
                **means(theirs),
            }
        report_points.append(row)

    report = {
        "command": command_line("quality/codecs.py"),
        "machine": machine_name(),
        "torch": torch.__version__,
        "fingerprint": model.fingerprint(),
        "resolution": [config.num_frames, config.image_size, config.image_size],
        "videos": len({item["source"] for item in items}),
        "clips": len(items),
        "codecs": {name: {"encoder": CODECS[name].encoder, **CODECS[name].options} for name in args.codecs},
        "points": report_points,
    }
    print_report(report, list(metrics))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(report, output / "codecs.json")
    draw(report, list(metrics), output / "codecs.png")


def means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: float(value.double().mean()) for key, value in values.items()}


def print_report(report: dict, metrics: list[str]) -> None:
    print(f"{report['clips']} clips of {report['videos']} videos, {' x '.join(map(str, report['resolution']))}")
    header = ["", "system", "bits", "PSNR", "SSIM", *metrics, "larger than the tokens"]
    rows = []
    for point in report["points"]:
        for name, system in point["systems"].items():
            rows.append(
                [
                    point["point"] if name == "tokens" else "",
                    f"tokens ({point['tokens']:.0f})" if name == "tokens" else CODECS[name].name,
                    f"{system['bits']:.0f}",
                    f"{system['psnr']:.2f}",
                    f"{system['ssim']:.3f}",
                    *(f"{system[metric]:.3f}" for metric in metrics),
                    str(system.get("too_large", "")),
                ]
            )
    print_table([header, *rows])


def draw(report: dict, metrics: list[str], path: Path) -> None:
    """PSNR and the first distance over bits: a line for each system at uniform lengths, the router's points alone."""
    plt = pyplot()
    keys = ["psnr", *metrics[:1]]
    figure, axes = plt.subplots(1, len(keys), figsize=(5.5 * len(keys), 4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        for kind, style in (("uniform", "o-"), ("router", "s--")):
            chosen = [point for point in report["points"] if point["point"].startswith(kind)]
            for name in ("tokens", *report["codecs"]):
                systems = sorted((point["systems"][name] for point in chosen), key=lambda system: system["bits"])
                if not systems or (kind == "router" and name != "tokens"):
                    continue
                label = CODECS[name].name if name in CODECS else f"tokens, {kind}"
                axis.plot(
                    [system["bits"] for system in systems],
                    [system[key] for system in systems],
                    style,
                    color=COLOURS[name],
                    label=label,
                    markersize=4,
                )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axis.set_xlabel("bits a clip")
        axis.set_ylabel("PSNR, dB" if key == "psnr" else key)
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
