"""Makes torchvision importable in this environment when torch is a CPU build and torchvision a CUDA build.

The torchvision wheel on PyPI is built against CUDA. Beside a CPU-only torch its compiled operators do not load, its
import fails with "operator torchvision::nms does not exist", and so do `lpips` and every transformers model, since they
import it. This command (which the Makefile runs after installing) checks for that and, only then, adds a start-up hook
to this environment that declares the two missing operators before torchvision is imported. Models, transforms and
lpips then work; non-maximum suppression, which nothing here uses, does not.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares torchvision's operators before its import, where its CUDA build meets a CPU-only torch."""
import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library
            sys._torchvision_operators = self  # the declarations live as long as the library object
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


def import_torchvision() -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)


def main() -> int:
    attempt = import_torchvision()
    if attempt.returncode == 0:
        print("torchvision imports; nothing to mend")
        return 0
    if "torchvision::nms does not exist" not in attempt.stderr:
        print(f"torchvision does not import, for another reason:\n{attempt.stderr}", file=sys.stderr)
        return 1
    folder = Path(sysconfig.get_paths()["purelib"])
    (folder / "_torchvision_on_cpu.py").write_text(HOOK)
    (folder / "_torchvision_on_cpu.pth").write_text("import _torchvision_on_cpu\n")
    attempt = import_torchvision()
    print("torchvision mended for a CPU-only torch" if attempt.returncode == 0 else attempt.stderr)
    return attempt.returncode


if __name__ == "__main__":
    raise SystemExit(main())
