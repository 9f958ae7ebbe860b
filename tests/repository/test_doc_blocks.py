"""All Python code in markdown files runs: the blocks of a page one after another, in a folder with real videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import Environment, StrictUndefined
from markdown_pages import ROOT, blocks, pages
from typer.testing import CliRunner

import evatok_hf
from evatok_hf.cli.commands import app
from evatok_hf.video import open_video, write_video

DATA_CARDS = [page for page in pages() if page.endswith(("/dataset_curated.md", "/dataset_tokens.md"))]
# Pages whose blocks need more than videos, and who runs them. All others are run here, new ones too.
ELSEWHERE = {
    "docs/bulk.md": "tests/repository/test_doc_blocks.py",
    "docs/hub.md": "tests/hub/hub_cases.py",
    "docs/serving.md": "tests/export/test_serving_doc.py",
    **dict.fromkeys(DATA_CARDS, "tests/hub/test_hub_datasets.py"),
    "model_cards/generator.md": "tests/repository/test_doc_blocks.py",
    "model_cards/router.md": "tests/repository/test_doc_blocks.py",
    "model_cards/tokenizer.md": "tests/repository/test_doc_blocks.py",
}
PAGES = [page for page in pages() if blocks(page, "python")]
TINY = Path(evatok_hf.bundled_checkpoints()["evatok-tiny"])


def run(codes: list[tuple[str, int]], name: str) -> None:
    names: dict = {"__name__": "__main__"}
    for text, line in codes:
        exec(compile("\n" * (line - 1) + text, name, "exec"), names)  # a traceback names page and line


@pytest.fixture(scope="module")
def videos(tmp_path_factory, sample_clip) -> Path:
    """`video.mp4` with 50 frames of the sample clip, and two shorter ones in `videos`."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "videos").mkdir()
    with open_video(sample_clip) as video:
        frames = video.read(range(50))
    for name, part in (("video", frames), ("videos/a", frames[:30]), ("videos/b", frames[30:])):
        write_video(folder / f"{name}.mp4", part, 25)
    return folder


@pytest.fixture
def here(videos, tmp_path, monkeypatch) -> Path:
    """The folder in which a page runs, without a Hub."""
    for path in videos.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_blocks_of_a_page_run(page, here):
    run([(block.text, block.line) for block in blocks(page, "python")], page)


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_other_pages_are_run_elsewhere(page, test):
    assert page in PAGES, f"{page} has no Python any more; take it from the list"
    assert Path(page).name in (ROOT / test).read_text(), f"{test} does not read {page}"


def test_tokens_of_many_videos_decode(here):
    done = CliRunner().invoke(app, ["tokenize-dataset", "videos", "tokens", "--whole-video"])
    assert done.exit_code == 0, done.output
    run([(block.text, block.line) for block in blocks("docs/bulk.md", "python")], "docs/bulk.md")


# --- templates of cards -----------------------------------------------------------------------------------------------


def rendered(folder: Path, load_name: str, **changes) -> str:
    """The code in the card of a part of a checkpoint, by its template."""
    (block,) = blocks(f"model_cards/{folder.name}.md", "python")
    training = json.loads((folder / "training.json").read_text())
    training["arguments"] |= changes
    config = json.loads((folder / "config.json").read_text())
    template = Environment(undefined=StrictUndefined).from_string(block.text)
    return template.render(config=config, training=training, load_name=load_name).rstrip("\n")


@pytest.mark.parametrize("name", evatok_hf.bundled_checkpoints())
def test_bundled_cards_have_the_code_of_their_templates(name):
    for card in Path(evatok_hf.bundled_checkpoints()[name]).glob("*/README.md"):
        (block,) = blocks(str(card.relative_to(ROOT)), "python")
        assert rendered(card.parent, load_name=name) == block.text.rstrip("\n")


def test_the_card_of_a_tokenizer_without_router(here):
    code = rendered(TINY / "tokenizer", load_name=str(TINY), assignment="random")
    assert "lengths=[64, 32, 16, 8]" in code and str(TINY) in code
    run([(code, 1)], "model_cards/tokenizer.md")
