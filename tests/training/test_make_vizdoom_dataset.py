"""The labelled video of `training/make_vizdoom_dataset.py`: real episodes of two small worlds."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import psutil
import pytest
import yaml
from check_cards import check_card

from training.make_data.vizdoom_worlds import FREEDOOM, STRETCHES, WORLDS, draw_actions, make_frames
from training.make_vizdoom_dataset import DatasetArguments

vizdoom = pytest.importorskip("vizdoom", reason="the data set is played in ViZDoom: pip install vizdoom==1.3.2")

TRAINING = Path(__file__).resolve().parents[2] / "training"


CLASSES = "health_gathering,freedoom2_map01"


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(TRAINING / "make_vizdoom_dataset.py"), "--output_dir", str(folder), *options]


def run(folder: Path, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *options), capture_output=True, text=True, cwd=cwd, timeout=120)


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return {row["file_name"]: row for row in csv.DictReader(file)}


def decode(path: Path) -> tuple[np.ndarray, Fraction]:
    """Frames (F, H, W, 3) and frame rate of a video."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of two classes, and the folder from which it was made."""
    folder, cwd = tmp_path_factory.mktemp("vizdoom") / "set", tmp_path_factory.mktemp("cwd")
    result = run(folder, "--classes", CLASSES, "--train", "2", "--test", "1", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return folder, cwd


def test_layout_and_manifest(made: tuple[Path, Path]) -> None:
    folder, cwd = made
    expected = {
        f"{split}/{name}/{seed:07d}.mp4"
        for name in CLASSES.split(",")
        for split, seed in (("train", 0), ("train", 1), ("test", 1_000_000))
    }
    rows = manifest(folder)
    assert set(rows) == expected
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.mp4")} == expected
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "manifest.csv", "recipe.json", "test", "train",
    ]  # fmt: skip
    assert not list(cwd.iterdir()), "the engine must leave nothing in the user's folder"
    assert len({row["frames_sha256"] for row in rows.values()}) == len(rows), "no two clips are the same"
    for name, row in rows.items():
        frames, rate = decode(folder / name)
        assert frames.shape == (64, 120, 160, 3) and rate == 35
        assert (row["label"], row["frames"], row["fps"]) == (name.split("/")[1], "64", "35")
        assert frames.std() > 10, f"{name} shows nothing"


def test_card_and_datasets(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = made
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "bsd-3-clause" and card["size_categories"] == ["n<1K"]
    assert [part["split"] for part in card["configs"][0]["data_files"]] == ["train", "test"]
    assert f"--classes {CLASSES} --train 2 --test 1 --frames 64" in body
    assert "| health_gathering | health_gathering.cfg | - | 2 | 1 |" in body and "| **all** | | | 4 | 2 |" in body
    assert "{{" not in body and check_card((folder / "README.md").read_text(), "dataset", folder) == []
    assert "arxiv:2603.12267" in card["tags"] and f"maps of Freedoom {FREEDOOM}" in body
    package = Path(vizdoom.__file__).parent
    assert all(FREEDOOM.encode() in (package / f"freedoom{number}.wad").read_bytes() for number in (1, 2))
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {split: len(loaded[split]) for split in loaded} == {"train": 4, "test": 2}
    assert loaded["train"].features["label"].names == sorted(CLASSES.split(","))


def test_every_clip_has_static_and_busy_blocks(made: tuple[Path, Path]) -> None:
    folder, _ = made
    for path in folder.rglob("*.mp4"):
        frames = decode(path)[0].astype(np.float32).mean(-1)  # (F, H, W)
        blocks = frames.reshape(-1, 4, *frames.shape[1:])
        change = np.abs(np.diff(blocks, axis=1)).mean((1, 2, 3))  # Grey levels a frame, for each block of 4 frames.
        assert change.min() < 1.0, f"{path}: no static block in {change.round(1)}"
        assert change.max() > 4.0, f"{path}: no busy block in {change.round(1)}"


@pytest.mark.slow
def test_clips_do_not_depend_on_order_or_workers(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, cwd = made
    result = run(tmp_path / "again", "--classes", "freedoom2_map01,my_way_home", "--train", "2", "--test", "0",
                 "--workers", "2", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, again = manifest(folder), manifest(tmp_path / "again")
    shared = set(first) & set(again)
    assert len(shared) == 2
    for name in shared:
        assert first[name] == again[name]
        # The frames before encoding are the same, which the hashes said; x264 may spend its bits differently each time.
        difference = decode(folder / name)[0].astype(np.float32) - decode(tmp_path / "again" / name)[0]
        assert np.abs(difference).mean() < 3.0
    recipe = DatasetArguments(output_dir="unused").recipe()
    for seed in (1, 0):  # The other way round, and in this process.
        frames, attempt = make_frames("health_gathering", recipe, seed, tmp_path)
        row = first[f"train/health_gathering/{seed:07d}.mp4"]
        assert hashlib.sha256(frames.tobytes()).hexdigest() == row["frames_sha256"] and attempt == int(row["attempt"])


@pytest.mark.slow
def test_resume_makes_only_what_is_missing(made: tuple[Path, Path]) -> None:
    folder, cwd = made
    before = manifest(folder)
    lost = "test/health_gathering/1000000.mp4"
    (folder / lost).unlink()
    (folder / ".scratch.01234567.partial").mkdir()
    text = (folder / "manifest.csv").read_text()
    last = text.splitlines()[-1].split(",")[0]
    (folder / "manifest.csv").write_text(text[:-30])  # As when a run is killed while it writes a line.
    times = {name: (folder / name).stat().st_mtime_ns for name in before if name not in (lost, last)}
    result = run(folder, "--classes", CLASSES, "--train", "2", "--test", "1", cwd=cwd)
    assert result.returncode == 0 and "6 clips of 2 classes: 2 to make" in result.stderr
    assert manifest(folder) == before
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}
    assert not (folder / ".scratch.01234567.partial").exists()

    result = run(folder, "--classes", CLASSES, "--frames", "32", cwd=cwd)
    assert result.returncode != 0 and "another recipe (frames 64 -> 32)" in result.stderr
    assert manifest(folder) == before


@pytest.mark.slow
def test_a_dying_engine_costs_only_its_clip(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    options = ("--classes", "basic", "--train", "2", "--test", "0", "--frames", "16", "--short_side", "64")
    process = subprocess.Popen(command(folder, *options), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    killed: set[int] = set()
    deadline = time.monotonic() + 60
    while len(killed) < 2 and process.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.name() == "vizdoom" and child.pid not in killed:
                    child.kill()
                    killed.add(child.pid)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.002)
    errors = process.communicate(timeout=60)[1]
    assert len(killed) == 2 and process.returncode != 0
    assert "missing train/basic/0000000.mp4: the worker died" in errors and "1 clips are missing" in errors
    assert [path.name for path in folder.rglob("*.mp4")] == ["0000001.mp4"]
    assert not list(folder.glob(".*"))
    result = run(folder, *options, cwd=tmp_path)
    assert result.returncode == 0 and "1 to make" in result.stderr
    assert decode(folder / "train/basic/0000000.mp4")[0].shape == (16, 64, 86, 3)
    assert json.loads((folder / "recipe.json").read_text())["short_side"] == 64
    options = ("--classes", "basic", "--train", "1", "--test", "0", "--frames", "8", "--overwrite")
    result = run(folder, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(manifest(folder)) == ["train/basic/0000000.mp4"] and len(list(folder.rglob("*.mp4"))) == 1
    assert decode(folder / "train/basic/0000000.mp4")[0].shape == (8, 120, 160, 3)


def test_policy_holds_every_kind_within_64_frames() -> None:
    assert sum(high for _, high in STRETCHES.values()) <= 64
    for seed in range(50):
        actions = list(draw_actions(64, np.random.default_rng(seed)))
        assert len(actions) == 64
        idle = [action == (0.0, 0.0, 0.0, 0.0) for action in actions]
        assert 12 <= sum(idle) < 64 and any(action[3] for action in actions)
        assert any(abs(action[2]) >= 3 for action in actions) and any(abs(action[0]) >= 25 for action in actions)


def test_there_are_classes_enough() -> None:
    result = subprocess.run(
        [sys.executable, str(TRAINING / "make_vizdoom_dataset.py"), "--list_classes"], capture_output=True, text=True
    )
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(WORLDS) and len(WORLDS) >= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "output_dir is missing"),
        ({"output_dir": "x", "classes": "basic,doom9"}, "Unknown classes doom9"),
        ({"output_dir": "x", "frames": 0}, "frames must be at least 1"),
        ({"output_dir": "x", "train": 0, "test": 0}, "not both 0"),
        ({"output_dir": "x", "train": 1_000_001}, "seeds of the splits"),
        ({"output_dir": "x", "short_side": 63}, "even number"),
        ({"output_dir": "x", "short_side": 240}, "would upscale"),
    ],
)
def test_bad_arguments_say_what_to_mend(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetArguments(**options)


def test_unknown_size_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot render 161x120; choose one of 160x120"):
        DatasetArguments(output_dir="x", width=161).recipe()
    (tmp_path / "notes.txt").write_text("mine")
    result = run(tmp_path, "--overwrite", "True", cwd=tmp_path)
    assert result.returncode != 0 and "choose an empty folder" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
