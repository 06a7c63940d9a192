"""A Hub in a thread, on loopback: what the real client needs to see of huggingface.co, and a log of what it asked for.

Large files are redirected to a second address, as the Hub sends them to its content network, where no token belongs.
Its host has another name, since that is how the client tells the two apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.errors import LinesError
from lines_cli.hub.download import locate
from support import forked
from support.run import Ran, run_lines

Files = Mapping[str, bytes]
LARGE = (".safetensors", ".bin", ".onnx")


class Request(NamedTuple):
    """One line of the log.

    Attributes:
        kind: `info`, `tree`, `file` (at the Hub) or `content` (at the content network).
        method: GET or HEAD.
        repo: its id.
        file: which file; empty for `info` and `tree`.
        token: the token that came with it.
    """

    kind: str
    method: str
    repo: str
    file: str
    token: str | None


@dataclass
class Repository:
    """Commits by hash, and what branches and tags stand for."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """Serves repositories until the `with` block ends.

    Attributes:
        token: the one that opens private and gated repositories.
        requests: the log. What the client asks besides (a list of coding agents) is answered with 404 and left out.
        broken: repositories that are answered with 503.
        after_info: called once, after the next answer that says what a repository holds.
    """

    def __init__(self, token: str = "hf_letmein") -> None:
        self.token = token
        self.requests: list[Request] = []
        self.broken: set[str] = set()
        self.after_info: Callable[[], Any] | None = None
        self.repositories: dict[str, Repository] = {}
        self._servers = [self._serve(_Hub), self._serve(_Content)]
        hub, content = (server.server_address[1] for server in self._servers)
        self.url, self.content_url = f"http://127.0.0.1:{hub}", f"http://localhost:{content}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def push(self, repo: str, files: Files, *, branch: str = "main", private: bool = False, gated: bool = False) -> str:
        """Commit `files`, and nothing else, to a branch. Returns the commit."""
        repository = self.repositories.setdefault(repo, Repository(private=private, gated=gated))
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for since the log was last cleared."""
        return {request.file for request in self.requests if request.method == "GET" and request.file}

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass

    def note(self, kind: str, repo: str, file: str = "") -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(kind, self.command, repo, file, token))

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_range(self, body: bytes, headers: Mapping[str, str]) -> None:
        start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if not start:
            self.answer(200, body, headers)
            return
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206, body[int(start) :], {**headers, "Content-Range": span})


class _Hub(_Handler):
    """huggingface.co: what repositories hold, and their small files."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, kind = "/".join(parts[2:4]), "tree" if parts[4:5] == ["tree"] else "info"
            self.note(kind, repo)
            commit = self.admitted(repo, unquote(parts[5]) if len(parts) > 5 else "main")
            if commit:
                (self.tree if kind == "tree" else self.info)(repo, commit)
        elif parts[2:3] == ["resolve"]:
            repo, file = "/".join(parts[:2]), unquote("/".join(parts[4:]))
            self.note("file", repo, file)
            commit = self.admitted(repo, unquote(parts[3]), content=True)
            if commit:
                self.file(repo, commit, file)
        else:
            self.answer(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def admitted(self, repo: str, revision: str, *, content: bool = False) -> str | None:
        """The commit asked for; None once a refusal was sent. Anyone may list a gated repository, but not read it."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = token == self.hub.token
        repository = self.hub.repositories.get(repo)
        if repo in self.hub.broken:
            self.refuse(503, "", "Service Unavailable")
        elif token and not known:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and content and not known:
            self.refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif (commit := repository.commit(revision)) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit
        return None

    def info(self, repo: str, commit: str) -> None:
        files = self.hub.repositories[repo].commits[commit]
        siblings = [{"rfilename": name} for name in files]
        answer = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        happens, self.hub.after_info = self.hub.after_info, None
        if happens:
            happens()

    def tree(self, repo: str, commit: str) -> None:
        listing = []
        for name, content in self.hub.repositories[repo].commits[commit].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            listing.append(entry)
        self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, commit: str, file: str) -> None:
        content = self.hub.repositories[repo].commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif file.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            location = f"{self.hub.content_url}/{repo}/{commit}/{quote(file)}"
            self.answer(302, headers={**headers, "Location": location})
        else:
            self.answer_range(content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


class _Content(_Handler):
    """The content network: large files, to whoever has their address."""

    def do_GET(self) -> None:
        organisation, name, commit, *file = unquote(self.path).strip("/").split("/")
        repo = f"{organisation}/{name}"
        self.note("content", repo, "/".join(file))
        content = self.hub.repositories[repo].commits[commit]["/".join(file)]
        self.answer_range(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def do_HEAD(self) -> None:
        self.do_GET()


# --- who asks ---

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}


def look_up(names: Iterable[str]) -> None:
    """Say what becomes of each name, as a line of JSON."""
    for name in names:
        said: dict[str, Any]
        try:
            at = locate(name)
            opened = open_checkpoint(at.path, name=at.name, hub_id=at.hub_id)
            files = sorted(file.relative_to(at.path).as_posix() for file in at.path.rglob("*") if file.is_file())
            said = {"path": str(at.path), "name": at.name, "hub_id": at.hub_id, "files": files}
            said |= {"tensors": sorted(opened.tensors), "shards": [file.name for file in opened.files]}
        except LinesError as error:
            said = {"error": type(error).__name__, "message": error.message, "hint": error.hint or ""}
        print(json.dumps(said | {"client": "huggingface_hub" in sys.modules}))


@dataclass(frozen=True)
class User:
    """Someone with a cache of their own, whose Hub is `hub`. The client reads the environment when it is imported, so
    each run is in a fork that imports it anew.
    """

    hub: HubServer
    home: Path

    def runs(self, program: forked.Program, **environment: str) -> forked.Ended:
        """Run this in the user's environment."""
        own = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        env = ENVIRONMENT | own | environment
        return forked.run(program, env=env, cwd=self.home.parent, fresh=["huggingface_hub"])

    def commands(self, *commands: list[str]) -> list[Ran]:
        """What `lines` says to each command, in one process."""

        def program() -> None:
            print(json.dumps([asdict(run_lines(*command)) for command in commands]))

        done = self.runs(program)
        assert done.returncode == 0, done.stderr
        return [Ran(**ran) for ran in json.loads(done.stdout)]

    def locates(self, *names: str, **environment: str) -> list[dict[str, Any]]:
        """What became of each name, in one process."""
        done = self.runs(partial(look_up, names), **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]
