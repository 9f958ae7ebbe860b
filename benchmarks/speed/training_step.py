"""Speed, memory and utilisation of real training steps at the paper's size, on the machine that it runs on.

    python benchmarks/speed/training_step.py --data VIDEOS --output training_step.json

Launches `training/train_tokenizer.py` with the paper's configurations of stage 1 and stage 4 for some steps at growing
batch sizes, until memory ends; the first half of the steps warms up. The teachers have their published sizes and random
weights, made here, so that nothing is downloaded: the arithmetic is that of the real ones, the losses mean nothing.
Utilisation is the operations of the step by formula, which the run notes, over what a matrix product of this machine
reaches in the same time.
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
from benchmarks.common.benchmark import Benchmark, Options, table
from benchmarks.common.machine import describe_machine, matmul_peak
from benchmarks.speed.training_runs import train
from evatok_hf import EvatokRouter, EvatokRouterConfig
from evatok_hf.models.checkpoint_evatok import resolve_device
from evatok_hf.models.files_evatok import read_json
from training.common.fields import option


@dataclass(kw_only=True)
class Arguments(Options):
    data: str = option("Folder of videos.")


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
    device = resolve_device("auto")
    peak, rows = matmul_peak(device), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = {**make_teachers(folder), "train_data": args.data, "discriminator_start": 0}
        for name, routed in (("proxy_webvid", {}), ("final_webvid", {"assignment": f"router:{folder / 'router'}"})):
            for batch_size in (4, 8, 16, 32):
                output = folder / f"{name}-{batch_size}"
                last = train(name, 24, output, **common, **routed, batch_size=batch_size, num_workers=4)
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
    columns = [
        ("", "{config}"),
        ("batch", "{batch_size}"),
        ("steps/s", "{steps_per_second:.3g}"),
        ("clips/s", "{clips_per_second:.3g}"),
        ("most memory, GiB", "{peak_memory_gib:.1f}"),
        ("TFLOP a clip", "{tflop:.2f}"),
        ("of a matrix product", "{utilisation:.0%}"),
    ]
    return table(columns, [row | {"tflop": sum(row["tflop_per_clip"].values())} for row in report["rows"]])


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
