"""Speed of encoding and decoding by tokens, beside LARP and AdapTok on the same machine.

    python benchmarks/speed/tokenizer.py --output tokenizer.json

Measured, everything in turn so that other work on the machine hits all alike, with random weights:

- clips a second by tokens of the clip, each clip of a batch with the same assignment;
- the peers at the same tokens a clip (LARP has one number for all clips): in a batch of equal clips AdapTok pads
  nothing, which is its best case; and choosing lengths too, by the router here, by four scorer passes there;
- with the lengths that the router of evatok-tiny gives to real clips, by the size of the batch: `encode` and `decode`
  clip by clip and all clips together, and what a clip launches (kernels; on a CPU operators); and the encoder alone,
  packed against padded to the longest block of the batch;
- router and tokenizer of evatok-tiny, on the clips of the sample video;
- most memory, each tokenizer in a process of its own.

Ten minutes of two idle cores. Times are medians; "of the peak" is the least time by operations and weights (see
`machine.Peak`) over the time taken.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common import machine
from benchmarks.common.benchmark import Benchmark, Options, aim
from benchmarks.common.clips import SAMPLE, read_clips
from benchmarks.common.pictures import OTHER, OWN, plain_ticks
from benchmarks.speed.systems import NAMES, System, Systems, memory_of, peer_sizes, scorer_flops
from evatok_hf import (
    AssignmentSpace,
    EvatokConfig,
    EvatokModel,
    EvatokRouter,
    EvatokRouterConfig,
    VideoTokens,
    bundled_checkpoints,
)
from evatok_hf.models.checkpoint_evatok import DTYPES, resolve_device
from evatok_hf.models.modeling_evatok import PaddedLayout, TokenLayout
from training.common.fields import option
from training.common.flops import router_flops
from training.common.result_pages import markdown

POINTS = (128, 256, 512, 774, 1024, 2048)  # tokens a clip at the size "paper", of at most 2048
TINY = bundled_checkpoints()["evatok-tiny"]
POOLING = 4  # side of the squares of patches that evatok-tiny's router averages
EQUAL = 774  # at which the peers are compared: what the paper's router spends on UCF-101
BATCHES = (1, 4, 16, 32)
SIDES = ("encode", "decode")


@dataclass(kw_only=True)
class Arguments(Options):
    preset: str = option("Size: paper, small or tiny.", "paper")
    batch_size: int = option("Clips of a batch, where the batch is not what is measured.", 1)
    lengths_from: str | None = option(
        "Token file, or folder of videos that the router of evatok-tiny looks at; by default its sample.", None
    )
    device: str = option("cpu, cuda, ..; auto: the GPU where there is one.", "auto")
    dtype: str | None = option("float32 or bfloat16; by default as the device has it.", None)
    budget: float = option("Seconds after which a table gets no further round.", 150.0)
    quick: bool = option("One round of three lengths and few clips; memory is left out.", False)

    def __post_init__(self):
        self.at_least(1, "batch_size")
        self.one_of(dtype=DTYPES)
        if self.quick:
            self.budget = 0.0


@dataclass
class Bench(Systems):
    """The models and the timer that every table needs."""

    args: Arguments
    peak: machine.Peak

    def time(self, functions: dict, rounds: int = 5, budget: float | None = None) -> dict[Hashable, list[float]]:
        budget = self.args.budget if budget is None else budget
        return machine.interleaved(functions, self.device, rounds, budget=budget)

    def batch(self, point: int) -> torch.Tensor:
        """Lengths (B, T) near so many tokens a clip at the size "paper", at others near the same part of the most."""
        space = self.config.assignment_space
        tokens = round(point * space.max_tokens / POINTS[-1])
        return torch.tensor([even_assignment(space, tokens)] * self.args.batch_size)

    def rows(self, systems: Mapping[str, System], batch: int) -> dict[str, dict]:
        """Of each system figures of encoding and of decoding its batch, which is of so many clips."""
        sides = {(name, side): getattr(system, side) for name, system in systems.items() for side in SIDES}
        timings = self.time({key: side.call for key, side in sides.items()})
        rows: dict[str, dict] = {name: {} for name in systems}
        for (name, side), of in sides.items():
            seconds = median(timings[name, side])
            least, bound = self.peak.shortest(batch * of.flops, of.weights)
            rows[name][side] = {
                "clips_per_second": batch / seconds,
                "seconds": seconds,
                "least_seconds": min(timings[name, side]),
                "rounds": len(timings[name, side]),
                "tflop_per_clip": of.flops / 1e12,
                "of_peak": least / seconds,
                "bound": bound,
            }
        return rows


def even_assignment(space: AssignmentSpace, tokens: int) -> list[int]:
    """The assignment nearest to so many tokens; of several the most even one, more tokens first."""
    return min(space.all().tolist(), key=lambda a: (abs(sum(a) - tokens), max(a) - min(a), [-length for length in a]))


def by_position(lengths: torch.Tensor, given: AssignmentSpace, wanted: AssignmentSpace) -> torch.Tensor:
    """Lengths (B, T) of one list of candidates -> those at the same positions of another."""
    if (len(given.block_lengths), given.num_blocks) != (len(wanted.block_lengths), wanted.num_blocks):
        raise ValueError(f"lengths of {given} cannot be scaled to {wanted}; choose another --preset.")
    return wanted.to_lengths(given.to_index(lengths))


def real_lengths(source: str | None, config: EvatokConfig) -> torch.Tensor:
    """Lengths (clips, T) that the router of evatok-tiny gives, or that a token file holds, scaled to `config`."""
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
    systems = {str(point): bench.evatok(bench.batch(point), model) for point in points}
    systems |= {name: bench.peer(name, bench.batch(EQUAL)) for name in ("larp", "adaptok")}
    rows = bench.rows(systems, bench.args.batch_size)
    for name, row in rows.items():
        seconds = row["encode"]["seconds"] + row["decode"]["seconds"]
        row |= {key: getattr(systems[name], key) for key in ("name", "parameters", "tokens")}
        row["clips_per_second"] = bench.args.batch_size / seconds
    return rows


def choosing(bench: Bench, model: EvatokModel, speeds: dict) -> dict:
    """Seconds of a batch to choose lengths: the router, as in the paper and with patches pooled as in evatok-tiny;
    AdapTok's equal scorer passes, of which one is timed. Encoding afterwards takes the time that `speeds` has."""
    lengths = bench.batch(EQUAL)
    video, calls, flops = bench.clips(len(lengths)), {}, {}
    for name, pooling in (("evatok", 1), ("pooled", POOLING)):
        config = EvatokRouterConfig.from_preset(bench.args.preset, pooling=pooling)
        calls[name] = partial(bench.make(EvatokRouter, config).assign, video)
        flops[name] = router_flops(config)
    calls["encode"] = lambda: model.encode(video, lengths)
    calls["adaptok"] = bench.scorer_pass(lengths)
    flops["adaptok"] = scorer_flops(peer_sizes(bench.config, adaptive=True))
    timings = bench.time(calls)
    rows = {}
    for name, passes in (("evatok", 1), ("pooled", 1), ("adaptok", bench.config.num_blocks)):
        seconds = passes * median(timings[name])
        encoding = speeds["adaptok" if name == "adaptok" else str(EQUAL)]["encode"]["seconds"]
        rows[name] = {
            "seconds": seconds,
            "tflop_per_clip": passes * flops[name] / 1e12,
            "over_encode": seconds / median(timings["encode"]),
            "with_encode_clips_per_second": bench.args.batch_size / (seconds + encoding),
        }
    return rows


def bundled_router(bench: Bench) -> dict:
    """Seconds of router and tokenizer of evatok-tiny, trained ones, for all clips of the sample video."""
    router, model = (
        kind.from_pretrained(f"{TINY}/{name}", dtype=bench.dtype).to(bench.device).eval()
        for kind, name in ((EvatokRouter, "router"), (EvatokModel, "tokenizer"))
    )
    video = read_clips(SAMPLE, model.config).floats.to(bench.device, bench.dtype)
    lengths = router.assign(video)
    calls = {"router": lambda: router.assign(video), "encode": lambda: model.encode(video, lengths)}
    seconds = {name: median(times) for name, times in bench.time(calls, 40, budget=10.0).items()}
    return {"lengths": lengths.tolist(), **seconds, "over_encode": seconds["router"] / seconds["encode"]}


def spread(known: torch.Tensor, count: int) -> torch.Tensor:
    """So many of these clips' lengths, evenly out of all; some more than once where there are fewer."""
    return known[torch.linspace(0, len(known) - 1, count).round().long()]


def ways(bench: Bench, model: EvatokModel, known: torch.Tensor) -> list[dict]:
    """Real clips' lengths: `encode` and `decode` clip by clip and together, by the size of the batch."""
    rows = []
    for clips in (1, 3) if bench.args.quick else BATCHES:
        systems = {
            "clip by clip": bench.evatok(spread(known, clips), model, exact=True),
            "together": bench.evatok(spread(known, clips), model, exact=False),
        }
        for way, row in bench.rows(systems, clips).items():
            for side in SIDES:
                launched = machine.launches(getattr(systems[way], side).call, bench.device)
                row[side]["launches_per_clip"] = launched / clips
            rows.append({"clips": clips, "way": way, **row})
    return rows


def packed(bench: Bench, model: EvatokModel, known: torch.Tensor) -> dict:
    """Real clips' lengths: the encoder of a training step, packed and padded to the longest; on a GPU, packed in other
    ways, too."""
    count = min(3 if bench.args.quick else BATCHES[-1], len(known))
    lengths = spread(known, count)
    video = bench.clips(count)
    layouts = {
        "packed": TokenLayout.choose(lengths, model.config._attn_implementation, bench.device),
        "padded": PaddedLayout(lengths, bench.device),
    }
    models = dict.fromkeys(layouts, model)
    if bench.device.type == "cuda":
        models |= {name: copy.deepcopy(model) for name in ("with compiled layers", "in one call of flex attention")}
        compiled, flex = list(models)[2:]
        for layer in models[compiled].encoder.layers:
            layer.compile(dynamic=True)
        models[flex].set_attn_implementation("flex_attention")
        layouts |= {compiled: layouts["packed"], flex: TokenLayout.choose(lengths, "flex_attention", bench.device)}
    features = torch.no_grad()(EvatokModel.features)
    timings = bench.time({name: partial(features, models[name], video, layout) for name, layout in layouts.items()})
    seconds = {name: median(times) for name, times in timings.items()}
    others = {name: second for name, second in seconds.items() if name not in ("packed", "padded")}
    return {
        "lengths": lengths.tolist(),
        "tokens": float(lengths.sum(1).double().mean()),
        "padded_tokens": int(lengths.amax(0).sum()),
        "packed_seconds": seconds["packed"],
        "padded_seconds": seconds["padded"],
        "ratio": seconds["padded"] / seconds["packed"],
        "other_seconds": others,
    }


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
    """The tokenizer's aims and the figures reached; the share of the peak is aimed at on GPUs."""
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
    for side in SIDES:
        headers += [f"{side}, clips/s", "TFLOP a clip", "of the peak"]
    for row in report["speeds"].values():
        cells = [row["name"], f"{row['parameters'] / 1e6:.0f}M", f"{row['tokens']:.0f}"]
        for side in map(row.get, SIDES):
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
    for side in SIDES:
        headers += [f"{side}, clips/s", "of the peak", "launches a clip"]
    for row in report["ways"]:
        cells = [row["way"], row["clips"]]
        for side in map(row.get, SIDES):
            cells += [f"{side['clips_per_second']:.3g}", f"{side['of_peak']:.0%}", f"{side['launches_per_clip']:.0f}"]
        rows.append(cells)
    return markdown(headers, rows)


def show(report: dict[str, Any]) -> str:
    real, peak, settings = report["packed"], report["peak"], report["settings"]
    others = "".join(f", {second:.3g} s {name}" for name, second in real.get("other_seconds", {}).items())
    parts = [
        f"Size {settings['preset']}, batches of {settings['batch_size']}. A matrix product "
        f"reaches {peak['flops'] / 1e12:.3g} TFLOP/s, a copy {peak['bandwidth'] / 1e9:.3g} GB/s.",
        show_speeds(report),
        show_choosing(report),
        f"Encoding {len(real['lengths'])} clips of real lengths, {real['tokens']:.0f} tokens a clip, padded "
        f"{real['padded_tokens']}: {real['packed_seconds']:.3g} s packed, {real['padded_seconds']:.3g} s padded to the "
        f"longest block{others}.",
        show_ways(report),
    ]
    if report["memory"]:
        places = ("before", *SIDES)
        rows = [[NAMES[name], *(f"{row[at] / 2**20:.0f}" for at in places)] for name, row in report["memory"].items()]
        parts.append(markdown(["most memory, MiB", *places], rows))
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
    plain_ticks(axis, "y", [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.legend(fontsize=7)


def measure(args: Arguments) -> dict[str, Any]:
    config = EvatokConfig.from_preset(args.preset)
    device = resolve_device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    bench = Bench(config, device, dtype, args, machine.measure_peak(device, dtype))
    report: dict[str, Any] = {"machine": machine.describe_machine(device, dtype), "peak": asdict(bench.peak)}
    # First, since what they lack shows at once; each process has the machine for itself.
    settings = (args.preset, bench.batch(EQUAL).tolist(), str(device), dtype)
    measured = () if args.quick else NAMES
    report["memory"] = {name: machine.in_fresh_process(memory_of, name, *settings) for name in measured} or None
    model = bench.make(EvatokModel, config)
    known = real_lengths(args.lengths_from, config)
    report["packed"] = packed(bench, model, known)
    report["ways"] = ways(bench, model, known)
    report["speeds"] = speeds(bench, model)
    report["choosing"] = choosing(bench, model, report["speeds"])
    report["bundled_router"] = bundled_router(bench)
    return report | {"aims": aims(report)}


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
