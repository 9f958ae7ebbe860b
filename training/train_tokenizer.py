"""Trains the EVATok tokenizer: stage 1 (proxy, random assignments) of the paper, and with other assignments stage 4.

    accelerate launch training/train_tokenizer.py --config training/configs/tokenizer_tiny.yaml \
        --train_data VIDEOS --output_dir runs/tiny

Writes under --output_dir: `checkpoint-N/` (everything to `--resume` from), `samples/` (grids of original over
reconstruction), `log.jsonl`, and at the end `tokenizer/` (EMA weights, configuration, processor, summary, loss curve).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evatok_hf import EvatokConfig, EvatokModel, EvatokRouter, EvatokVideoProcessor, psnr
from evatok_hf.allocation import check_same_space
from evatok_hf.perceptual import PERCEPTUAL_NAMES, load_perceptual
from evatok_hf.reward import check_quality
from evatok_hf.streaming import ClipConfig, ClipStream, collate, evaluation_clips, to_float

sys.path.insert(0, str(Path(__file__).parent))
from arguments import check_launch, describe_machine, parse_arguments, parse_sources
from checkpoints import Progress, load_checkpoint, refuse_used, save_checkpoint
from losses import LossWeights, TokenizerLoss, learning_rate_factor, quantization_blend, spectral_factor
from reporting import MovingMean, save_grid, save_loss_curve

logger = logging.getLogger("train_tokenizer")


@dataclass
class TokenizerArguments:
    """Options of tokenizer training. Defaults of the optimisation are GigaTok's."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, samples, logs and the trained tokenizer."})
    train_data: list[str] = field(
        metadata={"help": "Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight."}
    )
    val_data: str | None = field(default=None, metadata={"help": "Source of validation clips; none: no validation."})
    train_split: str = field(default="train", metadata={"help": "Split of the training sources."})
    val_split: str = field(default="val", metadata={"help": "Split of the validation source."})
    # Model
    preset: str = field(default="tiny", metadata={"help": "Model size: tiny, small or paper."})
    model_overrides: str = field(
        default="{}", metadata={"help": "JSON of EvatokConfig fields; they replace the preset's."}
    )
    init_from: str | None = field(default=None, metadata={"help": "Checkpoint or Hub id whose weights to start from."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager (faster in bf16 on some CPUs)."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})
    # Assignments
    assignment: str = field(
        default="random",
        metadata={
            "help": "random (stage 1: uniform over all assignments), uniform:N, or router:PATH (stage 4: what a "
            "router chooses for each clip)."
        },
    )
    quality: float | None = field(
        default=None,
        metadata={"help": "router: the preference w_q; none: the router's own, or drawn anew for each clip."},
    )
    quality_range: list[float] = field(
        default_factory=lambda: [0.8, 1.6], metadata={"help": "router: w_q are drawn between these: lo hi."}
    )
    random_fraction: float = field(
        default=0.0,
        metadata={"help": "router: share of clips that get a random assignment all the same, so that all stay usable."},
    )
    shared_assignment: bool = field(
        default=False,
        metadata={
            "help": "One random assignment, or one preference of the router, for all clips of a step, drawn anew each "
            "step: no or little padding, unbiased."
        },
    )
    # Clips
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    freeze_probability: float = field(
        default=0.0, metadata={"help": "How often a clip stands still from a random frame of it on."}
    )
    channel_shuffle: float = field(
        default=0.0,
        metadata={"help": "Probability that the colour channels of a clip change places (small data sets)."},
    )
    clips_per_video: int = field(default=1, metadata={"help": "Clips cut from a video each time it comes up."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    num_workers: int = field(default=1, metadata={"help": "Loader processes a training process."})
    # Losses
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute error."})
    l2_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error."})
    spectral_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error of patches' cosine transforms over usual amplitudes."},
    )
    spectral_end: int = field(
        default=0, metadata={"help": "The spectral weight falls linearly to 0 at this step; 0: it stays."}
    )
    perceptual: str = field(default="lpips-vgg", metadata={"help": f"none or one of {', '.join(PERCEPTUAL_NAMES)}."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual term."})
    perceptual_start: int = field(default=0, metadata={"help": "Step from which the perceptual term counts."})
    perceptual_frames: int = field(default=0, metadata={"help": "Random frames a clip that it sees; 0: all."})
    perceptual_weights: str | None = field(default=None, metadata={"help": "Local torchvision backbone for LPIPS."})
    blend_start: int = field(default=0, metadata={"help": "Step from which quantisation is blended in."})
    blend_end: int = field(default=0, metadata={"help": "Step from which quantisation is complete."})
    # Optimisation
    steps: int = field(default=1_000_000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Clips a process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes an optimiser step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    min_learning_rate_ratio: float = field(default=0.1, metadata={"help": "Final over peak learning rate."})
    warmup_steps: int = field(default=0, metadata={"help": "Linear warm-up steps."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta 2."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradient norm clipping."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the averaged weights."})
    mixed_precision: str = field(default="bf16", metadata={"help": "no, fp16 or bf16."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, clips, assignments and all else."})
    # Bookkeeping
    resume: str | None = field(default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."})
    save_every: int = field(default=5000, metadata={"help": "Steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    log_every: int = field(default=20, metadata={"help": "Steps between log lines."})
    validate_every: int = field(default=1000, metadata={"help": "Steps between validations and sample grids."})
    val_clips_per_video: int = field(default=2, metadata={"help": "Validation clips of a video."})
    tracker: str = field(default="none", metadata={"help": "none, or a tracker of accelerate: tensorboard, wandb, .."})
    export_dtype: str = field(default="float32", metadata={"help": "dtype of the final weights: float32 or bfloat16."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})

    def __post_init__(self):
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "clips_per_video", "val_clips_per_video")
        for name in (*counts, "save_every", "keep_checkpoints", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        kind, _, value = self.assignment.partition(":")
        if not (self.assignment == "random" or (kind == "uniform" and value.isdigit()) or (kind == "router" and value)):
            raise ValueError(f"--assignment must be random, uniform:N or router:PATH, got {self.assignment!r}.")
        if kind == "uniform" and self.shared_assignment:
            raise ValueError(f"--shared_assignment is for random and router assignments, not {self.assignment}.")
        if kind != "router" and self.quality is not None:
            raise ValueError("--quality needs --assignment router:PATH.")
        if self.quality is not None:
            check_quality(self.quality)
        if not 0 <= self.random_fraction <= 1:
            raise ValueError(f"--random_fraction must lie in [0, 1], got {self.random_fraction}.")
        if len(self.quality_range) != 2 or not 0 <= self.quality_range[0] <= self.quality_range[1] <= 2:
            raise ValueError(f"--quality_range must be lo hi with 0 <= lo <= hi <= 2, got {self.quality_range}.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"--mixed_precision must be no, fp16 or bf16, got {self.mixed_precision!r}.")
        if self.export_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--export_dtype must be float32 or bfloat16, got {self.export_dtype!r}.")
        if self.perceptual != "none" and self.perceptual not in PERCEPTUAL_NAMES:
            raise ValueError(f"--perceptual must be none or one of {list(PERCEPTUAL_NAMES)}, got {self.perceptual!r}.")
        if self.blend_end < self.blend_start:
            raise ValueError("--blend_end must not lie before --blend_start.")
        self.model_config()

    def model_config(self) -> EvatokConfig:
        try:
            overrides = json.loads(self.model_overrides)
        except json.JSONDecodeError as error:
            raise ValueError(f"--model_overrides is no JSON: {error}") from error
        known = EvatokConfig().to_dict()
        unknown = [name for name in overrides if name not in known] if isinstance(overrides, dict) else [overrides]
        if unknown:
            raise ValueError(f"--model_overrides must map fields of EvatokConfig to values; it has no {unknown}.")
        return EvatokConfig.from_preset(self.preset, **overrides)


class Assigner:
    """Draws the lengths of a batch as a function of (seed, step, micro-step, rank), so that resuming needs no state."""

    def __init__(self, args: TokenizerArguments, model: EvatokModel, rank: int):
        self.args, self.space, self.rank = args, model.assignment_space, rank
        self.kind, _, value = args.assignment.partition(":")
        if self.kind == "uniform":
            self.uniform = self.space.uniform(int(value))
        if self.kind == "router":
            self.router = EvatokRouter.from_pretrained(value, dtype=torch.float32).eval().requires_grad_(False)
            check_same_space(model, self.router)
            if args.quality is not None:
                self.router.check_quality(args.quality)

    def generator(self, purpose: str, step: int, micro: int, shared: bool = False) -> torch.Generator:
        """Independent for each purpose; `shared` gives the same draws to all processes."""
        key = f"{self.args.seed} {purpose} {step} {micro} {'all' if shared else self.rank}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)

    @torch.no_grad()
    def lengths(self, video: torch.Tensor, step: int, micro: int) -> torch.Tensor:
        """(B, T) int64 for clips (B, F, C, H, W) in [-1, 1]."""
        if self.kind == "uniform":
            return self.uniform.repeat(len(video), 1)
        if self.kind == "random":
            count = 1 if self.args.shared_assignment else len(video)
            drawn = self.space.random(count, self.generator("lengths", step, micro, self.args.shared_assignment))
            return drawn.expand(len(video), -1)
        # Shared or not, a draw for each clip; shared ones are equal, so that the clips' lengths are much alike.
        shared, quality = self.args.shared_assignment, self.args.quality
        count = 1 if shared else len(video)
        if quality is None and self.router.config.quality is None:
            lo, hi = self.args.quality_range
            quality = lo + (hi - lo) * torch.rand(count, generator=self.generator("quality", step, micro, shared))
        lengths = self.space.to_lengths(self.router.choose(self.router.to(video.device)(video, quality).logits))
        generator = self.generator("lengths", step, micro, shared)
        strays = torch.rand(count, generator=generator) < self.args.random_fraction
        return torch.where(strays[:, None], self.space.random(count, generator), lengths)


def shuffle_channels(video: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Permutes the colour channels of some clips, each as a whole. (B, F, 3, H, W) -> the same shape."""
    if probability == 0:
        return video
    chosen = torch.rand(len(video), generator=generator) < probability
    order = torch.stack([torch.randperm(video.shape[2], generator=generator) for _ in chosen])
    order = torch.where(chosen[:, None], order, torch.arange(video.shape[2]))
    return torch.stack([clip[:, channels] for clip, channels in zip(video, order.to(video.device), strict=True)])


@torch.no_grad()
def validate(model: EvatokModel, clips: torch.Tensor, config: EvatokConfig, batch_size: int = 8) -> tuple[dict, list]:
    """Mean PSNR at three uniform lengths, and the reconstructions of the first clips at the middle one."""
    candidates = config.block_lengths
    results, shown = {}, []
    for length in dict.fromkeys((candidates[0], candidates[len(candidates) // 2], candidates[-1])):
        values = []
        for batch in clips.split(batch_size):
            video = to_float(batch).to(model.device)
            output = model(video, length).reconstruction.float().clamp(-1, 1)
            values.append(psnr(video, output))
            if length == candidates[len(candidates) // 2] and sum(map(len, shown)) < 8:
                shown.append(output.cpu())
        results[f"val/psnr_{length}"] = torch.cat(values).mean().item()
    return results, shown


def earlier_run(init_from: str | None) -> dict | None:
    """What `training.json` says beside the weights that a run starts from; None where there is none.

    Raises:
        ValueError: a damaged one.
    """
    if init_from is None or not (path := Path(init_from) / "training.json").is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); mend it, or take it away.") from error


def export(
    model: EvatokModel, args: TokenizerArguments, facts: dict, summary: dict, output_dir: Path, log: Path
) -> Path:
    """The trained tokenizer as a folder for `from_pretrained`, with how it came to be."""
    target, temporary = output_dir / "tokenizer", output_dir / ".tokenizer.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(getattr(torch, args.export_dtype)).save_pretrained(temporary)
    size = model.config.image_size
    EvatokVideoProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_frames=model.config.num_frames
    ).save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps({**summary, "arguments": facts}, indent=2) + "\n")
    save_loss_curve(log, temporary / "loss_curve.png")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def main(argv: list[str] | None = None) -> Path:
    args, facts = parse_arguments(TokenizerArguments, __doc__, argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.tracker == "none" else args.tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "trackers")),
        cpu=args.cpu,
    )
    check_launch(accelerator)
    set_seed(args.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.resume is None:
        refuse_used(output_dir)

    config, continues = args.model_config(), earlier_run(args.init_from)
    if args.init_from:
        model = EvatokModel.from_pretrained(args.init_from, dtype=torch.float32)
        config = model.config
    else:
        model = EvatokModel(config)
    model.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    perceptual = None if args.perceptual == "none" else load_perceptual(args.perceptual, args.perceptual_weights)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    criterion = TokenizerLoss(
        config,
        LossWeights(args.l1_weight, args.l2_weight, args.perceptual_weight, args.spectral_weight),
        perceptual,
        args.perceptual_frames,
    )
    assigner = Assigner(args, model, accelerator.process_index)

    clip = ClipConfig(
        num_frames=config.num_frames,
        image_size=config.image_size,
        strides=tuple(args.strides),
        scale=tuple(args.scale),
        freeze_probability=args.freeze_probability,
        clips_per_video=args.clips_per_video,
    )
    stream = ClipStream(
        parse_sources(args.train_data),
        args.train_split,
        clip,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        shuffle_buffer=args.shuffle_buffer,
    )
    val_clips = None
    if args.val_data and accelerator.is_main_process:
        items = list(evaluation_clips(args.val_data, clip, args.val_clips_per_video, split=args.val_split))
        val_clips = collate(items)["pixel_values_videos"]

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, args.steps, args.warmup_steps, args.min_learning_rate_ratio),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = accelerator.unwrap_model(model)
    ema = EMAModel(trained.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, scheduler, progress)
    if args.resume:
        path = load_checkpoint(accelerator, output_dir, args.resume, progress, stream)
        ema.to(accelerator.device)  # accelerate gives its state back on the CPU
        logger.info("resumed from %s at step %d", path, progress.step)
    # Not through accelerate: the stream already gives every process its own videos.
    loader = DataLoader(stream, batch_size=args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    if args.tracker != "none":
        accelerator.init_trackers("evatok_tokenizer", config={k: str(v) for k, v in facts.items()})

    log_path = output_dir / "log.jsonl"
    # Terms are added once for each forward pass.
    means = MovingMean(args.log_every * args.gradient_accumulation_steps)
    used_codes = torch.zeros(config.codebook_size, dtype=torch.bool)
    bar = tqdm(total=args.steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    batches = iter(loader)
    model.train()
    started, last_log = time.monotonic() - progress.seconds, time.monotonic()
    while progress.step < args.steps:
        step = progress.step
        blend = quantization_blend(step, args.blend_start, args.blend_end)
        for micro in range(args.gradient_accumulation_steps):
            batch = next(batches)
            video = to_float(batch["pixel_values_videos"].to(accelerator.device))
            video = shuffle_channels(video, args.channel_shuffle, assigner.generator("channels", step, micro))
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    lengths = assigner.lengths(video, step, micro)
                    output = model(video, lengths, quantization_blend=blend)
                generator = assigner.generator("frames", step, micro)
                loss, terms = criterion(
                    output,
                    video,
                    generator,
                    with_perceptual=step >= args.perceptual_start,
                    spectral_factor=spectral_factor(step, args.spectral_end),
                )
                if not math.isfinite(terms["total"].item()):
                    raise ValueError(
                        f"the loss became {terms['total'].item()} at step {step}; the last checkpoint is kept. "
                        "Lower --learning_rate and use --resume latest."
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    # With fp16 the scaler skips such steps by itself.
                    if accelerator.scaler is None and not math.isfinite(norm):
                        raise ValueError(
                            f"the gradient became {float(norm)} at step {step}; the last checkpoint is kept. "
                            "Lower --learning_rate and use --resume latest."
                        )
                optimizer.step()
                optimizer.zero_grad()
            stream.record(batch)
            used_codes[output.ids.cpu()] = True
            means.add({**terms, "tokens": lengths.sum(-1).double().mean()})
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        ema.step(trained.parameters())
        progress.step += 1
        progress.seconds = time.monotonic() - started
        bar.update()

        if progress.step % args.log_every == 0 and accelerator.is_main_process:
            now = time.monotonic()
            clips = args.log_every * args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            record = {
                "step": progress.step,
                **means.values(),
                "psnr": 10 * math.log10(4 / max(means.values()["l2"], 1e-12)),
                "codebook_use": used_codes.float().mean().item(),
                "blend": blend,
                "learning_rate": scheduler.get_last_lr()[0],
                "clips_per_second": clips / (now - last_log),
                "skipped_videos": sum(stream.skipped.values()),
                "seconds": progress.seconds,
            }
            last_log = now
            used_codes.zero_()
            with log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            accelerator.log(record, step=progress.step)
            shown = {"loss": "total", "psnr": "psnr", "codes": "codebook_use", "clips/s": "clips_per_second"}
            bar.set_postfix({name: f"{record[key]:.4g}" for name, key in shown.items()})
        last = progress.step == args.steps
        if val_clips is not None and (last or progress.step % args.validate_every == 0):
            ema.store(trained.parameters())
            ema.copy_to(trained.parameters())
            trained.eval()
            results, reconstructions = validate(trained, val_clips, config)
            trained.train()
            ema.restore(trained.parameters())
            save_grid(val_clips, reconstructions, output_dir / "samples" / f"step-{progress.step:07d}.png")
            with log_path.open("a") as file:
                file.write(json.dumps({"step": progress.step, **results}) + "\n")
            accelerator.log(results, step=progress.step)
            bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
            last_log = time.monotonic()
        if last or progress.step % args.save_every == 0:
            save_checkpoint(accelerator, output_dir, progress.step, args.keep_checkpoints, stream)
    bar.close()
    skipped = dict(stream.skipped)
    if skipped:
        logger.warning("skipped videos, by cause: %s", skipped)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(trained.parameters())
        summary = {
            "command": shlex.join(["training/train_tokenizer.py", *(sys.argv[1:] if argv is None else argv)]),
            "seed": args.seed,
            "steps": progress.step,
            "clips": progress.step * args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "seconds": round(progress.seconds),
            "parameters": trained.num_parameters(),
            "machine": describe_machine(accelerator),
            "torch": torch.__version__,
            "skipped_videos": skipped,
            "continues": continues,
        }
        target = export(trained.cpu(), args, facts, summary, output_dir, log_path)
        logger.info("wrote %s", target)
    accelerator.end_training()
    return output_dir / "tokenizer"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        logger.error("%s", error)
        raise SystemExit(1) from None
