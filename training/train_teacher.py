"""Trains a small VideoMAE on the user's own clips: a stand-in teacher where the published weights cannot be had.

    accelerate launch training/train_teacher.py --train_data VIDEOS --output_dir runs/teacher

Masked autoencoding as VideoMAE has it (Tong et al. 2022): the same random cells are hidden in every frame (a tube), and
the network, which sees the others only, predicts their normalised pixels. Writes under --output_dir: `checkpoint-N/`
(everything to `--resume` from), `log.jsonl`, and at the end `teacher/`, a VideoMAE checkpoint with its processor for
the semantic discriminator and the alignment loss of `train_tokenizer.py`. It is no VideoMAE-B, and says so.

The defaults (16 x 64 x 64, an encoder of 2.7M parameters) are small enough for two CPU cores.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForPreTraining, PreTrainedModel, VideoMAEConfig
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf.data.streaming import ClipConfig, ClipStream, collate, merge, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import replacing_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.arguments import check_launch, choose_precision, describe_machine, parse_arguments, parse_sources
from training.common.checkpoints import Progress, load_checkpoint, refuse_used, save_checkpoint
from training.common.draws import Draws
from training.common.reporting import MovingMean
from training.common.steps import check_finite, take_step
from training.tokenizer.discriminators import mean_over_processes
from training.tokenizer.losses import learning_rate_factor
from training.tokenizer.teachers import Preparation

logger = logging.getLogger("train_teacher")

STAND_IN = "a stand-in for VideoMAE-B, trained by evatok_hf on other clips and much smaller"


@dataclass
class TeacherArguments:
    """Options of teacher training. Betas, weight decay and masking are VideoMAE's; sizes are ours."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the trained teacher."})
    train_data: list[str] = field(
        metadata={"help": "Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the training sources."})
    # Model
    image_size: int = field(default=64, metadata={"help": "Side of the clips in pixels."})
    num_frames: int = field(default=16, metadata={"help": "Frames of a clip."})
    patch_size: int = field(default=8, metadata={"help": "Side of a cell in pixels."})
    tubelet_size: int = field(default=4, metadata={"help": "Frames of a cell."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the encoder, which the teacher is."})
    num_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_heads: int = field(default=3, metadata={"help": "Attention heads of the encoder."})
    decoder_hidden_size: int = field(default=96, metadata={"help": "Width of the decoder, needed in training only."})
    decoder_num_layers: int = field(default=2, metadata={"help": "Layers of the decoder."})
    decoder_num_heads: int = field(default=3, metadata={"help": "Attention heads of the decoder."})
    mask_ratio: float = field(
        default=0.9, metadata={"help": "Share of the cells that are hidden, 0.75 to 0.9 usually."}
    )
    # Clips
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    clips_per_video: int = field(default=2, metadata={"help": "Clips cut from a video each time it comes up."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    num_workers: int = field(default=1, metadata={"help": "Loader processes a training process."})
    # Optimisation
    steps: int = field(default=3000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Clips a process and step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    min_learning_rate_ratio: float = field(default=0.01, metadata={"help": "Final over peak learning rate."})
    warmup_steps: int = field(default=150, metadata={"help": "Linear warm-up steps."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta 2."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm clipping."})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16; auto: bf16 where the device computes in it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, clips, masks and all else."})
    # Bookkeeping
    resume: str | None = field(default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."})
    save_every: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    log_every: int = field(default=20, metadata={"help": "Steps between log lines."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})

    def __post_init__(self):
        sizes = ("image_size", "num_frames", "patch_size", "tubelet_size", "hidden_size", "num_layers", "num_heads")
        sizes += ("decoder_hidden_size", "decoder_num_layers", "decoder_num_heads", "steps", "batch_size")
        for name in (*sizes, "clips_per_video", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        pairs = (("image_size", "patch_size"), ("num_frames", "tubelet_size"), ("hidden_size", "num_heads"))
        for whole, part in (*pairs, ("decoder_hidden_size", "decoder_num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"--{whole} must be a multiple of --{part} ({getattr(self, part)}).")
        if self.num_workers < 0 or self.batch_size % max(1, self.num_workers):
            raise ValueError(
                f"--batch_size ({self.batch_size}) must be a multiple of --num_workers ({self.num_workers})."
            )
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu)
        if not 0 < self.masked_cells < self.cells:
            raise ValueError(
                f"--mask_ratio must hide some of the {self.cells} cells of a frame, got {self.mask_ratio}."
            )

    @property
    def cells(self) -> int:
        """Of a frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def masked_cells(self) -> int:
        return round(self.mask_ratio * self.cells)

    def model_config(self) -> VideoMAEConfig:
        config = VideoMAEConfig(
            image_size=self.image_size,
            num_frames=self.num_frames,
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size,
            decoder_hidden_size=self.decoder_hidden_size,
            decoder_num_hidden_layers=self.decoder_num_layers,
            decoder_num_attention_heads=self.decoder_num_heads,
            decoder_intermediate_size=4 * self.decoder_hidden_size,
            use_mean_pooling=False,  # as the published pretraining checkpoints: with the last norm
        )
        config.description = STAND_IN
        return config


def draw_tubes(clips: int, cells: int, masked: int, tubelets: int, generator: torch.Generator) -> torch.Tensor:
    """Bool (clips, tubelets * cells), True where hidden: `masked` random cells of each clip, alike in all tubelets."""
    order = torch.rand(clips, cells, generator=generator).argsort(dim=1)
    hidden = torch.zeros(clips, cells, dtype=torch.bool).scatter_(1, order[:, :masked], True)
    return hidden.repeat(1, tubelets)


def export(model: PreTrainedModel, args: TeacherArguments, facts: dict, summary: dict, loss: float | None) -> Path:
    """The trained teacher as a folder for `from_pretrained`, with how it came to be."""
    output_dir = Path(args.output_dir)
    target = output_dir / "teacher"
    with replacing_folder(target) as temporary:
        model.save_pretrained(temporary)
        VideoMAEImageProcessorPil(  # saves the same file as the torchvision processor, and needs no torchvision
            size={"shortest_edge": args.image_size},
            crop_size={"height": args.image_size, "width": args.image_size},
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ).save_pretrained(temporary)
        (temporary / "training.json").write_text(
            json.dumps({**summary, "loss": loss, "arguments": facts}, indent=2) + "\n"
        )
        shape = f"{args.num_frames} x {args.image_size} x {args.image_size}"
        (temporary / "README.md").write_text(
            f"# VideoMAE, {summary['parameters'] / 1e6:.1f}M parameters, {shape}\n\n"
            f"This is {STAND_IN}. It serves experiments in which the published weights cannot be had; results with it "
            "are not results with VideoMAE-B.\n\n"
            f"Masked autoencoding for {summary['steps']} steps ({summary['clips']} clips), {args.mask_ratio:.0%} of "
            "the cells hidden. `training.json` has the whole command, its options and the last training loss.\n"
        )
    return target


def main(argv: list[str] | None = None) -> Path:
    args, facts = parse_arguments(TeacherArguments, __doc__, argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
    check_launch(accelerator)
    set_seed(args.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.resume is None:
        refuse_used(output_dir)

    config = args.model_config()
    model = AutoModelForPreTraining.from_config(config)
    preparation = Preparation(args.image_size)
    draws = Draws(args.seed, accelerator.process_index, accelerator.num_processes)
    stream = ClipStream(
        parse_sources(args.train_data),
        args.train_split,
        ClipConfig(
            num_frames=args.num_frames,
            image_size=args.image_size,
            strides=tuple(args.strides),
            scale=tuple(args.scale),
            clips_per_video=args.clips_per_video,
        ),
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        shuffle_buffer=args.shuffle_buffer,
    )
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
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress)
    if args.resume:
        path = load_checkpoint(accelerator, output_dir, args.resume, progress, stream)
        logger.info("resumed from %s at step %d", path, progress.step)
    # Not through accelerate: the stream already gives every process its own videos. A batch has an equal part from each
    # worker, so that the clips of a step only depend on how many workers there are in all processes together.
    readers = max(1, args.num_workers)
    loader = DataLoader(stream, args.batch_size // readers, num_workers=args.num_workers, collate_fn=collate)

    log_path = output_dir / "log.jsonl"
    means = MovingMean(args.log_every)
    bar = tqdm(total=args.steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    parts_of_batches = iter(loader)
    model.train()
    started, last_log = time.monotonic() - progress.seconds, time.monotonic()
    while progress.step < args.steps:
        step, rate = progress.step, scheduler.get_last_lr()[0]
        parts = [next(parts_of_batches) for _ in range(readers)]
        video = preparation(to_float(merge(parts)["pixel_values_videos"].to(accelerator.device)))
        clips = accelerator.num_processes * args.batch_size
        hidden = draw_tubes(
            clips,
            args.cells,
            args.masked_cells,
            args.num_frames // args.tubelet_size,
            draws.generator("tubes", step),
        )[draws.rows(args.batch_size)]
        loss = model(video, bool_masked_pos=hidden.to(accelerator.device)).loss
        # The same value on all processes, so that none is left waiting for one that has stopped.
        mean_loss = mean_over_processes(loss.detach())
        check_finite(mean_loss, "loss", step)
        accelerator.backward(loss)
        take_step(accelerator, optimizer, model.parameters(), args.max_grad_norm, step)
        for part in parts:
            stream.record(part)
        means.add({"loss": mean_loss})
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        progress.step += 1
        progress.seconds = time.monotonic() - started
        bar.update()

        if progress.step % args.log_every == 0 and accelerator.is_main_process:
            now = time.monotonic()
            record = {
                "step": progress.step,
                **means.values(),
                "learning_rate": rate,
                "clips_per_second": args.log_every * clips / (now - last_log),
                "seconds": progress.seconds,
            }
            last_log = now
            with log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.set_postfix({"loss": f"{record['loss']:.4g}", "clips/s": f"{record['clips_per_second']:.4g}"})
        if progress.step == args.steps or progress.step % args.save_every == 0:
            save_checkpoint(accelerator, output_dir, progress.step, args.keep_checkpoints, stream)
    bar.close()
    skipped = dict(stream.skipped)
    if skipped:
        logger.warning("skipped videos, by cause: %s", skipped)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        summary = {
            "what": STAND_IN,
            "command": shlex.join(["training/train_teacher.py", *(sys.argv[1:] if argv is None else argv)]),
            "seed": args.seed,
            "steps": progress.step,
            "clips": progress.step * args.batch_size * accelerator.num_processes,
            "seconds": round(progress.seconds),
            "parameters": trained.videomae.num_parameters(),
            "machine": describe_machine(accelerator),
            "torch": torch.__version__,
            "skipped_videos": skipped,
        }
        target = export(trained.cpu(), args, facts, summary, means.values().get("loss"))
        logger.info("wrote %s", target)
    accelerator.end_training()
    return output_dir / "teacher"


if __name__ == "__main__":
    run_script(main)
