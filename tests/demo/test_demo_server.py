"""The demo between its visitors and its page: which names it answers, what it takes, what it keeps, when it stops."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
from browser_demo import running_server, wait_until
from starlette.responses import StreamingResponse
from test_cli import refused, run
from video_samples import encode, moving_frames

from evatok_hf import VideoTokens
from evatok_hf.demo import handlers, jobs, silence
from evatok_hf.demo.handlers import Gone, spoken
from evatok_hf.demo.hosts import HostGuard, answered_names
from evatok_hf.demo.limits import Limits
from evatok_hf.demo.store import Store
from evatok_hf.demo.uploads import UploadedVideo

gr = pytest.importorskip("gradio", reason='gradio is not installed: pip install "evatok_hf[demo]"')


SHARED = "import gradio.networking as n; n.setup_tunnel = lambda *args, **more: 'https://abc.gradio.live'"


async def answering(scope, receive, send) -> None:
    """An app that answers everything."""
    await StreamingResponse(iter(["fine"]))(scope, receive, send)


def ask(names: set[str], host: str, origin: str | None = None) -> httpx.Response:
    async def asking() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(HostGuard(answering, names))) as client:
            headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
            return await client.get("http://10.1.2.3:7860/config", headers=headers)

    return asyncio.run(asking())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        ("localhost:7860", None, True),
        ("LOCALHOST.", None, True),
        ("127.0.0.1:7860", "http://localhost:7860", True),
        ("127.1.2.3", None, True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("10.1.2.3:7860", "http://10.1.2.3:7860", True),  # where the connection arrived
        ("demo.example.org", "https://demo.example.org", True),
        ("me-evatok.hf.space", "https://me-evatok.hf.space", True),
        ("evatok.example.com", None, True),
        ("evil.example:7860", None, False),
        ("evil.example:7860", "http://evil.example:7860", False),
        ("localhost.evil.example", None, False),
        ("demo.example.org.evil.example", None, False),
        ("8.8.8.8", None, False),
        ("localhost@evil.example", None, False),
        ("evil.example/localhost", None, False),
        ("localhost:port", None, False),
        ("", None, False),
        ("localhost:7860", "http://evil.example", False),
        ("10.1.2.3:7860", "http://10.9.9.9", False),
        ("localhost:7860", "null", False),
        ("localhost:7860", "file://localhost", False),
    ],
)
def test_only_names_on_the_list_are_answered(host, origin, answered, monkeypatch):
    monkeypatch.setenv("SPACE_HOST", "me-evatok.hf.space,evatok.example.com")
    answer = ask(answered_names(["Demo.example.org"]), host, origin)
    assert answer.status_code == (200 if answered else 403)
    if not answered:
        assert answer.text.startswith("This demo does not answer ") and answer.text.count("\n") == 1


@pytest.mark.parametrize("name", ["http://demo.example.org", "demo.example.org:80", "a b/c", "", "[::1]:80"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="without http:// and port"):
        answered_names([name])


def test_the_command_refuses_a_name_that_is_none():
    assert "without http:// and port" in refused(run("demo", "--allow-host", "http://x"))


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    with running_server(folder, "--share", "--allow-host", "demo.example.org", before=SHARED) as started:
        yield started


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=300) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_frames(16))


def upload(client: httpx.Client, *contents: bytes) -> httpx.Response:
    files = [("files", (f"clip{place}.mp4", content)) for place, content in enumerate(contents)]
    return client.post("gradio_api/upload", files=files)


def begin(client: httpx.Client, name: str, *data: object) -> str:
    """The address of the results of a job."""
    answer = client.post(f"gradio_api/call/{name}", json={"data": data})
    return f"gradio_api/call/{name}/{answer.raise_for_status().json()['event_id']}"


def stored(folder: Path) -> list[str]:
    (own,) = folder.glob("evatok_demo_*")
    return sorted(path.name for path in (own / "files").rglob("*") if path.is_file())


def test_the_server_answers_its_names_and_no_others(client):
    for name in ("localhost", "demo.example.org", "abc.gradio.live"):
        assert client.get("config", headers={"Host": name, "Origin": f"https://{name}"}).status_code == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for method, path in (("GET", ""), ("GET", "config"), ("POST", "gradio_api/upload")):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 403 and "evil.example" in answer.text, (method, path)


def test_visitors_read_no_paths_of_the_server(client, folder, clip):
    for path in ("", "config", "gradio_api/info", "gradio_api/openapi.json"):
        answer = client.get(path)
        assert answer.status_code == 200 and str(folder) not in answer.text and "/evatok_demo_" not in answer.text
    (path,) = upload(client, clip.read_bytes()).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = client.get(begin(client, "reconstruct", file, "Quality", 0.8, 1000, False)).text
    assert "event: complete" in answer and str(folder) not in path + answer
    tokens = json.loads(answer.partition("data: ")[2])[3]
    (folder / "t.safetensors").write_bytes(client.get(tokens["url"]).raise_for_status().content)
    assert VideoTokens.load(folder / "t.safetensors").num_frames == 16
    assert client.get(f"gradio_api/file={tokens['path']}").status_code == 200
    assert client.get("gradio_api/file=/evatok-demo/../../etc/passwd").status_code in (403, 404)


def test_an_upload_that_is_too_much_or_cut_leaves_nothing(client, server, folder, clip):
    before = stored(folder)
    answer = upload(client, *[clip.read_bytes()] * 6)
    assert answer.status_code == 400 and "one file" in answer.text
    head = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=B"}
    answer = client.post("gradio_api/upload", content=head + b"x" * 10**5, headers=kind)
    assert answer.status_code == 400 and "stopped on the way" in answer.text
    large = (head + b"x" * 10**6 if part == 0 else b"x" * 10**6 for part in range(102))  # its length is not told
    answer = client.post("gradio_api/upload", content=large, headers=kind)
    assert answer.status_code == 413 and "100 MB" in answer.text
    answer = client.post("gradio_api/queue/join", content=(b" " * 10**5 for _ in range(11)))
    assert answer.status_code == 413 and "1,000,000 bytes" in answer.text
    assert stored(folder) == before

    port = httpx.URL(server.url).port
    with socket.create_connection(("127.0.0.1", port)) as cut:
        lines = ["POST /gradio_api/upload HTTP/1.1", "Host: localhost", "Content-Length: 10000000"]
        lines += [f"{name}: {value}" for name, value in kind.items()]
        cut.sendall("\r\n".join([*lines, "", ""]).encode() + head + b"x" * 10**5)
        assert wait_until(lambda: len(stored(folder)) == len(before) + 1)
    assert wait_until(lambda: stored(folder) == before)
    assert "Traceback" not in (folder / "server.log").read_text()


def test_nothing_is_fetched_for_a_visitor(client, folder):
    before = stored(folder)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        address = f"http://127.0.0.1:{other.getsockname()[1]}/clip.mp4"
        file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        for data in ((file, "Quality", 0.8, 1000, False), (None, "Quality", file, 1000, False)):
            answer = client.get(begin(client, "reconstruct", *data)).text
            assert "event: error" in answer and "upload the file itself" in answer
        with pytest.raises(BlockingIOError):
            other.accept()
    assert stored(folder) == before


def test_a_job_whose_visitor_left_is_given_up(client, folder):
    long, short = ("generate", "no class", 8, 1, 1.0, 1.0), ("generate", "no class", 1, 2, 1.0, 1.0)
    for _ in range(4):
        with client.stream("GET", begin(client, *long)):
            pass
    assert "event: complete" in client.get(begin(client, *short)).text
    assert stored(folder).count("clips.mp4") <= 2  # the first may be done before its visitor is missed


@pytest.mark.slow
def test_memory_is_level_over_many_jobs(client, server, tmp_path):
    """Different sizes, lengths and tabs, four visitors at a time; all its caches are full after the first ones."""
    sizes = ((16, 48, 64), (24, 64, 64), (9, 480, 640), (33, 120, 160), (7, 64, 48))
    clips = [encode(tmp_path / f"{n}.mp4", moving_frames(*size)).read_bytes() for n, size in enumerate(sizes)]

    def job(number: int) -> None:
        (path,) = upload(client, clips[number % len(clips)]).json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        if number % 4 == 3:
            results = begin(client, "generate", "no class", 1 + number % 8 // 4, number, 1.0, 1.0)
        elif number % 4 == 2:
            results = begin(client, "continue", file, "After its first frames", 6, "no class", number, 1.0, 1.0, 0.5)
        else:
            results = begin(client, "reconstruct", file, "Quality", number % 20 / 10, 1000, number % 8 == 0)
        assert "event: complete" in client.get(results).text

    def memory_after(first: int, last: int) -> int:
        with ThreadPoolExecutor(4) as visitors:
            list(visitors.map(job, range(first, last)))
        assert wait_until(lambda: server.process.children(recursive=True) == [])
        print(f"[demo] {last} jobs: {server.memory() >> 20} MiB")
        return server.memory()

    before = memory_after(0, 20)
    assert max(memory_after(first, first + 50) for first in (20, 70, 120, 170)) <= 1.1 * before


# --- its parts --------------------------------------------------------------------------------------------------------


def test_the_oldest_files_make_room_for_new_ones(tmp_path):
    store = Store(tmp_path / "files", 1000)
    store.make_room()  # nothing is there yet

    def add(name: str, size: int, age: int) -> Path:
        path = tmp_path / "files" / name / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
        os.utime(path, (age, age))
        return path

    example = add("example", 800, 1)
    store.keep()
    old, middle, new = add("old", 400, 2), add("middle", 400, 3), add("new", 200, 4)
    store.make_room()
    assert old.exists()
    store.make_room(300)
    assert [path.exists() for path in (example, old, middle, new)] == [True, False, True, True]
    store.make_room(5000)
    assert [path.exists() for path in (example, middle, new)] == [True, False, False]


def test_who_leaves_or_never_listens_is_missed_and_who_stays_is_not(monkeypatch):
    begun, gone = [], []

    @spoken
    def wait(seconds: float, progress=gr.Progress()) -> tuple[str]:  # noqa: B008
        begun.append(seconds)
        for _ in range(int(seconds * 20)):
            try:
                progress(0, "Waiting")
            except Gone:
                gone.append(seconds)
                raise
            time.sleep(0.05)
        return ("done",)

    with gr.Blocks() as app:
        gr.Button().click(wait, gr.Number(), gr.Textbox(), api_name="wait", concurrency_limit=4)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            stays, leaves = begin(client, "wait", 2.0), begin(client, "wait", 600.0)
            with client.stream("GET", leaves):
                assert wait_until(lambda: len(begun) == 2)
            assert "event: complete" in client.get(stays).text
            assert wait_until(lambda: gone == [600.0])
            monkeypatch.setattr(handlers, "_PATIENCE", 0.5)
            begin(client, "wait", 300.0)
            assert "event: complete" in client.get(begin(client, "wait", 2.0)).text
            assert wait_until(lambda: gone == [600.0, 300.0])
    finally:
        app.close(verbose=False)
    assert wait(0.1) == ("done",)  # a program of our own


def test_a_job_and_a_reader_end_where_they_are_told_so(clip):
    heard = []

    def leave(*words: object) -> None:
        heard.append(words)
        if len(heard) == 3:
            raise Gone

    jobs.load(None, "cpu")
    with pytest.raises(Gone):
        jobs.generate("basic", 1, 0, 1.0, 1.0, progress=leave)
    assert len(heard) == 3
    heard.clear()
    with pytest.raises(Gone), UploadedVideo(clip, Limits(), leave) as video:
        jobs.tokenizer().prepare(video)
    assert len(heard) == 3


def test_connections_that_say_nothing_are_closed(monkeypatch):
    monkeypatch.setattr(silence, "_PATIENCE", 0.3)
    monkeypatch.setattr(silence, "_EVERY", 0.05)
    config = uvicorn.Config(answering, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)

    class App:
        def get_blocks(self):
            return type("Blocks", (), {"server": server})

    async def serve() -> None:
        async with silence.closing_silent_connections(App()):
            await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        for said in (b"", b"GET / HTTP/1.1\r\nHost: lo", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(said)
                answer = b"".join(iter(lambda: connection.recv(4096), b""))  # noqa: B023
                assert (b"fine" in answer) == (b"\r\n\r\n" in said)
    finally:
        server.should_exit = True
        thread.join()
