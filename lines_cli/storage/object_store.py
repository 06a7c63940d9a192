"""Objects in a store (`s3://`, `gs://`, `az://`): listed, read by ranges, and known by size and time. The only user of
obstore, which is imported when a URL is first asked for.

Credentials, region and endpoint are what obstore finds: the variables in the environment that the stores' own tools
read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...), or the machine's role. What a server
cannot do at the moment, obstore asks it for again, for a while.

A file's name in a plan is a path; a URL made one (`s3:/bucket/name`) is known by its scheme.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from lines_cli.errors import ChangedInputError, CheckpointError

_URL = re.compile(r"(s3|gs|az):/{1,2}(?P<bucket>[^/\s]+)(?:/+(?P<key>.*?))?/*", re.DOTALL)
_GIVEN = re.compile(r"(?:s3|gs|az)://.*", re.DOTALL)
_PATIENCE = 60  # seconds for which what may pass is asked again
_TIMEOUT = "30s"  # of one request
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


def real_name(path: Path) -> str:
    """The one name of a file: its real path, or its URL."""
    return url_of(path) or os.path.realpath(path)


@lru_cache(maxsize=64)
def _store(bucket: str) -> Any:
    try:
        import obstore  # noqa: F401 - which is asked for its errors
        from obstore.store import from_url
    except ImportError as error:
        raise CheckpointError(f"{bucket}: obstore is not installed", hint=_INSTALL) from error
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    plain = endpoint.startswith("http://") and bucket.startswith("s3:")
    options: Any = {"timeout": _TIMEOUT, **({"allow_http": True} if plain else {})}
    retry: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=_PATIENCE)}
    with _explained(bucket):
        return from_url(bucket, client_options=options, retry_config=retry)


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _split(url: str) -> tuple[Any, str]:
    found = _URL.fullmatch(url)
    if found is None:
        raise CheckpointError(f"{url}: not the URL of anything in a bucket", hint="As in s3://bucket/folder.")
    return _store(f"{found[1]}://{found['bucket']}"), found["key"] or ""


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


def _first_line(error: BaseException) -> str:
    """What went wrong, without the XML and the debugging text behind it."""
    text = str(error).partition("\n\nDebug source")[0]
    return re.sub(r"<\?xml.*", "", text, flags=re.DOTALL).strip().rstrip(":") or type(error).__name__


def listed(url: str) -> dict[str, int]:
    """What lies below a URL that stands for a folder: names relative to it, and sizes. Empty where nothing does.

    Raises:
        CheckpointError: the store cannot be asked, or there is no such bucket.
    """
    store, prefix = _split(url)
    import obstore

    with _explained(url):
        found = obstore.list(store, prefix=prefix or None).collect()
    start = len(prefix) + 1 if prefix else 0
    return {one["path"][start:]: int(one["size"]) for one in found if one["path"] != prefix}


def content_of(url: str, most: int) -> bytes:
    """The content of a small object.

    Raises:
        CheckpointError: it cannot be read, or has more than `most` bytes.
    """
    store, key = _split(url)
    import obstore

    with _explained(url):
        found = obstore.get(store, key)
        if found.meta["size"] > most:
            raise CheckpointError(f"{url}: it has {found.meta['size']:,} bytes; at most {most:,} are read")
        return bytes(found.bytes())


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
    store, key = _split(url)
    import obstore

    with open(path, "rb") as file, _explained(url, verb="written"):
        obstore.put(store, key, file, chunk_size=_PART, max_concurrency=_AT_ONCE)


_PART = 16 * 2**20  # bytes of a part of an upload: at most 10,000 of them, so 160 GB
_AT_ONCE = 4
