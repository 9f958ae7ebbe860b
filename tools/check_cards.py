"""Checks cards without a network: `python tools/check_cards.py [README.md or folder ..]`, by default all that are here.

Prints a line for each problem; exit code 1 if there is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from evatok_hf import default_checkpoint
from evatok_hf.hub.card_check import check_card, kind_of

ROOT = Path(__file__).parents[1]


def own_cards() -> list[Path]:
    """Those of the bundled checkpoint, and of Spaces."""
    return sorted([*Path(default_checkpoint()).glob("*/README.md"), *ROOT.glob("spaces/*/README.md")])


def main(argv: list[str]) -> int:
    found = 0
    for path in map(Path, argv or own_cards()):
        path = path / "README.md" if path.is_dir() else path
        if not path.is_file():
            print(f"{path}: there is no such card", file=sys.stderr)
            return 1
        text = path.read_text(encoding="utf-8")
        for problem in check_card(text, kind_of(text), path.parent):
            print(f"{path}: {problem}", file=sys.stderr)
            found += 1
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
