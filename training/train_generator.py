"""Trains the generator, a Llama over tokens of videos: class-to-video, and frame prediction beside it.

    accelerate launch training/train_generator.py --config training/configs/generator_tiny.yaml \
        --train_tokens tokens/train --val_tokens tokens/test --output_dir runs/generator

The tokens are a data set of training/tokenize_dataset.py; with `--train_data VIDEOS` in its place, clips are tokenized
on the way. Writes under --output_dir: `checkpoint-N/` (everything to `--resume` from), `samples/` (pictures of
generated clips, where the tokenizer is at hand), `log.jsonl`, and at the end `generator/` (EMA weights, configuration,
summary, loss curve), which --push_to_hub also sends to the Hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig, EvatokModel, VideoTokenizer
from evatok_hf.bundled import checkpoint_of
from evatok_hf.data.packing import pack
from evatok_hf.data.token_dataset import TokenDataset
from evatok_hf.interrupts import run_script
from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt
from evatok_hf.tokenize.ahead import to_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids
from training.common.arguments import source_names
from training.common.checkpoints import earlier_run
from training.common.flops import generator_flops
from training.common.optimizers import make_schedule
from training.common.reporting import save_clips, save_generator_curve
from training.common.run import Run
from training.generator.arguments import GeneratorArguments
from training.generator.data import VOCABULARY, TokenData, VideoData
from training.generator.loss import PackedLoss, Tally, to_batch
from training.generator.rows import PackedRows, Tasks, make_sequence, sequence_lengths


def build(args: GeneratorArguments, config: EvatokGeneratorConfig) -> EvatokForCausalLM:
    """The generator to train, with new weights or those of --init_from.

    Raises:
        ValueError: an earlier generator of another configuration.
    """
    if args.init_from is None:
        model = EvatokForCausalLM(config)
    else:
        model = EvatokForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
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


def show_tokenizer(run: Run[GeneratorArguments], fingerprint: str) -> EvatokModel | None:
    """The tokenizer that decodes samples; None, with a note in the log, if none was named and no bundled one is theirs.

    Raises:
        ValueError: a named tokenizer that the tokens are not of.
    """
    named = run.args.tokenizer
    model = VideoTokenizer.from_pretrained(
        named or checkpoint_of(fingerprint), device=str(run.accelerator.device)
    ).model
    if model.reads(fingerprint):
        return model
    if named is not None:
        raise ValueError(
            f"the tokens are of tokenizer {fingerprint}, {named} is {model.fingerprint()}; name the one that made them."
        )
    run.logger.info("no pictures of samples: the tokens are of no bundled tokenizer; name theirs with --tokenizer")
    return None


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear layers decay, as in LARP; embeddings and norms do not."""
    decayed = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


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
        packed, tally = pack(map(len, sequences), length), Tally(config.num_blocks, accelerator.device)
        for first in range(0, len(packed), args.rows):
            part = PackedRows([[sequences[index] for index in row] for row in packed[first : first + args.rows]])
            batch = to_batch(part, config, length, accelerator.device)
            tally.add(tally.count(*module(batch), batch))
        values = tally.values()
        del values["padding"]
        results |= {f"{prefix}{name}": value for name, value in values.items()}
    return results


@torch.no_grad()
def draw_samples(generator: EvatokForCausalLM, tokenizer: EvatokModel, count: int, path: Path) -> dict[str, float]:
    """Writes a picture of generated clips, of the same seeds and classes every time -> their mean tokens."""
    classes = generator.config.num_classes
    labels = [int(i) for i in np.linspace(0, classes - 1, count).round()] if classes else [None] * count
    trained_with = generator.config._attn_implementation
    generator.set_attn_implementation("sdpa")
    tokens = sample(generator, [Prompt(label) for label in labels], list(range(count)))
    generator.set_attn_implementation(trained_with)
    save_clips(tokenizer.decode(tokens).float().cpu(), path)
    return {"samples/tokens": tokens.lengths.sum(-1).double().mean().item()}


def main(argv: list[str] | None = None) -> Path:
    run = Run(GeneratorArguments, "generator", __doc__, argv)
    args, accelerator, progress = run.args, run.accelerator, run.progress
    tokens = args.train_tokens
    data = TokenData(tokens, args, accelerator) if tokens else VideoData(args, accelerator)
    val_data = None
    if args.val_tokens:
        val_data = TokenData(args.val_tokens, args, accelerator)
        val_data.check_alike(data.facts)
    config, continues = args.model_config(data.facts), earlier_run(args.init_from)
    generator = build(args, config)
    config, most = generator.config, np.array(config.assignment_space.max_tokens)
    plain, with_condition = sequence_lengths(config, most, most)
    row_length = args.row_length or int(with_condition if args.prediction else plain)
    tasks = Tasks(args.label_dropout, args.prediction, args.prediction_label_dropout, args.condition_dropout)
    source = data.rows(generator.codec, row_length, tasks)
    tokenizer = None
    if args.sample_every and accelerator.is_main_process:
        tokenizer = data.tokenizer or show_tokenizer(run, config.tokenizer_fingerprint)

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
    scheduler = make_schedule(optimizer, run)
    model, optimizer = accelerator.prepare(module, optimizer)
    tally = Tally(config.num_blocks, accelerator.device)
    run.begin(run.average(module), progress, scheduler, tally, source, stream=data.stream)
    micros, processes = args.gradient_accumulation_steps, accelerator.num_processes
    held_out: dict[str, float] = {}

    def export(averaged: EvatokForCausalLM, folder: Path) -> None:
        ever = tally.ever()
        facts = {
            "epochs": round(data.epochs(ever["sequences"]), 3),
            "sequences": ever["sequences"],
            "too_long_for_prediction": ever["too_long"],
            "tokens": ever["places"],
            "held_out": held_out,
            "row_length": row_length,
            "datasets": hub_ids(args.train_tokens, *source_names(args.train_data or [])),
            "base_model": hub_ids(args.init_from),
            "data": data.summary,
            "continues": continues,
        }
        with run.exporting(averaged, folder, facts) as target:
            save_generator_curve(run.log_path, target / "loss_curve.png")

    model.train()
    last_filled = tally.filled()[0]
    for _ in run.steps():
        rate = scheduler.get_last_lr()[0]
        with run.waiting():
            parts = [source.take() for _ in range(micros)]
        batches = [to_batch(part, config, row_length, accelerator.device) for part in parts]
        # The mean is over all predicted places of the step, in whichever process and forward pass they are.
        predicted = to_device(torch.tensor(sum(len(batch["places"]) for batch in batches)), accelerator.device)
        predicted = accelerator.reduce(predicted, "sum")
        sums = torch.zeros_like(tally.sums)
        for batch in batches:
            with accelerator.accumulate(model):
                losses, hits = model(batch)
                # Processes and forward passes are averaged, where sums are wanted.
                loss = losses.sum() * (processes * micros) / predicted
                run.take_step(loss, optimizer, model.parameters())
            sums += tally.count(losses, hits, batch)
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        tally.add(accelerator.reduce(sums, "sum"))
        run.stepped()
        if run.log_due():
            (filled, sequences), ever = tally.filled(), tally.ever()
            flops = 3 * generator_flops(config, filled, sequences) / filled  # a place
            record = {
                **tally.values(),
                "learning_rate": rate,
                "epoch": data.epochs(ever["sequences"]),
                "too_long": ever["too_long"],
                **run.speed("tokens_per_second", filled - last_filled, flops),
            }
            shown = {"loss": "total", "codes": "codes", "lengths": "lengths", "tokens/s": "tokens_per_second"}
            run.log(record, shown)
            tally.clear()
            last_filled = 0
        validates = val_data is not None and run.due(args.validate_every)
        samples = tokenizer is not None and run.due(args.sample_every)
        if (validates or samples) and accelerator.is_main_process:
            results = {}
            with run.validating(module), accelerator.autocast():
                if validates:
                    results = held_out = validate(accelerator, module, val_data.data, args, row_length)
                if samples:
                    picture = run.output_dir / "samples" / f"step-{progress.step:07d}.png"
                    results = results | draw_samples(generator, tokenizer, args.samples, picture)
            run.log(results)
            shown = ("val/total", "val/prediction_total", "val/length_accuracy", "samples/tokens")
            run.tell({name: results[name] for name in shown if name in results})
        run.save(generator, export)
    return run.finish(generator, export)


if __name__ == "__main__":
    run_script(main)
