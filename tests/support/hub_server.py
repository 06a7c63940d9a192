"""A Hub in a thread, on loopback: what the real client needs to see of huggingface.co, and a log of what it asked for.

Large files are redirected to a second address, as the Hub sends them to its content network, where no token belongs.
Its host has another name, since that is how the client tells the two apart. They are sent there, too, as Git LFS does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.errors import LinesError
from lines_cli.hub.download import locate
from support import forked
from support.loopback import Server
from support.run import Ran, run_lines

Files = Mapping[str, bytes]
LARGE = (".safetensors", ".bin", ".onnx")


class Request(NamedTuple):
    """One line of the log.

    Attributes:
        kind: `info`, `tree`, `file` (at the Hub) or `content` (at the content network); of what is pushed `whoami`,
            `create`, `branch`, `card`, `preupload`, `batch`, `upload` (at the content network), `verify`, `commit`.
        method: GET or HEAD, POST or PUT.
        repo: its id.
        file: which file, or of an `upload` the SHA-256; empty where it is of none.
        token: the token that came with it.
        nbytes: of an answer, or of what was sent.
    """

    kind: str
    method: str
    repo: str
    file: str
    token: str | None
    nbytes: int = 0


@dataclass
class Account:
    """Whose a token is, and what it may do: in which organisations, and whether it may write at all."""

    name: str = "me"
    orgs: Mapping[str, str] = field(default_factory=lambda: {"org": "admin"})
    role: str = "write"

    def may_write(self, repo: str) -> bool:
        owner = repo.partition("/")[0]
        return self.role == "write" and (owner == self.name or self.orgs.get(owner, "read") != "read")


@dataclass
class Fault:
    """What goes wrong with requests of a kind: so many times, behind so many that go well.

    Attributes:
        status: what is answered; None where the connection is dropped.
        message: what the server says of it.
        after: how many requests go well before.
        times: how many fail then.
        reads: of a request whose connection is dropped, how many bytes of its body are read first.
        happens: called when it does.
    """

    status: int | None
    message: str = ""
    after: int = 0
    times: int = 1_000_000
    reads: int = 0
    happens: Callable[[], Any] = lambda: None


@dataclass
class Repository:
    """Commits by hash, and what branches and tags stand for."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    said: dict[str, tuple[str, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else {**self.tags, **self.refs}.get(revision)

    def add(self, files: Files, branch: str, said: tuple[str, str] = ("", "")) -> str:
        """A commit on a branch that holds these files and no others."""
        parent = self.refs.get(branch)
        commit = hashlib.sha1(repr((parent, branch, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[commit], self.parents[commit], self.said[commit] = dict(files), parent, said
        self.refs[branch] = commit
        return commit


class HubServer:
    """Serves repositories until the `with` block ends.

    Attributes:
        token: the one that opens private and gated repositories.
        accounts: whose each token is.
        faults: by the kind of request.
        stored: large files that were sent, by their SHA-256.
        ranges: whether large files are sent in parts.
        part: bytes of a part of an upload; None where each is sent whole.
        requests: the log. What the client asks besides (a list of coding agents) is answered with 404 and left out.
        broken: repositories that are answered with 503.
        after_info: called once, after the next answer that says what a repository holds.
    """

    def __init__(self, token: str = "hf_letmein") -> None:
        self.token = token
        self.accounts = {token: Account()}
        self.faults: dict[str, Fault] = {}
        self.stored: dict[str, bytes] = {}
        self.ranges = True
        self.part: int | None = None
        self.pace: float | None = None
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
        return self.repositories.setdefault(repo, Repository(private=private, gated=gated)).add(files, branch)

    def holds(self, repo: str, revision: str = "main") -> Files:
        """What a repository holds there."""
        repository = self.repositories[repo]
        return repository.commits[repository.commit(revision) or ""]

    def kinds(self, kind: str) -> list[Request]:
        """The requests of a kind."""
        return [request for request in self.requests if request.kind == kind]

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for since the log was last cleared."""
        return {request.file for request in self.requests if request.method == "GET" and request.file}

    def _serve(self, handler: type[_Handler]) -> Server:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = Server(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is sent at once, not after the wait for another piece of it

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass

    def note(self, kind: str, repo: str, file: str = "", nbytes: int = 0) -> None:
        self.hub.requests.append(Request(kind, self.command, repo, file, self.given or None, nbytes))

    @property
    def given(self) -> str:
        """The token that came with the request."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def account(self) -> Account | None:
        return self.hub.accounts.get(self.given)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def fails(self, kind: str) -> bool:
        """Whether something goes wrong with this request, which was answered then, or dropped."""
        fault = self.hub.faults.get(kind)
        if fault is None:
            return False
        fault.after -= 1
        if fault.after >= 0 or fault.times <= 0:
            return False
        fault.times -= 1
        fault.happens()
        if fault.status is not None:
            if self.command in ("POST", "PUT"):
                self.body()
            self.refuse(fault.status, "", fault.message)
            return True
        if fault.reads:
            self.rfile.read(fault.reads)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked had enough
                self._send(body)

    def _send(self, body: bytes) -> None:
        if self.hub.pace is None:
            self.wfile.write(body)
            return
        step, begun = 2**18, time.perf_counter()
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            time.sleep(max(0.0, begun + (start + step) / self.hub.pace - time.perf_counter()))

    def asked_of(self, body: bytes) -> range:
        """Which of the bytes were asked for."""
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not start or not self.hub.ranges:
            return range(len(body))
        return range(int(start), min(int(end) + 1, len(body)) if end else len(body))

    def answer_range(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer with the bytes that were asked for."""
        asked = self.asked_of(body)
        if "Range" not in self.headers or not self.hub.ranges:
            self.answer(200, body, headers)
        elif not asked:
            self.answer(416, headers={**headers, "Content-Range": f"bytes */{len(body)}"})
        else:
            span = f"bytes {asked[0]}-{asked[-1]}/{len(body)}"
            self.answer(206, body[asked.start : asked.stop], {**headers, "Content-Range": span})


class _Hub(_Handler):
    """huggingface.co: what repositories hold, and their small files."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            self.note("whoami", "")
            if not self.fails("whoami"):
                self.whoami()
        elif parts[:2] == ["api", "models"] and parts[4:5] in (["auth-check"], ["refs"], ["commits"]):
            repo, kind = "/".join(parts[2:4]), parts[4]
            self.note(kind, repo)
            if not self.fails(kind) and self.admitted(repo, "main"):
                if kind == "auth-check":
                    self.may_write(repo) and self.answer_json({})
                else:
                    (self.refs if kind == "refs" else self.history)(repo)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["xet-write-token"]:
            self.note("xet", "/".join(parts[2:4]))
            self.fails("xet") or self.refuse(404, "", "no Xet here")
        elif parts[:2] == ["api", "models"] and parts[4:5] in ([], ["revision"], ["tree"]):
            repo, kind = "/".join(parts[2:4]), "tree" if parts[4:5] == ["tree"] else "info"
            self.note(kind, repo)
            if self.fails(kind):
                return
            commit = self.admitted(repo, unquote(parts[5]) if len(parts) > 5 else "main")
            if commit:
                (self.tree if kind == "tree" else self.info)(repo, commit)
        elif parts[2:3] == ["resolve"]:
            repo, file = "/".join(parts[:2]), unquote("/".join(parts[4:]))
            self.note("file", repo, file)
            if self.fails("file"):
                return
            commit = self.admitted(repo, unquote(parts[3]), content=True)
            if commit:
                self.file(repo, commit, file)
        else:
            self.answer(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def whoami(self) -> None:
        account = self.account
        if account is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        token = {"accessToken": {"displayName": "ci", "role": account.role}}
        self.answer_json({"type": "user", "name": account.name, "orgs": orgs, "auth": token})

    def may_write(self, repo: str) -> bool:
        if self.account is None or not self.account.may_write(repo):
            self.refuse(403, "", f"You have no right to write to {repo}")
            return False
        return True

    def refs(self, repo: str) -> None:
        repository = self.hub.repositories[repo]

        def listed(refs: Mapping[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        self.answer_json(
            {"branches": listed(repository.refs, "heads"), "tags": listed(repository.tags, "tags"), "converts": []}
        )

    def history(self, repo: str) -> None:
        repository, found = self.hub.repositories[repo], []
        commit = repository.refs.get("main")
        while commit is not None:
            title, message = repository.said.get(commit, ("", ""))
            found.append(
                {"id": commit, "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": title, "message": message}
            )
            commit = repository.parents.get(commit)
        self.answer_json(found)

    # --- what is pushed ---

    def do_POST(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        kinds = {("api", "repos"): "create", ("api", "validate-yaml"): "card"}
        kind = kinds.get(tuple(parts[:2]), "")
        if parts[:2] == ["api", "models"]:
            kind = parts[4]
        elif "info" in parts:
            kind = {"batch": "batch", "verify": "verify", "complete": "complete"}[parts[-1]]
        repo = (
            "/".join(parts[2:4])
            if kind in ("branch", "preupload", "commit")
            else "/".join(parts[:2]).removesuffix(".git")
        )
        repo = "" if kind in ("create", "card") else repo
        if self.fails(kind):
            self.note(kind, repo)
            return
        content = self.body()
        self.note(kind, repo, nbytes=len(content))
        if kind == "card":
            self.card(json.loads(content)["content"])
        elif kind == "create":
            self.create(json.loads(content))
        elif kind == "complete":  # by an address that was handed out
            self.complete(json.loads(content))
        elif (commit := self.admitted(repo, unquote(parts[5]) if kind in ("preupload", "commit") else "main")) and (
            self.may_write(repo)
        ):
            if kind == "branch":
                self.branch(repo, unquote(parts[5]), json.loads(content))
            elif kind == "preupload":
                self.preupload(repo, commit, json.loads(content))
            elif kind == "batch":
                self.batch(repo, json.loads(content))
            elif kind == "verify":
                self.verify(json.loads(content))
            else:
                self.commit(repo, unquote(parts[5]), commit, [json.loads(line) for line in content.splitlines()])

    def card(self, content: str) -> None:
        if "license: [" in content:
            answer = json.dumps({"errors": [{"message": '"license" must be a string'}], "warnings": []}).encode()
            self.answer(400, answer, {"Content-Type": "application/json"})
        else:
            self.answer_json({"errors": [], "warnings": []})

    def create(self, asked: Mapping[str, Any]) -> None:
        owner, name = asked.get("organization"), asked["name"]
        repo = f"{owner or (self.account.name if self.account else '')}/{name}"
        if self.account is None:
            self.refuse(401, "", "Invalid username or password.")
        elif not self.account.may_write(repo):
            self.refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        elif repo in self.hub.repositories:
            self.refuse(409, "", "You already created this model repo")
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repository = self.hub.repositories[repo] = Repository(private=private)
            repository.add({".gitattributes": b"*.safetensors filter=lfs"}, "main", ("initial commit", ""))
            self.answer_json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})

    def branch(self, repo: str, branch: str, asked: Mapping[str, Any]) -> None:
        repository = self.hub.repositories[repo]
        if branch in repository.refs:
            self.refuse(409, "", "Reference already exists")
            return
        repository.refs[branch] = repository.commit(asked.get("startingPoint", "main")) or ""
        self.answer_json({})

    def preupload(self, repo: str, commit: str, asked: Mapping[str, Any]) -> None:
        repository = self.hub.repositories[repo]
        there, answers = repository.commits[commit], []
        for file in asked["files"]:
            name = file["path"]
            oid = None
            if name in there:
                blob = there[name]
                git = hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()
                oid = hashlib.sha256(blob).hexdigest() if name.endswith(LARGE) else git
            mode = "lfs" if name.endswith(LARGE) else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": name in repository.ignored, "oid": oid})
        self.answer_json({"files": answers})

    def batch(self, repo: str, asked: Mapping[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            oid, nbytes = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": nbytes}
            if oid not in self.hub.stored:
                href, header = f"{self.hub.content_url}/upload/{oid}", {}
                if self.hub.part is not None and nbytes > self.hub.part:
                    number = -(-nbytes // self.hub.part)
                    header = {f"{at:05}": f"{href}/{at}" for at in range(1, number + 1)}
                    header["chunk_size"] = str(self.hub.part)
                    href = f"{self.hub.url}/{repo}.git/info/lfs/complete"
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify", "header": {}}
                found["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(found)
        self.answer_json({"transfer": "basic", "objects": objects})

    def complete(self, asked: Mapping[str, Any]) -> None:
        oid = asked["oid"]
        parts = [self.hub.stored.pop(f"{oid}/{part['partNumber']}") for part in asked["parts"]]
        self.hub.stored[oid] = b"".join(parts)
        self.answer_json({})

    def verify(self, asked: Mapping[str, Any]) -> None:
        content = self.hub.stored.get(asked["oid"])
        if content is None or len(content) != asked["size"] or hashlib.sha256(content).hexdigest() != asked["oid"]:
            self.refuse(422, "", "the object is not what was announced")
        else:
            self.answer_json({})

    def commit(self, repo: str, branch: str, commit: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[repo]
        files = dict(repository.commits[commit])
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, commit):
            self.refuse(412, "", "The branch has moved")
            return
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                assert kind == "deletedFile"
                del files[value["path"]]
        oid = repository.add(files, branch, (header["summary"], header["description"]))
        self.answer_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    # --- what is fetched ---

    def admitted(self, repo: str, revision: str, *, content: bool = False) -> str | None:
        """The commit asked for; None once a refusal was sent. Anyone may list a gated repository, but not read it."""
        token = self.given
        known = token in self.hub.accounts
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
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        if "blobs=" in urlsplit(self.path).query:
            for file in siblings:
                content = files[file["rfilename"]]
                file |= {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if file["rfilename"].endswith(LARGE):
                    sha = hashlib.sha256(content).hexdigest()
                    file["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 134}
        private = self.hub.repositories[repo].private
        answer = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "siblings": siblings,
            "tags": [],
            "private": private,
        }
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
        if self.fails("content"):
            self.note("content", repo, "/".join(file))
            return
        content = self.hub.repositories[repo].commits[commit]["/".join(file)]
        # before it is sent: whoever has it may look at once
        self.note("content", repo, "/".join(file), len(self.asked_of(content)))
        self.answer_range(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def do_PUT(self) -> None:
        oid = urlsplit(self.path).path.removeprefix("/upload/")
        if self.fails("upload"):
            self.note("upload", "", oid)
            return
        try:
            content = self.body()
        except ValueError:  # who sent it was killed
            content = b""
        if len(content) < int(self.headers.get("Content-Length", "0")) or (
            "/" not in oid and hashlib.sha256(content).hexdigest() != oid
        ):
            self.close_connection = True  # half a file is none
            return
        self.hub.stored[oid] = content
        self.note("upload", "", oid, len(content))
        self.answer(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

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
        own |= {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}  # this machine may have much to do
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
