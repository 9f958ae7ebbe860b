"""Push to a Hub and load from it, in other processes with empty caches, with the package and without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from pipeline_samples import with_generator
from router_samples import make_router
from safetensors.torch import save_file
from test_token_dataset import write as write_tokens
from tokenizer_samples import BIKES, real_frames

import evatok_hf
from evatok_hf import EvatokModel, EvatokPipeline
from evatok_hf.hub.dataset import push_dataset
from evatok_hf.hub.push import collect, push_checkpoint
from evatok_hf.models.base_evatok import write_own_card
from evatok_hf.models.checkpoint_evatok import code_files
from evatok_hf.models.modeling_evatok_generator import Prompt

SOURCE = Path(evatok_hf.__file__).parents[1]
CASES = ("push", "load", "offline", "remote", "cut", "command")


def expect(pipe: EvatokPipeline) -> dict[str, torch.Tensor]:
    """What the loaded parts must give again."""
    frames = real_frames()[0]
    video = pipe.processor(frames, return_tensors="pt").pixel_values_videos
    prompt = pipe.generator.codec.prompt(Prompt(1))[None]
    with torch.no_grad():
        tokens = pipe.tokenizer.encode(video, [8, 16, 32, 64])
        made = pipe("run", 1, seeds=[5], max_block_length=8)
        return {
            "frames": frames,
            "video": video,
            "ids": tokens.ids,
            "decoded": pipe.tokenizer.decode(tokens),
            "logits": pipe.router(video).logits,
            "drawn": made.tokens.ids,
            "frames_drawn": torch.from_numpy(made.frames),
            "prompt": prompt,
            "prompt_logits": pipe.generator(prompt).logits,
        }


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with all parts, its generator in several files, as training leaves it: without code, with a log."""
    folder = with_generator(checkpoint, tmp_path_factory.mktemp("hub") / "checkpoint")
    tokenizer = EvatokModel.from_pretrained(folder / "tokenizer")
    make_router(tokenizer.config).save_pretrained(folder / "router")
    pipe = EvatokPipeline.from_pretrained(folder)
    (folder / "generator" / "model.safetensors").unlink()
    pipe.generator.save_pretrained(folder / "generator", max_shard_size="20KB")
    assert len(list((folder / "generator").glob("*.safetensors"))) > 1
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text())
        config.pop("auto_map", None)
        path.write_text(json.dumps(config))
    (folder / "tokenizer" / "README.md").write_text(
        "---\nlicense: apache-2.0\ntags:\n  - short\nmetrics:\n  - psnr\n---\n# The tokenizer\n"
    )
    (folder / "notes.log").write_text("a log")
    pipe.set_progress_bar_config(disable=True)
    save_file({name: own.contiguous() for name, own in expect(pipe).items()}, folder.parent / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def results(whole, hub) -> dict[str, str]:
    """What each case came to: "ok" or a traceback."""
    folder = whole.parent
    write_tokens(folder / "tokens")
    shutil.copyfile(BIKES, folder / "video.mp4")  # which the card encodes
    hub.fail("POST", "/api/repos/create", "503")
    hub.fail("PUT", "/lfs/", "cut")
    hub.fail("PUT", "/lfs/", "reset")
    hub.fail("POST", "/someone/whole/commit/", "cut", after=100)
    hub.fail("POST", "/someone/interrupted/commit/", "503")
    hub.fail("GET", "/someone/interrupted/.*/model.safetensors", "cut")
    hub.fail("GET", "/someone/whole/.*/router/model.safetensors", "reset")
    hub.fail("GET", "/someone/fragile/.*/model.safetensors", "reset")
    hub.fail("GET", "/someone/fragile/.*/model.safetensors", "reset", times=10_000, after=0)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
    }
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    cases = Path(__file__).with_name("hub_cases.py")
    argv = [sys.executable, str(cases), str(folder), str(SOURCE), *CASES]
    out = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=folder)
    assert out.returncode == 0, out.stderr
    return {name: (folder / f"{name}.result").read_text() for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_in_another_process(results, case):
    assert results[case] == "ok", results[case]


def test_what_a_repository_holds(results, hub, whole):
    files = hub.files("someone/whole")
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl", ".log"))]
    assert {"model_index.json", "pipeline.py", "modeling_evatok.py", "tokenizer/modeling_evatok.py"} <= files.keys()
    assert {"generator/model.safetensors.index.json", "processor/video_preprocessor_config.json"} <= files.keys()
    assert files["router/model.safetensors"] == (whole / "router" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])
    assert data["license"] == "apache-2.0" and data["library_name"] == "evatok_hf" and data["metrics"] == ["psnr"]
    assert {"arxiv:2603.12267", "short"} <= set(data["tags"]) and data["pipeline_tag"] == "video-to-video"
    assert 'from_pretrained("someone/whole")' in card and 'subfolder="tokenizer", trust_remote_code=True' in card
    assert b"# The tokenizer" in hub.files("someone/tokenizer")["README.md"]


def test_models_in_memory_bring_this_package_s_card(results, hub):
    for name, tag in (
        ("by-itself", "feature-extraction"),
        ("router", "video-classification"),
        ("generator", "video-to-video"),
        ("pipeline", "video-to-video"),
    ):
        data = yaml.safe_load(hub.files(f"someone/{name}")["README.md"].decode().split("---")[1])
        assert (data["library_name"], data["pipeline_tag"]) == ("evatok_hf", tag)


@pytest.mark.parametrize("module", ["pipeline_evatok", "modeling_evatok", "modeling_evatok_generator"])
def test_copied_code_imports_in_no_circle(module):
    """diffusers would follow it without end, also where only type checkers import."""
    imports = {
        name.removesuffix(".py"): re.findall(r"^\s*from\s+\.(\w+)\s+import", source.decode(), re.MULTILINE)
        for name, source in code_files([module]).items()
    }
    list(TopologicalSorter(imports).static_order())


def test_the_code_of_a_checkpoint_is_few_files(whole):
    files = [name for name in collect(whole, "someone/x").files if name.endswith(".py") and "/" not in name]
    assert len(files) <= 12, files  # with pipeline.py, which names the others


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "evatok"}')
    write_own_card(tmp_path, "someone/x")
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# Mine\n")
    write_own_card(tmp_path, "someone/x")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").write_text("This model card has been automatically generated.")
    write_own_card(tmp_path, "someone/x")
    assert 'AutoModel.from_pretrained("someone/x", trust_remote_code=True)' in (tmp_path / "README.md").read_text()


def test_the_weights_of_an_earlier_push_go(whole, tmp_path):
    found = collect(whole, "someone/x")
    (shard, *_) = (path for path in found.files if path.startswith("generator/") and path.endswith(".safetensors"))
    assert not found.replaces(shard.replace("model-", "notes/model-"))
    assert found.replaces("generator/model.safetensors") and found.replaces("router/model.safetensors.index.json")
    kept = ("other/model.safetensors", "generator/notes.md", "model.safetensors", "last-checkpoint/optimizer.bin")
    assert not any(map(found.replaces, kept))
    (tmp_path / "model.safetensors").touch()
    found.add_state(tmp_path)
    assert "last-checkpoint/model.safetensors" in found.files and found.replaces("last-checkpoint/optimizer.bin")


def test_repositories_that_are_private_and_branches(results, hub):
    assert hub.repositories["model", "someone/secret"].private
    assert hub.repositories["model", "someone/by-command"].private
    assert not hub.repositories["model", "someone/whole"].private
    assert "config.json" in hub.files("someone/branches", branch="other")
    assert "config.json" not in hub.files("someone/branches")


def test_the_folder_stays_as_it_is(results, whole):
    assert not list(whole.rglob("*.py"))
    assert "auto_map" not in json.loads((whole / "tokenizer" / "config.json").read_text())


def test_folders_that_are_not_pushed(whole, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        push_checkpoint(tmp_path / "missing", "someone/x")
    with pytest.raises(ValueError, match="owner/name"):
        push_checkpoint(whole, "x")
    with pytest.raises(ValueError, match="no config.json"):
        collect(tmp_path, "someone/x")
    with pytest.raises(ValueError, match="holds no data set"):
        push_dataset(whole, "someone/x")
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "router" / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="router/model.bin"):
        collect(folder, "someone/x")
    (folder / "router" / "model.bin").unlink()
    shard = next((folder / "generator").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"generator .* lacks {shard.name}"):
        collect(folder, "someone/x")
    shutil.rmtree(folder / "generator")
    (folder / "tokenizer" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the tokenizer .* lacks model.safetensors"):
        collect(folder, "someone/x")


def test_other_folders_of_a_run_stay_behind(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    found = collect(folder, "someone/x")
    assert found.left_out == ["checkpoints/optimizer.bin", "notes.log"]
    assert found.files["README.md"] == folder.resolve() / "README.md"


def test_a_card_that_does_not_parse(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "router" / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ValueError, match="router's card does not parse"):
        collect(folder, "someone/x")
