"""Damage to files: bytes and values changed in every way that is cheap to think of, by a seed."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NESTED = "[" * 5000 + "]" * 5000
# As JSON and YAML have them.
WORDS = ["null", "-1", "0", "1e400", "NaN", "1000000000", "9" * 5000, '"evil"', '""', "[]", "{}", "true", "0.5", NESTED]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, lost, doubled or put in."""
    place, size = rng.randrange(len(content)), rng.randint(1, 40)
    kind = rng.randrange(7)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + rng.randbytes(size) + content[place + size :]
    if kind == 2:
        return content[:place] + content[place + size :]
    if kind == 3:
        return content[:place]
    if kind == 4:
        return content[:place] + content[place : place + size] * 2 + content[place + size :]
    if kind == 5:
        return content[:place] + bytes(size) + content[place + size :]
    return content[:place] + rng.choice(WORDS).encode() + content[place:]


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Half the time bytes, else a value changed or a field lost, somewhere in the tree."""
    if rng.random() < 0.4:
        return damage_bytes(content, rng)
    values = copy.deepcopy(json.loads(content))
    parents = list(_parents(values))
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    if rng.random() < 0.15:
        del parent[key]
        return json.dumps(values).encode()
    parent[key] = "\0here"
    return json.dumps(values).replace('"\\u0000here"', rng.choice(WORDS)).encode()


def _parents(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _parents(entry)


Damage = Callable[[bytes, random.Random], bytes]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what hangs."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
