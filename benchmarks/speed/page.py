"""The report of `all.py` as Markdown."""

from __future__ import annotations

from typing import Any

from training.common.result_pages import markdown

MARKS = ("<!-- made by: benchmarks/speed/all.py --page PAGE -->", "<!-- end -->")
AIMS = {
    "shortest_over_longest": "time to encode a clip at 128 tokens over that at 2048",
    "together_over_clip_by_clip": "time to encode 32 clips of real lengths together over clip by clip",
    "padded_over_packed": "time of the encoder, padded to the longest block over packed, lengths of real clips",
    "times_as_fast_as_LARP": "encoding and decoding, clips a second over those of LARP-L's architecture",
    "times_as_fast_as_AdapTok": "the same over AdapTok's architecture, at equal tokens",
    "router_over_encode": "time of the router over that of encoding, the paper's shape",
    "bundled_router_over_encode": "the same of evatok-tiny, on the clips of its sample",
    "pooled_router_over_encode": "the paper's size, patches pooled 4 x 4 as in evatok-tiny",
    "compiled_over_eager": "drawing clips: the compiled loop over the plain one, the best case",
    "weight_bandwidth_of_one_clip": "the same, one clip at a time: weights read a second over the speed of a copy",
    "search_over_brute_force": "time to measure all assignments of a clip by the tree over one by one",
    "data_wait": "part of a training step that waits for clips",
    "throughput_of_the_loops": "many videos: throughput over that of a loop times the number of workers",
}


def tokenizer(part: dict[str, Any]) -> str:
    rows = []
    for row in part["speeds"].values():
        cells = [row["name"], f"{row['parameters'] / 1e6:.0f}M", f"{row['tokens']:.0f}"]
        for side in (row["encode"], row["decode"]):
            cells += [f"{side['clips_per_second']:.3g}", f"{side['of_peak']:.0%}"]
        rows.append(cells)
    headers = ["tokenizer", "parameters", "tokens a clip", "encode, clips/s", "of the peak", "decode, clips/s"]
    text = markdown([*headers, "of the peak"], rows)
    real = part["packed"]
    text += (
        f"\n\nEncoding {len(real['lengths'])} clips of real lengths, {real['tokens']:.0f} tokens a clip: "
        f"{real['packed_seconds']:.1f} s packed, {real['padded_seconds']:.1f} s padded to the longest block."
    )
    rows = []
    for row in part["ways"]:
        cells = [row["clips"], row["way"]]
        for side in (row["encode"], row["decode"]):
            cells += [f"{side['clips_per_second']:.3g}", f"{side['of_peak']:.0%}", f"{side['launches_per_clip']:.0f}"]
        rows.append(cells)
    headers = ["clips", "", "encode, clips/s", "of the peak", "launches a clip", "decode, clips/s", "of the peak"]
    text += f"\n\n{markdown([*headers, 'launches a clip'], rows)}"
    if part["memory"]:
        names = {"evatok": "EVATok"} | {key: row["name"] for key, row in part["speeds"].items()}
        most = [
            f"{names[key]} {row['encode'] / 2**20:.0f} and {row['decode'] / 2**20:.0f}"
            for key, row in part["memory"].items()
        ]
        text += f"\n\nMost memory, encoding and decoding, MiB: {', '.join(most)}."
    return text


def sampling(part: dict[str, Any]) -> str:
    rows = [
        [
            row["implementation"],
            row["batch"],
            f"{row['guidance']:g}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['times_eager']:.2f}",
            f"{row['of_roofline']:.0%}",
        ]
        for row in part["rows"]
    ]
    headers = [
        "loop",
        "clips at once",
        "guidance",
        "tokens/s",
        "ms a step",
        "times eager",
        "of the roofline",
    ]
    return markdown(headers, rows)


def search(part: dict[str, Any]) -> str:
    return (
        f"{part['clips']} clips, all assignments: {part['seconds']:.1f} s by the tree ({part['of_peak']:.0%} of the "
        f"peak), {part['brute_force_seconds']:.1f} s one by one ({part['brute_force_of_peak']:.0%}); what they measure "
        f"is at most {part['largest_difference']:.0e} apart."
    )


def loading(part: dict[str, Any]) -> str:
    rows = [
        [
            row["num_workers"],
            f"{row['loader_clips_per_second']:.3g}",
            f"{row['clips_per_second']:.3g}",
            f"{row['data_wait']:.1%}",
        ]
        for row in part["rows"]
    ]
    return markdown(["loader processes", "loader alone, clips/s", "training, clips/s", "of a step waiting"], rows)


def memory(part: dict[str, Any]) -> str:
    rows = [
        [row["seconds"], row["frames"], *(f"{row[task]['peak_mib']:.0f}" for task in ("encode", "decode"))]
        for row in part["memory"]
    ]
    return markdown(["seconds of video", "frames", "encode, MiB at most", "decode, MiB at most"], rows)


def bulk(part: dict[str, Any]) -> str:
    loops = " / ".join(f"{loop * part['workers']:.1f}" for loop in part["loop_clips_per_second"])
    rows = [[f"loop in one process, times {part['workers']}, before / between / after", loops, "", ""]]
    for row in part["rows"]:
        what = "a worker killed in the middle" if row["worker_killed"] else "undisturbed"
        speeds = [f"{row[f'clips_per_second_{kind}']:.1f}" for kind in ("steady", "with_start")]
        rows.append([f"`evatok tokenize-dataset`, {what}", *speeds, f"{row['of_peak']:.0%}"])
    table = markdown(["", "clips/s", "with start and end", "of the peak, choosing and encoding"], rows)
    return f"{table}\n\n{part['rows'][1]['clips']:,} clips, each once, and equal shards with and without the kill."


SECTIONS = {
    "tokenizer": ("Encoding and decoding", tokenizer),
    "sampling": ("Drawing clips", sampling),
    "search": ("Every assignment of a clip", search),
    "loading": ("Loading while training", loading),
    "memory": ("Long videos", memory),
    "bulk": ("Many videos", bulk),
}


def results(report: dict[str, Any], picture: str) -> str:
    """Aims, picture and a section for each part."""
    about = report["machine"]
    rows = [
        [
            AIMS.get(name, name.replace("_", " ")),
            f"{row['sign']} {row['aim']:g}",
            f"{row['measured']:.3g}",
            "yes" if row["reached"] else "no",
        ]
        for name, row in report["aims"].items()
    ]
    parts = [
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['instructions']}, torch {about['torch']}.",
        markdown(["", "aim", "measured", "reached"], rows),
        f"![what the tables below say, as curves and bars]({picture})",
    ]
    for name, part in report["parts"].items():
        title, section = SECTIONS[name]
        where = part["machine"]
        threads = f"{part['threads']} a worker" if name == "bulk" else where["threads"]
        precise = f"{where['dtype']}, threads: {threads}"
        parts.append(f"### {title}\n\n`{part['command']}` ({precise})\n\n{section(part)}")
    return "\n\n".join(parts) + "\n"
