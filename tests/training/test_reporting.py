"""training/common/reporting.py: means over a window, grids of frames, the picture of the log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training.common.reporting import MovingMean, read_log, save_grid, save_loss_curve


def test_means_of_the_last_values():
    means = MovingMean(2)
    for value in (1.0, 2.0, 4.0):
        means.add({"l1": torch.tensor(value)})
    means.add({"l2": torch.tensor(0.5)})
    assert means.values() == {"l1": 3.0, "l2": 0.5}


def test_a_grid_has_originals_above_reconstructions(tmp_path):
    levels = torch.arange(8, dtype=torch.uint8) * 20  # of the frames
    originals = (levels[None] + torch.tensor([[0], [100]], dtype=torch.uint8))[..., None, None, None]
    originals = originals.expand(2, 8, 3, 16, 24).contiguous()
    reconstructions = [(255 - clip[None]).float() / 127.5 - 1 for clip in originals]  # batches of one
    save_grid(originals, reconstructions, tmp_path / "samples" / "step.png", frames=3)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step.png"))
    assert picture.shape == (4 * 16, 3 * 24, 3)
    tiles = picture.reshape(4, 16, 3, 24, 3)
    assert tiles.std((1, 3, 4)).max() == 0
    rows = tiles[:, 0, :, 0, 0].tolist()
    assert rows == [[0, 60, 140], [255, 195, 115], [100, 160, 240], [155, 95, 15]]


def test_a_grid_shows_the_first_clips_only(tmp_path):
    originals = torch.zeros(20, 4, 3, 8, 8, dtype=torch.uint8)
    save_grid(originals, [torch.zeros(6, 4, 3, 8, 8)] * 2, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (4 * 8, 2 * 8 * 8)


def record(step: int, l1: float) -> dict:
    return {"step": step, "l1": l1, "perceptual": 2 * l1, "psnr": 20 + step, "codebook_use": 0.5}


@pytest.mark.parametrize(
    "records",
    [
        [record(1, 0.5), record(2, 0.4), {"step": 2, "val/psnr_8": 20.5, "val/psnr_128": 21.0}, record(2, 0.3)],
        [{"step": 2, "val/psnr_8": 20.5}],
        [{"step": 1, "l1": 0.5, "psnr": 3.0, "codebook_use": 0.1}],
        None,
    ],
    ids=["resumed", "validation only", "training only", "no log"],
)
def test_the_loss_curve(tmp_path, records):
    if records is not None:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    save_loss_curve(tmp_path / "log.jsonl", tmp_path / "curve.png")
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("L"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.min() < 100
    assert {path.name for path in tmp_path.iterdir()} <= {"log.jsonl", "curve.png"}  # nothing half-written is left


def test_a_line_that_was_left_unfinished_is_passed_over(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    assert read_log(log) == []
    log.write_text('{"step": 1, "l1": 0.5}\n{"step": 2, "l1\n[]\n{"l1": 0.5}\n{"step": 3}\n')
    assert read_log(log) == [{"step": 1, "l1": 0.5}, {"step": 3}]
    assert [f"{log}, line {number}" in caplog.text for number in range(1, 6)] == [False, True, True, True, False]


def test_a_resumed_run_is_drawn_as_one_without_interruption(tmp_path):
    whole = [record(1, 0.5), record(2, 0.3), record(3, 0.2)]
    for name, records in {"a": whole, "b": [whole[0], record(2, 0.9), *whole[1:]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        save_loss_curve(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"))
