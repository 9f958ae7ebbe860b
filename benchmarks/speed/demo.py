"""Times of the slowest answers of the demo: the largest video that it reads, and the most that each tab draws.

    python benchmarks/speed/demo.py [--output demo.json]

Prints a table of seconds by the clock and of the processor, from the upload to the files that are shown, without the
browser; the demo itself prints nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options
from benchmarks.common.clips import SAMPLE
from evatok_hf import VideoTokenizer
from evatok_hf.demo import jobs, results
from evatok_hf.demo.limits import Limits
from evatok_hf.demo.uploads import UploadedVideo
from evatok_hf.pictures.clips import enlarge
from evatok_hf.video import VideoWriter, read_video
from training.common.result_pages import markdown


def measure(args: Options) -> dict[str, Any]:
    pipe, tokenizer, limits = jobs.load(), jobs.tokenizer(), Limits()
    step = pipe.tokenizer.config.num_frames - pipe.generator.config.known_frames
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        large = largest_video(folder / "large.mp4", limits)

        def reconstruct(measure_fixed: bool) -> None:
            with UploadedVideo(large, limits) as upload:
                video = tokenizer.prepare(upload)
            done = jobs.reconstruct(video, 1.2, None, measure_fixed, progress=unheard)
            results.reconstruction(folder, done, large.name, {"quality": 1.2})

        def generate() -> None:
            samples = jobs.generate(pipe.classes[0], 8, 0, 1.25, 1.0, progress=unheard)
            results.generation(folder, samples, {"seed": 0}, pipe.fps, 0.0)

        def predict() -> None:
            with UploadedVideo(large, limits) as upload:
                video = VideoTokenizer.from_pipe(pipe).prepare(upload, pipe.fps)
            frames = jobs.frames_of(video)
            done = jobs.predict(frames, False, 4 * step, None, 0, 1.0, 1.0, progress=unheard)
            results.continuation(folder, done, None, {"seed": 0, "fps": pipe.fps}, 0.0)

        rows = {
            f"reconstruct {limits.frames} frames": timed(lambda: reconstruct(False)),
            "the same, and the fixed length": timed(lambda: reconstruct(True)),
            "generate 8 clips": timed(generate),
            f"continue by {4 * step} frames": timed(predict),
        }
    return {"device": pipe.tokenizer.device.type, "rows": rows}


def show(report: dict[str, Any]) -> str:
    rows = [[name, f"{row['seconds']:.1f}", f"{row['processor']:.1f}"] for name, row in report["rows"].items()]
    return markdown([f"on {report['device']}", "seconds", "of the processor"], rows)


def largest_video(path: Path, limits: Limits) -> Path:
    """The sample clip, forth and back, as long as it may be, near the most pixels that it may have."""
    frames, _ = read_video(SAMPLE / "bikes.mp4")
    both = [*frames, *frames[::-1]][: limits.frames]
    scale = int((limits.megapixels * 10**6 / limits.frames / frames[0][..., 0].size) ** 0.5)
    height, width = (scale * side for side in frames.shape[1:3])
    with VideoWriter(path, limits.frames / limits.seconds, height, width) as out:
        for frame in both:
            out.write(enlarge(frame[None], height, width))
    return path


def timed(action) -> dict[str, float]:
    """Seconds, and those of the processor that this process and those that it waited for have used."""
    started, used = time.perf_counter(), sum(os.times()[:4])
    action()
    return {"seconds": time.perf_counter() - started, "processor": sum(os.times()[:4]) - used}


def unheard(done: float, what: str) -> None:
    """A progress that nobody looks at."""


main = Benchmark(Options, measure, show)

if __name__ == "__main__":
    main.run()
