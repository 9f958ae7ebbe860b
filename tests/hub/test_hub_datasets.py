"""Makers of data sets push to a Hub, and `datasets` reads what lies there as its card says."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from check_cards import check_card
from curated_samples import SPACE, TRAINING, make_proxy, make_videos
from curated_samples import options as curation_options
from datasets import ClassLabel, Video, load_dataset
from generator_samples import write_tokens
from hub_server import HubServer
from markdown_pages import blocks
from script_runner import ScriptRunner, wait_for
from token_samples import make_checkpoint, make_labelled
from token_samples import options as token_options

from evatok_hf import AssignmentSpace
from evatok_hf.data import curated
from evatok_hf.hub.dataset import collect_dataset

# Rows of a data set as they are streamed, and their types.
STREAM = """
import json
from datasets import load_dataset
rows = {}
for split in argv[1:]:
    stream = load_dataset(argv[0], split=split, streaming=True)
    features = stream.features
    stream = stream.decode(False)
    rows[split] = [sorted(row) for row in stream]
print(json.dumps({"rows": {split: len(own) for split, own in rows.items()}, "features": features.to_dict()}))
"""


# The labels of a data set of videos as training streams them, and how many frames each has.
TRAIN = """
from evatok_hf.data.clip_cutting import ClipConfig, ClipCutter
from evatok_hf.data.clip_sources import open_source
config = ClipConfig(num_frames=8, image_size=32)
found = []
for example in open_source(argv[0], "train").examples(None, 0, 0, 0, 1):
    with ClipCutter(example, config, training=False) as video:
        found.append((example.label, tuple(video.cut(0, [])["pixel_values_videos"].shape)))
print(sorted(found))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def mended(hub):
    """A test that fails leaves no trouble to the next one."""
    yield
    hub.mend()


@pytest.fixture(scope="module")
def scripts(hub, tmp_path_factory):
    with ScriptRunner(hub, tmp_path_factory.mktemp("scripts")) as runner:
        yield runner


def push(name: str, *more: str) -> list[str]:
    return ["--push_to_hub=true", f"--hub_dataset_id=someone/{name}", *more]


def read(folder: Path, cache: Path, scripts: ScriptRunner, name: str) -> dict:
    """A folder as its card says, which streaming from the Hub must give again -> its splits."""
    assert check_card((folder / "README.md").read_text(), "dataset", folder) == []
    local = load_dataset(str(folder), cache_dir=str(cache))
    code, log = scripts.run(STREAM, [f"someone/{name}", *local])
    assert code == 0, log
    streamed = json.loads(log.splitlines()[-1])
    features = next(iter(local.values())).features
    assert streamed == {
        "rows": {split: len(rows) for split, rows in local.items()},
        "features": json.loads(json.dumps(features.to_dict())),
    }
    run_the_card(folder, cache)
    return dict(local)


def run_the_card(folder: Path, cache: Path) -> None:
    """The code of the card, which is that of its template (dataset_curated.md, dataset_tokens.md)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        for block in blocks(str(folder / "README.md"), "python"):
            names: dict = {}
            exec(block.text.replace("FOLDER_OR_HUB_ID", str(folder)), names)
            assert len(names["rows"] if "rows" in names else names["tokens"]) > 0


def test_proxy_rewards(hub, scripts, tmp_path):
    films, proxy = make_videos(tmp_path / "videos", 3), make_proxy(tmp_path / "proxy")
    argv = curation_options(tmp_path / "curated", films, proxy, *push("curated", "--hub_private_repo=true"))
    code, log = scripts.run(TRAINING / "curate.py", [*argv, "--licence=mit"])
    assert code == 0, log
    assert hub.repositories["dataset", "someone/curated"].private
    files = hub.files("someone/curated", "dataset")
    there = {path.relative_to(tmp_path / "curated").as_posix() for path in (tmp_path / "curated").rglob("*.*")}
    assert there == files.keys() - {".gitattributes"}
    splits = read(tmp_path / "curated", tmp_path / "cache", scripts, "curated")
    assert splits["train"].features == curated.features(AssignmentSpace(**SPACE)) and len(splits["train"]) == 6
    text = (tmp_path / "curated" / "README.md").read_text()
    for said in (
        "| `table` | float16 (9, 3) |",
        "| `crop` | 4 x int32 |",
        "unreadable",
        "evatok_hf 0",
        "--licence=mit",
    ):
        assert said in text, said

    # fewer shards take the place of more
    again = [*curation_options(tmp_path / "less", films, proxy, *push("curated")), "--clips=2"]
    code, log = scripts.run(TRAINING / "curate.py", again)
    assert code == 0, log
    names = [path for path in hub.files("someone/curated", "dataset") if path.startswith("data/")]
    assert names == ["data/curated-0000-000000.parquet"]
    read(tmp_path / "less", tmp_path / "cache", scripts, "curated")


def test_tokens(hub, scripts, tmp_path):
    videos, checkpoint = make_labelled(tmp_path), make_checkpoint(tmp_path / "small")
    argv = token_options(tmp_path / "tokens", videos, checkpoint, "--known_frames=2", *push("tokens"))
    hub.fail("POST", "/someone/tokens/commit/", "503", times=10_000)
    code, log = scripts.run(TRAINING / "tokenize_dataset.py", argv)
    hub.mend()
    told = log.splitlines()[-1]
    assert code == 1 and told.endswith(f"To push it: evatok push {tmp_path / 'tokens'} someone/tokens"), log
    code, log = scripts.run("from evatok_hf.cli.commands import app; app(argv)", [*told.split()[-4:][1:], "--json"])
    assert code == 0, log
    report = json.loads(log.splitlines()[-1])
    assert report["parts"] == ["tokens"] and report["left_out"] == []
    splits = read(tmp_path / "tokens", tmp_path / "cache", scripts, "tokens")
    assert splits["train"].features["label"] == ClassLabel(names=["bird", "cat", "dog"])
    text = (tmp_path / "tokens" / "README.md").read_text()
    assert "| `label` | class label (3) |" in text and "| `condition_lengths` | 2 x int32 |" in text
    sent = Counter(oid for oid, _ in hub.arrived)
    code, log = scripts.run(TRAINING / "tokenize_dataset.py", [*argv, "--resume=true"])
    assert code == 0, log
    new = Counter(oid for oid, _ in hub.arrived) - sent
    assert len(new) <= 1  # the picture at most; no shard
    code, log = scripts.run(
        "from evatok_hf.data.token_dataset import TokenDataset; print(len(TokenDataset.load(argv[0])))",
        ["someone/tokens"],
    )
    assert code == 0 and log.splitlines()[-1] == str(len(splits["train"])), log


def test_clips(hub, scripts, tmp_path):
    pytest.importorskip("vizdoom", reason="the data set is played in ViZDoom: pip install vizdoom==1.3.2")
    given = {"output_dir": tmp_path / "clips", "classes": "basic,take_cover", "train": 2, "test": 1, "frames": 8}
    argv = [*(word for name, value in given.items() for word in (f"--{name}", value)), *push("clips")]
    sent = len(hub.arrived)
    hub.fail("PUT", "/lfs/", "hold", times=1)
    first = scripts.start_apart(TRAINING / "make_vizdoom_dataset.py", argv)
    wait_for(lambda: len(hub.arrived) == sent + 5 or first.poll() is not None)  # of six clips
    first.kill()
    assert first.wait() == -signal.SIGKILL, first.stderr.read()
    hub.mend()
    again = scripts.start_apart(TRAINING / "make_vizdoom_dataset.py", argv)
    assert "pushed" in again.communicate()[1] and again.returncode == 0
    clips = sorted((tmp_path / "clips").rglob("*.mp4"))
    sizes = sum(path.stat().st_size for path in clips)
    assert len(clips) == 6 and sum(size for _, size in hub.arrived[sent:]) == sizes
    splits = read(tmp_path / "clips", tmp_path / "cache", scripts, "clips")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "test": 2}
    assert splits["train"].features == {"video": Video(), "label": ClassLabel(names=["basic", "take_cover"])}
    code, log = scripts.run(TRAIN, ["someone/clips"])
    assert code == 0 and log.splitlines()[-1] == str([(label, (8, 3, 32, 32)) for label in (0, 0, 1, 1)]), log
    text = (tmp_path / "clips" / "README.md").read_text()
    assert f"{sizes} bytes of video" in text and "Clips that could not be made: none." in text


def test_what_is_not_pushed(hub, scripts, tmp_path):
    for folder, told in (
        (tmp_path, "holds no data set"),
        (tmp_path / "missing", "no folder"),
        (write_tokens(tmp_path / "tokens", "00ff"), "lacks README.md; go on with training/tokenize_dataset.py"),
    ):
        with pytest.raises(ValueError, match=told):
            collect_dataset(folder)
    (tmp_path / "tokens" / "tokens.json").unlink()
    with pytest.raises(ValueError, match="lacks README.md, tokens.json"):
        collect_dataset(tmp_path / "tokens")
    argv = [f"--output_dir={tmp_path / 'out'}", "--train_data=x", "--cpu=true"]
    for more, token, expected, told in (
        (push("x"), None, 1, "hf auth login"),
        (["--push_to_hub=true"], "", 2, "needs --hub_dataset_id"),
        (["--licence=apache"], "", 2, "--licence 'apache' is none of the Hub's"),
    ):
        code, log = scripts.run(TRAINING / "tokenize_dataset.py", [*argv, *more], token)
        assert code == expected and told in log.splitlines()[-1] and "Traceback" not in log, log
    assert ("dataset", "someone/x") not in hub.repositories
