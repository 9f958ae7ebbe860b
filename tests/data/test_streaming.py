"""Streams of clips: what comes out, who gets which video, and that a resumed stream goes on exactly."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, Video
from torch.utils.data import DataLoader
from video_samples import encode, make_audio_only, make_video, moving_frames

from evatok_hf.data.clip_cutting import ClipCutter, Crop
from evatok_hf.data.streaming import ClipConfig, ClipStream, collate, evaluation_clips, merge, to_float

SMALL = ClipConfig(num_frames=4, image_size=16)


def numbered(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (F, H, W, 3): frame f is grey 8 * f all over, so that a clip shows which frames it holds."""
    levels = (8 * np.arange(frames) % 256).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def make_folder(root: Path, count: int = 7, frames: int = 12) -> Path:
    """`count` videos that differ in brightness, in the classes `cat` and `dog`."""
    for index in range(count):
        folder = root / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        encode(folder / f"v{index}.mp4", np.clip(moving_frames(frames, 32, 48) + 6 * index, 0, 255).astype(np.uint8))
    return root


def make_tars(root: Path, tars: int = 2, videos: int = 3, frames: int = 12) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for t in range(tars):
        with tarfile.open(root / f"shard-{t:03d}.tar", "w") as tar:
            for v in range(videos):
                path = encode(root / "tmp.mp4", np.roll(moving_frames(frames, 32, 48), 5 * (3 * t + v), axis=2))
                members = {"mp4": path.read_bytes(), "cls": str(10 * t + v).encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"t{t}v{v}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (root / "tmp.mp4").unlink()
    return root


def loader(stream: ClipStream, workers: int, batch_size: int = 2) -> DataLoader:
    return DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def sources(batches) -> list[str]:
    return [name for batch in batches for name in batch["source"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return make_tars(tmp_path_factory.mktemp("tars"))


def test_clips_hold_the_frames_that_they_name(tmp_path):
    encode(tmp_path / "long.mp4", numbered(30), options={"crf": "4"})
    encode(tmp_path / "short.mp4", numbered(8), options={"crf": "4"})
    config = ClipConfig(num_frames=4, image_size=16, strides=(1, 3, 5))
    seen = set()
    for item in islice(ClipStream(tmp_path, config=config), 40):
        clip = item["pixel_values_videos"]
        assert clip.shape == (4, 3, 16, 16) and clip.dtype == torch.uint8 and clip.is_contiguous()
        expected = 8 * torch.tensor(item["frames"])
        assert (clip.float().mean((1, 2, 3)) - expected).abs().max() < 3
        assert item["label"] == -1 and item["fps"] == 25
        stride = item["frames"][1] - item["frames"][0]
        assert item["frames"] == [item["frames"][0] + stride * step for step in range(4)]
        seen.add((item["source"], stride))
    # 8 frames hold 4 at stride 2 at most, which the wish for 3 and 5 is lowered to.
    assert seen == {("long.mp4", 1), ("long.mp4", 3), ("long.mp4", 5), ("short.mp4", 1), ("short.mp4", 2)}


@pytest.mark.parametrize("name", ["mp4", "avi", "mkv", "webm", "mpg", "gif"])
def test_every_kind_of_file_is_read(tmp_path, name):
    make_video(tmp_path, name)
    item = next(iter(ClipStream(tmp_path, config=SMALL)))
    assert item["source"].startswith("clip.") and item["pixel_values_videos"].float().std() > 10


def test_classes_and_splits(tmp_path):
    make_folder(tmp_path / "train", 4)
    (tmp_path / "val" / "ant").mkdir(parents=True)
    encode(tmp_path / "val" / "x.mp4", numbered(8))
    encode(tmp_path / "val" / "ant" / "y.mp4", numbered(8))
    train = ClipStream(tmp_path, "train", SMALL, repeat=False)
    # `ant` counts though only val has it: a label means the same in every split.
    assert train.sources[0].classes == ("ant", "cat", "dog")
    assert {item["source"]: item["label"] for item in train} == {
        "cat/v1.mp4": 1,
        "cat/v3.mp4": 1,
        "dog/v0.mp4": 2,
        "dog/v2.mp4": 2,
    }
    val = {item["source"]: item["label"] for item in ClipStream(tmp_path, "validation", SMALL, repeat=False)}
    assert val == {"ant/y.mp4": 0, "x.mp4": -1}
    with pytest.raises(ValueError, match="no folder for 'test'"):
        ClipStream(tmp_path, "test", SMALL)


def test_tars_with_labels(tars):
    for source in (tars, str(tars / "*.tar")):
        items = list(ClipStream(source, config=SMALL, repeat=False))
        labels = {item["source"]: item["label"] for item in items}
        assert labels == {f"t{t}v{v}": 10 * t + v for t in range(2) for v in range(3)}
    assert items[0]["pixel_values_videos"].float().std() > 10


def test_a_dataset_in_the_layout_of_the_hub(tmp_path, folder):
    videos = [{"path": path.name, "bytes": path.read_bytes()} for path in sorted(folder.rglob("*.mp4"))]
    features = Features({"video": Video(decode=False), "label": Value("int64"), "text": Value("string")})
    data = Dataset.from_dict({"video": videos, "label": list(range(7)), "text": ["a"] * 7}, features=features)
    data.to_parquet(tmp_path / "train-00000.parquet")
    stream = ClipStream(tmp_path, config=SMALL, repeat=False)
    assert {item["source"]: item["label"] for item in stream} == {video["path"]: i for i, video in enumerate(videos)}


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("source", ["folder", "tars"])
def test_every_video_goes_to_one_process_and_worker(request, source, workers):
    root = request.getfixturevalue(source)
    streams = [ClipStream(root, config=SMALL, rank=r, world_size=2, repeat=False) for r in range(2)]
    parts = [sources(loader(stream, workers)) for stream in streams]
    whole = [item["source"] for item in ClipStream(root, config=SMALL, repeat=False)]
    assert Counter(parts[0] + parts[1]) == Counter(whole) and len(set(whole)) == len(whole)
    assert parts[0] and parts[1]


def test_no_process_starves_with_fewer_videos_than_readers(tmp_path):
    root = make_folder(tmp_path, 2)
    (root / "cat" / "broken.mp4").write_bytes(b"no video")
    for rank in range(3):
        batches = list(islice(loader(ClipStream(root, config=SMALL, rank=rank, world_size=3), 2), 6))
        assert set(sources(batches)) <= {"cat/v1.mp4", "dog/v0.mp4"} and len(sources(batches)) == 12


def test_epochs_are_shuffled_anew_and_repeatable(folder):
    def order(epoch: int, **settings) -> list[str]:
        stream = ClipStream(folder, config=SMALL, repeat=False, **settings)
        stream.set_epoch(epoch)
        return [item["source"] for item in stream]

    assert order(0) == order(0) != order(1) != order(0, seed=1)
    assert sorted(order(0)) == sorted(order(1)) == order(0, shuffle_buffer=0)
    endless = [item["source"] for item in islice(ClipStream(folder, config=SMALL), 14)]
    assert endless == order(0) + order(1)


def test_set_epoch_reaches_persistent_workers(folder):
    stream = ClipStream(folder, config=SMALL, repeat=False)
    batches = DataLoader(stream, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=collate)
    first = sources(batches)
    stream.set_epoch(1)
    assert sources(batches) != first and sorted(first) == sorted(set(first)) == sorted(sources(batches))


def test_sources_are_mixed_by_weight(folder, tars):
    mix = [(folder, 3.0), (tars, 1.0)]
    names = [item["source"] for item in islice(ClipStream(mix, config=SMALL), 200)]
    assert 30 <= sum("/" not in name for name in names) <= 70
    once = [item["source"] for item in ClipStream(mix, config=SMALL, repeat=False)]
    assert len(once) == len(set(once)) == 13


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("repeat", [True, False])
def test_a_resumed_stream_goes_on_exactly(tmp_path, tars, workers, repeat):
    root = make_folder(tmp_path, 5)
    (root / "cat" / "broken.mp4").write_bytes(b"no video")
    encode(root / "dog" / "short.mp4", numbered(3))
    config = ClipConfig(num_frames=4, image_size=16, strides=(1, 2), scale=(0.5, 1.0), clips_per_video=3)

    def make() -> ClipStream:
        return ClipStream([(root, 2.0), (str(tars / "*.tar"), 1.0)], config=config, seed=3, repeat=repeat)

    whole = list(islice(loader(make(), workers), 40))  # three epochs of the folder, where it repeats
    for stop in (1, 4, 13):
        stream = make()
        for index, batch in enumerate(loader(stream, workers)):
            stream.record(batch)
            if index + 1 == stop:
                break
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        rest = []
        for batch in islice(loader(resumed, workers), len(whole) - stop):
            rest.append(batch)
            if len(rest) <= 3:  # a state of a resumed stream is as good
                resumed.record(batch)
                again = resumed.state_dict()
        if repeat or workers < 2:
            assert len(rest) == len(whole) - stop
            assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))
        else:  # towards the end of a single epoch the loader waits for whichever worker still has something
            assert Counter(sources(rest)) == Counter(sources(whole[stop:]))
        third = make()
        third.load_state_dict(again)
        third.set_epoch(0)  # as a loop over epochs does; the state was taken in this one
        assert same(next(iter(loader(third, workers))), whole[stop + 3])


def test_the_state_follows_the_items_where_nothing_is_recorded(folder):
    whole = list(islice(ClipStream(folder, config=SMALL), 12))
    stream = ClipStream(folder, config=SMALL)
    iterator = iter(stream)
    for _ in range(5):
        next(iterator)
    resumed = ClipStream(folder, config=SMALL)
    resumed.load_state_dict(stream.state_dict())
    assert all(same(a, b) for a, b in zip(islice(resumed, 7), whole[5:], strict=True))
    assert resumed.epoch == 1 and stream.epoch == 0


def test_resume_with_another_number_of_processes(tmp_path):
    root = make_folder(tmp_path, 12)
    states = []
    for rank in range(2):
        stream = ClipStream(root, config=SMALL, rank=rank, world_size=2)
        for item in islice(stream, 3):
            stream.record(item)
        states.append(stream.state_dict())
    # 6 of 12 are consumed: three processes pass over 2 each and have 2 each left in this epoch.
    for rank in range(3):
        stream = ClipStream(root, config=SMALL, rank=rank, world_size=3)
        stream.load_state_dict(states)
        epochs = []
        for item in islice(stream, 4):
            stream.record(item)
            epochs.append(item["position"][4:].tolist())
        assert epochs == [[0, 3], [0, 4], [1, 1], [1, 2]]
    workers = ClipStream(root, config=SMALL, rank=1, world_size=2)
    workers.load_state_dict(states)  # as many processes, but now with workers
    batches = list(islice(loader(workers, 2, batch_size=1), 4))
    assert [batch["position"][0, 4:].tolist() for batch in batches] == [[0, 2], [0, 2], [0, 3], [0, 3]]
    workers.record(batches[0])
    again = ClipStream(root, config=SMALL, rank=1, world_size=2)
    again.load_state_dict(workers.state_dict())
    assert all(same(a, b) for a, b in zip(islice(loader(again, 2, batch_size=1), 3), batches[1:], strict=True))


def test_a_state_of_another_stream_is_refused(folder, tars):
    state = ClipStream(folder, config=SMALL).state_dict()
    with pytest.raises(ValueError, match="seed 0 and 1 source"):
        ClipStream(folder, config=SMALL, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="make the stream as it was"):
        ClipStream([(folder, 1.0), (tars, 1.0)], config=SMALL).load_state_dict(state)
    with pytest.raises(ValueError, match="shared is wrong"):
        ClipStream(folder, config=SMALL).load_state_dict({**state, "shared": {"draws": 1, "sources": [[0]]}})


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_videos_are_skipped_counted_and_named(tmp_path, caplog, workers):
    root = make_folder(tmp_path, 3)
    (root / "broken.mp4").write_bytes(b"\0" * 500)
    (root / "cut.mp4").write_bytes((root / "cat" / "v1.mp4").read_bytes()[:900])
    make_audio_only(root / "sound.mp4")
    encode(root / "short.mp4", numbered(3))
    stream = ClipStream(root, config=SMALL, repeat=False)
    with caplog.at_level(logging.WARNING, logger="evatok_hf.data.streaming"):
        names = sources(loader(stream, workers))
    assert sorted(names) == ["cat/v1.mp4", "dog/v0.mp4", "dog/v2.mp4"]
    assert stream.skipped == {"unreadable": 3, "too short": 1}
    if workers == 0:
        for name in ("broken.mp4", "cut.mp4", "sound.mp4", "short.mp4"):
            assert any(name in message for message in caplog.messages)
        assert any("3 frames, 4 are needed" in message for message in caplog.messages)


def test_min_frames(folder):
    longer = ClipConfig(num_frames=4, image_size=16, min_frames=13)
    with pytest.raises(ValueError, match="gave a clip .7 too short."):
        next(iter(ClipStream(folder, config=longer)))


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error(tmp_path, repeat, workers):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    encode(tmp_path / "b.mp4", numbered(3))
    with pytest.raises(ValueError, match="1 unreadable, 1 too short"):
        list(loader(ClipStream(tmp_path, config=SMALL, repeat=repeat), workers))


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="No video in"):
        ClipStream(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        ClipStream(tmp_path / "absent")
    with pytest.raises(ValueError, match="No file matches"):
        ClipStream(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="single file"):
        ClipStream(make_video(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        ClipStream(tmp_path / "pipe")
    with pytest.raises(ValueError, match="weight above 0"):
        ClipStream([(tmp_path, 0.0)])
    with pytest.raises(ValueError, match="rank"):
        ClipStream(tmp_path, rank=1)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="make the tar anew"):
        ClipStream(tmp_path / "t" / "bad.tar")


def test_a_damaged_tar_is_named_and_its_other_videos_are_used(tmp_path, tars, caplog):
    whole = (tars / "shard-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    stream = ClipStream(tmp_path, config=SMALL, repeat=False)
    with caplog.at_level(logging.WARNING, logger="evatok_hf.data.streaming"):
        assert {item["source"] for item in stream} == {"t0v0", "t0v1"}
    assert stream.skipped == {"unreadable": 1} and "cannot read an archive" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"num_frames": 0}, {"strides": ()}, {"strides": (0,)}, {"scale": (0.0, 1.0)}, {"scale": (0.5, 1.5)}]
    + [{"flip_probability": 2.0}, {"min_frames": 3}, {"clips_per_video": 0}],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipConfig(**wrong)


def test_crops_flips_and_resize(tmp_path):
    y, x = np.mgrid[0:64, 0:96]
    image = np.stack([2.5 * x, 3.5 * y, 0 * x], axis=-1).astype(np.uint8)  # colour tells the place
    encode(tmp_path / "v.mp4", np.broadcast_to(image, (4, 64, 96, 3)).copy(), options={"crf": "1"})
    config = ClipConfig(num_frames=4, image_size=16, scale=(0.4, 0.9))
    sides, flips, places = [], 0, set()
    for item in islice(ClipStream(tmp_path, config=config), 200):
        frame = item["pixel_values_videos"][0].float()
        across, down = frame[0].mean(0) / 2.5, frame[1].mean(1) / 3.5
        flips += bool(across[0] > across[-1])
        sides.append(float((down[14] - down[1]) / 13 * 16))
        places.add((round(float(across.mean()) / 8), round(float(down.mean()) / 8)))
    assert 60 < flips < 140 and len(places) > 30
    assert 0.37 * 64 < min(sides) < 0.45 * 64 and 0.82 * 64 < max(sides) < 0.95 * 64
    # Log-uniform: the median is the geometric mean of the ends.
    assert abs(np.median(sides) / 64 - 0.6) < 0.06

    plain = ClipConfig(num_frames=4, image_size=16, random_position=False, flip_probability=0.0)
    clip = next(iter(ClipStream(tmp_path, config=plain)))["pixel_values_videos"].float()
    centre = torch.from_numpy(image[:, 16:80].copy()).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(centre, (16, 16), mode="bilinear", antialias=True)
    assert (clip - wanted).abs().max() < 8  # what is left is compression


def test_evaluation_clips_are_always_the_same(tmp_path):
    encode(tmp_path / "b.mp4", numbered(23), options={"crf": "4"})
    encode(tmp_path / "a.mp4", numbered(9), options={"crf": "4"})
    encode(tmp_path / "c.mp4", numbered(2))
    config = ClipConfig(num_frames=4, image_size=16, strides=(2, 1), scale=(0.3, 0.5))
    clips = evaluation_clips(tmp_path, config, clips_per_video=3)
    items = list(clips)
    assert [(item["source"], item["frames"][0]) for item in items] == [
        ("a.mp4", 1),
        ("b.mp4", 0),
        ("b.mp4", 8),
        ("b.mp4", 16),
    ]
    assert all(item["frames"][1] - item["frames"][0] == 2 for item in items) and clips.skipped == {"too short": 1}
    assert all(same(a, b) for a, b in zip(items, clips, strict=True))
    parts = [[item["source"] for item in evaluation_clips(tmp_path, config, 3, "val", r, 2)] for r in range(2)]
    assert sorted(parts[0] + parts[1]) == ["a.mp4", "b.mp4", "b.mp4", "b.mp4"]


def test_clips_per_video(folder):
    config = ClipConfig(num_frames=4, image_size=16, clips_per_video=3, random_start=False)
    items = list(islice(ClipStream(folder, config=config), 6))
    assert [item["frames"][0] for item in items] == [0, 4, 8] * 2
    assert [item["source"] for item in items] == [items[0]["source"]] * 3 + [items[3]["source"]] * 3


def test_a_clip_can_be_cut_again(folder):
    config = ClipConfig(num_frames=4, image_size=16, scale=(0.5, 1.0), freeze_probability=0.5)
    stream = ClipStream(folder, config=config)
    examples = {example.key: example for example in stream.sources[0].examples(None, 0, 0, 0, 1)}
    items = list(islice(stream, 12))
    for item in items:
        with ClipCutter(examples[item["source"]], config, training=False) as video:
            again = video.recut(item["frames"], Crop(*item["crop"]))
        assert torch.equal(again, item["pixel_values_videos"])
    assert {item["crop"][3] for item in items} == {0, 1} and len({item["crop"][2] for item in items}) > 2


def test_clips_that_freeze(folder):
    settings = {"num_frames": 4, "image_size": 16}
    moving = islice(ClipStream(folder, config=ClipConfig(**settings)), 24)
    freezing = islice(ClipStream(folder, config=ClipConfig(**settings, freeze_probability=0.5)), 24)
    lasts = []
    for a, b in zip(moving, freezing, strict=True):
        assert a["source"] == b["source"] and a["crop"] == b["crop"]
        last = next(number for number in range(4) if b["frames"][number] == b["frames"][-1])
        assert b["frames"][: last + 1] == a["frames"][: last + 1]
        for number in range(last, 4):
            assert torch.equal(b["pixel_values_videos"][number], a["pixel_values_videos"][last])
        lasts.append(last)
    assert set(lasts) == {0, 1, 2, 3} and lasts.count(3) > 8
    with pytest.raises(ValueError, match="freeze_probability"):
        ClipConfig(freeze_probability=1.5)


def test_batches_and_values(folder):
    items = list(islice(ClipStream(folder, config=SMALL), 3))
    batch = collate(items)
    assert batch["pixel_values_videos"].shape == (3, 4, 3, 16, 16) and batch["pixel_values_videos"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64 and batch["fps"].tolist() == [25.0] * 3 and len(batch["source"]) == 3
    assert batch["frames"].shape == batch["crop"].shape == (3, 4) and batch["origin"].tolist() == [0, 0, 0]
    values = to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0] and values.dtype == torch.float32


@pytest.mark.parametrize("workers", [2, 4])
def test_one_process_with_as_many_workers_gives_the_batches_of_two_and_goes_on_for_them(tmp_path, workers):
    root = make_folder(tmp_path, 12)

    def batches(world_size: int, steps: int, states: list[dict] | None = None) -> tuple[list[list], list[dict]]:
        """The clips of each step over all processes, and the processes' states after the last."""
        seen, states_after, readers = [[] for _ in range(steps)], [], workers // world_size
        for rank in range(world_size):
            stream = ClipStream(root, config=SMALL, rank=rank, world_size=world_size)
            if states:
                stream.load_state_dict(states)
            parts = iter(loader(stream, readers, batch_size=2))
            for step in range(steps):
                taken = [next(parts) for _ in range(readers)]
                for part in taken:
                    stream.record(part)
                batch = merge(taken)
                seen[step] += list(zip(batch["source"], batch["frames"][:, 0].tolist(), strict=True))
            states_after.append(stream.state_dict())
        return seen, states_after

    one, _ = batches(1, 5)
    two, _ = batches(2, 5)
    assert one == two and len(one[0]) == 2 * workers
    for before, after in ((1, 2), (2, 1)):
        start, states = batches(before, 2)
        assert start + batches(after, 3, states)[0] == one
