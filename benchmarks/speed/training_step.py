"""Speed, memory and utilisation of real training steps at the paper's size, on the machine that it runs on.

    python benchmarks/speed/training_step.py --data VIDEOS --output training_step.json

Launches `training/train_tokenizer.py` with the paper's configurations of stage 1 and stage 4 for some steps at growing
batch sizes, until memory ends. The teachers have their published sizes and random weights, made here, so that nothing
is downloaded: the arithmetic is that of the real ones, the losses mean nothing. Utilisation is the operations of the
step by formula, which the run notes, over what a matrix product of this machine reaches in the same time.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from evatok_hf import EvatokRouter, EvatokRouterConfig
from evatok_hf.interrupts import run_script

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import command_line, machine_name, matmul_peak, write_json


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of videos."})
    configs: list[str] = field(
        default_factory=lambda: ["proxy_webvid", "final_webvid"], metadata={"help": "Names in training/configs."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Clips of a step."})
    steps: int = field(default=24, metadata={"help": "Steps of a run; the first half warms up."})
    num_workers: int = field(default=4, metadata={"help": "Loader processes."})
    compile: bool = field(default=False, metadata={"help": "With torch.compile."})
    cpu: bool = field(default=False, metadata={"help": "On the CPU even where there is a GPU."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


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


def run(args: Arguments, name: str, batch_size: int, teachers: dict[str, str], folder: Path) -> dict | None:
    """One run -> its figures, or None where memory did not suffice."""
    output = folder / f"{name}-{batch_size}"
    options = {
        **teachers,
        "config": str(ROOT / "training" / "configs" / f"{name}.yaml"),
        "train_data": args.data,
        "output_dir": str(output),
        "steps": str(args.steps),
        "batch_size": str(batch_size),
        "num_workers": str(min(args.num_workers, batch_size)),
        "discriminator_start": "0",
        "log_every": str(args.steps // 2),
        "save_every": str(args.steps),
        "compile": str(args.compile),
        "cpu": str(args.cpu),
    }
    if not name.startswith("proxy"):
        options["assignment"] = f"router:{folder / 'router'}"
    command = [sys.executable, str(ROOT / "training" / "train_tokenizer.py")]
    command += [f"--{option}={value}" for option, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "out of memory" in done.stderr.lower() or done.returncode in (-9, 137):
            return None
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    summary = json.loads((output / "tokenizer" / "training.json").read_text())
    return {
        "clips_per_second": last["clips_per_second"],
        "steps_per_second": last["clips_per_second"] / batch_size,
        "tokens": last["tokens"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "tflop_per_clip": summary["tflop_per_clip"],
    }


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.steps < 2:
        raise ValueError(f"--steps must be at least 2, of which the first half warms up, got {args.steps}.")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    peak = matmul_peak(device)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teachers = make_teachers(folder)
        for config_name in args.configs:
            for batch_size in args.batch_sizes:
                figures = run(args, config_name, batch_size, teachers, folder)
                if figures is None:
                    print(f"{config_name}, batch {batch_size}: out of memory", file=sys.stderr)
                    break
                flops = 1e12 * sum(figures["tflop_per_clip"].values())
                figures["utilisation"] = flops * figures["clips_per_second"] / peak
                rows.append({"config": config_name, "batch_size": batch_size, **figures})
                print_row(rows[-1])
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    report = {
        "command": command_line("speed/training_step.py"),
        "machine": gpu or f"{machine_name()} CPU",
        "torch": torch.__version__,
        "matmul_tflops": peak / 1e12,
        "rows": rows,
    }
    if args.output:
        write_json(report, args.output)


def print_row(row: dict) -> None:
    print(
        f"{row['config']}: batch {row['batch_size']}, {row['steps_per_second']:.3g} steps/s, "
        f"{row['clips_per_second']:.3g} clips/s, {row['peak_memory_gib']:.1f} GiB, "
        f"{sum(row['tflop_per_clip'].values()):.2f} TFLOP a clip, {100 * row['utilisation']:.0f} % of a matrix product",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
