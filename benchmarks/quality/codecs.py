"""A tokenizer beside conventional codecs at the same bits: H.264, HEVC and AV1, on clips that trained nothing.

    python benchmarks/quality/codecs.py --data VIDEOS --output out/codecs

Each clip is tokenized at uniform lengths and, with a router, at its lengths for some w_q. Its bits are those of its
ids, log2 of the codebook each, and of its lengths, log2 of the candidates for each block. A codec then encodes the same
clip, at the resolution of the tokenizer, at the finest setting that needs no more bits (its slices alone: headers are
left out). Where its coarsest setting needs more, that is taken and counted. Prints a table of PSNR, SSIM and perceptual
distances, means over clips, and writes `codecs.json` and `codecs.png`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark
from benchmarks.common.clips import METRIC, ClipOptions, ahead, compare, means
from benchmarks.common.pictures import log_axis
from evatok_hf import EvatokModel, EvatokRouter, default_checkpoint
from evatok_hf.bundled import find_checkpoint
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.pixels import ssim
from evatok_hf.pictures.figures import pyplot, save_figure
from evatok_hf.video.codecs import CODECS, CodecBaseline
from training.common.fields import option
from training.common.result_pages import markdown

COLOURS = {"tokens": "tab:red", "h264": "tab:grey", "hevc": "tab:blue", "av1": "tab:green"}


@dataclass(kw_only=True)
class Arguments(ClipOptions):
    model: str = option("Checkpoint folder with tokenizer/ and perhaps router/, or bundled name.", default_checkpoint)
    qualities: list[float] = option("Preferences w_q of the router.", [0.8, 1.0, 1.2, 1.4, 1.6])
    output: str = option("Folder for the table and the picture.", "out/codecs")


def reconstruct(model: EvatokModel, video: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """uint8 (B, F, 3, H, W) -> the same, through the tokens."""
    made = [
        model.decode(model.encode(to_float(clip[None]), own))
        for clip, own in zip(tqdm(video, desc="tokens", file=sys.stderr, leave=False), lengths, strict=True)
    ]
    return ((torch.cat(made) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def measure(args: Arguments) -> dict[str, Any]:
    folder = Path(find_checkpoint(args.model))
    model = EvatokModel.from_pretrained(folder / "tokenizer", dtype=torch.float32).eval()
    config = model.config
    clips = args.read(config)
    video = clips.video
    metric = load_perceptual(METRIC)
    points = {
        f"uniform {length}": torch.full((len(video), config.num_blocks), length) for length in config.block_lengths
    }
    if (folder / "router").is_dir():
        router = EvatokRouter.from_pretrained(folder / "router", dtype=torch.float32).eval()
        points |= {f"router {quality}": router.assign(clips.floats, quality) for quality in args.qualities}

    def measures(shown: torch.Tensor) -> dict[str, torch.Tensor]:
        return compare(video, shown, metric) | {"ssim": ssim(video, shown)}

    baselines = {
        codec: [
            CodecBaseline(frames.permute(0, 2, 3, 1).numpy(), codec, fps)
            for frames, fps in zip(video, clips.fps, strict=True)
        ]
        for codec in CODECS
    }
    rows = []
    for point, lengths in points.items():
        bits = [model.config.bits(own) for own in lengths.tolist()]
        ours = measures(reconstruct(model, video, lengths))
        row = {"point": point, "tokens": float(lengths.sum(-1).double().mean())}
        row["systems"] = {"tokens": {"bits": float(np.mean(bits))} | means(ours)}
        for codec, coded in baselines.items():
            pairs = tqdm(zip(coded, bits, strict=True), f"{point}, {codec}", len(coded), file=sys.stderr)
            made = [baseline.at_bits(limit) for baseline, limit in pairs]
            frames = torch.from_numpy(np.stack([each.frames for each in made])).permute(0, 1, 4, 2, 3)
            theirs = measures(frames)
            row["systems"][codec] = {
                "bits": float(np.mean([each.bits for each in made])),
                "too_large": sum(each.bits > limit for each, limit in zip(made, bits, strict=True)),
                "tokens_ahead": ahead(ours, theirs),
                **means(theirs),
            }
        rows.append(row)
    return {
        "fingerprint": model.fingerprint(),
        **clips.facts(),
        "codecs": {name: {"encoder": codec.encoder, **codec.options} for name, codec in CODECS.items()},
        "points": rows,
    }


def distances(report: dict[str, Any]) -> list[str]:
    """Names of the perceptual distances of a report."""
    return [name for name in report["points"][0]["systems"]["tokens"] if name not in ("bits", "psnr", "ssim")]


def show(report: dict[str, Any]) -> str:
    metrics, rows = distances(report), []
    for point in report["points"]:
        for name, system in point["systems"].items():
            cells = [point["point"] if name == "tokens" else ""]
            cells.append(f"tokens ({point['tokens']:.0f})" if name == "tokens" else CODECS[name].name)
            cells += [f"{system['bits']:.0f}", f"{system['psnr']:.2f}"]
            cells += [f"{system[key]:.3f}" for key in ("ssim", *metrics)]
            rows.append([*cells, system.get("too_large", "")])
    table = markdown(["", "system", "bits", "PSNR", "SSIM", *metrics, "larger than the tokens"], rows)
    size = " x ".join(map(str, report["resolution"]))
    return f"{report['clips']} clips of {report['videos']} videos, {size}\n\n{table}"


def draw(report: dict[str, Any], path: Path) -> None:
    """PSNR and the first distance over bits: a line for each system at uniform lengths, the router's points alone."""
    plt = pyplot()
    keys = ["psnr", *distances(report)[:1]]
    figure, axes = plt.subplots(1, len(keys), figsize=(5.5 * len(keys), 4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        for kind, style in (("uniform", "o-"), ("router", "s--")):
            chosen = [point for point in report["points"] if point["point"].startswith(kind)]
            for name in ("tokens", *report["codecs"]):
                systems = sorted((point["systems"][name] for point in chosen), key=lambda system: system["bits"])
                if not systems or (kind == "router" and name != "tokens"):
                    continue
                label = CODECS[name].name if name in CODECS else f"tokens, {kind}"
                bits, values = zip(*((system["bits"], system[key]) for system in systems), strict=True)
                axis.plot(bits, values, style, color=COLOURS[name], label=label, markersize=4)
        log_axis(axis, "bits a clip")
        axis.set_ylabel("PSNR, dB" if key == "psnr" else key)
    axes[0][0].legend(frameon=False)
    save_figure(figure, path)


main = Benchmark(Arguments, measure, show, "codecs", draw)

if __name__ == "__main__":
    main.run()
