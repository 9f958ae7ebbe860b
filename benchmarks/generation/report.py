"""The generation benchmark's report in words: tables, and which of its aims are met."""

from __future__ import annotations

from typing import Any

from benchmarks.common.benchmark import aim
from training.common.result_pages import markdown

_SETS = {
    "floor": "real train clips (floor)",
    "reconstructed": "reconstructions of the same clips",
    "reconstructed_train": "reconstructions of train clips",
    "generated": "generated",
    "frozen": "train clips frozen at their first frame (ceiling)",
    "wrong_class": "train clips of other classes (ceiling)",
}
_WAYS = {
    "copied": "last known frame copied",
    "predicted": "predicted, one sample",
    "predicted_plain": "the same, only decoded",
    "greedy": "predicted, most likely tokens",
    "greedy_plain": "the same, only decoded",
    "reconstructed": "true clip reconstructed (bound)",
}


def text(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def with_interval(figure: dict[str, float | None], digits: int = 3, sign: str = "") -> str | None:
    """A figure and its 95 % interval."""
    if figure["value"] is None:
        return None
    numbers = [figure["value"], figure["low"], figure["high"]]
    value, low, high = ("-" if number is None else f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{value} ({low} to {high})"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


# --- aims -------------------------------------------------------------------------------------------------------------


def aims(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The aims, the figures reached, and whether they are enough."""
    model, compared = report["checkpoints"]["model"], report["checkpoints"].get("compare")
    rows = []
    if "samples" in model:
        tokens, fd = model["tokens"], model["fd"]["within_class"]
        ratio, correlation = model["classes"]["real"]["generated_over_real"], tokens["rank_correlation"]
        ceilings = [fd[name] for name in ("frozen", "wrong_class") if fd[name] is not None]
        uniform = compared["tokens"]["generated"] if compared else tokens["uniform"]
        rows = [
            aim("class accuracy, generated over real", ratio["value"], ">=", 0.8),
            aim("rank correlation of tokens by class", correlation["value"], ">=", 0.7),
            aim("tokens generated, below the uniform baseline", tokens["generated"], "<", uniform),
            aim("fd within classes, below both ceilings", fd["generated"], "<", min(ceilings, default=0.0)),
        ]
    for frame, ways in ((model["prediction"] or {}).get("frames") or {}).items():
        difference = ways["predicted"]["difference"]
        low, high = difference["psnr_of_mean_error"]["low"], difference["distance"]["high"]
        rows.append(aim(f"dB above copying, frame {frame} (low end)", low, ">", 0.0))
        rows.append(aim(f"distance above copying, frame {frame} (high end)", high, "<", 0.0))
    return {row["what"].partition(" (")[0]: row for row in rows}


# --- tables -----------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> str:
    """All tables, one after the other."""
    parts = [
        f"{report['test_clips']} test clips of {len(report['classes'])} classes, {report['resolution']} at "
        f"{report['fps']:.2f} frames a second, {percent(report['mirrored'])} of them mirrored"
    ]
    for name, entry in report["checkpoints"].items():
        title = f"### {name}: {entry['checkpoint']}"
        if "samples" in entry:
            parts.append(f"{title}\n\n{about(entry, report['settings'])}")
            parts += [_classes(entry["classes"]["real"]), _distances(entry), _tokens(entry)]
        else:
            parts.append(title)
        if entry["prediction"]:
            parts.append(_prediction(entry["prediction"], report["perceptual"]))
    if len(report["checkpoints"]) > 1:
        parts.append(_beside(report["checkpoints"]))
    return "\n\n".join(parts)


def about(entry: dict[str, Any], settings: dict[str, Any]) -> str:
    training = entry["training"]
    steps = f"{training['steps']} steps, {training['tokens']} tokens seen" if training["steps"] else "training unknown"
    return (
        f"{entry['parameters'] / 1e6:.2f}M parameters, {steps}, layout {entry['layout']}; {entry['samples']} samples, "
        f"guidance {settings['guidance']:g}, temperature {settings['temperature']:g}; {entry['seconds_a_sample']:.2f} "
        f"s a sample ({entry['cpu_seconds_a_sample']:.2f} s of a core); real clips have the lengths of "
        f"{entry['allocation']}"
    )


def _classes(result: dict[str, Any]) -> str:
    sets = ("real", "reconstructed", "generated")
    rows = []
    for label, real in result["real"]["by_class"].items():
        shares = [percent(result[key]["by_class"][label]["accuracy"]) for key in sets]
        rows.append([label, real["clips"], *shares, result["generated"]["by_class"][label]["taken_for"]])
    shares = [percent(result[key]["accuracy"]) for key in sets]
    rows.append(["all", result["real"]["clips"], *shares, ""])
    columns = ["class", "test clips", "real", "reconstructed", "generated", "generated are mostly taken for"]
    return (
        f"Class found by a classifier trained on {result['classifier']['trained_on']}\n\n{markdown(columns, rows)}\n\n"
        f"generated over real {with_interval(result['generated_over_real'])}, over reconstructed "
        f"{with_interval(result['generated_over_reconstructed'])}"
    )


def _distances(entry: dict[str, Any]) -> str:
    fd = entry["fd"]
    rows = [[words, text(fd["whole"].get(name)), text(fd["within_class"][name])] for name, words in _SETS.items()]
    classes = sum(count > 1 for count in fd["clips_by_class"].values())
    return (
        f"fd-transnetv2 to real test clips; {fd['clips']} clips in every set, the same number of each class. It "
        "depends on that number, so compare only within this table.\n\n"
        + markdown(["clips", "all classes together", f"mean within {classes} classes"], rows)
        + "\n\n(all classes together, clips of wrong classes in the same proportions would be the same set)"
    )


def _tokens(entry: dict[str, Any]) -> str:
    tokens = entry["tokens"]
    rows = []
    for name, row in tokens["by_class"].items():
        blocks = [" ".join(f"{x:.0f}" for x in row[f"{key}_by_block"]) for key in ("reconstructed", "generated")]
        rows.append([name, f"{row['reconstructed']:.1f}", f"{row['generated']:.1f}", *blocks])
    rows.append(["all clips", f"{tokens['reconstructed']:.1f}", f"{tokens['generated']:.1f}", "", ""])
    columns = ["class", "tokens of real clips", "generated", "real by block", "generated by block"]
    return (
        f"Lengths\n\n{markdown(columns, rows)}\n\nSpearman's rank correlation over classes "
        f"{with_interval(tokens['rank_correlation'])}; {tokens['saved_percent']:.1f} % fewer tokens than "
        f"{tokens['uniform']} of the uniform baseline"
    )


def _prediction(result: dict[str, Any], perceptual: str) -> str:
    known, parts = result["known_frames"], []
    for frame, ways in result["frames"].items():
        rows = []
        for way, words in _WAYS.items():
            row, gain = ways[way], ways[way].get("difference")
            cells = [f"{row['psnr_by_clip']:.2f}", f"{row['psnr_of_mean_error']:.2f}", f"{row['distance']:.4f}"]
            names = (("psnr_by_clip", 2), ("psnr_of_mean_error", 2), ("distance", 4))
            gains = [with_interval(gain[name], digits, "+") for name, digits in names] if gain else [""] * 3
            rows.append([words, *cells, *gains])
        columns = [f"frame {frame}", "PSNR by clip", "of mean error", "distance"]
        columns += ["PSNR by clip, to copying", "of mean error, to copying", "distance, to copying"]
        parts.append(f"{int(frame) - known} after the last known one\n\n{markdown(columns, rows)}")
    capped = {frame: ways["copied"]["capped"] for frame, ways in result["frames"].items()}
    still = ", ".join(f"{count} at frame {frame}" for frame, count in capped.items())
    parts.insert(
        0,
        f"Prediction of {result['clips']} test clips from {known} known frames, without class; {perceptual}; intervals "
        "are 95 %, paired over clips",
    )
    parts.append(
        '("PSNR by clip" is the mean of the clips\' dB, at most 50 each, reached by copying clips that stand still: '
        f'{still}; "of mean error" is the dB of the mean squared error)'
    )
    return "\n\n".join(parts)


def _beside(checkpoints: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, entry in checkpoints.items():
        tokens, training, fd = entry["tokens"], entry["training"], entry["fd"]
        real = entry["classes"]["real"]
        cells = [name, f"{tokens['reconstructed']:.1f}", f"{tokens['generated']:.1f}", training["steps"]]
        cells += [training["tokens"], text(fd["whole"]["generated"]), text(fd["within_class"]["generated"])]
        cells += [percent(real["generated"]["accuracy"]), percent(real["generated_over_real"]["value"])]
        rows.append([*cells, text(tokens["rank_correlation"]["value"]), f"{entry['seconds_a_sample']:.2f}"])
    columns = ["checkpoint", "tokens of real clips", "tokens generated", "steps", "tokens seen", "fd", "fd in classes"]
    columns += ["class found", "of real", "rank correlation", "s a sample"]
    return "Side by side\n\n" + markdown(columns, rows)
