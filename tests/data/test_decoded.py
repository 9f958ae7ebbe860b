"""Decoded videos are cut into the clips that the files give."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from video_samples import encode, moving_frames

from evatok_hf.data.clip_cutting import ClipConfig
from evatok_hf.data.clip_sources import list_videos
from evatok_hf.data.decoded import DecodedSource, decode_videos
from evatok_hf.data.streaming import ClipStream, evaluation_clips

CONFIG = ClipConfig(num_frames=4, image_size=16, scale=(0.5, 1.0), strides=(1, 2), freeze_probability=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Videos of two classes, one file that is none, and what is decoded of them."""
    root = tmp_path_factory.mktemp("videos")
    for name, seed in (("a/one.mp4", 0), ("b/two.mp4", 1), ("b/three.mp4", 2)):
        (root / name).parent.mkdir(exist_ok=True)
        encode(root / name, moving_frames(24 + seed, 48 + 8 * seed, 64)[seed:], options={"crf": "5"})
    (root / "b" / "none.mp4").write_bytes(b"no video")
    decode_videos(*list_videos(root, "train"), root.parent / "decoded", short_side=1000, processes=1)
    return root, root.parent / "decoded"


def test_clips_are_those_of_the_files(folders):
    files, decoded = (list(evaluation_clips(folder, CONFIG, 2)) for folder in folders)
    assert len(files) == len(decoded) == 6
    for one, other in zip(files, decoded, strict=True):
        assert torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])
        assert (one["source"], one["label"], one["frames"]) == (other["source"], other["label"], other["frames"])


def test_a_stream_of_them_goes_on_where_it_was(folders):
    def stream():
        return ClipStream([(folders[1], 1.0), (folders[0], 1.0)], config=CONFIG, seed=3)

    whole = stream()
    items = [item for item, _ in zip(whole, range(12), strict=False)]
    first = stream()
    for item, _ in zip(first, range(5), strict=False):
        first.record(item)
    second = stream()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    again = [item for item, _ in zip(second, range(7), strict=False)]
    assert all(
        torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])
        for one, other in zip(items[5:], again, strict=True)
    )
    assert len({item["source"] for item in items}) == 3


def test_frames_in_the_memory_of_a_device_are_the_same(folders):
    source = DecodedSource(folders[1])
    before = [example.video.read([0, 2]) for example in source.examples(None, 0, 0, 0, 1)]
    source.to(torch.device("cpu"))
    after = [example.video.read([0, 2]) for example in source.examples(None, 0, 0, 0, 1)]
    assert all(map(torch.equal, before, after))


def test_large_frames_are_made_smaller(folders, tmp_path):
    decode_videos(*list_videos(folders[0], "train"), tmp_path / "out", short_side=16, processes=1)
    sizes = {
        tuple(example.video.frames.shape[1:3]) for example in DecodedSource(tmp_path / "out").examples(None, 0, 0, 0, 1)
    }
    assert {min(size) for size in sizes} == {16}


@pytest.mark.parametrize("reader", ["decord", "cv2"])
def test_other_readers_give_the_same_videos(folders, tmp_path, monkeypatch, reader):
    from evatok_hf.data import decoded

    monkeypatch.setattr(decoded, "find_spec", lambda name: name == reader)
    decode_videos(*list_videos(folders[0], "train"), tmp_path / "out", short_side=1000, processes=1)
    for one, other in zip(
        *(DecodedSource(f).examples(None, 0, 0, 0, 1) for f in (folders[1], tmp_path / "out")), strict=True
    ):
        assert one.key == other.key and one.video.frames.shape == other.video.frames.shape
        assert (one.video.frames.float() - other.video.frames.float()).abs().mean() < 3


def test_what_is_wrong_is_said(folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="There is no folder"):
        list_videos(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="No video in"):
        list_videos(tmp_path, "train")
    copy = shutil.copytree(folders[1], tmp_path / "copy")
    with open(copy / "frames.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"frames.bin.*decode the videos again"):
        DecodedSource(copy)
    broken = [example for example in list_videos(folders[0], "train")[0] if "none" in example.key]
    with pytest.raises(ValueError, match="none of the videos can be read"):
        decode_videos(broken, [], tmp_path / "out", 64, processes=1)
    from evatok_hf.data import decoded

    monkeypatch.setattr(decoded, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install av, decord or opencv"):
        decode_videos(broken, [], tmp_path / "out", 64, processes=1)
    assert not (tmp_path / "out").exists()
