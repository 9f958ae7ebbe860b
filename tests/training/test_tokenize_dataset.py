"""training/tokenize_dataset.py: what a run leaves, that its tokens are the tokenizer's, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from curated_samples import CLIP, TRAINING, make_videos
from datasets import ClassLabel, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from script_samples import error_of_script
from token_samples import (
    SIZE,
    make_checkpoint,
    make_labelled,
    options,
    read_rows,
    read_shards,
    read_summary,
    run_tokenizing,
    tokenize_dataset,
)

from evatok_hf import VideoTokenizer, VideoTokens
from evatok_hf.allocation import Allocation
from evatok_hf.data.clip_cutting import ClipConfig, ClipCutter, Crop
from evatok_hf.data.clip_sources import Example
from evatok_hf.data.streaming import to_float
from evatok_hf.data.token_dataset import SHARDS, TokenDataset
from evatok_hf.models.video_processing_evatok import hold_last_frame

SCRIPT = TRAINING / "tokenize_dataset.py"
CLASSES = ["bird", "cat", "dog"]
VIEWS = ("--strides", 1, 2, "--scale", 0.5, 1, "--random_position=true")
TRAIN = {"cat/v0.mp4", "cat/v1.mp4", "cat/v2.mp4", "dog/v3.mp4", "dog/v4.mp4"}


class Killed(BaseException):
    """What no handler of the script catches."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def argv(checkpoint, videos):
    """Options of the runs below, for a folder."""
    return lambda folder, *more: options(folder, videos, checkpoint, *VIEWS, *more)


@pytest.fixture(scope="module")
def finished(argv, tmp_path_factory) -> Path:
    """Two rounds over the training videos without interruption, with conditions."""
    folder = tmp_path_factory.mktemp("finished") / "tokens"
    return run_tokenizing(argv(folder, "--epochs=2", "--known_frames=2"), picture=True)


def cut_again(videos: Path, row: dict) -> torch.Tensor:
    """The clip of a row as the model takes it, (1, F, 3, S, S)."""
    example = Example(row["source"], str(videos / row["source"]), -1)
    with ClipCutter(example, ClipConfig(**CLIP), training=False) as video:
        return to_float(video.recut(row["frames"], Crop(*row["crop"])))[None]


def test_shards_are_read_by_datasets(finished, tmp_path):
    names = {"data", "tokens.json", "README.md", "tokens.png", "skipped.jsonl"}
    assert {path.name for path in finished.iterdir()} == names
    names = [f"tokens-0000-{number:06d}.parquet" for number in range(5)]
    assert sorted(path.name for path in (finished / "data").iterdir()) == names
    rows = load_dataset("parquet", data_files=str(finished / "data" / "*.parquet"), cache_dir=tmp_path)["train"]
    assert len(rows) == 20 and Counter(rows["source"]) == dict.fromkeys(TRAIN, 4)
    assert rows.features["label"] == ClassLabel(names=CLASSES)
    for row in rows:
        assert CLASSES[row["label"]] == row["source"].split("/")[0]
        assert len(row["lengths"]) == 2 and sum(row["lengths"]) == len(row["ids"]) and row["fps"] == 25
        assert sum(row["condition_lengths"]) == len(row["condition_ids"])
        assert len(row["frames"]) == 4 and len(row["crop"]) == 4 and row["origin"] == 0
    assert len({tuple(row["frames"] + row["crop"]) for row in rows}) > 15
    assert {tuple(np.diff(frames)) for frames in rows["frames"]} == {(1, 1, 1), (2, 2, 2)}
    assert {crop[3] for crop in rows["crop"]} == {0, 1}
    # The card's own configuration leads there too.
    assert len(load_dataset(str(finished), cache_dir=tmp_path)["train"]) == 20


def test_tokens_are_those_that_the_tokenizer_gives(finished, videos, checkpoint):
    tokenizer, rows = VideoTokenizer.from_pretrained(checkpoint), read_rows(finished)
    model, allocation = tokenizer.model, Allocation().bind(tokenizer.model, tokenizer.router)
    for row in rows[::3]:
        clip = cut_again(videos / "train", row)
        for prefix, seen in (("", clip), ("condition_", hold_last_frame(clip, 2))):
            expected = model.encode(seen, allocation(seen))
            found = VideoTokens(torch.tensor(row[f"{prefix}ids"]), torch.tensor([row[f"{prefix}lengths"]]))
            assert torch.equal(found.lengths, expected.lengths) and torch.equal(found.ids, expected.ids)
            assert torch.equal(model.decode(found), model.decode(expected))
    assert len({tuple(row["lengths"]) for row in rows}) > 1  # the router does choose
    assert len({number for row in rows for number in row["ids"]}) > 4
    assert any(row["ids"] != row["condition_ids"] for row in rows)


def test_the_data_set_of_the_package_reads_them(finished):
    tokens, rows = TokenDataset.load(finished), read_rows(finished)
    assert tokens.classes == CLASSES and len(tokens) == len(rows)
    for row, made in zip(rows, tokens, strict=True):
        assert (made.source, made.label, made.fps) == (row["source"], row["label"], 25)
        assert made.ids.tolist() == row["ids"] and made.condition_ids.tolist() == row["condition_ids"]
        assert made.lengths.tolist() == row["lengths"] and made.condition_lengths.tolist() == row["condition_lengths"]


@pytest.mark.parametrize("more", [("--batch_size=1",), ("--batch_size=8", "--num_workers=1", "--shard_size=20")])
def test_the_batch_does_not_change_tokens(argv, finished, tmp_path, more):
    folder = run_tokenizing(argv(tmp_path / "run", "--epochs=2", "--known_frames=2", *more))
    assert read_rows(folder) == read_rows(finished)
    assert read_summary(folder)["skipped"] == read_summary(finished)["skipped"]


def test_the_summary_and_the_card(finished, videos, checkpoint):
    summary, text, rows = read_summary(finished), (finished / "README.md").read_text(), read_rows(finished)
    tokenizer = VideoTokenizer.from_pretrained(checkpoint)
    fingerprints = tokenizer.model.fingerprint(), tokenizer.router.fingerprint()
    assert (summary["tokenizer_fingerprint"], summary["router_fingerprint"]) == fingerprints
    assert (summary["tokenizer"], summary["codebook_size"], summary["known_frames"]) == ("small", 64, 2)
    assert (summary["block_lengths"], summary["num_blocks"], summary["image_size"]) == ([2, 4, 8], 2, SIZE)
    assert summary["allocation"] == "router (quality 1.2)" and summary["classes"] == CLASSES
    counts = np.array([len(row["ids"]) for row in rows])
    assert summary["clips"] == 20 and summary["tokens"] == counts.sum()
    assert summary["mean_tokens"] == pytest.approx(counts.mean())
    assert summary["mean_tokens_by_block"] == pytest.approx(np.mean([row["lengths"] for row in rows], 0))
    cats = np.array([row["label"] == 1 for row in rows])
    assert summary["mean_tokens_by_class"] == {"bird": None, "cat": counts[cats].mean(), "dog": counts[~cats].mean()}
    assert summary["clips_by_class"] == {"bird": 0, "cat": 12, "dog": 8}
    # Each of the two damaged files came up in both rounds, whichever was the last of its round.
    assert summary["skipped"] == {"unreadable": 2, "too short": 2} and summary["videos_by_source"] == [5]

    front = DatasetCard(text).data.to_dict()
    assert front["license"] == "other" and front["size_categories"] == ["n<1K"]
    for fact in (*fingerprints, "router (quality 1.2)", "2 of each video in each of 2 rounds", "frame 2 held"):
        assert fact in text
    for row in (
        f"| {counts.sum()} | {counts.mean():.1f} |",
        "| train | 5 | 20 | ",
        f"| cat | 12 | {counts[cats].mean():.1f} |",
        f"| `{videos}` | 1.0 | 5 | 20 |",
        "- Class without a clip: bird.",
        "Videos skipped each time they came up: 2 unreadable, 2 too short. `skipped.jsonl` names them.",
    ):
        assert row in text, row
    picture = np.asarray(Image.open(finished / "tokens.png").convert("L"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.min() < 100


def test_the_test_split(argv, tmp_path):
    fixed = ("--split=test", "--views=fixed", "--uniform=8", "--licence=mit", "--sources_note=Made by a test.")
    folder = run_tokenizing(argv(tmp_path / "run", *fixed))
    rows = sorted(read_rows(folder), key=lambda row: (row["source"], row["frames"]))
    assert [(row["source"], row["label"]) for row in rows] == [("bird/v5.mp4", 0)] * 2 + [("dog/v6.mp4", 2)] * 2
    # The centre square of 32 x 40, unmirrored; the first and the last 4 of 10 frames.
    assert {tuple(row["crop"]) for row in rows} == {(0, 4, 32, 0)}
    assert [row["frames"] for row in rows] == [[0, 1, 2, 3], [6, 7, 8, 9]] * 2
    assert {tuple(row["lengths"]) for row in rows} == {(8, 8)} and "condition_ids" not in rows[0]
    summary, text = read_summary(folder), (folder / "README.md").read_text()
    assert (summary["allocation"], summary["known_frames"]) == ("uniform (8 tokens)", None)
    assert summary["router_fingerprint"] is None and DatasetCard(text).data.license == "mit"
    assert "Made by a test." in text and "evenly spaced without overlap" in text and "condition" not in text.lower()
    assert list(load_dataset(str(folder), cache_dir=tmp_path / "cache")) == ["test"]
    again = run_tokenizing(argv(tmp_path / "again", *fixed, "--seed=7"))
    assert read_rows(again) == read_rows(folder)


@pytest.mark.parametrize(
    ("given", "allocation"),
    [
        ("--lengths=8,2", "fixed (8, 2 tokens)"),
        ("--budget_per_clip=6", "budget (6 tokens a clip)"),
        ("--quality=0", "router (quality 0.0)"),
        ("--strategy=uniform", "uniform (4 tokens)"),
    ],
)
def test_other_allocations(argv, videos, checkpoint, tmp_path, given, allocation):
    folder = run_tokenizing(argv(tmp_path / "run", "--split=test", given))
    found = {tuple(row["lengths"]) for row in read_rows(folder)}
    expected = {"fixed": {(8, 2)}, "router": {(2, 2)}, "uniform": {(4, 4)}}
    assert read_summary(folder)["allocation"] == allocation
    assert found == expected.get(allocation.split()[0], found) and max(map(sum, found)) <= 10
    if given.startswith("--budget"):
        assert max(map(sum, found)) <= 6


# --- resume ---


def kill_while_writing(patch, count: int) -> None:
    """Dies with half of shard `count` written."""
    from evatok_hf.data import parquet_shards

    write, calls = parquet_shards._write_summed, []

    def half(table, path):
        calls.append(path)
        write(table, path)
        if len(calls) > count:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise Killed

    patch.setattr(parquet_shards, "_write_summed", half)
    patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # one that is killed does not tidy up


def kill_while_encoding(patch, count: int) -> None:
    rows, calls = tokenize_dataset.make_rows, []

    def until(*args):
        calls.append(args)
        if len(calls) > count:
            raise Killed
        return rows(*args)

    patch.setattr(tokenize_dataset, "make_rows", until)


def kill_at_the_end(patch, count: int) -> None:
    def never(*args):
        raise Killed

    patch.setattr("evatok_hf.hub.tokens_card.write_text", never)


@pytest.mark.parametrize(
    ("kill", "count", "left", "more"),
    [
        (kill_while_writing, 0, 0, ()),
        (kill_while_writing, 3, 3, ()),  # in the second round
        (kill_while_encoding, 5, 2, ()),
        (kill_at_the_end, 0, 5, ()),
        # The first round ends where a shard does.
        (kill_while_encoding, 4, 2, ("--shard_size=5",)),
        # Workers whose parts are not equally long.
        (kill_while_encoding, 5, 2, ("--num_workers=2", "--epochs=3")),
        (kill_while_encoding, 5, 2, ("--num_workers=2", "--clips=23")),
    ],
)
def test_a_killed_run_goes_on_with_the_same_shards(argv, finished, tmp_path, kill, count, left, more):
    given = ["--known_frames=2", *more]
    if not any("epochs" in word or "clips=" in word for word in more):
        given.append("--epochs=2")
    straight = run_tokenizing(argv(tmp_path / "straight", *given)) if more else finished
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, count)
        with pytest.raises(Killed):
            run_tokenizing(argv(tmp_path / "run", *given))
    assert len(SHARDS.list(tmp_path / "run")) == left
    if left:
        with pytest.raises(ValueError, match="not finished; go on with .*--resume true"):
            TokenDataset.load(tmp_path / "run")
    run_tokenizing(argv(tmp_path / "run", "--resume=true", *given))
    assert read_shards(tmp_path / "run") == read_shards(straight)
    assert read_summary(tmp_path / "run") == read_summary(straight)
    assert [path.name for path in (tmp_path / "run").rglob("*.partial*")] == []


def test_a_process_that_is_killed_leaves_whole_shards(argv, finished, tmp_path):
    # Many rounds, so that the end is far when the first shard appears.
    given = [str(SCRIPT), *argv(tmp_path / "run", "--epochs=100000", "--known_frames=2")]
    process = subprocess.Popen([sys.executable, *given], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not SHARDS.list(tmp_path / "run") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    shards = SHARDS.list(tmp_path / "run")
    assert shards and not (tmp_path / "run" / "tokens.json").exists()
    for shard in shards[4:]:  # what a shorter run does not reach
        shard.unlink()
    run_tokenizing(argv(tmp_path / "run", "--resume=true", "--epochs=2", "--known_frames=2"))
    assert read_shards(tmp_path / "run") == read_shards(finished)
    assert read_summary(tmp_path / "run") == read_summary(finished)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_video_comes_up_once_a_round(argv, tmp_path, workers):
    folder = run_tokenizing(argv(tmp_path / "run", "--epochs=3", f"--num_workers={workers}", "--shard_size=100"))
    sources = [row["source"] for row in read_rows(folder)]
    assert [set(sources[start : start + 10]) for start in (0, 10, 20)] == [TRAIN] * 3
    assert len({tuple(sources[start : start + 10]) for start in (0, 10, 20)}) > 1  # shuffled anew


def test_more_rounds_may_be_asked_for_later(argv, finished, tmp_path):
    folder = run_tokenizing(argv(tmp_path / "run", "--known_frames=2", "--shard_size=5"))
    assert read_summary(folder)["clips"] == 10
    run_tokenizing(argv(folder, "--known_frames=2", "--shard_size=5", "--epochs=2", "--resume=true"))
    assert read_rows(folder) == read_rows(finished)
    with pytest.raises(ValueError, match="clips of 2 epochs already"):
        run_tokenizing(argv(folder, "--known_frames=2", "--shard_size=5", "--epochs=1", "--resume=true"))


# --- refusals ---


def test_an_earlier_run_is_not_spoilt(argv, finished, videos, checkpoint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = make_checkpoint(tmp_path / "other", seed=1)
    same = ("--resume=true", "--epochs=2", "--known_frames=2")
    refused = {
        "use --resume true or another": ["--epochs=2"],
        "begun with seed 0, not 1": [*same, "--seed=1"],
        "begun with tokenizer_fingerprint": [*same, f"--tokenizer={other}"],
        "begun with known_frames 2, not 3": [*same, "--known_frames=3"],
        "begun with known_frames 2, not None": ["--resume=true", "--epochs=2"],
        "begun with strides": [*same, "--strides", 1],
        "begun with allocation router": [*same, "--uniform=4"],
        "begun with split train, not test": [*same, "--split=test"],
        "begun with num_workers": [*same, "--num_workers=1"],
        "begun with counted epochs, not clips": ["--resume=true", "--known_frames=2", "--clips=40"],
    }
    for message, more in refused.items():
        with pytest.raises(ValueError, match=message):
            run_tokenizing(argv(folder, *more))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_of_before_is_read_but_not_gone_on_with(argv, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = SHARDS.list(folder)[-1]
    note, table = SHARDS.read_note(path), pq.read_table(path)
    old = {"settings": note["settings"], "stream": note["place"], "clips": 20, "skipped": {}, "seconds": 1.5}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"evatok_hf": json.dumps(old)}), path)
    assert len(TokenDataset.load(folder)) == 20
    with pytest.raises(ValueError, match="of an earlier version, whose runs .* name a new folder"):
        run_tokenizing(argv(folder, "--resume=true", "--epochs=2", "--known_frames=2"))


def test_a_note_that_says_of_a_skipped_video_too_little_is_damaged(argv, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = SHARDS.list(folder)[-1]
    note, table = SHARDS.read_note(path), pq.read_table(path)
    note["skipped"] = [{"source": "a.mp4", "reason": "none", "clips": 0}]
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"evatok_hf": json.dumps(note)}), path)
    with pytest.raises(ValueError, match="the note of .*cause is missing"):
        run_tokenizing(argv(folder, "--resume=true", "--known_frames=2"))


def test_a_class_that_appears_meanwhile_is_refused(finished, videos, checkpoint, tmp_path):
    more = shutil.copytree(videos, tmp_path / "videos")
    given = options(tmp_path / "run", more, checkpoint, "--uniform=2")
    run_tokenizing(given)
    (more / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match="begun with classes"):
        run_tokenizing([*given, "--resume=true"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--clips=0"], "--clips must be at least 1"),
        (["--clips=9", "--epochs=2"], "either --epochs or --clips"),
        (["--views=all"], "--views must be one of random, fixed"),
        (["--views=fixed", "--epochs=2"], "takes every video once"),
        (["--strategy=best"], "unknown strategy 'best'"),
        (["--strategy=threshold"], "choose one of uniform, fixed, router, budget"),
        (["--strategy=budget"], "needs --budget-per-clip"),
        (["--uniform=4", "--quality=1"], "contradict each other"),
        (["--train_data", "a=0.5", "b=0.5"], "weights of sources need --clips"),
    ],
)
def test_wrong_options_end_with_code_2(argv, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        run_tokenizing(argv(tmp_path / "run", *wrong))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoint_cannot_do_is_refused(argv, videos, tmp_path):
    for known in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3 of the 4 frames"):
            run_tokenizing(argv(tmp_path / "run", f"--known_frames={known}"))
    with pytest.raises(ValueError, match="not among the candidates"):
        run_tokenizing(argv(tmp_path / "run", "--uniform=3"))
    alone = make_checkpoint(tmp_path / "alone", router=False)
    for more in ("--quality=1.2", "--strategy=router", "--budget_per_clip=8"):
        with pytest.raises(ValueError, match="needs a router and this model has none"):
            run_tokenizing(options(tmp_path / "run", videos, alone, more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("files", "message"),
    [([], "No video in"), (["a.mp4", "b.mp4"], r"No video of .* gave a clip \(2 unreadable\)")],
    ids=["empty", "corrupt"],
)
def test_videos_that_give_no_clip(checkpoint, tmp_path, monkeypatch, caplog, files, message, workers):
    (tmp_path / "videos").mkdir()
    for name in files:
        (tmp_path / "videos" / name).write_bytes(b"no video")
    given = options(tmp_path / "run", tmp_path / "videos", checkpoint, f"--num_workers={workers}")
    assert re.search(message, error_of_script(SCRIPT, given, monkeypatch, caplog))
    assert not (tmp_path / "run").exists()


# --- mixes and processes ---


def test_a_mix_of_sources_has_the_classes_of_all(videos, checkpoint, tmp_path):
    second, plain = tmp_path / "second", make_videos(tmp_path / "plain", 2, damaged=False)
    (second / "ant").mkdir(parents=True)
    shutil.copy(plain / "v0.mp4", second / "ant" / "x.mp4")
    mix = [f"{videos}=3", f"{second}=1", f"{plain}=1"]
    given = [*options(tmp_path / "run", videos, checkpoint, "--clips=16", "--strategy=uniform"), "--train_data", *mix]
    folder = run_tokenizing(given)
    rows, summary = read_rows(folder), read_summary(folder)
    assert len(rows) == 16 and summary["classes"] == ["ant", *CLASSES] and {row["origin"] for row in rows} == {0, 1, 2}
    for row in rows:
        name = None if row["origin"] == 2 else row["source"].split("/")[0]
        assert row["label"] == (-1 if name is None else summary["classes"].index(name))
    without = sum(row["origin"] == 2 for row in rows)
    assert summary["clips_without_class"] == without and sum(summary["clips_by_source"]) == 16
    assert f"Clips without a class: {without}." in (folder / "README.md").read_text()


@pytest.mark.slow
def test_two_processes(argv, tmp_path):
    def run(folder: Path, *more: str) -> Path:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(SCRIPT), *argv(folder, "--epochs=2", "--known_frames=2", *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    straight, resumed = run(tmp_path / "straight"), tmp_path / "resumed"
    tokens = TokenDataset.load(straight)
    assert len(tokens) == 20 and Counter(row.source for row in tokens) == dict.fromkeys(TRAIN, 4)
    assert {path.name[7:11] for path in SHARDS.list(straight)} == {"0000", "0001"}
    assert read_summary(straight)["skipped"] == {"unreadable": 2, "too short": 2}
    shutil.copytree(straight, resumed)
    (resumed / "tokens.json").unlink()
    SHARDS.list(resumed, 1)[-1].unlink()  # one process was behind
    run(resumed, "--resume=true")
    assert read_shards(resumed) == read_shards(straight) and read_summary(resumed) == read_summary(straight)
