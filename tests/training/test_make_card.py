"""The model card: made from the files of a checkpoint, for the weights that were measured and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from check_cards import check_card
from generator_samples import make_generator
from huggingface_hub import ModelCard

from evatok_hf import EvatokModel
from training.make_card import load_texts, main, render_card, render_generator_card, with_predictions

ROOT = Path(__file__).parents[2]

YAML = ROOT / "model_cards" / "evatok_tiny.yaml"
TEXTS = load_texts(YAML)


@pytest.fixture
def trained(checkpoint, tmp_path) -> Path:
    """A checkpoint with the record of a training run and an evaluation beside it."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(checkpoint / "tokenizer", folder)
    arguments = {
        "l1_weight": 1.0,
        "l2_weight": 0.5,
        "spectral_weight": 0.0,
        "spectral_end": 0,
        "perceptual_weight": 0.1,
        "perceptual": "perceptual-effnet-lite0",
    }
    arguments |= {"perceptual_start": 7, "assignment": "random"}
    run = {"command": "training/train_tokenizer.py --steps 9", "seed": 3, "steps": 9, "clips": 12345, "seconds": 600}
    run |= {"parameters": 98765, "machine": "2 cores", "torch": "2", "arguments": arguments}
    run |= {"datasets": ["someone/clips"], "base_model": ["someone/earlier"]}
    (folder / "training.json").write_text(json.dumps(run))
    scores = [{"psnr": 17.25, "perceptual-effnet-lite0": 1.5}, {"psnr": 16.5, "perceptual-effnet-lite0": 1.75}]
    row = {"length": 32, "tokens": 128, "bits": 768, "model": scores[0], "baseline": scores[1]}
    evaluation = {"fingerprint": EvatokModel.from_pretrained(folder).fingerprint(), "videos": 8, "clips": 103}
    evaluation |= {
        "lengths": [row],
        "command": "python benchmarks/quality/reconstruction.py",
        "machine": "2 cores",
        "torch": "2",
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_the_card_says_what_the_files_say(trained):
    arguments = ["--checkpoint", str(trained), "--evaluation", str(trained.parent / "evaluation.json")]
    main([*arguments, "--texts", str(YAML)])
    card = ModelCard((trained / "README.md").read_text())
    assert card.data.license == "apache-2.0" and "arxiv:2603.12267" in card.data.tags
    assert card.data.eval_results[0].metric_value == 17.25
    assert card.data.datasets == ["someone/clips"] and card.data.base_model == ["someone/earlier"]
    assert card.data.metrics == ["psnr", "perceptual-effnet-lite0"]
    (trained / "loss_curve.png").touch()
    assert check_card((trained / "README.md").read_text(), "model", trained) == []
    for said in ("98,765", "12,345 clips, seed 3, 10 minutes", "| 128 | 768 | 17.25 | 16.50 | 1.5000 | 1.7500 |"):
        assert said in card.text


def test_refined_figures_stand_beside_the_others(trained):
    evaluation = json.loads((trained.parent / "evaluation.json").read_text())
    assert "efined" not in render_card(trained, evaluation, TEXTS)
    evaluation["refinement_steps"] = 10
    evaluation["lengths"][0]["refined"] = {"psnr": 18.25, "perceptual-effnet-lite0": 1.25}
    text = render_card(trained, evaluation, TEXTS)
    assert "`--refine 10`" in text
    assert "\n| 128 | 768 | 17.25 | 18.25 | 16.50 | 1.5000 | 1.2500 | 1.7500 |\n" in text


def test_a_run_that_went_on_says_what_came_before(trained):
    run = json.loads((trained / "training.json").read_text())
    later = {**run, "command": "training/train_tokenizer.py --init_from earlier", "steps": 4, "continues": run}
    (trained / "training.json").write_text(json.dumps(later))
    evaluation = json.loads((trained.parent / "evaluation.json").read_text())
    text = render_card(trained, evaluation, TEXTS)
    assert text.index("run 1: loss") < text.index("9 steps") < text.index("run 2: loss") < text.index("4 steps")
    assert text.index(run["command"]) < text.index(later["command"])


def test_licences_are_counted_from_the_list_of_videos(trained):
    listed = (ROOT / "model_cards" / "evatok_tiny_sources.csv").read_text()
    main(["--checkpoint", str(trained), "--evaluation", str(trained.parent / "evaluation.json"), "--texts", str(YAML)])
    assert (trained / "sources.csv").read_text() == listed
    assert f"Apache-2.0 {listed.count(',Apache-2.0')}" in (trained / "README.md").read_text()


@pytest.mark.parametrize(
    ("listed", "message"), [("source,licence\n", "at least one row"), ("file\na.mp4\n", "must have columns")]
)
def test_a_list_of_videos_that_says_nothing(tmp_path, listed, message):
    (tmp_path / "videos.csv").write_text(listed)
    (tmp_path / "texts.yaml").write_text("sources: videos.csv\n")
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / "texts.yaml")
    (tmp_path / "texts.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match="names no sources"):
        load_texts(tmp_path / "texts.yaml")


def test_scores_by_protocol(trained):
    evaluation = json.loads((trained.parent / "evaluation.json").read_text())
    score = {
        "tokenizer": {"fingerprint": evaluation["fingerprint"]},
        "protocol": {"name": "all_clips"},
        "complete": True,
        "clips": 33,
        "allocation": {"strategy": "router", "quality": 1.2},
        "tokens_per_clip": 150.25,
        "metrics": {"psnr": {"value": 20.125}, "codebook": {"use": 0.5, "entropy": 9.25}, "tokens": {"value": 150.25}},
        "command": "training/evaluate.py --protocol all_clips",
    }
    fixed = {**score, "complete": False, "allocation": {"strategy": "fixed", "lengths": [32, 16, 8, 8]}}
    fixed["metrics"] = {"psnr": {"value": 19.5}, "fd-transnetv2": {"value": 4.25}}
    for name, content in (("a.json", score), ("b.json", fixed)):
        (trained.parent / name).write_text(json.dumps(content))
    arguments = ["--checkpoint", str(trained), "--evaluation", str(trained.parent / "evaluation.json")]
    main([*arguments, "--texts", str(YAML), "--scores", str(trained.parent / "a.json"), str(trained.parent / "b.json")])
    text = (trained / "README.md").read_text()
    assert "| all_clips | 33 | router, w_q 1.2 | 150.2 | 20.12 | 50 % used, 9.25 bits | - | `" in text
    assert "| all_clips (in part) | 33 | 32, 16, 8, 8 | 150.2 | 19.5 | - | 4.25 | `" in text
    assert json.loads((trained / "scores.json").read_text()) == [score, fixed]
    with pytest.raises(ValueError, match="run training/evaluate.py on it again"):
        render_card(trained, evaluation, TEXTS, [{**score, "tokenizer": {"fingerprint": "0" * 16}}])


def test_an_evaluation_of_other_weights_is_refused(trained):
    evaluation = json.loads((trained.parent / "evaluation.json").read_text())
    with pytest.raises(ValueError, match="run benchmarks/quality/reconstruction.py on it again"):
        render_card(trained, {**evaluation, "fingerprint": "0" * 16}, TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "no UTF-8"),
        (b"[" * 5000, "nested too deep"),
        (b"[]", "no table"),
        (b"{}", "not in its files .*fingerprint"),
        (b'{"fingerprint": "FINGERPRINT", "lengths": []}', "not in its files"),
        (b'{"fingerprint": "FINGERPRINT", "lengths": [{"model": 1}]}', "not in its files"),
    ],
)
def test_a_damaged_evaluation_is_refused(trained, content, message):
    path = trained.parent / "evaluation.json"
    path.write_bytes(content.replace(b"FINGERPRINT", EvatokModel.from_pretrained(trained).fingerprint().encode()))
    with pytest.raises(ValueError, match=message) as refused:
        main(["--checkpoint", str(trained), "--evaluation", str(path), "--texts", str(YAML)])
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_what_the_card_says_must_be_there(trained):
    (trained / "training.json").write_text('{"continues": [1]}')
    with pytest.raises(ValueError, match="not in its files"):
        main(["--checkpoint", str(trained), "--evaluation", str(trained.parent / "evaluation.json"), f"--texts={YAML}"])


@pytest.fixture
def generator(tmp_path) -> Path:
    """A generator with the record of its training and a report beside it."""
    model, folder = make_generator(tokenizer_fingerprint="00ff", fps=12.5), tmp_path / "generator"
    model.save_pretrained(folder)
    data = {"num_frames": 16, "image_size": 64, "clips": 1234, "mean_tokens": 9.5, "allocation": "router (quality 1.2)"}
    data |= {"videos": 321, "clips_per_video": 6, "strides": [3]}
    run = {"data": {**data, "command": "training/tokenize_dataset.py"}, "command": "training/train_generator.py"}
    run |= {"steps": 7, "row_length": 30, "sequences": 4321, "epochs": 3.5, "tokens": 5678, "seed": 2, "seconds": 120}
    run |= {"parameters": 24680, "machine": "2 cores", "torch": "2", "arguments": {"prediction": 0.25}}
    (folder / "training.json").write_text(json.dumps(run))
    (tmp_path / "generation.json").write_text(json.dumps(report_of(model.fingerprint())))
    return folder


def report_of(fingerprint: str) -> dict:
    sets = ("floor", "reconstructed", "generated", "frozen")
    interval = {"value": 0.875, "low": 0.75, "high": 1.0}
    way = {"psnr_by_clip": 21.25, "psnr_of_mean_error": 20.5, "distance": 0.5}
    entry = {
        "generator_fingerprint": fingerprint,
        "tokenizer_fingerprint": "00ff",
        "allocation": "router (quality 1.2)",
        "samples": 40,
        "seconds_a_sample": 0.5,
        "classes": {
            "real": {
                **{name: {"accuracy": 0.75} for name in ("real", "reconstructed", "generated")},
                "generated_over_real": interval,
            }
        },
        "fd": {
            "clips": 38,
            "whole": dict.fromkeys(sets, 1.5),
            "within_class": {**dict.fromkeys(sets, 2.5), "wrong_class": None},
        },
        "tokens": {"generated": 110.0, "reconstructed": 112.0, "uniform": 256, "rank_correlation": interval},
        "prediction": {
            "known_frames": 5,
            "frames": {"9": {name: way for name in ("copied", "predicted", "reconstructed")}},
        },
    }
    settings = {"guidance": 1.25, "temperature": 1.0}
    report = {"checkpoints": {"model": entry, "compare": entry}, "settings": settings, "test_clips": 38}
    report |= {"classes": ["run", "walk"], "aims": {"samples": {"met": False}}}
    return {**report, "perceptual": "effnet", "command": "generation.py", "machine": "2 cores", "torch": "2"}


def test_the_card_of_a_generator_says_what_its_files_say(generator):
    arguments = ["--generator", str(generator), "--generation", str(generator.parent / "generation.json")]
    main([*arguments, "--texts", str(YAML)])
    card = ModelCard((generator / "README.md").read_text())
    assert card.data.license == "apache-2.0" and "arxiv:2603.12267" in card.data.tags
    for said in (
        "24,680",
        "walk, run",
        "12.50 frames a second",
        "1,234 clips",
        "321 videos of 2 game worlds",
        "for 2 minutes on 2 cores",
        "25 % of the sequences are frame prediction",
        "names the class of 75.0 % of real clips",
        "| generated | 1.50 | 2.50 |",
        "| 9 | 21.25, 20.50; 0.500 | 21.25, 20.50; 0.500 | 21.25, 20.50; 0.500 |",
        "0.88 (0.75 to 1.00)",
    ):
        assert said in card.text, said
    assert (generator / "generation.json").exists() and card.data.datasets == []
    assert check_card((generator / "README.md").read_text(), "model", generator) == []


def test_predictions_may_be_measured_by_themselves(generator):
    whole = json.loads((generator.parent / "generation.json").read_text())
    assert "The predictions by" not in render_generator_card(generator, whole, TEXTS)
    alone = {**whole, "command": "generation.py --predictions_only", "aims": {"dB above copying": {"met": True}}}
    entry = alone["checkpoints"]["model"]
    way = {"psnr_by_clip": 23.25, "psnr_of_mean_error": 22.5, "distance": 0.25}
    frames = {"9": {**entry["prediction"]["frames"]["9"], "predicted": way}}
    alone["checkpoints"] = {"model": {**entry, "prediction": {"known_frames": 5, "frames": frames}}}
    merged = with_predictions(whole, alone)
    assert merged["aims"] == {"samples": {"met": False}, "dB above copying": {"met": True}}
    text = render_generator_card(generator, merged, TEXTS)
    assert "| 9 | 21.25, 20.50; 0.500 | 23.25, 22.50; 0.250 | 21.25, 20.50; 0.500 |" in text
    assert (
        "Measured by `generation.py` on 2 cores, torch 2. The predictions by `generation.py --predictions_only`" in text
    )
    with pytest.raises(ValueError, match="other test clips"):
        with_predictions(whole, {**alone, "test_clips": 3})
    alone["checkpoints"]["model"]["tokenizer_fingerprint"] = "ffff"
    with pytest.raises(ValueError, match="predictions are of tokenizer_fingerprint"):
        with_predictions(whole, alone)


def test_a_report_of_another_generator_is_refused(generator):
    (generator.parent / "generation.json").write_text(json.dumps(report_of("ffff")))
    with pytest.raises(ValueError, match="figures are of weights ffff"):
        main(
            [
                "--generator",
                str(generator),
                "--generation",
                str(generator.parent / "generation.json"),
                "--texts",
                str(YAML),
            ]
        )


@pytest.mark.parametrize("arguments", [["--generator", "x"], ["--checkpoint", "x"], []])
def test_a_model_comes_with_its_figures(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--texts", str(YAML)])
    assert "belong together" in (error := capsys.readouterr().err) or "nothing to write" in error
