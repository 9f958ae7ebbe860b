"""The published LPIPS with a backbone from a file; the backbones here have random weights, nothing is fetched."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
import torchvision

from evatok_hf.metrics import load_perceptual

BUILD = {"lpips-vgg": torchvision.models.vgg16, "lpips-alex": torchvision.models.alexnet}


def trunk(name: str, seed: int) -> torch.nn.Module:
    """A torchvision backbone; the classifier, most of its weights, is one zero seen in many places: a small file."""
    with torch.device("meta"):
        network = BUILD[name](weights=None)
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, like in network.state_dict().items():
        if key.startswith("features."):
            scale = (2 / like[0].numel()) ** 0.5 if like.ndim == 4 else 0.1
            state[key] = scale * torch.randn(like.shape, generator=generator)
        else:
            state[key] = torch.zeros(()).expand(like.shape)
    network.load_state_dict(state, assign=True)
    return network.eval()


def frames(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", list(BUILD))
def test_a_local_backbone_is_the_one_that_measures(name, tmp_path):
    network = trunk(name, seed=0)
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    metric = load_perceptual(name, tmp_path / "backbone.pth")
    x, y = frames(1), frames(2)
    distance = metric(x, y)
    assert distance.shape == (2,) and metric(x, x).tolist() == [0, 0]
    assert not any(parameter.requires_grad for parameter in metric.parameters()) and not metric.training

    # LPIPS by hand: unit-normalised features after the last ReLU of each stage, weighted by channel, mean over space.
    last = {"lpips-vgg": (3, 8, 15, 22, 29), "lpips-alex": (1, 4, 7, 9, 11)}[name]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2)
    a, b = ((z - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for z in (x, y))
    with torch.no_grad():
        for index, layer in enumerate(network.features[: last[-1] + 1]):
            a, b = layer(a), layer(b)
            if index in last:
                weights = metric.metric.lins[last.index(index)].model[-1].weight  # (1, channels, 1, 1)
                units = [z / z.norm(dim=1, keepdim=True).clamp_min(1e-10) for z in (a, b)]
                expected += ((units[0] - units[1]).square() * weights).sum(1).mean((1, 2))
    assert torch.allclose(distance, expected, rtol=1e-4)
    assert (expected > 1e-4).all()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth is not a torchvision state dict for alex") as caught:
        load_perceptual("lpips-alex", tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_and_a_missing_file_are_refused(tmp_path):
    for content in ({"features.0.weight": torch.zeros(2)}, torch.zeros(2)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth is not a torchvision state dict for alex"):
            load_perceptual("lpips-alex", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="nowhere.pth is not a torchvision state dict for alex"):
        load_perceptual("lpips-alex", tmp_path / "nowhere.pth")


def test_weights_that_cannot_be_fetched_are_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is in this cache
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ValueError, match="could not fetch torchvision's alex weights .*Name or service not known"):
        load_perceptual("lpips-alex")
