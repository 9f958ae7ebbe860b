"""Writes the tables of docs/reading.md from the videos of tests/helpers/odd_videos.py: `python tools/reading_table.py`.

Each video is made and read anew, so the tables say what happens, not what should.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reading.md"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "helpers")]

from odd_videos import MATRICES, ODD, ORDINARY, Odd, make_matrix  # noqa: E402

from evatok_hf.video.read import VideoReadError, open_video  # noqa: E402

HEAD = "| file | what it is | pictures | a second | read by |\n|---|---|---|---|---|"
READERS = {"decord": "decord", "pyav": "PyAV"}


def row(odd: Odd, folder: Path) -> str:
    """One video's line."""
    path = folder / odd.name
    odd.make(path)
    try:
        with open_video(path) as video:
            told = f"{video.num_frames} | {video.fps:.4g} | {READERS[video.backend]}"
    except VideoReadError:
        told = "refused | | "
    return f"| `{odd.name}` | {odd.what} | {told} |"


def turned(name: str, folder: Path) -> str:
    """One display matrix's line."""
    path = folder / "turned.mp4"
    make_matrix(path, *MATRICES[name][0])
    with open_video(path) as video:
        size = f"{video.width} x {video.height}"
        return f"| {name} | {size} | {READERS[video.backend]} |"


def tables(folder: Path) -> dict[str, str]:
    """Name -> table."""
    return {
        "ordinary": "\n".join([HEAD, *(row(odd, folder) for odd in ORDINARY)]),
        "odd": "\n".join([HEAD, *(row(odd, folder) for odd in ODD)]),
        "turned": "\n".join(
            [
                "| a video of 128 x 64 | is shown as | read by |\n|---|---|---|",
                *(turned(name, folder) for name in MATRICES),
            ]
        ),
    }


def fill(page: str, found: dict[str, str]) -> str:
    """The page with the tables between their marks."""
    for name, table in found.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.S
        )
    return page


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        PAGE.write_text(fill(PAGE.read_text(), tables(Path(made))))
