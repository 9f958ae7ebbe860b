"""Tars as people make them: mixed kinds, missing and odd labels, damage; what can be used is, the rest is named."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from video_samples import encode, make_video, moving_frames

from evatok_hf.data.clip_archives import read_archive, read_labels
from evatok_hf.data.clip_sources import open_source
from evatok_hf.data.streaming import ClipConfig, ClipStream

SMALL = ClipConfig(num_frames=4, image_size=16)
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return encode(tmp_path_factory.mktemp("video") / "v.mp4", moving_frames(8, 32, 48)).read_bytes()


def pack(path: Path, members: Members, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def clips(source, training: bool = False, split: str = "train") -> tuple[list[tuple[str, int]], dict, tuple[str, ...]]:
    """What comes out of a source, what was skipped, and the classes."""
    stream = ClipStream(source, split, SMALL, repeat=False, training=training)
    found = sorted((item["source"], item["label"]) for item in stream)
    return found, dict(stream.skipped), stream.sources[0].classes


def problems(path: Path) -> list[tuple[str, str]]:
    return [(example.key, example.problem) for example in read_archive(str(path), {}) if example.problem]


def label(value: object) -> bytes:
    return json.dumps({"label": value, "caption": "x"}).encode()


# --- what is in them ---


def test_several_kinds_of_video_in_one_tar(tmp_path, mp4):
    avi, webm = (make_video(tmp_path, name, moving_frames(8, 32, 48)).read_bytes() for name in ("avi", "webm"))
    members = [(f"{i}.mp4", mp4) for i in range(6)] + [("6.avi", avi), ("7.webm", webm), ("8.MP4", mp4)]
    path = pack(tmp_path / "a.tar", members)
    for training in (False, True):
        assert clips(path, training) == ([(str(i), -1) for i in range(9)], {}, ())


def test_names_with_dots_folders_and_what_is_no_video(tmp_path, mp4):
    names = [
        "clip.v1.final",
        "clip.v2.final",
        "Mr. Bean - 01. Start [x_1]",
        "Mr. Bean - 02. End [x_2]",
        "run/a",
        "jump/a",
    ]
    members = [(f"{name}.mp4", mp4) for name in names]
    members += [
        ("run/._a.mp4", b"\0\5\x16\7"),
        ("run/.DS_Store", b"x"),
        ("README.txt", b"about"),
        ("x.jpg", b"picture"),
    ]
    assert clips(pack(tmp_path / "a.tar", members)) == (sorted((name, -1) for name in names), {}, ())


def test_a_name_that_is_no_utf8(tmp_path, mp4):
    path = pack(
        tmp_path / "a.tar",
        [("ok.mp4", mp4), ("caf\udce9.mp4", mp4), ("caf\udce9.cls", b"3")],
        format=tarfile.GNU_FORMAT,
    )
    assert clips(path) == ([("caf\\xe9", 3), ("ok", -1)], {}, ())


def test_compressed_tars(tmp_path, mp4):
    path = pack(tmp_path / "a.tar.gz", [("0.mp4", mp4), ("0.cls", b"1"), ("1.mp4", mp4)], "w:gz")
    for source in (path, tmp_path, str(tmp_path / "*.gz")):
        assert clips(source) == ([("0", 1), ("1", -1)], {}, ())


def test_labels_are_numbers_where_all_are(tmp_path, mp4):
    members = [("0.mp4", mp4), ("0.json", label(2)), ("1.mp4", mp4), ("2.json", label("5")), ("2.mp4", mp4)]
    members += [("3.mp4", mp4), ("3.json", label(7.0)), ("4.mp4", mp4), ("4.cls", b" 4\n"), ("4.json", label(9))]
    members += [
        ("5.base.mp4", mp4),
        ("5.pose.mp4", mp4),
        ("5.json", label(6)),
        ("6.mp4", mp4),
        ("6.json", label([1, 2])),
    ]
    numbers = {"0": 2, "1": -1, "2": 5, "3": 7, "4": 4, "5.base": 6, "5.pose": 6, "6": -1}
    assert clips(pack(tmp_path / "a.tar", members)) == (sorted(numbers.items()), {}, ())


def test_words_make_classes_that_do_not_depend_on_order_or_split(tmp_path, mp4):
    pack(
        tmp_path / "train" / "a.tar", [("0.mp4", mp4), ("0.cls", b"dog"), ("1.mp4", mp4), ("1.cls", "Katze é".encode())]
    )
    pack(
        tmp_path / "train" / "b.tar",
        [("2.mp4", mp4), ("2.json", label("ant")), ("3.mp4", mp4), ("4.mp4", mp4), ("4.cls", b"12")],
    )
    pack(tmp_path / "val" / "a.tar", [("5.json", label("bee")), ("5.mp4", mp4), ("6.mp4", mp4), ("6.cls", b"dog")])
    classes = ("12", "Katze é", "ant", "bee", "dog")
    for training in (False, True):
        expected = [("0", 4), ("1", 1), ("2", 2), ("3", -1), ("4", 0)]
        assert clips(tmp_path, training) == (expected, {}, classes)
    assert clips(tmp_path, split="val") == ([("5", 3), ("6", 4)], {}, classes)


def test_a_word_after_numbers_is_named(tmp_path, mp4):
    pack(tmp_path / "a.tar", [("0.mp4", mp4), ("0.cls", b"1")])
    path = pack(tmp_path / "b.tar", [("1.mp4", mp4), ("1.cls", b"dog"), ("2.mp4", mp4), ("2.cls", b"0")])
    assert clips(tmp_path) == ([("0", 1), ("2", 0)], {"unreadable": 1}, ())
    ((key, problem),) = problems(path)
    assert key == "1" and "'dog' is a word" in problem and "b.tar" in problem


def test_what_cannot_be_used_of_a_sample_is_named(tmp_path, mp4):
    members = [
        ("0.mp4", mp4),
        ("0.json", b'{"label": '),
        ("1.mp4", b""),
        ("2.json", label(1)),
        ("3.mp4", mp4),
        ("3.cls", b"2"),
    ]
    members += [("4.mp4", mp4), ("4.json", b"[" * 100_000)]
    path = pack(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("5.mp4")
        member.type, member.linkname = tarfile.SYMTYPE, "3.mp4"
        tar.addfile(member)
    assert clips(path) == ([("3", 2)], {"unreadable": 5}, ())
    found = dict(problems(path))
    assert (
        "0.json: no JSON" in found["0"] and "no video" in found["2"] and "4.json" in found["4"] and "link" in found["5"]
    )


# --- damage ---


def offsets(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("junk", [b"\xff" * 100, b"\0" * 512])
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_damaged_header_costs_its_member_only(tmp_path, mp4, lost, junk):
    path = pack(tmp_path / "a.tar", [(f"{i}.mp4", mp4) for i in range(4)])
    data, at = bytearray(path.read_bytes()), offsets(path)[lost]
    data[at : at + len(junk)] = junk
    path.write_bytes(data)
    for training in (False, True):
        assert clips(path, training)[:2] == ([(str(i), -1) for i in range(4) if i != lost], {"unreadable": 1})
    ((key, problem),) = problems(path)
    assert key == "a.tar" and "make the tar anew" in problem and (lost == 0 or f"after {lost - 1}.mp4" in problem)


def test_a_damaged_header_behind_a_long_name(tmp_path, mp4):
    long = "x" * 200
    path = pack(tmp_path / "a.tar", [("0.mp4", mp4), (f"{long}.mp4", mp4), ("2.mp4", mp4)], format=tarfile.GNU_FORMAT)
    data, at = bytearray(path.read_bytes()), offsets(path)[1]
    data[at + 1024 : at + 1124] = b"\xff" * 100
    path.write_bytes(data)
    assert clips(path)[:2] == ([("0", -1), ("2", -1)], {"unreadable": 1})


@pytest.mark.parametrize("at", ["video", "header", "end"])
def test_a_tar_that_is_cut_gives_what_is_there(tmp_path, mp4, at):
    path = pack(tmp_path / "a.tar", [(f"{i}.mp4", mp4) for i in range(3)])
    starts = offsets(path)
    size = {"video": starts[2] + 700, "header": starts[2] + 300, "end": starts[2]}[at]
    path.write_bytes(path.read_bytes()[:size])
    pack(tmp_path / "b.tar", [("3.mp4", mp4)])
    assert clips(tmp_path)[:2] == ([("0", -1), ("1", -1), ("3", -1)], {"unreadable": 1})
    ((key, problem),) = problems(path)
    assert key == "a.tar" and "1.mp4" in problem or "2.mp4" in problem


def test_a_compressed_tar_that_is_cut(tmp_path):
    noise = random.Random(0).randbytes(60_000)  # which does not become smaller
    members = [(f"{i}.mp4", noise[i * 20_000 : (i + 1) * 20_000]) for i in range(3)]
    path = pack(tmp_path / "a.tar.gz", members, "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = list(read_archive(str(path), {}))
    assert found[0].key == "0" and found[0].video == noise[:20_000] and found[-1].problem and len(found) == 2


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\0" * 10240, gzip.compress(b"no tar", mtime=0)])
def test_what_is_no_tar_is_named_and_the_others_used(tmp_path, mp4, content):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    if content.strip(b"\0"):  # an empty archive is one
        with pytest.raises(ValueError, match="bad.tar; make the tar anew"):
            clips(tmp_path)
    pack(tmp_path / "good.tar", [("0.mp4", mp4), ("0.cls", b"dog")])
    skipped = {"unreadable": 1} if content == b"" or content.strip(b"\0") else {}
    assert clips(tmp_path) == ([("0", 0)], skipped, ("dog",))


def test_no_damage_is_an_error_and_what_is_far_from_it_is_read(tmp_path):
    """Bytes changed at random, in headers above all: every other member comes out as it was."""
    draw = random.Random(0)
    contents = {f"{i}": draw.randbytes(draw.randrange(1, 3000)) for i in range(6)}
    members = [pair for key, data in contents.items() for pair in ((f"{key}.mp4", data), (f"{key}.cls", b"7"))]
    whole = pack(tmp_path / "a.tar", members).read_bytes()
    starts = offsets(tmp_path / "a.tar")
    for _ in range(100):
        data = bytearray(whole)
        at = draw.choice(starts) + draw.randrange(512) if draw.random() < 0.8 else draw.randrange(len(data))
        for place in range(at, min(len(data), at + draw.choice([1, 4, 60]))):
            data[place] = draw.randrange(256)
        (tmp_path / "b.tar").write_bytes(data)
        found = list(read_archive(str(tmp_path / "b.tar"), {}))
        untouched = {example.key for example in found if contents.get(example.key) == example.video}
        assert len(untouched) >= 4
        names = {example.key for example, _ in read_labels(str(tmp_path / "b.tar")) if not example.problem}
        assert {example.key for example in found if not example.problem} <= names


def test_bytes_come_the_same_from_an_address(tmp_path, mp4):
    path = pack(tmp_path / "a.tar", [("0.mp4", mp4), ("0.cls", b"2"), ("1.mp4", mp4)])
    assert list(read_archive(f"file://{path}", {})) == list(read_archive(str(path), {}))


def test_words_in_a_dataset_of_the_hub(tmp_path, mp4):
    from datasets import Dataset, Features, Value, Video

    features = Features({"video": Video(decode=False), "label": Value("string")})
    folder = tmp_path / "[a] *b"
    for split, words in (("train", ["dog", "ant", None]), ("test", ["bee"])):
        cells = [{"bytes": mp4, "path": f"{i}.mp4"} for i in range(len(words))]
        data = Dataset.from_dict({"video": cells, "label": words}, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    expected = [("0.mp4", 2), ("1.mp4", 0), ("2.mp4", -1)]
    assert clips(folder) == (expected, {}, ("ant", "bee", "dog"))
    assert clips(folder, split="test") == ([("0.mp4", 1)], {}, ("ant", "bee", "dog"))


def test_a_source_without_a_video(tmp_path):
    pack(tmp_path / "a.tar", [("README.txt", b"x")])
    with pytest.raises(ValueError, match="No video in"):
        open_source(tmp_path, "train")
