"""training/curate.py: a whole curation with a very small proxy, what it leaves, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from curated_samples import (
    CLIP,
    METRIC,
    SPACE,
    TRAINING,
    curate,
    make_proxy,
    make_videos,
    options,
    read_shards,
    read_summary,
    run_curation,
)
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from script_samples import error_of_script

from evatok_hf import EvatokModel
from evatok_hf.allocation.search import brute_force
from evatok_hf.data.curated import CuratedClips, list_shards
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics import load_perceptual

SCRIPT = TRAINING / "curate.py"
CLIPS = 8  # of 6 videos, so that the second epoch meets the damaged files again


class Killed(BaseException):
    """What no handler of the script catches."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Path:
    return make_proxy(tmp_path_factory.mktemp("proxy") / "tokenizer")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos") / "all")


@pytest.fixture(scope="module")
def argv(proxy, videos):
    """Options of the curations below, for a folder."""
    return lambda folder, *more: options(folder, videos, proxy, f"--clips={CLIPS}", *more)


@pytest.fixture(scope="module")
def finished(argv, tmp_path_factory) -> Path:
    """A curation without interruption, with strides, crops and freezing."""
    return run_curation(argv(tmp_path_factory.mktemp("finished") / "curated"))


def test_shards_are_read_by_datasets(finished, tmp_path):
    assert {path.name for path in finished.iterdir()} == {"data", "curation.json", "README.md", "distributions.png"}
    names = [f"curated-0000-{number:06d}.parquet" for number in range(4)]
    assert sorted(path.name for path in (finished / "data").iterdir()) == names
    rows = load_dataset("parquet", data_files=str(finished / "data" / "*.parquet"), cache_dir=tmp_path)["train"]
    assert len(rows) == CLIPS == len(set(rows["clip_id"]))
    assert set(rows["source"]) == {f"v{index}.mp4" for index in range(6)} and set(rows["origin"]) == {0}
    row = rows[0]
    assert np.shape(row["table"]) == (9, 3) and np.shape(row["nodes"]) == (12, 2)
    assert np.diff(row["frames"]).tolist() == [1, 1, 1] and row["fps"] == 25 and row["label"] == -1
    # The card's own configuration leads there too.
    assert len(load_dataset(str(finished), cache_dir=tmp_path)["train"]) == CLIPS


def test_figures_are_those_of_the_clips_cut_again(finished, videos, proxy):
    curated = CuratedClips.load(finished)
    clips = torch.from_numpy(curated.cut([videos]))
    assert clips.shape == (CLIPS, 4, 3, 32, 32) and len({clip.numpy().tobytes() for clip in clips}) == CLIPS
    model = EvatokModel.from_pretrained(proxy).eval()
    expected = brute_force(model, to_float(clips), load_perceptual(METRIC))
    table = curated.figures().table()
    assert expected.isfinite().all() and torch.allclose(table, expected, atol=1e-4, rtol=1e-4)
    assert table[..., 0].std(1).max() > 1e-3  # assignments do differ
    assert torch.equal(curated.distances(), table[..., 0])
    column = torch.tensor(curated.rows["table"][:])
    assert torch.allclose(column, expected, atol=2e-3, rtol=2e-3)  # half precision
    low, high = expected[..., 0].double().quantile(torch.tensor([0.01, 0.99]).double()).tolist()
    assert (curated.bounds.low, curated.bounds.high) == pytest.approx((low, high), abs=1e-4)


def test_the_card(finished, videos, proxy):
    summary, text = json.loads((finished / "curation.json").read_text()), (finished / "README.md").read_text()
    fingerprint = EvatokModel.from_pretrained(proxy).fingerprint()
    assert (summary["clips"], summary["videos"], summary["by_source"], summary["seed"]) == (CLIPS, 6, [CLIPS], 0)
    assert summary["proxy_fingerprint"] == fingerprint and summary["perceptual"] == METRIC
    assert {name: summary[name] for name in SPACE} == SPACE and summary["clip"] == CLIP
    assert set(summary["skipped"]) == {"unreadable", "too short"} and summary["sources"] == [str(videos)]

    front = DatasetCard(text).data.to_dict()
    assert front["license"] == "other" and front["size_categories"] == ["n<1K"]
    bounds = summary["bounds"]
    for fact in (fingerprint, METRIC, f"{bounds['low']:.5f}", f"{bounds['high']:.5f}", str(videos), "`nodes`"):
        assert fact in text
    skips = ", ".join(f"{count} {cause}" for cause, count in summary["skipped"].items())
    assert f"Videos skipped each time they came up: {skips}." in text
    assert "every one of 9 assignments" in text and f"| `{videos}` | 1.0 | {CLIPS} |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 0.8", "| 1.6"))]
    tokens = [float(row.split("|")[2]) for row in rows]
    assert len(tokens) == 2 and 4 <= tokens[0] <= tokens[1] <= 16
    picture = np.asarray(Image.open(finished / "distributions.png").convert("L"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.min() < 100


def test_what_is_said_of_the_data_reaches_the_card(argv, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run_curation(argv(tmp_path / "run", "--resume=true", "--licence=cc-by-4.0", "--sources_note=Made by a test."))
    text = (tmp_path / "run" / "README.md").read_text()
    assert DatasetCard(text).data.license == "cc-by-4.0" and "Made by a test." in text
    assert read_shards(tmp_path / "run") == read_shards(finished)


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


def kill_while_searching(patch, count: int) -> None:
    search, calls = curate.search_assignments, []

    def until(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise Killed
        return search(*args, **kwargs)

    patch.setattr(curate, "search_assignments", until)


def kill_at_the_end(patch, count: int) -> None:
    from training.cards import curation_card

    def never(*args, **kwargs):
        raise Killed

    patch.setattr(curation_card, "write_text", never)


@pytest.mark.parametrize(
    ("kill", "count", "left", "more"),
    [
        (kill_while_writing, 0, 0, ()),
        (kill_while_writing, 2, 2, ()),
        (kill_while_searching, 3, 1, ("--num_workers=1", "--nodes_per_batch=1")),
        (kill_while_searching, 2, 2, ("--clips_per_video=3", "--branches=2", "--freeze_probability=0.5")),
        (kill_at_the_end, 0, 4, ()),
    ],
)
def test_a_killed_curation_goes_on_with_the_same_shards(argv, finished, tmp_path, kill, count, left, more):
    straight = run_curation(argv(tmp_path / "straight", *more)) if more else finished
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, count)
        with pytest.raises(Killed):
            run_curation(argv(tmp_path / "run", *more))
    assert len(list_shards(tmp_path / "run")) == left
    with pytest.raises(ValueError, match="no finished curation.*--resume true"):
        CuratedClips.load(tmp_path / "run")
    run_curation(argv(tmp_path / "run", "--resume=true", *more))
    assert read_shards(tmp_path / "run") == read_shards(straight)
    assert read_summary(tmp_path / "run") == read_summary(straight)
    assert [path.name for path in (tmp_path / "run").rglob("*.partial*")] == []


def test_a_process_that_is_killed_leaves_whole_shards(argv, finished, tmp_path):
    # Many clips, so that the end is far when the first shard appears.
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv(tmp_path / "run", "--clips=100000")], stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 240
        while not list_shards(tmp_path / "run") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    shards = list_shards(tmp_path / "run")
    assert shards and not (tmp_path / "run" / "curation.json").exists()
    for shard in shards[4:]:  # what a shorter run does not reach
        shard.unlink()
    run_curation(argv(tmp_path / "run", "--resume=true"))
    assert read_shards(tmp_path / "run") == read_shards(finished)
    assert read_summary(tmp_path / "run") == read_summary(finished)


def test_counts_of_skipped_videos_do_not_depend_on_loaders_that_read_ahead(argv, finished, tmp_path):
    ahead = run_curation(argv(tmp_path / "run", "--num_workers=1"))
    assert read_summary(ahead)["skipped"] == read_summary(finished)["skipped"]
    assert [table for _, _, table in read_shards(ahead)] == [table for _, _, table in read_shards(finished)]


def test_more_clips_may_be_asked_for_later(argv, finished, tmp_path):
    folder = tmp_path / "run"
    run_curation(argv(folder, "--clips=4"))
    shards = read_shards(folder)
    assert len(CuratedClips.load(folder)) == 4 and len(shards) == 2
    with pytest.MonkeyPatch.context() as patch:
        kill_while_searching(patch, 1)
        with pytest.raises(Killed):
            run_curation(argv(folder, "--resume=true"))
    with pytest.raises(ValueError, match="should hold 4 clips and holds 6.*--resume true"):
        CuratedClips.load(folder)
    run_curation(argv(folder, "--resume=true"))
    assert read_shards(folder) == read_shards(finished) and read_shards(folder)[:2] == shards
    assert read_summary(folder) == read_summary(finished)


def test_an_earlier_curation_is_not_spoilt(argv, finished, proxy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = make_proxy(tmp_path / "other", seed=1)
    refused = {
        "use --resume true or another": [],
        "begun with seed 0, not 1": ["--resume=true", "--seed=1"],
        "begun with proxy_fingerprint": ["--resume=true", f"--tokenizer={other}"],
        "begun with strides": ["--resume=true", "--strides", 1, 2],
        "begun with nodes_per_batch 8, not 1": ["--resume=true", "--nodes_per_batch=1"],
        "begun with branches 0, not 2": ["--resume=true", "--branches=2"],
        "begun with shard_size": ["--resume=true", "--shard_size=4"],
        "begun with num_workers": ["--resume=true", "--num_workers=1"],
        "more than 6 clips already": ["--resume=true", "--clips=6"],
    }
    for message, more in refused.items():
        with pytest.raises(ValueError, match=message):
            run_curation(argv(folder, *more))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_shards_that_are_missing_are_made_again_and_damaged_ones_named(argv, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shards = list_shards(folder)
    shards[1].unlink()
    run_curation(argv(folder, "--resume=true"))  # makes it again, and those after it
    assert read_shards(folder) == read_shards(finished)
    shards[-1].write_bytes(shards[-1].read_bytes()[:100])
    with pytest.raises(ValueError, match="is no shard of curated clips.*move it away"):
        run_curation(argv(folder, "--resume=true"))
    shards[-1].unlink()
    run_curation(argv(folder, "--resume=true"))
    assert read_shards(folder) == read_shards(finished)


def test_parts_of_the_tree(argv, proxy, videos, tmp_path):
    folder = run_curation(argv(tmp_path / "run", "--branches=2", "--mixed_precision=bf16"))
    measured = CuratedClips.load(folder).distances().isfinite()
    assert measured.sum(1).tolist() == [4] * CLIPS  # two lengths after two lengths
    assert len(measured.unique(dim=0)) > 1
    text = (folder / "README.md").read_text()
    assert "under 4, drawn at random, of the 9 assignments" in text and "computed in bfloat16" in text
    assert "nan" not in text.lower().replace("is nan.", "")


def test_a_mix_of_sources(argv, videos, proxy, tmp_path):
    second = make_videos(tmp_path / "second", 2, damaged=False)
    argv = options(tmp_path / "run", f"{videos}=1", proxy, "--shard_size=8", "--clips=12")
    argv += ["--train_data", f"{videos}=1", f"{second}=1", "--clips_per_video=2", "--strides", 1, 2, "--scale", 0.5, 1]
    curated = CuratedClips.load(run_curation([str(word) for word in argv]))
    counts = curated.summary["by_source"]
    assert sum(counts) == 12 and min(counts) > 0
    assert {tuple(np.diff(frames)) for frames in curated.rows["frames"]} == {(1, 1, 1), (2, 2, 2)}
    clips = curated.cut([videos, second])
    model, metric = EvatokModel.from_pretrained(proxy).eval(), load_perceptual(METRIC)
    for row in (0, 11):
        expected = brute_force(model, to_float(torch.from_numpy(clips[row : row + 1])), metric)
        assert torch.allclose(curated.figures().table()[row], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("files", "message"),
    [([], "No video in"), (["a.mp4", "b.mp4"], r"No video of .* gave a clip \(2 unreadable\)")],
    ids=["empty", "corrupt"],
)
def test_videos_that_give_no_clip(proxy, tmp_path, monkeypatch, caplog, files, message, workers):
    (tmp_path / "videos").mkdir()
    for name in files:
        (tmp_path / "videos" / name).write_bytes(b"no video")
    given = options(tmp_path / "run", tmp_path / "videos", proxy, f"--num_workers={workers}")
    assert re.search(message, error_of_script(SCRIPT, given, monkeypatch, caplog))
    assert not (tmp_path / "run").exists()


def test_clips_that_do_not_differ(proxy, tmp_path, argv):
    with pytest.raises(ValueError, match="bounds need clips that differ"):
        # One clip, one assignment.
        run_curation(argv(tmp_path / "run", "--clips=1", "--branches=1"))
    with pytest.raises(ValueError, match="no finished curation"):
        CuratedClips.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--clips=0", "--clips must be at least 1"),
        ("--perceptual=ssim", "--perceptual must be one of"),
        ("--mixed_precision=fp16", "auto, no or bf16"),
        ("--lower=99", "0 <= lower < upper"),
    ],
)
def test_wrong_options_end_with_code_2(argv, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        run_curation(argv(tmp_path / "run", wrong))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_without_a_clip(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    summary = read_summary(finished)
    facts = ("machine", "licence", "sources_note", "clip", "block_lengths", "num_blocks", "percentiles", "clips")
    facts += ("datasets", "versions")
    given = {"command": "", **{name: summary[name] for name in facts}}
    settings = {**read_shards(finished)[-1][1]["settings"], "processes": 9}
    curate.finish(tmp_path / "run", settings, given, summary["skipped"], 0)
    assert len(CuratedClips.load(tmp_path / "run")) == CLIPS


@pytest.mark.slow
def test_two_processes(argv, tmp_path):
    def run(folder: Path, *more: str) -> Path:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(SCRIPT), *argv(folder, "--clips=7", *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    straight, resumed = run(tmp_path / "straight"), tmp_path / "resumed"
    assert [path.name[8:19] for path in list_shards(straight)] == [
        *("0000-000000", "0000-000001"),
        *("0001-000000", "0001-000001"),
    ]
    curated = CuratedClips.load(straight)
    sources = curated.rows["source"][:]
    assert len(sources) == 7 and len(set(sources)) == 6  # in the first epoch each process has its own videos
    shutil.copytree(straight, resumed)
    (resumed / "curation.json").unlink()
    list_shards(resumed, 1)[-1].unlink()  # one process was behind
    run(resumed, "--resume=true")
    assert read_shards(resumed) == read_shards(straight) and read_summary(resumed) == read_summary(straight)
