"""The Space: the app of `evatok demo`. EVATOK_MODEL names another checkpoint than the bundled one."""

import os

try:
    import spaces  # noqa: F401 - on ZeroGPU, before anything that imports torch
except ImportError:
    pass

from evatok_hf.demo import launch

if __name__ == "__main__":
    launch(model=os.environ.get("EVATOK_MODEL") or None)
