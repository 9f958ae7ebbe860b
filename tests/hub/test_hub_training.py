"""Training scripts push to a Hub: real runs of very small models, cut, killed and repeated."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from check_cards import check_card
from curated_samples import make_proxy, run_curation
from curated_samples import make_videos as make_more_videos
from curated_samples import options as curation_options
from generator_samples import SIZES, write_tokens
from hub_server import HubServer
from script_runner import ScriptRunner, wait_for
from test_train_sharded import train_sharded
from training_samples import TRAINING, make_videos, options, same_weights, weights

from evatok_hf import EvatokForCausalLM, EvatokModel, EvatokRouter, VideoTokenizer

TOKENIZER, ROUTER, GENERATOR = (TRAINING / f"train_{name}.py" for name in ("tokenizer", "router", "generator"))
SHORT = ["--steps=4", "--save_every=2", "--ema_decay=0.9"]


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def mended(hub):
    """A test that fails leaves no trouble to the next one."""
    yield
    hub.mend()


@pytest.fixture(scope="module")
def scripts(hub, tmp_path_factory):
    with ScriptRunner(hub, tmp_path_factory.mktemp("scripts")) as runner:
        yield runner


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def push(name: str, *more: str) -> list[str]:
    return ["--push_to_hub=true", f"--hub_model_id=someone/{name}", *more]


def fetch(hub: HubServer, name: str, folder: Path, prefix: str = "") -> Path:
    """A repository as a folder."""
    for path, content in hub.files(f"someone/{name}").items():
        if path.startswith(prefix):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return folder


def commits(hub: HubServer, name: str) -> int:
    """How many commits a repository has, without the first, which makes it."""
    return len(hub.repositories["model", f"someone/{name}"].commits) - 1


def test_a_tokenizer_goes_there_with_its_saves(hub, scripts, videos, tmp_path):
    run = options(tmp_path / "run", videos, *SHORT)
    hub.fail("POST", "/someone/tokenizer/commit/", "503")  # is tried again
    code, log = scripts.run(TOKENIZER, [*run, *push("tokenizer", "--hub_private_repo=true")])
    assert code == 0, log
    assert hub.repositories["model", "someone/tokenizer"].private and commits(hub, "tokenizer") >= 2
    assert not (tmp_path / "run" / ".hub").exists()
    local, pushed = tmp_path / "run" / "tokenizer", fetch(hub, "tokenizer", tmp_path / "pushed")
    assert same_weights(weights(local), weights(pushed)) and not list(pushed.rglob("checkpoint-*"))
    assert (pushed / "training.json").read_bytes() == (local / "training.json").read_bytes()
    card = (pushed / "README.md").read_text()
    assert check_card(card, "model", pushed) == ["license is missing"]
    summary = json.loads((local / "training.json").read_text())
    assert summary["command"] in card and f"| parameters | {summary['parameters']:,} |" in card
    loaded = VideoTokenizer.from_pretrained(pushed)
    assert loaded.model.fingerprint() == EvatokModel.from_pretrained(local).fingerprint()

    # every commit is whole: weights, configuration, code and card of the same step
    pushes = list(hub.repositories["model", "someone/tokenizer"].commits.values())[1:]
    for files in pushes:
        steps = json.loads(files["training.json"])["steps"]
        assert f"| steps | {steps}" in files["README.md"].decode() and "modeling_evatok.py" in files
    first = tmp_path / "first"
    first.mkdir()
    for name in ("model.safetensors", "config.json"):
        (first / name).write_bytes(pushes[0][name])
    assert json.loads(pushes[0]["training.json"])["steps"] == 2
    assert not same_weights(weights(first), weights(pushed)) and EvatokModel.from_pretrained(first)

    # training is what it is without pushing
    code, log = scripts.run(TOKENIZER, options(tmp_path / "quiet", videos, *SHORT))
    assert code == 0, log
    assert same_weights(weights(local), weights(tmp_path / "quiet" / "tokenizer"))
    lines = [[json.loads(line)["total"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("run", "quiet")]  # fmt: skip
    assert lines[0] == lines[1]


def test_a_run_goes_on_from_the_state_on_the_hub(hub, scripts, videos, tmp_path):
    strategy = push("state", "--hub_strategy=checkpoint")
    code, log = scripts.run(TOKENIZER, [*options(tmp_path / "run", videos, *SHORT), *strategy])
    assert code == 0, log
    files = hub.files("someone/state")
    local = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert {path.removeprefix("last-checkpoint/"): own for path, own in files.items() if "/" in path} == local
    state = fetch(hub, "state", tmp_path / "other", "last-checkpoint/") / "last-checkpoint"
    more = ["--steps=5", "--save_every=2", "--ema_decay=0.9"]
    for name, resume in (("other", state), ("run", "latest")):
        code, log = scripts.run(TOKENIZER, options(tmp_path / name, videos, *more, f"--resume={resume}"))
        assert code == 0, log
    assert same_weights(*(weights(tmp_path / name / "tokenizer") for name in ("other", "run")))


@pytest.mark.slow
def test_the_main_process_alone_pushes_whole_weights(hub, scripts, videos, tmp_path, monkeypatch):
    """Two processes with a part of the weights each (FSDP2)."""
    for name, value in scripts.environment.items():
        if name.startswith(("HF_", "PYTHONPATH", "NO_PROXY")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    before = Counter(hub.requests)
    more = [f"--train_data={videos}", "--num_workers=1", "--batch_size=1", "--steps=3", "--save_every=1"]
    result = train_sharded(tmp_path / "run", options(tmp_path / "run", videos, *more, *push("sharded")))
    assert result.returncode == 0, result.stderr
    pushed = fetch(hub, "sharded", tmp_path / "pushed")
    assert same_weights(weights(tmp_path / "run" / "tokenizer"), weights(pushed)) and commits(hub, "sharded") >= 2
    made = (Counter(hub.requests) - before)["POST", "/api/repos/create"]
    assert made == 1 + commits(hub, "sharded")  # once at the start, and once a push
    first = tmp_path / "first"
    first.mkdir()
    for path, content in list(hub.repositories["model", "someone/sharded"].commits.values())[1].items():
        if "/" not in path:
            (first / path).write_bytes(content)
    assert not same_weights(weights(first), weights(pushed)) and EvatokModel.from_pretrained(first)


def test_a_router(hub, scripts, tmp_path):
    films, proxy = make_more_videos(tmp_path / "videos", 6, damaged=False), make_proxy(tmp_path / "proxy")
    curated = run_curation(curation_options(tmp_path / "curated", films, proxy, "--clips=12", "--clips_per_video=2"))
    model = json.dumps({"num_frames": 4, "image_size": 32, "block_lengths": [2, 4, 8], "num_blocks": 2,
                        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})  # fmt: skip
    run = [f"--output_dir={tmp_path / 'run'}", f"--curated={curated}", f"--train_data={films}", "--batch_size=4"]
    run += [f"--model_overrides={model}", "--mixed_precision=no", "--val_fraction=0.5", "--cpu=true", *SHORT]
    code, log = scripts.run(ROUTER, [*run, *push("router")])
    assert code == 0, log
    pushed = fetch(hub, "router", tmp_path / "pushed")
    assert same_weights(weights(tmp_path / "run" / "router"), weights(pushed))
    assert EvatokRouter.from_pretrained(pushed).config.quality is None
    card = (pushed / "README.md").read_text()
    assert "pipeline_tag: video-classification" in card and "| held out, percentile_1.2 |" in card


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", "00ff")


def generator_run(folder: Path, tokens: Path, *more: str) -> list[str]:
    given = {"output_dir": folder, "train_tokens": tokens, "model_overrides": json.dumps(SIZES), "row_length": 48}
    given |= {"rows": 2, "prediction": 0.5, "mixed_precision": "no", "sample_every": 0, "cpu": "true"}
    return [*(f"--{name}={value}" for name, value in given.items()), *SHORT, *more]


def test_a_push_that_fails_at_the_end_loses_nothing(hub, scripts, tokens, tmp_path):
    run = generator_run(tmp_path / "run", tokens)
    hub.fail("POST", "/someone/generator/commit/", "503", times=10_000)
    code, log = scripts.run(GENERATOR, [*run, *push("generator", "--hub_strategy=end")])
    hub.mend()
    assert code == 1 and "Traceback" not in log, log
    said = [line for line in log.splitlines() if "is complete, but" in line]
    folder = tmp_path / "run" / "generator"
    command = f"evatok push {folder} someone/generator"
    assert len(said) == 1 and said[0].endswith(f"To push it: {command}"), log
    assert commits(hub, "generator") == 0 and EvatokForCausalLM.from_pretrained(folder)
    code, log = scripts.run("from evatok_hf.cli.commands import app; app(argv)", command.split()[1:])
    assert code == 0, log
    pushed = fetch(hub, "generator", tmp_path / "pushed")
    assert same_weights(weights(folder), weights(pushed)) and EvatokForCausalLM.from_pretrained(pushed)


def test_saves_go_there_in_the_background(hub, scripts, tokens, tmp_path):
    """One that is on its way is not waited for, and the next ones are left out; training removes its checkpoint."""
    hub.fail("PUT", "/lfs/", "hold", times=1)
    more = push("background", "--hub_strategy=checkpoint", "--steps=12", "--keep_checkpoints=1")
    run = scripts.start(GENERATOR, generator_run(tmp_path / "run", tokens, *more))
    wait_for(lambda: (tmp_path / "run" / "generator" / "training.json").exists())
    assert commits(hub, "background") == 0  # the first save is still held
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    hub.mend()
    code, log = run.wait()
    assert code == 0 and "the one before is still on its way" in log, log
    steps = [json.loads(files["training.json"])["steps"]
             for files in list(hub.repositories["model", "someone/background"].commits.values())[1:]]  # fmt: skip
    assert steps == [2, 12]
    assert same_weights(weights(tmp_path / "run" / "generator"), weights(fetch(hub, "background", tmp_path / "there")))


def test_a_killed_push_is_repeated_without_sending_again(hub, scripts, tokens, tmp_path):
    # another seed than elsewhere, and a curve: files that the Hub knows already would not be sent at all
    more = ["--seed=2", "--log_every=1", *push("killed", "--hub_strategy=end")]
    run = generator_run(tmp_path / "run", tokens, *more)
    sent = len(hub.arrived)
    hub.fail("PUT", "/lfs/", "hold", times=1)  # one of its two large files does not arrive
    first = scripts.start(GENERATOR, run)
    wait_for(lambda: len(hub.arrived) == sent + 1)
    first.kill()
    hub.mend()
    assert commits(hub, "killed") == 0
    code, log = scripts.run(GENERATOR, [*run, "--resume=latest"])
    assert code == 0, log
    arrived = hub.arrived[sent:]
    folder = tmp_path / "run" / "generator"
    large = {name: (folder / name).read_bytes() for name in ("model.safetensors", "loss_curve.png")}
    assert Counter(arrived) == {(hashlib.sha256(own).hexdigest(), len(own)): 1 for own in large.values()}
    assert sum(size for _, size in arrived) == sum(map(len, large.values()))
    assert same_weights(weights(folder), weights(fetch(hub, "killed", tmp_path / "there")))


def test_a_push_that_is_cut_goes_on(hub, scripts, tokens, tmp_path):
    sent = len(hub.arrived)
    hub.fail("PUT", "/lfs/", "cut", times=1)
    hub.fail("POST", "/someone/cut/commit/", "cut", after=100)
    run = generator_run(tmp_path / "run", tokens, "--seed=1")
    code, log = scripts.run(GENERATOR, [*run, *push("cut", "--hub_strategy=end")])
    assert code == 0, log
    assert set(Counter(oid for oid, _ in hub.arrived[sent:]).values()) == {1} and commits(hub, "cut") == 1


@pytest.mark.parametrize(
    ("more", "token", "code", "told"),
    [
        (push("x"), None, 1, "hf auth login"),
        (push("x"), "hf_wrong", 1, "may write there"),
        (push("x"), "reader", 1, "may write there"),
        (push("cut"), "reader", 1, "may write there"),  # one that exists
        (["--push_to_hub=true", "--hub_model_id=someone-else/x"], "", 1, "may write there"),
        (["--push_to_hub=true", "--hub_model_id=nothing"], "", 2, "give owner/name"),
        (["--push_to_hub=true", "--hub_model_id=someone/a--b"], "", 2, "no name of a repository"),
        (["--push_to_hub=true"], "", 2, "needs --hub_model_id"),
        (push("x", "--hub_strategy=often"), "", 2, "one of"),
    ],
)
def test_what_cannot_be_pushed_is_not_trained(hub, scripts, tokens, tmp_path, more, token, code, told):
    if token == "reader":
        token = hub.reader
    found, log = scripts.run(GENERATOR, [*generator_run(tmp_path / "run", tokens), *more], token)
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(("usage:", " ", "\t"))]
    assert found == code and told in lines[-1] and "Traceback" not in log, log
    assert not (tmp_path / "run" / "log.jsonl").exists() and ("model", "someone/x") not in hub.repositories
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_no_pickle_but_the_state(hub):
    """In what the runs above left."""
    for _, name in hub.repositories:
        for path in hub.files(name):
            assert path.startswith("last-checkpoint/") or not path.endswith((".bin", ".pkl", ".pt")), (name, path)
