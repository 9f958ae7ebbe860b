"""Installs the browser that the tests of the demo need, where that can be done: as root, with apt-get.

Does nothing where there is one already, and never fails: without a browser those tests are skipped and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def main() -> None:
    if find_browser():
        return
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        print("No Chromium here: the browser tests of the demo will be skipped; install it to run them.")
        return
    print("Installing Chromium for the browser tests of the demo")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"Chromium could not be installed ({error}): the browser tests will be skipped.")
            return
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"Chromium could not be installed ({cause}): the browser tests will be skipped.")
            return


if __name__ == "__main__":
    main()
