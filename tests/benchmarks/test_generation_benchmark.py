"""The benchmark of generated clips: its figures against hand-computed ones, its classifier, and a run of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from router_samples import make_router
from tokenizer_samples import make_tokenizer, processor
from video_samples import encode, moving_frames

from benchmarks.generation import classifier as classifiers
from benchmarks.generation import figures
from benchmarks.generation import measure as generation
from benchmarks.generation import report as reporting
from benchmarks.generation.checkpoint import sample_seeds
from benchmarks.generation.clips import data_key, list_videos, read_clips
from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics.frechet import FrechetStatistics, frechet_distance
from evatok_hf.pictures.samples import Sample, contact_sheet

CLASSES = ["dark", "light"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    # Ranks differ by 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15).
    result = figures.rank_correlation([10, 20, 30, 40], [1, 30, 2, 400], 200)
    assert result["value"] == pytest.approx(0.8)
    assert result["low"] <= 0.8 <= result["high"] and result == figures.rank_correlation(
        [10, 20, 30, 40], [1, 3, 2, 4], 200
    )
    assert figures.rank_correlation([1, 2, 3], [3, 2, 1])["value"] == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: 1.5 / sqrt(1.5 * 2).
    assert figures.rank_correlation([5, 5, 9], [1, 2, 3])["value"] == pytest.approx(3**0.5 / 2)
    for useless in (([1, 1, 1], [1, 2, 3]), ([1, 2], [1, 2])):
        assert figures.rank_correlation(*useless) == {"value": None, "low": None, "high": None}


def test_shares_over_shares():
    right, reference = torch.tensor([True, False] * 20), torch.tensor([True, True, True, False] * 10)
    result = figures.ratio(right, reference)
    assert result["value"] == pytest.approx(0.5 / 0.75) and result["low"] < result["value"] < result["high"]
    assert figures.ratio(right, torch.zeros(4, dtype=torch.bool))["value"] is None


def test_sets_get_the_same_number_of_each_class():
    a, b = torch.tensor([0, 1, 0, 1, 1, 2]), torch.tensor([1, 1, 1, 0, 0, 0])
    first, second = figures.same_proportions([a, b], num_classes=3)
    assert first.tolist() == [0, 2, 1, 3, 4] and second.tolist() == [3, 4, 0, 1, 2]
    first, second = figures.same_proportions([a, b], num_classes=3, most=1)
    assert first.tolist() == [0, 1] and second.tolist() == [3, 0]


def test_clips_of_other_classes():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert figures.of_other_classes(labels, 1, 2).tolist() == [0, 5]
    assert figures.of_other_classes(labels, 0, 100).tolist() == [2, 3, 4, 5]


def test_frozen_clips_hold_their_first_frame():
    video = torch.arange(2 * 3 * 4).view(2, 3, 1, 2, 2)
    still = figures.frozen(video)
    assert (
        still.shape == video.shape and torch.equal(still[:, 2], video[:, 0]) and torch.equal(still[:, 0], video[:, 0])
    )


def test_frechet_distance_of_few_clips_is_the_package_s():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 20, generator=generator) * 2, torch.randn(12, 20, generator=generator) + 1
    statistics = [FrechetStatistics(20), FrechetStatistics(20)]
    for of, features in zip(statistics, (a, b), strict=True):
        of.update(features)
    assert figures.frechet(a, b) == pytest.approx(frechet_distance(*statistics), rel=1e-8)
    assert figures.frechet(a, a) == pytest.approx(0, abs=1e-9)
    one, two, three = (figures.frechet(a[of], b[of]) for of in (slice(3), slice(3, 6), slice(6, 7)))
    assert one > 0 and two > 0 and three is None
    assert figures.mean_known([one, two, three]) == pytest.approx((one + two) / 2)


def test_predictions_are_compared_clip_by_clip():
    truth = torch.zeros(4, 3, 3, 2, 2)
    truth[0] = 0.5
    copied = truth + torch.tensor([0.0, 0.2, 0.4, 0.8]).view(4, 1, 1, 1, 1)
    better = truth + (copied - truth) / 10**0.5  # a tenth of the squared error
    errors = {
        name: figures.squared_errors(truth, video, [2])[:, 0] for name, video in {"copied": copied, "b": better}.items()
    }
    assert errors["copied"] == pytest.approx([0, 0.01, 0.04, 0.16], abs=1e-8)
    report = figures.compare_predictions(errors, {"copied": np.arange(4.0), "b": np.arange(4.0) - 1}, "copied", 200)
    copy, mine = report["copied"], report["b"]
    assert copy["psnr_of_mean_error"] == pytest.approx(-10 * np.log10(0.21 / 4))
    # The clip that stands still counts 50 dB for both.
    assert copy["psnr_by_clip"] == pytest.approx((50 + 20 - 10 * np.log10(0.04) - 10 * np.log10(0.16)) / 4)
    assert copy["capped"] == mine["capped"] == 1 and "difference" not in copy
    gain = mine["difference"]
    assert gain["psnr_of_mean_error"]["value"] == pytest.approx(10)
    assert gain["psnr_of_mean_error"]["low"] == pytest.approx(10)  # equal in every pair
    assert gain["psnr_by_clip"]["value"] == pytest.approx(7.5) and gain["psnr_by_clip"]["low"] < 7.5
    assert gain["distance"] == {"value": -1, "low": -1, "high": -1}


def test_seeds_of_samples_do_not_depend_on_how_many_there_are():
    few, many = sample_seeds(1, 3, 2), sample_seeds(1, 3, 5)
    assert few[:2] == many[:2] and few[2:4] == many[5:7] and len(set(many)) == 15
    assert not set(many) & set(sample_seeds(2, 3, 5))


# --- classifier -------------------------------------------------------------------------------------------------------


def two_kinds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 8, 3, 16, 16): noise that is reddish or bluish."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    video = torch.randint(80, 160, (count, 8, 3, 16, 16), generator=generator)
    video[labels == 0, :, 0] += 60
    video[labels == 1, :, 2] += 60
    return video.to(torch.uint8), labels


def test_the_classifier_tells_two_classes_apart(tmp_path):
    settings = classifiers.ClassifierSettings(epochs=3, batch_size=8, width=8)
    model = classifiers.train_classifier(*two_kinds(32, seed=0), 2, settings)
    video, labels = two_kinds(20, seed=1)
    answers = classifiers.predict_classes(model, video)
    result = classifiers.accuracy(answers, labels, ["red", "blue", "none"])
    assert result["accuracy"] == 1 and result["by_class"]["blue"] == {
        "clips": 10,
        "accuracy": 1,
        "taken_for": "blue",
    }
    assert result["by_class"]["none"]["accuracy"] is None

    again = classifiers.train_classifier(*two_kinds(32, seed=0), 2, settings)
    assert torch.equal(again.head.weight, model.head.weight)
    made = []

    def clips() -> tuple[torch.Tensor, torch.Tensor]:
        made.append(True)
        return two_kinds(32, seed=0)

    for data, times in (("a", 1), ("a", 1), ("b", 2)):
        kept, _ = classifiers.cached_classifier(tmp_path, {"data": data}, clips, 2, settings)
        assert torch.equal(kept(to_float(video)), model(to_float(video)))
        assert len(made) == times
    with pytest.raises(ValueError, match="label below 2"):
        classifiers.train_classifier(video, labels + 1, 2, settings)


def test_augmentation_mirrors_and_blurs():
    video = to_float(two_kinds(16, seed=0)[0])
    mirrored = classifiers.augment(video.clone(), 0, 4, torch.Generator().manual_seed(0))
    same = [torch.equal(a, b) for a, b in zip(mirrored, video, strict=True)]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, video, strict=True)]
    assert any(same) and any(flipped) and all(a != b for a, b in zip(same, flipped, strict=True))
    blurred = classifiers.augment(video.clone(), 1, 4, torch.Generator().manual_seed(0))
    assert blurred.shape == video.shape and blurred.var() < 0.7 * mirrored.var()


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 3), ("test", 2)):
        for kind, light in (("dark", 0.3), ("light", 1.0)):
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                frames = moving_frames(33 + index, 36, 44) * light + 10 * index
                encode(folder / split / kind / f"{index}.mp4", frames.clip(0, 255).astype(np.uint8), fps=25)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    with torch.random.fork_rng():
        tokenizer = make_tokenizer()
        fields = {name: getattr(tokenizer.config, name) for name in ("codebook_size", "block_lengths", "num_blocks")}
        config = EvatokGeneratorConfig(
            **fields,
            class_names=["dark", "light", "unseen"],
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
            fps=12.5,
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
        generator = EvatokForCausalLM(config)
    tokenizer.save_pretrained(folder / "tokenizer")
    processor().save_pretrained(folder / "tokenizer")
    make_router(tokenizer.config).save_pretrained(folder / "router")
    generator.save_pretrained(folder / "generator")
    data = {"strategy": "uniform", "lengths": 16, "quality": None, "allocation": "uniform (16 tokens)"}
    data |= {"flip_probability": 0.5, "known_frames": 5}
    (folder / "generator" / "training.json").write_text(json.dumps({"steps": 7, "tokens": 900, "data": data}))
    return folder


def test_a_run_measures_both_checkpoints_and_writes_json_and_picture(videos, checkpoint, tmp_path, capsys):
    output, sheet = tmp_path / "out" / "g.json", tmp_path / "out" / "g.png"
    options = ["--data", videos, "--model", checkpoint, "--compare", checkpoint, "--output", output, "--sheet", sheet]
    options += ["--cache", tmp_path / "cache", "--stride", 2, "--quick"]
    report = generation.main([str(option) for option in options])
    assert json.loads(output.read_text()) == report
    assert len(list((tmp_path / "cache").glob("classifier-*.safetensors"))) == 1
    assert len(list((tmp_path / "cache").glob("features-*.safetensors"))) == 5  # all but those of samples
    with Image.open(sheet) as picture:
        assert picture.width > 600 and picture.height > 250
    assert report["classes"] == CLASSES and report["test_clips"] == 4 and report["mirrored"] == 0.5

    one, two = report["checkpoints"]["model"], report["checkpoints"]["compare"]
    for name in ("classes", "fd", "tokens", "training"):
        assert one[name] == two[name]  # the same checkpoint, the same figures
    assert one["prediction"]["frames"] == two["prediction"]["frames"]
    assert one["fd"]["clips"] == 4 and one["fd"]["clips_by_class"] == {"dark": 2, "light": 2}
    assert set(one["fd"]["within_class"]) == {*one["fd"]["whole"], "wrong_class"}
    assert all(value > 0 for value in one["fd"]["whole"].values())
    # Real clips have the lengths that the generator's training data had.
    assert one["tokens"]["reconstructed"] == 64 and one["tokens"]["uniform"] == 64
    assert one["allocation"] == "uniform (16 tokens)"
    assert one["tokens"]["rank_correlation"]["value"] is None  # of two classes
    assert set(one["prediction"]["frames"]) == {"9", "13", "16"} and one["prediction"]["clips"] == 2
    assert one["prediction"]["frames"]["9"]["predicted"]["psnr_by_clip"] > 0
    assert set(one["classes"]) == {"real"}
    assert report["aims"]["rank correlation of tokens by class"]["reached"] is False

    printed = capsys.readouterr().out
    for words in ("Class found by", "fd-transnetv2", "Lengths", "Prediction of 2", "Side by side", "| reached |"):
        assert words in printed


def test_predictions_alone_are_those_of_a_whole_run(videos, checkpoint, tmp_path, capsys):
    options = ["--data", videos, "--model", checkpoint, "--stride", 2, "--quick", "--cache", tmp_path / "cache"]
    alone = generation.main([str(option) for option in [*options, "--predictions_only"]])
    whole = generation.main([str(option) for option in options])
    frames = [report["checkpoints"]["model"]["prediction"]["frames"] for report in (alone, whole)]
    assert frames[0] == frames[1]
    assert alone["aims"] == {name: aim for name, aim in whole["aims"].items() if "copying" in name}
    assert len(alone["aims"]) == 6 and "Prediction of 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--predictions_only goes with no --compare"):
        generation.main([str(option) for option in [*options, "--predictions_only", "--compare", checkpoint]])


def test_clips_are_read_and_mirrored_the_same_way_every_time(videos):
    found, classes = list_videos(str(videos), "train", per_class=2)
    assert classes == CLASSES and [len(row) for row in found] == [2, 2]
    clips = read_clips(found, classes, num_frames=16, image_size=32, stride=2, name="clips")
    assert clips.video.shape == (4, 16, 3, 32, 32) and clips.labels.tolist() == [0, 0, 1, 1] and clips.fps == 12.5
    assert torch.equal(clips.mirrored(1, seed=0).video, clips.video.flip(-1))
    assert torch.equal(clips.mirrored(0.5, seed=0).video, clips.mirrored(0.5, seed=0).video)
    assert data_key(found) == data_key(list_videos(str(videos), "train", per_class=2)[0])
    assert data_key(found) != data_key(list_videos(str(videos), "train")[0])
    with pytest.raises(ValueError, match="lower --stride"):
        read_clips(found, classes, num_frames=16, image_size=32, stride=3, name="clips")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "1"], "another --stride"),
        (["--samples", "1"], "at least 2"),
        (["--sheet", "x.doc"], "no picture format"),
    ],
)
def test_mistakes(videos, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        generation.main(["--data", str(videos), "--model", str(checkpoint), *options])


def test_a_checkpoint_without_generator(videos, checkpoint):
    with pytest.raises(ValueError, match="has no generator"):
        generation.main(["--data", str(videos), "--model", str(checkpoint / "tokenizer")])


# --- report -----------------------------------------------------------------------------------------------------------


def test_a_figure_with_its_interval():
    assert reporting.with_interval({"value": 0.5, "low": 0.25, "high": None}, 2, "+") == "+0.50 (+0.25 to -)"


def test_a_sheet_has_a_row_a_class():
    frames = np.zeros((16, 8, 8, 3), np.uint8)
    samples = [Sample(frames, [8, 16, 32, 64], name, 0) for name in ("one", "one", "one", "two")]
    tall = contact_sheet(samples, 64, "title", "subtitle", 72, samples_per_row=3)
    flat = contact_sheet(samples[:3], 64, "title", "subtitle", 72, samples_per_row=3)
    assert tall.width == flat.width and tall.height - flat.height == 106
