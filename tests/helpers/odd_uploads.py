"""What strangers upload: files that are no video, broken, too large, or merely unusual."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
from PIL import Image
from video_samples import encode, make_audio_only, moving_frames

# Name -> words of the message that the visitor gets, None where the video is legitimate.
EXPECTED: dict[str, str | None] = {
    "words.mp4": "cannot be opened",
    "noise.mp4": "cannot be opened",
    "playlist.mp4": "cannot be opened",
    "photo.mp4": "cannot be opened",
    "cut.mp4": "get the whole file",
    "no-index.mp4": "cannot be opened",
    "cut.webm": "get the whole file",
    "empty.mp4": "empty",
    "no-frames.mp4": "no video stream",
    "sound.mp4": "no video stream",
    "4k.mp4": "3840 x 2160",
    "ten-minutes.mp4": "600.0 seconds",
    "many-frames.mp4": "frames, at most",
    "large-in-all.mp4": "megapixels",
    "huge-header.mp4": "no size",
    "notes.txt": "file type",
    "picture.gif": "file type",
    "too-many-bytes.mp4": "size",
    "flipped.mp4": "",  # decodes or not, as luck has it
    "an-mp4.avi": None,
    "one-pixel.mkv": None,
    "a-gif-of-one-frame.mp4": None,
    "av1.mp4": None,
    "ünï clip.mp4": None,
}


def make_odd_uploads(folder: Path, real: Path) -> dict[str, Path]:
    """Name -> file, for each of `EXPECTED`; `real` is a good mp4."""
    good, frames = real.read_bytes(), moving_frames(20)
    flipped = bytearray(good)
    for place in np.random.default_rng(0).integers(len(good) // 4, len(good), 200):
        flipped[place] ^= 0xFF
    contents = {
        "words.mp4": b"This is not a video.\n" * 500,
        "noise.mp4": np.random.default_rng(1).bytes(20_000),
        "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "cut.mp4": good[: len(good) // 2],  # its index comes first
        "empty.mp4": b"",
        "flipped.mp4": bytes(flipped),
        "an-mp4.avi": good,
        "ünï clip.mp4": good,
        "notes.txt": b"notes",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(frames[0]).save(folder / "photo.mp4", format="PNG")
    encode(folder / "whole.mp4", frames, format="mp4")  # its index comes last
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "no-index.mp4").write_bytes(whole[: len(whole) - 200])
    encode(folder / "whole.webm", frames, "libvpx-vp9")
    whole = (folder / "whole.webm").read_bytes()
    (folder / "cut.webm").write_bytes(whole[: len(whole) * 2 // 3])
    _without_frames(folder / "no-frames.mp4", folder / "whole.mp4")
    make_audio_only(folder / "sound.mp4")
    encode(folder / "4k.mp4", np.zeros((2, 2160, 3840, 3), dtype=np.uint8))
    encode(folder / "ten-minutes.mp4", np.zeros((600, 16, 16, 3), dtype=np.uint8), fps=1)
    encode(folder / "many-frames.mp4", np.zeros((600, 16, 16, 3), dtype=np.uint8), fps=60)
    black = np.zeros((1, 1080, 1920, 3), dtype=np.uint8)
    large = np.broadcast_to(black, (100, *black.shape[1:]))
    encode(folder / "large-in-all.mp4", large, fps=25, options={"preset": "ultrafast"})
    still = encode(folder / "picture.gif", frames[:1], "gif", "rgb8").read_bytes()
    (folder / "a-gif-of-one-frame.mp4").write_bytes(still)
    (folder / "huge-header.mp4").write_bytes(still[:6] + struct.pack("<HH", 20000, 20000) + still[10:])
    with open(folder / "too-many-bytes.mp4", "wb") as file:
        file.write(good)
        file.truncate(101 * 10**6)
    encode(folder / "one-pixel.mkv", np.full((20, 1, 1, 3), 90, dtype=np.uint8), "ffv1", "bgr0")
    encode(folder / "av1.mp4", frames, "libaom-av1" if "libaom-av1" in av.codecs_available else "libsvtav1")
    return {name: folder / name for name in EXPECTED}


def _without_frames(path: Path, like: Path) -> None:
    """An mp4 with a video track in which there is nothing."""
    with av.open(str(like)) as source, av.open(str(path), "w") as target:
        target.add_stream_from_template(source.streams.video[0])
        target.start_encoding()
