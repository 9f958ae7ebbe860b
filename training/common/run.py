"""`Run`, the frame of a training loop around accelerate: what the four trainers do alike around their own steps."""

from __future__ import annotations

import functools
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from evatok_hf.data.streaming import ClipStream
from evatok_hf.models.files_evatok import replacing_folder
from training.common.arguments import check_launch, describe_machine, parse_arguments, without_plans
from training.common.averaging import AveragedWeights, averaged_copy
from training.common.checkpoints import Progress, load_checkpoint, refuse_used, save_checkpoint
from training.common.draws import Draws
from training.common.flops import matmul_peak
from training.common.hub_push import HubArguments, HubPush
from training.common.options import RunOptions
from training.common.reporting import peak_memory_gib
from training.common.sharding import check_sharding, forget_whole, whole

_Options = TypeVar("_Options", bound=RunOptions)
Export = Callable[[PreTrainedModel, Path], None]
# Of --minutes: the share that is kept for the last validation and the result, and seconds between checkpoints.
_KEPT, _SAVE_SECONDS = 0.1, 120.0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_measured = functools.cache(matmul_peak)


def time_left(minutes: float) -> float:
    """Seconds for steps that a process of so many minutes still has, from its start to its written result."""
    return max(1.0, 60 * minutes * (1 - _KEPT) - (time.time() - psutil.Process().create_time()))


class Run(Generic[_Options]):
    """A run from its command line to what it leaves under --output_dir.

    A trainer makes it first of all, then what it trains, and calls `average` (unless there are no averaged weights),
    `begin`, in each of its `steps` the methods that follow, and `finish`.

    Args:
        kind: dataclass of the trainer's options.
        result: what is trained: the script is `train_RESULT.py`, and the folder of the end `RESULT/`.
        description: of the script, for --help.
        argv: the command line without the script.
        shards: whether the trainer works under FSDP.

    Attributes:
        facts: the options as a dictionary.
        place: where the schedules are, from 0 to --steps: the steps so far, or with --minutes the time.

    Raises:
        SystemExit: options that are wrong.
        ValueError: a launch that does not train together, a folder that holds another run, a Hub that refuses.
    """

    def __init__(
        self, kind: type[_Options], result: str, description: str, argv: Sequence[str] | None, shards: bool = False
    ):
        self.args, self.facts = parse_arguments(kind, description, argv)
        self.result, args = result, self.args
        self.command = shlex.join([f"training/train_{result}.py", *(sys.argv[1:] if argv is None else argv)])
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
        self.logger = logging.getLogger(f"train_{result}")
        self.logger.setLevel(logging.INFO)
        self.output_dir = Path(args.output_dir)
        self.log_path = self.output_dir / "log.jsonl"
        without_plans()
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.tracker == "none" else args.tracker,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "trackers")),
            cpu=args.cpu,
        )
        check_launch(self.accelerator, shards)
        if shards:
            check_sharding(self.accelerator, args)
        set_seed(args.seed)
        if args.resume is None:
            refuse_used(self.output_dir)
        pushes = isinstance(args, HubArguments)
        self.hub = HubPush(args, self.output_dir, self.accelerator.is_main_process) if pushes else None
        self.draws = Draws(args.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.progress = Progress(step=0, seconds=0.0)
        self.place = 0
        self.averages: AveragedWeights | None = None
        self._watched: list[tuple[str, int, torch.Tensor]] = []
        self._waited = 0.0

    # --- before the first step ---

    def average(self, network: nn.Module) -> AveragedWeights:
        """Averages of a network's weights from now on, which validations and the result have."""
        self._averaged = network
        self.averages = AveragedWeights(network.parameters(), self.args.ema_decay)
        return self.averages

    def begin(self, *states: Any, stream: ClipStream | None = None) -> None:
        """Resumes where that is asked for, and starts the clock.

        Args:
            states: what checkpoints hold beside what the accelerator prepared, always in the same order.
            stream: whose state they hold too.

        Raises:
            ValueError: as `load_checkpoint`.
        """
        args, self.stream = self.args, stream
        self.output_dir.mkdir(parents=True, exist_ok=True)
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "cpu" else _DTYPES.get(args.mixed_precision, torch.float32)
        self._peak = self.accelerator.num_processes * _measured(device, dtype, 0.3)
        self.accelerator.register_for_checkpointing(*states)
        if args.resume:
            path = load_checkpoint(self.accelerator, self.output_dir, args.resume, self.progress, stream)
            self.logger.info("resumed from %s at step %d", path, self.progress.step)
        if args.tracker != "none":
            self.accelerator.init_trackers(
                f"evatok_{self.result}", config={name: str(value) for name, value in self.facts.items()}
            )
        self.bar = tqdm(
            total=args.steps, initial=self.progress.step, disable=not self.accelerator.is_main_process, unit="step"
        )
        self._last_look = time.monotonic()
        self._started = self._last_look - self.progress.seconds
        self._time, self._saved = float("inf"), self.progress.seconds
        if args.minutes is not None:
            self._time = self.progress.seconds + time_left(args.minutes)
        self._move()

    # --- steps ---

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to come, each of which ends with `stepped`."""
        while not self.is_last:
            yield self.progress.step

    def watch(self, value: torch.Tensor, what: str) -> None:
        """Has a figure of this step looked at with the next log line, validation or checkpoint, so that none waits."""
        self._watched.append((what, self.progress.step, value.detach()))

    def check(self) -> None:
        """Raises ValueError where something watched is no number: nothing is saved after a step that went wrong."""
        for what, step, value in self._watched:
            if not math.isfinite(value := float(value)):
                raise ValueError(
                    f"the {what} became {value} at step {step}; the last checkpoint is kept. Lower --learning_rate and "
                    "use --resume latest."
                )
        self._watched.clear()

    def take_step(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        what: str = "loss",
    ) -> None:
        """Watches a loss under the name `what`, and goes backward; clips the gradients, steps, and forgets them."""
        self.watch(loss, what)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = whole(self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm))
            if self.accelerator.scaler is None:  # with fp16 it skips such steps by itself
                self.watch(norm, "gradient")
        optimizer.step()
        optimizer.zero_grad()

    def stepped(self) -> None:
        """Counts a step whose weights are updated."""
        if self.averages is not None:
            self.averages.step(self._averaged.parameters())
        self.progress.step += 1
        self.progress.seconds = time.monotonic() - self._started
        if self.args.minutes is not None and self.accelerator.num_processes > 1:  # they must agree on the time
            self.progress.seconds = broadcast_object_list([self.progress.seconds])[0]
        self._move()

    def _move(self) -> None:
        steps = self.args.steps
        if self.args.minutes is None:
            self.place = self.progress.step
        else:
            self.place = min(steps, int(steps * self.progress.seconds / self._time))
        self.bar.update(self.place - self.bar.n)

    @property
    def is_last(self) -> bool:
        return self.place >= self.args.steps

    def due(self, every: int) -> bool:
        """True after every so many steps, and after the last."""
        return self.is_last or self.progress.step % every == 0

    def log_due(self) -> bool:
        """True for a step that has a log line. Raises ValueError as `check`."""
        if self.progress.step % self.args.log_every:
            return False
        self.check()
        return True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the step waits for its data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def speed(self, what: str, amount: float, flops: float | None = None) -> dict[str, float]:
        """Figures of a log line, of the time since the last one without that of validations.

        Args:
            what: the name of `amount` a second.
            amount: of what was done, in all processes.
            flops: operations of one of it; over those of a matrix product, measured at the start, they are "mfu".
        """
        now = time.monotonic()
        seconds, waited = now - self._last_look, self._waited
        self._last_look, self._waited = now, 0.0
        used = {} if flops is None else {"mfu": flops * amount / seconds / self._peak}
        return {what: amount / seconds, **used, "data_wait": waited / seconds, "seconds": self.progress.seconds}

    def mean(self, values: Mapping[str, float], reduction: str = "mean") -> dict[str, float]:
        """The mean of each value over all processes, which must give the same names; or the "sum"."""
        table = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(table, reduction).tolist(), strict=True))

    def log(self, record: Mapping[str, float], shown: Mapping[str, str] | None = None) -> None:
        """Adds a line of this step to the log and to the trackers.

        Args:
            record: figures by name.
            shown: of these the ones beside the progress bar, by their names there.
        """
        if self.accelerator.is_main_process:
            with self.log_path.open("a") as file:
                file.write(json.dumps({"step": self.progress.step, **record}) + "\n")
        self.accelerator.log(record, step=self.progress.step)
        if shown:
            self.bar.set_postfix({name: f"{record[key]:.4g}" for name, key in shown.items()})

    def tell(self, record: Mapping[str, float], style: str = ".4g") -> None:
        """Writes figures of a validation above the progress bar."""
        figures = ", ".join(f"{name} {value:{style}}" for name, value in record.items())
        self.bar.write(f"step {self.progress.step}: {figures}")

    @contextmanager
    def validating(self, model: nn.Module) -> Iterator[None]:
        """The averaged network has its averaged weights inside, and `model`, of which it is a part, is evaluated."""
        self.check()
        began = time.monotonic()
        model.eval()
        with self.averages.in_place(self._averaged.parameters()):
            yield
            forget_whole(model)
        model.train()
        self._last_look += time.monotonic() - began

    # --- checkpoints and results ---

    def save(self, network: PreTrainedModel | None = None, export: Export | None = None) -> None:
        """Writes a checkpoint where one is due, and pushes the model of this step where the run does that.

        Args:
            network: the model, without what is trained beside it.
            export: writes a model, which it is given, into a folder with `exporting`.
        """
        if self.args.minutes is not None:
            if not self.is_last and self.progress.seconds < self._saved + _SAVE_SECONDS:
                return
            self._saved = self.progress.seconds
        elif not self.due(self.args.save_every):
            return
        self.check()
        keep = self.args.keep_checkpoints
        saved = save_checkpoint(self.accelerator, self.output_dir, self.progress.step, keep, self.stream)
        if self.hub is not None and self.hub.saves and not self.is_last:
            averaged = averaged_copy(network, self.averages)  # by all processes together
            if self.hub.takes_save():
                export(averaged, self.hub.folder)
                self.hub.save(self.hub.folder / self.result, self.progress.step, saved)

    @contextmanager
    def exporting(self, model: PreTrainedModel, folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
        """Writes a model for `from_pretrained`, with how it came to be in `training.json`; more can be added inside.

        Args:
            model: with averaged weights.
            folder: in which the folder RESULT is written.
            facts: what `training.json` says beside what it says of every run.
        """
        with replacing_folder(folder / self.result) as temporary:
            dtype = getattr(torch, getattr(self.args, "export_dtype", "float32"))
            model.to(dtype).save_pretrained(temporary)
            summary = {
                "command": self.command,
                "seed": self.args.seed,
                "steps": self.progress.step,
                "seconds": round(self.progress.seconds),
                "parameters": model.num_parameters(),
                "machine": describe_machine(self.accelerator),
                "peak_memory_gib": round(peak_memory_gib(self.accelerator.device), 2),
                "torch": torch.__version__,
                **({} if self.stream is None else {"skipped_videos": dict(self.stream.skipped)}),
                **facts,
                "arguments": self.facts,
            }
            (temporary / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
            yield temporary

    def finish(self, network: PreTrainedModel, export: Export) -> Path:
        """Writes the result, with averaged weights, and pushes it -> its folder. Arguments as of `save`."""
        self.bar.close()
        if self.stream is not None and self.stream.skipped:
            self.logger.warning("skipped videos, by cause: %s", dict(self.stream.skipped))
        self.accelerator.wait_for_everyone()
        if self.averages is not None and (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            network = averaged_copy(network, self.averages)
        folder = self.output_dir / self.result
        if self.accelerator.is_main_process:
            export(network, self.output_dir)
            most = peak_memory_gib(self.accelerator.device)
            self.logger.info("wrote %s; peak memory %.2f GiB a process", folder, most)
        self.accelerator.end_training()
        if self.hub is not None:
            self.hub.finish(folder, self.output_dir / f"checkpoint-{self.progress.step}")
        return folder
