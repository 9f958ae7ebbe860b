"""The end of a curation: bounds of the distance, `curation.json`, the data set card and its pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from evatok_hf.allocation.reward import DistanceBounds, best_assignments, proxy_reward
from evatok_hf.data.curated import SUMMARY, CuratedClips, features, figures, list_shards, read_rows
from evatok_hf.hub.data_cards import PAPER_TAG, front_matter, in_words, parquet_sizes, render_template
from evatok_hf.models.configuration_evatok import AssignmentSpace
from evatok_hf.models.files_evatok import write_json, write_text
from evatok_hf.models.modeling_evatok_router import DEFAULT_QUALITY
from evatok_hf.pictures.figures import draw_lengths, pyplot, save_figure
from evatok_hf.video.source_files import printable

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "dataset_curated.md"
QUALITIES = (0.8, 1.0, 1.2, 1.4, 1.6)
PICTURE = "distributions.png"


def finish(folder: Path, settings: dict, facts: dict, skipped: Mapping[str, int], seconds: float) -> None:
    """Writes what a finished curation has beside its shards, `curation.json` last of all.

    Args:
        folder: of the shards of all processes.
        settings: what the shards depend on.
        facts: command, machine, versions, licence, sources_note, datasets, clip, block_lengths, num_blocks,
            percentiles, clips (None: as many as there are).
        skipped: how many videos were skipped, by cause.
        seconds: that it took.

    Raises:
        ValueError: if shards are missing.
    """
    rows = read_rows(folder)
    count = 0 if rows is None else len(rows["clip_id"])
    facts = {**facts, "clips": facts["clips"] or count}
    if count != facts["clips"]:
        raise ValueError(
            f"{folder} holds {count} of {facts['clips']} clips; are all machines' shards in one folder? "
            "Copy them there and run again with --resume true."
        )
    space = AssignmentSpace(facts["block_lengths"], facts["num_blocks"])
    distances = figures(rows, space).table()[..., 0]
    measured = distances.isfinite()
    bounds = DistanceBounds.of(distances[measured], *facts["percentiles"])
    distances = distances.masked_fill(~measured, torch.inf)  # what was left out is not chosen
    summary = {
        **facts,
        **settings,
        "bounds": bounds.to_dict(),
        "videos": len(set(zip(rows["origin"][:], rows["source"][:], strict=True))),
        "by_source": [Counter(map(int, rows["origin"][:]))[index] for index in range(len(settings["sources"]))],
        "frozen": sum(int(frames[-1] == frames[-2]) for frames in rows["frames"][:]),
        "skipped": dict(skipped),
        "seconds": round(seconds),
    }
    if not isinstance(rows, dict):  # of shards that are no data set yet there is no card
        _draw(distances, space, bounds, settings["perceptual"], folder / PICTURE)
        text = render(summary, distances, space, bounds, parquet_sizes(list_shards(folder)))
        write_text(folder / "README.md", printable(text))
    write_json(folder / SUMMARY, summary)
    CuratedClips.load(folder)


def render(
    summary: dict, distances: torch.Tensor, space: AssignmentSpace, bounds: DistanceBounds, sizes: tuple[int, int]
) -> str:
    """The text of the card; its front matter parses. `sizes` are those of `parquet_sizes`."""
    columns = features(space)
    data = front_matter(
        summary["licence"],
        columns,
        {"train": ("data/*.parquet", summary["clips"], sizes[1])},
        sizes[0],
        summary["datasets"],
        pretty_name="EVATok proxy rewards",
        task_categories=["video-classification"],
        tags=["video", "video-tokenization", PAPER_TAG],
    )
    labels = []
    for quality in QUALITIES:
        lengths = space.to_lengths(best_assignments(proxy_reward(distances, space, bounds, quality), space)).double()
        labels.append({"quality": quality, "tokens": lengths.sum(1).mean().item(), "blocks": lengths.mean(0).tolist()})
    return render_template(
        TEMPLATE,
        data,
        columns,
        assignments=len(space),
        measured=int(distances.isfinite().sum(1).max()),
        labels=labels,
        origins=list(zip(summary["sources"], summary["weights"], summary["by_source"], strict=True)),
        picture=PICTURE,
        bytes=sizes[0],
        **{**summary, "versions": in_words(summary["versions"])},
    )


def _draw(distances: torch.Tensor, space: AssignmentSpace, bounds: DistanceBounds, metric: str, path: Path) -> None:
    """Distances at uniform lengths, and what the best assignment spends at the default preference."""
    plt = pyplot()
    best = space.to_lengths(best_assignments(proxy_reward(distances, space, bounds, DEFAULT_QUALITY), space))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for length in space.block_lengths:
        column = distances[:, int(space.to_index([length] * space.num_blocks))]
        column = column[column.isfinite()]
        axes[0].hist(column.numpy(), bins=40, histtype="step", label=f"{length} tokens a block")
    for bound in (bounds.low, bounds.high):
        axes[0].axvline(bound, color="grey", linestyle=":")
    axes[0].set(title="distance of clips (dotted: bounds)", xlabel=metric, ylabel="clips")
    axes[0].legend(fontsize=8)
    axes[1].hist(best.sum(1).numpy(), bins=40)
    axes[1].set(title=f"tokens of the best assignment, w_q {DEFAULT_QUALITY}", xlabel="tokens a clip", ylabel="clips")
    draw_lengths(axes[2], best.numpy(), space.block_lengths, "lengths it gives to each block")
    axes[2].legend(fontsize=8)
    save_figure(figure, path)
