"""What test_hub.py does in processes of its own, each with an empty cache: `python hub_cases.py FOLDER SOURCE CASE..`.

One process imports what is slow and reads no settings of the Hub, which is done at import, then goes apart into one
child a case. A case writes "ok" or a traceback into FOLDER/CASE.result.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import traceback
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torchvision  # noqa: F401
from safetensors.torch import load_file

FOLDER, SOURCE = Path(sys.argv[1]), sys.argv[2]
CHECKPOINT = FOLDER / "checkpoint"
GUIDE = Path(__file__).parents[2] / "docs" / "hub.md"
LENGTHS = [8, 16, 32, 64]


def raises(action) -> str:
    """The message of the ValueError that it must raise, which is one line."""
    try:
        action()
    except ValueError as error:
        assert "\n" not in str(error), error
        return str(error)
    raise AssertionError("nothing was raised")


def without_waiting() -> None:
    import time

    time.sleep = lambda seconds: None


def same_tokenizer(model, processor) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    video = processor(expected["frames"], return_tensors="pt").pixel_values_videos
    assert torch.equal(video, expected["video"]), "the processor differs"
    tokens = model.encode(video, LENGTHS)
    assert torch.equal(tokens.ids, expected["ids"]), "ids differ"
    assert torch.allclose(model.decode(tokens), expected["decoded"], atol=1e-5), "frames differ"


def same_router(router) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    assert torch.allclose(router(expected["video"]).logits, expected["logits"], atol=1e-5), "the router differs"


def same_pipeline(pipe) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    pipe.set_progress_bar_config(disable=True)
    same_tokenizer(pipe.tokenizer, pipe.processor)
    same_router(pipe.router)
    made = pipe("run", 1, seeds=[5], max_block_length=8)
    assert torch.equal(made.tokens.ids, expected["drawn"]), "other tokens are drawn"
    assert np.allclose(made.frames, expected["frames_drawn"].numpy(), atol=1e-5)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def card_of(repo_id: str) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, "README.md")).read_text()


# --- cases ------------------------------------------------------------------------------------------------------------


def push() -> None:
    from huggingface_hub import HfApi

    from evatok_hf import EvatokForCausalLM, EvatokModel, EvatokPipeline, EvatokRouter, EvatokVideoProcessor
    from evatok_hf.hub import push as hub
    from evatok_hf.models import checkpoint_evatok

    without_waiting()
    done = hub.push_checkpoint(CHECKPOINT, "someone/whole")  # the first requests of three kinds fail
    assert done.repo_id == "someone/whole" and done.parts == ["tokenizer", "router", "generator"]
    assert done.left_out == ["notes.log"] and "router/model.safetensors" in done.files
    again = hub.push_checkpoint(CHECKPOINT, "someone/whole")
    assert again.commit == done.commit, "an equal push is no commit"
    hub.push_checkpoint(CHECKPOINT, "someone/whole", revision="trial")
    hub.push_checkpoint(CHECKPOINT / "tokenizer", "someone/tokenizer")
    hub.push_checkpoint(CHECKPOINT / "tokenizer", "someone/fragile")
    for part in ("router", "generator"):
        assert hub.push_checkpoint(CHECKPOINT / part, f"someone/alone-{part}").parts == [part]
    problem = raises(lambda: hub.push_checkpoint(CHECKPOINT / "router", "someone/tokenizer"))
    assert "someone/tokenizer holds a model of type 'evatok'" in problem, problem
    hub.push_checkpoint(CHECKPOINT, "someone/secret", private=True)
    hub.push_checkpoint(CHECKPOINT / "tokenizer", "someone/branches", revision="other", message="On a branch")
    assert "someone-else/x" in raises(lambda: hub.push_checkpoint(CHECKPOINT, "someone-else/x"))

    checkpoint_evatok.WAITS = ()
    problem = raises(lambda: hub.push_checkpoint(CHECKPOINT, "someone/interrupted"))
    assert "push again" in problem, problem
    hub.push_checkpoint(CHECKPOINT, "someone/interrupted")

    tokenizer = EvatokModel.from_pretrained(CHECKPOINT / "tokenizer")
    tokenizer.push_to_hub("someone/by-itself")
    EvatokVideoProcessor.from_pretrained(CHECKPOINT / "tokenizer").push_to_hub("someone/by-itself")
    EvatokRouter.from_pretrained(CHECKPOINT / "router").push_to_hub("someone/router")
    EvatokForCausalLM.from_pretrained(CHECKPOINT / "generator").push_to_hub("someone/generator")
    EvatokPipeline.from_pretrained(CHECKPOINT).push_to_hub("someone/pipeline")

    api = HfApi()
    api.create_repo("someone/tokens", repo_type="dataset")
    api.upload_folder(repo_id="someone/tokens", folder_path=FOLDER / "tokens", repo_type="dataset")


def load() -> None:
    from diffusers import DiffusionPipeline

    from evatok_hf import EvatokModel, EvatokPipeline, EvatokRouter, EvatokVideoProcessor, VideoTokenizer
    from evatok_hf.data.token_dataset import TokenDataset

    same_pipeline(EvatokPipeline.from_pretrained("someone/whole"))  # the download of its router is cut once
    same_pipeline(EvatokPipeline.from_pretrained("someone/pipeline"))
    pipe = DiffusionPipeline.from_pretrained("someone/whole", trust_remote_code=True)
    assert type(pipe) is EvatokPipeline
    same_pipeline(pipe)
    for name, revision in (("tokenizer", None), ("by-itself", None), ("branches", "other")):
        tokenizer = VideoTokenizer.from_pretrained(f"someone/{name}", revision=revision)
        same_tokenizer(tokenizer.model, tokenizer.processor)
    assert "someone/branches" in raises(lambda: VideoTokenizer.from_pretrained("someone/branches"))
    subfolder = {"subfolder": "tokenizer"}
    model = EvatokModel.from_pretrained("someone/whole", **subfolder)
    same_tokenizer(model, EvatokVideoProcessor.from_pretrained("someone/whole", **subfolder))
    same_router(EvatokRouter.from_pretrained("someone/router"))

    tokens, local = TokenDataset.load("someone/tokens"), TokenDataset.load(FOLDER / "tokens")
    assert len(tokens) == len(local) > 0
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(tokens, local, strict=True))

    refused = raises(lambda: VideoTokenizer.from_pretrained("someone/secret", token=False))
    assert "someone/secret" in refused and "token" in refused, refused
    same_pipeline(EvatokPipeline.from_pretrained("someone/secret"))

    # what the card and the documentation tell a user to do
    guide = GUIDE.read_text().replace("USER/NAME", "someone/whole").replace("runs/final", str(CHECKPOINT))
    blocks = python_blocks(card_of("someone/whole")) + python_blocks(guide)
    assert len(blocks) == 9
    for block in blocks:
        exec(block, {})


def offline() -> None:
    """After `load`, in its cache."""
    from evatok_hf import EvatokPipeline, VideoTokenizer

    same_pipeline(EvatokPipeline.from_pretrained("someone/whole"))
    tokenizer = VideoTokenizer.from_pretrained("someone/tokenizer")
    same_tokenizer(tokenizer.model, tokenizer.processor)
    assert "not reachable" in raises(lambda: VideoTokenizer.from_pretrained("someone/nowhere"))


def remote() -> None:
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "evatok_hf":
                raise ModuleNotFoundError("No module named 'evatok_hf'", name="evatok_hf")

    sys.path.remove(SOURCE)
    sys.meta_path.insert(0, Blocked())
    from diffusers import DiffusionPipeline
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    trust = {"trust_remote_code": True}
    for name, part in (("whole", {"subfolder": "tokenizer"}), ("tokenizer", {}), ("by-itself", {})):
        assert AutoConfig.from_pretrained(f"someone/{name}", **part, **trust).model_type == "evatok"
        model = AutoModel.from_pretrained(f"someone/{name}", **part, **trust)
        same_tokenizer(model, AutoVideoProcessor.from_pretrained(f"someone/{name}", **part, **trust))
    same_router(AutoModel.from_pretrained("someone/whole", subfolder="router", **trust))
    same_router(AutoModel.from_pretrained("someone/router", **trust))
    expected = load_file(FOLDER / "expected.safetensors")
    for name, part in (("whole", {"subfolder": "generator"}), ("generator", {})):
        generator = AutoModelForCausalLM.from_pretrained(f"someone/{name}", **part, **trust)
        with torch.no_grad():
            assert torch.allclose(generator(expected["prompt"]).logits, expected["prompt_logits"], atol=1e-5)
    for name in ("whole", "pipeline"):
        pipe = DiffusionPipeline.from_pretrained(f"someone/{name}", **trust)
        same_pipeline(pipe)
    # what the cards tell those without the package to do, word for word
    classes = {"tokenizer": "EvatokModel", "router": "EvatokRouter", "generator": "EvatokForCausalLM"}
    repositories = {"whole": [*classes, "pipe"], "alone-router": ["router"], "alone-generator": ["generator"]}
    repositories |= {"by-itself": ["tokenizer"], "router": ["router"], "generator": ["generator"]}
    for name, parts in repositories.items():
        blocks = python_blocks(card_of(f"someone/{name}").split("Without the package")[1])
        assert len(blocks) == len(parts), blocks
        for part, block in zip(parts, blocks, strict=True):
            found: dict = {}
            exec(block, found)
            assert type(found[part]).__name__ == (classes | {"pipe": "EvatokPipeline"})[part]
    pipe.save_pretrained(FOLDER / "saved-again")
    same_pipeline(DiffusionPipeline.from_pretrained(str(FOLDER / "saved-again"), **trust))
    assert not any(name.split(".")[0] == "evatok_hf" for name in sys.modules)


def cut() -> None:
    from huggingface_hub import constants

    from evatok_hf import VideoTokenizer

    without_waiting()
    once = VideoTokenizer.from_pretrained("someone/interrupted")  # cut once, then taken up where it was
    same_tokenizer(once.model, once.processor)
    shutil.rmtree(constants.HF_HUB_CACHE)
    for _ in range(2):  # cut again and again
        assert "was cut" in raises(lambda: VideoTokenizer.from_pretrained("someone/fragile")), "half a model loads"
        assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mend", data=b"").read()
    again = VideoTokenizer.from_pretrained("someone/fragile")
    same_tokenizer(again.model, again.processor)


def command() -> None:
    import json

    from evatok_hf import default_checkpoint
    from evatok_hf.cli.commands import app
    from evatok_hf.models import checkpoint_evatok

    checkpoint_evatok.WAITS = ()

    def run(*argv: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                app(["push", *argv])
            except SystemExit as end:
                return end.code, out.getvalue(), err.getvalue()

    code, out, err = run(str(CHECKPOINT), "someone/by-command", "--private", "--message", "From a shell", "--json")
    report = json.loads(out)
    assert (code, err) == (0, ""), err
    assert report["parts"] == ["tokenizer", "router", "generator"] and report["url"].endswith("/someone/by-command")
    default = [part for part in ("tokenizer", "router", "generator") if Path(default_checkpoint(), part).is_dir()]
    for name, parts in (("bundled", default), ("evatok-tiny", ["tokenizer", "router", "generator"])):
        code, out, err = run(name, f"someone/{name}", "--json")
        assert (code, err) == (0, "") and json.loads(out)["parts"] == parts, err
    code, out, err = run(str(CHECKPOINT), "someone/by-command", "--revision", "v1")
    assert code == 0 and "someone/by-command" in out, (out, err)
    for argv, status, told in (
        ((str(CHECKPOINT), "someone-else/x"), 1, "may write"),
        ((str(CHECKPOINT), "nothing"), 2, "owner/name"),
        ((str(FOLDER / "missing"), "someone/x"), 1, "missing"),
        ((), 2, "Missing argument"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (status, "") and told in err and len(err.splitlines()) == 1, (argv, code, err)
    os.environ["HF_TOKEN"] = "hf_wrong"
    code, out, err = run(str(CHECKPOINT), "someone/x")
    assert code == 1 and len(err.splitlines()) == 1 and "token" in err, err
    del os.environ["HF_TOKEN"]
    code, out, err = run(str(CHECKPOINT), "someone/x")
    assert code == 1 and len(err.splitlines()) == 1 and "token" in err, err


CASES = {case.__name__: case for case in (push, load, offline, remote, cut, command)}


def main() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, SOURCE)
    for name in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            home = FOLDER / "home" / ("load" if name == "offline" else name)
            os.environ |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
            if name == "offline":
                os.environ["HF_HUB_OFFLINE"] = "1"
            try:
                CASES[name]()
                result = "ok"
            except BaseException:
                result = traceback.format_exc()
            (FOLDER / f"{name}.result").write_text(result)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
