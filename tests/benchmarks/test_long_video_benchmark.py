"""The benchmark of long videos: its measures on frames that are known, and a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from video_samples import make_video, moving_frames

from benchmarks.quality import long_video
from benchmarks.quality import long_video_seams as seams
from evatok_hf.video import open_video


def test_jumps_are_counted_where_they_are():
    frames = torch.zeros(40, 3, 4, 4)
    frames[16:] = 20 / 127.5  # 20 grey levels at the first seam, none at the second
    jumps = seams.by_place(seams.jumps(frames), 16)
    assert jumps.shape == (16,) and jumps[0] == pytest.approx(10) and not jumps[1:].any()
    at = seams.at_boundaries(
        {"overlap": 0, "by_place": {"jump": jumps, "jump_original": np.zeros(16), "flicker": jumps}}, 4
    )
    assert at["between clips"] == at["flicker at clips"] == pytest.approx(10)
    assert at["between blocks"] == at["inside blocks"] == 0


def test_places_of_overlapping_clips_count_from_their_own_first_frame():
    frame = torch.arange(40.0)  # clips begin at 0, 12 and 24; frames 16 to 27 are the second one's from its fifth on
    places = seams.by_place(frame, 16, 4)
    assert np.isnan(places[:4]).all() and places[4] == (4 + 16 + 28) / 3 and places[15] == (15 + 27 + 39) / 3
    jump = np.where(np.arange(16) == 13, 5.0, 1.0)  # inside the fade
    row = {"overlap": 4, "by_place": {"jump": jump, "jump_original": np.ones(16), "flicker": jump}}
    assert seams.at_boundaries(row, 4)["between clips"] == 4


def test_the_bundled_clip_is_repeated(tmp_path):
    assert long_video.write_repeated(tmp_path / "v.mp4", 300, 12) == 300
    with open_video(tmp_path / "v.mp4") as video:
        assert (video.num_frames, video.fps, video.height, video.width) == (300, 12, 68, 160)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(checkpoint):
    (row,) = long_video.measure_memory(str(checkpoint), [2], 12, 8)
    assert row["frames"] == 24 and row["tokens"] == 2 * 4 * 8
    for task in ("encode", "decode"):
        assert 50 < row[task]["loaded_mib"] <= row[task]["peak_mib"]


def test_a_small_run(checkpoint, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos", frames=moving_frames(40))
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    output, picture = tmp_path / "report.json", tmp_path / "picture.png"
    arguments = ["--seconds", "0", "--data", str(tmp_path / "videos"), "--model", str(checkpoint), "--lengths", "8"]
    long_video.main([*arguments, "--output", str(output), "--picture", str(picture)])
    report = json.loads(output.read_text())["seams"]
    assert report["videos"] == ["clip.mp4"] and picture.stat().st_size > 5000
    rows = {row["way"]: row for row in report["ways"]}
    assert list(rows) == ["apart", "apart, carry", "overlap 4, cut", "overlap 4, fade", "overlap 4, carry"]
    assert rows["apart"]["tokens_per_frame"] == pytest.approx(3 * 32 / 40)
    assert rows["overlap 4, fade"]["tokens_per_frame"] == pytest.approx(3 * 32 / 40)  # 16 + 12 + 12 frames
    assert all(len(row["by_place"]["psnr"]) == 16 for row in rows.values())
    printed = capsys.readouterr()
    assert "apart, carry" in printed.out and "broken.mp4" in printed.err
