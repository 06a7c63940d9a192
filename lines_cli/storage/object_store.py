"""Objects in a store (`s3://`, `gs://`, `az://`): listed, read by ranges, known by size and time, written, removed. The
only user of obstore, which is imported when a URL is first asked for.

Credentials, region and endpoint are what obstore finds: the variables in the environment that the stores' own tools
read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...), or the machine's role. What a server
cannot do at the moment, obstore asks it for again, for a while.

A file's name in a plan is a path; a URL made one (`s3:/bucket/name`) is known by its scheme.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, TypeVar

from lines_cli.errors import ChangedInputError, CheckpointError, OutputError

_URL = re.compile(r"(s3|gs|az):/{1,2}(?P<bucket>[^/\s]+)(?:/+(?P<key>.*?))?/*", re.DOTALL)
_GIVEN = re.compile(r"(?:s3|gs|az)://.*", re.DOTALL)
_PATIENCE = 60  # seconds for which what may pass is asked again
_TIMEOUT = "30s"  # of one request
_TIMEOUT_OF_PARTS = "300s"  # four parts of 16 MiB at once: a line of 2 Mbit/s
_INSTALL = "Install obstore, which reads objects: the extra `objects`."
_CREDENTIALS = (
    "Credentials are found where the store's own tools find them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "AWS_ENDPOINT_URL for a server of your own, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME; or the "
    "machine's role."
)


def is_url(name: str) -> bool:
    """Whether a name, as a person gives it, is that of something in a store."""
    return _GIVEN.fullmatch(name) is not None


def url_of(path: Path | str) -> str | None:
    """The URL that a path stands for; None where it is a path."""
    found = _URL.fullmatch(str(path))
    if found is None:
        return None
    return f"{found[1]}://{found['bucket']}" + (f"/{found['key']}" if found["key"] else "")


class ObjectPath(PosixPath):
    """Where something lies in a store, or is to lie: a path by its parts, shown as the URL that it stands for."""

    def __str__(self) -> str:
        text = super().__str__()
        return url_of(text) or text

    def is_absolute(self) -> bool:
        """It is: it counts from no folder."""
        return True

    def resolve(self, strict: bool = False) -> ObjectPath:  # noqa: ARG002 - as of a path
        """It leads nowhere else."""
        return self


def placed_at(name: str | Path) -> Path:
    """A path, or the place in a store whose URL it is."""
    return ObjectPath(name) if is_url(str(name)) else Path(name)


def real_name(path: Path) -> str:
    """The one name of a file: its real path, or its URL."""
    return url_of(path) or os.path.realpath(path)


@lru_cache(maxsize=64)
def _store(bucket: str, timeout: str = _TIMEOUT) -> Any:
    try:
        import obstore  # noqa: F401 - which is asked for its errors
        from obstore.store import from_url
    except ImportError as error:
        raise CheckpointError(f"{bucket}: obstore is not installed", hint=_INSTALL) from error
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    plain = endpoint.startswith("http://") and bucket.startswith("s3:")
    options: Any = {"timeout": timeout, **({"allow_http": True} if plain else {})}
    retry: Any = {"max_retries": 20, "retry_timeout": timedelta(seconds=_PATIENCE)}
    with _explained(bucket):
        return from_url(bucket, client_options=options, retry_config=retry)


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _split(url: str, timeout: str = _TIMEOUT) -> tuple[Any, str]:
    found = _URL.fullmatch(url)
    if found is None:
        raise CheckpointError(f"{url}: not the URL of anything in a bucket", hint="As in s3://bucket/folder.")
    return _store(f"{found[1]}://{found['bucket']}", timeout), found["key"] or ""


@contextmanager
def _explained(url: str, *, verb: str = "read") -> Iterator[None]:
    """Turn what the store's client raises into a refusal that names the URL and the next step.

    Raises:
        CheckpointError: what went wrong, in words.
        ChangedInputError: the object is another than it was.
    """
    from obstore import exceptions

    try:
        yield
    except exceptions.PreconditionError as error:
        raise ChangedInputError(
            f"{url} was replaced while lines was reading it", hint="Run it again when nothing writes to it."
        ) from error
    except (exceptions.NotFoundError, FileNotFoundError) as error:
        what = "there is no such bucket" if "NoSuchBucket" in str(error) else "there is no such object"
        raise CheckpointError(f"{url}: {what}", hint="Check the spelling, and the region or endpoint.") from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
        raise CheckpointError(f"{url}: the store refuses access", hint=_CREDENTIALS) from error
    except (exceptions.BaseError, OSError, ValueError) as error:
        text, hint = str(error), None
        if "NoSuchBucket" in text or "404 Not Found" in text:
            raise CheckpointError(
                f"{url}: there is no such bucket", hint="Check the spelling, and the region or endpoint."
            ) from error
        if re.search(r"\b40[13] (?:Forbidden|Unauthorized)", text):
            raise CheckpointError(f"{url}: the store refuses access", hint=_CREDENTIALS) from error
        if "credential" in text.lower() or "169.254" in text:
            hint = _CREDENTIALS
        raise CheckpointError(f"{url}: the object cannot be {verb}: {_first_line(error)}", hint=hint) from error


@contextmanager
def asked_of_the_store() -> Iterator[None]:
    """What a store refuses, as a refusal of the destination."""
    try:
        yield
    except CheckpointError as error:
        raise OutputError(error.message, hint=error.hint) from error


def _first_line(error: BaseException) -> str:
    """What went wrong, without the XML and the debugging text behind it."""
    text = str(error).partition("\n\nDebug source")[0]
    return re.sub(r"<\?xml.*", "", text, flags=re.DOTALL).strip().rstrip(":") or type(error).__name__


_Answer = TypeVar("_Answer")


def _patiently(ask: Callable[[], _Answer], *, again: Callable[[], bool] = lambda: True) -> _Answer:
    """An answer; where it breaks off in its middle, which obstore gives up at, it is asked for again.

    Args:
        ask: asks for it.
        again: whether that still can be done.
    """
    from obstore.exceptions import GenericError

    for left in range(_BROKEN_OFF, -1, -1):
        try:
            return ask()
        except GenericError as error:
            if not left or "response body" not in str(error) or not again():
                raise
    raise AssertionError


_BROKEN_OFF = 2


_MARK = "lines"  # what objects are marked by: metadata of this name


class Stored(NamedTuple):
    """An object, short of its content: enough to see that it is still the same. Lists may give its time in fractions of
    a second, or its tag without quotes, and the object itself not.
    """

    nbytes: int
    mtime_ns: int
    tag: str


def _stored(meta: Any) -> Stored:
    seconds = int(meta["last_modified"].timestamp())
    return Stored(int(meta["size"]), seconds * 1_000_000_000, (meta["e_tag"] or "").strip('"'))


def listed(url: str) -> dict[str, Stored]:
    """What lies below a URL that stands for a folder, by names relative to it. Empty where nothing does.

    Raises:
        CheckpointError: the store cannot be asked, or there is no such bucket.
    """
    store, prefix = _split(url)
    import obstore

    with _explained(url):
        found = _patiently(lambda: obstore.list(store, prefix=prefix or None).collect())
    start = len(prefix) + 1 if prefix else 0
    return {one["path"][start:]: _stored(one) for one in found if one["path"] != prefix}


def is_anything_below(url: str) -> bool:
    """Whether anything lies below a URL: one request, however much there is.

    Raises:
        CheckpointError: the store cannot be asked, or there is no such bucket.
    """
    store, prefix = _split(url)
    import obstore

    with _explained(url):
        page = _patiently(lambda: next(iter(obstore.list(store, prefix=prefix or None, chunk_size=2)), ()))
        return any(one["path"] != prefix for one in page)


def looked_up(url: str) -> Stored | None:
    """An object; None where there is none.

    Raises:
        CheckpointError: the store cannot be asked, or refuses access.
    """
    store, key = _split(url)
    import obstore
    from obstore.exceptions import NotFoundError

    with _explained(url):
        try:
            return _stored(obstore.head(store, key))
        except (NotFoundError, FileNotFoundError):
            return None


def marked(url: str) -> tuple[Stored, str] | None:
    """An object, and the mark that it was written with, '' where with none; None where there is no object.

    Raises:
        CheckpointError: the store cannot be asked, or refuses access.
    """
    store, key = _split(url)
    import obstore
    from obstore.exceptions import NotFoundError

    with _explained(url):
        try:
            found = obstore.get(store, key, options={"head": True})
        except (NotFoundError, FileNotFoundError):
            return None
        return _stored(found.meta), str(found.attributes.get(_MARK, ""))


def content_of(url: str, most: int) -> bytes:
    """The content of a small object.

    Raises:
        CheckpointError: it cannot be read, or has more than `most` bytes.
    """
    store, key = _split(url)
    import obstore

    def ask() -> bytes:
        found = obstore.get(store, key)
        if found.meta["size"] > most:
            raise CheckpointError(f"{url}: it has {found.meta['size']:,} bytes; at most {most:,} are read")
        return bytes(found.bytes())

    with _explained(url):
        return _patiently(ask)


def content_if_there(url: str, most: int) -> bytes | None:
    """The content of a small object; None where there is none.

    Raises:
        CheckpointError: it cannot be read, has more than `most` bytes, or there is no such bucket.
    """
    from obstore.exceptions import NotFoundError

    try:
        return content_of(url, most)
    except CheckpointError as error:
        if isinstance(error.__cause__, (NotFoundError, FileNotFoundError)) and "NoSuchBucket" not in str(
            error.__cause__
        ):
            return None
        raise


class RemoteFile:
    """An object, read by ranges; one that is replaced meanwhile is noticed, and refused.

    Args:
        url: which.

    Attributes:
        nbytes: its size.
        mtime_ns: when it was last written, in nanoseconds since 1970.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store, self._key = _split(url)
        import obstore

        with _explained(url):
            meta: Any = obstore.head(self._store, self._key)
        self.nbytes, self.mtime_ns, self._tag = int(meta["size"]), nanoseconds(meta["last_modified"]), meta["e_tag"]

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` (bytes) from `offset` on; returns how many bytes there were, fewer only at the end."""
        content = self.range(offset, min(offset + len(view), self.nbytes))
        view[: len(content)] = content
        return len(content)

    def range(self, start: int, end: int) -> memoryview:
        """The bytes from `start` up to `end`, which lie within it."""
        import obstore

        if start >= end:
            return memoryview(b"")
        options: Any = {"range": (start, end), **({"if_match": self._tag} if self._tag else {})}
        with _explained(self.url):
            return memoryview(obstore.get(self._store, self._key, options=options).bytes())

    def state(self) -> tuple[int, int]:
        """Its size and time now."""
        now = RemoteFile(self.url)
        return now.nbytes, now.mtime_ns


def nanoseconds(moment: datetime) -> int:
    """Since 1970."""
    return int(moment.timestamp() * 1_000_000) * 1000


def put_file(url: str, path: Path) -> None:
    """Write a file as an object: a large one in parts, of which nothing is left where that fails.

    Raises:
        CheckpointError: the store does not take it.
        OSError: the file cannot be read.
    """
    store, key = _split(url, _TIMEOUT_OF_PARTS)
    import obstore

    with open(path, "rb") as file, _explained(url, verb="written"):
        obstore.put(store, key, file, chunk_size=PART, max_concurrency=AT_ONCE)


def put_content(url: str, content: bytes, *, new: bool = False, mark: str = "") -> bool:
    """Write a small object, in one request.

    Args:
        url: which.
        content: what it is to hold.
        new: only if there is none.
        mark: tells whose it is (`marked`).

    Returns:
        Whether it holds that now; `new` leaves another one as it is.

    Raises:
        CheckpointError: the store does not take it.
    """
    store, key = _split(url)
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError, NotSupportedError

    how: Any = {"use_multipart": False, **_with_mark(mark)}
    with _explained(url, verb="written"):
        try:
            obstore.put(store, key, content, mode="create" if new else "overwrite", **how)
        except AlreadyExistsError:  # it may be this one, whose answer was lost
            there = looked_up(url)
            is_of_that_size = there is not None and there.nbytes == len(content)
            return is_of_that_size and content_if_there(url, len(content)) == content
        except (NotSupportedError, NotImplementedError, GenericError) as error:
            if isinstance(error, GenericError) and "501 Not Implemented" not in str(error):
                raise
            # Not every store knows conditions.
            obstore.put(store, key, content, **how)
    return True


def _with_mark(mark: str) -> dict[str, Any]:
    return {"attributes": {_MARK: mark}} if mark else {}


def put_pieces(url: str, pieces: Iterator[bytes], nbytes: int, *, mark: str = "") -> str:
    """Write an object in parts while its bytes are made: each part is sent as soon as it is whole. If `pieces` raises
    anything, what was sent is removed, and that is raised.

    Args:
        url: which.
        pieces: its bytes, in order.
        nbytes: how many they are.
        mark: tells whose it is (`marked`).

    Returns:
        The tag of the object; '' where the store does not say.

    Raises:
        CheckpointError: the store does not take it.
    """
    store, key = _split(url, _TIMEOUT_OF_PARTS)
    import obstore

    begun = False

    def noted() -> Iterator[bytes]:
        nonlocal begun
        for piece in pieces:
            begun = True
            yield piece

    def send() -> Any:
        how: Any = {"chunk_size": part_of(nbytes), "max_concurrency": AT_ONCE, **_with_mark(mark)}
        return obstore.put(store, key, noted(), use_multipart=True, **how)

    with _explained(url, verb="written"):
        return (_patiently(send, again=lambda: not begun)["e_tag"] or "").strip('"')


def part_of(nbytes: int) -> int:
    """Bytes of a part of an upload of so many bytes: more than PART only where there would be too many parts."""
    return PART if nbytes <= PART * _MOST_PARTS else -(-nbytes // _MOST_PARTS // _WHOLE) * _WHOLE


def remove(urls: Sequence[str]) -> None:
    """Remove objects, those that are not there included.

    Raises:
        CheckpointError: the store does not remove them.
    """
    import obstore

    if urls:
        keys = [_split(url) for url in urls]
        with _explained(urls[0], verb="removed"):
            _patiently(lambda: obstore.delete(keys[0][0], [key for _, key in keys]))


PART = 16 * 2**20
"""Bytes of a part of an upload: at most 10,000 of them make an object."""
_MOST_PARTS = 10_000
_WHOLE = 4 * 2**20  # bytes that a larger part is a multiple of
AT_ONCE = 4
"""Parts of one object that are on their way at once."""
