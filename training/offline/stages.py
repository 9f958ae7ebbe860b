"""Runs one stage of training from a pack, on a machine without a network; `run.sh` of the pack calls it.

    bash PACK/run.sh STAGE OUT [--minutes 9] [options of the stage's script]

It goes on from what it finds: its own checkpoints under OUT/work, if it was stopped or has run before, else the results
of an earlier OUT that the pack was made with. Results go to OUT, and in pieces below 16 MB to OUT/home.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

MANIFEST = "pack.json"
CONFIGS = ("tiny", "small", "base")
# Stage -> folder of what it comes to, script, configuration by size, and class of the model.
_STAGES = {
    "proxy": ("proxy", "train_tokenizer", "tokenizer_{}", "EvatokModel"),
    "curate": ("curated", "curate", "curate_{}", None),
    "router": ("router", "train_router", "router_{}", "EvatokRouter"),
    "final": ("tokenizer", "train_tokenizer", "tokenizer_{}_final", "EvatokModel"),
    "generator": ("generator", "train_generator", "generator_{}", "EvatokForCausalLM"),
}
STAGES = tuple(_STAGES)
RESULTS = {stage: result for stage, (result, *_) in _STAGES.items()}
MODELS = {stage: kind for stage, (*_, kind) in _STAGES.items() if kind}
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "numpy", "huggingface_hub", "tqdm", "yaml")
READERS = ("av", "decord", "cv2")
HOME = "home"
# Frames are kept at this many times the size of a clip's, so that crops of part of them have pixels enough.
ROOM = 1.25
# Clips of each video, on average, whose tokens a generator learns, and frames that frame prediction knows of them.
VIEWS, KNOWN_FRAMES = 8, 5


def check_target() -> None:
    """Raises ValueError for a machine that lacks a package."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not any(map(importlib.util.find_spec, READERS)):
        missing.append("one of av, decord and opencv-python-headless")
    if missing:
        raise ValueError(f"this machine lacks {', '.join(missing)}; install it, or pack its wheel (pack.py --wheels).")


class Stage:
    """One stage of a pack and an OUT.

    Args:
        name: one of `STAGES`.
        pack, out: the folders.
    """

    def __init__(self, name: str, pack: Path, out: Path):
        from evatok_hf.models.files_evatok import read_json

        self.name, self.pack, self.out = name, pack, out
        manifest = read_json(pack / MANIFEST)
        self.size, self.weights = manifest["config"], manifest["weights"]
        self.work = out / "work" / name

    def earlier(self, stage: str) -> Path | None:
        """The checkpoint that a stage came to: here, or before the pack was made."""
        folders = [folder / RESULTS[stage] for folder in (self.out, self.pack / "checkpoints")]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is not None and stage in ("proxy", "final"):
            self.check_clips(found)
        return found

    def check_clips(self, tokenizer: Path) -> None:
        """Raises ValueError for a tokenizer of other clips than the pack's configuration has."""
        from evatok_hf import EvatokConfig

        configs = EvatokConfig.from_pretrained(tokenizer), EvatokConfig.from_preset(self.size)
        theirs, own = (f"{one.num_frames} frames of {one.image_size} x {one.image_size}" for one in configs)
        if theirs != own:
            raise ValueError(
                f"{tokenizer} is for clips of {theirs}, the pack's configuration, {self.size}, for {own}; use another "
                "OUT, or a pack of the configuration that it was trained with."
            )

    def need(self, stage: str) -> str:
        """Raises ValueError where that stage has not run."""
        if (found := self.earlier(stage)) is None:
            raise ValueError(f"stage {self.name} goes on from {stage}, which is not there; run that first.")
        return str(found)

    def sources(self) -> tuple[list[str], str | None]:
        """The decoded videos as --train_data, and as --val_data; decoded on the first call."""
        from evatok_hf import EvatokConfig
        from evatok_hf.data.clip_sources import list_videos
        from evatok_hf.data.decoded import decode_videos, is_decoded
        from evatok_hf.models.files_evatok import read_json, write_text

        side = round(ROOM * EvatokConfig.from_preset(self.size).image_size)
        train, val = [], None
        for index, weight in enumerate(self.weights):
            folder = self.out / "work" / "frames" / str(index)
            videos, classes = list_videos(self.pack / "videos" / str(index), "train")
            made_of = {"side": side, "videos": {video.key: Path(video.video).stat().st_size for video in videos}}
            note = folder / "made_of.json"
            if not (is_decoded(folder) and note.is_file() and read_json(note) == made_of):
                decode_videos(videos, classes, folder, side)
                write_text(note, json.dumps(made_of))
            if weight:
                train.append(f"{folder}={weight}")
            else:
                val = str(folder)
        return train, val

    def command(self, minutes: float) -> list[str]:
        """The options of the stage's script. Raises ValueError where an earlier stage has not run."""
        from training.common.arguments import read_yaml

        config = self.pack / "sources" / "training" / "configs" / f"{_STAGES[self.name][2].format(self.size)}.yaml"
        words = ["--config", str(config), "--output_dir", str(self.work), "--minutes", str(minutes)]
        begun = any(self.work.glob("checkpoint-*"))
        if self.name == "curate":
            words += ["--tokenizer", self.need("proxy"), "--resume", str((self.work / "data").is_dir())]
        if self.name == "router":
            words += ["--curated", self.need("curate")]
        if self.name == "final":
            words += ["--assignment", f"router:{self.need('router')}"]
        if not begun and self.name != "curate" and self.work.exists():
            shutil.rmtree(self.work)  # of a run that was killed before its first checkpoint
        if begun:
            words += ["--resume", "latest"]
        # Also of a run that goes on: the sizes are those of what it began from.
        if self.name in ("proxy", "final") and (start := self.earlier(self.name) or self.earlier("proxy")):
            words += ["--init_from", str(start), "--linear_start", "0"]  # which is for a new model
        if self.name == "generator":
            models = self.models()
            words += ["--sample_every", "0"]  # the minutes are for training
            prediction = read_yaml(config).get("prediction", 0) > 0
            return [*words, "--tokenizer", str(models), "--train_tokens", str(self.tokens(models, minutes, prediction))]
        train, val = self.sources()
        if self.name in ("proxy", "final"):
            import torch

            words += ["--num_workers", "0", "--resident", str(torch.cuda.is_available())]
            words += ["--val_data", val] if val else []
        return [*words, "--train_data", *train]

    def models(self) -> Path:
        """The final tokenizer and the router, as one checkpoint. Raises ValueError where one of them is not there."""
        from evatok_hf.models.files_evatok import replacing_folder

        found = {"tokenizer": self.need("final"), "router": self.need("router")}
        with replacing_folder(self.out / "work" / "models") as folder:
            for name, path in found.items():
                shutil.copytree(path, folder / name)
        return self.out / "work" / "models"

    def tokens(self, models: Path, minutes: float, prediction: bool) -> Path:
        """The tokens of the videos, made within half of the minutes where they are not there.

        Raises:
            ValueError: there are some of a tokenizer that was trained on since.
        """
        from accelerate.state import AcceleratorState

        from evatok_hf import EvatokModel
        from evatok_hf.data.decoded import VIDEOS
        from evatok_hf.data.token_dataset import SUMMARY, read_summary
        from evatok_hf.models.files_evatok import read_json
        from training.tokenize_dataset import main as tokenize

        folder = self.out / "work" / "tokens"
        if (folder / SUMMARY).exists():
            if not EvatokModel.from_pretrained(models / "tokenizer").reads(
                read_summary(folder)["tokenizer_fingerprint"]
            ):
                raise ValueError(
                    f"the tokens in {folder} are of a tokenizer that was trained on since; remove that folder and "
                    f"{self.work}, and the generator begins anew."
                )
            return folder
        train, _ = self.sources()
        videos = sum(len(read_json(Path(name.rpartition("=")[0]) / VIDEOS)["videos"]) for name in train)
        words = ["--tokenizer", str(models), "--output_dir", str(folder), "--minutes", str(minutes / 2)]
        words += ["--clips", str(VIEWS * videos), "--clips_per_video", "2", "--resume", str(folder.exists())]
        words += ["--known_frames", str(KNOWN_FRAMES)] if prediction else []
        tokenize([*words, "--train_data", *train])
        AcceleratorState._reset_state(reset_partial_state=True)  # of another precision than that of training
        return folder

    def publish(self, made: Path) -> None:
        """Puts what the script made into OUT, weights in bf16."""
        import evatok_hf
        from evatok_hf.models.files_evatok import replacing_folder
        from training.offline.pieces import to_pieces

        is_model = self.name in MODELS
        with replacing_folder(self.out / RESULTS[self.name]) as folder:
            weights = shutil.ignore_patterns("*.safetensors") if is_model else None
            shutil.copytree(made, folder, dirs_exist_ok=True, ignore=weights)
            if is_model:
                model = getattr(evatok_hf, MODELS[self.name]).from_pretrained(made, dtype="bfloat16")
                model.save_pretrained(folder)
        to_pieces(self.out / RESULTS[self.name], self.out / HOME / RESULTS[self.name])


def figures(folder: Path) -> str:
    """The last figures in the log or the summary of a run, in one line."""
    from evatok_hf.models.files_evatok import read_json
    from training.common.reporting import read_log

    if (summary := folder / "curation.json").exists():
        found = read_json(summary)
        return f"{found['clips']} clips in {found['seconds']} s, bounds {found['bounds']}"
    said: dict[str, float] = {}
    for record in read_log(folder / "log.jsonl"):
        said |= record
    names = ("step", "psnr", "loss", "total", "clips_per_second", "tokens_per_second", "mfu", "data_wait", "seconds")
    names += tuple(name for name in said if name.startswith("val/"))
    return ", ".join(f"{name} {said[name]:.4g}" for name in names if name in said)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("pack", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path, help="Folder of results and of work.")
    parser.add_argument("--minutes", type=float, default=9.0, help="How long it may take, to the written result.")
    args, more = parser.parse_known_args(argv)
    check_target()
    stage = Stage(args.stage, args.pack, args.out)
    words = stage.command(args.minutes)
    script = importlib.import_module(f"training.{_STAGES[args.stage][1]}")
    stage.publish(script.main([*words, *more]))
    print(f"{args.stage}: {figures(stage.work)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from evatok_hf.interrupts import run_script

    run_script(main)
