"""training/tokenizer/adversarial.py: both sides' losses together, what they train, when they start, several
processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEModel

from training.tokenizer.adversarial import AdversarialLoss
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.augmentation import DRAWS, augment
from training.tokenizer.teachers import Preparation, Teacher

TRAINING = Path(__file__).parents[2] / "training"


def make_teacher() -> Teacher:
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VideoMAEModel(config)
    return Teacher(model.eval().requires_grad_(False), Preparation(32))


def make(kind: str = "both", **options) -> AdversarialLoss:
    given = {"discriminator_start": 0, "patch_channels": 4, **options}
    args = TokenizerArguments(output_dir="run", train_data=["videos"], adversarial=kind, **given)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AdversarialLoss(args, None if kind == "patch" else make_teacher())


def clips(number: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draws(number: int = 2) -> torch.Tensor:
    return torch.rand(number, DRAWS, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["patch", "semantic", "both"])
def test_the_discriminators_learn_and_the_generator_fools_them(kind):
    adversarial = make(kind, augment_probability=0.5)
    real, fake = clips().abs(), nn.Parameter(-clips(seed=1).abs())
    parts = [part for part, _ in adversarial.networks.named_children()]
    optimizer = torch.optim.Adam(adversarial.networks.parameters(), lr=1e-2)

    def discriminator_step():
        return adversarial.discriminator_terms(real, fake, adversarial.networks, draws())

    _, before = discriminator_step()
    for _ in range(15):
        optimizer.zero_grad()
        loss, after = discriminator_step()
        loss.backward()
        optimizer.step()
    assert fake.grad is None
    for part in parts:
        assert after[f"{part}_discriminator"] < before[f"{part}_discriminator"] - 0.3
        assert after[f"{part}_real_logit"] > after[f"{part}_fake_logit"]
    names = {f"{part}_{term}" for part in parts for term in ("discriminator", "real_logit", "fake_logit")}
    assert set(after) == names

    loss, terms = adversarial.generator_terms(fake, draws())
    assert set(terms) == {f"{part}_generator" for part in parts}
    loss.backward()
    with torch.no_grad():
        fake -= 0.5 * fake.grad / fake.grad.norm()
    assert adversarial.generator_terms(fake, draws())[0] < loss


def test_the_generator_step_leaves_the_discriminators_as_they_are():
    adversarial = make("both", adaptive_weight=True)
    state = {name: value.clone() for name, value in adversarial.networks.state_dict().items()}
    scale = nn.Parameter(torch.ones(3, 1, 1))
    reconstruction = clips() * scale
    l1 = (reconstruction - clips(seed=1)).abs().mean()
    loss, _ = adversarial.generator_terms(reconstruction, draws(), l1, scale)
    (l1 + loss).backward()
    assert scale.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversarial.networks.parameters())
    assert adversarial.networks.training
    assert all(torch.equal(value, state[name]) for name, value in adversarial.networks.state_dict().items())


def test_the_total_is_the_weighted_sum():
    adversarial = make("both", adversarial_weight=0.25)
    loss, terms = adversarial.generator_terms(clips(), draws())
    expected = 0.25 * (terms["patch_generator"] + terms["semantic_generator"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        video = augment(clips(), draws())
        logits = adversarial.networks.eval()(video, adversarial.teacher.features(video))
    assert terms["patch_generator"].item() == pytest.approx(-logits["patch"].mean().item(), rel=1e-4)
    assert terms["semantic_generator"].item() == pytest.approx(-logits["semantic"].mean().item(), rel=1e-4)


def test_the_adaptive_weight_makes_gradients_of_the_last_layer_equal():
    adversarial = make("patch", adversarial_weight=1.0, adaptive_weight=True)
    scale = nn.Parameter(torch.ones(3, 1, 1))
    reconstruction = clips() * scale
    l1 = (reconstruction - clips(seed=1)).abs().mean()
    loss, terms = adversarial.generator_terms(reconstruction, draws(), l1, scale)
    wanted, given = (torch.autograd.grad(value, scale, retain_graph=True)[0].norm() for value in (l1, loss))
    assert given.item() == pytest.approx(wanted.item(), rel=0.05)
    assert loss.item() == pytest.approx((terms["patch_adaptive_weight"] * terms["patch_generator"]).item(), rel=1e-5)


def test_lecam_is_part_of_the_loss_and_of_the_state():
    adversarial = make("both", lecam_weight=0.1)
    step = (clips(), clips(seed=1), adversarial.networks.eval(), draws())
    loss, terms = adversarial.discriminator_terms(*step)
    added = sum(terms[f"{part}_{term}"] for part in ("patch", "semantic") for term in ("discriminator", "lecam"))
    assert loss.item() == pytest.approx(added.item(), rel=1e-5) and terms["patch_lecam"] > 0
    resumed = make("both", lecam_weight=0.1)
    resumed.load_state_dict(adversarial.state_dict())
    other = (clips(seed=3), clips(seed=4), adversarial.networks, draws())
    straight = adversarial.discriminator_terms(*other)[1]
    assert resumed.discriminator_terms(*other)[1]["patch_lecam"] == straight["patch_lecam"]
    assert make("both", lecam_weight=0.1).discriminator_terms(*other)[1]["patch_lecam"] != straight["patch_lecam"]
    with pytest.raises(ValueError, match="resume with the settings"):
        make("patch").load_state_dict(adversarial.state_dict())


def test_both_sides_run_once_for_each_backward_pass():
    adversarial, calls = make("both", discriminator_start=5), []
    assert [adversarial.active(step) for step in (4, 5, 6)] == [False, True, True]
    adversarial.networks.register_forward_hook(lambda *_: calls.append("networks"))
    adversarial.teacher.model.register_forward_hook(lambda *_: calls.append("teacher"))
    adversarial.generator_terms(clips(), draws())
    adversarial.discriminator_terms(clips(), clips(), adversarial.networks, draws())
    assert calls == ["teacher", "networks"] * 2

    without = make("none")
    assert without.networks is None and not without.active(5)


def test_checkpoints_hold_only_what_is_trained():
    names = make("semantic").networks.state_dict()
    trained = {name for name, _ in make("semantic").networks.named_parameters()}
    assert {name for name in names if not name.endswith(("._u", "._v"))} == trained
    assert all(name.startswith("semantic.heads.") for name in names)


# --- several processes ------------------------------------------------------------------------------------------------


def both_steps(adversarial: AdversarialLoss, rows: slice, networks: nn.Module | None = None, number: int = 4) -> dict:
    """Two steps of both sides with some rows of a batch -> losses, gradients and LeCAM's state."""
    networks, scale = networks or adversarial.networks, nn.Parameter(torch.ones(3, 1, 1))
    found: dict = {}
    for step in range(2):
        real, source = clips(number, seed=step)[rows], clips(number, seed=step + 9)[rows]
        augmentation = draws(number)[rows]
        fake = source * scale
        l1 = (fake - real).abs().mean()
        loss, terms = adversarial.generator_terms(fake, augmentation, l1, scale)
        (l1 + loss).backward()
        found[f"ratio-{step}"] = terms["patch_adaptive_weight"]
        loss, _ = adversarial.discriminator_terms(real, fake, networks, augmentation)
        found[f"loss-{step}"] = loss.detach()
        loss.backward()
    found["scale"] = scale.grad
    found |= {name: parameter.grad for name, parameter in adversarial.networks.named_parameters()}
    means = [value for state in adversarial.state_dict().values() for value in state["means"]]
    return {**found, "lecam": torch.tensor(means)}


def make_for_processes() -> AdversarialLoss:
    return make("both", lecam_weight=0.5, adaptive_weight=True)


def test_clips_are_independent_of_those_they_are_batched_with():
    """Losses and gradients of four clips are the means of those of two and two."""
    plain = {"lecam_weight": 0.0, "adaptive_weight": False}

    def gradients(rows: slice) -> dict[str, torch.Tensor]:
        adversarial = make("both", **plain)
        real, fake = clips(4)[rows], clips(4, seed=9)[rows].requires_grad_()
        augmentation = draws(4)[rows]
        adversarial.generator_terms(fake, augmentation)[0].backward()
        adversarial.discriminator_terms(real, fake, adversarial.networks, augmentation)[0].backward()
        found = {name: parameter.grad for name, parameter in adversarial.networks.named_parameters()}
        return {**found, "fake": fake.grad.mean((0, 1, 3, 4))}

    whole, first, second = (gradients(rows) for rows in (slice(0, 4), slice(0, 2), slice(2, 4)))
    for name, value in whole.items():
        assert torch.allclose(value, (first[name] + second[name]) / (4 if name == "fake" else 2), atol=1e-5), name


WORKER = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/helpers", sys.argv[2]]
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_adversarial as here

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
adversarial = here.make_for_processes()
found = here.both_steps(adversarial, slice(2 * rank, 2 * rank + 2), DistributedDataParallel(adversarial.networks))
for name in ("scale", "loss-0", "loss-1"):  # what accelerate would average
    dist.all_reduce(found[name])
    found[name] /= 2
torch.save(found, f"{sys.argv[3]}/found-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_two_clips_each_do_what_one_with_four_does(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "worker.py"), str(TRAINING.parent), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    alone = both_steps(make_for_processes(), slice(0, 4))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.allclose(found[name], value, atol=1e-5, rtol=1e-3), name
