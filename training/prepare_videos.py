"""Turn a folder of videos into small H.264 copies with many key frames, so that a few frames of them are read cheaply.

A clip out of a large video with rare key frames costs the decoding of much that is not in it. Where processor cores are
few, that is what a training run waits for. The copies keep the folders, the average rate and the frames, all of them or
the first `--max_frames`:

    python training/prepare_videos.py --source videos/train --target prepared/train --short_side 128
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import Replacement, read_json, write_json
from evatok_hf.video.read import VideoReadError, open_video
from evatok_hf.video.source_files import VIDEO_SUFFIXES, list_files, printable
from training.common.fields import OptionClass, option

SETTINGS_FILE = "prepared.json"
# The largest denominator of a frame rate that containers use is 1001 (30000/1001).
MAX_RATE_DENOMINATOR = 1001
FRAMES_AT_ONCE = 8


@dataclass
class PrepareArguments(OptionClass):
    """Options: the videos to read, the folder to write, and how small the videos get."""

    source: str = option("Folder of videos, searched recursively.")
    target: str = option("Folder for the copies; must not lie inside the source folder.")
    short_side: int = option("Short side of the copies in pixels, even; never upscales.", 128)
    max_frames: int = option("Frames copied of a video, from its start; 0: all.", 0)
    # 12 read fastest of 1, 4, 8, 12 and 24 for clips of 16 frames at strides 1 to 4: where every frame is a key frame,
    # decord seeks for each one, and takes three times as long.
    gop: int = option("Frames from one key frame to the next; 1 makes every frame one.", 12)
    crf: int = option("x264 constant rate factor: lower is better and larger.", 18)
    preset: str = option("x264 preset.", "fast")
    threads: int = option("Threads to encode with; 0 lets x264 choose.", 1)

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"short_side must be an even number of at least 16, not {self.short_side}.")
        self.at_least(0, "max_frames", "threads", "crf")
        self.at_least(1, "gop")
        if self.crf > 51:
            raise ValueError(f"--crf must lie in 0..51, got {self.crf}.")


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width in pixels of a copy: aspect kept, never larger than the original, even as 4:2:0 chroma needs."""
    scale = min(1.0, short_side / min(height, width))
    # Rounding down to even for the sides that are not scaled keeps the promise never to upscale.
    return max(2, int(height * scale + 1e-6) // 2 * 2), max(2, int(width * scale + 1e-6) // 2 * 2)


def plan(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of video file and copy, in sorted order.

    A file `a/b.avi` becomes `a/b.avi.mp4`, and `a/b.mp4` keeps its name, so that two files never share a copy.

    Raises:
        ValueError: if there is no such folder or no video in it, if the target lies inside it, or if two copies would
            share a name.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name the folder that holds the videos.")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"The target {target} lies inside the source {source}; choose a folder outside it.")
    files = list_files(source, VIDEO_SUFFIXES)
    if not files:
        raise ValueError(f"No video in {source}; expected files that end in {', '.join(VIDEO_SUFFIXES)}.")
    pairs, taken = [], {}
    for path in files:
        relative = path.relative_to(source)
        name = relative.name if relative.name.endswith(".mp4") else relative.name + ".mp4"
        copy = target / relative.with_name(name)
        if copy in taken:
            raise ValueError(f"{path} and {taken[copy]} would both become {copy}; rename one of them.")
        taken[copy] = path
        pairs.append((path, copy))
    return pairs


def check_settings(target: Path, args: PrepareArguments) -> None:
    """Note the settings beside the copies, or raise ValueError if the folder holds copies made with other ones."""
    settings = {name: getattr(args, name) for name in ("short_side", "max_frames", "gop", "crf", "preset")}
    path = target / SETTINGS_FILE
    if not path.exists():
        target.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    elif (earlier := read_json(path)) != settings:
        raise ValueError(f"{target} holds copies made with {earlier}, not {settings}; choose another target.")


def prepare_video(path: Path, copy: Path, args: PrepareArguments) -> int:
    """Write the small copy of one video and return its number of frames.

    Frames are reduced by FFmpeg's bilinear filter, which is antialiased and the one that clips are cut with, and stored
    in order at the average rate: frame i of the copy is frame i of the original, up to `max_frames`. Sound is
    dropped; a rotation in the file's metadata is carried out.

    Raises:
        VideoReadError: if the file is not a video, or is damaged anywhere; nothing is left behind then.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    with Replacement(copy) as partial:
        with open_video(path) as video, av.open(str(partial), "w", format="mp4") as writer:
            rate = Fraction(video.fps).limit_denominator(MAX_RATE_DENOMINATOR)
            output = _output_stream(writer, rate, *target_size(video.height, video.width, args.short_side), args)
            frames = 0
            images = (image for chunk in video.iter_chunks(FRAMES_AT_ONCE) for image in chunk)  # uint8 (H, W, 3)
            for image in islice(images, args.max_frames or None):
                small = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    width=output.width,
                    height=output.height,
                    format="yuv420p",
                    interpolation=Interpolation.BILINEAR,
                    dst_colorspace=Colorspace.ITU601,
                    dst_color_range=ColorRange.MPEG,
                )
                small.pts, small.time_base = frames, 1 / rate
                writer.mux(output.encode(small))
                frames += 1
            writer.mux(output.encode(None))
    return frames


def _output_stream(
    writer: av.container.OutputContainer, rate: Fraction, height: int, width: int, args: PrepareArguments
) -> av.VideoStream:
    # fastdecode leaves out CABAC and the loop filter, which are much of the work of decoding, for some more bytes.
    options = {"crf": str(args.crf), "preset": args.preset, "tune": "fastdecode", "g": str(args.gop), "bf": "0"}
    output = writer.add_stream("libx264", rate=rate, options=options)
    output.height, output.width, output.pix_fmt = height, width, "yuv420p"
    output.time_base = 1 / rate
    output.codec_context.thread_count = args.threads
    output.codec_context.colorspace = Colorspace.ITU601
    output.codec_context.color_range = ColorRange.MPEG
    return output


def run(args: PrepareArguments) -> tuple[int, int, list[str]]:
    """Prepare a folder; return the numbers of copies made and of copies that were there, and the broken files' names.

    A copy that is there and not older than its original is left alone, so an interrupted run can simply be repeated.

    Raises:
        ValueError: from `plan` and `check_settings`.
    """
    source, target = Path(args.source), Path(args.target)
    pairs = plan(source, target)
    check_settings(target, args)
    made, kept, broken = 0, 0, []
    with tqdm(pairs, unit="video", desc=f"short side {args.short_side}") as bar:
        for path, copy in bar:
            if copy.exists() and copy.stat().st_mtime >= path.stat().st_mtime:
                kept += 1
                continue
            try:
                prepare_video(path, copy, args)
                made += 1
            except VideoReadError as error:
                broken.append(printable(path.relative_to(source)))
                bar.write(f"skipped: {error}", file=sys.stderr)
    return made, kept, broken


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 unless every video was broken (1) or the arguments were wrong (2)."""
    try:
        (args,) = HfArgumentParser(PrepareArguments).parse_args_into_dataclasses(argv)
        made, kept, broken = run(args)
    except ValueError as error:
        print(f"prepare_videos: {error}", file=sys.stderr)
        return 2
    print(f"{made} prepared, {kept} there already, {len(broken)} broken, in {printable(args.target)}")
    for name in broken:
        print(f"broken: {name}", file=sys.stderr)
    return 0 if made or kept else 1


if __name__ == "__main__":
    run_script(main)
