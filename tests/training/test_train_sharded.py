"""training/train_tokenizer.py under FSDP2, by two processes on a CPU: the same training as by one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from test_train_adversarial import teachers, videos  # noqa: F401
from training_samples import TRAINING, options, read_log, train, weights

from evatok_hf import EvatokModel
from training.common.averaging import AveragedWeights
from training.common.sharding import check_sharding
from training.tokenizer.arguments import TokenizerArguments

# accelerate has FSDP on accelerators only; the processes of a CPU are made to look like theirs to it.
DRIVER = """
import sys
from accelerate.state import DistributedType, PartialState

initialise = PartialState.__init__

def as_if_on_gpus(self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = as_if_on_gpus
sys.path.insert(0, sys.argv.pop(1))
from training import train_tokenizer

try:
    train_tokenizer.main(sys.argv[1:])
except ValueError as error:
    raise SystemExit(f"refused: {error}") from None
"""


def launched_environment() -> dict[str, str]:
    """What `accelerate launch` with the repository's configuration sets for the processes."""
    configuration = TRAINING / "accelerate" / "fsdp2_8gpu.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(configuration), "train_tokenizer.py"])
    args, _, _ = _validate_launch_command(args)
    settings = {
        name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(("FSDP_", "ACCELERATE_"))
    }
    assert settings["ACCELERATE_USE_FSDP"] == "true" and settings["FSDP_VERSION"] == "2"
    return settings


def train_sharded(folder: Path, argv: list[str]) -> subprocess.CompletedProcess:
    driver = folder.with_name("driver.py")
    driver.write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(driver), str(TRAINING.parent), *argv]
    environment = {**os.environ, **launched_environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "options_", "message"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, {}, "must say fsdp_version: 2"),
        ({"reshard_after_forward": False}, {}, "must say fsdp_reshard_after_forward: true; see"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, {}, "must say fsdp_state_dict_type: FULL_STATE_DICT; see"),
        ({"cpu_offload": True}, {}, "must say fsdp_offload_params: false; see"),
        ({"activation_checkpointing": True}, {}, "must say fsdp_activation_checkpointing: false; see"),
        ({"cpu_ram_efficient_loading": True}, {}, "must say fsdp_cpu_ram_efficient_loading: false; see"),
        ({}, {"adaptive_weight": True}, "--adaptive_weight needs .*; leave it out"),
        ({}, {"compile": True}, "--compile is not supported under FSDP"),
        ({}, {"mixed_precision": "fp16"}, "use bf16 or no"),
    ],
)
def test_what_is_refused(monkeypatch, settings, options_, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    usual = {"fsdp_version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}

    def check(settings: dict, options_: dict) -> None:
        args = TokenizerArguments(output_dir="", train_data=[""], **options_)
        plugin = FullyShardedDataParallelPlugin(**{**usual, **settings})
        # What only a launched accelerator has.
        launched = {"distributed_type": DistributedType.FSDP, "mixed_precision": args.mixed_precision}
        check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **launched), args)

    check({}, {})
    with pytest.raises(ValueError, match=message):
        check(settings, options_)


def test_averaged_weights_keep_their_place():
    source, target = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    first, second = AveragedWeights(source.parameters()), AveragedWeights(target.parameters())
    first.step(source.parameters())
    second.load_state_dict(first.state_dict())
    with second.in_place(target.parameters()):
        assert torch.equal(target.weight, source.weight) and second.steps == 1
    with pytest.raises(ValueError, match="of another network"):
        second.load_state_dict(AveragedWeights(torch.nn.Linear(3, 2).parameters()).state_dict())


def test_a_checkpoint_with_alignment_is_not_taken_for_one_without(videos, teachers, tmp_path):  # noqa: F811
    alignment = [word for word in teachers if word.startswith("--alignment")]
    train(options(tmp_path, videos, *alignment, "--steps=1", "--save_every=1"))
    with pytest.raises(ValueError, match=r"1 with \d+ tensors against 1 with \d+.*--adversarial and --alignment"):
        train(options(tmp_path, videos, "--steps=2", "--resume=latest"))


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_sharded_training_is_the_training_of_one_process(videos, teachers, tmp_path, everything):  # noqa: F811
    more = ["--steps=6", "--save_every=3", "--learning_rate=1e-4", "--ema_decay=0.9", f"--val_data={videos}"]
    more += ["--validate_every=2", "--val_clips_per_video=1"]
    more += ["--gradient_accumulation_steps=2", f"--gradient_checkpointing={not everything}"]
    if everything:
        more += [*teachers, "--discriminator_start=1", "--channel_shuffle=0.5"]
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    train(options(one, videos, *more, "--batch_size=4", "--num_workers=2"))
    sharded = [*more, "--num_workers=1"]
    done = train_sharded(two, options(two, videos, *sharded))
    assert done.returncode == 0, done.stderr[-5000:]
    for a, b in zip(read_log(two), read_log(one), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    close(weights(two / "tokenizer"), weights(one / "tokenizer"))
    if everything:
        # Not of the discriminators' biases: before a norm their gradient is rounding, of which Adam makes whole steps.
        saved = torch.load(two / "checkpoint-6" / "pytorch_model_fsdp.bin"), weights(one / "checkpoint-6")
        close(*({name: tensor for name, tensor in tensors.items() if tensor.ndim > 1} for tensors in saved))
        before = weights(one / "checkpoint-3")
        assert max((saved[1][name] - before[name]).abs().max() for name in before if "weight" in name) > 2e-4
    assert {path.name for path in (two / "samples").iterdir()} == {f"step-{step:07d}.png" for step in (2, 4, 6)}
    summary = json.loads((two / "tokenizer" / "training.json").read_text())
    model = EvatokModel.from_pretrained(two / "tokenizer")
    assert summary["parameters"] == model.num_parameters() and "2 process" in summary["machine"]
    assert model.encode(torch.zeros(1, 8, 3, 32, 32)).ids.shape == (32,)

    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    shutil.rmtree(resumed / "tokenizer")
    (resumed / "log.jsonl").unlink()
    done = train_sharded(resumed, options(resumed, videos, *sharded, "--resume=latest"))
    assert done.returncode == 0, done.stderr[-5000:]
    for a, b in zip(read_log(resumed), [line for line in read_log(two) if line["step"] > 3], strict=True):
        assert a == pytest.approx(b, abs=1e-6, rel=1e-5)
    close(weights(resumed / "tokenizer"), weights(two / "tokenizer"))
    with pytest.raises(ValueError, match="was made under FSDP"):
        train(options(two, videos, *more, "--resume=latest"))
