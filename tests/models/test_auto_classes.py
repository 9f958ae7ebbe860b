"""transformers' Auto classes know the models once a name of `evatok_hf` is used, or transformers is imported before it;
and a saved folder works where the package is not installed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizer_samples import make_tokenizer, processor, real_clips, real_frames

import evatok_hf
from evatok_hf import EvatokConfig, EvatokVideoProcessor

SOURCE = Path(evatok_hf.__file__).parents[1]

# One process imports what is slow and none of the libraries that are tried, then goes apart into one child for each
# case: imports cannot be undone.
DRIVER = """
import json, os, sys, traceback
import numpy, torch, torch._dynamo, torchvision

torch.set_num_threads(1)
folder, source, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, source)


def check(folder=folder):
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    config = AutoConfig.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    processor = AutoVideoProcessor.from_pretrained(folder)
    for thing in (config, model, processor):
        assert type(thing).__module__.startswith("evatok_hf."), type(thing).__module__
    assert type(AutoModel.from_config(config)) is type(model)


def load_tokens():
    import evatok_hf

    tokens = torch.load(os.path.join(folder, "tokens.pt"))  # weights_only, by default
    assert type(tokens) is evatok_hf.VideoTokens and len(tokens) == 1 and tokens.lengths.tolist() == [[2, 4, 8, 16]]


def remote():
    import importlib.util
    from safetensors.torch import load_file

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "evatok_hf":
                raise ModuleNotFoundError("No module named 'evatok_hf'", name="evatok_hf")

    sys.path.remove(source)
    sys.meta_path.insert(0, Blocked())
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    expected = load_file(os.path.join(folder, "expected"))
    processor = AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
    video = processor(expected["frames"], return_tensors="pt").pixel_values_videos
    assert torch.equal(video, expected["video"]), "the processor differs"
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "evatok"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokens = model.encode(video, [2, 4, 8, 16])
    assert torch.equal(tokens.ids, expected["ids"]), "ids differ"
    assert torch.allclose(model.decode(tokens), expected["decoded"], atol=1e-5), "frames differ"
    tokens.save(os.path.join(folder, "tokens"))
    assert torch.equal(type(tokens).load(os.path.join(folder, "tokens")).ids, expected["ids"])
    assert not any(name.split(".")[0] == "evatok_hf" for name in sys.modules)


for name, code in cases.items():
    child = os.fork()
    if child == 0:
        try:
            exec(code, {"check": check, "remote": remote, "load_tokens": load_tokens})
            result = "ok"
        except BaseException:
            result = traceback.format_exc()
        with open(os.path.join(folder, name + ".result"), "w") as file:
            file.write(result)
        os._exit(0)
    os.waitpid(child, 0)
"""

CASES = {
    "package-first": "import evatok_hf; check(evatok_hf.default_checkpoint() + '/tokenizer')",
    "transformers-first": "from transformers import AutoConfig, AutoModel; import evatok_hf; check()",
    "config-between": "import evatok_hf; from transformers import AutoConfig; evatok_hf.EvatokConfig; check()",
    "tokens-first": "from evatok_hf import VideoTokens; check(); load_tokens()",
    "without-the-package": "remote()",
}


def clean_environment(home: Path) -> dict[str, str]:
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
    }
    return {
        **keep,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(SOURCE)!r})
import evatok_hf
assert "EvatokModel" in dir(evatok_hf) and evatok_hf.__version__
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "transformers", "numpy", "av", "decord"}}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(tmp_path))
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What each case came to: "ok" or a traceback."""
    folder, home = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("home")
    model, frames, pixels = make_tokenizer(position_embedding="pooled"), real_frames()[0], real_clips()[:1]
    tokens = model.encode(pixels, [2, 4, 8, 16])
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    expected = {"frames": frames, "video": pixels, "ids": tokens.ids, "decoded": model.decode(tokens)}
    save_file(expected, folder / "expected")
    torch.save(tokens, folder / "tokens.pt")
    out = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), str(SOURCE), json.dumps(CASES)],
        capture_output=True,
        text=True,
        env=clean_environment(home),
        cwd=home,
    )
    assert out.returncode == 0, out.stderr
    return {name: (folder / f"{name}.result").read_text() for name in CASES}


@pytest.mark.parametrize("case", list(CASES))
def test_auto_classes(results, case):
    assert results[case] == "ok", results[case]


def test_modules_are_found_by_the_names_that_they_had():
    with pytest.warns(
        FutureWarning, match="prediction is evatok_hf.models.video_processing_evatok now; import held_clip"
    ):
        from evatok_hf.prediction import held_clip
    assert held_clip.__module__ == "evatok_hf.models.video_processing_evatok"
    with pytest.raises(ImportError, match="no_such_name"):
        from evatok_hf.prediction import no_such_name  # noqa: F401


def test_names_that_left_the_top_of_the_package_are_still_found_there():
    for name, place in evatok_hf._renamed.MOVED.items():
        where, _, new = place.partition(":")
        with pytest.warns(FutureWarning, match=f"{name} is .*in evatok_hf.{where} now"):
            value = getattr(evatok_hf, name)
        now = getattr(importlib.import_module(f"evatok_hf.{where}"), new or name)
        assert value is now and name not in dir(evatok_hf)


def test_a_saved_folder_holds_the_code_that_it_needs(tmp_path):
    EvatokVideoProcessor().save_pretrained(tmp_path)
    EvatokConfig.from_preset("tiny").save_pretrained(tmp_path)
    assert {"video_processing_evatok.py", "configuration_evatok.py", "base_evatok.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
