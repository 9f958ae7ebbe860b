"""Decoded videos: all frames of a folder of videos in one file, from which clips are cut without a decoder.

For training that a decoder would hold up, on an accelerator whose memory takes all frames, or on a machine that has no
reader of videos but OpenCV. `decode_videos` writes a folder with `frames.bin`, uint8 (H, W, 3) frame after frame, and
`videos.json`; wherever a source of videos is named, `evatok_hf.data.clip_sources` knows it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, count, takewhile
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.files_evatok import (
    checked,
    list_of,
    named,
    number,
    read_json,
    record,
    replacing_folder,
    ruled,
    text,
    whole,
)
from ..video.bounds import check_frame
from ..video.source_files import Example, printable

logger = logging.getLogger(__name__)

FRAMES, VIDEOS = "frames.bin", "videos.json"
_READERS = ("av", "decord", "cv2")  # packages, the one that is preferred first
_CHUNK = 64  # frames decoded at once
_VIDEOS_A_PROCESS = 8  # fewer are decoded before another process has started


@checked
@dataclass
class _Entry:
    key: str = ruled(text())
    label: int = ruled(whole(-1, 1 << 40))
    fps: int | float = ruled(number(0, 1e6))
    num_frames: int = ruled(whole(1, 1 << 40))
    height: int = ruled(whole(1, 1 << 16))
    width: int = ruled(whole(1, 1 << 16))


@checked
@dataclass
class _Contents:
    videos: list = ruled(list_of(record(_Entry), 10_000_000, least=1))
    classes: list = ruled(list_of(text(), 1_000_000))


@dataclass(frozen=True)
class DecodedVideo:
    """One video of a decoded source, read as `VideoReader` is.

    Attributes:
        frames: (num_frames, H, W, 3) uint8, a view of all frames, in memory, on a device or of the file.
        fps: frames a second.
    """

    frames: torch.Tensor
    fps: float

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames with these numbers, (F, H, W, 3) uint8, where all frames are."""
        return torch.stack([self.frames[index] for index in indices])

    def close(self) -> None:
        pass


class DecodedSource:
    """A folder that `decode_videos` made, as a source of clips (see `clip_sources.Source`).

    Raises:
        ValueError: an index that says other than the frames do.
    """

    tars, num_shards = (), 1

    def __init__(self, folder: str | Path):
        self.name, self._folder = printable(folder), Path(folder)
        contents = read_json(self._folder / VIDEOS, _Contents)
        self.classes = tuple(contents["classes"])
        self._videos = [_Entry(**entry) for entry in contents["videos"]]
        sizes = [video.num_frames * video.height * video.width * 3 for video in self._videos]
        self._starts = np.cumsum([0, *sizes])
        with named(self._folder / FRAMES):
            if (found := (self._folder / FRAMES).stat().st_size) != self._starts[-1]:
                raise ValueError(f"it has {found:,} bytes, {VIDEOS} says {self._starts[-1]:,}; decode the videos again")
        self._data: torch.Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Puts all frames into the memory of a device."""
        self._data = torch.from_numpy(np.fromfile(self._folder / FRAMES, np.uint8)).to(device)

    def __getstate__(self) -> dict:  # loader processes map the file anew
        return {**self.__dict__, "_data": None}

    def examples(
        self, seed: list[int] | None = None, buffer: int = 0, epoch: int = 0, reader: int = 0, readers: int = 1
    ) -> Iterator[Example]:
        """One reader's part of an epoch, shuffled as a whole where there is a seed."""
        if self._data is None:
            self._data = torch.from_numpy(np.memmap(self._folder / FRAMES, np.uint8, "c"))  # copied when written to
        order = np.arange(len(self._videos))
        if seed is not None:
            order = np.random.default_rng([*seed, epoch]).permutation(order)
        for index in order[(reader + epoch) % readers :: readers]:
            video, start, end = self._videos[index], self._starts[index], self._starts[index + 1]
            frames = self._data[start:end].view(video.num_frames, video.height, video.width, 3)
            yield Example(video.key, DecodedVideo(frames, video.fps), video.label)


def is_decoded(folder: Path) -> bool:
    return (folder / VIDEOS).is_file() and (folder / FRAMES).is_file()


def decode_videos(
    examples: Sequence[Example], classes: Sequence[str], output: str | Path, short_side: int, processes: int = 0
) -> int:
    """Decodes all frames of some videos into a folder, which is there when all of it is.

    Videos that cannot be read are left out, with a warning.

    Args:
        examples: the videos, at paths.
        classes: names of the classes that their labels index.
        output: the folder.
        short_side: frames whose short side is longer are made smaller, in pixels.
        processes: that decode at once; 0: up to one a core, fewer where there are few videos.

    Returns:
        How many bytes all frames have.

    Raises:
        ValueError: no video can be read, none of PyAV, decord and OpenCV is installed, or there is no room for the
            frames.
    """
    if not any(map(find_spec, _READERS)):
        raise ValueError("no package that reads videos is installed; install av, decord or opencv-python-headless.")
    videos = []
    with replacing_folder(Path(output)) as folder, open(folder / FRAMES, "wb") as out:
        parts = [folder / f"{index}.part" for index in range(len(examples))]
        processes = processes or min(os.cpu_count() or 1, 1 + len(examples) // _VIDEOS_A_PROCESS)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            decode = map if processes == 1 else pool.map  # a pool starts its processes when it is given work
            results = decode(partial(_decode, short_side), examples, parts)
            bar = tqdm(results, "decoding", len(examples), unit="video")
            for example, part, found in zip(examples, parts, bar, strict=True):
                if isinstance(found, str):
                    logger.warning("left out %s: %s", example.key, found)
                else:
                    videos.append(found)
                    with open(part, "rb") as file:
                        shutil.copyfileobj(file, out, 1 << 24)
                part.unlink(missing_ok=True)
        if not videos:
            raise ValueError("none of the videos can be read; see the warnings above.")
        (folder / VIDEOS).write_text(json.dumps({"videos": [asdict(video) for video in videos], "classes": [*classes]}))
        return out.tell()


def _decode(short_side: int, example: Example, part: Path) -> _Entry | str:
    """Writes a video's frames; why not, where that is not possible."""
    try:
        fps, frames = _open(example.video)
        number, size = 0, (0, 0)
        with open(part, "wb") as out:
            for frame in frames:
                shrunk = _shrunk(torch.from_numpy(frame), short_side)
                size, number = shrunk.shape[:2], number + 1
                out.write(shrunk.numpy())
        if not number:
            return "it has no frame"
        return _Entry(example.key, example.label, fps, number, *size)
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk is full, for one
        return str(error)
    except (ValueError, RuntimeError) as error:
        return str(error)


def _shrunk(frame: torch.Tensor, short_side: int) -> torch.Tensor:
    height, width = frame.shape[:2]
    if (short := min(height, width)) <= short_side:
        return frame
    size = [round(side * short_side / short) for side in (height, width)]
    frame = torch.nn.functional.interpolate(frame.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)
    return frame[0].permute(1, 2, 0).contiguous()


def _open(path: str) -> tuple[float, Iterator[np.ndarray]]:
    """Frames a second, and the frames (H, W, 3) uint8, by the first of the readers that is installed."""
    if find_spec("av"):
        from ..video.read import open_video

        video = open_video(path, reader="pyav")
        return video.fps, chain.from_iterable(video.iter_chunks(_CHUNK))
    if find_spec("decord"):
        import decord

        reader = decord.VideoReader(path, num_threads=1)
        return float(reader.get_avg_fps()), (reader[index].asnumpy() for index in range(len(reader)))
    import cv2

    capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        raise ValueError("OpenCV cannot read it")
    width, height = (int(capture.get(name)) for name in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    check_frame(path, height, width)
    read = takewhile(itemgetter(0), (capture.read() for _ in count()))
    return float(capture.get(cv2.CAP_PROP_FPS)) or 25.0, (cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for _, frame in read)
