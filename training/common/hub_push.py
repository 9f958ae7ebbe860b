"""Pushing to the Hub from training scripts, named and behaving as in transformers' `TrainingArguments`.

Whether a run may push is found out before it trains. Uploads of saves go on in the background, by the main process
alone; one that fails is told in the log, and the next save is pushed. A save that comes while another one is on its way
is left out. The push at the end is waited for. All of them are `evatok_hf.hub.push_checkpoint`: one commit each, with
weights, configuration, code and card.

What pushes is imported by the push: worker processes of data makers import this module, too, and must start quickly.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from huggingface_hub.utils import disable_progress_bars

from training.common.fields import OptionClass, option

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evatok_hf.hub.push import Pushed

logger = logging.getLogger("hub_push")
STRATEGIES = ("end", "every_save", "checkpoint")


@dataclass(kw_only=True)
class PushOptions(OptionClass):
    """Options of pushing to the Hub. There is none for the token, since options are written into the card."""

    repository: ClassVar[str]  # the option that names it

    push_to_hub: bool = option("Push what is made to the Hub, with the token of `hf auth login` or HF_TOKEN.", False)
    hub_private_repo: bool = option("Make the repository private, where it is new.", False)

    def __post_init__(self):
        super().__post_init__()
        if (name := getattr(self, self.repository)) is not None:
            from evatok_hf.hub.commit import check_repo_id

            check_repo_id(name)
        elif self.push_to_hub:
            raise ValueError(f"--push_to_hub needs --{self.repository} USER/NAME.")


@dataclass(kw_only=True)
class HubArguments(PushOptions):
    """Options of pushing a model."""

    repository = "hub_model_id"

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

    repository = "hub_dataset_id"

    hub_dataset_id: str | None = option("The data set's repository, USER/NAME; made if need be.", None)


class HubPush:
    """The pushes of one run.

    Args:
        args: options of the run.
        accelerator: of the run; only its main process talks to the Hub.
        output_dir: of the run; `.hub` in it holds what is on its way.

    Attributes:
        saves: whether saves are pushed too, the same in all processes.

    Raises:
        ValueError: no token, or one that may not write there; no answer.
    """

    def __init__(self, args: HubArguments, accelerator: Accelerator, output_dir: Path):
        self.saves = args.push_to_hub and args.hub_strategy != "end"
        self.with_state = args.hub_strategy == "checkpoint"
        self.active = args.push_to_hub and accelerator.is_main_process
        self.folder = output_dir / ".hub"
        self._push: Future[Pushed] | None = None
        logger.setLevel(logging.INFO)
        if self.active:
            from evatok_hf.hub.commit import prepare_repository

            self.api, self.repo_id, self.url = prepare_repository(args.hub_model_id, private=args.hub_private_repo)
            disable_progress_bars()  # there is the one of training
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed

    def save(self, step: int, export: Callable[[Path], Path], state: Path) -> None:
        """Pushes the model of a step in the background, unless another one is still on its way.

        Args:
            step: that was done.
            export: writes the model into the folder that it is given -> the folder of the model in it.
            state: the checkpoint of that step.
        """
        if not (self.active and self.saves) or not self._is_free():
            return
        from evatok_hf.hub.push import push_checkpoint

        self.folder.mkdir(parents=True, exist_ok=True)
        model = export(self.folder)
        options = {"message": f"Training in progress, step {step}", "state": self._keep(state)}
        self._push = self.api.run_as_future(push_checkpoint, model, self.repo_id, **options)

    def finish(self, model: Path, state: Path) -> None:
        """Pushes the model of the end, and waits until it has arrived.

        Raises:
            ValueError: it has not; the message has the command that repeats the push.
        """
        if not self.active:
            return
        from evatok_hf.hub.push import push_checkpoint

        if self._push is not None:
            if not self._push.done():
                logger.info("waiting for the last push to finish")
            self._push.exception()
            self._is_free()
        try:
            done = push_checkpoint(
                model, self.repo_id, message="End of training", state=state if self.with_state else None
            )
        except ValueError as error:
            raise ValueError(_not_pushed(model, self.repo_id, error)) from error
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        logger.info("pushed %s to %s", model, done.url)

    def _is_free(self) -> bool:
        if self._push is None:
            return True
        if not self._push.done():
            logger.info("this save is not pushed, the one before is still on its way")
            return False
        error = self._push.exception()
        if error is not None:
            logger.warning("a save was not pushed, training goes on: %s", " ".join(str(error).split()))
        self._push = None
        return True

    def _keep(self, state: Path) -> Path | None:
        """The checkpoint under another name: training removes old ones, maybe while this one is on its way."""
        if not self.with_state:
            return None
        kept = self.folder / "state"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(state, kept, copy_function=_link)
        return kept


class HubDataset:
    """The push of a data set, by the main process. Arguments and errors as `HubPush`."""

    def __init__(self, args: HubDatasetArguments, is_main_process: bool = True):
        self.active = args.push_to_hub and is_main_process
        logger.setLevel(logging.INFO)
        if self.active:
            from evatok_hf.hub.commit import prepare_repository

            _, self.repo_id, _ = prepare_repository(args.hub_dataset_id, "dataset", args.hub_private_repo)
            disable_progress_bars()

    def finish(self, folder: Path) -> None:
        """Pushes a finished data set. Raises ValueError, with the command that repeats the push."""
        if not self.active:
            return
        from evatok_hf.hub.dataset import push_dataset

        try:
            done = push_dataset(folder, self.repo_id)
        except ValueError as error:
            raise ValueError(_not_pushed(folder, self.repo_id, error)) from error
        logger.info("pushed %s to %s", folder, done.url)


def _not_pushed(folder: Path, repo_id: str, error: ValueError) -> str:
    command = shlex.join(["evatok", "push", str(folder), repo_id])
    return f"{folder} is complete, but {' '.join(str(error).split())} To push it: {command}"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
