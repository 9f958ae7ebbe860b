"""Files that lie: changed at random, each is refused in one line that names it, or read as what it was or says."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from damage import Damage, at_most, damage_bytes, damage_json
from test_token_dataset import write as write_tokens

from evatok_hf import (
    AssignmentSpace,
    EvatokConfig,
    EvatokGeneratorConfig,
    EvatokRouterConfig,
    EvatokVideoProcessor,
    VideoTokens,
)
from evatok_hf.allocation.search import SearchResult
from evatok_hf.data.curated import SHARDS as CURATED
from evatok_hf.data.curated import CuratedClips, features, make_rows
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.token_dataset import SHARDS, TokenDataset
from training.common import arguments, checkpoints
from training.generator.arguments import GeneratorArguments

MODELS = {"tokenizer": EvatokConfig, "router": EvatokRouterConfig, "generator": EvatokGeneratorConfig}
# A kind: makes its file in a folder -> the file, and what reads it and compares it with what it was.
Kind = Callable[[Path], tuple[Path, Callable[[], None]]]


def token_file(folder: Path) -> tuple[Path, Callable[[], None]]:
    path = folder / "clip.safetensors"
    tokens = VideoTokens(torch.arange(14), torch.tensor([[2, 4], [8, 0]]), fps=23.976, height=64, num_frames=29)
    tokens.save(path)

    def read() -> None:
        found = VideoTokens.load(path)
        assert found.ids.equal(tokens.ids) and found.lengths.equal(tokens.lengths)
        assert (found.fps, found.height, found.num_frames) == (23.976, 64, 29)

    return path, read


def token_shard(folder: Path) -> tuple[Path, Callable[[], None]]:
    write_tokens(folder)
    before = rows_of(folder)

    def read() -> None:
        assert rows_of(folder) == before

    return sorted(folder.glob("data/*.parquet"))[1], read


def rows_of(folder: Path) -> list[tuple]:
    data = TokenDataset.load(folder)
    return [(row.source, row.label, row.fps, row.lengths.tolist(), row.ids.tolist()) for row in data]


def token_summary(folder: Path) -> tuple[Path, Callable[[], None]]:
    _, read = token_shard(folder)
    return folder / "tokens.json", read


def run_file(folder: Path) -> tuple[Path, Callable[[], None]]:
    path = folder / ".run.json"
    path.write_text(json.dumps({"seconds": 12.5, "machine": "2 cores"}))

    def read() -> None:
        shards = ShardFolder(SHARDS, folder, {"counted": "videos"})
        said = json.loads(path.read_text())
        assert shards.seconds == pytest.approx(said["seconds"], abs=60) and shards.machine == said["machine"]

    return path, read


def configuration(part: str) -> Kind:
    kind = MODELS[part]

    def make(folder: Path) -> tuple[Path, Callable[[], None]]:
        kind.from_preset("tiny").save_pretrained(folder)
        path = folder / "config.json"

        def read() -> None:
            config = kind.from_pretrained(folder)
            for name, value in json.loads(path.read_text()).items():
                if name in kind.__annotations__ and value is not None and not isinstance(value, dict):
                    assert getattr(config, name) == value

        return path, read

    return make


def processor(folder: Path) -> tuple[Path, Callable[[], None]]:
    EvatokVideoProcessor().save_pretrained(folder)
    path = folder / "video_preprocessor_config.json"
    frames = np.zeros((20, 48, 80, 3), np.uint8)

    def read() -> None:
        made = EvatokVideoProcessor.from_pretrained(folder)
        assert made(frames[: made.num_frames], video_metadata={"fps": 25.0}).pixel_values_videos[0].ndim == 4

    return path, read


def curation(folder: Path) -> tuple[Path, Callable[[], None]]:
    make_curation(folder)
    before = CuratedClips.load(folder).distances()

    def read() -> None:
        assert CuratedClips.load(folder).distances().equal(before)

    return folder / "curation.json", read


def curated_shard(folder: Path) -> tuple[Path, Callable[[], None]]:
    _, read = curation(folder)
    return next(folder.glob("data/*.parquet")), read


def make_curation(folder: Path) -> None:
    space = AssignmentSpace((2, 4), 2)
    figures = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(0))
    batch = {"source": ["a.mp4", "b.mp4"], "origin": torch.zeros(2), "label": torch.tensor([0, 1])}
    batch |= {"frames": torch.arange(8).view(2, 4), "crop": torch.ones(2, 4, dtype=torch.int64), "fps": [25.0, 30.0]}
    rows = make_rows(batch, SearchResult(space, *figures))
    CURATED.write(CURATED.path(folder, 0, 0), rows, features(space), {"clips": 2})
    summary = {"block_lengths": [2, 4], "num_blocks": 2, "bounds": {"low": 0.1, "high": 0.9}, "clips": 2}
    summary |= {"clip": {"num_frames": 4, "image_size": 32}, "sources": ["videos"]}
    (folder / "curation.json").write_text(json.dumps(summary))


class Run:
    """A network in training, of which a checkpoint holds everything."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.accelerator, self.progress = Accelerator(cpu=True), checkpoints.Progress(0, 0.0)
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.parts = self.accelerator.prepare(network, optimizer, schedule)
        self.accelerator.register_for_checkpointing(self.progress)

    def step(self) -> None:
        network, optimizer, schedule = self.parts
        self.accelerator.backward(network(torch.randn(4, 3)).square().mean())
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        self.progress.step += 1

    def state(self) -> list:
        network, optimizer, schedule = self.parts
        moments = [value.tolist() for state in optimizer.state_dict()["state"].values() for value in state.values()]
        weights = [weight.tolist() for weight in network.state_dict().values()]
        return [weights, moments, schedule.get_last_lr(), self.progress.step, torch.rand(1).item(), random.random()]


def training_checkpoint(name: str) -> Kind:
    def make(folder: Path) -> tuple[Path, Callable[[], None]]:
        run = Run(0)
        run.step()
        path = checkpoints.save_checkpoint(run.accelerator, folder, 1, 1)
        before, other = run.state(), Run(1)

        def read() -> None:
            checkpoints.load_checkpoint(other.accelerator, folder, str(path), other.progress)
            assert other.state() == before

        return path / name, read

    return make


def options_file(folder: Path) -> tuple[Path, Callable[[], None]]:
    path = folder / "options.yaml"
    shutil.copy(Path(arguments.__file__).parents[1] / "configs" / "generator_tiny.yaml", path)

    def read() -> None:
        args, _ = arguments.parse_arguments(
            GeneratorArguments, "", ["--config", str(path), "--output_dir=x", "--train_tokens=y"]
        )
        said = yaml.safe_load(path.read_text())
        assert not said or all(str(getattr(args, name)) is not None for name in said)

    return path, read


KINDS: dict[str, tuple[Kind, Damage]] = {
    "token file": (token_file, damage_bytes),
    "token shard": (token_shard, damage_bytes),
    "tokens.json": (token_summary, damage_json),
    ".run.json": (run_file, damage_json),
    "curated shard": (curated_shard, damage_bytes),
    "curation.json": (curation, damage_json),
    "processor": (processor, damage_json),
    "options": (options_file, damage_bytes),
    **{part: (configuration(part), damage_json) for part in MODELS},
    **{
        name: (training_checkpoint(name), damage_json if name.endswith("json") else damage_bytes)
        for name in (
            "model.safetensors",
            "optimizer.bin",
            "scheduler.bin",
            "random_states_0.pkl",
            "custom_checkpoint_0.pkl",
            "checksums.json",
        )
    },
}


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(kind, count, tmp_path, capsys):
    make, damage = KINDS[kind]
    path, read = make(tmp_path)
    read()
    content, rng, refused = path.read_bytes(), random.Random(kind), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        path.write_bytes(damage(content, rng))
        try:
            with at_most(60):
                read()
        except (ValueError, SystemExit) as error:
            refused += 1
            message = str(error) if isinstance(error, ValueError) else capsys.readouterr().err.splitlines()[-1]
            assert str(tmp_path) in message and "\n" not in message and len(message) < 2000, f"{number}: {message}"
    assert refused > count / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    path.write_bytes(content)
    read()
