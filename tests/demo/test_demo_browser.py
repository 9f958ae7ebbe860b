"""The demo in a real browser: every tab, two visitors at once, odd uploads, the keyboard, both widths, dark and light.

`pytest -s` also prints how long the answers took, and leaves screenshots in out/screenshots.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from browser_demo import ROOT, running_browser, running_server, visiting, wait_until
from odd_uploads import EXPECTED, make_odd_uploads

from evatok_hf import EvatokPipeline, VideoTokenizer, VideoTokens
from evatok_hf.models.pipeline_evatok import to_uint8
from evatok_hf.video import open_video, read_video, write_video

SCREENSHOTS = ROOT / "out" / "screenshots"


@pytest.fixture(scope="module")
def browser():
    with running_browser() as found:
        yield found


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def clips(sample_clip, tmp_path_factory) -> list[Path]:
    """Two different parts of the sample clip: 40 and 24 frames of 640 x 272."""
    folder = tmp_path_factory.mktemp("clips")
    with open_video(sample_clip) as video:
        for name, first, last in (("early", 0, 40), ("late", 200, 224)):
            write_video(folder / f"{name}.mp4", video.read(range(first, last)), video.fps)
    return [folder / "early.mp4", folder / "late.mp4"]


@pytest.fixture(scope="module")
def tokenizer():
    return VideoTokenizer.from_pretrained()


@pytest.fixture(scope="module")
def pipe():
    pipeline = EvatokPipeline.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def download(visitor, locator, path: Path) -> Path:
    with visitor.page.expect_download() as waiting:
        locator.click()
    waiting.value.save_as(path)
    return path


def shown_psnr(summary: str) -> str:
    """Of the row "Adaptive"."""
    return next(line for line in summary.splitlines() if line.startswith("Adaptive\t")).split("\t")[2]


def same_tokens(a: VideoTokens, b: VideoTokens) -> bool:
    fields = ("fps", "num_frames", "height", "width", "checkpoint", "fingerprint")
    alike = all(getattr(a, name) == getattr(b, name) for name in fields)
    return alike and torch.equal(a.ids, b.ids) and torch.equal(a.lengths, b.lengths)


def told(what: str, started: float) -> None:
    print(f"\n[demo] {what}: {time.perf_counter() - started:.1f} s")


# --- what the tabs do -------------------------------------------------------------------------------------------------


def test_reconstruct_shows_the_numbers_of_the_python_api(browser, server, clips, tokenizer, tmp_path):
    expected = list(tokenizer.reconstruct(clips[0], quality=1.2))
    count = sum(sum(clip.lengths) for clip in expected)
    with visiting(browser, server.url) as visitor:
        visitor.upload(clips[0])
        started = time.perf_counter()
        visitor.press("Reconstruct")
        summary = visitor.headline(f"{count:,} tokens for 40 frames of early.mp4")
        told("reconstruct, 40 frames", started)
        assert shown_psnr(summary) == f"{sum(clip.psnr for clip in expected) / len(expected):.2f} dB"
        fixed = 4 * tokenizer.model.config.block_lengths[3] * len(expected)
        assert f"{1 - count / fixed:.0%} fewer than a fixed length" in summary
        assert "not at equal quality" in summary

        tokens = download(visitor, visitor.panel.locator('a[download="early.safetensors"]'), tmp_path / "t")
        assert same_tokens(VideoTokens.load(tokens), tokenizer.encode(clips[0], quality=1.2))
        assert sum(len(frames) for frames in tokenizer.decode(VideoTokens.load(tokens))) == 40

        player = visitor.panel.locator("video").nth(1)  # the first shows the upload
        visitor.page.wait_for_function("video => video.readyState >= 2 && !video.error", arg=player.element_handle())
        video = visitor.page.request.get(player.get_attribute("src"))
        (tmp_path / "both.mp4").write_bytes(video.body())
        frames, fps = read_video(tmp_path / "both.mp4")
        assert len(frames) == 40 and fps == 25 and frames.shape[2] >= 2 * 256
        assert visitor.panel.get_by_alt_text("bar of the tokens of each block").is_visible()


def test_a_budget_is_kept_and_the_fixed_length_measured(browser, server, clips, tokenizer):
    shortest, *_, length, _ = tokenizer.model.config.block_lengths
    least = 2 * 4 * shortest  # of two clips of four blocks
    budget = 3 * least
    expected = tokenizer.encode(clips[1], budget=budget)
    fixed = list(tokenizer.reconstruct(clips[1], length))
    with visiting(browser, server.url) as visitor:
        visitor.upload(clips[1])
        visitor.panel.get_by_label("Token budget", exact=True).check()
        visitor.panel.get_by_role("spinbutton", name="Token budget").fill(str(budget))
        visitor.panel.get_by_label("Measure the fixed length, too").check()
        visitor.press("Reconstruct")
        summary = visitor.headline(f"{expected.ids.numel():,} tokens for 24 frames")
        assert expected.ids.numel() <= budget
        row = next(line for line in summary.splitlines() if line.startswith("Fixed length\t"))
        assert row.split("\t")[1:3] == [
            f"{2 * 4 * length:,}",
            f"{sum(clip.psnr for clip in fixed) / len(fixed):.2f} dB",
        ]
        visitor.panel.get_by_role("spinbutton", name="Token budget").fill("3")
        visitor.press("Reconstruct")
        assert visitor.alert(str(least))


def test_generate_draws_what_the_pipeline_draws(browser, server, pipe):
    expected = pipe("deadly_corridor", 2, generator=torch.Generator().manual_seed(3))
    with visiting(browser, server.url) as visitor:
        visitor.tab("Generate")
        visitor.panel.get_by_label("Class", exact=True).click()
        visitor.page.get_by_role("option", name="deadly_corridor").click()
        visitor.panel.get_by_role("spinbutton", name="Number of clips").fill("2")
        visitor.panel.get_by_label("Seed", exact=True).fill("3")
        started = time.perf_counter()
        visitor.press("Generate")
        visitor.page.get_by_text("Drawing tokens").first.wait_for()  # so that one sees that something happens
        summary = visitor.headline("a clip on average")
        told("generate, 2 clips", started)
        for row in expected.tokens.lengths.tolist():
            assert f"{' + '.join(map(str, row))}\t{sum(row)}" in summary
        assert visitor.panel.get_by_alt_text("frames of each generated clip").is_visible()


def test_continue_marks_known_frames_and_compares_with_the_truth(browser, server, clips, pipe, tmp_path):
    frames = torch.cat(
        [
            pipe.processor.postprocess(clip.pixel_values_videos[:, : clip.num_frames])[0]
            for clip in VideoTokenizer.from_pipe(pipe).clips(clips[0], pipe.fps)
        ]
    ).numpy()
    result = pipe.predict(frames[:5], 16, generator=torch.Generator().manual_seed(7))
    predicted = to_uint8(result.frames[0])
    with visiting(browser, server.url) as visitor:
        visitor.tab("Continue")
        visitor.upload(clips[0])
        visitor.panel.get_by_label("Seed", exact=True).fill("7")
        started = time.perf_counter()
        visitor.press("Continue")
        summary = visitor.headline("11 frames predicted from 5 known")
        told("continue, 11 frames", started)
        assert f"{result.tokens.ids.numel()} tokens" in summary
        mse = ((frames[5].astype(float) - predicted[5]) ** 2).mean()
        assert f"6\t{10 * torch.tensor(255**2 / mse).log10():.2f} dB" in summary
        player = visitor.panel.locator("video").nth(1)
        (tmp_path / "c.mp4").write_bytes(visitor.page.request.get(player.get_attribute("src")).body())
        video, _ = read_video(tmp_path / "c.mp4")
        assert len(video) == 16
        border = video[:, 160, 276:280].mean(1)  # of the right half: grey while frames are known, then blue
        assert (abs(border[:5, 2] - border[:5, 0]) < 60).all() and (border[5:, 2] - border[5:, 0] > 100).all()

        visitor.panel.get_by_label("After its end").check()
        visitor.panel.get_by_role("spinbutton", name="Frames to predict").fill("4")
        visitor.press("Continue")
        assert "nothing to compare with" in visitor.headline("4 frames predicted from 5 known")


def test_programs_may_ask_the_same_within_the_same_bounds(server, clips, tokenizer):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False)
    result = client.predict(handle_file(clips[1]), "Quality", 0.8, api_name="/reconstruct")
    expected = tokenizer.encode(clips[1], quality=0.8)
    assert result[-1]["tokens"] == expected.ids.numel() and same_tokens(VideoTokens.load(result[3]), expected)
    for options in ({"count": 1000}, {"temperature": 50}, {"class_name": "nothing"}, {"seed": -1}):
        with pytest.raises(Exception, match="than|choices"):
            client.predict(**options, api_name="/generate")


# --- several visitors -------------------------------------------------------------------------------------------------


def test_two_visitors_at_once_get_their_own_results(browser, server, clips, tokenizer):
    tokens = [tokenizer.encode(clip).ids.numel() for clip in clips]
    with visiting(browser, server.url) as one, visiting(browser, server.url) as other:
        for visitor, clip in ((one, clips[0]), (other, clips[1])):
            visitor.upload(clip)
        for visitor in (one, other):
            visitor.press("Reconstruct")
        summaries = [
            visitor.headline(f"{count:,} tokens for {frames} frames of {clip.name}")
            for visitor, count, frames, clip in zip((one, other), tokens, (40, 24), clips, strict=True)
        ]
        assert "late.mp4" not in summaries[0] and "early.mp4" not in summaries[1]
        files = [{url for url in v.requests if "/file=" in url and "svg" not in url} for v in (one, other)]
        assert files[0] and files[1] and not files[0] & files[1]
        assert all(len(Path(url).parent.name) >= 32 for url in files[0] | files[1])  # nobody guesses that
        assert "early" not in other.page.content() and "late.mp4" not in one.page.content()
        for path in ("/etc/passwd", str(ROOT / "setup.py"), "..", "server.log"):
            assert other.page.request.get(f"{server.url}gradio_api/file={path}").status in (403, 404)


@pytest.mark.slow
def test_odd_uploads_get_a_message_and_the_next_visitor_an_answer(browser, server, clips, tmp_path):
    files = make_odd_uploads(tmp_path, clips[1])

    def ordinary(visitor) -> None:
        visitor.upload(clips[0])
        visitor.press("Reconstruct")
        visitor.headline("tokens for 40 frames of early.mp4")

    with visiting(browser, server.url) as visitor:
        ordinary(visitor)  # what a model needs when it first runs stays with the server
        before = server.memory()
        for name, words in EXPECTED.items():
            refused = words in ("size", "file type")  # on the way already
            visitor.upload(files[name], arrives=not refused)
            if refused:
                visitor.alert(words)
                continue
            visitor.press("Reconstruct")
            if words is None:
                visitor.headline(f"of {name}")
            elif words:
                message = visitor.alert(words)
                assert message.startswith(f"{name}: ") and "/tmp" not in message
            else:
                result = visitor.panel.locator(".block.summary .headline").filter(has_text=name)
                result.or_(visitor.page.get_by_test_id("toast-text").filter(has_text=name)).first.wait_for()
            visitor.close_alerts()  # that the browser cannot play a file is said, too
        visitor.errors.clear()  # of uploads that were refused
    with visiting(browser, server.url) as visitor:
        ordinary(visitor)
    assert wait_until(lambda: server.memory() <= 1.1 * before), (before, server.memory())
    assert server.process.children(recursive=True) == []


# --- how it is used and looks -----------------------------------------------------------------------------------------

UNNAMED = """() => [...document.querySelectorAll('input, select, textarea, button, video, img, [role=tab]')]
    .filter(element => element.checkVisibility({visibilityProperty: true}) || element.type === 'file')
    .filter(element => {
        const by = (element.getAttribute('aria-labelledby') || '').split(' ').map(id => document.getElementById(id));
        const labels = [...(element.labels || [])].concat(by.filter(Boolean));
        const name = element.getAttribute('aria-label') || element.getAttribute('alt') || element.title
            || labels.map(label => label.textContent).join('') || element.textContent;
        return !name.trim();
    }).map(element => element.outerHTML.slice(0, 200))"""


def test_everything_has_a_name_and_the_keyboard_is_enough(browser, server, tokenizer):
    with visiting(browser, server.url) as visitor:
        page = visitor.page
        for name in ("Reconstruct", "Generate", "Continue", "About"):
            visitor.tab(name)
            page.wait_for_timeout(300)
            assert page.evaluate(UNNAMED) == [], name
        visitor.tab("Reconstruct")
        page.get_by_role("tab", name="Reconstruct").focus()
        order = []
        for _ in range(30):
            page.keyboard.press("Tab")
            order.append(
                page.evaluate("() => document.activeElement.textContent.trim() || document.activeElement.type")
            )
            if "frozen" in order[-1]:
                break
        places = [next(i for i, seen in enumerate(order) if word in seen) for word in ("radio", "range", "Reconstruct")]
        assert places == sorted(places), order
        assert "frozen" in order[-1], order
        page.keyboard.press("Enter")
        started = time.perf_counter()
        summary = visitor.headline("for 48 frames of frozen.mp4")
        told("example", started)
        tokens = int(summary.split(" tokens")[0].replace(",", ""))
        assert tokens < 3 * 4 * tokenizer.model.config.block_lengths[3] / 2  # a video that stands still needs few


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["1280-light", "390-dark"])
def test_it_fits_the_screen(browser, server, width, dark):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with visiting(browser, server.url, width, 844 if width == 390 else 900, dark) as visitor:
        page = visitor.page
        for name in ("Reconstruct", "Generate", "Continue", "About"):
            visitor.tab(name)
            if name == "Reconstruct":
                visitor.panel.get_by_text("The same street, frozen").click()
                visitor.headline("of frozen.mp4")
            page.wait_for_timeout(1000)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width, name
            if name == "Reconstruct":  # a picture that is wider than the screen begins at its left
                frame = visitor.panel.locator(".picture .image-frame")
                left, inner = frame.bounding_box()["x"], frame.locator("img").bounding_box()["x"]
                assert inner >= left
            file = f"{name.lower()}-{width}-{'dark' if dark else 'light'}.png"
            page.screenshot(path=SCREENSHOTS / file, full_page=True)
