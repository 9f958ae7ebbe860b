"""Measures a tokenizer on the clips of a frozen protocol: reconstruction, Frechet distances, codebook and tokens.

    accelerate launch training/evaluate.py --protocol larp_ucf101_rfvd --data UCF101 --model CHECKPOINT \
        --i3d i3d_torchscript.pt --output result.json

Prints a row a metric and writes all that belongs to it as JSON. Clips are encoded and decoded in memory; what is scored
are the decoder's frames clamped to [-1, 1], in floats and not rounded to 8 bits, as LARP does, against the frames that
the tokenizer was given. Which clips are scored does not depend on the number of processes. Videos that cannot be read
are left out, counted and named. The protocols that come with the project are in `training/protocols/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

import evatok_hf
from evatok_hf import EvatokModel, EvatokRouter, EvatokVideoProcessor, default_checkpoint
from evatok_hf.allocation import Allocation
from evatok_hf.bundled import find_checkpoint
from evatok_hf.data.clip_sources import list_videos
from evatok_hf.interrupts import run_script
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES
from evatok_hf.models.checkpoint_evatok import DTYPES, load_checkpoint, loading
from evatok_hf.models.files_evatok import prepare, write_json
from evatok_hf.models.modeling_evatok_router import check_same_space
from evatok_hf.video import open_video
from evatok_hf.video.read import VideoReadError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.arguments import describe_machine, parse_arguments, patient_accelerator
from training.common.fields import OptionClass, option
from training.common.result_pages import markdown
from training.protocols.measures import Measures
from training.protocols.protocol import METRIC_NAMES, Plan, Protocol, choose_clips, load_protocol

logger = logging.getLogger("evaluate")


@dataclass
class EvaluateArguments(OptionClass):
    """Options of evaluation."""

    protocol: str = option("Name of a protocol in training/protocols, or a JSON file like them.")
    data: str = option("Folder of videos, with sub-folders train, val, .. if it has splits.")
    output: str = option("JSON file to write.")
    model: str = option(
        "Checkpoint folder, Hub id or bundled name; its router chooses the lengths if it has one.", default_checkpoint
    )
    # Lengths
    router: str | None = option("Folder or Hub id of another router.", None)
    quality: float | None = option("Preference w_q of the router, 0 to 2.", None)
    uniform: int | None = option("The same length for every block.", None)
    lengths: list[int] = option("The same lengths for every clip.", [])
    # Metrics
    metrics: list[str] = option(
        f"Instead of the protocol's, which is noted in the result: {', '.join(METRIC_NAMES)}.", []
    )
    perceptual: str | None = option("Instead of the protocol's perceptual distance, which is noted, too.", None)
    i3d: str | None = option("The file i3d_torchscript.pt, for fvd.", None)
    lpips_weights: str | None = option("Local torchvision backbone for LPIPS; else torchvision fetches it.", None)
    # Computing
    batch_size: int = option("Clips measured at once.", 8)
    num_workers: int = option("Processes that read videos, a process.", 0)
    dtype: str = option("Of tokenizer and router; metrics are in float32.", "float32")
    cpu: bool = option("Compute on the CPU even where there is a GPU.", False)

    def __post_init__(self):
        self.at_least(1, "batch_size")
        self.at_least(0, "num_workers")
        self.one_of(dtype=DTYPES, perceptual=PERCEPTUAL_NAMES, metrics=METRIC_NAMES)
        if self.metrics and self.perceptual:
            raise ValueError("give either --metrics or --perceptual, not both; --metrics takes perceptual ones, too.")
        routed = self.router is not None or self.quality is not None
        if sum((routed, self.uniform is not None, bool(self.lengths))) > 1:
            raise ValueError("--router and --quality, --uniform, --lengths contradict each other; give one of them.")

    def chosen_metrics(self, protocol: Protocol) -> list[str]:
        """The metrics to measure: the protocol's, but for those that the options replace."""
        if self.perceptual is None:
            return list(dict.fromkeys(self.metrics)) or list(protocol.metrics)
        kept = [name for name in protocol.metrics if name not in PERCEPTUAL_NAMES]
        return [*kept, self.perceptual]

    def check(self, protocol: Protocol) -> None:
        """Raises ValueError for a protocol that this command cannot measure, or files that are missing or idle."""
        if protocol.task != "reconstruction":
            raise ValueError(
                f"protocol {protocol.name} is for {protocol.task}, which needs a generator; this command measures "
                "reconstruction."
            )
        metrics = self.chosen_metrics(protocol)
        if "fvd" in metrics and self.i3d is None:
            raise ValueError(
                f"protocol {protocol.name} measures fvd: name a copy of i3d_torchscript.pt with --i3d, or choose "
                "other metrics with --metrics."
            )
        if self.i3d is not None and "fvd" not in metrics:
            raise ValueError(f"--i3d is for fvd, which is not among the metrics {metrics}; leave it out.")
        if self.lpips_weights is not None and not any(name.startswith("lpips") for name in metrics):
            raise ValueError(f"--lpips_weights is for LPIPS, which is not among the metrics {metrics}; leave it out.")
        prepare(self.output)


# --- clips ------------------------------------------------------------------------------------------------------------


@dataclass
class Unread:
    """A video that could not be read, and the clips of the plan that are missing for it."""

    name: str
    reason: str
    clips: int


class ClipReader(IterableDataset):
    """The clips of some videos: float32 (F, 3, S, S) in [-1, 1], or `Unread`.

    Args:
        videos: (path, name, first frames of its clips).
        protocol: how many frames, and how they are brought to size.
        size: side of the frames in pixels.
    """

    def __init__(self, videos: list[tuple[str, str, list[int]]], protocol: Protocol, size: int):
        self.videos, self.protocol = videos, protocol
        self.processor = EvatokVideoProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_sample_frames=False
        )

    def __iter__(self) -> Iterator[torch.Tensor | Unread]:
        info = get_worker_info()
        for path, name, firsts in self.videos[info.id if info else 0 :: info.num_workers if info else 1]:
            done = 0
            try:
                with open_video(path, reader="pyav") as video:
                    for first in firsts:
                        frames = video.read(self.protocol.frames(first))  # (F, H, W, 3)
                        yield torch.cat([self._prepare(frame) for frame in frames])
                        done += 1
            except (VideoReadError, OSError) as error:
                yield Unread(name, str(error), len(firsts) - done)

    def _prepare(self, frame) -> torch.Tensor:
        """uint8 (H, W, 3) -> (1, 3, S, S); one by one, since large frames in floats take much memory."""
        return self.processor(frame[None], input_data_format="channels_last")["pixel_values_videos"][0]


def count_frames(videos: list[tuple[str, str]], accelerator: Accelerator) -> tuple[dict[str, int], list[Unread]]:
    """Frames of every readable video, and the others; each process opens its share."""
    lengths, unread = {}, []
    mine = videos[accelerator.process_index :: accelerator.num_processes]
    for path, name in tqdm(mine, "videos", disable=not accelerator.is_main_process, leave=False):
        try:
            with open_video(path, reader="pyav") as video:
                lengths[name] = video.num_frames
        except (VideoReadError, OSError) as error:
            unread.append(Unread(name, str(error), 0))
            logger.warning("left out %s: %s", name, error)
    return dict(gather_object(list(lengths.items()))), gather_object(unread)


def share(plan: Plan, videos: list[tuple[str, str]], rank: int, world_size: int) -> list[tuple[str, str, list[int]]]:
    """The videos of one process with the first frames of their clips: whole videos in turn."""
    firsts: dict[str, list[int]] = {}
    for name, first in plan.clips:
        firsts.setdefault(name, []).append(first)
    paths = {name: path for path, name in videos}
    return [(paths[name], name, firsts[name]) for name in list(firsts)[rank::world_size]]


# --- models -----------------------------------------------------------------------------------------------------------


def load_models(args: EvaluateArguments, device: torch.device) -> tuple[EvatokModel, EvatokRouter | None]:
    """The tokenizer, and its router or another one: by its folder, the checkpoint that holds it, or from the Hub."""
    dtype = DTYPES[args.dtype]
    model, _, router = load_checkpoint(find_checkpoint(args.model), device, dtype)
    if args.router is not None:
        inner = Path(args.router).expanduser() / "router"
        with loading("router", f"--router {args.router}"):
            path = str(inner) if (inner / "config.json").is_file() else args.router
            router = EvatokRouter.from_pretrained(path, dtype=dtype).to(device)
    if router is not None:
        check_same_space(model, router)
    return model.eval(), None if router is None else router.eval()


def check_size(protocol: Protocol, model: EvatokModel) -> int:
    """The side of the frames. Raises ValueError for a tokenizer of other clips than the protocol's."""
    config = model.config
    size = protocol.resize["short_side"] or config.image_size
    if (protocol.num_frames, size) != (config.num_frames, config.image_size):
        raise ValueError(
            f"protocol {protocol.name} has clips of {protocol.num_frames} x {size} x {size} and the tokenizer takes "
            f"{config.num_frames} x {config.image_size} x {config.image_size}; use another protocol or tokenizer."
        )
    return size


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    args: EvaluateArguments,
    accelerator: Accelerator,
    model: EvatokModel,
    allocation: Allocation,
    measures: Measures,
    reader: ClipReader,
) -> list[Unread]:
    """This process's clips into `measures`; returns the videos that could not be read to their end."""
    unread: list[Unread] = []
    total = sum(len(firsts) for _, _, firsts in reader.videos)

    def clips(bar: tqdm) -> Iterator[torch.Tensor]:
        for item in DataLoader(reader, batch_size=None, num_workers=args.num_workers):
            if isinstance(item, Unread):
                unread.append(item)
                logger.warning("left out %d clip(s) of %s: %s", item.clips, item.name, item.reason)
                bar.update(item.clips)
            else:
                bar.update(1)
                yield item

    with tqdm(total=total, unit="clip", disable=not accelerator.is_main_process) as bar:
        waiting = clips(bar)
        while batch := list(islice(waiting, args.batch_size)):
            real = torch.stack(batch).to(accelerator.device)  # (B, F, 3, S, S)
            tokens = model.encode(real, allocation(real), return_dict=True)
            measures.update(real, model.decode(tokens).float(), tokens)
    return unread


def shortcomings(protocol: Protocol, clips: int, metrics: list[str], unread: list[Unread]) -> list[str]:
    """Why a result is not the protocol's, in sentences; none if it is."""
    found = []
    if protocol.count is not None and clips != protocol.count:
        found.append(f"the protocol has {protocol.count} clips and {clips} were scored")
    if unread:
        found.append(f"{len(unread)} video(s) could not be read")
    if omitted := [name for name in protocol.metrics if name not in metrics]:
        found.append(f"not measured: {', '.join(omitted)}")
    return found


def print_table(report: dict[str, Any]) -> None:
    """A row a figure, with all that it must not be quoted without."""
    rows = []
    for name, entry in report["metrics"].items():
        about = [entry["clips"], report["protocol"]["name"], (entry.get("weights_sha256") or "-")[:12]]
        for figure in (name for name in entry if name not in ("clips", "weights_sha256", "weights_of")):
            label = name if figure == "value" else f"{name} {figure}"
            rows.append([label, f"{entry[figure]:.4f}", *about, report["tokenizer"]["fingerprint"]])
    print(markdown(["metric", "value", "clips", "protocol", "weights", "tokenizer"], rows))
    for cause, count in report["skipped"].items():
        print(f"{count} video(s) {cause}")
    for reason in report["incomplete_because"]:
        print(f"INCOMPLETE: {reason}")


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(EvaluateArguments, __doc__, argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    protocol = load_protocol(args.protocol)
    args.check(protocol)
    accelerator = patient_accelerator(args.cpu)
    torch.backends.cudnn.allow_tf32 = False  # the figures of a GPU are to be those of a CPU
    model, router = load_models(args, accelerator.device)
    size = check_size(protocol, model)
    given = {"lengths": args.uniform if args.uniform is not None else args.lengths or None, "quality": args.quality}
    allocation = Allocation(**given).bind(model, router)
    metrics = args.chosen_metrics(protocol)
    measures = Measures(metrics, model, protocol.feature_resolution, args.i3d, args.lpips_weights)

    videos = sorted(((one.video, one.key) for one in list_videos(args.data, protocol.split)[0]), key=itemgetter(1))
    lengths, unread = count_frames(videos, accelerator)
    plan = choose_clips(protocol, lengths)
    mine = share(plan, videos, accelerator.process_index, accelerator.num_processes)
    broken = measure(args, accelerator, model, allocation, measures, ClipReader(mine, protocol, size))
    measures.gather()
    unread = sorted([*unread, *gather_object(broken)], key=attrgetter("name"))
    if accelerator.is_main_process:
        if measures.clips == 0:
            raise ValueError(
                f"no video of {args.data} gave a clip ({len(unread)} unreadable, {len(plan.unfit)} unfit); mend the "
                "videos, or take another protocol."
            )
        skipped = [(entry.name, "unreadable", entry.reason) for entry in unread] + plan.unfit
        reasons = shortcomings(protocol, measures.clips, metrics, unread)
        if missing := sum(cause == "missing" for _, cause, _ in plan.unfit):
            reasons.append(f"{missing} video(s) of the protocol are missing")
        report = {
            "metrics": measures.results(),
            "clips": measures.clips,
            "clips_sha256": hashlib.sha256(json.dumps(plan.clips).encode()).hexdigest(),
            "videos": len(videos),
            "complete": not reasons,
            "incomplete_because": reasons,
            "skipped": dict(Counter(cause for _, cause, _ in skipped)),
            "skipped_videos": [dict(zip(("video", "cause", "reason"), entry, strict=True)) for entry in skipped],
            "protocol": protocol.content(),
            "protocol_sha256": protocol.sha256,
            "seeds": {"clips": protocol.clips.get("seed")},
            "tokenizer": {"name": name_of(model), "fingerprint": model.fingerprint()},
            "allocation": describe_allocation(allocation),
            "tokens_per_clip": measures.tokens / measures.clips,
            "dtype": args.dtype,
            "resolution": [protocol.num_frames, size, size],
            "data": args.data,
            "command": shlex.join(["training/evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": describe_machine(accelerator),
            "versions": {"evatok_hf": evatok_hf.__version__}
            | {name: version(name) for name in ("torch", "transformers", "accelerate", "numpy", "av")},
        }
        print_table(report)
        write_json(args.output, report)
    accelerator.end_training()
    return Path(args.output)


def name_of(model: EvatokModel | EvatokRouter) -> str:
    """A Hub id, or the name of a folder without where it lies: the fingerprint says which weights these are."""
    name = model.config._name_or_path
    return Path(name).name if Path(name).is_dir() else name


def describe_allocation(allocation: Allocation) -> dict[str, Any]:
    """The way in which lengths were chosen, with the router's fingerprint where it chose them."""
    told = {"strategy": allocation.strategy}
    if allocation.strategy == "router":
        router = {"router": name_of(allocation.router), "router_fingerprint": allocation.router.fingerprint()}
        return told | {"quality": allocation.quality} | router
    return told | {"lengths": allocation.model.assignment_space.validate(allocation.lengths).tolist()}


if __name__ == "__main__":
    run_script(main)
