"""Fixtures of several test files: a tiny random checkpoint on disk, and a real video."""

from __future__ import annotations

from pathlib import Path

import pytest

import evatok_hf

# Files that take minutes begin first, so that no process is left alone with one of them at the end.
LONGEST_FIRST = (
    "test_demo_browser.py",
    "test_hub.py",
    "test_bulk.py",
    "test_curate.py",
    "test_train_adversarial.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _save_checkpoint(folder: Path, seed: int) -> Path:
    import torch

    config = evatok_hf.EvatokConfig.from_preset(
        "tiny",
        codebook_size=64,
        encoder_hidden_size=32,
        encoder_num_layers=1,
        encoder_num_heads=2,
        decoder_hidden_size=32,
        decoder_num_layers=1,
        decoder_num_heads=2,
        embed_dim=32,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        evatok_hf.EvatokModel(config).save_pretrained(folder / "tokenizer")
    processor = evatok_hf.EvatokVideoProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with `tokenizer/`: untrained, 16 x 64 x 64, 4 blocks, candidates 8 to 128, the codebook 64."""
    return _save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "random-a", seed=0)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes with other weights."""
    return _save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "random-b", seed=1)


@pytest.fixture(scope="session")
def sample_clip() -> Path:
    """The video that comes with the package, 250 frames of 640 x 272 at 25 fps."""
    return Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4"


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """What a test sets in this process is not there for the next one, whose results may be compared to the last bit."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
