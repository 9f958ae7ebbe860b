"""Pushing to the Hub from training scripts, named and behaving as in transformers' `TrainingArguments`.

Whether a run may push is found out before it trains. Uploads of saves go on in the background, by the main process
alone; one that fails is told in the log, and the next save is pushed. A save that comes while another one is on its way
is left out. The push at the end is waited for. Each is one commit: of `evatok_hf.hub.push_checkpoint`, with weights,
configuration, code and card, or of `push_dataset`.

What pushes is imported by the push: worker processes of data makers import this module, too, and must start quickly.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from huggingface_hub.utils import disable_progress_bars

from training.common.fields import OptionClass, option

if TYPE_CHECKING:
    from evatok_hf.hub.push import Pushed

logger = logging.getLogger("hub_push")
STRATEGIES = ("end", "every_save", "checkpoint")


@dataclass(kw_only=True)
class PushOptions(OptionClass):
    """Options of pushing to the Hub. There is none for the token, since options are written into the card."""

    kind: ClassVar[str]  # of repository: model or dataset
    hub_strategy: ClassVar[str] = "end"

    push_to_hub: bool = option("Push what is made to the Hub, with the token of `hf auth login` or HF_TOKEN.", False)
    hub_private_repo: bool = option("Make the repository private, where it is new.", False)

    def __post_init__(self):
        super().__post_init__()
        if self.repository is not None:
            from evatok_hf.hub.commit import check_repo_id

            check_repo_id(self.repository)
        elif self.push_to_hub:
            raise ValueError(f"--push_to_hub needs --hub_{self.kind}_id USER/NAME.")

    @property
    def repository(self) -> str | None:
        return getattr(self, f"hub_{self.kind}_id")


@dataclass(kw_only=True)
class HubArguments(PushOptions):
    """Options of pushing a model."""

    kind = "model"

    hub_model_id: str | None = option("The model's repository, USER/NAME; made if need be.", None)
    hub_strategy: str = option(
        "end (only when training is done), every_save (also, in the background, when a checkpoint is saved) or "
        "checkpoint (with the state to resume from, in last-checkpoint/).",
        "every_save",
    )

    def __post_init__(self):
        super().__post_init__()
        self.one_of(hub_strategy=STRATEGIES)


@dataclass(kw_only=True)
class HubDatasetArguments(PushOptions):
    """Options of pushing a data set, which is done when it is finished."""

    kind = "dataset"

    hub_dataset_id: str | None = option("The data set's repository, USER/NAME; made if need be.", None)


class HubPush:
    """The pushes of one run.

    Args:
        args: options of the run.
        output_dir: of the run.
        is_main_process: only the main process talks to the Hub.

    Attributes:
        saves: whether saves are pushed too, the same in all processes.
        folder: `.hub` of the run, for what is on its way.

    Raises:
        ValueError: no token, or one that may not write there; no answer.
    """

    def __init__(self, args: PushOptions, output_dir: Path, is_main_process: bool = True):
        self.saves = args.push_to_hub and args.hub_strategy != "end"
        self.with_state = args.hub_strategy == "checkpoint"
        self.active = args.push_to_hub and is_main_process
        self.kind, self.folder = args.kind, output_dir / ".hub"
        self._push: Future[Pushed] | None = None
        logger.setLevel(logging.INFO)
        if self.active:
            from evatok_hf.hub.commit import prepare_repository

            self.api, self.repo_id, _ = prepare_repository(args.repository, args.kind, args.hub_private_repo)
            disable_progress_bars()  # there is the one of the run
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed

    def takes_save(self) -> bool:
        """True if this process is to push a save: none is still on its way."""
        if not (self.active and self.saves):
            return False
        if self._push is not None and not self._push.done():
            logger.info("this save is not pushed, the one before is still on its way")
            return False
        self._settle()
        self.folder.mkdir(parents=True, exist_ok=True)
        return True

    def save(self, model: Path, step: int, state: Path) -> None:
        """Pushes a model in `folder` in the background, with the checkpoint of its step where the run does that."""
        from evatok_hf.hub.push import push_checkpoint

        options = {"message": f"Training in progress, step {step}", "state": self._keep(state)}
        self._push = self.api.run_as_future(push_checkpoint, model, self.repo_id, **options)

    def finish(self, folder: Path, state: Path | None = None) -> None:
        """Pushes the model of the end with the last checkpoint, or the finished data set, and waits for it.

        Raises:
            ValueError: it has not arrived; the message has the command that repeats the push.
        """
        if not self.active:
            return
        from evatok_hf.hub.dataset import push_dataset
        from evatok_hf.hub.push import push_checkpoint

        if self._push is not None and not self._push.done():
            logger.info("waiting for the last push to finish")
        self._settle()
        try:
            if self.kind == "dataset":
                done = push_dataset(folder, self.repo_id)
            else:
                state = state if self.with_state else None
                done = push_checkpoint(folder, self.repo_id, message="End of training", state=state)
        except ValueError as error:
            command = shlex.join(["evatok", "push", str(folder), self.repo_id])
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} is complete, but {reason} To push it: {command}") from error
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        logger.info("pushed %s to %s", folder, done.url)

    def _settle(self) -> None:
        """Waits for the push of a save, and tells of one that failed."""
        if self._push is not None and (error := self._push.exception()) is not None:
            logger.warning("a save was not pushed, training goes on: %s", " ".join(str(error).split()))
        self._push = None

    def _keep(self, state: Path) -> Path | None:
        """The checkpoint under another name: training removes old ones, maybe while this one is on its way."""
        if not self.with_state:
            return None
        kept = self.folder / "state"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(state, kept, copy_function=_link)
        return kept


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
