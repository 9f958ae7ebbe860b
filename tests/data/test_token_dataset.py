"""Tokens on disk: what is read again, what is refused; and the condition of frame prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from generator_samples import write_tokens

from evatok_hf.data import parquet_shards
from evatok_hf.data.token_dataset import SHARDS, TokenDataset, features, make_rows
from evatok_hf.models.video_processing_evatok import hold_last_frame

SUMMARY = {
    "classes": ["cat", "dog"],
    "codebook_size": 16,
    "block_lengths": [1, 2, 4],
    "num_blocks": 2,
    "tokenizer_fingerprint": "aa",
    "known_frames": None,
    "clips": 5,
}
LENGTHS = [[1, 2], [4, 4], [2, 1], [1, 1], [4, 2]]
LABELS = [1, -1, 0, 1, 1]


def some_rows(conditions: bool = False, largest: int = 15) -> list[dict]:
    """Five clips whose ids count up from the number of the clip; conditions count down from `largest`."""
    batch = {
        "source": [f"v{index // 2}.mp4" for index in range(5)],
        "origin": torch.zeros(5, dtype=torch.int64),
        "label": torch.tensor(LABELS),
        "frames": torch.arange(20).reshape(5, 4),
        "crop": torch.tensor([[0, 4, 32, index % 2] for index in range(5)]),
        "fps": torch.tensor([25.0, 30, 24, 12.5, 25]),
    }
    tokens = []
    for index, lengths in enumerate(LENGTHS):
        row = {"lengths": torch.tensor(lengths), "ids": torch.arange(sum(lengths)) + index}
        if conditions:
            row |= {"condition_lengths": torch.tensor([1, 1]), "condition_ids": torch.tensor([largest, largest - 1])}
        tokens.append(row)
    return make_rows(batch, tokens)


def write(folder: Path, rows: list[dict] | None = None, fingerprints=("aa", "aa"), **changes) -> Path:
    """Two shards, of three rows and of two."""
    rows, summary = rows or some_rows(), {**SUMMARY, **changes}
    columns = features(2, summary["classes"], summary["known_frames"] is not None)
    for number, (part, fingerprint) in enumerate(zip((rows[:3], rows[3:]), fingerprints, strict=True)):
        note = {"settings": {"tokenizer_fingerprint": fingerprint}}
        SHARDS.write(SHARDS.path(folder, 0, number), part, columns, note)
    (folder / "tokens.json").write_text(json.dumps(summary))
    return folder


def test_rows_and_columns(tmp_path):
    tokens = TokenDataset.load(write(tmp_path))
    assert len(tokens) == 5 and tokens.classes == ["cat", "dog"] and tokens.summary["codebook_size"] == 16
    assert tokens.lengths().tolist() == LENGTHS and tokens.labels().tolist() == LABELS
    assert tokens.counts().tolist() == [3, 8, 3, 2, 6] and tokens.condition_counts() is None
    row = tokens[3]  # the first of the second shard
    assert (row.source, row.label, row.fps) == ("v1.mp4", 1, 12.5)
    assert row.lengths.tolist() == [1, 1] and row.ids.tolist() == [3, 4]
    assert row.lengths.dtype == row.ids.dtype == torch.int64
    assert row.condition_lengths is None and row.condition_ids is None
    assert tokens[-1].ids.tolist() == [4, 5, 6, 7, 8, 9] == tokens[np.int64(4)].ids.tolist()
    assert [made.ids[0].item() for made in tokens] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        tokens[5]
    batch = next(iter(torch.utils.data.DataLoader(tokens, batch_size=2, collate_fn=list)))
    assert [made.label for made in batch] == [1, -1]


def test_clips_can_be_decoded(tmp_path):
    data = TokenDataset.load(write(tmp_path))
    tokens = data.clips([2, 0])
    assert tokens.lengths.tolist() == [data[2].lengths.tolist(), data[0].lengths.tolist()]
    assert tokens.ids.tolist() == [*data[2].ids.tolist(), *data[0].ids.tolist()]
    assert (tokens.fps, tokens.fingerprint) == (data[2].fps, "aa")
    with pytest.raises(ValueError, match="one clip at least"):
        data.clips([])


def test_conditions(tmp_path):
    tokens = TokenDataset.load(write(tmp_path, some_rows(conditions=True), known_frames=2))
    assert tokens.condition_counts().tolist() == [2] * 5
    assert tokens[4].condition_ids.tolist() == [15, 14] and tokens[4].condition_lengths.tolist() == [1, 1]
    assert tokens[4].ids.tolist() == [4, 5, 6, 7, 8, 9]


def test_labels_without_names_and_large_codebooks(tmp_path):
    rows = some_rows()
    rows[0]["label"], rows[1]["ids"][0] = 7, 99_999
    tokens = TokenDataset.load(write(tmp_path, rows, classes=[], codebook_size=100_000))
    assert tokens.classes == [] and tokens.labels().tolist() == [7, *LABELS[1:]] and tokens[1].ids[0] == 99_999


def test_datasets_reads_them(tmp_path):
    write(tmp_path / "tokens")
    files = str(tmp_path / "tokens" / "data" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache")["train"]
    assert rows.features == features(2, ["cat", "dog"]) and rows["lengths"][:] == LENGTHS
    assert rows["label"][:] == LABELS and rows.features["label"].int2str(1) == "dog"
    assert (
        rows[1]["ids"] == list(range(1, 9)) and rows[1]["crop"] == [0, 4, 32, 1] and rows[1]["frames"] == [4, 5, 6, 7]
    )


def test_a_folder_without_tokens(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        TokenDataset.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no tokens; make some with training/tokenize_dataset.py"):
        TokenDataset.load(tmp_path)
    (write(tmp_path) / "tokens.json").unlink()
    with pytest.raises(ValueError, match="not finished; go on with .*--resume true"):
        TokenDataset.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_summary(tmp_path, text):
    (write(tmp_path) / "tokens.json").write_text(text)
    with pytest.raises(ValueError, match="tokens.json is damaged"):
        TokenDataset.load(tmp_path)


def test_missing_and_damaged_shards(tmp_path):
    first, second = SHARDS.list(write(tmp_path))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match="should hold 5 clips and holds 3"):
        TokenDataset.load(tmp_path)
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{second.name} is damaged"):
        TokenDataset.load(tmp_path)
    second.write_bytes(content[:4] + bytes(byte ^ 255 for byte in content[4:400]) + content[400:])
    with pytest.raises(ValueError, match=f"{second.name} is damaged") as caught:
        TokenDataset.load(tmp_path)
    assert "\n" not in str(caught.value)
    second.write_bytes(content)
    assert len(TokenDataset.load(tmp_path)) == 5
    pq.write_table(pq.read_table(first).drop_columns("ids"), first)
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        TokenDataset.load(tmp_path)


def test_shards_of_another_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="000001.parquet was made by tokenizer bb, tokens.json speaks of aa"):
        TokenDataset.load(write(tmp_path, fingerprints=("aa", "bb")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 8}, "ids run from 0 to 8, the codebook has 8"),
        ({"block_lengths": [1, 2, 8]}, r"lengths are not 2 of \[1, 2, 8\]"),
        ({"num_blocks": 3}, "lengths are not 3 of"),
        ({"known_frames": 2}, "condition"),
    ],
)
def test_a_summary_that_does_not_fit(tmp_path, changes, message):
    write(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps({**SUMMARY, **changes}))
    with pytest.raises(ValueError, match=message):
        TokenDataset.load(tmp_path)


def test_values_that_do_not_fit(tmp_path):
    for name, change, message in (
        ("negative", lambda rows: rows[4]["ids"].__setitem__(0, -1), "ids run from -1 to"),
        ("short", lambda rows: rows[0].update(ids=rows[0]["ids"][:2]), "more or fewer ids than its lengths say"),
    ):
        rows = some_rows()
        change(rows)
        with pytest.raises(ValueError, match=message):
            TokenDataset.load(write(tmp_path / name, rows))
    write(tmp_path / "labels")
    (tmp_path / "labels" / "tokens.json").write_text(json.dumps({**SUMMARY, "classes": ["cat"]}))
    with pytest.raises(ValueError, match="labels run from -1 to 1"):
        TokenDataset.load(tmp_path / "labels")
    with pytest.raises(ValueError, match="ids run from 19 to 20"):
        TokenDataset.load(write(tmp_path / "held", some_rows(conditions=True, largest=20), known_frames=1))


def test_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path)
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr("evatok_hf.models.checkpoint_evatok.snapshot_download", download)
        assert len(TokenDataset.load("nobody/some-tokens", token="t", revision="v1")) == 5
    ((name, options),) = asked
    assert name == "nobody/some-tokens" and options["repo_type"] == "dataset"
    assert (options["token"], options["revision"]) == ("t", "v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no folder nobody/some-tokens, and the Hub is not reachable"):
        TokenDataset.load("nobody/some-tokens")


def test_the_last_known_frame_is_held():
    video = torch.arange(2 * 4 * 3).reshape(2, 4, 3, 1, 1).float()
    held = hold_last_frame(video, 2)
    assert held.shape == video.shape and torch.equal(held[:, :2], video[:, :2])
    assert torch.equal(held[:, 2], video[:, 1]) and torch.equal(held[:, 3], video[:, 1])
    assert torch.equal(hold_last_frame(video, 3)[:, :3], video[:, :3])
    for known in (0, 4, -1):
        with pytest.raises(ValueError, match="from 1 to 3 of the 4 frames"):
            hold_last_frame(video, known)


def test_tokens_of_a_machine_without_datasets_are_the_same(tmp_path, monkeypatch):
    parquet = TokenDataset.load(write_tokens(tmp_path / "parquet", "made up"))
    monkeypatch.setattr(parquet_shards, "find_spec", lambda name: None)
    plain = TokenDataset.load(write_tokens(tmp_path / "plain", "made up"))
    assert [path.suffix for path in (tmp_path / "plain" / "data").iterdir()] == [".safetensors"]
    assert len(plain) == len(parquet) and len({*plain.counts()}) > 1
    for index in range(len(parquet)):
        for name, value in vars(parquet[index]).items():
            found = getattr(plain[index], name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
