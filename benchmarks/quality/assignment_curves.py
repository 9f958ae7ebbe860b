"""Quality against tokens for every way to choose assignments, on clips whose sources trained nothing.

    python benchmarks/quality/assignment_curves.py --data VAL --curated curated --router runs/router/router \
        --proxy runs/proxy/tokenizer --final runs/final/tokenizer --output out/curves

Measures all assignments of every clip with each tokenizer (an hour of one core for 100 small clips; kept under
--output batch by batch and reused, so that a run that was stopped goes on), then reads every strategy's choices off
these tables: uniform, fixed (one assignment for all clips, fitted on the curated ones), threshold, max-proxy-reward and
router. Prints tables and writes `curves.json` and `curves.png`. Savings are at equal mean distance, between the points
of a curve linearly in log tokens; intervals are 95 %, bootstrapped over clips.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.common.benchmark import Benchmark
from benchmarks.common.clips import ClipOptions
from benchmarks.common.machine import interleaved
from benchmarks.common.pictures import log_axis
from benchmarks.quality import curve_figures as figures
from benchmarks.speed.search import AT_ONCE, compare
from evatok_hf import EvatokModel, EvatokRouter
from evatok_hf.allocation.reward import best_assignments, proxy_reward, reward_percentile
from evatok_hf.allocation.search import search_assignments
from evatok_hf.data.curated import CuratedClips
from evatok_hf.metrics import load_perceptual
from evatok_hf.models.files_evatok import Replacement
from evatok_hf.models.modeling_evatok_router import DEFAULT_QUALITY, check_same_space
from evatok_hf.pictures.figures import pyplot, save_figure
from training.common.arguments import choose_precision
from training.common.checkpoints import earlier_run
from training.common.fields import option
from training.common.result_pages import markdown

QUALITIES = (0.8, 1.0, 1.2, 1.4, 1.6)
COLOURS = {
    "uniform": "tab:grey",
    "fixed": "tab:brown",
    "threshold": "tab:green",
    "search": "tab:blue",
    "router": "tab:red",
}
NAMES = {"search": "max-proxy-reward"}


@dataclass(kw_only=True)
class Arguments(ClipOptions):
    curated: str = option("Curated clips of the proxy, on which `fixed` is fitted.")
    router: str = option("Router for every preference.")
    proxy: str = option("Proxy tokenizer (stage 1).")
    final: str | None = option("Final tokenizer (stage 4).", None)
    single_routers: list[str] = option("Routers trained for one w_q alone, to compare P with.", [])
    timing_clips: int = option("Clips on which search and brute force are timed; 0: none.", 2)
    mixed_precision: str = option("no, or bf16 (quicker); auto: as the device has it.", "no")
    output: str = option("Folder for tables, JSON and picture.", "out/curves")

    def __post_init__(self):
        self.mixed_precision = choose_precision(self.mixed_precision, cpu=True, choices=("no", "bf16"))


def all_tables(model: EvatokModel, video: torch.Tensor, metric, args: Arguments) -> torch.Tensor:
    """(N, A, 3); of the clips that were measured before from `--output`."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
    metric = copy.deepcopy(metric).to(dtype)
    folder = Path(args.output) / f"tables-{model.fingerprint()}-{metric.name}-{args.mixed_precision}"
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for clips in tqdm(video.split(AT_ONCE), desc="search", unit="batch"):
        path = folder / f"{hashlib.sha256(clips.numpy().tobytes()).hexdigest()[:16]}.npy"
        if not path.exists():
            table = search_assignments(model, clips, metric, AT_ONCE, dtype=dtype).table().numpy()
            with Replacement(path) as partial:
                np.save(partial, table)
        tables.append(torch.from_numpy(np.load(path)))
    return torch.cat(tables)


def timings(model: EvatokModel, router: EvatokRouter, video: torch.Tensor, metric, args: Arguments) -> dict:
    """Search over brute force, and the router's share of encoding at its own assignments."""
    report = {}
    if args.timing_clips:
        report["search"] = compare(model, video[: args.timing_clips], metric)
    clip = video[:1]
    lengths = router.assign(clip)
    ways = {"routing": lambda: router.assign(clip), "encoding": lambda: model.encode(clip, lengths)}
    routing, encoding = map(min, interleaved(ways, model.device, repeats=20).values())
    report["router"] = {"seconds": routing, "encode_seconds": encoding, "share": routing / (routing + encoding)}
    return report


def measure(args: Arguments) -> dict[str, Any]:
    curated = CuratedClips.load(args.curated)
    space, bounds = curated.space, curated.bounds
    router, *singles = (
        EvatokRouter.from_pretrained(path, dtype=torch.float32).eval() for path in (args.router, *args.single_routers)
    )
    paths = {name: getattr(args, name) for name in ("proxy", "final") if getattr(args, name)}
    models = {name: EvatokModel.from_pretrained(path, dtype=torch.float32).eval() for name, path in paths.items()}
    for model in models.values():
        check_same_space(model, router)
    if models["proxy"].fingerprint() != curated.summary["proxy_fingerprint"]:
        raise ValueError(f"{args.curated} was curated with another proxy than {args.proxy}; name that one.")
    clips = args.read(models["proxy"].config)
    video, training = clips.floats, curated.distances()
    metric = load_perceptual(curated.summary["perceptual"])
    logits = {
        quality: torch.cat([router(one[None], quality).logits for one in video]).detach() for quality in QUALITIES
    }
    routed = [router.choose(logits[quality]) for quality in QUALITIES]
    tables = {name: all_tables(model, video, metric, args) for name, model in models.items()}
    rewards = {quality: proxy_reward(tables["proxy"][..., 0], space, bounds, quality) for quality in QUALITIES}
    tokenizers = {}
    for name, table in tables.items():
        distances = table[..., 0]
        # Labels come from the proxy, as in the paper; the final tokenizer is judged by its own figures.
        chosen = {
            "uniform": [int(space.to_index([length] * space.num_blocks)) for length in space.block_lengths],
            "fixed": figures.fixed_choices(training, space),
            "threshold": figures.threshold_choices(distances, space),
            "search": [best_assignments(reward, space) for reward in rewards.values()],
            "router": routed,
        }
        curves = {strategy: figures.points(choices, table, space) for strategy, choices in chosen.items()}
        tokenizers[name] = {
            "fingerprint": models[name].fingerprint(),
            "training": seed_and_steps(paths[name]),
            "curves": {k: curve.mean(1).tolist() for k, curve in curves.items()},
            "fixed_assignments": space.to_lengths(torch.tensor(chosen["fixed"])).tolist(),
            "savings": {
                strategy: {
                    str(quality): {
                        other: figures.savings_with_interval(curves[strategy][index], curves[other])
                        for other in ("uniform", "fixed")
                    }
                    for index, quality in enumerate(QUALITIES)
                }
                for strategy in ("search", "router")
            },
        }
    return {
        "metric": metric.name,
        "mixed_precision": args.mixed_precision,
        **clips.facts(),
        "bounds": bounds.to_dict(),
        "router": router.fingerprint(),
        "tokenizers": tokenizers,
        "percentile": percentiles(rewards, training, logits, router, singles, video, curated),
        "timings": timings(models.get("final", models["proxy"]), router, video, metric, args),
    }


def seed_and_steps(path: str) -> dict:
    """From the training.json beside the weights; empty where there is none."""
    if (training := earlier_run(path)) is None:
        return {}
    facts = {"seed": training["seed"], "steps": training["steps"], "assignment": training["arguments"]["assignment"]}
    while training := training.get("continues"):
        facts["steps"] += training["steps"]
        facts["seed"] = f"{training['seed']}, {facts['seed']}"
    return facts


def percentiles(measured, training, logits, router, singles, video, curated) -> dict:
    """P of the router, of a router that was trained for that w_q alone, of no router at all; top-1 and top-5."""
    space, bounds, rows = curated.space, curated.bounds, {}
    own = {router.config.quality: router for router in singles}
    for quality, rewards in measured.items():
        best = best_assignments(rewards, space)
        # What a constant choice reaches: the best assignment for all curated clips alike.
        mean = proxy_reward(training, space, bounds, quality).mean(0, keepdim=True)
        constant = best_assignments(mean, space).expand(len(rewards))
        rows[str(quality)] = {
            "router": reward_percentile(rewards, router.choose(logits[quality])),
            "constant": reward_percentile(rewards, constant),
            "top1": figures.top_k(logits[quality], best, 1),
            "top5": figures.top_k(logits[quality], best, 5),
        }
        if quality in own:
            alone = own[quality].assign(video)
            rows[str(quality)]["router_of_this_quality"] = reward_percentile(rewards, space.to_index(alone))
    return rows


def point_cells(point: Sequence[float]) -> list[str]:
    """Of tokens, distance and PSNR."""
    return [f"{value:.{digits}f}" for value, digits in zip(point, (1, 4, 2), strict=True)]


def show(report: dict[str, Any]) -> str:
    parts = [f"{report['videos']} videos, {report['clips']} clips; {report['metric']}"]
    entries = report["tokenizers"]
    for name, entry in entries.items():
        rows = []
        for strategy, curve in entry["curves"].items():
            labels = [f" {q}" for q in QUALITIES] if strategy in ("search", "router") else [""] * len(curve)
            for label, point in zip(labels, curve, strict=True):
                rows.append([f"{NAMES.get(strategy, strategy)}{label}", *point_cells(point)])
        parts.append(f"{name} tokenizer ({entry['training'] or entry['fingerprint']}):")
        parts.append(markdown(["strategy", "tokens a clip", "distance", "PSNR"], rows))
        rows = [
            [
                f"{NAMES.get(strategy, strategy)} {quality}",
                *(f"{row[o]['percent']:.1f} % ({row[o]['low']:.1f} to {row[o]['high']:.1f})" for o in row),
            ]
            for strategy, by_quality in entry["savings"].items()
            for quality, row in by_quality.items()
        ]
        parts.append(markdown(["tokens saved at equal distance", "against uniform", "against fixed"], rows))
    rows = []
    for quality, row in report["percentile"].items():
        alone = row.get("router_of_this_quality")
        cells = [None if p is None else f"{p:.1f}" for p in (row["router"], alone, row["constant"])]
        rows.append([quality, *cells, *(f"{row[key]:.0f} %" for key in ("top1", "top5"))])
    headers = ["w_q", "P of the router", "of a router of this w_q", "of one assignment", "top-1", "top-5"]
    parts.append(markdown(headers, rows))
    if "final" in entries:
        rows = []
        for name, entry in entries.items():
            facts = [entry["training"].get(key) for key in ("seed", "steps")]
            rows.append([name, *facts, *point_cells(entry["curves"]["router"][QUALITIES.index(DEFAULT_QUALITY)])])
        parts.append(f"Under the router's assignments at w_q {DEFAULT_QUALITY}:")
        parts.append(markdown(["tokenizer", "seed", "steps", "tokens", "distance", "PSNR"], rows))
    if row := report["timings"].get("search"):
        seconds = f"{row['seconds']:.1f} s / {row['brute_force_seconds']:.1f} s"
        parts.append(f"Prefix tree over brute force, {row['clips']} clips: {seconds} = {row['ratio']:.2f}")
    row = report["timings"]["router"]
    parts.append(f"Router: {1e3 * row['seconds']:.1f} ms, {100 * row['share']:.1f} % of choosing and encoding a clip")
    return "\n\n".join(parts)


def draw(report: dict[str, Any], path: Path) -> None:
    """Mean distance over mean tokens, a panel a tokenizer."""
    plt = pyplot()
    entries = report["tokenizers"]
    figure, axes = plt.subplots(1, len(entries), figsize=(5.5 * len(entries), 4.2), layout="constrained", squeeze=False)
    for axis, (name, entry) in zip(axes[0], entries.items(), strict=True):
        for strategy, curve in entry["curves"].items():
            data = np.array(sorted(curve))
            marker = "o" if strategy in ("search", "router") else "."
            style = {"marker": marker, "markersize": 4, "linewidth": 1.2, "color": COLOURS[strategy]}
            axis.plot(*data[:, :2].T, **style, label=NAMES.get(strategy, strategy))
        axis.set(title=f"{name} tokenizer", ylabel=f"mean {report['metric']}")
        log_axis(axis, "mean tokens a clip")
        axis.legend(fontsize=8)
    save_figure(figure, path)


main = Benchmark(Arguments, measure, show, "curves", draw)

if __name__ == "__main__":
    main.run()
