"""Turns a data set of videos into a data set of tokens, which a generator learns.

    accelerate launch training/tokenize_dataset.py --tokenizer CHECKPOINT --train_data VIDEOS --output_dir tokens

Writes under --output_dir, shard by shard, `data/*.parquet`, which `datasets.load_dataset` reads: a row a view (clip) of
a video, with the tokens of its blocks, and with --known_frames those of what is shown in frame prediction. At the end
`tokens.json` with what a generator has to know, the data set card and its picture. A run that was killed goes on after
its last shard with --resume true and gives the same shards. With --push_to_hub the finished data set also goes to the
Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evatok_hf import VideoTokenizer
from evatok_hf.data.clip_sources import Source, listed
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.token_dataset import SHARDS, features, make_rows, shard_settings
from evatok_hf.hub.tokens_card import finish
from evatok_hf.interrupts import run_script
from evatok_hf.tokenize.clip_tokens import ClipTokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.arguments import parse_sources
from training.common.fields import option
from training.common.options import ViewOptions
from training.make_data.clip_shards import ShardOptions, ShardRun


@dataclass(kw_only=True)
class TokenizeArguments(ViewOptions, ShardOptions):
    """Options of making tokens."""

    tokenizer: str | None = option("Checkpoint, Hub id or bundled name of the tokenizer, with its router.", None)
    epochs: int | None = option("How many times each video comes up (1, where --clips is not given).", None)
    clips: int | None = option("Clips in all, instead of --epochs; sources are then mixed by weight.", None)
    clips_per_video: int = 4
    views: str = option(
        "random, or fixed: the centre, not mirrored, evenly spaced, with the first stride, for test splits.", "random"
    )
    batch_size: int = option("Clips encoded at once.", 32, aliases=["--batch_clips"])
    shard_size: int = 1024

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "epochs", "clips", "batch_size")
        self.one_of(views=("random", "fixed"))
        if self.epochs is not None and self.clips is not None:
            raise ValueError("give either --epochs or --clips, not both.")
        if self.views == "fixed" and (self.clips is not None or self.epochs not in (None, 1)):
            raise ValueError("--views fixed takes every video once; leave --clips and --epochs out.")
        weights = [weight for _, weight in parse_sources(self.train_data)]
        if self.clips is None and any(weight != 1 for weight in weights):
            raise ValueError("weights of sources need --clips; --epochs takes every video equally often.")
        if self.epochs is None and self.clips is None:
            self.epochs = 1
        self.allocation()


def join_classes(sources: Sequence[Source]) -> list[str]:
    """The classes of all sources together, in alphabetical order as those of a single folder."""
    return sorted({name for source in sources for name in source.classes})


def join_labels(batch: dict[str, Any], sources: Sequence[Source], classes: list[str]) -> torch.Tensor:
    """The labels of a batch, which index the classes of their own source, as those of all sources, (B,).

    Raises:
        ValueError: a label without a name beside sources whose labels have names.
    """
    labels = []
    for origin, label in zip(batch["origin"].tolist(), batch["label"].tolist(), strict=True):
        names = sources[origin].classes
        if label >= 0 and classes and not names:
            raise ValueError(
                f"{sources[origin].name} has labels without names and cannot be mixed with sources that have names; "
                "make its tokens by themselves."
            )
        labels.append(classes.index(names[label]) if label >= 0 and names else label)
    return torch.tensor(labels)


def epoch_passes(run: ShardRun[TokenizeArguments]) -> Iterator[Iterator[dict[str, Any]]]:
    """The rest of the epoch that the stream is in, then the others.

    Raises:
        ValueError: the stream is beyond them.
    """
    first = run.stream.state_dict()["epoch"]
    if first >= run.args.epochs:
        raise ValueError(f"there are clips of {first + 1} epochs already; ask for as many, or for more.")
    for epoch in range(first, run.args.epochs):
        run.stream.set_epoch(epoch)
        yield run.read()


def main(argv: list[str] | None = None) -> Path:
    run = ShardRun(TokenizeArguments, "tokenize_dataset", __doc__, SHARDS, argv)
    args, accelerator = run.args, run.accelerator
    tokenizer = VideoTokenizer.from_pretrained(args.tokenizer, device=str(accelerator.device))
    config, allocation = tokenizer.model.config, args.allocation().bind(tokenizer.model, tokenizer.router)
    encode = ClipTokens(allocation, args.known_frames)
    stream = run.open(config, repeat=args.epochs is None, training=args.views == "random")
    sources, classes = stream.sources, join_classes(stream.sources)
    counted = "clips" if args.epochs is None else "epochs"  # of which more may be asked for later
    settings = shard_settings(parse_sources(args.train_data), counted, args, stream.config, allocation, classes)
    run.begin(settings, lambda: features(config.num_blocks, classes, args.known_frames is not None))
    total = expected = None
    if args.epochs is None:
        total, passes = run.share(args.clips), [run.read()]
    else:
        passes = epoch_passes(run)
        videos = [listed(source) for source in sources]
        if None not in videos:
            expected = sum(map(len, videos)) * args.clips_per_video * args.epochs // accelerator.num_processes

    def compute(batch: dict[str, Any], first: int) -> list[dict[str, Any]]:
        tokens = encode(batch["pixel_values_videos"])
        return make_rows({**batch, "label": join_labels(batch, sources, classes)}, tokens)

    run.fill(passes, compute, args.batch_size, total, expected)
    made = int(accelerator.gather(torch.tensor([run.done], device=accelerator.device)).sum())

    def write(shards: ShardFolder, facts: dict[str, Any]) -> None:
        try:
            finish(shards, tokenizer, {**facts, "epochs": args.epochs, "clips": made})
        except ValueError as error:
            raise ValueError(
                f"the tokens are not whole ({error}); if machines wrote to different folders, copy all shards into one "
                "and run again with --resume true."
            ) from error

    return run.finish(write)


if __name__ == "__main__":
    run_script(main)
