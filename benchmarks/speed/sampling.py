"""Speed of drawing clips: the plain loop, the static cache, the compiled step, 8-bit weights; and what memory allows.

    python benchmarks/speed/sampling.py --output speed.json
    python benchmarks/speed/sampling.py --preset 327m --device cuda --dtype bfloat16 --batch_sizes 1 32 --int8

All alternatives draw the same clips in turn (the 8-bit one those of its own weights), with the same forced lengths. A
step reads all weights and the cache, so the least time of one is that of its bytes at the speed of a copy, or that of
its operations at the speed of a matrix product if it is longer: the roofline. `weights` is the part of the copy's speed
that the weights alone take. Random weights will do: only times are measured.
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options, aim, table
from benchmarks.common.machine import Peak, describe_machine, interleaved, measure_peak
from benchmarks.common.pictures import OWN
from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig, default_checkpoint
from evatok_hf.models.checkpoint_evatok import DTYPES, resolve_device
from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt
from training.common.fields import option

PRESETS = ("bundled", "tiny", "small", "327m", "633m")


@dataclass(kw_only=True)
class Arguments(Options):
    preset: str = option(f"One of {', '.join(PRESETS)}; all but the first random.", "bundled")
    device: str = option("cpu or cuda.", "cpu")
    dtype: str = option("float32 or bfloat16.", "float32")
    batch_sizes: list[int] = option("Clips at once.", [1, 16])
    implementations: list[str] = option("Those to compare; eager first.", ["eager", "static", "compiled"])
    int8: bool = option("Also with 8-bit weights (torchao), by the last of them.", False)
    length: int | None = option("Tokens of a block; the middle candidate by default.", None)

    def __post_init__(self):
        self.one_of(preset=PRESETS, dtype=DTYPES)
        self.at_least(1, "batch_sizes")


def load(args: Arguments) -> EvatokForCausalLM:
    dtype = DTYPES[args.dtype]
    if args.preset == "bundled":
        model = EvatokForCausalLM.from_pretrained(default_checkpoint("generator"), subfolder="generator", dtype=dtype)
    else:
        torch.manual_seed(0)
        model = EvatokForCausalLM(EvatokGeneratorConfig.from_preset(args.preset, num_classes=19)).to(dtype)
    return model.to(args.device).eval()


def quantized(model: EvatokForCausalLM) -> EvatokForCausalLM:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise ValueError('--int8 needs torchao; pip install -c constraints.txt -e ".[quantize]".') from error
    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def weight_bytes(model: EvatokForCausalLM) -> int:
    """Bytes that a step reads: all weights but the table of embeddings, of which it reads a row an id."""

    def size(tensor: torch.Tensor) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(size(p) for name, p in model.named_parameters() if "embed_tokens" not in name)


def compare(args: Arguments, models: dict[str, EvatokForCausalLM], batch: int, scale: float, peak: Peak) -> list[dict]:
    """The rows of the table for one size of batch, with or without guidance."""
    config, device = next(iter(models.values())).config, torch.device(args.device)
    length = args.length or config.block_lengths[len(config.block_lengths) // 2]
    lengths = [[length] * config.num_blocks] * batch
    prompts = [Prompt(index % config.num_classes) for index in range(batch)]
    runners = {
        name: partial(
            sample,
            model,
            prompts,
            range(batch),
            lengths=lengths,
            batch_size=batch,
            implementation=name.removesuffix("-int8"),
            guidance_scale=scale,
        )
        for name, model in models.items()
    }
    times = interleaved(runners, device, 4, warmups=0)
    first = {name: seconds.pop(0) for name, seconds in times.items()}  # compiles
    slow = times[args.implementations[0]]
    tokens = config.num_blocks * length  # of a clip
    steps, copies = tokens + config.num_blocks + 1, 1 if scale == 1 else 2
    rows = []
    for name, model in models.items():
        seconds, weights = statistics.median(times[name]), weight_bytes(model)
        head = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        cached = 2 * config.num_hidden_layers * head * model.dtype.itemsize * (steps / 2)
        operations = 2 * model.num_parameters(exclude_embeddings=True) * batch * copies
        least, bound = peak.shortest(operations, weights + batch * copies * cached)
        rows.append(
            {
                "implementation": name,
                "batch": batch,
                "guidance": scale,
                "clips": batch,
                "seconds_per_clip": seconds / batch,
                "tokens_per_second": batch * tokens / seconds,
                "ms_per_step": 1000 * seconds / steps,
                "first_seconds": first[name],  # by the wall
                "times_eager": statistics.median(a / b for a, b in zip(slow, times[name], strict=True)),
                "weight_bytes": weights,
                "weight_bandwidth": weights * steps / seconds / peak.bandwidth,
                "roofline_ms_per_step": 1000 * least,
                "bound": bound,
                "of_roofline": least * steps / seconds,
            }
        )
    return rows


def aims(rows: list[dict], gpu: bool) -> dict:
    """The compiled loop's aim, in its best case, and the figure reached."""
    compiled = [row for row in rows if row["implementation"] == "compiled"]
    if not compiled:
        return {}
    what = "drawing clips: the compiled loop over the plain one, the best case"
    best = max(row["times_eager"] for row in compiled)
    found = {"compiled_over_eager": aim(what, best, ">=", 3 if gpu else 1.3)}
    single = [row["weight_bandwidth"] for row in compiled if row["batch"] == 1]
    if gpu and single:
        what = "the same, one clip at a time: weights read a second over the speed of a copy"
        found["weight_bandwidth_of_one_clip"] = aim(what, max(single), ">=", 0.5)
    return found


def measure(args: Arguments) -> dict[str, Any]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = resolve_device(args.device)
    model = load(args)
    models = {name: model for name in args.implementations}
    if args.int8:
        models[f"{args.implementations[-1]}-int8"] = quantized(model)
    peak = measure_peak(device, model.dtype, 1.0)
    cases = list(product(args.batch_sizes, (1.0, 1.25)))  # of guidance, 1 is none
    rows = [row for case in tqdm(cases, "tables", file=sys.stderr) for row in compare(args, models, *case, peak)]
    return {
        "machine": describe_machine(device, model.dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
        "copy_bytes_per_second": peak.bandwidth,
        "matmul_flops": peak.flops,
        "rows": rows,
        "aims": aims(rows, device.type == "cuda"),
    }


def show(report: dict[str, Any]) -> str:
    columns = [
        ("loop", "{implementation}"),
        ("clips at once", "{batch}"),
        ("guidance", "{guidance:g}"),
        ("s a clip", "{seconds_per_clip:.3g}"),
        ("tokens/s", "{tokens_per_second:.3g}"),
        ("ms a step", "{ms_per_step:.3g}"),
        (f"times {report['rows'][0]['implementation']}", "{times_eager:.2f}"),
        ("weights", "{weight_bandwidth:.0%}"),
        ("of the roofline", "{of_roofline:.0%}"),
    ]
    return (
        f"{table(columns, report['rows'])}\n\nA copy reaches {report['copy_bytes_per_second'] / 1e9:.3g} GB/s, a "
        f"matrix product {report['matmul_flops'] / 1e12:.3g} TFLOP/s."
    )


def panel(axis: Any, report: dict[str, Any]) -> None:
    rows = report["rows"]
    names = [f"{row['implementation']}, {row['batch']} at once, guidance {row['guidance']:g}" for row in rows]
    axis.barh(names, [row["tokens_per_second"] for row in rows], color=OWN)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(title="drawing clips", xlabel="tokens a second")


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
