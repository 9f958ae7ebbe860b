"""Trains the EVATok tokenizer: stage 1 (proxy, random assignments) of the paper, and with other assignments stage 4.

    accelerate launch training/train_tokenizer.py --config training/configs/tokenizer_tiny.yaml \
        --train_data VIDEOS --output_dir runs/tiny

Writes under --output_dir: `checkpoint-N/` (everything to `--resume` from), `samples/` (grids of original over
reconstruction), `log.jsonl`, and at the end `tokenizer/` (EMA weights, configuration, processor, summary, loss curve).
With --push_to_hub the tokenizer also goes to the Hub.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from evatok_hf import EvatokConfig, EvatokModel, EvatokVideoProcessor
from evatok_hf.data.streaming import collate, evaluation_clips, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics import psnr
from evatok_hf.metrics.perceptual import load_perceptual
from evatok_hf.tokenize.ahead import to_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids
from training.common.arguments import source_names
from training.common.checkpoints import earlier_run
from training.common.clip_batches import ClipBatches
from training.common.draws import shuffle_channels, splice
from training.common.flops import tokenizer_flops
from training.common.optimizers import make_optimizer, make_schedule
from training.common.reporting import MovingMean, save_grid, save_loss_curve
from training.common.run import Run
from training.common.sharding import prepare
from training.tokenizer.adversarial import KINDS, AdversarialLoss
from training.tokenizer.alignment import AlignedTokenizer, AlignmentLoss
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.augmentation import DRAWS
from training.tokenizer.costs import discriminator_flops, other_flops
from training.tokenizer.linear_start import start_together
from training.tokenizer.losses import QuantizationBlend, TokenizerLoss, spectral_factor
from training.tokenizer.step_lengths import StepLengths
from training.tokenizer.teachers import Teacher


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
            output = model(video, length, return_dict=True).reconstruction.float().clamp(-1, 1)
            values.append(psnr(video, output))
            if length == candidates[len(candidates) // 2] and sum(map(len, shown)) < 8:
                shown.append(output.cpu())
        results[f"val/psnr_{length}"] = torch.cat(values).mean().item()
    return results, shown


def teachers_and_losses(
    args: TokenizerArguments, config: EvatokConfig, device: torch.device
) -> tuple[AdversarialLoss, AlignmentLoss | None, Teacher | None]:
    """The losses by other networks, and the alignment's teacher, on the device; teachers are frozen.

    Raises:
        ValueError: a teacher that cannot be had, or does not fit.
    """
    teacher = None
    if "semantic" in KINDS[args.adversarial]:
        teacher = Teacher.from_pretrained(args.semantic_teacher, ("videomae",)).to(device)
    adversarial = AdversarialLoss(args, teacher)
    if args.alignment == "none":
        return adversarial, None, None
    aligned = Teacher.from_pretrained(args.alignment, num_frames=config.num_frames).to(device)
    grid = (config.num_blocks, config.grid_size, config.grid_size)
    alignment = AlignmentLoss(config.decoder_hidden_size, grid, aligned.width, aligned.grid, args.alignment_direction)
    return adversarial, alignment.to(device), aligned


def optimizer_and_schedule(
    run: Run[TokenizerArguments], module: torch.nn.Module, kind: str, rate: float, start: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Those of the module's parameters that are trained; of the run's schedule only what comes from `start` on."""
    args = run.args
    optimizer = make_optimizer(
        kind, module, rate, args.muon_learning_rate, (args.adam_beta1, args.adam_beta2), args.weight_decay
    )
    return optimizer, make_schedule(optimizer, run, start)


def main(argv: list[str] | None = None) -> Path:
    run = Run(TokenizerArguments, "tokenizer", __doc__, argv, shards=True)
    args, accelerator, draws, progress = run.args, run.accelerator, run.draws, run.progress

    config, continues = args.model_config(), earlier_run(args.init_from)
    if args.init_from:
        model = EvatokModel.from_pretrained(args.init_from, dtype=torch.float32)
        config = model.config
        if args.trained_parts == "decoder" or config.token_patches:
            config.same_ids_as = [*config.same_ids_as, model.fingerprint()]
        else:
            config.same_ids_as = []  # its own ids, from the first step on
    elif config.token_patches and not args.linear_start:
        raise ValueError("a new model with token_patches needs --linear_start, 256 say; else give --init_from.")
    else:
        model = EvatokModel(config)
    decoder_alone = args.trained_parts == "decoder" or config.token_patches  # in a codec's loop, small steps add up
    if decoder_alone:  # so that ids go on meaning what they do
        for part in (model.encoder, model.codec, model.quantizer):
            if part is not None:
                part.requires_grad_(False)
    model.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    perceptual = None if args.perceptual == "none" else load_perceptual(args.perceptual, args.perceptual_weights)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    loss_weights = {
        "l1": args.l1_weight,
        "l2": args.l2_weight,
        "log_l2": args.psnr_weight,
        "spectral": args.spectral_weight,
        "perceptual": args.perceptual_weight,
    }
    criterion = TokenizerLoss(config, loss_weights, perceptual, args.perceptual_frames)
    adversarial, alignment, alignment_teacher = teachers_and_losses(args, config, accelerator.device)
    step_lengths = StepLengths(args, model, draws)
    flops = other_flops(config, perceptual, args.perceptual_frames, alignment_teacher, step_lengths.router)
    of_discriminators = discriminator_flops(config, adversarial)  # before they may be sharded

    clip = args.clip_config(config)
    stream = args.stream(clip, accelerator)
    batches = ClipBatches(stream, args.batch_size, args.num_workers)
    if args.linear_start and not args.resume:
        start_together(accelerator, model, stream, args.linear_start, args.seed)
    val_clips = None
    # The main process validates; where the weights are sharded, no process can alone.
    if args.val_data and (accelerator.is_main_process or accelerator.is_fsdp2):
        items = list(evaluation_clips(args.val_data, clip, args.val_clips_per_video, split=args.val_split))
        val_clips = collate(items)["pixel_values_videos"]

    if args.compile:
        for part in (model.encoder, model.decoder):
            for layer in getattr(part, "layers", ()):
                layer.compile(dynamic=True)
    trained, networks = model, adversarial.networks
    blending = QuantizationBlend(model.quantizer, args.blend_start, args.blend_end)
    if alignment is not None or accelerator.is_fsdp2:
        model = AlignedTokenizer(trained, alignment, args.alignment_layer)
    optimizer, scheduler = optimizer_and_schedule(run, model, args.optimizer, args.learning_rate)
    schedulers = [scheduler]
    if networks is not None:
        rate = args.discriminator_learning_rate or args.learning_rate
        discriminator_optimizer, discriminator_scheduler = optimizer_and_schedule(
            run, networks, "adamw", rate, args.discriminator_start
        )
        schedulers.append(discriminator_scheduler)
        networks, discriminator_optimizer = prepare(accelerator, networks, discriminator_optimizer)
    model, optimizer = prepare(accelerator, model, optimizer, trained._no_split_modules)
    generator_parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [run.average(trained), progress, *schedulers]
    if networks is not None:
        states.append(adversarial)
    run.begin(*states, stream=stream)

    clips = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes  # of a step
    # Terms are added once for each forward pass.
    means = MovingMean(args.log_every * args.gradient_accumulation_steps)
    used_codes = torch.zeros(config.codebook_size, dtype=torch.int64, device=accelerator.device)

    def export(tokenizer: EvatokModel, folder: Path) -> None:
        facts = {
            "clips": progress.step * clips,
            "datasets": hub_ids(*source_names(args.train_data)),
            "base_model": hub_ids(args.init_from),
            "continues": continues,
            "tflop_per_clip": {name: value / 1e12 for name, value in flops.items()},
        }
        with run.exporting(tokenizer, folder, facts) as target:
            size = config.image_size
            EvatokVideoProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}, num_frames=config.num_frames
            ).save_pretrained(target)
            save_loss_curve(run.log_path, target / "loss_curve.png")

    model.train()
    for step in run.steps():
        place = run.place
        blend, rate = blending.at(place), scheduler.get_last_lr()[0]
        for micro in range(args.gradient_accumulation_steps):
            with run.waiting():
                batch = batches.take()
            video = to_float(to_device(batch["pixel_values_videos"], accelerator.device))
            video = shuffle_channels(video, args.channel_shuffle, draws, step, micro)
            video = splice(video, args.splice_probability, draws, step, micro)
            with accelerator.accumulate(*(part for part in (model, networks) if part is not None)):
                with accelerator.autocast():
                    lengths = step_lengths(video, step, micro)
                    target = {} if alignment is None else {"target": alignment_teacher.grid_features(video)}
                    output = model(video, lengths, return_dict=True, **target)
                loss, terms = criterion(
                    output,
                    video,
                    draws.generator("frames", step, micro),
                    with_perceptual=place >= args.perceptual_start,
                    spectral_factor=spectral_factor(place, args.spectral_end),
                )
                if alignment is not None:
                    loss = loss + args.alignment_weight * output.alignment
                    terms["alignment"] = output.alignment.detach()
                    terms["alignment_contrast"] = output.alignment_contrast
                if adversarial.active(place):
                    chance = draws.generator("augmentation", step, micro)
                    augmentation = torch.rand(draws.world_size * len(video), DRAWS, generator=chance)
                    augmentation = augmentation[draws.rows(len(video))]
                    with accelerator.autocast():
                        gain, more = adversarial.generator_terms(
                            output.reconstruction, augmentation, loss, trained.decoder.to_patch.weight
                        )
                    loss, terms = loss + gain, {**terms, **more}
                terms["total"] = loss.detach()
                run.take_step(loss, optimizer, generator_parameters)
                stepped = not accelerator.optimizer_step_was_skipped
                if adversarial.active(place):
                    with accelerator.autocast():
                        loss, more = adversarial.discriminator_terms(
                            video, output.reconstruction, networks, augmentation
                        )
                    terms |= more
                    run.take_step(loss, discriminator_optimizer, networks.parameters(), "discriminators' loss")
            batches.record()
            used_codes[output.ids] = 1
            means.add({**terms, "tokens": lengths.sum(-1).double().mean()})
        if stepped:
            for each in schedulers if adversarial.active(place) else [scheduler]:
                each.step()
        run.stepped()
        if run.log_due():
            values = run.mean(means.values())
            used = accelerator.reduce(used_codes, "sum").bool().float().mean().item()
            skipped_videos = run.mean({"all": sum(stream.skipped.values())}, "sum")["all"]
            used_codes.zero_()
            encoder, decoder = tokenizer_flops(config, [values["tokens"] / config.num_blocks] * config.num_blocks)
            flops["tokenizer"] = (1 if decoder_alone else 3) * encoder + 3 * decoder
            if adversarial.active(place):
                flops |= of_discriminators
            record = {
                **values,
                "psnr": 10 * math.log10(4 / max(values["l2"], 1e-12)),
                "codebook_use": used,
                "blend": blend,
                "learning_rate": rate,
                **run.speed("clips_per_second", args.log_every * clips, sum(flops.values())),
                "skipped_videos": int(skipped_videos),
            }
            shown = {"loss": "total", "psnr": "psnr", "codes": "codebook_use", "clips/s": "clips_per_second"}
            run.log(record, shown)
        if val_clips is not None and run.due(args.validate_every):
            with run.validating(model), accelerator.autocast():
                results, reconstructions = validate(accelerator.unwrap_model(model), val_clips, config)
            if accelerator.is_main_process:
                picture = run.output_dir / "samples" / f"step-{progress.step:07d}.png"
                save_grid(val_clips, reconstructions, picture)
            run.log(results)
            run.tell(results, ".2f")
        run.save(trained, export)
    return run.finish(trained, export)


if __name__ == "__main__":
    run_script(main)
