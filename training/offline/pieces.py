"""Results on their way home: a folder as a tar in pieces, few files below 16 MB for tensors of any size."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

from evatok_hf.models.files_evatok import replacing_folder

PIECE = 15_000_000  # bytes


def to_pieces(folder: Path, target: Path) -> None:
    """Writes the pieces of a folder, TARGET/1-of-3-DIGEST and so on."""
    with replacing_folder(target) as made:
        with tarfile.open(made / "tar", "w") as tar:
            tar.add(folder, ".")
        whole = (made / "tar").read_bytes()
        (made / "tar").unlink()
        count, digest = -(-len(whole) // PIECE), hashlib.sha256(whole).hexdigest()[:16]
        for number in range(count):
            piece = whole[number * PIECE : (number + 1) * PIECE]
            (made / f"{number + 1}-of-{count}-{digest}").write_bytes(piece)


def pieces_of(folder: Path) -> list[Path]:
    """The files of `to_pieces` in a folder."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\d+-of-\d+-[0-9a-f]{16}", path.name)]


def from_pieces(pieces: Path, folder: Path) -> None:
    """Undoes `to_pieces`. Raises ValueError for pieces that are missing, damaged, or of several results."""
    made, *others = {path.name.split("-", 2)[2] for path in pieces_of(pieces)}
    if others:
        raise ValueError(f"{pieces} holds pieces of several results; bring the last ones home into an empty folder.")
    count, digest = made.split("-")
    paths = [pieces / f"{number + 1}-of-{made}" for number in range(int(count))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{pieces} lacks {', '.join(missing)}; bring all its pieces home.")
    whole = b"".join(path.read_bytes() for path in paths)
    if not hashlib.sha256(whole).hexdigest().startswith(digest):
        raise ValueError(f"the pieces in {pieces} were changed on the way; bring them home again.")
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        tar.extractall(folder, filter="data")
