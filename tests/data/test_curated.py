"""Curated clips on disk: what is read again, cut again, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from curated_samples import make_proxy, make_videos, options, run_curation
from video_samples import encode, moving_frames

from evatok_hf import AssignmentSpace
from evatok_hf.allocation.search import SearchResult
from evatok_hf.data.curated import SHARDS, CuratedClips, features, list_shards, make_rows, read_note
from evatok_hf.data.streaming import ClipConfig, ClipStream, collate

SPACE = AssignmentSpace((2, 4), 2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos") / "all", 3, damaged=False)


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    crops = ["--clips_per_video=2", "--freeze_probability=0.5", "--scale", 0.5, 1, "--strides", 1, 2]
    return run_curation(options(root / "curated", videos, make_proxy(root / "proxy"), *crops))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "curated"))


def test_clips_are_cut_again_as_they_were(finished, videos):
    stream = ClipStream(
        videos,
        config=ClipConfig(4, 32, strides=(1, 2), scale=(0.5, 1.0), freeze_probability=0.5, clips_per_video=2),
        shuffle_buffer=256,
    )
    expected = np.stack([item["pixel_values_videos"].numpy() for item, _ in zip(stream, range(6), strict=False)])
    assert np.array_equal(CuratedClips.load(finished).cut([videos]), expected)


def test_rows_hold_what_was_measured(videos):
    batch = collate([item for item, _ in zip(ClipStream(videos, config=ClipConfig(4, 32)), range(2), strict=False)])
    mse, distance = torch.rand(2, 6), torch.rand(2, 6)
    rows = make_rows(batch, SearchResult(SPACE, mse, distance))
    assert [row["source"] for row in rows] == batch["source"] and len({row["clip_id"] for row in rows}) == 2
    assert np.array_equal(rows[1]["nodes"][:, 0], distance[1]) and np.array_equal(rows[1]["nodes"][:, 1], mse[1])
    assert rows[0]["table"][3, 0] == pytest.approx(float(distance[0, [1, 5]].mean()), abs=1e-3)


def test_a_shard_is_written_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    rows, space = CuratedClips.load(finished).rows, CuratedClips.load(finished).space
    path, write = SHARDS.path(tmp_path, 3, 7), pq.ParquetWriter.write_table

    def full_disk(writer, table, **kwargs):
        write(writer, table, **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full_disk)
        with pytest.raises(ValueError, match="No space"):
            SHARDS.write(path, list(rows), features(space), {"clips": 6})
    assert list((tmp_path / "data").iterdir()) == []
    SHARDS.write(path, list(rows), features(space), {"clips": 6})
    # What a killed process left is no shard.
    path.with_name(f".{path.name}.partial").write_bytes(path.read_bytes()[:500])
    assert list_shards(tmp_path) == list_shards(tmp_path, 3) == [path] and list_shards(tmp_path, 0) == []
    assert read_note(path) == {"clips": 6} and path.name == "curated-0003-000007.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(ValueError, match="is no shard of curated clips"):
        read_note(path)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_without_a_readable_summary_is_not_finished(folder, text):
    (folder / "curation.json").unlink()
    if text is not None:
        (folder / "curation.json").write_text(text)
    with pytest.raises(ValueError, match="no finished curation.*--resume true"):
        CuratedClips.load(folder)


def test_a_folder_that_lacks_shards_is_not_finished(folder):
    list_shards(folder)[1].unlink()
    with pytest.raises(ValueError, match="should hold 6 clips and holds 4; fetch it again"):
        CuratedClips.load(folder)
    shutil.rmtree(folder / "data")
    with pytest.raises(ValueError, match="holds 0"):
        CuratedClips.load(folder)


@pytest.mark.parametrize("space", [{"block_lengths": [2, 4]}, {"num_blocks": 3}])
def test_tables_of_another_space_are_refused(folder, space):
    summary = json.loads((folder / "curation.json").read_text())
    (folder / "curation.json").write_text(json.dumps({**summary, **space}))
    with pytest.raises(ValueError, match="of another space") as caught:
        CuratedClips.load(folder)
    assert "\n" not in str(caught.value)


def test_sources_that_do_not_fit_are_refused(finished, videos, tmp_path):
    curated = CuratedClips.load(finished)
    with pytest.raises(ValueError, match=r"curated from 1 source\(s\).*in that order"):
        curated.cut([videos, videos])
    with pytest.raises(ValueError, match="no folder"):
        curated.cut([tmp_path / "nothing"])
    moved = Path(shutil.copytree(videos, tmp_path / "moved"))
    encode(moved / "another.mp4", moving_frames(10, 32, 40))
    assert np.array_equal(curated.cut([moved]), curated.cut([videos]))
    (moved / "v1.mp4").rename(tmp_path / "v1.mp4")
    with pytest.raises(ValueError, match=r"1 curated video\(s\) are not there any more, first v1.mp4 of source 0"):
        curated.cut([moved])
    for change in (lambda path: path.write_bytes(b"no video"), lambda path: encode(path, moving_frames(4, 32, 40))):
        change(moved / "v1.mp4")
        with pytest.raises(ValueError, match="v1.mp4 cannot be read any more"):
            curated.cut([moved])
