"""As much of S3 as `lines` needs, a thread on loopback: objects with ranges, lists, uploads in parts; and what goes
wrong.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import format_datetime
from hashlib import md5
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest

from lines_cli.storage import object_store
from support.loopback import Server

Fault = Callable[[str, str], str | None]
"""Given a request's method and path: `503`, `hold` (the same, once `until` says so), `wait` (nothing, once it says so),
`slow`, `drop` (half of an answer, then nothing), `403`, or None.
"""


@dataclass
class Stored:
    """An object: its bytes, its tag, and when it was written."""

    content: bytes
    mark: str = ""  # metadata of the name `lines`
    at: datetime = field(default_factory=lambda: datetime.now(timezone.utc).replace(microsecond=0))

    @property
    def tag(self) -> str:
        return f'"{md5(self.content, usedforsecurity=False).hexdigest()}-{int(self.at.timestamp())}"'


class S3Server:
    """The server; a `with` block starts and stops it.

    Attributes:
        objects: by `bucket/key`.
        asked: every request: method, path, and the range that was asked for.
        fault: what goes wrong.
        until: what `hold` and `wait` wait for.
        unlisted: objects that lists do not show yet.
        amid: is called in the midst of each request; it may ask the server itself.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets, self.objects, self.asked = set(buckets), dict[str, Stored](), list[tuple[str, str, str]]()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.marks: dict[str, str] = {}  # of uploads
        self.completed: set[str] = set()
        self.begun = 0  # uploads
        self.fault: Fault = lambda method, path: None
        self.until: Callable[[], bool] = lambda: True
        self.unlisted = set[str]()
        self.amid: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            state = server

        self._http = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._http.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    @property
    def bytes_asked(self) -> int:
        """How many bytes were asked for by ranges."""
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for _, _, asked in self.asked]
        return sum(int(one[2]) + 1 - int(one[1]) for one in found if one)

    def put(self, key: str, content: bytes, mark: str = "") -> None:
        self.objects[key] = Stored(content, mark)

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def at_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with a bucket `models`, which this process finds by its environment."""
    with S3Server("models") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        object_store._store.cache_clear()
        yield server
        object_store._store.cache_clear()


_MARK = "x-amz-meta-lines"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is sent at once, not after the wait for another piece of it
    state: S3Server
    _drops = False

    def log_message(self, *_: object) -> None:
        pass

    def _begin(self) -> tuple[str, dict[str, list[str]], bytes] | None:
        """The path, the query and the body; None where something has gone wrong."""
        parts = urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.state.lock:
            self.state.asked.append((self.command, path, self.headers.get("Range", "")))
            fault = self.state.fault(self.command, path)
        self.state.amid(self.command, path)
        if fault == "slow":
            time.sleep(0.3)
        while fault in ("hold", "wait") and not self.state.until():
            time.sleep(0.01)
        fault = {"hold": "503", "wait": None}.get(fault, fault) if fault else None
        self._drops = fault == "drop"
        if fault is not None and fault.isdigit():
            self._error(int(fault), {"503": "SlowDown", "403": "AccessDenied"}[fault])
            return None
        if path.split("/")[0] not in self.state.buckets:
            self._error(404, "NoSuchBucket")
            return None
        return path, parse_qs(parts.query, keep_blank_values=True), body

    def _error(self, status: int, code: str) -> None:
        self._send(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self._drops else body)
        self.close_connection = self.close_connection or self._drops

    def do_GET(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, query, _ = begun
        if "/" not in path:
            self._list(path, query)
            return
        found = self.state.objects.get(path)
        if found is None:
            self._error(404, "NoSuchKey")
            return
        headers = {"ETag": found.tag, "Last_Modified": format_datetime(found.at, usegmt=True)}
        headers |= {"x_amz_meta_lines": found.mark} if found.mark else {}
        if self.headers.get("If-Match", found.tag) != found.tag:
            self._error(412, "PreconditionFailed")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, found.content, **headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(found.content)), len(found.content) - 1)
        span = f"bytes {first}-{last}/{len(found.content)}"
        self._send(206, found.content[first : last + 1], Content_Range=span, **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        with self.state.lock:
            keys = sorted(self.state.objects.keys() - self.state.unlisted)
        rows = ""
        for key in keys:
            within = key.partition("/")[2]
            if key.startswith(f"{bucket}/") and within.startswith(prefix):
                one = self.state.objects[key]
                rows += (
                    f"<Contents><Key>{escape(within)}</Key><Size>{len(one.content)}</Size>"
                    f"<LastModified>{one.at.isoformat().replace('+00:00', '.250Z')}</LastModified>"
                    f"<ETag>{escape(one.tag.strip(chr(34)))}</ETag></Contents>"  # as some servers do, unlike in headers
                )
        self._send(
            200,
            f"<?xml version='1.0'?><ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}"
            "</ListBucketResult>".encode(),
        )

    def do_PUT(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, query, body = begun
        if "uploadId" in query:
            with self.state.lock:
                self.state.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            self._send(200, b"", ETag=f'"{md5(body, usedforsecurity=False).hexdigest()}"')
            return
        if self.headers.get("If-None-Match") == "*" and path in self.state.objects:
            self._error(412, "PreconditionFailed")
            return
        self.state.put(path, body, self.headers.get(_MARK, ""))
        self._send(200, b"", ETag=self.state.objects[path].tag)

    def do_POST(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, query, body = begun
        if "delete" in query:
            keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for key in keys:
                self.state.objects.pop(f"{path}/{unescape(key)}", None)
            rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._send(200, f"<DeleteResult>{rows}</DeleteResult>".encode())
            return
        if "uploads" in query:
            with self.state.lock:
                self.state.begun += 1
                name = f"{path}@{self.state.begun}"
                self.state.uploads[name] = {}
                self.state.marks[name] = self.headers.get(_MARK, "")
            text = f"<InitiateMultipartUploadResult><UploadId>{escape(name)}</UploadId></InitiateMultipartUploadResult>"
            self._send(200, text.encode())
            return
        if query["uploadId"][0] not in self.state.completed:  # else its answer was lost, and it is asked again
            parts = self.state.uploads.pop(query["uploadId"][0])
            numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", body.decode())]
            mark = self.state.marks[query["uploadId"][0]]
            self.state.put(path, b"".join(parts[number] for number in numbers), mark)
            self.state.completed.add(query["uploadId"][0])
        tag = escape(self.state.objects[path].tag)
        text = f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>"
        self._send(200, text.encode())

    def do_DELETE(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, query, _ = begun
        if "uploadId" in query:
            self.state.uploads.pop(query["uploadId"][0], None)
        else:
            self.state.objects.pop(path, None)
        self._send(204, b"")
