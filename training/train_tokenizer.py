"""Trains the EVATok tokenizer: stage 1 (proxy, random assignments) of the paper, and with other assignments stage 4.

    accelerate launch training/train_tokenizer.py --config training/configs/tokenizer_tiny.yaml \
        --train_data VIDEOS --output_dir runs/tiny

Writes under --output_dir: `checkpoint-N/` (everything to `--resume` from), `samples/` (grids of original over
reconstruction), `log.jsonl`, and at the end `tokenizer/` (EMA weights, configuration, processor, summary, loss curve).
With --push_to_hub the tokenizer also goes to the Hub.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evatok_hf import EvatokConfig, EvatokModel, EvatokVideoProcessor
from evatok_hf.data.streaming import ClipStream, collate, evaluation_clips, merge, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics import psnr
from evatok_hf.metrics.perceptual import load_perceptual
from evatok_hf.models.files_evatok import replacing_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids
from training.common.arguments import check_launch, describe_machine, parse_arguments, parse_sources
from training.common.averaging import AveragedWeights, averaged_copy
from training.common.checkpoints import Progress, earlier_run, load_checkpoint, refuse_used, save_checkpoint
from training.common.draws import Draws, shuffle_channels, splice
from training.common.hub_push import HubPush
from training.common.optimizers import make_optimizer
from training.common.reporting import MovingMean, Stopwatch, peak_memory_gib, save_grid, save_loss_curve
from training.common.sharding import check_sharding, forget_whole, prepare, whole_weights
from training.common.steps import check_finite, take_step
from training.tokenizer.adversarial import AdversarialLoss
from training.tokenizer.alignment import AlignedTokenizer, AlignmentLoss
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.losses import (
    LossWeights,
    QuantizationBlend,
    TokenizerLoss,
    learning_rate_factor,
    spectral_factor,
)
from training.tokenizer.step_lengths import StepLengths
from training.tokenizer.teachers import AlignmentTeacher, VideoMAETeacher, load_alignment_teacher

logger = logging.getLogger("train_tokenizer")


@torch.no_grad()
def validate(
    model: EvatokModel | AlignedTokenizer, clips: torch.Tensor, config: EvatokConfig, batch_size: int = 8
) -> tuple[dict, list]:
    """Mean PSNR at three uniform lengths, and the reconstructions of the first clips at the middle one."""
    candidates, device = config.block_lengths, next(model.parameters()).device
    results, shown = {}, []
    for length in dict.fromkeys((candidates[0], candidates[len(candidates) // 2], candidates[-1])):
        values = []
        for batch in clips.split(batch_size):
            video = to_float(batch).to(device)
            output = model(video, length).reconstruction.float().clamp(-1, 1)
            values.append(psnr(video, output))
            if length == candidates[len(candidates) // 2] and sum(map(len, shown)) < 8:
                shown.append(output.cpu())
        results[f"val/psnr_{length}"] = torch.cat(values).mean().item()
    return results, shown


def teachers_and_losses(
    args: TokenizerArguments, config: EvatokConfig, device: torch.device
) -> tuple[AdversarialLoss, AlignmentLoss | None, AlignmentTeacher | None]:
    """What other networks say of a reconstruction, on the device; the teachers are frozen.

    Raises:
        ValueError: a teacher that cannot be had, or does not fit.
    """
    settings, teacher = args.adversarial_config(), None
    if "semantic" in settings.parts:
        teacher = VideoMAETeacher.from_pretrained(args.semantic_teacher)
    adversarial = AdversarialLoss(settings, teacher).to(device)
    if args.alignment == "none":
        return adversarial, None, None
    aligned = load_alignment_teacher(args.alignment, config.num_frames).to(device)
    grid = (config.num_blocks, config.grid_size, config.grid_size)
    alignment = AlignmentLoss(config.decoder_hidden_size, grid, aligned.width, aligned.grid, args.alignment_direction)
    return adversarial, alignment.to(device), aligned


def optimizer_and_schedule(
    args: TokenizerArguments, module: torch.nn.Module, kind: str, rate: float, start: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Those of the module's parameters that are trained; of the run's schedule only what comes from `start` on."""
    optimizer = make_optimizer(
        kind, module, rate, args.muon_learning_rate, (args.adam_beta1, args.adam_beta2), args.weight_decay
    )

    def factor(step: int) -> float:
        return learning_rate_factor(
            start + step, args.steps, args.warmup_steps, args.min_learning_rate_ratio, args.cooldown_steps
        )

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def keep_ids(model: EvatokModel) -> None:
    """Leaves only the decoder to be trained: tokens of the checkpoint as it is now are good for what it becomes."""
    model.encoder.requires_grad_(False)
    model.quantizer.requires_grad_(False)
    model.config.same_ids_as = [*model.config.same_ids_as, model.fingerprint()]


def over_processes(accelerator: Accelerator, values: dict[str, float], reduction: str) -> dict[str, float]:
    """The "mean" or "sum" of each value over all processes, which must give the same names."""
    table = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(table, reduction).tolist(), strict=True))


def export(
    model: EvatokModel, args: TokenizerArguments, facts: dict, summary: dict, output_dir: Path, log: Path
) -> Path:
    """The trained tokenizer as a folder for `from_pretrained`, with how it came to be."""
    target = output_dir / "tokenizer"
    with replacing_folder(target) as temporary:
        model.to(getattr(torch, args.export_dtype)).save_pretrained(temporary)
        size = model.config.image_size
        EvatokVideoProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_frames=model.config.num_frames
        ).save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps({**summary, "arguments": facts}, indent=2) + "\n")
        save_loss_curve(log, temporary / "loss_curve.png")
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
    check_launch(accelerator, shards=True)
    check_sharding(accelerator, args)
    set_seed(args.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.resume is None:
        refuse_used(output_dir)
    hub = HubPush(args, accelerator, output_dir)

    config, continues = args.model_config(), earlier_run(args.init_from)
    if args.init_from:
        model = EvatokModel.from_pretrained(args.init_from, dtype=torch.float32)
        config = model.config
        if args.trained_parts == "decoder":
            keep_ids(model)
        else:
            config.same_ids_as = []  # its own ids, from the first step on
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
        LossWeights(args.l1_weight, args.l2_weight, args.perceptual_weight, args.spectral_weight, args.psnr_weight),
        perceptual,
        args.perceptual_frames,
    )
    adversarial, alignment, alignment_teacher = teachers_and_losses(args, config, accelerator.device)
    draws = Draws(args.seed, accelerator.process_index, accelerator.num_processes)
    step_lengths = StepLengths(args, model, draws)

    clip = args.clip_config(config)
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
    # The main process validates; where the weights are sharded, no process can alone.
    if args.val_data and (accelerator.is_main_process or accelerator.is_fsdp2):
        items = list(evaluation_clips(args.val_data, clip, args.val_clips_per_video, split=args.val_split))
        val_clips = collate(items)["pixel_values_videos"]

    if args.compile:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.compile(dynamic=True)
    trained, networks = model, adversarial.networks
    blending = QuantizationBlend(model.quantizer, args.blend_start, args.blend_end)
    if alignment is not None or accelerator.is_fsdp2:
        model = AlignedTokenizer(trained, alignment, args.alignment_layer)
    optimizer, scheduler = optimizer_and_schedule(args, model, args.optimizer, args.learning_rate)
    schedulers = [scheduler]
    if networks is not None:
        rate = args.discriminator_learning_rate or args.learning_rate
        discriminator_optimizer, discriminator_scheduler = optimizer_and_schedule(
            args, networks, "adamw", rate, args.discriminator_start
        )
        schedulers.append(discriminator_scheduler)
        networks, discriminator_optimizer = prepare(accelerator, networks, discriminator_optimizer)
    model, optimizer = prepare(accelerator, model, optimizer, trained._no_split_modules)
    generator_parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ema = AveragedWeights(trained.parameters(), decay=args.ema_decay)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress, *schedulers)
    if networks is not None:
        accelerator.register_for_checkpointing(adversarial)
    if args.resume:
        path = load_checkpoint(accelerator, output_dir, args.resume, progress, stream)
        logger.info("resumed from %s at step %d", path, progress.step)
    # Not through accelerate: the stream already gives every process its own videos. A batch has an equal part from each
    # worker, so that the clips of a step only depend on how many workers there are in all processes together.
    readers = max(1, args.num_workers)
    loader = DataLoader(stream, args.batch_size // readers, num_workers=args.num_workers, collate_fn=collate)
    if args.tracker != "none":
        accelerator.init_trackers("evatok_tokenizer", config={k: str(v) for k, v in facts.items()})

    log_path = output_dir / "log.jsonl"
    # Terms are added once for each forward pass.
    means = MovingMean(args.log_every * args.gradient_accumulation_steps)
    used_codes = torch.zeros(config.codebook_size, dtype=torch.int64, device=accelerator.device)

    def summary() -> dict:
        """What the exported tokenizer says of the run so far."""
        return {
            "command": shlex.join(["training/train_tokenizer.py", *(sys.argv[1:] if argv is None else argv)]),
            "seed": args.seed,
            "steps": progress.step,
            "clips": progress.step * args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "seconds": round(progress.seconds),
            "parameters": trained.num_parameters(),
            "machine": describe_machine(accelerator),
            "peak_memory_gib": round(peak_memory_gib(accelerator.device), 2),
            "torch": torch.__version__,
            "skipped_videos": dict(stream.skipped),
            "datasets": hub_ids(*(name for name, _ in parse_sources(args.train_data))),
            "base_model": hub_ids(args.init_from),
            "continues": continues,
        }

    bar = tqdm(total=args.steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    parts_of_batches = iter(loader)
    model.train()
    started, last_log = time.monotonic() - progress.seconds, time.monotonic()
    waiting = Stopwatch()
    while progress.step < args.steps:
        step = progress.step
        blend, rate = blending.at(step), scheduler.get_last_lr()[0]
        for micro in range(args.gradient_accumulation_steps):
            with waiting.running():
                parts = [next(parts_of_batches) for _ in range(readers)]
            video = to_float(merge(parts)["pixel_values_videos"].to(accelerator.device))
            video = shuffle_channels(video, args.channel_shuffle, draws, step, micro)
            video = splice(video, args.splice_probability, draws, step, micro)
            with accelerator.accumulate(*(part for part in (model, networks) if part is not None)):
                with accelerator.autocast():
                    lengths = step_lengths(video, step, micro)
                    target = {} if alignment is None else {"target": alignment_teacher.grid_features(video)}
                    output = model(video, lengths, **target)
                loss, terms = criterion(
                    output,
                    video,
                    draws.generator("frames", step, micro),
                    with_perceptual=step >= args.perceptual_start,
                    spectral_factor=spectral_factor(step, args.spectral_end),
                )
                if alignment is not None:
                    loss = loss + args.alignment_weight * output.alignment
                    terms["alignment"] = output.alignment.detach()
                    terms["alignment_contrast"] = output.alignment_contrast
                if adversarial.active(step):
                    augmentation = adversarial.draw(
                        draws.world_size * len(video), draws.generator("augmentation", step, micro)
                    ).rows(draws.rows(len(video)))
                    augmentation = augmentation.to(accelerator.device)
                    with accelerator.autocast():
                        gain, more = adversarial.generator_terms(
                            output.reconstruction, step, augmentation, loss, trained.decoder.to_patch.weight
                        )
                    loss, terms = loss + gain, {**terms, **more}
                terms["total"] = loss.detach()
                check_finite(terms["total"], "loss", step)
                accelerator.backward(loss)
                take_step(accelerator, optimizer, generator_parameters, args.max_grad_norm, step)
                stepped = not accelerator.optimizer_step_was_skipped
                if adversarial.active(step):
                    with accelerator.autocast():
                        loss, more = adversarial.discriminator_terms(
                            video, output.reconstruction, networks, step, augmentation
                        )
                    terms |= more
                    check_finite(loss, "discriminators' loss", step)
                    accelerator.backward(loss)
                    take_step(accelerator, discriminator_optimizer, networks.parameters(), args.max_grad_norm, step)
            for part in parts:
                stream.record(part)
            used_codes[output.ids] = 1
            means.add({**terms, "tokens": lengths.sum(-1).double().mean()})
        if stepped:
            for each in schedulers if adversarial.active(step) else [scheduler]:
                each.step()
        ema.step(trained.parameters())
        progress.step += 1
        progress.seconds = time.monotonic() - started
        bar.update()

        if progress.step % args.log_every == 0:
            values = over_processes(accelerator, means.values(), "mean")
            used = accelerator.reduce(used_codes, "sum").bool().float().mean().item()
            skipped_videos = over_processes(accelerator, {"all": sum(stream.skipped.values())}, "sum")["all"]
            used_codes.zero_()
            now = time.monotonic()
            clips = args.log_every * args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            record = {
                "step": progress.step,
                **values,
                "psnr": 10 * math.log10(4 / max(values["l2"], 1e-12)),
                "codebook_use": used,
                "blend": blend,
                "learning_rate": rate,
                "clips_per_second": clips / (now - last_log),
                "data_wait": waiting.share(),
                "skipped_videos": int(skipped_videos),
                "seconds": progress.seconds,
            }
            last_log = now
            if accelerator.is_main_process:
                with log_path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            accelerator.log(record, step=progress.step)
            shown = {"loss": "total", "psnr": "psnr", "codes": "codebook_use", "clips/s": "clips_per_second"}
            bar.set_postfix({name: f"{record[key]:.4g}" for name, key in shown.items()})
        last = progress.step == args.steps
        if val_clips is not None and (last or progress.step % args.validate_every == 0):
            trained.eval()
            with ema.in_place(trained.parameters()):
                with accelerator.autocast():
                    results, reconstructions = validate(accelerator.unwrap_model(model), val_clips, config)
                forget_whole(model)
            trained.train()
            if accelerator.is_main_process:
                save_grid(val_clips, reconstructions, output_dir / "samples" / f"step-{progress.step:07d}.png")
                with log_path.open("a") as file:
                    file.write(json.dumps({"step": progress.step, **results}) + "\n")
                bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
            accelerator.log(results, step=progress.step)
            last_log = time.monotonic()
        if last or progress.step % args.save_every == 0:
            saved = save_checkpoint(accelerator, output_dir, progress.step, args.keep_checkpoints, stream)
            if hub.saves and not last:
                averaged = averaged_copy(trained, ema)
                hub.save(
                    progress.step,
                    lambda folder, model=averaged: export(model, args, facts, summary(), folder, log_path),
                    saved,
                )
    bar.close()
    skipped = dict(stream.skipped)
    if skipped:
        logger.warning("skipped videos, by cause: %s", skipped)
    accelerator.wait_for_everyone()
    ema.copy_to(trained.parameters())
    if accelerator.is_fsdp2:
        sharded, trained = trained, EvatokModel(trained.config)
        trained.load_state_dict(whole_weights(sharded))
    if accelerator.is_main_process:
        said = summary()
        target = export(trained.cpu(), args, facts, said, output_dir, log_path)
        logger.info("wrote %s; peak memory %.2f GiB a process", target, said["peak_memory_gib"])
    accelerator.end_training()
    hub.finish(output_dir / "tokenizer", output_dir / f"checkpoint-{progress.step}")
    return output_dir / "tokenizer"


if __name__ == "__main__":
    run_script(main)
