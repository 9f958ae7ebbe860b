"""`evatok route`, and the choice of lengths on the other commands, as a user meets them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image
from router_samples import with_router, with_two_candidates
from test_cli import refused, run, run_json
from video_samples import make_video, moving_frames

from evatok_hf import EvatokModel, VideoTokenizer, VideoTokens


@pytest.fixture(scope="module")
def routed(checkpoint, tmp_path_factory):
    return with_router(checkpoint, tmp_path_factory.mktemp("routed") / "random-a")


@pytest.fixture(scope="module")
def searchable(checkpoint, tmp_path_factory):
    """16 assignments, and a router that names a metric and its bounds."""
    plain = with_two_candidates(checkpoint, tmp_path_factory.mktemp("plain") / "plain")
    told = {"distance": "perceptual-effnet-lite0", "distance_low": 0.2, "distance_high": 2.0}
    return with_router(plain, tmp_path_factory.mktemp("searchable") / "two", **told)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """40 frames of 64 x 48 at 25 fps: two full clips and a tail of 8."""
    return make_video(tmp_path_factory.mktemp("video"), frames=moving_frames(40))


# --- route ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quality": 1.7}, {"budget": 200}, {"budget_per_clip": 64}, {"uniform": 8}])
def test_json_says_what_python_says(options, video, routed, monkeypatch):
    tokenizer = VideoTokenizer.from_pretrained(routed)
    python = {"lengths" if name == "uniform" else name: value for name, value in options.items()}
    expected = list(tokenizer.route(video, **python))
    monkeypatch.setattr(EvatokModel, "decode", lambda *_: pytest.fail("the decoder ran"))
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    report = run_json("route", video, *flags, "--model", routed)
    assert report["clips"] == [
        {"start": clip.start, "end": clip.end, "lengths": clip.lengths, "tokens": clip.tokens} for clip in expected
    ]
    tokens = sum(clip.tokens for clip in expected)
    assert (report["frames"], report["fps"], report["tokens"]) == (40, 25, tokens)
    assert report["tokens_per_clip"] == tokens / 3
    assert report["share_of_uniform"] == tokens / (3 * 128) and report["share_of_maximum"] == tokens / (3 * 512)
    assert report["strategy"] == {"uniform": "uniform", "budget": "budget", "budget_per_clip": "budget"}.get(
        next(iter(options), None), "router"
    )
    assert report["quality"] == (options.get("quality", 1.2) if report["strategy"] == "router" else None)
    assert report["fingerprint"] == tokenizer.model.fingerprint()
    assert report["router_fingerprint"] == tokenizer.router.fingerprint()


def test_json_to_a_file_leaves_the_table_on_stdout(video, routed, tmp_path):
    out = tmp_path / "new" / "route.json"
    result = run("route", video, "--json", out, "--model", routed)
    assert result.exit_code == 0 and result.stderr == ""
    assert "1.28 to 1.60" in result.stdout and "share of uniform" in result.stdout
    report, printed = json.loads(out.read_text()), run_json("route", video, "--model", routed)
    assert report | {"seconds": 0} == printed | {"seconds": 0}
    assert json.loads(run("route", "--json", video, "--model", routed).stdout)["clips"] == report["clips"]
    assert json.loads(run("route", video, "--json", "-", "--model", routed).stdout)["clips"] == report["clips"]
    assert os.listdir(tmp_path / "new") == ["route.json"]


def test_the_table_names_clips_lengths_and_totals(video, checkpoint):
    result = run("route", video, "--lengths", "8,128,16,32", "--model", checkpoint)
    assert result.exit_code == 0
    assert all(text in result.stdout for text in ("0.00 to 0.64", "8 128  16  32", "▁█▁▂", "184", "552", "143.8%"))
    assert run("route", video, "--quiet", "--model", checkpoint).output == ""


def test_a_long_table_is_cut(routed, video, monkeypatch):
    monkeypatch.setattr("evatok_hf.cli.route._ROWS_IN_TABLE", 2)
    assert "1 more clips" in run("route", video, "--model", routed).stdout


def test_the_picture_shows_frames_and_bars(video, routed, sample_clip, tmp_path):
    run_json("route", video, "--out", tmp_path / "a.png", "--lengths", "8,128,8,8", "--model", routed)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    bars = (pixels == (0x25, 0x63, 0xC9)).all(-1).sum(0)  # dark pixels of each column
    assert bars.max() > 8 * bars[bars > 0].min()
    assert (pixels == (0x9D, 0xBB, 0xE6)).all(-1).any()  # the pale bars of blocks behind the end
    one_row = len(pixels)
    run_json("route", sample_clip, "--picture", tmp_path / "b.webp", "--uniform", 128, "--model", routed)
    with Image.open(tmp_path / "b.webp") as image:
        assert image.format == "WEBP" and image.height > 2 * one_row  # 16 clips wrap
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.webp"]


def test_the_picture_of_a_long_video_shows_some_clips_and_says_so(sample_clip, routed, tmp_path, monkeypatch):
    seen = {}

    def picture(clips, *arguments):
        seen.update(clips=[clip.index for clip in clips], subtitle=arguments[-1])
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("evatok_hf.pictures.clips.routing_picture", picture)
    monkeypatch.setattr("evatok_hf.cli.route._CLIPS_IN_PICTURE", 4)
    run_json("route", sample_clip, "--out", tmp_path / "a.png", "--uniform", 8, "--model", routed)
    assert seen["clips"] == [2, 6, 10, 14] and "4 of 16 clips shown" in seen["subtitle"]


# --- strategies on every command ------------------------------------------------------------------------------------


def test_encode_reconstruct_and_route_choose_alike(video, routed, tmp_path):
    for options in ([], ["--quality", 1.8], ["--budget", 300], ["--strategy", "budget", "--budget-per-clip", 100]):
        reports = [
            run_json(*command, *options, "--model", routed)
            for command in (["encode", video, tmp_path / "t.safetensors"], ["reconstruct", video], ["route", video])
        ]
        lengths = [[clip["lengths"] for clip in report["clips"]] for report in reports]
        assert lengths[0] == lengths[1] == lengths[2]
        assert VideoTokens.load(tmp_path / "t.safetensors").lengths.tolist() == lengths[0]
        assert len({(report["strategy"], report["quality"], report["budget"]) for report in reports}) == 1
        if "--budget" in options:
            assert all(report["tokens"] <= 300 for report in reports)


def test_a_video_with_adaptive_lengths_decodes_and_has_its_picture(video, routed, tmp_path):
    options = [tmp_path / "o.mp4", "--side-by-side", "--picture", tmp_path / "o.png"]
    report = run_json("reconstruct", video, *options, "--quality", 1.6, "--model", routed)
    assert report["frames"] == 40 and sorted(os.listdir(tmp_path)) == ["o.mp4", "o.png"]
    run_json("encode", video, tmp_path / "t", "--quality", 1.6, "--model", routed)
    assert run_json("decode", tmp_path / "t", tmp_path / "d.mp4", "--model", routed)["tokens"] == report["tokens"]


def test_searches_take_metric_and_bounds_from_the_router(video, searchable):
    common = ["--max-clips", 1, "--model", searchable]
    best = run_json("route", video, "--strategy", "max-proxy-reward", "--quality", 0, *common)
    assert best["clips"][0]["lengths"] == [8] * 4 and best["quality"] == 0
    assert best["metric"] == "perceptual-effnet-lite0"
    loose = run_json("reconstruct", video, "--threshold", 1000, *common)
    assert loose["clips"][0]["lengths"] == [8] * 4 and loose["strategy"] == "threshold"


def test_searches_without_a_router_are_told(video, searchable):
    common = ["--metric", "perceptual-effnet-lite0", "--max-clips", 1, "--model", searchable / "tokenizer"]
    search = ["--strategy", "max-proxy-reward", "--quality", 0, "--bounds", 0.1, 1.5]
    assert run_json("route", video, *search, *common)["clips"][0]["lengths"] == [8] * 4
    assert run_json("route", video, "--threshold", 1000, *common)["clips"][0]["lengths"] == [8] * 4


def test_info_describes_the_router(routed):
    router = run_json("info", routed)["router"]
    assert router["quality"] is None and router["parameters"] > 0
    assert "for every quality" in run("info", routed).stdout


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--strategy", "threshold"], 2, ["needs --threshold"]),
        (["--strategy", "budget"], 2, ["--budget or --budget-per-clip"]),
        (["--strategy", "fixed"], 2, ["needs --lengths"]),
        (["--strategy", "cleverness"], 2, ["unknown strategy 'cleverness'", "max-proxy-reward"]),
        (["--strategy", "uniform", "--lengths", "8,8,8,8"], 2, ["--lengths", "one length"]),
        (["--strategy", "router", "--budget", "99"], 2, ["router does not take --budget"]),
        (["--quality", "1", "--budget", "99"], 2, ["--quality and --budget contradict"]),
        (["--quality", "1", "--uniform", "8"], 2, ["--uniform", "--quality"]),
        (["--budget", "99", "--budget-per-clip", "99"], 2, ["not both"]),
        (["--quality", "2.5"], 2, ["--quality", "2"]),
        (["--quality", "nan"], 2, ["--quality"]),
        (["--budget", "0"], 2, ["--budget"]),
        (["--metric", "lpips-vgg"], 2, ["--metric says nothing by itself"]),
        (["--budget", "95"], 1, ["95 tokens are too few: 3 clip(s) need at least 96"]),
        (["--budget-per-clip", "31"], 1, ["31 tokens are too few", "at least 32"]),
        (["--threshold", "-1", "--metric", "perceptual-effnet-lite0"], 1, ["must be positive"]),
        (["--threshold", "1"], 1, ["metric"]),
        (["--threshold", "1", "--metric", "taste"], 1, ["taste", "perceptual-effnet-lite0"]),
        (["--strategy", "max-proxy-reward", "--metric", "perceptual-effnet-lite0"], 1, ["bounds"]),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, code, words, video, routed, tmp_path):
    picture = ["--picture", tmp_path / "p.png"]
    for command in (["encode", video, tmp_path / "t"], ["route", video, *picture]):
        line = refused(run(*command, *options, "--model", routed), code)
        assert all(word in line for word in words), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [["--strategy", "router"], ["--quality", "1"], ["--budget", "500"]])
def test_a_model_without_a_router_says_so(options, video, checkpoint):
    for command in ("route", "reconstruct"):
        assert "needs a router and this model has none" in refused(run(command, video, *options, "--model", checkpoint))


def test_a_router_of_other_assignments_is_one_line(video, checkpoint, tmp_path):
    other = with_router(checkpoint, tmp_path / "other", block_lengths=(8, 16))
    assert "tokenizer and router disagree" in refused(run("route", video, "--model", other))


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--out", "{folder}/a.tex"], 1, ".png"),
        (["--out", "{folder}"], 1, "{folder}"),
        (["--json", "{folder}/file/a.json"], 1, "file"),
        (["--json", "{folder}/a.json", "--out", "{folder}/a.json"], 2, "same file"),
    ],
)
def test_outputs_that_cannot_be_written_are_known_before_the_work(options, code, word, video, routed, tmp_path):
    (tmp_path / "file").write_text("")
    options = [option.format(folder=tmp_path) for option in options]
    assert word.format(folder=tmp_path) in refused(run("route", video, *options, "--model", routed), code)
    assert os.listdir(tmp_path) == ["file"]


def test_a_bad_video_is_one_line(routed, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("this is no video\n" * 50)
    assert "bad.mp4" in refused(run("route", bad, "--out", tmp_path / "p.png", "--model", routed))
    assert os.listdir(tmp_path) == ["bad.mp4"]
