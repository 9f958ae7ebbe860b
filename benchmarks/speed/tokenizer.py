"""Speed of encoding and decoding by tokens, beside LARP and AdapTok on the same machine.

    python benchmarks/speed/tokenizer.py --output tokenizer.json

Measured, everything in turn so that other work on the machine hits all alike, with random weights:

- clips a second by tokens of the clip, each clip of a batch with the same assignment;
- the peers at the same tokens a clip (LARP has one number for all clips): in a batch of equal clips AdapTok pads
  nothing, which is its best case; and choosing lengths too, by the router here, by four scorer passes there;
- `encode` and `decode` clip by clip and all clips together, by the size of the batch, with the lengths that the
  router of evatok-tiny gives to real clips: clips a second, of the peak, and what a clip launches (kernels; on a CPU
  operators);
- the encoder on a batch of such lengths, packed against padded to the longest block of the batch;
- router and tokenizer of evatok-tiny, on the clips of the sample video;
- most memory, each tokenizer in a process of its own.

Prints tables and writes JSON. Default settings take about ten minutes of two idle cores. Times are medians; "of the
peak" is the least time by operations and weights (see `machine.Peak`) over the time taken.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common import machine
from benchmarks.common.benchmark import Benchmark, Options, aim
from benchmarks.common.clips import SAMPLE, read_clips
from benchmarks.common.pictures import OTHER, OWN, plain_ticks
from benchmarks.speed.systems import (
    NAMES,
    Side,
    System,
    evatok_system,
    make_system,
    make_tokenizer,
    memory_of,
    peer_sizes,
    random_clips,
    scorer_flops,
    scorer_pass,
)
from evatok_hf import (
    AssignmentSpace,
    EvatokConfig,
    EvatokModel,
    EvatokRouter,
    EvatokRouterConfig,
    VideoTokens,
    bundled_checkpoints,
)
from evatok_hf.interrupts import run_script
from evatok_hf.models.checkpoint_evatok import resolve_device
from evatok_hf.models.modeling_evatok import PaddedLayout, TokenLayout
from training.common.fields import option
from training.common.flops import router_flops
from training.common.result_pages import markdown

POINTS = (128, 256, 512, 774, 1024, 2048)  # tokens a clip at the size "paper", of at most 2048
TINY = bundled_checkpoints()["evatok-tiny"]
POOLING = 4  # side of the squares of patches that evatok-tiny's router averages
EQUAL = 774  # at which the peers are compared: what the paper's router spends on UCF-101
BATCHES = (1, 4, 16, 32)


@dataclass(kw_only=True)
class Arguments(Options):
    preset: str = option("Size: paper, small or tiny.", "paper")
    batch_size: int = option("Clips of a batch, where the batch is not what is measured.", 1)
    lengths_from: str | None = option(
        "Token file, or folder of videos that the router of evatok-tiny looks at; by default its sample.", None
    )
    real_clips: int = option("Clips of the batch of real lengths, evenly out of all.", 32)
    device: str = option("cpu, cuda, ..; auto: the GPU where there is one.", "auto")
    dtype: str | None = option("float32 (CPU), bfloat16 (GPU) or float16.", None)
    threads: int | None = option("Threads of the CPU; by default torch's own number.", None)
    clock: str = option("wall, or cpu: the processor's seconds, with --threads 1 on a busy machine.", "wall")
    repeats: int = option("Rounds of each table, after one that warms up.", 5)
    budget: float = option("Seconds after which a table gets no further round.", 150.0)
    quick: bool = option("One round of three lengths and few clips; memory is left out.", False)

    def __post_init__(self):
        self.at_least(1, "batch_size", "real_clips", "repeats", "threads")
        self.one_of(dtype=machine.DTYPES, clock=machine.CLOCKS)
        if self.clock == "cpu" and (self.threads != 1 or self.device != "cpu"):
            raise ValueError("--clock cpu counts waiting threads as work; give --device cpu --threads 1 with it.")
        if self.quick:
            self.repeats, self.budget, self.real_clips = 1, 0.0, min(self.real_clips, 3)


@dataclass
class Bench:
    """What every table needs."""

    args: Arguments
    config: EvatokConfig
    device: torch.device
    dtype: torch.dtype
    peak: machine.Peak

    def time(self, functions: dict) -> dict[str, machine.Timing]:
        args = self.args
        return machine.interleaved(functions, self.device, args.repeats, budget=args.budget, clock=args.clock)

    def batch(self, tokens: int) -> torch.Tensor:
        """Lengths (B, T) near that many tokens a clip."""
        return torch.tensor([even_assignment(self.config.assignment_space, tokens)] * self.args.batch_size)

    def row(self, side: Side, timing: machine.Timing, batch: int | None = None) -> dict:
        """Figures of encoding or decoding a batch."""
        batch = batch or self.args.batch_size
        least, bound = self.peak.shortest(batch * side.flops, side.weights)
        return {
            "clips_per_second": batch / timing.median,
            "seconds": timing.median,
            "least_seconds": timing.least,
            "rounds": len(timing.seconds),
            "tflop_per_clip": side.flops / 1e12,
            "of_peak": least / timing.median,
            "bound": bound,
        }


def even_assignment(space: AssignmentSpace, tokens: int) -> list[int]:
    """The assignment nearest to so many tokens; of several the most even one, more tokens first."""
    return min(space.all().tolist(), key=lambda a: (abs(sum(a) - tokens), max(a) - min(a), [-length for length in a]))


def scaled(point: int, space: AssignmentSpace) -> int:
    """Tokens at the size "paper" -> the same fraction of the longest assignment."""
    return round(point * space.max_tokens / POINTS[-1])


def by_position(lengths: torch.Tensor, given: AssignmentSpace, wanted: AssignmentSpace) -> torch.Tensor:
    """Lengths (B, T) of one list of candidates -> those at the same positions of another.

    Raises:
        ValueError: lists that are not equally long, other numbers of blocks, or lengths that are no candidates.
    """
    if (len(given.block_lengths), given.num_blocks) != (len(wanted.block_lengths), wanted.num_blocks):
        raise ValueError(f"lengths of {given} cannot be scaled to {wanted}; choose another --preset.")
    return wanted.to_lengths(given.to_index(lengths))


def real_lengths(source: str | None, config: EvatokConfig) -> torch.Tensor:
    """Lengths (clips, T) that the router of evatok-tiny gives, or that a token file holds, scaled to `config`.

    Raises:
        ValueError: no such source, no clip in it, or tokens of other sizes than that model's and `config`'s.
    """
    tiny = EvatokRouter.from_pretrained(f"{TINY}/router", dtype=torch.float32).eval()
    if source is not None and Path(source).suffix == ".safetensors":
        tokens = VideoTokens.load(source)
        for known in (config, tiny.config):
            if tokens.height == known.image_size:
                return by_position(tokens.lengths, known.assignment_space, config.assignment_space)
        raise ValueError(
            f"{source} holds tokens of {tokens.height} pixels, not {config.image_size} as --preset has it nor "
            f"{tiny.config.image_size} as evatok-tiny; encode the video with one of these."
        )
    clips = read_clips(source or SAMPLE, tiny.config).floats
    lengths = [tiny.assign(clip[None]) for clip in clips]
    return by_position(torch.cat(lengths), tiny.config.assignment_space, config.assignment_space)


# --- tables -----------------------------------------------------------------------------------------------------------


def speeds(bench: Bench, model: EvatokModel) -> dict:
    """Encoding and decoding by tokens, and the peers beside the point `EQUAL`."""
    points = (POINTS[0], EQUAL, POINTS[-1]) if bench.args.quick else POINTS
    space = bench.config.assignment_space
    systems: dict[str, System] = {
        str(point): evatok_system(model, bench.batch(scaled(point, space))) for point in points
    }
    lengths = bench.batch(scaled(EQUAL, space))
    for name in ("larp", "adaptok"):
        systems[name] = make_system(name, bench.config, lengths, bench.device, bench.dtype)
    calls = {}
    for name, system in systems.items():
        calls[f"{name} encode"], calls[f"{name} decode"] = system.encode.call, system.decode.call
    timings = bench.time(calls)
    rows = {}
    for name, system in systems.items():
        encode, decode = timings[f"{name} encode"], timings[f"{name} decode"]
        rows[name] = {
            "name": system.name,
            "parameters": system.parameters,
            "tokens": system.tokens,
            "encode": bench.row(system.encode, encode),
            "decode": bench.row(system.decode, decode),
            "clips_per_second": bench.args.batch_size / (encode.median + decode.median),
        }
    return rows


def choosing(bench: Bench, model: EvatokModel, encode_seconds: dict[str, float]) -> dict:
    """Seconds of a batch to choose lengths: the router, as in the paper and with patches pooled as in evatok-tiny;
    AdapTok's equal scorer passes, of which one is timed."""
    configs = {
        "evatok": EvatokRouterConfig.from_preset(bench.args.preset, pooling=1),
        "pooled": EvatokRouterConfig.from_preset(bench.args.preset, pooling=POOLING),
    }
    routers = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        routers[name] = EvatokRouter(config).to(bench.device, bench.dtype).eval()
    lengths = bench.batch(scaled(EQUAL, bench.config.assignment_space))
    video = random_clips(bench.config, len(lengths), bench.device, bench.dtype)
    calls = {name: lambda router=router: router.assign(video) for name, router in routers.items()}
    calls["encode"] = lambda: model.encode(video, lengths)
    calls["adaptok"] = scorer_pass(bench.config, lengths, bench.device, bench.dtype)
    timings = bench.time(calls)
    passes = bench.config.num_blocks
    seconds = {name: timings[name].median for name in configs} | {"adaptok": passes * timings["adaptok"].median}
    flops = {name: router_flops(config) for name, config in configs.items()}
    flops["adaptok"] = passes * scorer_flops(peer_sizes(bench.config, adaptive=True))
    return {
        name: {
            "seconds": seconds[name],
            "tflop_per_clip": flops[name] / 1e12,
            "over_encode": seconds[name] / timings["encode"].median,
            "with_encode_clips_per_second": bench.args.batch_size
            / (seconds[name] + encode_seconds["adaptok" if name == "adaptok" else "evatok"]),
        }
        for name in seconds
    }


def bundled_router(bench: Bench) -> dict:
    """Seconds of router and tokenizer of evatok-tiny, trained ones, for all clips of the sample video."""
    router, model = (
        kind.from_pretrained(f"{TINY}/{name}", dtype=bench.dtype).to(bench.device).eval()
        for kind, name in ((EvatokRouter, "router"), (EvatokModel, "tokenizer"))
    )
    video = read_clips(SAMPLE, model.config).floats.to(bench.device, bench.dtype)
    lengths = router.assign(video)
    calls = {"router": lambda: router.assign(video), "encode": lambda: model.encode(video, lengths)}
    timings = machine.interleaved(calls, bench.device, 40, budget=10.0, clock=bench.args.clock)
    seconds = {name: timing.median for name, timing in timings.items()}
    return {"lengths": lengths.tolist(), **seconds, "over_encode": seconds["router"] / seconds["encode"]}


def spread(known: torch.Tensor, count: int) -> torch.Tensor:
    """So many of these clips' lengths, evenly out of all; some more than once where there are fewer."""
    return known[torch.linspace(0, len(known) - 1, count).round().long()]


def ways(bench: Bench, model: EvatokModel, known: torch.Tensor) -> list[dict]:
    """Real clips' lengths: `encode` and `decode` clip by clip and together, by the size of the batch."""
    rows = []
    for clips in (1, 3) if bench.args.quick else BATCHES:
        systems = {
            "clip by clip": evatok_system(model, spread(known, clips), exact=True),
            "together": evatok_system(model, spread(known, clips), exact=False),
        }
        sides = {(way, side): getattr(systems[way], side) for way in systems for side in ("encode", "decode")}
        timings = bench.time({key: side.call for key, side in sides.items()})
        for way in systems:
            row = {"clips": clips, "way": way}
            for name in ("encode", "decode"):
                side = sides[way, name]
                launched = machine.launches(side.call, bench.device) / clips
                row[name] = bench.row(side, timings[way, name], clips) | {"launches_per_clip": launched}
            rows.append(row)
    return rows


def packed(bench: Bench, model: EvatokModel, known: torch.Tensor) -> dict:
    """Real clips' lengths: the encoder of a training step, packed and padded to the longest."""
    count = min(bench.args.real_clips, len(known))
    lengths = spread(known, count)
    video = random_clips(bench.config, count, bench.device, bench.dtype)
    attention = model.config._attn_implementation
    layouts = {
        "packed": TokenLayout.choose(lengths, attention, bench.device),
        "padded": PaddedLayout(lengths, bench.device),
    }

    @torch.no_grad()
    def features(name: str) -> torch.Tensor:
        return model.features(video, layouts[name])

    calls = {name: lambda name=name: features(name) for name in layouts}
    timings = bench.time(calls)
    return {
        "lengths": lengths.tolist(),
        "tokens": float(lengths.sum(1).double().mean()),
        "padded_tokens": int(lengths.amax(0).sum()),
        "packed_seconds": timings["packed"].median,
        "padded_seconds": timings["padded"].median,
        "ratio": timings["padded"].median / timings["packed"].median,
    }


def memory(bench: Bench) -> dict:
    lengths = bench.batch(scaled(EQUAL, bench.config.assignment_space)).tolist()
    settings = (bench.args.preset, lengths, str(bench.device), bench.dtype, bench.args.threads)
    return {name: machine.in_fresh_process(memory_of, name, *settings) for name in NAMES}


# --- report -----------------------------------------------------------------------------------------------------------


AIMS = {
    "shortest_over_longest": ("time to encode a clip at 128 tokens over that at 2048", "<=", 0.45),
    "together_over_clip_by_clip": ("time to encode {} clips of real lengths together over clip by clip", "<=", 0.8),
    "padded_over_packed": ("time of the encoder, padded to the longest block over packed, real lengths", ">=", 1.5),
    "times_as_fast_as_LARP": ("encoding and decoding, clips a second over LARP-L's architecture", ">=", 1.0),
    "times_as_fast_as_AdapTok": ("the same over AdapTok's architecture, at equal tokens", ">=", 1.5),
    "router_over_encode": ("time of the router over that of encoding, the paper's shape", "<=", 0.10),
    "bundled_router_over_encode": ("the same of evatok-tiny, on the clips of its sample", "<=", 0.10),
    "pooled_router_over_encode": ("the paper's size, patches pooled 4 x 4 as in evatok-tiny", "<=", 0.10),
    "together_of_peak": ("encoding {} clips together, of the peak", ">=", 0.4),
}


def aims(report: dict[str, Any]) -> dict[str, dict]:
    """What the tokenizer should reach, and what it does; the share of the peak is aimed at on GPUs."""
    encode = {name: row["encode"]["seconds"] for name, row in report["speeds"].items()}
    both = {name: row["clips_per_second"] for name, row in report["speeds"].items()}
    last = {row["way"]: row["encode"] for row in report["ways"][-2:]}
    measured = {
        "shortest_over_longest": encode[str(POINTS[0])] / encode[str(POINTS[-1])],
        "together_over_clip_by_clip": last["together"]["seconds"] / last["clip by clip"]["seconds"],
        "padded_over_packed": report["packed"]["ratio"],
        "times_as_fast_as_LARP": both[str(EQUAL)] / both["larp"],
        "times_as_fast_as_AdapTok": both[str(EQUAL)] / both["adaptok"],
        "router_over_encode": report["choosing"]["evatok"]["over_encode"],
        "bundled_router_over_encode": report["bundled_router"]["over_encode"],
        "pooled_router_over_encode": report["choosing"]["pooled"]["over_encode"],
    }
    if report["machine"]["gpu"]:
        measured["together_of_peak"] = last["together"]["of_peak"]
    clips = report["ways"][-1]["clips"]
    told = {name: AIMS[name] for name in measured}
    return {name: aim(what.format(clips), measured[name], *limit) for name, (what, *limit) in told.items()}


def show_speeds(report: dict[str, Any]) -> str:
    headers, rows = ["tokenizer", "parameters", "tokens a clip"], []
    for side in ("encode", "decode"):
        headers += [f"{side}, clips/s", "TFLOP a clip", "of the peak"]
    for row in report["speeds"].values():
        cells = [row["name"], f"{row['parameters'] / 1e6:.0f}M", f"{row['tokens']:.0f}"]
        for side in (row["encode"], row["decode"]):
            cells += [f"{side['clips_per_second']:.3g}", f"{side['tflop_per_clip']:.3g}", f"{side['of_peak']:.0%}"]
        rows.append([*cells, f"{row['clips_per_second']:.3g}", row["encode"]["rounds"]])
    return markdown([*headers, "both, clips/s", "rounds"], rows)


def show_choosing(report: dict[str, Any]) -> str:
    ways = {"evatok": "the router", "pooled": f"one with patches pooled {POOLING} x {POOLING}", "adaptok": "AdapTok's"}
    parts = [
        f"{row['with_encode_clips_per_second']:.3g} clips/s by {ways[name]} ({row['tflop_per_clip']:.2g} TFLOP)"
        for name, row in report["choosing"].items()
    ]
    return f"Choosing lengths and encoding: {', '.join(parts)}."


def show_ways(report: dict[str, Any]) -> str:
    headers, rows = [f"on {report['machine']['gpu'] or 'a CPU'}", "clips"], []
    for side in ("encode", "decode"):
        headers += [f"{side}, clips/s", "of the peak", "launches a clip"]
    for row in report["ways"]:
        cells = [row["way"], row["clips"]]
        for side in (row["encode"], row["decode"]):
            cells += [f"{side['clips_per_second']:.3g}", f"{side['of_peak']:.0%}", f"{side['launches_per_clip']:.0f}"]
        rows.append(cells)
    return markdown(headers, rows)


def show(report: dict[str, Any]) -> str:
    real, peak, settings = report["packed"], report["peak"], report["settings"]
    parts = [
        f"Size {settings['preset']}, batches of {settings['batch_size']}, {settings['clock']} clock. A matrix product "
        f"reaches {peak['flops'] / 1e12:.3g} TFLOP/s, a copy {peak['bandwidth'] / 1e9:.3g} GB/s.",
        show_speeds(report),
        show_choosing(report),
        f"Encoding {len(real['lengths'])} clips of real lengths, {real['tokens']:.0f} tokens a clip, padded "
        f"{real['padded_tokens']}: {real['packed_seconds']:.3g} s packed, {real['padded_seconds']:.3g} s padded to the "
        "longest block.",
        show_ways(report),
    ]
    if report["memory"]:
        rows = [
            [NAMES[name], *(f"{row[key] / 2**20:.0f}" for key in ("before", "encode", "decode"))]
            for name, row in report["memory"].items()
        ]
        parts.append(markdown(["most memory, MiB", "before", "encode", "decode"], rows))
    return "\n\n".join(parts)


def panel(axis: Any, report: dict[str, Any]) -> None:
    rows = report["speeds"]
    points = [row for name, row in rows.items() if name.isdigit()]
    for side, style, filled in (("encode", "-", OTHER), ("decode", "--", "none")):
        speeds = [row[side]["clips_per_second"] for row in points]
        axis.plot([row["tokens"] for row in points], speeds, style, marker="o", color=OWN, label=f"EVATok {side}")
        for name, marker in (("larp", "s"), ("adaptok", "^")):
            point = rows[name]["tokens"], rows[name][side]["clips_per_second"]
            axis.plot(*point, marker, color=OTHER, markerfacecolor=filled, label=f"{rows[name]['name']} {side}")
    axis.set(title="tokenizer", xlabel="tokens a clip", ylabel="clips a second", xscale="log", yscale="log")
    plain_ticks(axis, "x", [row["tokens"] for row in points])
    plain_ticks(axis, "y", [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], axis.get_ylim())
    axis.legend(fontsize=7)


def measure(args: Arguments) -> dict[str, Any]:
    config = EvatokConfig.from_preset(args.preset)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    dtype = machine.DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    bench = Bench(args, config, device, dtype, machine.measure_peak(device, dtype, clock=args.clock))
    report: dict[str, Any] = {"machine": machine.describe_machine(device, dtype), "peak": asdict(bench.peak)}
    # First, since what they lack shows at once; each process has the machine for itself.
    report["memory"] = None if args.quick else memory(bench)
    model = make_tokenizer(config, device, dtype)
    known = real_lengths(args.lengths_from, config)
    report["packed"] = packed(bench, model, known)
    report["ways"] = ways(bench, model, known)
    report["speeds"] = speeds(bench, model)
    encode_seconds = {
        name: report["speeds"][key]["encode"]["seconds"] for name, key in (("evatok", str(EQUAL)), ("adaptok",) * 2)
    }
    report["choosing"] = choosing(bench, model, encode_seconds)
    report["bundled_router"] = bundled_router(bench)
    return report | {"aims": aims(report)}


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    run_script(main)
