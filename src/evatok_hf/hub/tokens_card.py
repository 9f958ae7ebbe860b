"""The end of making tokens: `tokens.json`, the data set card and its picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.shard_folder import ShardFolder
from ..data.token_dataset import SHARDS, SUMMARY, TokenDataset, features
from ..models.files_evatok import write_json, write_text
from ..pictures.figures import draw_lengths, pyplot, save_figure
from ..video.source_files import printable
from .data_cards import PAPER_TAG, front_matter, hub_ids, in_words, parquet_sizes, render_template, versions

if TYPE_CHECKING:
    from ..tokenize.video_tokenizer import VideoTokenizer

TEMPLATE = Path(__file__).parents[1] / "assets" / "dataset_tokens.md"
PICTURE = "tokens.png"
_CLASSES_DRAWN = 40


def finish(shards: ShardFolder, tokenizer: VideoTokenizer, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes what a finished run has beside its shards, `tokens.json` last of all, and returns what that holds.

    `facts` are command, machine, licence, sources_note, epochs and clips. Raises ValueError where shards are missing or
    damaged.
    """
    config, folder, settings = tokenizer.model.config, shards.folder, shards.settings
    summary = {
        **facts,
        "versions": versions(),
        "datasets": hub_ids(*settings["sources"]),
        "tokenizer": tokenizer.name,
        **{name: getattr(config, name) for name in ("codebook_size", "num_blocks", "num_frames", "image_size")},
        "block_lengths": list(config.block_lengths),
        **settings,
    }
    tokens = TokenDataset(folder, summary)
    summary |= {
        **counts(tokens),
        **sources(folder, len(settings["sources"])),
        "skipped": dict(shards.causes),
        "skipped_names": shards.write_skipped(),
        "seconds": round(shards.seconds),
    }
    if SHARDS.list(folder)[0].suffix == ".parquet":  # of shards that are no data set yet there is no card
        _draw(tokens, folder / PICTURE)
        write_text(folder / "README.md", printable(render(summary, parquet_sizes(SHARDS.list(folder)))))
    write_json(folder / SUMMARY, summary)
    TokenDataset.load(folder)
    shards.close()
    return summary


def counts(tokens: TokenDataset) -> dict[str, Any]:
    """Tokens in all, means by class and by block, and percentiles."""
    totals, labels = tokens.counts(), tokens.labels()
    low, middle, high = np.percentile(totals, [5, 50, 95]).tolist()
    of_class = _by_class(tokens)
    conditions = tokens.condition_counts()
    return {
        "tokens": int(totals.sum()),
        "mean_tokens": float(totals.mean()),
        "median_tokens": middle,
        "percentile_5_tokens": low,
        "percentile_95_tokens": high,
        "mean_tokens_by_block": tokens.lengths().mean(0).tolist(),
        "mean_tokens_by_class": {name: float(of.mean()) if len(of) else None for name, of in of_class.items()},
        "clips_by_class": {name: len(of) for name, of in of_class.items()},
        "clips_without_class": int((labels < 0).sum()),
        "condition_tokens": None if conditions is None else int(conditions.sum()),
        "mean_condition_tokens": None if conditions is None else float(conditions.mean()),
    }


def sources(folder: Path, number: int) -> dict[str, Any]:
    """Counts the videos and clips of each source."""
    clips, videos = Counter(), set()
    for path in SHARDS.list(folder):
        _, columns = SHARDS.read(path, ["origin", "source"])
        pairs = list(zip(*(np.asarray(columns[name]).tolist() for name in ("origin", "source")), strict=True))
        clips.update(origin for origin, _ in pairs)
        videos.update(pairs)
    of_source = Counter(origin for origin, _ in videos)
    return {
        "videos": len(videos),
        "videos_by_source": [of_source[index] for index in range(number)],
        "clips_by_source": [clips[index] for index in range(number)],
    }


def render(summary: dict[str, Any], sizes: tuple[int, int]) -> str:
    """The text of the card; its front matter parses. `sizes` are those of `parquet_sizes`."""
    columns = features(summary["num_blocks"], summary["classes"], summary["known_frames"] is not None)
    data = front_matter(
        summary["licence"],
        columns,
        {summary["split"]: ("data/*.parquet", summary["clips"], sizes[1])},
        sizes[0],
        summary["datasets"],
        pretty_name="EVATok video tokens",
        task_categories=["text-to-video", "image-to-video"],
        tags=["video", "video-tokenization", "video-generation", PAPER_TAG],
    )
    names = ("sources", "weights", "videos_by_source", "clips_by_source")
    by_class = [(name, summary["clips_by_class"][name], mean) for name, mean in summary["mean_tokens_by_class"].items()]
    return render_template(
        TEMPLATE,
        data,
        columns,
        origins=list(zip(*(summary[name] for name in names), strict=True)),
        by_class=by_class,
        picture=PICTURE,
        bytes=sizes[0],
        **{**summary, "versions": in_words(summary["versions"])},
    )


def _draw(tokens: TokenDataset, path: Path) -> None:
    """Tokens a clip, lengths by block and, where there are classes, tokens a clip by class."""
    plt = pyplot()
    totals, lengths, candidates = tokens.counts(), tokens.lengths(), tokens.summary["block_lengths"]
    found = [(name, of) for name, of in _by_class(tokens).items() if len(of)]
    shown = ordered = sorted(found, key=lambda pair: pair[1].mean())  # fewest first
    if len(ordered) > _CLASSES_DRAWN:
        shown = ordered[: _CLASSES_DRAWN // 2] + ordered[-_CLASSES_DRAWN // 2 :]
    figure, axes = plt.subplots(
        1,
        3 if shown else 2,
        figsize=(15 if shown else 9, max(3.6, 0.24 * len(shown))),
        width_ratios=[1, 1, 1.4][: 3 if shown else 2],
        layout="constrained",
    )
    axes[0].hist(totals, bins=40)
    axes[0].axvline(totals.mean(), color="grey", linestyle=":")
    axes[0].set(title=f"tokens of a clip (dotted: mean {totals.mean():.0f})", xlabel="tokens a clip", ylabel="clips")
    draw_lengths(axes[1], lengths, candidates, "lengths of each block")
    axes[1].legend(fontsize=8, title="tokens", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    if shown:
        axes[2].boxplot([of for _, of in shown], orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.7)
        axes[2].set_yticks(np.arange(1, len(shown) + 1), [name for name, _ in shown], fontsize=7)
        what = "by class" if len(shown) == len(ordered) else f"of the {len(shown)} classes with the fewest and the most"
        axes[2].set(title=f"tokens of a clip {what} (whiskers: 5 to 95 %)", xlabel="tokens a clip")
    save_figure(figure, path)


def _by_class(tokens: TokenDataset) -> dict[str, np.ndarray]:
    """The clips' tokens of each class."""
    totals, labels = tokens.counts(), tokens.labels()
    return {name: totals[labels == number] for number, name in enumerate(tokens.classes)}
