"""Speed, memory and utilisation of real training steps at the paper's size, on the machine that it runs on.

    python benchmarks/speed/training_step.py --data VIDEOS --output training_step.json

Launches `training/train_tokenizer.py` with the paper's configurations of stage 1 and stage 4 for some steps at growing
batch sizes, until memory ends. The teachers have their published sizes and random weights, made here, so that nothing
is downloaded: the arithmetic is that of the real ones, the losses mean nothing. Utilisation is the operations of the
step by formula, which the run notes, over what a matrix product of this machine reaches in the same time.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options
from benchmarks.common.machine import describe_machine, matmul_peak
from benchmarks.speed.training_runs import CONFIGS, train
from evatok_hf import EvatokRouter, EvatokRouterConfig
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import read_json
from training.common.fields import option
from training.common.result_pages import markdown


@dataclass(kw_only=True)
class Arguments(Options):
    data: str = option("Folder of videos.")
    configs: list[str] = option("Names in training/configs.", ["proxy_webvid", "final_webvid"])
    batch_sizes: list[int] = option("Clips of a step.", [4, 8, 16, 32])
    steps: int = option("Steps of a run; the first half warms up.", 24)
    num_workers: int = option("Loader processes.", 4)
    compile: bool = option("With torch.compile.", False)
    cpu: bool = option("On the CPU even where there is a GPU.", False)

    def __post_init__(self):
        for least, name in enumerate(("num_workers", "batch_sizes", "steps")):
            self.at_least(least, name)
        self.one_of(configs=CONFIGS)


def make_teachers(folder: Path) -> dict[str, str]:
    """Networks of the published sizes with random weights -> the options that name them."""
    from torchvision import models

    VideoMAEModel(VideoMAEConfig()).save_pretrained(folder / "videomae")
    VJEPA2Model(VJEPA2Config()).save_pretrained(folder / "vjepa2")
    torch.save(models.vgg16(weights=None).state_dict(), folder / "vgg16.pth")
    EvatokRouter(EvatokRouterConfig.from_preset("paper")).save_pretrained(folder / "router")
    return {
        "semantic_teacher": str(folder / "videomae"),
        "alignment": str(folder / "vjepa2"),
        "perceptual_weights": str(folder / "vgg16.pth"),
    }


def measure(args: Arguments) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    peak, rows = matmul_peak(device), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = {**make_teachers(folder), "train_data": args.data, "discriminator_start": 0}
        common |= {"compile": args.compile, "cpu": args.cpu}
        for name in args.configs:
            routed = {} if name.startswith("proxy") else {"assignment": f"router:{folder / 'router'}"}
            for batch_size in args.batch_sizes:
                sizes = {"batch_size": batch_size, "num_workers": min(args.num_workers, batch_size)}
                output = folder / f"{name}-{batch_size}"
                last = train(name, args.steps, output, **common, **routed, **sizes)
                if last is None:
                    print(f"{name}, batch {batch_size}: out of memory", file=sys.stderr)
                    break
                summary = read_json(output / "tokenizer" / "training.json")
                flops = 1e12 * sum(summary["tflop_per_clip"].values())
                rows.append(
                    {
                        "config": name,
                        "batch_size": batch_size,
                        "clips_per_second": last["clips_per_second"],
                        "steps_per_second": last["clips_per_second"] / batch_size,
                        "tokens": last["tokens"],
                        "peak_memory_gib": summary["peak_memory_gib"],
                        "tflop_per_clip": summary["tflop_per_clip"],
                        "utilisation": flops * last["clips_per_second"] / peak,
                    }
                )
    about = describe_machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {"machine": about, "matmul_tflops": peak / 1e12, "rows": rows}


def show(report: dict[str, Any]) -> str:
    rows = [
        [row["config"], row["batch_size"], *(f"{row[name]:.3g}" for name in ("steps_per_second", "clips_per_second"))]
        + [f"{row['peak_memory_gib']:.1f}", f"{sum(row['tflop_per_clip'].values()):.2f}", f"{row['utilisation']:.0%}"]
        for row in report["rows"]
    ]
    return markdown(
        ["", "batch", "steps/s", "clips/s", "most memory, GiB", "TFLOP a clip", "of a matrix product"], rows
    )


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    run_script(main)
