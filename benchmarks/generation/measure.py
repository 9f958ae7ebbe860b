"""Generated clips and predicted frames of a checkpoint, measured on a labelled video folder.

    python benchmarks/generation/measure.py --data VIZDOOM --model CHECKPOINT --compare CHECKPOINT_UNIFORM \
        --output out/generation.json --sheet out/generation.png

The folder is `{train,test}/<class>/<video>`. Measured are: whether a classifier of real clips finds the class that was
asked for; the Frechet distance `fd-transnetv2` between floor and ceilings; whether the lengths of generated clips
follow those that the router gives to real ones; frames predicted after known ones against copies of the last known
frame; and, with --compare, all of it for a generator of uniform lengths beside. Prints tables and writes JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options
from benchmarks.common.bootstrap import ROUNDS
from benchmarks.common.clips import METRIC, frame_distances
from benchmarks.common.machine import machine_name
from benchmarks.generation import figures
from benchmarks.generation.checkpoint import BATCH, Checkpoint, Samples, generate
from benchmarks.generation.classifier import (
    ClassifierSettings,
    ClipClassifier,
    accuracy,
    cache_path,
    cached,
    cached_classifier,
    predict_classes,
)
from benchmarks.generation.clips import LabelledClips, data_key, list_videos, read_clips
from benchmarks.generation.report import aims, show
from evatok_hf import default_checkpoint
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.features import load_video_features
from evatok_hf.pictures.clips import check_picture_path, save_picture
from evatok_hf.pictures.samples import Sample, contact_sheet
from training.common.fields import option

# Frames after the last known one at which predictions are measured.
AHEAD = (4, 8, 11)
SHEET_SAMPLES = 3


@dataclass(kw_only=True)
class Arguments(Options):
    data: str = option("Folder of labelled videos, {train,test}/<class>/<video>.")
    model: str = option("Checkpoint folder or Hub id with a generator.", lambda: default_checkpoint("generator"))
    compare: str | None = option("Checkpoint whose generator learned other lengths, such as uniform ones.", None)
    sheet: str | None = option("Picture of generated clips to write.", None)
    cache: str = option("Folder for trained classifiers and features.", "out/cache")
    seed: int = option("Seed of samples, classifier and mirrored clips.", 0)
    device: str = option("Of the checkpoint; auto, cpu, cuda, ..", "cpu")
    stride: int = option("Frames from one frame of a real clip to the next.", 3)
    samples: int = option("Clips generated of each class.", 20)
    guidance: float = option("Scale of classifier-free guidance.", 1.25)
    temperature: float = option("Temperature of codes and lengths.", 1.0)
    prediction_clips: int | None = option(
        "Test clips of each class that are predicted; all by default, 0 for none.", None
    )
    predictions_only: bool = option("Measure predictions, and nothing that is drawn.", False)
    quick: bool = option("Very few clips and steps, to see whether all of it works.", False)

    def __post_init__(self):
        if self.quick:
            self.samples, self.prediction_clips = 2, 1
        self.most = 2 if self.quick else None  # real clips of a class
        self.epochs = 1 if self.quick else 14  # of classifiers
        self.rounds = 100 if self.quick else ROUNDS  # of intervals
        self.at_least(0, "seed", "prediction_clips")
        self.at_least(1, "stride")
        self.at_least(2, "samples")
        if self.predictions_only and (self.compare or self.sheet or self.prediction_clips == 0):
            raise ValueError("--predictions_only goes with no --compare, no --sheet and no --prediction_clips 0.")
        if self.sheet is not None:
            check_picture_path(self.sheet)


# --- judges -----------------------------------------------------------------------------------------------------------


def classifier(args: Arguments, clip: dict[str, int]) -> tuple[ClipClassifier, dict[str, Any]]:
    """A classifier trained on the clips of the train split, from --cache if it is there; and how it was made."""
    settings = ClassifierSettings(epochs=args.epochs, seed=args.seed)
    videos, classes = list_videos(args.data, "train", args.most)

    def clips() -> tuple[torch.Tensor, torch.Tensor]:
        read = read_clips(videos, classes, **clip, name="train clips")
        return read.video, read.labels

    facts = {"trained_on": "real clips", "data": data_key(videos), **clip}
    model, weights = cached_classifier(args.cache, facts, clips, len(classes), settings)
    about = {"trained_on": f"{sum(map(len, videos))} real clips", "settings": asdict(settings), "weights": weights}
    return model, about


class Judges:
    """The instruments that all checkpoints are measured with: a classifier, features, and those of real clips."""

    def __init__(self, args: Arguments, clip: dict[str, int], test: LabelledClips, train: LabelledClips):
        self.args, self.test, self.train = args, test, train
        self.extractor = load_video_features("fd-transnetv2")
        self.classifier = classifier(args, clip)

    def features(
        self, name: str, video: Callable[[], torch.Tensor], clips: LabelledClips | None = None, way: str = ""
    ) -> torch.Tensor:
        """Features (N, D) of clips (N, F, 3, S, S), uint8 or in [-1, 1], that `video` makes in some `way` of real ones.
        These are kept under --cache, and nothing is made where they are there."""

        def compute() -> torch.Tensor:
            parts = tqdm(video().split(1), desc=f"features of {name}", unit="clip", file=sys.stderr)
            return torch.cat([self.extractor(to_float(part)) for part in parts])

        if clips is None:
            return compute()
        facts = [self.extractor.name, self.extractor.weights_sha256, clips.key(), way]
        path = cache_path(self.args.cache, "features", repr(facts))
        return cached(path, lambda: {"features": compute()})["features"]

    def classes(self, reconstructed: torch.Tensor, samples: Samples) -> dict[str, Any]:
        """Accuracy of the classifier of real clips on real, reconstructed and generated ones."""
        videos = {"real": self.test.video, "reconstructed": reconstructed, "generated": samples.video}
        labels = {"real": self.test.labels, "reconstructed": self.test.labels, "generated": samples.labels}
        model, about = self.classifier
        answers = {key: predict_classes(model, video) for key, video in videos.items()}
        right = {key: answers[key] == labels[key] for key in videos}
        report = {"classifier": about}
        report |= {key: accuracy(answers[key], labels[key], self.test.classes) for key in videos}
        for key in ("real", "reconstructed"):
            report[f"generated_over_{key}"] = figures.ratio(right["generated"], right[key], self.args.rounds)
        return {"real": report}

    def distances(self, checkpoint: Checkpoint, reconstructed: torch.Tensor, samples: Samples) -> dict[str, Any]:
        """fd-transnetv2 to real test clips, as many clips and the same of each class in all sets."""
        classes = self.test.classes
        sets = [self.test.labels, self.train.labels, samples.labels]
        of_test, of_train, drawn = figures.same_proportions(sets, len(classes), self.args.samples)
        test, train = self.test.take(of_test), self.train.take(of_train)
        labels, coding = test.labels, checkpoint.coding
        reference = self.features("test clips", lambda: test.video, test)
        others = {
            "floor": self.features("train clips", lambda: train.video, train),
            "reconstructed": self.features("reconstructions", lambda: reconstructed[of_test], test, coding),
            "reconstructed_train": self.features(
                "reconstructed train clips",
                lambda: checkpoint.reconstruct(train, "train clips reconstructed")[0],
                train,
                coding,
            ),
            "generated": self.features("samples", lambda: samples.video[drawn]),
            "frozen": self.features("frozen clips", lambda: figures.frozen(train.video), train, "frozen"),
        }
        by_class = {}
        for label, name in enumerate(classes):
            mine = labels == label
            places = figures.of_other_classes(labels, label, int(mine.sum()))
            features = {way: values[mine] for way, values in others.items()} | {"wrong_class": others["floor"][places]}
            by_class[name] = {way: figures.frechet(values, reference[mine]) for way, values in features.items()}
        return {
            "clips": len(labels),
            "clips_by_class": {name: int((labels == label).sum()) for label, name in enumerate(classes)},
            "whole": {way: figures.frechet(features, reference) for way, features in others.items()},
            "within_class": {
                way: figures.mean_known([row[way] for row in by_class.values()]) for way in (*others, "wrong_class")
            },
            "by_class": by_class,
        }


# --- lengths and prediction -------------------------------------------------------------------------------------------


def mean_tokens(lengths: torch.Tensor) -> float:
    """Of clips with lengths (N, T)."""
    return lengths.sum(-1).double().mean().item()


def token_counts(
    classes: list[str], real: torch.Tensor, labels: torch.Tensor, samples: Samples, uniform: int, rounds: int
) -> dict[str, Any]:
    """Mean tokens of each class, of generated clips and of real ones with lengths (N, T) and labels (N,), how they go
    together, and what is saved against `uniform` tokens a clip."""
    made = samples.tokens.lengths
    rows = {}
    for label, name in enumerate(classes):
        sets = {"reconstructed": real[labels == label], "generated": made[samples.labels == label]}
        if len(sets["reconstructed"]):
            rows[name] = {key: mean_tokens(lengths) for key, lengths in sets.items()}
            rows[name] |= {f"{key}_by_block": lengths.double().mean(0).tolist() for key, lengths in sets.items()}
    means = {key: [row[key] for row in rows.values()] for key in ("generated", "reconstructed")}
    return {
        "by_class": rows,
        "rank_correlation": figures.rank_correlation(means["generated"], means["reconstructed"], rounds),
        "generated": mean_tokens(made),
        "reconstructed": mean_tokens(real),
        "uniform": uniform,
        "saved_percent": 100 * (1 - mean_tokens(made) / uniform),
    }


def predict_frames(
    checkpoint: Checkpoint, test: LabelledClips, reconstructed: torch.Tensor, metric, args: Arguments
) -> dict[str, Any]:
    """Frames after known ones of as many test clips as were asked for: predicted, copied from the last known one, and
    reconstructed from the true clip."""
    (places,) = figures.same_proportions([test.labels], len(test.classes), args.prediction_clips)
    clips, reconstructed = test.take(places), reconstructed[places]
    pipe, truth = checkpoint.pipe, to_float(clips.video)
    known, total = pipe.generator.config.known_frames, truth.shape[1]
    frames = sorted({min(known + ahead, total) for ahead in AHEAD})  # counted from 1
    pipe.set_progress_bar_config(desc="predictions", file=sys.stderr)

    def predict(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pipeline gives them, and as they are decoded."""
        made = pipe.predict(
            clips.video[:, :known],
            total,
            known_frames=known,
            seeds=range(args.seed * 10**6, args.seed * 10**6 + len(clips)),
            temperature=temperature,
            batch_size=BATCH,
            output_type="pt",
        )
        return made.frames * 2 - 1, pipe.tokenizer.decode(made.tokens).float().cpu()

    ways = {"copied": truth[:, known - 1 : known].expand_as(truth), "reconstructed": reconstructed}
    started = time.perf_counter()
    ways["predicted"], ways["predicted_plain"] = predict(args.temperature)
    seconds = (time.perf_counter() - started) / len(clips)
    ways["greedy"], ways["greedy_plain"] = predict(0.0)
    report: dict[str, Any] = {"clips": len(clips), "known_frames": known, "seconds": seconds, "frames": {}}
    errors = {way: figures.squared_errors(truth, video, [f - 1 for f in frames]) for way, video in ways.items()}
    for column, frame in enumerate(frames):
        distances = {
            way: frame_distances(metric, truth[:, frame - 1], video[:, frame - 1]).double().numpy()
            for way, video in ways.items()
        }
        of_frame = {way: values[:, column] for way, values in errors.items()}
        report["frames"][str(frame)] = figures.compare_predictions(of_frame, distances, "copied", args.rounds)
    return report


# --- all of it --------------------------------------------------------------------------------------------------------


def about(checkpoint: Checkpoint) -> dict[str, Any]:
    """The weights that a report is of."""
    return {
        "checkpoint": checkpoint.name,
        "tokenizer_fingerprint": checkpoint.pipe.tokenizer.fingerprint(),
        "generator_fingerprint": checkpoint.pipe.generator.fingerprint(),
    }


def measure_checkpoint(
    checkpoint: Checkpoint, judges: Judges, args: Arguments, metric, uniform: int
) -> tuple[dict[str, Any], Samples]:
    """All figures of a checkpoint."""
    test, classes = judges.test, judges.test.classes
    reconstructed, lengths = checkpoint.reconstruct(test, "test clips reconstructed")
    samples = generate(checkpoint, classes, args.samples, args.seed, args.guidance, args.temperature)
    generator, training = checkpoint.pipe.generator, checkpoint.training
    report: dict[str, Any] = {
        **about(checkpoint),
        "parameters": generator.num_parameters(),
        "allocation": checkpoint.allocation()[1],
        "layout": generator.config.layout,
        "training": {name: training.get(name) for name in ("steps", "tokens", "epochs", "seed", "seconds")},
        "samples": len(samples.labels),
        "seconds_a_sample": samples.seconds,
        "cpu_seconds_a_sample": samples.cpu_seconds,
        "classes": judges.classes(reconstructed, samples),
        "fd": judges.distances(checkpoint, reconstructed, samples),
        "tokens": token_counts(classes, lengths, test.labels, samples, uniform, args.rounds),
        "prediction": None,
    }
    if checkpoint.predicts and args.prediction_clips != 0:
        report["prediction"] = predict_frames(checkpoint, test, reconstructed, metric, args)
    return report, samples


def draw_sheet(samples: Samples, classes: list[str], checkpoint: Checkpoint, args: Arguments) -> None:
    shown = []
    for label, name in enumerate(classes):
        for place in torch.nonzero(samples.labels == label)[:SHEET_SAMPLES, 0].tolist():
            frames = checkpoint.pipe.processor.postprocess(samples.video[place][None])[0].numpy()
            shown.append(Sample(frames, samples.tokens.lengths[place].tolist(), name.replace("_", " "), place))
    generator = checkpoint.pipe.generator
    subtitle = (
        f"{generator.num_parameters() / 1e6:.1f}M parameters, guidance {args.guidance:g}, seed {args.seed}, not "
        "chosen; the middle frame of each block, its tokens under it; "
        f"{mean_tokens(samples.tokens.lengths):.0f} tokens on average"
    )
    title = f"Generated: {len(classes)} classes, the first {min(SHEET_SAMPLES, args.samples)} samples of each"
    Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
    layout = {"cell": 72, "frames_per_block": 1, "samples_per_row": SHEET_SAMPLES}
    save_picture(contact_sheet(shown, max(generator.config.block_lengths), title, subtitle, **layout), args.sheet)


def measure(args: Arguments) -> dict[str, Any]:
    checkpoint = Checkpoint.load(args.model, args.device)
    other = Checkpoint.load(args.compare, args.device) if args.compare else None
    config = checkpoint.pipe.tokenizer.config
    clip = {"num_frames": config.num_frames, "image_size": config.image_size}
    if other is not None and any(getattr(other.pipe.tokenizer.config, name) != size for name, size in clip.items()):
        raise ValueError(f"{args.compare} makes clips of another size than {args.model}; they cannot be compared.")
    clip["stride"] = args.stride
    share = checkpoint.tokens_of.get("flip_probability", 0.0)  # of clips that are mirrored, as the generator learned
    test = read_clips(*list_videos(args.data, "test", args.most), **clip, name="test clips")
    test = test.mirrored(share, args.seed)
    for each in filter(None, (checkpoint, other)):
        each.check(test)
    metric = load_perceptual(METRIC)
    checkpoints = {}
    if args.predictions_only:
        if not checkpoint.predicts:
            raise ValueError(f"the generator of {checkpoint.name} learned no frame prediction.")
        reconstructed, _ = checkpoint.reconstruct(test, "test clips reconstructed")
        predicted = predict_frames(checkpoint, test, reconstructed, metric, args)
        checkpoints["model"] = about(checkpoint) | {"prediction": predicted}
    else:
        train = read_clips(*list_videos(args.data, "train", args.samples), **clip, name="train clips for the floor")
        judges = Judges(args, clip, test, train.mirrored(share, args.seed + 1))
        uniform = config.num_blocks * config.block_lengths[-2:][0]  # the second longest candidate
        checkpoints["model"], samples = measure_checkpoint(checkpoint, judges, args, metric, uniform)
        if args.sheet:
            draw_sheet(samples, test.classes, checkpoint, args)
        if other is not None:
            checkpoints["compare"], _ = measure_checkpoint(other, judges, args, metric, uniform)
    report = {
        "machine": f"{machine_name()}, device {args.device}",
        "resolution": [config.num_frames, config.image_size, config.image_size],
        "fps": test.fps,
        "classes": test.classes,
        "test_clips": len(test),
        "mirrored": share,
        "perceptual": metric.name,
        "checkpoints": checkpoints,
    }
    return report | {"aims": aims(report)}


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
