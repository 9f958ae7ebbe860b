"""Evaluation protocols: the files that come with the project, what is refused, and which clips are chosen."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from training.protocols.protocol import choose_clips, load_protocol, protocol_names

TRAINING = Path(__file__).parents[2] / "training"

VALUES = json.loads((TRAINING / "protocols" / "all_clips.json").read_text())
LENGTHS = {"b.mp4": 50, "a/x.mp4": 35, "a/w.mp4": 15, "c.mp4": 16}


@pytest.fixture
def made(tmp_path):
    """A protocol with some fields replaced; a field that is to be None is left out with `without`."""

    def make(without: tuple[str, ...] = (), **fields):
        values = {name: value for name, value in {**VALUES, **fields}.items() if name not in without}
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(values))
        return path

    return make


def chosen(path: Path, lengths: dict[str, int] = LENGTHS):
    return choose_clips(load_protocol(path), lengths)


# --- the files --------------------------------------------------------------------------------------------------------


def test_those_of_the_project():
    assert set(protocol_names()) == {
        "all_clips",
        *(f"{who}_{what}" for who in ("larp", "adaptok") for what in ("ucf101_rfvd", "ucf101_gfvd")),
        *(f"{who}_k600_frame_prediction" for who in ("larp", "adaptok")),
    }
    for name in protocol_names():
        protocol = load_protocol(name)
        path = TRAINING / "protocols" / f"{name}.json"
        assert protocol.name == name and protocol.content() == json.loads(path.read_text())
        assert protocol.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert load_protocol(path) == protocol and protocol.num_frames == 16 and protocol.known_differences
        assert ("fvd" in protocol.metrics) == (name != "all_clips")
    # Two systems' figures for one data set are not of the same clips.
    assert load_protocol("larp_ucf101_rfvd").clips != load_protocol("adaptok_ucf101_rfvd").clips
    k600 = load_protocol("larp_k600_frame_prediction")
    assert (k600.feature_resolution, k600.count, k600.clips["count"]) == (64, 50000, 50000)
    assert load_protocol("larp_ucf101_gfvd").clips == {"kind": "sample", "seed": 42, "count": 10000}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("description", 3),
        ("task", "segmentation"),
        ("split", None),
        ("clips", {"kind": "some"}),
        ("clips", "first"),
        ("num_frames", 0),
        ("num_frames", 16.0),
        ("frame_stride", True),
        ("resize", {"short_side": 128}),
        ("resize", {"short_side": 128, "filter": "nearest"}),
        ("resize", {"short_side": -1, "filter": "bilinear-antialias"}),
        ("crop", "random"),
        ("feature_resolution", 0),
        ("metrics", []),
        ("metrics", ["psnr", "psnr"]),
        ("metrics", ["FVD"]),
        ("metrics", "psnr"),
        ("count", 0),
        ("reference", " "),
        ("known_differences", "none"),
    ],
)
def test_wrong_values_name_file_and_field(made, field, value):
    path = made(**{field: value})
    with pytest.raises(ValueError) as refused:
        load_protocol(path)
    assert str(refused.value).startswith(f"{path} is damaged: {field} must be ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({"kind": "random"}, "kind random takes seed"),
        ({"kind": "first", "seed": 0}, "kind first takes nothing else"),
        ({"kind": "sample", "seed": 0, "count": 0}, r"clips.count must be a whole number from 1 to .*, got 0"),
        ({"kind": "random", "seed": -1}, "clips.seed must be"),
        ({"kind": "evenly-spaced", "per_video": "2"}, "clips.per_video must be"),
        ({"kind": "list", "clips": []}, r"clips.clips must be a list of \[video, first frame\]"),
        ({"kind": "list", "clips": [["a.mp4", -1]]}, "clips.clips must be"),
        ({"kind": "list", "clips": [["a.mp4", 1], ["a.mp4", 1]]}, "more than once"),
    ],
)
def test_wrong_clips_name_the_file(made, clips, message):
    path = made(clips=clips)
    with pytest.raises(ValueError, match=f"^{path} is damaged: .*{message}"):
        load_protocol(path)


def test_fields_that_are_missing_or_unknown(made, tmp_path):
    with pytest.raises(ValueError, match="mine.json lacks the fields count, split"):
        load_protocol(made(without=("split", "count")))
    with pytest.raises(ValueError, match="mine.json has unknown fields fps, sha256"):
        load_protocol(made(sha256="0", fps=25))
    with pytest.raises(ValueError, match="there is no protocol missing .*all_clips"):
        load_protocol("missing")
    (tmp_path / "text.json").write_text("{name")
    with pytest.raises(ValueError, match="text.json is damaged"):
        load_protocol(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="list.json is damaged .*it holds a list"):
        load_protocol(tmp_path / "list.json")


# --- clips ------------------------------------------------------------------------------------------------------------


def test_first_and_centre(made):
    plan = chosen(made(clips={"kind": "first"}))
    assert plan.clips == [("a/x.mp4", 0), ("b.mp4", 0), ("c.mp4", 0)]
    assert plan.unfit == [("a/w.mp4", "too short", "15 frames, 16 are needed")]
    assert chosen(made(clips={"kind": "centre"})).clips == [("a/x.mp4", 9), ("b.mp4", 17), ("c.mp4", 0)]


def test_evenly_spaced(made):
    plan = chosen(made(clips={"kind": "evenly-spaced", "per_video": 3}))
    assert plan.clips == [("a/x.mp4", 0), ("a/x.mp4", 19), ("b.mp4", 0), ("b.mp4", 17), ("b.mp4", 34), ("c.mp4", 0)]


def test_all_that_do_not_overlap(made):
    plan = chosen(made(clips={"kind": "all-non-overlapping"}))
    assert plan.clips == [("a/x.mp4", 0), ("a/x.mp4", 16), ("b.mp4", 0), ("b.mp4", 16), ("b.mp4", 32), ("c.mp4", 0)]


def test_strides(made):
    path = made(num_frames=4, frame_stride=3, clips={"kind": "all-non-overlapping"})
    assert chosen(path, {"a": 22, "b": 9}).clips == [("a", 0), ("a", 12)]
    assert load_protocol(path).frames(12) == [12, 15, 18, 21]
    assert chosen(made(num_frames=4, frame_stride=3, clips={"kind": "centre"}), {"a": 22}).clips == [("a", 6)]


def test_random_windows_depend_on_seed_and_video_alone(made):
    lengths = {f"{index}.mp4": 40 for index in range(200)}
    path = made(clips={"kind": "random", "seed": 1})
    plan = chosen(path, lengths)
    starts = [first for _, first in plan.clips]
    assert [name for name, _ in plan.clips] == sorted(lengths)
    assert min(starts) == 0 and max(starts) == 24 and len(set(starts)) == 25
    assert set(chosen(path, {name: 40 for name in list(lengths)[::7]}).clips) < set(plan.clips)
    other = chosen(made(clips={"kind": "random", "seed": 2}), lengths)
    assert other.clips != plan.clips


def test_a_sample_of_all_clips(made):
    everything = chosen(made(clips={"kind": "all-non-overlapping"})).clips
    plan = chosen(made(clips={"kind": "sample", "seed": 42, "count": 3}))
    assert plan.clips == sorted(random.Random(42).sample(everything, 3))
    assert chosen(made(clips={"kind": "sample", "seed": 42, "count": 99})).clips == everything
    # The order in which videos were found says nothing.
    shuffled = dict(reversed(LENGTHS.items()))
    assert chosen(made(clips={"kind": "sample", "seed": 42, "count": 3}), shuffled).clips == plan.clips


def test_a_list(made):
    listed = [["b.mp4", 34], ["b.mp4", 35], ["a/x.mp4", 3], ["d.mp4", 0], ["d.mp4", 16]]
    plan = chosen(made(clips={"kind": "list", "clips": listed}))
    assert plan.clips == [("a/x.mp4", 3), ("b.mp4", 34)]
    assert [(name, cause) for name, cause, _ in plan.unfit] == [("b.mp4", "too short"), ("d.mp4", "missing")]
