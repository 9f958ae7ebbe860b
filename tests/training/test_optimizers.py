"""training/common/optimizers.py: Muon beside AdamW, and that a run with it resumes exactly."""

from __future__ import annotations

import shutil

import pytest
import torch
from training_samples import MODEL, make_videos, options, read_log, same_weights, train, weights

from evatok_hf import EvatokConfig, EvatokModel
from training.common.optimizers import Muon, layer_matrices, make_optimizer, orthogonalize


def test_singular_values_come_near_one():
    matrices = torch.randn(2, 24, 10, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(matrices, torch.float32)
    values = torch.linalg.svdvals(made)
    assert made.shape == matrices.shape and values.min() > 0.5 and values.max() < 1.3


def test_agrees_with_the_one_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((16, 16), (32, 16), (16, 32), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    pair = (Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert (a - b).norm() < 0.02 * moved  # theirs computes in bfloat16


def test_it_is_for_the_matrices_of_the_layers():
    model = EvatokModel(EvatokConfig(**MODEL))
    optimizer = make_optimizer("muon", model, 1e-3, 0.02, (0.9, 0.95), 0.1)
    others, matrices = (group["params"] for group in optimizer.param_groups)
    assert len(matrices) == 2 * 10 and len(matrices) + len(others) == len(list(model.parameters()))
    assert not any(parameter is model.quantizer.weight for parameter in matrices)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.02]

    model.decoder.requires_grad_(False)
    assert len(layer_matrices(model)) == 10
    with pytest.raises(ValueError, match="adamw"):
        make_optimizer("muon", model.quantizer, 1e-3, 0.02, (0.9, 0.95), 0.1)


def test_a_run_resumes_exactly(tmp_path):
    """With the entropy of some tokens, spliced clips and a constant learning rate before its cooldown too."""
    (tmp_path / "videos").mkdir()
    videos = make_videos(tmp_path / "videos")
    more = ["--optimizer=muon", "--splice_probability=0.5", "--save_every=2", "--cooldown_steps=2", "--warmup_steps=1"]

    def run(name: str, *rest: str) -> list[str]:
        given = options(tmp_path / name, videos, *more, *rest)
        return [word.replace('"image_size"', '"entropy_tokens": 8, "image_size"') for word in given]

    train(run("whole", "--steps=5"))
    train(run("parts", "--steps=4"))
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")  # as if it had been stopped before its cooldown
    (tmp_path / "parts" / "log.jsonl").unlink()
    train(run("parts", "--steps=5", "--resume=latest"))
    whole, parts = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
    assert [line["learning_rate"] for line in whole] == pytest.approx([1e-5, 1e-3, 1e-3, 1e-3, 5.5e-4])
    assert whole[2:] == parts
    final = [weights(tmp_path / name / "checkpoint-5") for name in ("whole", "parts")]
    assert same_weights(*final)


@pytest.mark.parametrize(
    "wrong", ["--optimizer=sgd", "--cooldown_steps=7", "--splice_probability=2", "--splice_probability=0.1"]
)
def test_wrong_options_are_refused(wrong, tmp_path, capsys):
    rest = ["--batch_size=1"] if wrong.endswith("0.1") else []
    with pytest.raises(SystemExit) as stopped:
        train(options(tmp_path / "run", tmp_path, "--steps=6", wrong, *rest))
    assert stopped.value.code == 2 and wrong.split("=")[0] in capsys.readouterr().err
