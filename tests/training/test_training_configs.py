"""training/configs: every file is understood by its script; the paper's sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig, EvatokModel, EvatokRouter, EvatokRouterConfig
from training.common.arguments import parse_arguments
from training.curate import CurateArguments
from training.generator.arguments import GeneratorArguments
from training.tokenizer.arguments import TokenizerArguments
from training.train_router import RouterArguments

TRAINING = Path(__file__).parents[2] / "training"

NEEDED = {
    TokenizerArguments: ["--output_dir=out", "--train_data=videos"],
    CurateArguments: ["--output_dir=out", "--train_data=videos", "--tokenizer=proxy"],
    RouterArguments: ["--output_dir=out", "--train_data=videos", "--curated=curated"],
    GeneratorArguments: ["--output_dir=out", "--train_tokens=tokens"],
}
CONFIGS = sorted((TRAINING / "configs").glob("*.yaml"))


def read(path: Path, *more: str) -> object:
    kind = TokenizerArguments
    kind = CurateArguments if path.stem.startswith("curate") else kind
    kind = RouterArguments if path.stem.startswith("router") else kind
    kind = GeneratorArguments if path.stem.startswith("generator") else kind
    return parse_arguments(kind, "", [f"--config={path}", *NEEDED[kind], *more])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_understood(path):
    args, values = read(path), yaml.safe_load(path.read_text())
    for name, value in values.items():
        if value == "auto":
            assert getattr(args, name) in ("no", "bf16"), name
        elif name != "model_overrides":
            assert getattr(args, name) == value, name


@pytest.mark.parametrize("name, codes", [("proxy_webvid", 16384), ("final_webvid", 16384), ("final_ucf_k600", 8192)])
def test_tokenizers_of_the_paper(name, codes):
    args = read(TRAINING / "configs" / f"{name}.yaml")
    config = args.model_config()
    assert (config.codebook_size, config.entropy_weight, config.commitment_weight) == (codes, 0.02, 0.25)
    assert (args.alignment_weight, args.l1_weight, args.perceptual) == (0.7, 1.0, "lpips-vgg")
    with torch.device("meta"):
        assert EvatokModel(config).num_parameters() == pytest.approx(145e6, rel=0.01)


def test_the_router_of_the_paper():
    args = read(TRAINING / "configs" / "router.yaml")
    assert (args.quality, args.targets) == (1.2, "argmax")
    with torch.device("meta"):
        router = EvatokRouter(EvatokRouterConfig.from_preset(args.preset, **json.loads(args.model_overrides)))
    assert router.num_parameters() == pytest.approx(19.9e6, rel=0.02)


@pytest.mark.parametrize(("name", "parameters"), [("generator_327m", 327e6), ("generator_633m", 633e6)])
def test_generators_of_the_paper(name, parameters):
    args = read(TRAINING / "configs" / f"{name}.yaml")
    assert json.loads(args.model_overrides) == {"codebook_size": 8192} and args.layout == "length-first"
    config = EvatokGeneratorConfig.from_preset(args.preset, codebook_size=8192, num_classes=101)
    assert args.row_length == 3 + config.num_blocks + config.assignment_space.max_tokens
    with torch.device("meta"):
        assert EvatokForCausalLM(config).num_parameters() == pytest.approx(parameters, rel=0.02)


def test_every_number_of_the_papers_configurations_has_a_source():
    generators = ("generator_327m", "generator_633m")
    for name in ("proxy_webvid", "final_webvid", "final_ucf_k600", "router", "curate_webvid", *generators):
        choices = 0
        for line in (TRAINING / "configs" / f"{name}.yaml").read_text().splitlines():
            choices = 1 if line.startswith("#") and line.endswith("our choice") else choices * (line[:1] != "#")
            if line and not line.startswith("#"):
                assert choices or "  # " in line, f"{name}: {line}"


@pytest.mark.parametrize("path", sorted((TRAINING / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_processes % config.num_machines == 0
