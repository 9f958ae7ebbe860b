"""Make labelled video without end: a folder of clips of Doom worlds, played by a random policy and rebuilt from seeds.

    pip install vizdoom==1.3.2
    python training/make_vizdoom_dataset.py --output_dir data/vizdoom --workers 4

The class of a clip is its world (a ViZDoom scenario or a Freedoom map), its identity is its seed. The folder has the
layout of UCF-101 and of the `videofolder` builder of `datasets`, `{train,test}/<class>/<seed>.mp4`, with `manifest.csv`
and a dataset card beside it. Nothing is downloaded: engine, maps and Freedoom's art come inside the wheel of ViZDoom.

Each clip is played by an engine of its own, started fresh with seeds that come from the class and the seed of the clip
alone: it does not depend on the other clips, their order, or the number of workers. A stopped run goes on where it was.
With --push_to_hub the finished data set also goes to the Hub.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
from tqdm import tqdm

from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import read_json, remove_left_over, scratch_in, write_json, write_text
from evatok_hf.video.read import VideoWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.fields import option
from training.common.hub_push import HubDatasetArguments, HubPush
from training.make_data.vizdoom_worlds import (
    FREEDOOM,
    MAX_ATTEMPTS,
    POLICY_VERSION,
    STRETCHES,
    TICS_PER_SECOND,
    TURNS,
    WARM_UP,
    WORLDS,
    EpisodeError,
    Recipe,
    make_frames,
)

CARD_TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "dataset_vizdoom.md"
MANIFEST_FILE, RECIPE_FILE = "manifest.csv", "recipe.json"
MANIFEST_FIELDS = tuple("file_name split label seed attempt frames fps height width frames_sha256".split())
FIRST_TRAIN_SEED, FIRST_TEST_SEED = 0, 1_000_000  # Training seeds lie below it, test seeds from here on.
MAX_CRASHES = 2  # Times that an engine may die on a clip before the clip is given up.
SILENCE_SECONDS = 120.0  # A worker that reports nothing for so long hangs.
CLIPS_PER_PROCESS = 50

logger = logging.getLogger("make_vizdoom_dataset")


@dataclass
class DatasetArguments(HubDatasetArguments):
    """Options: the clips to make, and the folder."""

    output_dir: str = option("Folder for the data set.", "")
    classes: str = option("Comma-separated classes; empty makes all. See --list_classes.", "")
    list_classes: bool = option("Print the classes and stop.", False)
    train: int = option("Training clips a class.", 200)
    test: int = option("Test clips a class.", 40)
    frames: int = option("Frames a clip; from 64 on each shows every kind of action.", 64)
    frame_skip: int = option("Game tics a frame. The game runs at 35 tics/s: clips have 35/frame_skip fps.", 1)
    width: int = option("Rendered width; width x height must be a size of ViZDoom.", 160)
    height: int = option("Rendered height.", 120)
    short_side: int = option("Scale the rendered frames down to this even short side; 0 keeps them.", 0)
    workers: int = option("Processes at a time; has no influence on the clips.", 1)
    overwrite: bool = option("Remove the clips made earlier instead of going on.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.list_classes:
            return
        if not self.output_dir:
            raise ValueError("--output_dir is missing: name the folder for the data set.")
        if unknown := [name for name in self._named() if name not in WORLDS]:
            raise ValueError(f"Unknown classes {', '.join(unknown)}; --list_classes prints those that exist.")
        self.at_least(1, "frames", "frame_skip", "workers")
        if min(self.train, self.test) < 0 or self.train + self.test == 0:
            raise ValueError(f"train and test must be 0 or more and not both 0, not {self.train} and {self.test}.")
        if self.train > FIRST_TEST_SEED:
            raise ValueError(f"train must be at most {FIRST_TEST_SEED}, so that seeds of the splits stay apart.")
        if self.short_side and (self.short_side < 16 or self.short_side % 2):
            raise ValueError(f"short_side must be 0 or an even number of at least 16, not {self.short_side}.")
        if self.short_side > min(self.width, self.height):
            raise ValueError(f"short_side {self.short_side} would upscale {self.width} x {self.height}; render larger.")

    def _named(self) -> list[str]:
        return [name.strip() for name in self.classes.split(",") if name.strip()]

    def class_names(self) -> list[str]:
        """The chosen classes in the order of `WORLDS`."""
        return [name for name in WORLDS if name in (self._named() or WORLDS)]

    def recipe(self) -> Recipe:
        """The recipe of the clips; raises ValueError without ViZDoom, or for a size that it cannot render."""
        try:
            import vizdoom
        except ImportError as error:
            raise ValueError("ViZDoom is not installed; run: pip install vizdoom==1.3.2") from error
        engine, sizes = version("vizdoom"), vizdoom.ScreenResolution.__members__
        if f"RES_{self.width}X{self.height}" not in sizes:
            known = ", ".join(name.removeprefix("RES_").lower() for name in sizes)
            raise ValueError(f"ViZDoom cannot render {self.width}x{self.height}; choose one of {known}.")
        return Recipe(engine, POLICY_VERSION, self.frames, self.frame_skip, self.width, self.height, self.short_side)


@dataclass(frozen=True)
class ClipName:
    split: str
    label: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.split}/{self.label}/{self.seed:07d}.mp4"


def enter(scratch: Path) -> None:
    """Prepares a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself.
    os.chdir(scratch)  # The engine drops files into the current folder.
    log = os.open(scratch / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def make_clip(clip: ClipName, recipe: Recipe, target: Path, scratch: Path) -> tuple:
    """Makes a clip, in a worker process -> its row of the manifest. Raises EpisodeError where no episode lasts."""
    height, width = recipe.size
    frames, attempt = make_frames(clip.label, recipe, clip.seed, scratch)
    path = target / clip.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = scratch / "clip.mp4"  # which goes with the folder where the parent ends this process
    with VideoWriter(finished, float(recipe.fps), height, width) as writer:
        writer.write(frames)
    os.replace(finished, path)
    row = (clip.file_name, clip.split, clip.label, clip.seed, attempt, len(frames), f"{float(recipe.fps):g}")
    return *row, height, width, hashlib.sha256(frames.tobytes()).hexdigest()


class Maker:
    """Runs the workers, keeps the manifest, and remembers which clips could not be made."""

    def __init__(self, recipe: Recipe, target: Path, scratch: Path, rows: dict[str, tuple]) -> None:
        self.recipe, self.target, self.scratch, self.rows = recipe, target, scratch, rows
        self.missing: dict[ClipName, str] = {}
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    def run(self, clips: list[ClipName], workers: int) -> None:
        """Make the clips, `workers` processes at a time; what could not be made is in `missing` afterwards."""
        waiting = iter(clips)
        with tqdm(total=len(clips), unit="clip", disable=None) as bar, ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self.work, waiting, bar) for _ in range(workers)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                self.stopping.set()
                for folder in self.scratch.iterdir():
                    end_processes(folder)
                pool.shutdown(cancel_futures=True)

    def work(self, waiting: Iterator[ClipName], bar: tqdm) -> None:
        """Make clips in a process, and go on in a new one after some, or where an engine took the process with it."""
        clip, crashes = next(waiting, None), 0
        while clip is not None and not self.stopping.is_set():
            with tempfile.TemporaryDirectory(dir=self.scratch) as name:
                folder, spawned = Path(name), multiprocessing.get_context("spawn")
                worker = ProcessPoolExecutor(1, spawned, enter, (folder,))
                try:
                    for _ in range(CLIPS_PER_PROCESS):
                        self.make(clip, worker, folder, bar)
                        clip, crashes = next(waiting, None), 0
                        if clip is None or self.stopping.is_set():
                            break
                except (BrokenProcessPool, TimeoutError) as error:
                    crashes += 1
                    if crashes == MAX_CRASHES:
                        hung = f"the engine hung for {SILENCE_SECONDS:.0f} s"
                        reason = "the worker died" if isinstance(error, BrokenProcessPool) else hung
                        self.missing[clip] = reason + last_line(folder / "worker.log")
                        clip, crashes = next(waiting, None), 0
                finally:
                    end_processes(folder)
                    worker.shutdown()

    def make(self, clip: ClipName, worker: ProcessPoolExecutor, folder: Path, bar: tqdm) -> None:
        """Has a worker make a clip, and notes it. Raises what tells of a worker's death, or that it hangs."""
        made = worker.submit(make_clip, clip, self.recipe, self.target, folder)
        try:
            row = made.result(SILENCE_SECONDS)
        except EpisodeError as error:
            row, self.missing[clip] = None, str(error)
        with self.lock:
            if row is not None:
                self.rows[row[0]] = row
                with (self.target / MANIFEST_FILE).open("a", newline="") as file:
                    csv.writer(file).writerow(row)
            bar.set_postfix_str(clip.label, refresh=False)
            bar.update()


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return f": {lines[-1]}" if lines else ""


def end_processes(folder: Path) -> None:
    """End what works in a folder: a worker and the engine that it started."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cwd() == str(folder):
                process.kill()
        except psutil.Error:  # it has ended, or is ending
            continue


def read_rows(target: Path) -> dict[str, tuple]:
    """The manifest's rows by file name. A last line that a stopped run left half written is ignored."""
    path = target / MANIFEST_FILE
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    digest_length = hashlib.sha256().digest_size * 2
    return {row[0]: row for row in rows[1:] if len(row) == len(MANIFEST_FIELDS) and len(row[-1]) == digest_length}


def write_manifest(target: Path, rows: dict[str, tuple]) -> None:
    lines = [",".join(MANIFEST_FIELDS)] + [",".join(map(str, rows[name])) for name in sorted(rows)]
    write_text(target / MANIFEST_FILE, "\n".join(lines) + "\n")


def prepare_target(target: Path, recipe: Recipe, overwrite: bool) -> dict[str, tuple]:
    """Make the folder ready and return the rows of its finished clips.

    Raises:
        ValueError: if it holds clips of another recipe, or files that this script did not write.
    """
    recipe_file = target / RECIPE_FILE
    remove_left_over(target)
    rows = read_rows(target)
    if not recipe_file.exists():
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty and holds no {RECIPE_FILE}; choose an empty folder.")
    elif overwrite:
        for name in rows:
            (target / name).unlink(missing_ok=True)
    elif (earlier := read_json(recipe_file)) != asdict(recipe):
        pairs = ((key, earlier.get(key), value) for key, value in asdict(recipe).items())
        changed = ", ".join(f"{key} {before} -> {value}" for key, before, value in pairs if before != value)
        raise ValueError(f"{target} holds clips of another recipe ({changed}); choose another folder or --overwrite.")
    target.mkdir(parents=True, exist_ok=True)
    rows = {name: row for name, row in rows.items() if (target / name).is_file()}
    write_json(recipe_file, asdict(recipe))
    write_manifest(target, rows)
    return rows


def write_card(target: Path, recipe: Recipe, rows: dict[str, tuple], missing: dict[ClipName, str]) -> None:
    """Write the dataset card README.md for all clips that the folder holds; those that are missing have reasons."""
    # Not above: the engines' processes import this module, and these take seconds.
    from datasets import ClassLabel, Features, Video

    from evatok_hf.hub.data_cards import PAPER_TAG, front_matter, in_words, render_template, versions

    made = Counter(row[1:3] for row in rows.values())  # of a split and a class
    splits = [split for split in ("train", "test") if any(own == split for own, _ in made)]
    labels = [name for name in WORLDS if any(own == name for _, own in made)]
    counts = {name: [made[split, name] for split in splits] for name in labels}
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    options = {"output_dir": "vizdoom", "classes": ",".join(labels)}
    options |= {split: max(made[split, name] for name in labels) for split in ("train", "test")}
    options |= {key: getattr(recipe, key) for key in ("frames", "frame_skip", "width", "height", "short_side")}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = shlex.join(["python", "training/make_vizdoom_dataset.py", *words])
    sizes = [sum((target / name).stat().st_size for name, row in rows.items() if row[1] == split) for split in splits]
    features = Features({"video": Video(), "label": ClassLabel(names=sorted(labels))})
    data = front_matter(
        "bsd-3-clause",
        features,
        {name: (f"{name}/*/*.mp4", *pair) for name, pair in zip(splits, zip(totals, sizes, strict=True), strict=True)},
        sum(sizes),
        pretty_name="Random play in ViZDoom worlds",
        task_categories=["video-classification", "text-to-video", "image-to-video"],
        tags=["video", "synthetic", "vizdoom", "doom", "freedoom", "class-to-video", "frame-prediction", PAPER_TAG],
    )
    height, width = recipe.size
    card = render_template(
        CARD_TEMPLATE, data, features, command=command, labels=len(labels), clips=len(rows), splits=splits,
        counts=counts, totals=totals, worlds=WORLDS,
        height=height, width=width, recipe=recipe, fps=f"{float(recipe.fps):g}", bytes=sum(sizes), freedoom=FREEDOOM,
        stretches=", ".join(f"{kind} {low} to {high}" for kind, (low, high) in STRETCHES.items()),
        frames_for_all=sum(most for _, most in STRETCHES.values()), turns=TURNS, warm_up=WARM_UP,
        tics_per_second=TICS_PER_SECOND, seconds=f"{recipe.frames / float(recipe.fps):.2f}", attempts=MAX_ATTEMPTS,
        first_train_seed=FIRST_TRAIN_SEED, first_test_seed=FIRST_TEST_SEED, versions=in_words(versions()),
        retried=sum(int(row[4]) > 0 for row in rows.values()), missing=Counter(missing.values()),
    )  # fmt: skip
    write_text(target / "README.md", card.rstrip() + "\n")


def make_dataset(args: DatasetArguments) -> dict[ClipName, str]:
    """Make the data set; returns the clips that could not be made, with the reasons."""
    recipe, target = args.recipe(), Path(args.output_dir).resolve()
    rows = prepare_target(target, recipe, args.overwrite)
    clips = [
        ClipName(split, label, first + index)
        for label in args.class_names()
        for split, first, number in (("train", FIRST_TRAIN_SEED, args.train), ("test", FIRST_TEST_SEED, args.test))
        for index in range(number)
    ]
    todo = [clip for clip in clips if clip.file_name not in rows]
    logger.info("%d clips of %d classes: %d to make", len(clips), len(args.class_names()), len(todo))
    with scratch_in(target) as scratch:
        maker = Maker(recipe, target, scratch, rows)
        try:
            maker.run(todo, args.workers)
        finally:
            write_manifest(target, rows)
    if rows:
        write_card(target, recipe, rows, maker.missing)
    return maker.missing


def main() -> None:
    from transformers import HfArgumentParser  # not above: it takes seconds, and the engines' processes need it not

    args = HfArgumentParser(DatasetArguments, description=__doc__).parse_args_into_dataclasses()[0]
    if args.list_classes:
        for name, world in WORLDS.items():
            print(f"{name:26}{world.config}.cfg {world.map}".rstrip())
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    args.recipe()  # what cannot be rendered need not be asked for at the Hub
    hub = HubPush(args, Path(args.output_dir))
    missing = make_dataset(args)
    for clip, reason in missing.items():
        logger.error("missing %s: %s", clip.file_name, reason)
    if missing:
        sys.exit(f"{len(missing)} clips are missing; run the same command again to try only those.")
    hub.finish(Path(args.output_dir))


if __name__ == "__main__":
    run_script(main)
