"""A Hugging Face Hub for tests, on loopback and in memory: what `huggingface_hub` asks for, and what can go wrong.

Two listeners, as in reality: the Hub itself and the storage of LFS files behind it, which must never see a token. Model
repositories only. Set HF_HUB_DISABLE_XET: the xet protocol is not spoken here.

    with HubServer() as hub:  # token hf_owner is user 'owner'
        hub.fail("HEAD", "config.json", 503)  # the next one
        hub.cut("GET", "/storage/", after=1000)
        assert hub.log("PUT", "/storage/")
"""

import base64
import fnmatch
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.bin", "*.pth", "*.safetensors")
# token: (user, who owns the repositories of that name; role)
USERS = {"hf_owner": ("owner", "write"), "hf_reader": ("owner", "read"), "hf_stranger": ("stranger", "write")}


@dataclass
class File:
    """A file of a commit. `oid` is what the Hub's ETag shows: sha256 of an LFS file, else git's sha1."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """A model repository: commits by branch, the newest last."""

    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        """Adds a commit that leaves the branch with exactly `files`."""
        history = self.branches.setdefault(branch, [])
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        parent = history[-1].oid if history else ""
        oid = hashlib.sha1(f"{self.id}\n{parent}\n{message}\n{tree}".encode()).hexdigest()
        history.append(Commit(oid, message, files))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or of a commit id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)


@dataclass
class Request:
    """What came. `status` is None where the connection was cut before an answer."""

    server: str  # 'hub' or 'storage'
    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    status: int | None = None


@dataclass
class _Fault:
    method: str
    pattern: str
    times: float
    status: int | None = None
    cut_after: int | None = None
    length: int | None = None
    page: bytes | None = None
    silent: float | None = None
    lost: bool = False


class _Answer(Exception):
    """Ends a request: what is sent, be it good or bad."""

    def __init__(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}

    @classmethod
    def json(cls, content: Any, status: int = 200) -> "_Answer":
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8"})

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None, **headers: str) -> "_Answer":
        answer = cls.json({"error": message}, status)
        answer.headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        return answer


class HubServer:
    """The server: its contents, its faults, and the log of what was asked. It may be stopped and started again."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}  # by sha256
        self.requests: list[Request] = []  # everything that came, in order
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self._ports = {"hub": 0, "storage": 0}
        self._listeners: list[_Listener] = []

    # -- life

    def start(self) -> "HubServer":
        """Listens; on the ports of the last time, if there was one."""
        for name in self._ports:
            listener = _Listener(("127.0.0.1", self._ports[name]), name, self)
            self._ports[name] = listener.server_port
            self._listeners.append(listener)
            threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stops listening and drops all connections, as a machine that goes down does. Contents stay."""
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            listener.drop_connections()
        self._listeners.clear()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['hub']}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._ports['storage']}"

    # -- what tests do with it

    def fail(self, method: str, pattern: str, status: int, times: float = 1) -> None:
        """The next `times` requests whose path has `pattern` (a regular expression) are answered with `status`."""
        self._faults.append(_Fault(method, pattern, times, status=status))

    def cut(self, method: str, pattern: str, after: int, times: float = 1) -> None:
        """The connection ends after `after` bytes of the answer to a GET, or of what PUT and POST send."""
        self._faults.append(_Fault(method, pattern, times, cut_after=after))

    def shorten(self, method: str, pattern: str, to: int, times: float = 1) -> None:
        """The answer ends after `to` bytes and says that this is all, as a bad proxy makes it."""
        self._faults.append(_Fault(method, pattern, times, length=to))

    def show_page(self, method: str, pattern: str, times: float = 1) -> None:
        """The answer is a page for people to log in at a network, with status 200."""
        self._faults.append(_Fault(method, pattern, times, page=b"<html>Welcome to the airport. Please pay.</html>"))

    def fall_silent(self, method: str, pattern: str, seconds: float, times: float = 1) -> None:
        """No answer for some seconds, and then the end of the connection. Nothing is done."""
        self._faults.append(_Fault(method, pattern, times, silent=seconds))

    def lose_answer(self, method: str, pattern: str, times: float = 1) -> None:
        """What was asked for is done, but the connection ends before the answer."""
        self._faults.append(_Fault(method, pattern, times, lost=True))

    def heal(self) -> None:
        """Forgets all faults."""
        self._faults.clear()

    def log(self, method: str = "", pattern: str = "") -> list[Request]:
        """The requests with this method whose path has `pattern`."""
        return [r for r in list(self.requests) if method in ("", r.method) and re.search(pattern, r.path)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}, only {list(self.repos[repo_id].branches)}"
        return {path: file.data for path, file in commit.files.items()}

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """Commits of a branch, the oldest first, without the one that made the repository."""
        return self.repos[repo_id].branches[branch][1:]

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main", **kwargs: bool) -> Repo:
        """Puts files into a repository (made with `kwargs` if need be), without any request."""
        with self._lock:
            repo = self.repos.get(repo_id) or self._create(Repo(repo_id, **kwargs))
            if branch not in repo.branches:
                repo.branches[branch] = list(repo.branches["main"])
            made = {path: File(data, self._is_lfs(path, data[:512])) for path, data in files.items()}
            self.lfs |= {file.oid: file.data for file in made.values() if file.lfs}
            repo.commit(branch, "Add files", {**repo.branches[branch][-1].files, **made})
        return repo

    # -- what the Hub does

    def _create(self, repo: Repo) -> Repo:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.commit("main", "initial commit", {".gitattributes": File(attributes.encode(), lfs=False)})
        self.repos[repo.id] = repo
        return repo

    @staticmethod
    def _is_lfs(path: str, sample: bytes) -> bool:
        return b"\0" in sample or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)

    def _fault(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> _Answer:
        """Finds the route of a request and follows it."""
        path = urlsplit(request.path).path
        for server, method, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and server == request.server and request.method in method.split():
                with self._lock:
                    try:
                        route(self, request, **{k: unquote(v) for k, v in match.groupdict().items()})
                    except _Answer as answer:
                        return answer
                raise AssertionError(f"{route.__name__} gave no answer")
        return _Answer.error(501, f"This test server does not know {request.method} {path} on {request.server}")

    def _user(self, request: Request) -> tuple[str, str] | None:
        """Name and role of who asks, None without a token."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        user = USERS.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Answer.error(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, request: Request, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        """The repository, if whoever asks may see (or change) it. Who may not see it cannot tell that it exists."""
        user = self._user(request)
        repo = self.repos.get(repo_id)
        owns = user is not None and repo_id.partition("/")[0] == user[0]
        if repo is None or (repo.private and not owns):
            if user is None:  # 401, not 404: it might exist
                raise _Answer.error(401, "Invalid username or password.", "RepoNotFound")
            raise _Answer.error(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not owns:
            message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
            raise _Answer.error(401 if user is None else 403, message, "GatedRepo")
        if write and user is None:
            raise _Answer.error(401, "Invalid username or password.")
        if write and not (owns and user[1] == "write"):
            raise _Answer.error(403, f"Forbidden: this token may not write to model {repo_id}")
        return repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise _Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def validate_yaml(self, request: Request) -> None:
        metadata = card_metadata(json.loads(request.body)["content"]) or {}
        texts, lists = ("license", "library_name", "pipeline_tag"), ("base_model", "datasets", "tags", "metrics")
        wrong = [k for k in texts if not isinstance(metadata.get(k, ""), str)]
        wrong += [k for k in lists if not all(isinstance(v, str) for v in metadata.get(k, []))]  # or one string
        raise _Answer.json({"errors": [{"message": k} for k in wrong], "warnings": []}, 400 if wrong else 200)

    def create(self, request: Request) -> None:
        user = self._user(request)
        if user is None:
            raise _Answer.error(401, "Invalid username or password.")
        wanted = json.loads(request.body)
        namespace = wanted.get("organization") or user[0]
        repo_id = f"{namespace}/{wanted['name']}"
        if namespace != user[0] or user[1] != "write":
            message = f"You don't have the rights to create a model under the namespace {namespace!r}"
            raise _Answer.error(403, message)
        content = {"name": repo_id, "id": repo_id, "url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repos:
            raise _Answer.json({"error": "You already created this model repo", **content}, 409)
        self._create(Repo(repo_id, private=wanted.get("private") or wanted.get("visibility") == "private"))
        raise _Answer.json(content)

    def info(self, request: Request, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(request, repo_id)
        commit = self._commit(repo, revision)
        card = commit.files.get("README.md")
        content = {"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": []}
        if card is not None:
            content["cardData"] = card_metadata(card.data.decode())
        raise _Answer.json(content)

    def branch(self, request: Request, repo_id: str, branch: str) -> None:
        repo = self._repo(request, repo_id, write=True)
        if branch in repo.branches:
            raise _Answer.error(409, f"Reference already exists: {branch}")
        repo.branches[branch] = list(repo.branches["main"])
        raise _Answer(201)

    def refs(self, request: Request, repo_id: str) -> None:
        repo = self._repo(request, repo_id)
        found = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in repo.branches.items()
        ]
        raise _Answer.json({"branches": found, "converts": [], "tags": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> None:
        """Which files are to come as LFS, and what the Hub has under their names."""
        files = self._commit(self._repo(request, repo_id, write=True), revision).files
        answers = []
        for file in json.loads(request.body)["files"]:
            lfs = self._is_lfs(file["path"], base64.b64decode(file["sample"]))
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if file["path"] in files:
                answers[-1]["oid"] = files[file["path"]].oid
        raise _Answer.json({"files": answers})

    def lfs_batch(self, request: Request, repo_id: str) -> None:
        """Where to upload each object; objects that are here already need no action."""
        self._repo(request, repo_id, write=True)
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            if wanted["oid"] not in self.lfs:
                upload = {"href": f"{self.storage}/storage/{wanted['oid']}?signature={self._sign(wanted['oid'])}"}
                verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
            objects.append(wanted)
        raise _Answer.json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, request: Request, repo_id: str) -> None:
        self._repo(request, repo_id, write=True)
        wanted = json.loads(request.body)
        if len(self.lfs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Answer.error(404, "Object not found, or of another size")
        raise _Answer.json({})

    def commit(self, request: Request, repo_id: str, revision: str) -> None:
        repo = self._repo(request, repo_id, write=True)
        if revision not in repo.branches:
            raise _Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, header = dict(repo.branches[revision][-1].files), {}
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise _Answer.error(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                files[value["path"]] = File(self.lfs[value["oid"]], lfs=True)
            else:
                raise _Answer.error(501, f"This test server does not know the commit operation {key}")
        commit = repo.commit(revision, header["summary"], files)
        url = f"{self.endpoint}/{repo_id}/commit/{commit.oid}"
        raise _Answer.json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> None:
        """A file, or for LFS the way to it in the storage."""
        commit = self._commit(self._repo(request, repo_id, content=True), revision)
        file = commit.files.get(path)
        if file is None:
            raise _Answer.error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not file.lfs:
            raise _part(request, file.data, {**headers, "ETag": f'"{file.oid}"'})
        location = f"{self.storage}/storage/{file.oid}?signature={self._sign(file.oid)}"
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data)), "Location": location}
        raise _Answer(302, b"Found. Redirecting", {**headers, **linked, "ETag": '"of-the-pointer"'})

    # -- what the storage behind it does

    @staticmethod
    def _sign(oid: str) -> str:
        return hashlib.sha1(f"signed {oid}".encode()).hexdigest()

    def _check_signature(self, request: Request, oid: str) -> None:
        if urlsplit(request.path).query != f"signature={self._sign(oid)}":
            raise _Answer(403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        if "authorization" in request.headers:  # as S3 does: signature and token exclude each other
            raise _Answer(400, b"<Error><Code>InvalidArgument</Code></Error>")

    def store(self, request: Request, oid: str) -> None:
        self._check_signature(request, oid)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise _Answer(400, b"<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
        self.lfs[oid] = request.body
        raise _Answer(200)

    def load(self, request: Request, oid: str) -> None:
        self._check_signature(request, oid)
        if oid not in self.lfs:
            raise _Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        raise _part(request, self.lfs[oid], {"ETag": '"of-the-storage"', "Accept-Ranges": "bytes"})


_REPO = r"(?P<repo_id>[^/]+/[^/]+?)"
_API, _LFS = rf"/api/models/{_REPO}", rf"/{_REPO}\.git/info/lfs/objects"
_REVISION = r"(?P<revision>[^/]+)"  # a slash in it comes quoted
_ROUTES: list[tuple[str, str, str, Callable]] = [
    ("hub", "POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("hub", "POST", "/api/repos/create", HubServer.create),
    ("hub", "GET", _API, HubServer.info),
    ("hub", "GET", f"{_API}/revision/{_REVISION}", HubServer.info),
    ("hub", "GET", f"{_API}/refs", HubServer.refs),
    ("hub", "POST", f"{_API}/branch/(?P<branch>[^/]+)", HubServer.branch),
    ("hub", "POST", f"{_API}/preupload/{_REVISION}", HubServer.preupload),
    ("hub", "POST", f"{_API}/commit/{_REVISION}", HubServer.commit),
    ("hub", "POST", f"{_LFS}/batch", HubServer.lfs_batch),
    ("hub", "POST", f"{_LFS}/verify", HubServer.lfs_verify),
    ("hub", "HEAD GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", HubServer.resolve),
    ("storage", "PUT", "/storage/(?P<oid>[0-9a-f]{64})", HubServer.store),
    ("storage", "HEAD GET", "/storage/(?P<oid>[0-9a-f]{64})", HubServer.load),
]


def _part(request: Request, data: bytes, headers: dict[str, str]) -> _Answer:
    """All of `data`, or from the byte that a `Range: bytes=FROM-` header asks for."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not wanted:
        return _Answer(200, data, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
    return _Answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def card_metadata(text: str) -> Any:
    """The YAML between the two lines `---` at the head of a model card, None without."""
    head = re.match(r"---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return yaml.safe_load(head[1] or "") if head else None


class _Listener(http.server.ThreadingHTTPServer):
    """One port. Keeps its connections, so that they can be dropped: threads would go on serving them."""

    def __init__(self, address: tuple[str, int], name: str, hub: HubServer) -> None:
        self.name, self.hub = name, hub
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """Clients that went away are no news; anything else is a fault of this file, and is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    timeout = 30
    server: _Listener

    def log_message(self, *_: Any) -> None:
        pass  # `HubServer.requests` is the log

    def _serve(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.name, self.command, self.path, headers)
        hub.requests.append(request)
        fault = hub._fault(self.command, self.path) or _Fault("", "", 0)
        incoming = self.command in ("PUT", "POST")
        if incoming and fault.cut_after is not None:
            self.rfile.read(fault.cut_after)
            self.close_connection = True
            return
        request.body = self.rfile.read(int(headers.get("content-length", 0)))
        if fault.silent:
            time.sleep(fault.silent)
        if fault.page:
            answer = _Answer(200, fault.page, {"Content-Type": "text/html"})
        elif fault.status:
            answer = _Answer.error(fault.status, "This was asked for")
        else:
            answer = None if fault.silent else hub.answer(request)
        if answer is None or fault.lost:
            self.close_connection = True
            return
        answer.body = answer.body[: fault.length]
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: fault.cut_after])
            self.close_connection |= fault.cut_after is not None

    do_GET = do_HEAD = do_POST = do_PUT = _serve
