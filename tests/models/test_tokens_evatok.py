"""Tokens between encode and decode: packing, clips, and the file, also a damaged one."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import fields

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, send_to_device
from safetensors.torch import load_file, save_file

from evatok_hf import VideoTokens
from evatok_hf.models import tokens_evatok

METADATA = {
    "fps": 23.976,
    "height": 64,
    "width": 48,
    "num_frames": 29,
    "checkpoint": 'a "quoted" name, ünïcode',
    "fingerprint": "0123456789abcdef",
}


def make(**metadata) -> VideoTokens:
    """Two clips of two blocks, ids 0 to 13."""
    return VideoTokens(torch.arange(14), torch.tensor([[2, 4], [8, 0]]), **metadata)


def same(a: VideoTokens, b: VideoTokens) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(VideoTokens)]
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_integer_dtype_becomes_int64():
    tokens = VideoTokens(torch.arange(6, dtype=torch.int16), torch.tensor([[2, 4]], dtype=torch.uint8))
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.ids.tolist() == [0, 1, 2, 3, 4, 5] and len(tokens) == 1


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (torch.arange(5), torch.tensor([[2, 4]]), "announce 6 tokens but there are 5 ids"),
        (torch.arange(6), torch.tensor([[8, -2]]), "lengths announce"),
        (torch.arange(6).float(), torch.tensor([[2, 4]]), "ids must be 1-D integers, got torch.float32"),
        (torch.arange(6).bool(), torch.tensor([[2, 4]]), "ids must be 1-D integers, got torch.bool"),
        (torch.arange(6)[None], torch.tensor([[2, 4]]), "ids must be 1-D integers"),
        (torch.arange(6), torch.tensor([2, 4]), "lengths must be 2-D integers"),
        (torch.arange(6), torch.tensor([[2.0, 4.0]]), "lengths must be 2-D integers, got torch.float32"),
        (torch.arange(6), None, "lengths must be a tensor of 2-D integers, got NoneType"),
        (list(range(6)), torch.tensor([[2, 4]]), "ids must be a tensor of 1-D integers, got list"),
    ],
)
def test_ids_and_lengths_that_do_not_fit_are_refused(ids, lengths, message):
    with pytest.raises(ValueError, match=message):
        VideoTokens(ids, lengths)


def test_libraries_can_rebuild_them():
    tokens = make(**METADATA)
    leaves, structure = torch.utils._pytree.tree_flatten(tokens)
    for again in (
        send_to_device(tokens, "cpu"),
        convert_outputs_to_fp32(lambda: tokens)(),
        torch.utils._pytree.tree_unflatten(leaves, structure),
        copy.deepcopy(tokens),
        pickle.loads(pickle.dumps(tokens)),
        VideoTokens(dict(tokens)),
    ):
        assert type(again) is VideoTokens and same(again, tokens) and dict(again).keys() == dict(tokens).keys()
    with pytest.raises(ValueError, match="announce 14 tokens but there are 3"):
        VideoTokens({"ids": torch.arange(3), "lengths": tokens.lengths})
    with pytest.raises(ValueError, match="give no others beside it"):
        VideoTokens(dict(tokens), fps=24.0)


def test_a_clip_has_its_own_ids_and_lengths():
    tokens = make(**METADATA)
    first, second = tokens.clip(0), tokens.clip(1)
    assert first.ids.tolist() == list(range(6)) and first.lengths.tolist() == [[2, 4]]
    assert second.ids.tolist() == list(range(6, 14)) and second.lengths.tolist() == [[8, 0]]
    assert (second.fps, second.checkpoint, second.fingerprint) == tuple(
        METADATA[name] for name in ("fps", "checkpoint", "fingerprint")
    )
    assert second.num_frames is None  # 29 frames are those of both clips


def test_a_clip_that_is_not_there_is_refused():
    with pytest.raises(IndexError):
        make().clip(2)


def test_concatenating_the_clips_gives_the_whole_back():
    tokens = make(**METADATA)
    assert same(VideoTokens.concatenate([tokens.clip(0), tokens.clip(1)], num_frames=29), tokens)
    assert VideoTokens.concatenate([tokens, tokens]).num_frames is None
    assert VideoTokens.concatenate([tokens, tokens]).ids.tolist() == 2 * list(range(14))


def test_tokens_that_do_not_belong_together_are_not_concatenated():
    with pytest.raises(ValueError, match="no tokens to concatenate"):
        VideoTokens.concatenate([])
    with pytest.raises(ValueError, match="a str is no VideoTokens"):
        VideoTokens.concatenate(make())
    with pytest.raises(ValueError, match="different checkpoints"):
        VideoTokens.concatenate([make(fingerprint="a"), make(fingerprint="b")])
    other = VideoTokens(torch.arange(6), torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="blocks"):
        VideoTokens.concatenate([make(), other])


@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["all", "none"])
def test_a_saved_file_loads_equal(tmp_path, metadata):
    tokens = make(**metadata)
    tokens.save(tmp_path / "clip.safetensors")
    assert same(VideoTokens.load(tmp_path / "clip.safetensors"), tokens)
    assert same(VideoTokens.load(str(tmp_path / "clip.safetensors")), tokens)
    assert names(tmp_path) == ["clip.safetensors"]


def test_no_clips_are_saved_too(tmp_path):
    nothing = VideoTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64))
    nothing.save(tmp_path / "none.safetensors")
    assert same(VideoTokens.load(tmp_path / "none.safetensors"), nothing)


def test_saving_replaces_an_older_file_and_keeps_usual_permissions(tmp_path):
    path, plain = tmp_path / "clip.safetensors", tmp_path / "plain"
    path.write_text("old")
    plain.touch()
    make().save(path)
    assert same(VideoTokens.load(path), make())
    assert path.stat().st_mode == plain.stat().st_mode  # not the 0600 of temporary files


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(ValueError, match="cannot write .*clip.safetensors") as caught:
            make().save(tmp_path / folder / "clip.safetensors")
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_a_target_that_is_a_folder_is_refused_and_leaves_no_temporary(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="cannot write .*taken"):
        make().save(tmp_path / "taken")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    "failure", [OSError(28, os.strerror(28)), tokens_evatok.SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_the_older_file_and_no_temporary(tmp_path, monkeypatch, failure):
    make(fps=5.0).save(tmp_path / "clip.safetensors")

    def half_written(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise failure

    monkeypatch.setattr(tokens_evatok, "save_file", half_written)
    with pytest.raises(ValueError, match="cannot write .*No space left on device"):
        make(fps=6.0).save(tmp_path / "clip.safetensors")
    assert names(tmp_path) == ["clip.safetensors"]
    assert VideoTokens.load(tmp_path / "clip.safetensors").fps == 5.0


@pytest.fixture
def saved(tmp_path) -> bytes:
    make(**METADATA).save(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 8, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, saved, keep):
    length = int(keep * len(saved)) if isinstance(keep, float) else keep
    (tmp_path / "cut").write_bytes(saved[:length])
    assert_refused(tmp_path / "cut", "not a readable token file")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    for content in (b"Once upon a time there was a text file.", bytes(500), bytes(range(256)) * 4):
        (tmp_path / "foreign").write_bytes(content)
        assert_refused(tmp_path / "foreign", "not a readable token file")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "there is no file")
    assert_refused(tmp_path, "not a readable token file")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model", metadata={"format": "pt"})
    assert_refused(tmp_path / "model", "holds no video tokens")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model")
    assert_refused(tmp_path / "model", "holds no video tokens")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"ids": None}, {}),
        ({"lengths": None}, {}),
        ({"ids": torch.arange(13, dtype=torch.int32)}, {}),
        ({"ids": torch.zeros(14)}, {}),
        ({"lengths": torch.tensor([14], dtype=torch.int32)}, {}),
        ({}, {"fps": "{"}),
        ({}, {"surprise": "1"}),
        ({}, {"ids": "[1]"}),
        ({}, {"fps": '"fast"'}),
        ({}, {"num_frames": "[1, 2]"}),
        ({}, {"fingerprint": "7"}),
    ],
)
def test_a_tampered_file_is_refused(tmp_path, saved, tensors, metadata):
    contents = {k: v for k, v in {**load_file(tmp_path / "whole"), **tensors}.items() if v is not None}
    save_file(contents, tmp_path / "tampered", metadata={"format": "evatok-tokens-1", **metadata})
    assert_refused(tmp_path / "tampered", "not a readable token file")


def assert_refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        VideoTokens.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
