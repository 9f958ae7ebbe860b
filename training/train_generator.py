"""Trains the generator, a Llama over tokens of videos: class-to-video, and frame prediction beside it.

    accelerate launch training/train_generator.py --config training/configs/generator_tiny.yaml \
        --train_tokens tokens/train --val_tokens tokens/test --output_dir runs/generator

The tokens are a data set of training/tokenize_dataset.py; with `--train_data VIDEOS` in its place, clips are tokenized
on the way. Writes under --output_dir: `checkpoint-N/` (everything to `--resume` from), `samples/` (pictures of
generated clips, where the tokenizer is at hand), `log.jsonl`, and at the end `generator/` (EMA weights, configuration,
summary, loss curve), which --push_to_hub also sends to the Hub.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from tqdm.auto import tqdm

from evatok_hf import EvatokGenerator, EvatokGeneratorConfig, EvatokModel, VideoTokenizer
from evatok_hf.data.packing import collate_rows, pack
from evatok_hf.data.token_dataset import TokenDataset
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import replacing_folder
from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids
from training.common.arguments import check_launch, describe_machine, parse_arguments, parse_sources
from training.common.averaging import AveragedWeights, averaged_copy
from training.common.checkpoints import Progress, earlier_run, load_checkpoint, refuse_used, save_checkpoint
from training.common.hub_push import HubPush
from training.common.reporting import Stopwatch, peak_memory_gib, save_clips, save_generator_curve
from training.common.steps import check_finite, take_step
from training.generator.arguments import GeneratorArguments
from training.generator.data import VOCABULARY, TokenData, VideoData
from training.generator.loss import PackedLoss, Tally
from training.generator.rows import PackedRows, Tasks, make_sequence, sequence_lengths
from training.tokenizer.losses import learning_rate_factor

logger = logging.getLogger("train_generator")


def build(args: GeneratorArguments, config: EvatokGeneratorConfig) -> EvatokGenerator:
    """The generator to train, with new weights or those of --init_from.

    Raises:
        ValueError: an earlier generator of another configuration.
    """
    if args.init_from is None:
        model = EvatokGenerator(config)
    else:
        model = EvatokGenerator.from_pretrained(args.init_from, dtype=torch.float32)
        for name in (*VOCABULARY, "layout", "class_names", "num_classes", "hidden_size", "num_hidden_layers"):
            if getattr(model.config, name) != getattr(config, name):
                raise ValueError(
                    f"the generator in {args.init_from} has {name} {getattr(model.config, name)}, this run "
                    f"{getattr(config, name)}; leave --init_from out, or give tokens and options as they were."
                )
        model.config.known_frames = config.known_frames
    model.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def show_tokenizer(args: GeneratorArguments, fingerprint: str, device: torch.device) -> EvatokModel | None:
    """The tokenizer that decodes samples; None, with a note in the log, if none was named and the bundled one is not
    theirs.

    Raises:
        ValueError: a named tokenizer that the tokens are not of.
    """
    model = VideoTokenizer.from_pretrained(args.tokenizer, device=str(device)).model
    if model.reads(fingerprint):
        return model
    if args.tokenizer is not None:
        raise ValueError(
            f"the tokens are of tokenizer {fingerprint}, {args.tokenizer} is {model.fingerprint()}; name the one that "
            "made them."
        )
    logger.info("no pictures of samples: the tokens are not of the bundled tokenizer; name theirs with --tokenizer")
    return None


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear layers decay, as in LARP; embeddings and norms do not."""
    decayed = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def to_batch(
    rows: PackedRows, config: EvatokGeneratorConfig, row_length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in collate_rows(rows.rows, config, row_length).items()}


@torch.no_grad()
def validate(
    accelerator: Accelerator, module: PackedLoss, data: TokenDataset, args: GeneratorArguments, row_length: int
) -> dict[str, float]:
    """Loss of held-out clips that are asked for by their class, and, where the run learns it, of frame prediction
    without the class."""
    config, codec = module.generator.config, module.generator.codec
    chosen = np.linspace(0, len(data) - 1, min(args.val_clips, len(data))).round().astype(int)
    tasks = {"val/": False, **({"val/prediction_": True} if args.prediction else {})}
    results = {}
    for prefix, conditioned in tasks.items():
        rows = [data[int(index)] for index in chosen]
        sequences = [make_sequence(codec, -1 if conditioned else row.label, vars(row), conditioned) for row in rows]
        length = max(row_length, *map(len, sequences))
        packed, tally = pack(map(len, sequences), length), Tally(config.num_blocks)
        for first in range(0, len(packed), args.rows):
            part = PackedRows([[sequences[index] for index in row] for row in packed[first : first + args.rows]], 0)
            batch = to_batch(part, config, length, accelerator.device)
            losses, hits = module(batch["input_ids"], batch["position_ids"], batch["labels"])
            tally.add(tally.count(losses, hits, batch, part))
        values = tally.values()
        del values["padding"]
        results |= {f"{prefix}{name}": value for name, value in values.items()}
    return results


@torch.no_grad()
def draw_samples(generator: EvatokGenerator, tokenizer: EvatokModel, count: int, path: Path) -> dict[str, float]:
    """Writes a picture of generated clips, of the same seeds and classes every time -> their mean tokens."""
    classes = generator.config.num_classes
    labels = [int(i) for i in np.linspace(0, classes - 1, count).round()] if classes else [None] * count
    trained_with = generator.config._attn_implementation
    generator.set_attn_implementation("sdpa")
    tokens = sample(generator, [Prompt(label) for label in labels], list(range(count)))
    generator.set_attn_implementation(trained_with)
    save_clips(tokenizer.decode(tokens).float().cpu(), path)
    return {"samples/tokens": tokens.lengths.sum(-1).double().mean().item()}


def export(
    generator: EvatokGenerator, args: GeneratorArguments, summary: dict[str, Any], output_dir: Path, log: Path
) -> Path:
    """The trained generator as a folder for `from_pretrained`, with how it came to be."""
    target = output_dir / "generator"
    with replacing_folder(target) as temporary:
        generator.to(getattr(torch, args.export_dtype)).save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
        save_generator_curve(log, temporary / "loss_curve.png")
    return target


def main(argv: list[str] | None = None) -> Path:
    args, facts = parse_arguments(GeneratorArguments, __doc__, argv)
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
    if args.resume is None:
        refuse_used(output_dir)
    hub = HubPush(args, accelerator, output_dir)
    data = TokenData(args.train_tokens) if args.train_tokens else VideoData(args, accelerator)
    val_data = None
    if args.val_tokens:
        val_data = TokenData(args.val_tokens)
        val_data.check_alike(data.facts, conditions=args.prediction > 0)
    config, continues = args.model_config(data.facts), earlier_run(args.init_from)
    generator = build(args, config)
    config, most = generator.config, np.array(config.assignment_space.max_tokens)
    plain, with_condition = sequence_lengths(most, most, config.num_blocks)
    row_length = args.row_length or int(with_condition if args.prediction else plain)
    tasks = Tasks(args.label_dropout, args.prediction, args.prediction_label_dropout, args.condition_dropout)
    source = data.rows(generator.codec, row_length, tasks, args, accelerator)
    tokenizer = None
    if args.sample_every and accelerator.is_main_process:
        tokenizer = data.tokenizer or show_tokenizer(args, config.tokenizer_fingerprint, accelerator.device)
    output_dir.mkdir(parents=True, exist_ok=True)

    if args.compile:
        for layer in generator.model.layers:
            layer.compile(dynamic=True)
    module = PackedLoss(generator)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, args.steps, args.warmup_steps, args.min_learning_rate_ratio),
    )
    model, optimizer = accelerator.prepare(module, optimizer)
    ema = AveragedWeights(module.parameters(), decay=args.ema_decay)
    progress, tally = Progress(), Tally(config.num_blocks)
    accelerator.register_for_checkpointing(ema, progress, scheduler, tally, source)
    if args.resume:
        path = load_checkpoint(accelerator, output_dir, args.resume, progress, data.stream)
        logger.info("resumed from %s at step %d", path, progress.step)
    if args.tracker != "none":
        accelerator.init_trackers("evatok_generator", config={k: str(v) for k, v in facts.items()})

    log_path = output_dir / "log.jsonl"
    micros, processes = args.gradient_accumulation_steps, accelerator.num_processes

    def write(record: dict[str, float]) -> None:
        if accelerator.is_main_process:
            with log_path.open("a") as file:
                file.write(json.dumps({"step": progress.step, **record}) + "\n")
        accelerator.log(record, step=progress.step)

    def summary() -> dict[str, Any]:
        """What the exported generator says of the run so far."""
        return {
            "command": shlex.join(["training/train_generator.py", *(sys.argv[1:] if argv is None else argv)]),
            "seed": args.seed,
            "steps": progress.step,
            "epochs": round(data.epochs(tally.sequences), 3),
            "sequences": tally.sequences,
            "too_long_for_prediction": tally.too_long,
            "tokens": tally.places,
            "held_out": held_out,
            "seconds": round(progress.seconds),
            "parameters": generator.num_parameters(),
            "row_length": row_length,
            "machine": describe_machine(accelerator),
            "peak_memory_gib": round(peak_memory_gib(accelerator.device), 2),
            "torch": torch.__version__,
            "datasets": hub_ids(args.train_tokens, *(name for name, _ in parse_sources(args.train_data or []))),
            "base_model": hub_ids(args.init_from),
            "data": data.summary,
            "continues": continues,
            "arguments": facts,
        }

    bar = tqdm(total=args.steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    held_out: dict[str, float] = {}
    model.train()
    started, last_log, last_filled = time.monotonic() - progress.seconds, time.monotonic(), tally.filled()
    waiting = Stopwatch()
    while progress.step < args.steps:
        step, rate = progress.step, scheduler.get_last_lr()[0]
        with waiting.running():
            parts = [source.take() for _ in range(micros)]
        batches = [to_batch(part, config, row_length, accelerator.device) for part in parts]
        # The mean is over all predicted places of the step, in whichever process and forward pass they are.
        predicted = sum((batch["labels"][:, 1:] >= 0).sum() for batch in batches)
        predicted = accelerator.reduce(predicted, "sum")
        sums = torch.zeros_like(tally.sums, device=accelerator.device)
        for part, batch in zip(parts, batches, strict=True):
            with accelerator.accumulate(model):
                losses, hits = model(batch["input_ids"], batch["position_ids"], batch["labels"])
                # Processes and forward passes are averaged, where sums are wanted.
                loss = losses.sum() * (processes * micros) / predicted
                check_finite(loss, "loss", step)
                accelerator.backward(loss)
                take_step(accelerator, optimizer, model.parameters(), args.max_grad_norm, step)
            sums += tally.count(losses, hits, batch, part)
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        ema.step(module.parameters())
        tally.add(accelerator.reduce(sums, "sum"))
        progress.step += 1
        progress.seconds = time.monotonic() - started
        bar.update()

        if progress.step % args.log_every == 0:
            now = time.monotonic()
            record = {
                **tally.values(),
                "learning_rate": rate,
                "epoch": data.epochs(tally.sequences),
                "too_long": tally.too_long,
                "tokens_per_second": (tally.filled() - last_filled) / (now - last_log),
                "data_wait": waiting.share(),
                "seconds": progress.seconds,
            }
            write(record)
            tally.clear()
            last_log, last_filled = now, 0
            shown = {"loss": "total", "codes": "codes", "lengths": "lengths", "tokens/s": "tokens_per_second"}
            bar.set_postfix({name: f"{record[key]:.4g}" for name, key in shown.items()})
        last = progress.step == args.steps
        validates = val_data is not None and (last or progress.step % args.validate_every == 0)
        samples = tokenizer is not None and (last or progress.step % args.sample_every == 0)
        if (validates or samples) and accelerator.is_main_process:
            began = time.monotonic()
            module.eval()
            results = {}
            with ema.in_place(module.parameters()), accelerator.autocast():
                if validates:
                    results = held_out = validate(accelerator, module, val_data.data, args, row_length)
                if samples:
                    picture = output_dir / "samples" / f"step-{progress.step:07d}.png"
                    results = results | draw_samples(generator, tokenizer, args.samples, picture)
            module.train()
            write(results)
            shown = ("val/total", "val/prediction_total", "val/length_accuracy", "samples/tokens")
            bar.write(f"step {progress.step}: " + ", ".join(f"{k} {results[k]:.4g}" for k in shown if k in results))
            last_log += time.monotonic() - began
        if last or progress.step % args.save_every == 0:
            saved = save_checkpoint(accelerator, output_dir, progress.step, args.keep_checkpoints, data.stream)
            if hub.saves and not last:
                averaged = averaged_copy(generator, ema)
                hub.save(
                    progress.step,
                    lambda folder, model=averaged: export(model, args, summary(), folder, log_path),
                    saved,
                )
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(module.parameters())
        generator.eval()
        said = summary()
        target = export(generator.cpu(), args, said, output_dir, log_path)
        logger.info("wrote %s; peak memory %.2f GiB a process", target, said["peak_memory_gib"])
    accelerator.end_training()
    hub.finish(output_dir / "generator", output_dir / f"checkpoint-{progress.step}")
    return output_dir / "generator"


if __name__ == "__main__":
    run_script(main)
