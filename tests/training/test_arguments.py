"""training/common/arguments.py: a YAML file and the command line fill the same fields, and mistakes end with code 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from training.common import arguments
from training.common.arguments import parse_arguments


@dataclass
class Options:
    output_dir: str = field(metadata={"help": "where"})
    train_data: list[str] = field(metadata={"help": "what"})
    steps: int = field(default=10, metadata={"help": "how long"})
    rate: float = 1e-4
    precision: str = "bf16"
    overrides: str = "{}"
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    shared: bool = False
    resume: str | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}.")


REQUIRED = ["--output_dir", "out", "--train_data", "a", "b"]


def parse(tmp_path: Path, text: str, *argv: str) -> Options:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return parse_arguments(Options, "Trains.", ["--config", str(file), *argv])[0]


def refused(capsys, *argv: str) -> str:
    """The message with which the parser ends."""
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Options, "Trains.", list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults_and_facts():
    options, facts = parse_arguments(Options, "Trains.", REQUIRED)
    assert options == Options("out", ["a", "b"])
    assert facts["steps"] == 10 and facts["train_data"] == ["a", "b"] and set(facts) == set(vars(options))


def test_the_command_line_overrides_the_file(tmp_path):
    text = "steps: 20\nrate: 1.0e-3\nscale: [0.5, 0.75]\nshared: true\nresume: null\n"
    options = parse(tmp_path, text, *REQUIRED, "--steps", "30", "--scale", "0.25", "1")
    assert (options.steps, options.rate, options.scale) == (30, 1e-3, [0.25, 1.0])
    assert options.shared is True and options.resume is None
    assert parse(tmp_path, text, *REQUIRED, "--shared", "false").shared is False
    assert parse(tmp_path, "", *REQUIRED) == Options("out", ["a", "b"])


def test_required_fields_may_stand_in_the_file(tmp_path):
    options = parse(tmp_path, "output_dir: out\ntrain_data: [a, b]\n")
    assert (options.output_dir, options.train_data) == ("out", ["a", "b"])
    assert parse(tmp_path, "output_dir: out\ntrain_data: [a, b]\n", "--train_data", "c").train_data == ["c"]


def test_values_of_the_file_are_read_as_on_the_command_line(tmp_path):
    text = "train_data: videos\nrate: 1e-3\nprecision: no\noverrides: {image_size: 32, block_lengths: [2, 4]}\nsteps: 3"
    options = parse(tmp_path, text, "--output_dir", "out")
    assert options.train_data == ["videos"]  # not its letters
    assert options.rate == 1e-3  # which YAML takes for a string
    assert options.precision == "no"  # which YAML takes for false
    assert options.overrides == '{"image_size": 32, "block_lengths": [2, 4]}'


def test_mistakes_end_with_code_2_and_one_line(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("steps: 3\nstep: 4\n")
    message = refused(capsys, *REQUIRED, "--config", str(file))
    assert "unknown fields: ['step']" in message and "train_data" in message
    file.write_text("- steps\n")
    assert "no mapping" in refused(capsys, *REQUIRED, "--config", str(file))
    file.write_text("steps: [\n")
    assert "cannot read" in refused(capsys, *REQUIRED, "--config", str(file))
    file.write_text("steps: many\n")
    assert "--steps" in refused(capsys, *REQUIRED, "--config", str(file))
    file.write_text("steps: 2.5\n")
    assert "--steps" in refused(capsys, *REQUIRED, "--config", str(file))
    assert "No such file" in refused(capsys, *REQUIRED, "--config", str(tmp_path / "absent.yaml"))
    assert "--steps must be at least 1, got 0." in refused(capsys, *REQUIRED, "--steps", "0")
    assert "--stepz" in refused(capsys, *REQUIRED, "--stepz", "3")
    assert "--train_data" in refused(capsys, "--output_dir", "out")


def test_help_names_the_fields(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Options, "Trains.", ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "Trains." in shown and "--steps" in shown and "how long" in shown and "--config" in shown


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bf16_where_the_processor_computes_in_it(monkeypatch, supported, caplog):
    monkeypatch.setattr(arguments.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert arguments.choose_precision("auto", cpu=True) == ("bf16" if supported else "no")
    assert arguments.choose_precision("fp16", cpu=True) == "fp16" and not caplog.messages
    assert arguments.choose_precision("bf16", cpu=True) == "bf16"
    assert len(caplog.messages) == (not supported)


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, no or bf16, got 'fp8'"):
        arguments.choose_precision("fp8", cpu=True, choices=("no", "bf16"))
