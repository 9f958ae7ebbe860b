"""`evatok generate`, `predict`, `classes` and `export-llama` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_samples import CLASSES, make_generator, with_generator
from test_cli import refused, run, run_json
from transformers import LlamaForCausalLM
from video_samples import encode as write_sample
from video_samples import moving_frames

import evatok_hf
from evatok_hf import EvatokForCausalLM, VideoTokens
from evatok_hf.export.llama import RequestGrammar, vocabulary
from evatok_hf.models.modeling_evatok_generator import BlockGrammar, Prompt
from evatok_hf.video import read_video

SHORT = ["--budget", 32]  # the shortest clips, for speed


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return with_generator(checkpoint, tmp_path_factory.mktemp("generate") / "with-generator")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """42 frames at 25 fps, which are 21 at the generator's 12.5."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return write_sample(path, moving_frames(42), options={"crf": "10"})


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_grid_a_sheet_and_tokens(folder, tmp_path):
    out, sheet, codes = tmp_path / "new" / "g.mp4", tmp_path / "sheet.png", tmp_path / "t.safetensors"
    options = ["--class", "walk", "-c", "run", "-n", 2, "--out", out, "--picture", sheet, "--tokens", codes]
    report = run_json("generate", *options, *SHORT, "--model", folder)
    frames, fps = read_video(out)
    assert len(frames) == report["frames"] == 16 and fps == report["fps"] == 12.5
    assert frames.shape[1] > 2 * 192 and frames.shape[2] > 2 * 192  # a row a class
    bars = np.abs(frames[3].astype(int) - frames[4])[310:322].max(-1) > 40  # the dark bar moves to the next block
    assert bars[:, 14:62].any() and bars[:, 62:110].any() and not bars[:, 120:200].any()
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 700 and image.height > 400
    assert [sample["class"] for sample in report["samples"]] == ["walk", "walk", "run", "run"]
    assert report["tokens"] == 128 and all(sample["lengths"] == [8] * 4 for sample in report["samples"])
    tokens = VideoTokens.load(codes)
    assert len(tokens) == 4 and tokens.fps == 12.5
    assert run_json("decode", codes, tmp_path / "d.mp4", "--model", folder)["frames"] == 64


def test_a_folder_gets_a_video_a_sample(folder, tmp_path):
    options = ["-c", "run", "-n", 2, "--out", tmp_path / "many", "--fps", 10, *SHORT, "--model", folder]
    report = run_json("generate", *options, "--seed", 3)
    assert sorted(os.listdir(tmp_path / "many")) == ["run-000.mp4", "run-001.mp4"]
    assert [sample["output"] for sample in report["samples"]] == [
        str(tmp_path / "many" / name) for name in ("run-000.mp4", "run-001.mp4")
    ]
    frames, fps = read_video(tmp_path / "many" / "run-001.mp4")
    assert frames.shape == (16, 64, 64, 3) and fps == 10
    again = run_json("generate", *options, "-n", 1, "--out", tmp_path / "one", "--seed", 3)
    assert again["samples"][0]["seed"] == report["samples"][0]["seed"] and len(again["samples"]) == 1
    assert np.array_equal(
        read_video(tmp_path / "one" / "run-000.mp4")[0], read_video(tmp_path / "many" / "run-000.mp4")[0]
    )


def test_a_seed_is_a_sample(folder, tmp_path):
    def tokens(*options):
        path = tmp_path / "t.safetensors"
        run_json("generate", "--tokens", path, *options, *SHORT, "--model", folder)
        return VideoTokens.load(path).ids.tolist()

    first = tokens("-n", 1, "--class", "jump")
    assert first == tokens("-n", 2, "--class", "jump", "--batch-size", 1)[:32]
    assert first != tokens("-n", 1, "--class", "jump", "--seed", 1) and first != tokens("-n", 1)
    greedy = [tokens("-n", 1, "--temperature", 0, "--seed", seed, "--lengths", "8,8,0,8") for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_the_table_for_people(folder, tmp_path):
    result = run("generate", "-c", "walk", "-n", 1, "--tokens", tmp_path / "t", *SHORT, "--model", folder)
    assert result.exit_code == 0 and result.stderr == "" and "32 tokens: 8 8 8 8" in result.stdout
    quiet = run("generate", "-c", "walk", "-n", 1, "--tokens", tmp_path / "t", *SHORT, "--model", folder, "--quiet")
    assert quiet.output == ""


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--class", "wlak"], 1, ["wlak", "walk", "evatok classes"]),
        (["--guidance", 2], 1, ["class"]),
        (["--lengths", "8,9,8,8"], 2, ["--lengths", "[8, 16, 32, 64, 128]"]),
        (["--lengths", "8,8"], 2, ["--lengths", "4"]),
        (["--lengths", "x"], 2, ["commas"]),
        (["--budget", 20], 2, ["--budget", "32"]),
        (["--top-p", 0], 2, ["--top-p"]),
        (["--count", 0], 2, ["--count"]),
        (["--picture", "{folder}/p.tex"], 1, [".png"]),
        (["--picture", "{folder}/o.mp4"], 2, ["same file"]),
        (["--out", "{folder}/o.docx"], 1, [".docx"]),
        (["--model", "/no/such/folder"], 1, ["/no/such/folder"]),
    ],
)
def test_a_bad_option_is_one_line(options, code, words, folder, tmp_path):
    options = [str(option).format(folder=tmp_path) for option in options]
    given = [] if "--model" in options else ["--model", folder]
    given += [] if "--out" in options else ["--out", tmp_path / "o.mp4"]
    line = refused(run("generate", *options, *given), code)
    assert all(word in line for word in words), line
    assert os.listdir(tmp_path) == []


def test_nothing_to_write_and_no_generator(folder, checkpoint, tmp_path):
    assert "--out" in refused(run("generate", "--model", folder), 2)
    for command in (["generate", "--out", tmp_path / "o.mp4"], ["classes"], ["export-llama", tmp_path / "l"]):
        assert "no generator" in refused(run(*command, "--model", checkpoint))
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("evatok_hf.pictures.clips.save_picture", fail)
    options = ["--out", tmp_path / "o.mp4", "--picture", tmp_path / "p.png", "-n", 1, *SHORT, "--model", folder]
    assert run("generate", *options).exit_code == 130 and os.listdir(tmp_path) == []


# --- predict ----------------------------------------------------------------------------------------------------------


def test_a_prediction_beside_the_truth(folder, video, tmp_path):
    out, picture = tmp_path / "p.mp4", tmp_path / "p.png"
    options = ["--class", "run", "--budget", 56, "--scale", 1, "--model", folder]
    report = run_json("predict", video, "--out", out, "--picture", picture, *options)
    frames, fps = read_video(out)
    assert frames.shape == (16, 64, 64, 3) and fps == report["fps"] == 12.5
    truth = read_video(video)[0][::2, :, 8:56]  # a centre crop, then enlarged
    assert (
        report["known"] == 5
        and report["predicted"] == 11
        and report["clips"] == [{"lengths": [32, 8, 8, 8], "tokens": 56}]
    )
    large = np.stack(
        [np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR)) for frame in truth]
    )
    known = np.abs(frames[:5].astype(int) - large[:5]).mean()
    assert known < 6 and known < np.abs(frames[8].astype(int) - large[8]).mean()
    assert list(report["psnr_after"]) == list(report["psnr_after_copying"]) == ["4", "8", "11"]
    error = ((large[4].astype(float) - large[8]) / 255) ** 2
    assert report["psnr_after_copying"]["4"] == pytest.approx(-10 * np.log10(error.mean()), abs=0.5)
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 800
    table = run("predict", video, *options)
    assert "PSNR after 4 frames" in table.stdout and "copying" in table.stdout and table.stderr == ""


def test_the_more_is_held_the_nearer_frames_stay_to_the_known_one(folder, video, tmp_path):
    changes = []
    for number, more in enumerate((["--hold", 0], ["--hold", 0.5], [], ["--hold", 1])):
        out = tmp_path / f"{number}.mp4"
        run_json("predict", video, "--out", out, "--budget", 56, "--scale", 1, "--model", folder, *more)
        frames = read_video(out)[0].astype(int)
        changes.append(np.abs(frames[5:] - frames[4]).mean())
    assert changes == sorted(changes, reverse=True) and changes[3] < 0.7 * changes[0]


def test_a_video_goes_on(folder, video, tmp_path):
    report = run_json(
        "predict", video, "--continue", "--out", tmp_path / "p.mp4", "--budget", 56, "--scale", 1, "--model", folder
    )
    frames, _ = read_video(tmp_path / "p.mp4")
    assert len(frames) == report["frames"] == 21 + 11 and report["psnr_after"] is None
    run_json("reconstruct", video, tmp_path / "r.mp4", "--fps", 12.5, "--uniform", 8, "--model", folder)
    assert len(read_video(tmp_path / "r.mp4")[0]) == 21
    moved = np.abs(np.diff(frames[:21].astype(int), axis=0)).mean((1, 2, 3))
    assert (moved > 0).all()


def test_the_rate_the_stride_and_what_is_too_short(folder, video):
    options = ["--frames", 6, "--budget", 56, "--decoded", "--model", folder]
    report = run_json("predict", video, *options, "--stride", 20)
    assert report["fps"] == 1.25 and report["known"] == 3 and report["psnr_after"] is None
    assert run_json("predict", video, *options, "--fps", 5, "--known", 4)["known"] == 4
    for wrong, word in (
        (["--known", 16], "1 to 15"),
        (["--frames", 5], "--frames"),
        (["--fps", 5, "--stride", 2], "--stride"),
        (["--decoded", "--hold", 0.5], "--hold"),
        (["--hold", 2], "--hold"),
    ):
        result = run("predict", video, "--model", folder, *wrong)
        assert word in refused(result, result.exit_code)
    assert "no such file" in refused(run("predict", "/no/video.mp4", "--model", folder))


# --- the others -------------------------------------------------------------------------------------------------------


def test_classes_and_info(folder):
    assert run("classes", "--model", folder).stdout.split() == CLASSES
    assert run_json("classes", "--model", folder) == {"classes": CLASSES, "count": 3}
    generator = run_json("info", folder)["generator"]
    assert generator["classes"] == 3 and generator["fps"] == 12.5 and generator["known_frames"] == 5
    assert generator["fingerprint"] == EvatokForCausalLM.from_pretrained(folder / "generator").fingerprint()
    assert "3 classes" in run("info", folder).stdout


def test_the_exported_llama_is_the_generator(folder, tmp_path):
    out = tmp_path / "new" / "llama"
    report = run_json("export-llama", out, "--model", folder, "--dtype", "float32")
    generator = EvatokForCausalLM.from_pretrained(folder / "generator", dtype=torch.float32).eval()
    llama = LlamaForCausalLM.from_pretrained(out).eval()
    ids = generator.codec.encode([8] * 4, torch.arange(32), Prompt(1))[None]
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, generator(ids).logits)
    words = json.loads((out / "vocabulary.json").read_text())
    assert words["class_ids"]["run"] == ids[0, 1] and words["bos_id"] == ids[0, 0]
    assert words["length_ids"]["8"] == ids[0, 2] and report["vocabulary"] == words["vocab_size"] == 77
    assert llama.generation_config.eos_token_id == words["eos_id"] and llama.generation_config.max_new_tokens == 517
    assert "already" in refused(run("export-llama", out, "--model", folder))
    assert os.listdir(out.parent) == ["llama"]


@pytest.mark.parametrize("layout", ["length-first", "end-of-block"])
@pytest.mark.parametrize("limits", [{}, {"budget": 15}, {"lengths": [2, 0, 4, 0], "budget": 12}, {"known": [4]}])
def test_the_grammar_of_a_request_is_the_block_grammar(layout, limits):
    config = make_generator(layout=layout, block_lengths=[2, 4, 8], codebook_size=16).config
    known = limits.get("known")
    options = {name: value for name, value in limits.items() if name != "known"}
    chance = torch.Generator().manual_seed(0)
    for _ in range(4):
        whole = BlockGrammar(config, 1, **options, known=None if known is None else torch.tensor([known]))
        single = RequestGrammar(json.loads(json.dumps(vocabulary(config))), **limits)
        sequence = torch.zeros(1, 1, dtype=torch.int64)
        while not single.done:
            codes, others = single.allowed()
            mask = single.mask_(torch.zeros(config.vocab_size)) == 0
            assert torch.equal(mask, whole.advance(sequence)[0])
            assert mask[: config.codebook_size].all() == codes and all(mask[other] for other in others)
            choice = mask.nonzero()[:, 0][torch.randint(int(mask.sum()), (1,), generator=chance)]
            single.take(int(choice))
            sequence = torch.cat([sequence, choice[None]], dim=1)
        assert single.allowed() == (False, [config.pad_token_id])


def test_the_grammar_of_a_request_refuses_what_no_clip_can_be():
    words = vocabulary(make_generator().config)
    for wrong, message in (
        ({"lengths": [8, 9, 0, 0]}, "9"),
        ({"lengths": [8]}, "give 4 lengths"),
        ({"budget": 31}, "at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            RequestGrammar(words, **wrong)


def test_help_answers_without_torch_and_diffusers():
    code = (
        "import sys; from evatok_hf.cli.commands import app\n"
        "try: app(['generate', '--help'], prog_name='evatok')\n"
        "finally: assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(evatok_hf.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "--guidance" in result.stdout, result.stderr
