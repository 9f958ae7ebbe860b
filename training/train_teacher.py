"""Trains a small VideoMAE on the user's own clips: a stand-in teacher where the published weights cannot be had.

    accelerate launch training/train_teacher.py --train_data VIDEOS --output_dir runs/teacher

Masked autoencoding as VideoMAE has it (Tong et al. 2022): the same random cells are hidden in every frame (a tube), and
the network, which sees the others only, predicts their normalised pixels. Writes under --output_dir: `checkpoint-N/`
(everything to `--resume` from), `log.jsonl`, and at the end `teacher/`, a VideoMAE checkpoint with its processor for
the semantic discriminator and the alignment loss of `train_tokenizer.py`. It is no VideoMAE-B, and says so.

The defaults (16 x 64 x 64, an encoder of 2.7M parameters) are small enough for two CPU cores.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForPreTraining, PreTrainedModel, VideoMAEConfig
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf.data.streaming import to_float
from evatok_hf.interrupts import run_script
from evatok_hf.tokenize.ahead import to_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.clip_batches import ClipBatches
from training.common.fields import option
from training.common.optimizers import make_schedule
from training.common.options import ClipOptions
from training.common.reporting import MovingMean
from training.common.run import Run
from training.tokenizer.teachers import Preparation

STAND_IN = "a stand-in for VideoMAE-B, trained by evatok_hf on other clips and much smaller"


@dataclass(kw_only=True)
class TeacherArguments(ClipOptions):
    """Options of teacher training. Betas, weight decay and masking are VideoMAE's; sizes are ours."""

    # Model
    image_size: int = option("Side of the clips in pixels.", 64)
    num_frames: int = option("Frames of a clip.", 16)
    patch_size: int = option("Side of a cell in pixels.", 8)
    tubelet_size: int = option("Frames of a cell.", 4)
    hidden_size: int = option("Width of the encoder, which the teacher is.", 192)
    num_layers: int = option("Layers of the encoder.", 6)
    num_heads: int = option("Attention heads of the encoder.", 3)
    decoder_hidden_size: int = option("Width of the decoder, needed in training only.", 96)
    decoder_num_layers: int = option("Layers of the decoder.", 2)
    decoder_num_heads: int = option("Attention heads of the decoder.", 3)
    mask_ratio: float = option("Share of the cells that are hidden, 0.75 to 0.9 usually.", 0.9)
    # Clips
    scale: list[float] = field(default_factory=[0.5, 1.0].copy)
    clips_per_video: int = 2
    # Optimisation
    steps: int = 3000
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    mixed_precision: str = "no"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "image_size", "num_frames", "patch_size", "tubelet_size", "hidden_size", "num_layers")
        self.at_least(1, "num_heads", "decoder_hidden_size", "decoder_num_layers", "decoder_num_heads")
        pairs = (("image_size", "patch_size"), ("num_frames", "tubelet_size"), ("hidden_size", "num_heads"))
        for whole, part in (*pairs, ("decoder_hidden_size", "decoder_num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"--{whole} must be a multiple of --{part} ({getattr(self, part)}).")
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


def readme(args: TeacherArguments, parameters: int, steps: int, clips: int) -> str:
    shape = f"{args.num_frames} x {args.image_size} x {args.image_size}"
    return (
        f"# VideoMAE, {parameters / 1e6:.1f}M parameters, {shape}\n\n"
        f"This is {STAND_IN}. It serves experiments in which the published weights cannot be had; results with it "
        "are not results with VideoMAE-B.\n\n"
        f"Masked autoencoding for {steps} steps ({clips} clips), {args.mask_ratio:.0%} of "
        "the cells hidden. `training.json` has the whole command, its options and the last training loss.\n"
    )


def main(argv: list[str] | None = None) -> Path:
    run = Run(TeacherArguments, "teacher", __doc__, argv)
    args, accelerator, progress = run.args, run.accelerator, run.progress
    clips = accelerator.num_processes * args.batch_size  # of a step

    model = AutoModelForPreTraining.from_config(args.model_config())
    preparation = Preparation(args.image_size)
    stream = args.stream(args.clip_config(args), accelerator)
    batches = ClipBatches(stream, args.batch_size, args.num_workers)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )
    scheduler = make_schedule(optimizer, run)
    model, optimizer = accelerator.prepare(model, optimizer)
    run.begin(scheduler, progress, stream=stream)
    means = MovingMean(args.log_every)
    model.train()
    for step in run.steps():
        rate = scheduler.get_last_lr()[0]
        with run.waiting():
            batch = batches.take()
        video = preparation(to_float(to_device(batch["pixel_values_videos"], accelerator.device)))
        hidden = draw_tubes(
            clips,
            args.cells,
            args.masked_cells,
            args.num_frames // args.tubelet_size,
            run.draws.generator("tubes", step),
        )[run.draws.rows(args.batch_size)]
        loss = model(video, bool_masked_pos=hidden.to(accelerator.device, non_blocking=True), return_dict=True).loss
        run.take_step(loss, optimizer, model.parameters())
        batches.record()
        means.add({"loss": loss})
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        run.stepped()
        if run.log_due():
            record = {
                **run.mean(means.values()),
                "learning_rate": rate,
                **run.speed("clips_per_second", args.log_every * clips),
            }
            run.log(record, {"loss": "loss", "clips/s": "clips_per_second"})
        run.save()

    def export(teacher: PreTrainedModel, folder: Path) -> None:
        facts = {
            "what": STAND_IN,
            "clips": progress.step * clips,
            "parameters": teacher.videomae.num_parameters(),
            "loss": means.values().get("loss"),
        }
        with run.exporting(teacher, folder, facts) as target:
            VideoMAEImageProcessorPil(  # saves the same file as the torchvision processor, and needs no torchvision
                size={"shortest_edge": args.image_size},
                crop_size={"height": args.image_size, "width": args.image_size},
                image_mean=IMAGENET_DEFAULT_MEAN,
                image_std=IMAGENET_DEFAULT_STD,
            ).save_pretrained(target)
            text = readme(args, facts["parameters"], progress.step, facts["clips"])
            (target / "README.md").write_text(text)

    return run.finish(accelerator.unwrap_model(model), export)


if __name__ == "__main__":
    run_script(main)
