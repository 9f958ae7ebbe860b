"""benchmarks/speed/tokenizer.py: a whole run in small, and where its lengths come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import machine
from benchmarks.speed import tokenizer as speed
from benchmarks.speed.systems import memory_of
from evatok_hf import EvatokConfig, VideoTokens  # noqa: E402

PAPER = EvatokConfig.from_preset("paper")
TINY = EvatokConfig.from_preset("tiny")


def save_tokens(path: Path, lengths: list[list[int]], side: int) -> str:
    tokens = torch.tensor(lengths)
    VideoTokens(torch.zeros(int(tokens.sum()), dtype=torch.int64), tokens, height=side, width=side).save(path)
    return str(path)


def test_the_nearest_assignment_is_taken_and_of_these_the_most_even():
    space = PAPER.assignment_space
    assert speed.even_assignment(space, 1024) == [256] * 4
    assert speed.even_assignment(space, 774) == [256, 256, 128, 128]
    assert speed.even_assignment(space, 10**6) == [512] * 4


def test_lengths_of_a_token_file_go_by_position(tmp_path):
    path = save_tokens(tmp_path / "a.safetensors", [[8, 128, 32, 64]], side=64)
    assert speed.real_lengths(path, PAPER).tolist() == [[32, 512, 128, 256]]
    assert speed.real_lengths(path, TINY).tolist() == [[8, 128, 32, 64]]
    own = save_tokens(tmp_path / "b.safetensors", [[512, 32, 32, 64]], side=128)
    assert speed.real_lengths(own, PAPER).tolist() == [[512, 32, 32, 64]]
    other = save_tokens(tmp_path / "c.safetensors", [[8, 8, 8, 8]], side=32)
    with pytest.raises(ValueError, match="tokens of 32 pixels"):
        speed.real_lengths(other, PAPER)


def test_the_router_gives_the_lengths_of_videos():
    lengths = speed.real_lengths(None, PAPER)  # the bundled video, 250 frames
    assert lengths.shape == (15, 4) and len(lengths.unique(dim=0)) > 1
    assert set(lengths.unique().tolist()) <= set(PAPER.block_lengths)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--preset", "huge"], "unknown preset"),
        (["--device", "cuda:99"], "choose cpu"),
    ],
)
def test_wrong_options_are_told(option, message):
    with pytest.raises(ValueError, match=message):
        speed.main(option)


def test_a_whole_run(tmp_path, capsys):
    path = tmp_path / "speed.json"
    report = speed.main(["--preset", "tiny", "--quick", "--device", "cpu", "--output", str(path)])
    assert json.loads(path.read_text()) == report
    speeds = report["speeds"]
    assert list(speeds) == ["128", "774", "2048", "larp", "adaptok"]
    assert [speeds[name]["tokens"] for name in speeds] == [32, 192, 512, 256, 192]
    for row in speeds.values():
        for side in ("encode", "decode"):
            assert row[side]["clips_per_second"] > 0 and row[side]["bound"] in ("compute", "memory")
    flops = {name: row["encode"]["tflop_per_clip"] for name, row in speeds.items()}
    assert flops["128"] < flops["774"] < flops["2048"] < flops["larp"] < flops["adaptok"]
    assert report["choosing"]["adaptok"]["tflop_per_clip"] > 2 * flops["adaptok"]  # four passes over all tokens
    assert report["packed"]["tokens"] <= report["packed"]["padded_tokens"]
    assert len(report["packed"]["lengths"]) == 3
    assert [(row["clips"], row["way"]) for row in report["ways"][-2:]] == [(3, "clip by clip"), (3, "together")]
    launched = [row["encode"]["launches_per_clip"] for row in report["ways"][-2:]]
    assert launched[1] < launched[0] and all(0 < row["decode"]["of_peak"] for row in report["ways"])
    assert len(report["aims"]) == 8 and all(row["measured"] > 0 for row in report["aims"].values())
    out = capsys.readouterr().out
    assert "launches a clip" in out and "together" in out and "matrix product reaches" in out


def test_memory_is_measured_with_the_weights():
    figures = machine.in_fresh_process(memory_of, "adaptok", "tiny", [[32, 8, 8, 8]], "cpu", torch.float32)
    # 10 million weights of 4 bytes, and what a dense mask and its layers need on top.
    assert figures["before"] > 40e6 and figures["encode"] > figures["before"] + 1e6
