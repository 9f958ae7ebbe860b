"""Stage 3: trains the router on curated clips, for every preference between quality and tokens, or for one.

    accelerate launch training/train_router.py --config training/configs/router_tiny.yaml \
        --curated curated --train_data VIDEOS --output_dir runs/router

The clips are cut again from the sources of the curation, once, into `clips.npy`. Writes under --output_dir:
`checkpoint-N/` (to `--resume` from), `log.jsonl`, and at the end `router/` (EMA weights, configuration, summary, plot),
which --push_to_hub also sends to the Hub.
Some videos are held out; on their clips the log says P, the percentile of the proxy reward that the choices reach.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from evatok_hf import EvatokRouter, EvatokRouterConfig
from evatok_hf.allocation.reward import best_assignments, proxy_reward, reward_percentile
from evatok_hf.data.curated import CuratedClips
from evatok_hf.data.streaming import to_float
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import Replacement, write_text
from evatok_hf.tokenize.ahead import to_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids
from training.common.arguments import parse_overrides, source_names
from training.common.fields import option
from training.common.flops import router_flops
from training.common.optimizers import make_schedule
from training.common.options import ModelOptions
from training.common.reporting import MovingMean, save_router_curve
from training.common.run import Run

QUALITIES = (0.8, 1.0, 1.2, 1.4, 1.6)
OFFSET_WEIGHT = 0.005  # of a clip's mean error, which no choice at a w_q depends on


@dataclass(kw_only=True)
class RouterArguments(ModelOptions):
    """Options of router training."""

    curated: str = option("Folder that training/curate.py finished.")
    train_data: list[str] = option("The sources of the curation, in its order; they may have moved.")
    split: str = option("Split of the sources.", "train")
    more_curated: str | None = option(
        "Further clips of the same proxy and sources, measured in part (curate.py --branches).", None
    )
    # Model
    quality: float | None = option("The only w_q to train for, as in the paper; none: one router for every w_q.", None)
    # Targets
    targets: str = option(
        "argmax (the paper: cross-entropy with the best assignment), soft (with the softmax of rewards) or "
        "quality (squared error of the qualities of all assignments; for a router for every w_q).",
        "quality",
    )
    quality_range: list[float] = option("w_q are drawn between these for argmax and soft: lo hi.", [0.6, 1.8])
    channel_shuffle: float = option(
        "Probability that the colour channels of a clip change places (small data sets).", 0.0
    )
    val_fraction: float = option("Share of the videos that are held out.", 0.1)
    # Optimisation
    steps: int = 20_000
    batch_size: int = option("Clips a process and step.", 32)
    ema_decay: float = 0.999
    validate_every: int = 500

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "batch_size")
        self.one_of(targets=("argmax", "soft", "quality"))
        if self.targets == "quality" and self.quality is not None:
            raise ValueError("--targets quality trains for every w_q; leave --quality out, or use argmax or soft.")
        if len(self.quality_range) != 2 or not 0 <= self.quality_range[0] <= self.quality_range[1] <= 2:
            raise ValueError(f"--quality_range must be lo hi with 0 <= lo <= hi <= 2, got {self.quality_range}.")
        self.fractions("channel_shuffle")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val_fraction must lie in [0, 1), got {self.val_fraction}.")

    def model_config(self, curated: CuratedClips) -> EvatokRouterConfig:
        """Raises ValueError for unknown fields, and for a geometry that is not the curated clips'."""
        overrides = parse_overrides(self.model_overrides, EvatokRouterConfig)
        summary = curated.summary
        facts = {
            "quality": self.quality,
            "distance": summary["perceptual"],
            "distance_low": curated.bounds.low,
            "distance_high": curated.bounds.high,
            "proxy_fingerprint": summary["proxy_fingerprint"],
        }
        if fixed := sorted(facts.keys() & overrides.keys()):
            raise ValueError(f"--model_overrides cannot set {fixed}: --quality and the curated clips do.")
        config = EvatokRouterConfig.from_preset(self.preset, **{**overrides, **facts})
        given = {**summary["clip"], "block_lengths": summary["block_lengths"], "num_blocks": summary["num_blocks"]}
        for name, value in given.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{self.curated} was curated with {name} {value}, the router has {getattr(config, name)}; "
                    f"choose another --preset or give --model_overrides '{{\"{name}\": {json.dumps(value)}}}'."
                )
        return config


def held_out(curated: CuratedClips, fraction: float) -> np.ndarray:
    """(N,) bool: clips of the videos that are held out, chosen by their names."""
    pairs = zip(curated.rows["origin"][:], curated.rows["source"][:], strict=True)
    return np.array([zlib.crc32(f"{origin}/{source}".encode()) / 2**32 < fraction for origin, source in pairs])


def check_alike(curated: CuratedClips, more: CuratedClips) -> None:
    """Raises ValueError unless two curations are of one proxy, metric and list of sources."""
    for name in ("proxy_fingerprint", "perceptual", "clip", "block_lengths", "num_blocks"):
        if curated.summary[name] != more.summary[name]:
            raise ValueError(
                f"{more.folder} was curated with {name} {more.summary[name]}, {curated.folder} with "
                f"{curated.summary[name]}; they can only be joined where these are equal."
            )


def load_clips(curated: CuratedClips, name: str, args: RouterArguments, accelerator: Accelerator) -> np.ndarray:
    """The curated clips (N, F, 3, S, S) uint8 as a memory map under --output_dir, cut by the main process."""
    path = Path(args.output_dir) / name
    rows = [np.asarray(curated.rows[column][:]).tolist() for column in ("origin", "source", "frames", "crop")]
    key = hashlib.sha256(json.dumps([curated.clip_shape, *rows]).encode()).hexdigest()
    noted = path.with_suffix(".sha256")  # of which clips they are
    if accelerator.is_main_process and not (path.exists() and noted.exists() and noted.read_text() == key):
        noted.unlink(missing_ok=True)
        with Replacement(path) as partial:
            out = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(curated), *curated.clip_shape))
            curated.cut_into(out, source_names(args.train_data), args.split, progress=True)
            out.flush()
        write_text(noted, key)
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


class Batches:
    """Batches as a function of (seed, step, rank): order, flips, colours, preferences. Resuming needs no state."""

    def __init__(self, clips: ConcatDataset, rows: np.ndarray, args: RouterArguments, rank: int, world_size: int):
        self.clips, self.rows, self.args = clips, rows, args
        self.rank, self.world_size = rank, world_size

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> clips (B, F, 3, S, S) uint8, their rows (B,), preferences (B,)."""
        count, size = len(self.rows), self.args.batch_size
        first = (step * self.world_size + self.rank) * size
        places = np.arange(first, first + size)
        chosen = np.empty(size, dtype=np.int64)
        for epoch in np.unique(places // count):
            order = np.random.default_rng([self.args.seed, 0, int(epoch)]).permutation(count)
            mine = places // count == epoch
            chosen[mine] = self.rows[order[places[mine] % count]]
        rng = np.random.default_rng([self.args.seed, 1, step, self.rank])
        video = torch.from_numpy(np.stack([self.clips[row] for row in chosen]))
        video = torch.where(torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None, None], video.flip(-1), video)
        for clip in np.flatnonzero(rng.random(size) < self.args.channel_shuffle):
            video[clip] = video[clip][:, torch.from_numpy(rng.permutation(3))]
        lo, hi = self.args.quality_range
        return video, torch.from_numpy(chosen), torch.from_numpy(rng.uniform(lo, hi, size))


def complete(qualities: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Estimates what was not measured: qualities of all clips vary in few ways.

    The posterior mean of probabilistic principal components, fitted on all clips with every assignment measured; they
    say how assignments vary together, and nothing of single clips.

    Args:
        qualities: (N, A), NaN where not measured.
        full: (N,) which clips to fit.

    Returns:
        (N, A) float32, the measured values as they were.
    """
    measured = qualities.isfinite()
    if measured.all():
        return qualities
    fitted = qualities[full].double()
    mean = fitted.mean(0)
    _, singular, basis = torch.linalg.svd(fitted - mean, full_matrices=False)
    rank = min(12, len(fitted) - 1, fitted.shape[1] - 1)
    basis = basis[:rank].T  # (A, r)
    variance = (singular[:rank].square() / len(fitted)).clamp_min(1e-12)
    noise = (fitted - mean - (fitted - mean) @ basis @ basis.T).square().mean().clamp_min(1e-8)
    given = torch.where(measured, qualities.double() - mean, 0.0)
    precision = torch.einsum("na,ar,as->nrs", measured.double(), basis, basis) / noise + (1 / variance).diag()
    estimate = mean + torch.linalg.solve(precision, given @ basis / noise) @ basis.T
    return torch.where(measured, qualities, estimate.float())


class RouterLoss:
    """The loss of one of the three kinds of targets, given the distances of all clips (N, A)."""

    def __init__(self, args: RouterArguments, curated: CuratedClips, distances: torch.Tensor, temperature: float):
        self.args, self.space, self.bounds = args, curated.space, curated.bounds
        self.distances, self.temperature = distances, temperature
        self.qualities = ((self.bounds.high - distances) / (self.bounds.high - self.bounds.low)).float()  # (N, A)
        full = self.qualities.isfinite().all(-1)
        if args.targets == "quality" and full.sum() < 2:
            raise ValueError("at least two clips of --curated must have every assignment measured.")
        if args.targets == "quality":
            self.qualities = complete(self.qualities, full)
            # How much the differences between assignments vary from clip to clip, which is what choices depend on.
            centred = self.qualities - self.qualities.mean(-1, keepdim=True)
            self.scale = float((centred - centred.mean(0)).square().mean())

    def __call__(self, model: torch.nn.Module, video: torch.Tensor, rows: torch.Tensor, quality: torch.Tensor):
        """-> the loss of a batch."""
        if self.args.targets == "quality":
            error = model(video, return_dict=True).qualities - to_device(self.qualities[rows], video.device)
            offset = error.mean(-1, keepdim=True)
            return ((error - offset).square().mean() + OFFSET_WEIGHT * offset.square().mean()) / self.scale
        if self.args.quality is not None:
            quality = torch.full_like(quality, self.args.quality)
        rewards = proxy_reward(self.distances[rows], self.space, self.bounds, quality)
        if self.args.targets == "argmax":
            targets = best_assignments(rewards, self.space)
        else:
            targets = (rewards / self.temperature).softmax(-1).float()
        given = quality if self.args.quality is None else None
        return F.cross_entropy(model(video, given, return_dict=True).logits, to_device(targets, video.device))


@torch.no_grad()
def percentiles(
    router: EvatokRouter, clips: ConcatDataset, rows: np.ndarray, distances: torch.Tensor, curated: CuratedClips
) -> dict[str, float]:
    """P of the choices for some clips at each w_q (or the router's only one), and their mean tokens."""
    own = router.config.quality
    results = {}
    parts = np.array_split(rows, max(1, len(rows) // 32))
    batches = [to_float(torch.from_numpy(np.stack([clips[row] for row in part]))) for part in parts]
    for quality in QUALITIES if own is None else (own,):
        outputs = (router(batch.to(router.device), quality, return_dict=True) for batch in batches)
        logits = torch.cat([output.logits.cpu() for output in outputs])
        chosen = router.choose(logits)
        rewards = proxy_reward(distances[rows], curated.space, curated.bounds, quality)
        results[f"val/percentile_{quality}"] = reward_percentile(rewards, chosen)
        results[f"val/tokens_{quality}"] = curated.space.to_lengths(chosen).sum(-1).double().mean().item()
    return results


def main(argv: list[str] | None = None) -> Path:
    run = Run(RouterArguments, "router", __doc__, argv)
    args, accelerator, progress = run.args, run.accelerator, run.progress
    curated = CuratedClips.load(args.curated)
    config = args.model_config(curated)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    curations = {"clips.npy": curated}
    if args.more_curated:
        curations["more_clips.npy"] = CuratedClips.load(args.more_curated)
        check_alike(*curations.values())
    clips = ConcatDataset([load_clips(one, name, args, accelerator) for name, one in curations.items()])
    distances = torch.cat([one.distances() for one in curations.values()])
    val = [held_out(one, args.val_fraction) for one in curations.values()]
    val_rows = np.flatnonzero(val[0])
    train_rows = np.flatnonzero(~np.concatenate(val))
    if len(train_rows) == 0:
        raise ValueError(f"all {len(val[0])} clips are held out; lower --val_fraction or curate more videos.")
    if not distances[val_rows].isfinite().all():
        raise ValueError(
            f"P needs every assignment of held-out clips measured and {args.curated} lacks some; give it as "
            "--more_curated, or --val_fraction 0."
        )
    if args.targets != "quality" and not distances.isfinite().all():
        raise ValueError(f"--targets {args.targets} needs every assignment measured; use --targets quality.")
    run.logger.info("%d clips to train on, %d of other videos held out", len(train_rows), len(val_rows))

    router = EvatokRouter(config)
    loss_of = RouterLoss(args, curated, distances, config.reward_temperature)
    if config.quality is None:
        # What all clips have in common need not be learned, and is the best choice until more is.
        with torch.no_grad():
            known = loss_of.qualities[train_rows]
            router.head.bias.copy_(known[known.isfinite().all(-1)].mean(0))
            router.head.weight.zero_()
    batches = Batches(clips, train_rows, args, accelerator.process_index, accelerator.num_processes)
    optimizer = torch.optim.AdamW(
        router.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.98), fused=True
    )
    scheduler = make_schedule(optimizer, run)
    model, optimizer = accelerator.prepare(router, optimizer)
    trained = accelerator.unwrap_model(model)
    means = MovingMean(args.log_every)  # of steps before a checkpoint too
    run.begin(run.average(trained), scheduler, progress, means)

    def held_out_figures(averaged: EvatokRouter) -> dict[str, float]:
        return percentiles(averaged, clips, val_rows, distances, curated) if len(val_rows) else {}

    def export(averaged: EvatokRouter, folder: Path) -> None:
        facts = {
            "clips": len(train_rows),
            "clips_held_out": len(val_rows),
            "held_out": held_out_figures(averaged.to(accelerator.device)),
            "datasets": hub_ids(*source_names(args.train_data)),
            "curation": curated.summary,
            "more_curation": curations["more_clips.npy"].summary if args.more_curated else None,
        }
        with run.exporting(averaged, folder, facts) as target:
            save_router_curve(run.log_path, target / "loss_curve.png")

    model.train()
    clips_of_step = accelerator.num_processes * args.batch_size
    for step in run.steps():
        with run.waiting():
            video, rows, quality = batches(step)
        with accelerator.autocast():
            loss = loss_of(model, to_float(to_device(video, accelerator.device)), rows, quality)
        run.take_step(loss, optimizer, model.parameters())
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        means.add({"loss": loss})
        run.stepped()
        record = {}
        if run.log_due():
            record = {
                **means.values(),
                "learning_rate": scheduler.get_last_lr()[0],
                **run.speed("clips_per_second", args.log_every * clips_of_step, 3 * router_flops(config)),
            }
        if len(val_rows) and accelerator.is_main_process and run.due(args.validate_every):
            with run.validating(trained):
                figures = held_out_figures(trained)
            record |= figures
            run.tell(figures, ".2f")
        if record:
            run.log(record, {"loss": "loss"} if "loss" in record else None)
        run.save(trained, export)
    return run.finish(trained, export)


if __name__ == "__main__":
    run_script(main)
