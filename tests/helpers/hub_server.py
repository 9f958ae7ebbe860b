"""A Hub on the loopback interface: what huggingface_hub asks of the real one to make, fill and read repositories.

    with HubServer() as hub:
        subprocess.run(.., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"})

Repositories are kept in memory. `hub.fail(..)` makes the next requests of a kind fail: cut in the middle, or with 503.
Private repositories, and all writing, need the token; `hub.reader` may only read, and other tokens are refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "someone"
_LFS = (".safetensors", ".parquet", ".png", ".mp4", ".gif", ".jpg")
_PLURALS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        told = repr((branch, len(self.commits), sorted((path, len(own)) for path, own in files.items())))
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class Fault:
    method: str
    path: re.Pattern
    kind: str  # "cut", "reset", "hold" or "503"
    times: int
    after: int


class HubServer:
    """The server, running from `__enter__` to `__exit__`.

    Attributes:
        url: for HF_ENDPOINT.
        token, reader: those that it knows; with the second one may not write.
        repositories: (type, owner/name) -> what is in it.
        requests: method and path of all requests, in order.
        arrived: (SHA-256, bytes) of every large file, each time that it was sent whole.
    """

    def __init__(self, token: str = "hf_loopback") -> None:
        self.token, self.reader = token, token + "_reader"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.arrived: list[tuple[str, int]] = []
        self.lock = threading.RLock()
        self._mended = threading.Event()
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.mend()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, kind: str = "cut", times: int = 1, after: int = 1000) -> None:
        """Lets the next requests fail.

        Args:
            method: of the requests.
            path: regular expression that is found in theirs.
            kind: "cut" ends the connection after some bytes of the body, sent or received, "reset" does so without a
                goodbye, as when a machine goes away; "hold" reads no body and gives no answer until `mend`; "503"
                answers so.
            times: how many of them.
            after: bytes before the cut.
        """
        with self.lock:
            self._mended.clear()
            self._faults.append(Fault(method, re.compile(path), kind, times, after))

    def mend(self) -> None:
        """No more failures."""
        with self.lock:
            self._faults.clear()
            self._mended.set()

    def wait_until_mended(self) -> None:
        self._mended.wait()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, kind: str = "model", branch: str = "main") -> dict[str, bytes]:
        """Path -> content at a branch of a repository."""
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.branches[branch]]


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        self.status, self.code, self.message, self.commit = status, code, message, commit


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it costs 40 ms a request
    wbufsize = 2**16

    def log_message(self, *args) -> None:
        pass

    def _run(self) -> None:
        url = urlsplit(self.path)
        self.path_only, self.query = url.path, parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path_only))
        self._fault = self.hub.fault(self.command, self.path_only)
        if self._fault is not None and self._fault.kind in ("cut", "reset") and self.command in ("POST", "PUT"):
            self.rfile.read(min(self._fault.after, int(self.headers.get("Content-Length") or 0)))
            self._cut()
            return
        if self._fault is not None and self._fault.kind == "hold":
            self.hub.wait_until_mended()
            self._cut()
            return
        self.body = self._read_body()
        try:
            if self._fault is not None and self._fault.kind == "503":
                raise _Refused(503)
            for method, pattern, action in _ROUTES:
                match = pattern.fullmatch(self.path_only)
                if match and self.command in method:
                    action(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
                    return
            raise _Refused(404, "EntryNotFound")
        except _Refused as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if refusal.commit:
                headers["X-Repo-Commit"] = refusal.commit
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self._send(refusal.status, {"error": refusal.message or refusal.code or "not now"}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _run

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        if self._fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault is not None and self._fault.kind in ("cut", "reset"):
            self.wfile.write(body[: self._fault.after])
            self._cut()
            return
        self.wfile.write(body)

    # --- who may do what ----------------------------------------------------------------------------------------------

    def _known(self) -> bool:
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given not in (f"Bearer {self.hub.token}", f"Bearer {self.hub.reader}"):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return True

    def _must_write(self) -> None:
        if not self._known():
            raise _Refused(401, message="This needs a token")
        if self.headers.get("Authorization") == f"Bearer {self.hub.reader}":
            raise _Refused(403, message="This token may only read")

    def _repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        repository, known = self.hub.repositories.get((_PLURALS[kind], repo)), self._known()
        if repository is None or repository.private and not known:
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if write:
            self._must_write()
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return oid

    # --- writing ------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        self._must_write()
        owner = asked.get("organization") or OWNER
        kind, repo = asked.get("type") or "model", f"{owner}/{asked['name']}"
        if owner != OWNER:
            raise _Refused(403, message=f"You may not write to {owner}")
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if (kind, repo) in self.hub.repositories:
                self._send(409, answer | {"error": "You already created this repo"})
                return
            repository = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.hub.repositories[kind, repo] = repository
        self._send(200, answer)

    def _may_write(self, kind: str, repo: str) -> None:
        self._repository(kind, repo, write=True)
        if repo.split("/")[0] != OWNER:
            raise _Refused(403, message=f"You may not write to {repo}")
        self._send(200, {})

    def _branch(self, kind: str, repo: str, branch: str) -> None:
        repository = self._repository(kind, repo, write=True)
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send(200, {})

    def _validate(self) -> None:
        import yaml

        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        if match and not isinstance(data, dict):
            self._send(400, {"errors": [{"message": "front matter is no mapping"}], "warnings": []})
            return
        self._send(200, {"errors": [], "warnings": [] if data else [{"message": "empty metadata"}]})

    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        there = repository.commits[self._commit_of(repository, revision)]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(_LFS) else "regular"
            oid = _oid(path, there[path]) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def _batch(self, repo: str, kind: str = "models") -> None:
        self._repository(kind, repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="The content is not what was announced")
        with self.hub.lock:
            self.hub.objects[oid] = self.body
            self.hub.arrived.append((oid, len(self.body)))
        self._send(200, {})

    def _commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        with self.hub.lock:
            files = dict(repository.commits[self._commit_of(repository, revision)])
            for line in self.body.splitlines():
                item = json.loads(line)
                own = item["value"]
                if item["key"] == "file":
                    files[own["path"]] = base64.b64decode(own["content"])
                elif item["key"] == "lfsFile":
                    if own["oid"] not in self.hub.objects:
                        raise _Refused(400, message=f"{own['path']} has not arrived")
                    files[own["path"]] = self.hub.objects[own["oid"]]
                elif item["key"] == "deletedFile":
                    files.pop(own["path"], None)
                elif item["key"] == "deletedFolder":
                    files = {path: own for path, own in files.items() if not path.startswith(item["value"]["path"])}
            oid = repository.commit(files, revision)
        prefix = "" if kind == "models" else f"{kind}/"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{prefix}{repo}/commit/{oid}"})

    def _mend(self) -> None:
        self.hub.mend()
        self._send(200, {})

    # --- reading ------------------------------------------------------------------------------------------------------

    def _who(self) -> None:
        if not self._known():
            raise _Refused(401, message="This needs a token")
        self._send(200, {"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _info(self, kind: str, repo: str, revision: str = "main") -> None:
        repository = self._repository(kind, repo)
        oid = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        told = {"id": repo, "sha": oid, "private": repository.private, "siblings": siblings, "tags": [], "downloads": 0}
        self._send(200, told | {"likes": 0, "author": OWNER, "disabled": False, "gated": False})

    def _refs(self, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.branches.items()
        ]
        self._send(200, {"branches": branches, "tags": [], "converts": []})

    def _tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        repository = self._repository(kind, repo)
        files = repository.commits[self._commit_of(repository, revision)]
        prefix = f"{path}/" if path else ""
        inside = {name: own for name, own in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise _Refused(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows: dict[str, dict] = {}
        for name, own in sorted(inside.items()):
            folders = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                folder = prefix + "/".join(folders[:depth])
                if recursive or depth == 1:
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    rows[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or not folders:
                rows[name] = _row(name, own)
        self._send(200, list(rows.values()))

    def _paths(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        files = repository.commits[self._commit_of(repository, revision)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode()).get("paths", [])
        self._send(200, [_row(path, files[path]) for path in asked if path in files])

    def _resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        repository = self._repository(kind, repo)
        oid = self._commit_of(repository, revision)
        if path not in repository.commits[oid]:
            raise _Refused(404, "EntryNotFound", commit=oid)
        own = repository.commits[oid][path]
        headers = {"ETag": f'"{_oid(path, own)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, own, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(own) - 1), len(own) - 1)
        if start >= len(own):
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(own)}"})
            return
        self._send(206, own[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(own)}"})


def _oid(path: str, content: bytes) -> str:
    """Hash of a file as the Hub tells it: SHA-256 of a large one, git's own of others."""
    if path.endswith(_LFS) and content:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _row(path: str, content: bytes) -> dict:
    row = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(_LFS) and content:
        row["lfs"] = {"oid": row["oid"], "size": len(content), "pointerSize": 134}
    return row


_KIND, _REPO, _REVISION = r"(?P<kind>models|datasets|spaces)", r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    (("POST",), re.compile(r"/api/repos/create"), _Handler._create),
    (("POST",), re.compile(r"/api/validate-yaml"), _Handler._validate),
    (("GET",), re.compile(r"/api/whoami-v2"), _Handler._who),
    (("POST",), re.compile(r"/mend"), _Handler._mend),  # `HubServer.mend` from another process
    (("GET",), re.compile(rf"/api/{_KIND}/{_REPO}"), _Handler._info),
    (("GET",), re.compile(rf"/api/{_KIND}/{_REPO}/auth-check/write"), _Handler._may_write),
    (("GET",), re.compile(rf"/api/{_KIND}/{_REPO}/revision/{_REVISION}"), _Handler._info),
    (("GET",), re.compile(rf"/api/{_KIND}/{_REPO}/refs"), _Handler._refs),
    (("GET",), re.compile(rf"/api/{_KIND}/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?"), _Handler._tree),
    (("POST",), re.compile(rf"/api/{_KIND}/{_REPO}/paths-info/{_REVISION}"), _Handler._paths),
    (("POST",), re.compile(rf"/api/{_KIND}/{_REPO}/branch/(?P<branch>[^/]+)"), _Handler._branch),
    (("POST",), re.compile(rf"/api/{_KIND}/{_REPO}/preupload/{_REVISION}"), _Handler._preupload),
    (("POST",), re.compile(rf"/api/{_KIND}/{_REPO}/commit/{_REVISION}"), _Handler._commit),
    (
        ("POST",),
        re.compile(rf"/((?P<kind>datasets|spaces)/)?{_REPO}\.git/info/lfs/objects/batch"),
        _Handler._batch,
    ),
    (("PUT",), re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})"), _Handler._upload),
    (
        ("GET", "HEAD"),
        re.compile(rf"/((?P<kind>datasets|spaces)/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)"),
        _Handler._resolve,
    ),
]
