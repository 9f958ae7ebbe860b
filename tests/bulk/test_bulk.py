"""evatok tokenize-dataset: its tokens are the tokenizer's, each clip comes once, whoever dies on the way."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from bulk_samples import by_hand, kill_a_worker, run_bulk, workers_of_ray
from datasets import Dataset, Features, Video, load_dataset
from huggingface_hub import DatasetCard
from token_samples import make_checkpoint, make_labelled, options, read_rows, read_shards, read_summary, run_tokenizing
from typer.testing import CliRunner
from video_samples import encode, moving_frames

import evatok_hf.bulk.cluster
import evatok_hf.bulk.engine
from evatok_hf import VideoTokenizer
from evatok_hf.bulk.driver import RayLost, RayProcess
from evatok_hf.bulk.ray_data import explain, serve
from evatok_hf.bulk.units import Task, Units
from evatok_hf.bulk.workers import Views
from evatok_hf.cli.commands import app
from evatok_hf.data.clip_cutting import ClipConfig
from evatok_hf.data.clip_sources import Example, list_videos, open_source
from evatok_hf.data.decoded import decode_videos
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.token_dataset import SHARDS, TokenDataset

# The same views as of the script.
VIEWS = ("--strides", 1, 2, "--scale", 0.5, 1)
MANY = ClipConfig(4, 32, clips_per_video=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs of this machine as a cluster; its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # workers find what this file defines
        import ray

        context = ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


def rows_in_order(folder: Path) -> list[dict]:
    return sorted(read_rows(folder), key=lambda row: (row["source"], row["frames"], row["crop"]))


def tables(folder: Path) -> list[tuple]:
    """Names and contents of the shards, without the settings that are noted in them."""
    return [(path.name, pq.read_table(path).to_pydict()) for path in SHARDS.list(folder)]


def evatok(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="evatok")


def refused(result, code: int = 1) -> str:
    assert result.exit_code == code and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert "unexpected" not in result.stderr
    return result.stderr


# --- on a cluster ---


@pytest.fixture(scope="module")
def finished(cluster, videos, checkpoint, tmp_path_factory) -> Path:
    """A run of the command with two workers."""
    folder = tmp_path_factory.mktemp("finished") / "tokens"
    words = (videos, folder, "--model", checkpoint, "--clips-per-video", 2, "--strides", "1,2", "--scale", 0.5, 1)
    words += ("--known-frames", 2, "--shard-size", 4, "--licence", "mit")
    done = evatok("tokenize-dataset", *words, "--json")
    assert done.exit_code == 0 and done.stderr == "", done.output
    report = json.loads(done.stdout)
    assert report["ray_log"] == f"{folder}.ray.log" and "Dataset" in Path(report["ray_log"]).read_text()
    assert (report["clips"], report["new_clips"], report["videos"]) == (10, 10, 5)
    assert report["skipped"] == {"unreadable": 1, "too short": 1}
    done = evatok("tokenize-dataset", *words)  # there is nothing left to do; the report is for people
    assert done.exit_code == 0 and ["clips", "10"] in [line.split() for line in done.stdout.splitlines()], done.output
    return folder


def test_the_rows_are_those_of_the_training_script(finished, videos, checkpoint, tmp_path):
    script = run_tokenizing(options(tmp_path / "script", videos, checkpoint, *VIEWS, "--known_frames=2"))
    assert rows_in_order(finished) == rows_in_order(script)
    assert pq.read_schema(SHARDS.list(finished)[0]).equals(pq.read_schema(SHARDS.list(script)[0]))
    mine, other = read_summary(finished), read_summary(script)
    counted = ("tokens", "clips", "videos", "mean_tokens_by_class", "skipped", "tokenizer_fingerprint", "allocation")
    assert {name: mine[name] for name in counted} == {name: other[name] for name in counted}
    assert other.keys() - mine.keys() == {"shuffle_buffer", "num_workers", "processes"}


def test_the_folder_is_a_data_set_of_tokens(finished, tmp_path):
    made = {"data", "tokens.json", "README.md", "tokens.png", "skipped.jsonl"}
    assert {path.name for path in finished.iterdir()} == made
    assert [path.name for path in (finished / "data").iterdir() if path.name.startswith(".")] == []
    tokens = TokenDataset.load(finished)
    assert len(tokens) == 10 and tokens.classes == ["bird", "cat", "dog"]
    assert len(load_dataset(str(finished), cache_dir=tmp_path)["train"]) == 10
    skipped = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert [(video["source"], video["cause"], video["clips"]) for video in skipped] == [
        ("dog/broken.mp4", "unreadable", 0),
        ("dog/short.mp4", "too short", 0),
    ]
    assert "no mp4" in skipped[0]["reason"] and skipped[1]["reason"] == "2 frames, 4 are needed"
    text = (finished / "README.md").read_text()
    assert DatasetCard(text).data.license == "mit" and "2 worker(s) with 1 thread(s) each on one machine" in text
    assert "1 unreadable, 1 too short. `skipped.jsonl` names them." in text


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(cluster, videos, checkpoint, tmp_path, no_picture):
    killed = []

    def kill(progress):
        if progress.clips and not killed:
            killed.append(kill_a_worker())

    run_bulk(tmp_path / "run", videos, checkpoint, kill, clips=MANY, shard_size=60)
    assert len(killed) == 1 and killed[0] not in {process.pid for process in workers_of_ray()}
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 300 and len({(row["source"], *row["frames"], *row["crop"]) for row in rows}) > 30
    by_hand(tmp_path / "straight", videos, checkpoint, clips=MANY, shard_size=60)
    assert tables(tmp_path / "run") == tables(tmp_path / "straight")


def ray_processes() -> list[psutil.Process]:
    """The processes below this one that drive Ray for a command."""
    return [child for child in psutil.Process().children() if "evatok_hf.bulk.ray_data" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_command_goes_on_when_ray_dies(cluster, finished, videos, checkpoint, tmp_path, no_picture):
    # The process that Ray takes with it when its server is gone.
    killed, words = [], []

    def kill(progress):
        if progress.clips and not killed:
            (process,) = ray_processes()
            process.kill()
            killed.append(process)

    run_bulk(tmp_path / "run", videos, checkpoint, kill, words, workers=1)
    assert len(killed) == 1
    assert words == ["Ray was lost (its process ended) and is started again; what is done is kept."]
    assert tables(tmp_path / "run") == tables(finished) and ray_processes() == []


def test_a_command_that_is_stopped_says_how_to_go_on(videos, checkpoint, tmp_path, monkeypatch, no_picture):
    write = ShardFolder._write

    def write_and_stop(*args):
        write(*args)
        raise SystemExit(143)  # as a signal does

    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["tokenize-dataset", videos, tmp_path / "run", "--model", checkpoint, "--clips-per-video", 2]
    command += ["--strides", "1,2", "--scale", 0.5, 1, "--known-frames", 2, "--shard-size", 4, "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "_write", write_and_stop)
        done = evatok(*command)
    assert (done.exit_code, done.stdout) == (143, "")
    assert done.stderr == "What is done is kept; repeat the command to go on.\n"
    assert len(SHARDS.list(tmp_path / "run")) == 1
    assert evatok(*command).exit_code == 0
    by_hand(tmp_path / "hand", videos, checkpoint)
    assert tables(tmp_path / "run") == tables(tmp_path / "hand")


def test_ray_that_dies_again_and_again_ends_the_run(videos, checkpoint, tmp_path, monkeypatch):
    class Lost(RayProcess):
        def __init__(self, wanted, log):
            pass

        def pool(self):
            raise RayLost("NodeDiedError: no reason given")

        def __exit__(self, *error):
            pass

    words = []
    monkeypatch.setattr("evatok_hf.bulk.engine.RayProcess", Lost)
    with pytest.raises(ValueError, match="Ray was lost 4 times without anything done .* repeat the command to go on"):
        run_bulk(tmp_path / "run", videos, checkpoint, words=words, workers=1)
    assert len(words) == 3


def test_what_ray_says_of_a_failure_is_told_apart():
    from ray import exceptions

    def of_a_task(cause: Exception) -> Exception:
        return exceptions.RayTaskError("decode", "the traceback", cause)

    user = exceptions.UserCodeException("in user code")
    user.__cause__ = OSError(28, "No space left on device")
    lost = [
        exceptions.NodeDiedError("gone"),
        exceptions.LocalRayletDiedError(),
        of_a_task(exceptions.NodeDiedError("")),
    ]
    failed = [of_a_task(user), of_a_task(RuntimeError("out of memory")), ValueError("a worker's")]
    assert [explain(error)[0] for error in lost] == ["lost"] * 3
    assert [explain(error)[0] for error in failed[:2]] == ["refused"] * 2
    assert (
        "a worker failed (OSError: [Errno 28] No space left on device); what is done is kept"
        in explain(of_a_task(user))[1]
    )


# The command, in a process that is killed, or told to end, when its first shard is there.
DIES = """
import os, signal, sys
from evatok_hf.cli import main
from evatok_hf.data.shard_folder import ShardFolder

write, number = ShardFolder._write, int(sys.argv.pop(1))

def write_and_die(*args):
    write(*args)
    os.kill(os.getpid(), number)

ShardFolder._write = write_and_die
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_killed_goes_on_where_it_was(
    cluster, finished, videos, checkpoint, tmp_path, no_picture, number
):
    folder = tmp_path / "run"
    words = ["tokenize-dataset", videos, folder, "--model", checkpoint, "--strides", "1,2", "--scale", 0.5, 1]
    words += ["--clips-per-video", 2, "--known-frames", 2, "--shard-size", 4, "--address", cluster, "--workers", 1]
    command = [sys.executable, "-c", DIES, str(int(number)), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if number == signal.SIGKILL:
        assert done.returncode == -number, done.stderr[-2000:]
    else:
        assert done.returncode == 128 + number and "What is done is kept; repeat" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 2
    first = {path: path.stat().st_ino for path in SHARDS.list(folder)}
    assert len(first) == 1 and not (folder / "tokens.json").exists()
    with pytest.raises(ValueError, match="not finished; .* or repeat `evatok tokenize-dataset`"):
        TokenDataset.load(folder)
    done = evatok(*words, "--json")
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_ino for path in first} == first  # they were not made again
    assert read_shards(folder) == read_shards(finished)
    assert (folder / "skipped.jsonl").read_text() == (finished / "skipped.jsonl").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()} - {"tokens.png"}


@pytest.mark.slow
def test_clips_travel_where_workers_do_not_decode(
    cluster, finished, videos, checkpoint, tmp_path, monkeypatch, no_picture
):
    class Here(RayProcess):
        """Its process is a thread of this one."""

        def __init__(self, wanted, log):
            self._link, theirs = Pipe()
            threading.Thread(target=serve, args=[theirs], daemon=True).start()
            self._send(wanted)

        def __exit__(self, *error):
            self._link.close()

    # As with a GPU: tasks that ask for other resources than the actors are steps of their own.
    monkeypatch.setattr(evatok_hf.bulk.cluster.Pool, "decode_cpus", 0.5)
    monkeypatch.setattr("evatok_hf.bulk.engine.RayProcess", Here)
    summary = run_bulk(tmp_path / "run", videos, checkpoint, workers=1, batch_size=1)
    assert tables(tmp_path / "run") == tables(finished) and summary["clips"] == 10


class DeadlyViews(Views):
    """Over one of the videos the decoder takes its process down."""

    def cut(self, example: Example):
        if example.key == "cat/v1.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return Views.cut(self, example)


@pytest.mark.slow
def test_a_video_over_which_workers_die_is_left_out(
    cluster, finished, videos, checkpoint, tmp_path, monkeypatch, no_picture
):
    words = []
    monkeypatch.setattr("evatok_hf.bulk.workers.Views", DeadlyViews)
    run_bulk(tmp_path / "run", videos, checkpoint, words=words, workers=1)
    assert words == ["Going on without cat/v1.mp4, over which workers die."]
    rows = [row for row in rows_in_order(finished) if row["source"] != "cat/v1.mp4"]
    assert rows_in_order(tmp_path / "run") == rows
    first = json.loads((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()[0])
    assert first["source"] == "cat/v1.mp4" and first["reason"].startswith("the worker process died 3 times")


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("evatok_hf.hub.tokens_card._draw", lambda *args: None)


# --- the work without the cluster ---


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (3, 4), (50, 32)])
def test_shards_do_not_depend_on_who_did_what_when(videos, checkpoint, tmp_path, workers, batch_size):
    given = {"workers": workers, "batch_size": batch_size, "shuffle": workers}
    by_hand(tmp_path / "plain", videos, checkpoint)
    by_hand(tmp_path / "other", videos, checkpoint, **given)
    found = [[(path.name, path.read_bytes()) for path in SHARDS.list(tmp_path / name)] for name in ("plain", "other")]
    assert found[0] == found[1] and len(found[0]) == 4


def test_whole_videos_of_a_decoded_source(videos, checkpoint, tmp_path):
    decode_videos(*list_videos(videos, "train"), tmp_path / "decoded", short_side=1000, processes=1)
    options = {"whole_video": True, "known_frames": None, "clips": ClipConfig()}
    by_hand(tmp_path / "files", videos, checkpoint, **options)
    by_hand(tmp_path / "run", tmp_path / "decoded", checkpoint, **options)
    rows, decoded = rows_in_order(tmp_path / "files"), rows_in_order(tmp_path / "run")
    assert [row["ids"] for row in decoded] == [row["ids"] for row in rows]
    assert [row["frames"] for row in decoded] == [row["frames"] for row in rows]


def test_whole_videos_are_what_the_tokenizer_encodes(videos, checkpoint, tmp_path):
    options = {"whole_video": True, "known_frames": None, "clips": ClipConfig(strides=(2,)), "shuffle": 3}
    shards = by_hand(tmp_path / "run", videos, checkpoint, **options)
    tokenizer, rows = VideoTokenizer.from_pretrained(checkpoint), read_rows(tmp_path / "run")
    assert shards.clips == len(rows) and [video["source"] for video in shards.skipped] == ["dog/broken.mp4"]
    for source in {row["source"] for row in rows}:
        expected = tokenizer.encode(videos / "train" / source, stride=2)
        mine = [row for row in rows if row["source"] == source]  # in order
        assert [row["lengths"] for row in mine] == expected.lengths.tolist()
        assert [number for row in mine for number in row["ids"]] == expected.ids.tolist()
    long = [row for row in rows if row["source"] == "cat/v0.mp4"]
    assert [row["frames"] for row in long] == [[0, 2, 4, 6], [8, 8, 8, 8]]
    assert {tuple(row["crop"]) for row in long} == {(0, 4, 32, 0)} and {row["fps"] for row in long} == {25}


def test_more_clips_than_a_shard_holds_are_several(videos, checkpoint, tmp_path):
    shards = by_hand(tmp_path / "run", videos, checkpoint, clips=ClipConfig(4, 32, clips_per_video=8), shard_size=3)
    counts = [(path.name[7:18], pq.read_metadata(path).num_rows) for path in SHARDS.list(tmp_path / "run")]
    assert counts[:3] == [("0000-000000", 3), ("0000-000001", 3), ("0000-000002", 2)]
    assert sum(count for _, count in counts) == shards.clips == 40
    # A unit that lacks any of its shards is not done.
    SHARDS.path(tmp_path / "run", 0, 1).unlink()
    SHARDS.path(tmp_path / "run", 1, 2).unlink()
    again = ShardFolder(SHARDS, tmp_path / "run", shards.settings)
    assert again.done == shards.done - {0, 1} and again.clips == 24


def make_tars(videos: Path, folder: Path) -> Path:
    """Two tars of the videos of the folder, the second cut in its last member, and one with a damaged video only."""
    folder.mkdir()
    files = sorted((videos / "train").rglob("v*.mp4"))
    for name, members in (("a", files[:3]), ("b", files[3:]), ("c", [videos / "train" / "dog" / "broken.mp4"])):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for path in members:
                data = path.read_bytes()
                member = tarfile.TarInfo(path.name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path = folder / "b.tar"
    path.write_bytes(path.read_bytes()[: 1024 + files[3].stat().st_size + 700])
    return folder


def test_tars_are_units(videos, checkpoint, tmp_path):
    tars = make_tars(videos, tmp_path / "tars")
    shards = by_hand(tmp_path / "run", tars, checkpoint, shuffle=1, shard_size=100)
    by_hand(tmp_path / "folder", videos, checkpoint)
    rows = read_rows(tmp_path / "run")
    assert [path.name[7:11] for path in SHARDS.list(tmp_path / "run")] == ["0000", "0001", "0002"]
    assert [row["source"] for row in rows] == ["v0"] * 2 + ["v1"] * 2 + ["v2"] * 2 + ["v3"] * 2
    assert {len(row["ids"]) for row in rows} and shards.done == {0, 1, 2}
    found = [(video["source"], video["cause"]) for video in shards.skipped]
    assert found == [("b.tar", "unreadable"), ("broken", "unreadable")]
    assert "cannot read an archive" in shards.skipped[0]["reason"]


def test_odd_names_words_and_damage_are_as_in_the_script(videos, checkpoint, tmp_path):
    folder = tmp_path / os.fsdecode(b"[caf\xe9]")
    folder.mkdir()
    files = sorted((videos / "train").rglob("v*.mp4"))
    for name, words in (("a", ["dog", None, "ant"]), ("b", ["bee", "dog"])):
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for number, word in enumerate(words):
                tar.add(files.pop(0), f"{name}{number} caf\udce9.mp4")
                if word:
                    member = tarfile.TarInfo(f"{name}{number} caf\udce9.cls")
                    member.size = len(word)
                    tar.addfile(member, io.BytesIO(word.encode()))
    (folder / "c.tar").write_bytes((folder / "a.tar").read_bytes()[:700])
    shards = by_hand(tmp_path / "run", folder, checkpoint)
    shards.write_skipped()
    script = run_tokenizing(options(tmp_path / "script", folder, checkpoint, *VIEWS, "--known_frames=2"))
    rows = rows_in_order(tmp_path / "run")
    assert rows == rows_in_order(script)
    labels = {"a0 caf\\xe9": 2, "a1 caf\\xe9": -1, "a2 caf\\xe9": 0, "b0 caf\\xe9": 1, "b1 caf\\xe9": 2}
    assert {row["source"]: row["label"] for row in rows} == labels
    assert shards.settings["classes"] == read_summary(script)["classes"] == ["ant", "bee", "dog"]
    assert read_summary(script)["skipped"] == {"unreadable": 1}
    (skipped,) = (json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert skipped["source"] == "c.tar" and "cut short within a0 caf\\xe9.mp4" in skipped["reason"]


def test_parquet_with_videos_as_the_hub_has_it(videos, checkpoint, tmp_path):
    files = sorted((videos / "train").rglob("v*.mp4"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number in (0, 1):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in files[number::2]]
        part = Dataset.from_dict({"video": cells}, features=Features({"video": Video(decode=False)}))
        part.to_parquet(tmp_path / "hub" / "data" / f"train-{number:05d}-of-00002.parquet")
    shards = by_hand(tmp_path / "run", tmp_path / "hub", checkpoint, shard_size=100)
    assert shards.done == {0, 1} and shards.clips == 10
    assert {row["source"] for row in read_rows(tmp_path / "run")} == {path.name for path in files}


def test_a_clip_whose_video_breaks_off_is_kept_and_said(checkpoint, tmp_path):
    (tmp_path / "videos").mkdir()
    path = encode(tmp_path / "videos" / "long.avi", moving_frames(40, 32, 40), "mpeg4", options={"g": "1"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    options = {"whole_video": True, "known_frames": None, "clips": ClipConfig()}
    shards = by_hand(tmp_path / "run", tmp_path / "videos", checkpoint, **options)
    (skipped,) = shards.skipped
    assert skipped["cause"] == "unreadable" and skipped["clips"] == shards.clips > 0


# --- refusals ---


def test_what_cannot_be_done_is_one_line(videos, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not tokens")
    (tmp_path / "file").write_text("")

    def told(source, output, *more, code=1):
        return refused(evatok("tokenize-dataset", source, tmp_path / output, "--model", checkpoint, *more), code)

    assert "No video in" in told(tmp_path / "empty", "run")
    assert "There is no folder" in told(tmp_path / "missing", "run")
    assert "there is no folder" in told(videos, "run", "--model", tmp_path / "nothing")
    assert "holds notes.txt and no tokens; name a new or empty folder" in told(videos, "other")
    assert "is a file; name a new folder" in told(videos, "file")
    assert "caf\\xe9 is no UTF-8" in told(videos, os.fsdecode(b"caf\xe9"))
    assert "not among the candidates" in told(videos, "run", "--uniform", 3)
    assert "from 1 to 3 of the 4 frames" in told(videos, "run", "--known-frames", 4)
    assert "unknown strategy 'threshold'" in told(videos, "run", "--strategy", "threshold", code=2)
    assert "neither random nor fixed" in told(videos, "run", "--views", "all", code=2)
    assert "no list of whole numbers" in told(videos, "run", "--strides", "1;2", code=2)
    assert "contradict each other" in told(videos, "run", "--uniform", 4, "--quality", 1, code=2)
    assert "budget needs --budget-per-clip" in told(videos, "run", "--strategy", "budget", code=2)
    assert not (tmp_path / "run").exists()


def test_a_few_clips_do_not_take_ray(videos, checkpoint, tmp_path, monkeypatch, no_picture):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["--model", checkpoint, "--clips-per-video", 2, "--strides", "1,2", "--scale", 0.5, 1, "--shard-size", 4]
    words += ["--known-frames", 2, "--quiet"]
    assert 'pip install "evatok_hf[bulk]"' in refused(
        evatok("tokenize-dataset", videos, tmp_path / "run", *words, "--workers", 2)
    )
    assert not (tmp_path / "run").exists()
    before = torch.get_num_threads()
    done = evatok("tokenize-dataset", videos, tmp_path / "run", *words, "--threads", 2)
    assert done.exit_code == 0 and done.stderr == "" and torch.get_num_threads() == before, done.output
    by_hand(tmp_path / "hand", videos, checkpoint)
    assert tables(tmp_path / "run") == tables(tmp_path / "hand") and len(TokenDataset.load(tmp_path / "run")) == 10
    assert "one process with 2 thread(s)" in (tmp_path / "run" / "README.md").read_text()
    # Of many it says that they would take less time with it.
    monkeypatch.setattr("evatok_hf.bulk.engine.FEW_CLIPS", 1)
    done = evatok("tokenize-dataset", videos, tmp_path / "many", *words)
    assert done.exit_code == 0 and done.stderr.startswith("Ray is not installed, so one process does it all"), (
        done.output
    )
    assert tables(tmp_path / "many") == tables(tmp_path / "hand")
    assert not list(tmp_path.glob("*.log"))


def test_other_options_than_it_was_begun_with(videos, checkpoint, tmp_path):
    folder = tmp_path / "run"
    by_hand(folder, videos, checkpoint)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [videos, folder, "--model", checkpoint, "--clips-per-video", 2, "--strides", "1,2", "--scale", 0.5, 1]
    words += ["--known-frames", 2, "--shard-size", 4]
    other = make_checkpoint(tmp_path / "other", seed=1)
    for more, message in (
        (("--seed", 1), "begun with seed 0, not 1"),
        (("--known-frames", 3), "begun with known_frames 2, not 3"),
        (("--uniform", 4), "begun with allocation router (quality 1.2), not uniform (4 tokens)"),
        (("--views", "fixed"), "begun with views random, not fixed"),
        (("--model", other), "begun with tokenizer_fingerprint"),
        (("--no-resume",), "leave out --no-resume"),
    ):
        assert message in refused(evatok("tokenize-dataset", *words, *more))
    fewer = shutil.copytree(videos, tmp_path / "fewer")
    (fewer / "train" / "cat" / "v2.mp4").unlink()
    fewer.rename(tmp_path / "swap")
    assert "begun with" in refused(evatok("tokenize-dataset", tmp_path / "swap", *words[1:]))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_tokens_of_the_training_script_are_left_alone(videos, checkpoint, tmp_path):
    folder = run_tokenizing(options(tmp_path / "run", videos, checkpoint))
    given = ("tokenize-dataset", videos, folder, "--model", checkpoint)
    assert "training/tokenize_dataset.py made; choose another folder" in refused(evatok(*given))


def test_devices_and_workers_that_ray_does_not_have(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    pool = evatok_hf.bulk.cluster.choose_pool
    Options = evatok_hf.bulk.engine.BulkOptions
    assert (pool(Options()).workers, pool(Options(threads=2)).workers, pool(Options()).device) == (4, 2, "cpu")
    for asked, message in (
        (Options(device="cuda"), "Ray finds no GPU"),
        (Options(device="cuda:1"), "Ray gives each worker a GPU of its own"),
        (Options(device="tpu"), "unknown device"),
        (Options(workers=5), "more than the 4 CPU"),
        (Options(threads=5), "more than the 4 CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(asked)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0})
    found = pool(Options())
    assert (found.workers, found.device, found.resources) == (2, "cuda", {"num_gpus": 1}) and "2 x A100" in str(found)


def test_a_full_disk_is_no_videos_fault(videos, checkpoint, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evatok_hf.bulk.workers.ClipCutter", full)
    with pytest.raises(OSError, match="No space left"):
        by_hand(tmp_path / "run", videos, checkpoint)


def test_a_folder_that_a_worker_does_not_see_is_no_videos_fault(videos, checkpoint, tmp_path, monkeypatch):
    nothing = SimpleNamespace(path=SimpleNamespace(exists=lambda path: False))
    monkeypatch.setattr("evatok_hf.bulk.workers.os", nothing)
    with pytest.raises(FileNotFoundError, match="all machines must see the videos under the same path"):
        by_hand(tmp_path / "run", videos, checkpoint)


def test_tasks_are_small_where_there_are_many_workers(videos, checkpoint):
    units = Units(open_source(videos, "train"), 1000, 2)
    assert units.count == 1 and len(units.tasks(set(), 1)) == 7
    (first, *_) = units.tasks(set(), 8)
    assert isinstance(first, Task) and [example.key for example in first.examples] == ["cat/v0.mp4"]
    assert units.tasks({0}, 1) == []
