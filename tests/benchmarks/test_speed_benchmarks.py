"""The speed benchmarks that are small, and the one that runs them all: reports, aims, pictures, what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from video_samples import make_video, moving_frames

from benchmarks.common.benchmark import aim
from benchmarks.speed import all as speed
from benchmarks.speed import loading, search
from evatok_hf.models.files_evatok import write_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MARKS = ("<!-- made by: benchmarks/speed/all.py --page PAGE -->", "<!-- end -->")
ABOUT = {
    "command": "python benchmarks/x.py",
    "machine": {
        "gpu": None,
        "cpu": "A processor",
        "cores": 2,
        "threads": 2,
        "instructions": "AVX2",
        "dtype": "float32",
    },
}
ABOUT["machine"]["torch"] = "2.0"
SPEEDS = {
    "parameters": 145e6,
    "encode": {"clips_per_second": 2.0, "of_peak": 0.5, "tflop_per_clip": 0.1, "rounds": 5},
    "decode": {"clips_per_second": 4.0, "of_peak": 0.25, "tflop_per_clip": 0.2, "rounds": 5},
    "clips_per_second": 1.3,
}
REPORTS = {
    "tokenizer": {
        **ABOUT,
        "speeds": {
            "128": {"name": "EVATok", "tokens": 128, **SPEEDS},
            "774": {"name": "EVATok", "tokens": 774, **SPEEDS},
            "larp": {"name": "LARP-L", "tokens": 1024, **SPEEDS},
            "adaptok": {"name": "AdapTok", "tokens": 774, **SPEEDS},
        },
        "packed": {
            "lengths": [[8, 8, 8, 8]] * 3,
            "tokens": 32.0,
            "padded_tokens": 48,
            "packed_seconds": 1.0,
            "padded_seconds": 1.5,
        },
        "ways": [
            {
                "clips": 32,
                "way": way,
                "encode": {"clips_per_second": 2.0, "of_peak": 0.5, "launches_per_clip": 9.0},
                "decode": {"clips_per_second": 2.0, "of_peak": 0.5, "launches_per_clip": 9.0},
            }
            for way in ("clip by clip", "together")
        ],
        "choosing": {
            name: {"with_encode_clips_per_second": 1.5, "tflop_per_clip": 0.1} for name in ("evatok", "adaptok")
        },
        "peak": {"flops": 1e11, "bandwidth": 1e10},
        "settings": {"preset": "paper", "batch_size": 1},
        "memory": {name: {"before": 2**29, "encode": 2**30, "decode": 2**31} for name in ("evatok", "larp", "adaptok")},
        "aims": {"shortest_over_longest": aim("the shortest", 0.2, "<=", 0.45)},
    },
    "sampling": {
        **ABOUT,
        "rows": [
            {
                "implementation": "eager",
                "batch": 1,
                "guidance": 1.0,
                "seconds_per_clip": 2.0,
                "weight_bandwidth": 0.25,
                "tokens_per_second": 9.0,
                "ms_per_step": 3.5,
                "times_eager": 1.0,
                "of_roofline": 0.125,
            }
        ],
        "copy_bytes_per_second": 1e10,
        "matmul_flops": 1e11,
        "aims": {"compiled_over_eager": aim("compiled", 1.1, ">=", 1.3)},
    },
    "search": {
        **ABOUT,
        "clips": 2,
        "assignments": 625,
        "seconds": 1.0,
        "of_peak": 0.3,
        "brute_force_seconds": 4.0,
        "brute_force_of_peak": 0.5,
        "largest_difference": 1e-7,
        "aims": {},
    },
    "loading": {
        **ABOUT,
        "rows": [{"num_workers": 1, "loader_clips_per_second": 80.0, "clips_per_second": 8.0, "data_wait": 0.05}],
        "aims": {},
    },
    "memory": {
        **ABOUT,
        "memory": [
            {
                "seconds": 10,
                "frames": 120,
                "tokens": 99,
                "encode": {"peak_mib": 5.0, "loaded_mib": 3.0},
                "decode": {"peak_mib": 6.0, "loaded_mib": 3.0},
            }
        ],
        "aims": {},
    },
    "bulk": {
        **ABOUT,
        "workers": 2,
        "threads": 1,
        "loop_clips_per_second": [3.0, 3.5, 2.5],
        "rows": [
            {
                "worker_killed": killed,
                "clips": 2000,
                "of_peak": 0.25,
                "clips_per_second_steady": 5.5,
                "clips_per_second_with_start": 5.0,
                "of_the_loops_steady": 0.9,
            }
            for killed in (False, True)
        ],
        "aims": {},
    },
}


@pytest.fixture
def videos(tmp_path) -> Path:
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos", frames=moving_frames(40))
    return tmp_path / "videos"


def save_reports(folder: Path, *parts: str) -> Path:
    folder.mkdir()
    for part in parts:
        write_json(folder / f"{part}.json", REPORTS[part])
    return folder


def test_reports_that_are_there_make_one_table_and_one_picture(tmp_path, capsys):
    folder, page = save_reports(tmp_path / "speed", *REPORTS), tmp_path / "page.md"
    page.write_text(f"# Speed\n\n{MARKS[0]}\nolder results\n{MARKS[1]}\nMore.\n")
    report = speed.main(["--data", "unused", "--output", str(folder), "--page", str(page)])
    assert json.loads((folder / "speed.json").read_text()) == report and set(report["parts"]) == set(REPORTS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == [["the shortest", "<= 0.45", "0.2", "yes"], ["compiled", ">= 1.3", "1.1", "no"]]
    assert Image.open(folder / "speed.png").size[0] > 1000
    text = page.read_text()
    assert text.startswith("# Speed") and text.endswith("\nMore.\n") and "older results" not in text
    words = " ".join(text.split())
    assert "| the shortest | <= 0.45 | 0.2 | yes |" in words
    assert "| `evatok tokenize-dataset`, a worker killed in the middle | 5.5 | 5.0 |" in words
    assert (tmp_path / "page.png").is_file() and "(page.png)" in text


def test_a_part_that_fails_leaves_the_others_and_is_named(tmp_path, capfd):
    folder = save_reports(tmp_path / "speed", "search")
    with pytest.raises(ValueError, match="^loading failed; the same command runs them again"):
        speed.main(["--data", str(tmp_path / "nowhere"), "--parts", "search", "loading", "--output", str(folder)])
    assert json.loads((folder / "speed.json").read_text())["parts"] == {"search": REPORTS["search"]}
    printed = capfd.readouterr()
    assert "benchmarks/speed/loading.py" in printed.out and "nowhere" in printed.err and "Traceback" not in printed.err


@pytest.mark.slow
def test_search_agrees_with_brute_force(checkpoint, videos, capsys):
    report = search.main(["--model", f"{checkpoint}/tokenizer", "--data", str(videos), "--clips", "1"])
    assert report["clips"] == 1 and report["largest_difference"] < 1e-4 and report["ratio"] > 0
    assert "625 assignments" in capsys.readouterr().out


@pytest.mark.slow
def test_waiting_for_clips_is_measured(videos, tmp_path):
    for index in range(7):
        shutil.copy(next(videos.iterdir()), videos / f"{index}.mp4")
    options = ["--clips", "8", "--steps", "4", "--num_workers", "1", "--output", str(tmp_path / "report.json")]
    (row,) = loading.main(["--data", str(videos), *options])["rows"]
    assert row["loader_clips_per_second"] > 0 and row["clips_per_second"] > 0 and 0 <= row["data_wait"] <= 1


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("speed", ["--parts", "tokenizer", "typing"], "--parts must be among"),
        ("speed", [], "`loading` needs --data"),
        ("speed", ["--data", "x", "--output", "/dev/null/x"], "cannot write"),
        ("search", ["--clips", "0"], "must be at least 1"),
        ("search", ["--data", "nowhere"], "nowhere"),
        ("loading", ["--data", "x", "--config", "nowhere"], "--config must be one of .*tokenizer_tiny"),
        ("loading", ["--data", "x", "--steps", "1"], "--steps must be at least 2"),
    ],
)
def test_wrong_options_are_told(script, options, message):
    with pytest.raises(ValueError, match=message):
        {"speed": speed, "search": search, "loading": loading}[script].main(options)


@pytest.mark.slow
def test_all_of_them_in_small(videos, tmp_path):
    for index in range(7):
        shutil.copy(next(videos.iterdir()), videos / f"{index}.mp4")
    command = [
        sys.executable,
        str(BENCHMARKS / "speed" / "all.py"),
        "--quick",
        "--device",
        "cpu",
        "--data",
        str(videos),
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "speed")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "speed" / "speed.json").read_text())["parts"]) == set(speed.PARTS)
