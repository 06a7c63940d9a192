"""The output in the making, in an object store: weights become objects as they are made, and what a reader looks for
(config, index, recipe) comes last, when all else is there. Nothing is renamed, and nothing lies on this disk.

    s3://bucket/.out.lines/
        run        which run it is, its files, and what stood at the destination when it began
        measured   what it has measured
        down       that what stood there is removed
        0, 1, ...  of each weight file that is whole: the object, and the digests of its blocks
        parts/     what parts of a divided run have done (`object_parts`)
        finished   that the output is in place, before anything of this is removed

What it puts at the destination bears a mark, which `run` names: so a file that became whole right before a kill is
known, too. What neither bears it nor is written down here was put there by others, and is neither replaced nor removed.
`run` bears it as well: a store that drops it is refused.

Nothing tells whether a run is at work there or was killed. So nothing of that is discarded unasked: the same run goes
on from it (`--resume`), or it is removed (`lines clean`). Each run that begins or goes on puts a word of its own into
`run`; one that does not find it there any more ends, and touches nothing. So does `lines clean`. A run looks once more
when its last file is in place, and who takes its work over looks at the destination after that: one of them sees the
other.
"""

from __future__ import annotations

import re
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import NamedTuple

from lines_cli.errors import OF_NO_USE, Aftermath, CheckpointError, OutputError, as_argument, attach_aftermath, some
from lines_cli.storage.destination import Entry, is_noise, is_one_file, refuse_to_replace
from lines_cli.storage.digest import DIGEST_BLOCK, FileRecord, is_part, is_step, record_of, tree_digest
from lines_cli.storage.journal import JournalContents, Json, WrittenRange, line_of, range_of, whole_lines, written_line
from lines_cli.storage.names import RECIPE, turn
from lines_cli.storage.object_store import (
    ObjectPath,
    RemoteFile,
    Stored,
    asked_of_the_store,
    content_if_there,
    is_anything_below,
    listed,
    looked_up,
    marked,
    put_content,
    remove,
    url_of,
)
from lines_cli.storage.part_records import ROOM, ObjectShelf, done_in, is_record
from lines_cli.storage.staging import Unfinished, refuse_another
from lines_cli.storage.uploads import Upload, Uploads

_RUN, _MEASURED, _DOWN, _FINISHED = "run", "measured", "down", "finished"
_OF_FILE = re.compile(r"\d{1,6}")
_OURS = re.compile(rf"{_RUN}|{_MEASURED}|{_DOWN}|{_FINISHED}|{_OF_FILE.pattern}")
_LARGEST = 2**30  # bytes of what a run has written down
_THREADS = 4


def _url(output: Path) -> str:
    found = url_of(output)
    assert found is not None
    return found


def room_of(output: Path) -> ObjectPath:
    """Where a run writes down what it has done: beside the destination."""
    folder, _, name = _url(output).rpartition("/")
    return ObjectPath(f"{folder}/.{name}.lines")


# --- may it go there? ---


def is_taken(output: Path) -> bool:
    """Whether anything lies there."""
    with asked_of_the_store():
        return looked_up(_url(output)) is not None if is_one_file(output) else is_anything_below(_url(output))


def check_destination(
    output: Path, *, inputs: Iterable[Path], force: bool, ours: Collection[str] | None = None, may_exist: bool = False
) -> None:
    """Refuse a destination that is taken, is one of the inputs or holds one; arguments as for one on a disk.

    Raises:
        OutputError: with what is in the way; or the store cannot be asked.
    """
    target = _url(output)
    for path in inputs:
        source = url_of(path)
        if source is not None and (source == target or source.startswith(f"{target}/")):
            raise OutputError(
                f"{output}: the output would replace an input, {source}", hint="Choose another destination with -o."
            )
    if may_exist or not is_taken(output):
        if may_exist:
            is_taken(output)  # whether the store answers at all
        return
    if _is_begun(output):  # by a run whose work is gone on from, or is refused, when this one begins
        return
    if not force:
        hint = "Choose another destination with -o, or replace it with --force."
        raise OutputError(f"{output} exists", hint=hint)
    if ours is not None:
        _refuse_to_replace(output, there_at(output), ours)


def _is_begun(output: Path) -> bool:
    with asked_of_the_store():
        return looked_up(f"{room_of(output)}/{_RUN}") is not None


def sent_url(output: Path, name: str) -> str:
    """What a weight file of an output becomes."""
    return _url(output) if is_one_file(output) else f"{_url(output)}/{name}"


class Begun(NamedTuple):
    """A run that has an output in the making.

    Attributes:
        line: what it says of itself.
        names: its weight files.
        mark: what it marks its objects by.
    """

    line: bytes
    names: tuple[str, ...]
    mark: str


def begun_of(output: Path) -> Begun | None:
    """The run that has an output in the making; None where none is, or it is finished.

    Raises:
        OutputError: the store cannot be asked, or this was not written by lines.
    """
    with asked_of_the_store():
        line, finished = (content_if_there(f"{room_of(output)}/{name}", _LARGEST) for name in (_RUN, _FINISHED))
    if line is None:
        return None
    try:
        ((told, _),) = whole_lines(line)
        begun = Begun(line, tuple(str(name) for name, _, _ in told["run"]["outputs"]), str(told["mark"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(output) from error
    return None if finished is not None and _finished_by(finished) == begun.mark else begun


def _finished_by(content: bytes) -> str | None:
    """The mark of the run that has said there that its output is in place."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for line, _ in whole_lines(content):
            return str(line["finished"])
    return None


def taken_over(output: Path, line: bytes | None) -> bool:
    """Whether the work there is no longer that of the run that says so of itself."""
    with asked_of_the_store():
        return content_if_there(f"{room_of(output)}/{_RUN}", _LARGEST) != line


def _damaged(output: Path) -> OutputError:
    return OutputError(
        f"{room_of(output)}/{_RUN} was not written by lines, or is damaged",
        hint="If you need nothing in it, remove these objects by the store's own tools, and run the command again.",
    )


def refuse_unfinished(output: Path, resumes: str = "") -> None:
    """Refuse to begin where another run has begun: nothing tells whether it is at work.

    Args:
        output: the destination.
        resumes: how to go on from it, a sentence, if not by --resume.

    Raises:
        OutputError: what to do.
    """
    raise OutputError(
        f"{room_of(output)} holds the unfinished work of a run that was ended, or that is at work now",
        hint=f"{resumes or 'To go on from it, add --resume. '}If none is at work, this removes it: "
        f"lines clean {as_argument(output)}",
    )


def there_at(output: Path) -> dict[str, Stored]:
    """What lies at a destination, by names relative to it; a file by itself has the name ''."""
    with asked_of_the_store():
        if is_one_file(output):
            found = looked_up(_url(output))
            return {} if found is None else {"": found}
        return {name: one for name, one in listed(_url(output)).items() if not is_noise(name)}


def _refuse_to_replace(output: Path, there: Mapping[str, Stored], ours: Collection[str]) -> None:
    if is_one_file(output) and there and not _looks_like_weights(_url(output)):
        hint = "Choose another destination with -o."
        raise OutputError(f"{output} is not a safetensors file; --force will not delete it", hint=hint)
    refuse_to_replace(
        output, {name: Entry(stat.S_IFREG, 0, one.nbytes, one.mtime_ns) for name, one in there.items()}, ours
    )


def _looks_like_weights(url: str) -> bool:
    """Whether an object begins as safetensors does: the length of a header that it has room for, and a brace."""
    with asked_of_the_store():
        file = RemoteFile(url)
        head = bytes(file.range(0, min(9, file.nbytes)))
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= file.nbytes - 8


# --- what an earlier run has left ---


@dataclass
class _Left:
    """What a run has written down.

    Attributes:
        run: which it was; None where that is gone, and the rest is to be removed.
        names: the files that it makes.
        replaces: what stands at the destination since it began, and is to be replaced.
        measured: what it has measured.
        unchanged: as of `JournalContents`.
        files: of each weight file that is whole: the object, and its ranges.
        mark: what its objects bear.
        is_down: what stood there is removed.
        is_finished: it has said that its output is in place.
        sending: weight files that a part was sending which has not come to its end.
        objects: the names of all this, in its room.
    """

    run: Json | None = None
    names: frozenset[str] = frozenset()
    replaces: dict[str, Stored] = field(default_factory=dict)
    measured: Json | None = None
    unchanged: frozenset[int] | None = None
    files: dict[int, tuple[Stored, list[WrittenRange]]] = field(default_factory=dict)
    mark: str = ""
    is_down: bool = False
    is_finished: bool = False
    sending: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    line: bytes = b""

    def made(self, output: Path, there: Mapping[str, Stored]) -> list[str]:
        """What of a destination it has put there: what it has written down, and what bears its mark."""
        if self.run is None:
            return []
        outputs = [name for name, _, _ in self.run["outputs"]]
        known = {outputs[number]: stored for number, (stored, _) in self.files.items()}
        names = {""} if is_one_file(output) else self.names
        maybe = [n for n, found in there.items() if n in names and found not in (known.get(n), self.replaces.get(n))]
        with asked_of_the_store(), ThreadPoolExecutor(_THREADS) as pool:
            is_marked = dict(zip(maybe, pool.map(lambda n: _bears(output, n, self.mark), maybe), strict=True))
        return [n for n, found in there.items() if is_marked.get(n, known.get(n) == found)]

    def is_in_place(self, output: Path, there: Mapping[str, Stored]) -> bool:
        """Whether what it puts there last is there."""
        last = "" if is_one_file(output) else RECIPE
        return bool(self.made(output, {name: found for name, found in there.items() if name == last}))

    def is_over(self, output: Path, there: Mapping[str, Stored]) -> bool:
        """Whether it came to its end, or all but a rest of what it wrote down is gone: nothing that it has put there
        is to be removed.
        """
        return self.run is None or self.is_finished or self.is_in_place(output, there)


def _bears(output: Path, name: str, mark: str) -> bool:
    found = marked(f"{_url(output)}/{name}".rstrip("/"))
    return found is not None and found[1] == mark != ""


def _left(output: Path) -> _Left | None:
    room = room_of(output)
    with asked_of_the_store():
        objects = sorted(listed(str(room)))
        if others := [name for name in objects if not (_OURS.fullmatch(name) or _is_of_a_part(name))]:
            raise OutputError(
                f"{room} holds objects that lines did not put there:\n{some(others)}",
                hint="lines keeps unfinished output there, and removes it then. Move these away, or choose another "
                "destination with -o.",
            )
        left = _Left(objects=objects)
        own = [_RUN, *(name for name in objects if name != _RUN and not _is_of_a_part(name))]  # a list may be late
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda name: content_if_there(f"{room}/{name}", _LARGEST), own))
        content = {name: one for name, one in zip(own, read, strict=True) if one is not None}
        left.objects = sorted({*objects, *content})
    if _RUN not in content:
        return left if objects else None
    try:
        ((told, _),) = whole_lines(content[_RUN])
        left.run, left.names, left.line = dict(told["run"]), frozenset(map(str, told["names"])), content[_RUN]
        left.mark = str(told["mark"])
        left.is_down = _DOWN in content
        if not left.is_down:
            left.replaces = {name: Stored(int(a), int(b), str(c)) for name, (a, b, c) in told["replaces"].items()}
        sizes = [int(nbytes) for _, nbytes, _ in left.run["outputs"]]
        step = left.run["step"]
        if not is_step(step):
            raise ValueError(step)  # noqa: TRY301 - as of what else is wrong there
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(output) from error
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for line, _ in whole_lines(content.get(_MEASURED, b"")):
            left.measured = dict(line["measured"])
    left.is_finished = _finished_by(content.get(_FINISHED, b"")) == left.mark  # else it is of a run before that
    found: dict[int, tuple[Stored, list[WrittenRange]]] = {}
    for name in own:
        if not _OF_FILE.fullmatch(name):
            continue
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
            (first, _), *lines = whole_lines(content[name])
            nbytes, mtime, tag = first["stored"]
            found[int(name)] = Stored(int(nbytes), int(mtime), str(tag)), [range_of(one) for one, _ in lines]
    if any(map(_is_of_a_part, objects)):
        _add_what_parts_did(left, found, output)
    for number, (stored, parts) in found.items():
        with suppress(IndexError):
            whole = sum(len(part.blocks) for part in parts) == -(-sizes[number] // DIGEST_BLOCK)
            if whole and all(is_part(number, part.start, part.blocks, sizes, step) for part in parts):
                left.files[number] = stored, parts
    return left


def _is_of_a_part(name: str) -> bool:
    room, _, record = name.partition("/")
    return room == ROOM and is_record(record)


def _add_what_parts_did(left: _Left, found: dict[int, tuple[Stored, list[WrittenRange]]], output: Path) -> None:
    """What is done of a divided run; what a run has done that went on from it counts before that."""
    shelf = ObjectShelf(room_of(output) / ROOM)
    done = done_in(shelf)
    left.measured, left.unchanged = left.measured or done.measured, done.unchanged
    for number, stored in done.stored.items():
        found.setdefault(number, (Stored(*stored), [part for part in done.written if part.file == number]))
    for name in left.objects:
        if _is_of_a_part(name) and "." in name:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                for line, _ in whole_lines(shelf.read(name.partition("/")[2]) or b""):
                    left.sending += map(str, line["sends"])


def _said_of_uploads(output: Path, left: _Left) -> tuple[str, ...]:
    """That the store may hold what no listing of objects shows."""
    if not left.sending:
        return ()
    kind, _, rest = _url(output).partition("://")
    bucket, _, key = rest.partition("/")
    shows = f" (aws s3api list-multipart-uploads --bucket {bucket} --prefix {key}/)" if kind == "s3" else ""
    may = f"a part was killed, or is at work, while it sent these; the store may hold pieces of that{shows}:"
    return (f"{may}\n{some(sorted(set(left.sending)))}",)


def leftover(output: Path) -> Unfinished | None:
    """What an earlier run has left of this output, or one that is at work, if there is anything.

    Raises:
        OutputError: the store cannot be asked, or there is something else in that place.
    """
    left = _left(output)
    return None if left is None else _unfinished(output, left, is_over=left.is_over(output, there_at(output)))


def _unfinished(output: Path, left: _Left, *, is_over: bool) -> Unfinished:
    total = sum(nbytes for _, nbytes, _ in left.run["outputs"]) if left.run else 0
    written = sum(stored.nbytes for stored, _ in left.files.values())
    said = _said_of_uploads(output, left)
    return Unfinished(room_of(output), written, total, written, False, left.run, is_over, left.measured, said)


def clean(output: Path, *, only_over: bool = False) -> Unfinished | None:
    """Remove what an earlier run has left of this output: the objects that it has put there, and what it wrote down. If
    it is at work still, it ends with an error; with `only_over` nothing of it is removed.

    Raises:
        OutputError: the store refuses, or what is there is not ours.
    """
    left = _left(output)
    if left is not None and not left.is_over(output, there_at(output)):
        if only_over:
            return None
        _claim(output, left)
        left = _left(output)  # all that it wrote down, now that it does no more
    if left is None:
        return None
    there = there_at(output)
    if left.run is None or left.is_over(output, there):
        _discard(output, left)
        return _unfinished(output, left, is_over=True)
    made = left.made(output, there)
    _discard(output, left, made)
    weights = {name for name, _, _ in left.run["outputs"]}
    return replace(
        _unfinished(output, left, is_over=False),
        written=sum(there[name].nbytes for name in made if name in weights),
        nbytes=sum(there[name].nbytes for name in made),
        remarks=(*_said_of_uploads(output, left), *_said_of_what_stays(output, left, there, made)),
    )


def _said_of_what_stays(output: Path, left: _Left, there: Mapping[str, Stored], made: Collection[str]) -> Iterator[str]:
    """What is at the destination still, once all that a run has put there is removed."""
    if stays := sorted(n for n, one in there.items() if n not in made and left.replaces.get(n) != one):
        yield f"{output} holds what this run had not put there; it stays:\n{some(stays)}"
    if not is_one_file(output) and (left.is_down or left.replaces.keys() - there.keys()):
        rest = sorted(left.replaces.keys() & there.keys())
        yield f"the old {output} was removed before the new one was whole" + (
            f", but for these files of it, which stay:\n{some(rest)}" if rest else ""
        )


def _claim(output: Path, left: _Left, *, new: bool = False) -> bool:
    """Say that the work there is this command's from now on: another one that is at it finds that out, and ends. If it
    has put its last file into place before that, who looks at the destination now finds it.

    Args:
        output: the destination.
        left: the work.
        new: only if there is none.

    Returns:
        Whether it is this command's now.
    """
    told = {"run": left.run, "names": sorted(left.names), "replaces": left.replaces, "mark": left.mark}
    left.line = written_line({**told, "by": token_hex(8)})
    with asked_of_the_store():
        return put_content(f"{room_of(output)}/{_RUN}", left.line, new=new, mark=left.mark)


def _discard(output: Path, left: _Left, made: Iterable[str] = ()) -> None:
    """Remove what a run wrote down, and before that of what it has made what is not kept. Wherever this ends, what is
    left tells whose it is and whether it is over: these two go last.
    """
    room = room_of(output)
    with asked_of_the_store():
        _remove_in_turn(_url(output), made)
        remove([f"{room}/{name}" for name in left.objects if name not in (_RUN, _FINISHED)])
        for last in (_RUN, _FINISHED):
            remove([f"{room}/{name}" for name in left.objects if name == last])


def _remove_in_turn(url: str, names: Iterable[str]) -> None:
    """Remove objects below a URL: first what a reader looks for."""
    names = sorted(names, key=turn)
    last = [name for name in names if turn(name)[0] >= turn("config.json")[0]]
    remove([f"{url}/{name}".rstrip("/") for name in reversed(last)])
    remove([f"{url}/{name}".rstrip("/") for name in names if name not in last])


# --- the output in the making ---


class ObjectStaging:
    """The output in the making, as `Staging` is on a disk; arguments and attributes are the same.

    A folder's weights are objects as soon as they are whole, and its config, index and recipe come last. A file by
    itself appears in one step, at the end, and takes the place of one that is there. A folder that is there has to go
    before the first of its weights is replaced: that is when all is measured, and its recipe goes first.
    """

    def __init__(
        self,
        output: Path,
        run: Json,
        names: Iterable[str],
        *,
        replaceable: Callable[[], Collection[str]] | None = None,
        resume: bool = False,
    ) -> None:
        self.output, self._run, self._names, self._resume = output, run, frozenset(names), resume
        self._replaceable = replaceable
        self._target, self.folder, self._one_file = _url(output), room_of(output), is_one_file(output)
        self._beside: dict[str, bytes] = {}
        self._files: dict[str, Upload] = {}
        self._uploads = Uploads(before_done=self._refuse_to_replace)
        self._left = _Left()
        self._in_place, self._gone, self._begun, self._lost = False, False, False, False
        self._journal: ObjectJournal | None = None
        self.contents: JournalContents | None = None
        self.remarks: list[str] = []

    def __enter__(self) -> ObjectStaging:
        left, there = _left(self.output), there_at(self.output)
        if left is not None and left.is_over(self.output, there):
            _discard(self.output, left)
            left = None
        if left is not None:
            self._refuse_unless_of_this_run(left)
        self._look_at_old(left, there)
        if left is None:
            left = self._began(there)
        else:
            left = self._claimed(left)
            self._go_on(left)
        self._left, self._begun, self._uploads.mark = left, True, left.mark
        self._journal = ObjectJournal(self)
        self._journal.empty = not (left.files or left.measured is not None or any(map(_is_of_a_part, left.objects)))
        return self

    def _began(self, there: Mapping[str, Stored]) -> _Left:
        """Say that this run is at work.

        Raises:
            OutputError: another has begun meanwhile; or the store does not keep marks.
        """
        left = _Left(self._run, self._names, dict(there), objects=[_RUN], mark=token_hex(16))
        if not _claim(self.output, left, new=True):
            raise OutputError(f"another run has begun to write {self.output}", hint="Wait until it is done.")
        with asked_of_the_store():
            found = marked(f"{self.folder}/{_RUN}")
        if found is not None and not found[1]:
            _discard(self.output, left)
            raise OutputError(
                f"{self.output}: the store drops the metadata of objects, by which lines tells its own from others'",
                hint="Write the output to a disk, and then: lines push.",
            )
        return left

    def _claimed(self, left: _Left) -> _Left:
        """What an earlier run has left, now that it is this one's, and no other adds to it.

        Raises:
            OutputError: another run has taken it, or has come to its end meanwhile.
        """
        _claim(self.output, left)
        now = _left(self.output)
        if now is None or now.line != left.line:
            raise OutputError(f"another run has begun to write {self.output}", hint="Wait until it is done.")
        if now.is_over(self.output, there_at(self.output)):
            _discard(self.output, now)
            raise OutputError(
                f"another run has just finished {self.output}", hint="It is in place: there is nothing left to do."
            )
        return now

    def _refuse_unless_of_this_run(self, left: _Left) -> None:
        """Refuse to go on from what a run has left, if that was not asked for, or it makes something else.

        Raises:
            OutputError: what to do.
        """
        assert left.run is not None
        if not self._resume:
            refuse_unfinished(self.output)
        try:
            refuse_another(self._run, left.run, self.folder, self.output)
        except OutputError as error:  # with --force, too: it may be at work
            removes = f"lines clean {as_argument(self.output)}"
            raise OutputError(error.message, hint=f"If that run is not at work, remove it: {removes}") from error

    def _look_at_old(self, left: _Left | None, there: Mapping[str, Stored]) -> None:
        """Refuse to replace what is not ours, or has come since an earlier run began.

        Raises:
            OutputError: what that is.
        """
        old = there
        if left is not None:
            own = left.made(self.output, there)
            old = {name: found for name, found in there.items() if name not in own}
            if new := sorted(name for name, found in old.items() if left.replaces.get(name) != found):
                names = [name or str(self.output) for name in new]
                raise OutputError(
                    f"{self.output} has changed since the interrupted run began:\n{some(names)}",
                    hint="Move it away, or choose another destination with -o.",
                )
        if old and self._replaceable is None:
            raise OutputError(f"{self.output} exists", hint="Replace it with --force, or choose another with -o.")
        if old and left is None and self._replaceable is not None:  # else it was asked when the run began
            _refuse_to_replace(self.output, old, self._replaceable())
            if not self._one_file and RECIPE not in old:
                self.remarks.append(f"{self.output} was replaced; lines had not written it")

    def _go_on(self, left: _Left) -> None:
        """Take over what an earlier run has finished, as far as it is what that run has written down."""
        assert left.run is not None
        there = there_at(self.output)
        names = [name for name, _, _ in left.run["outputs"]]
        left.files = {n: one for n, one in left.files.items() if there.get(names[n]) == one[0] and not self._one_file}
        parts = [part for _, own in left.files.values() for part in own]
        parts.sort(key=lambda part: (part.file, part.start))  # so that sums are those of one run
        self.contents = JournalContents(
            left.run, left.names, None, left.measured, tuple(parts), None, 0, unchanged=left.unchanged
        )

    @property
    def step(self) -> int:
        """Bytes of a file that are written at a time: those of the run that is resumed, so that its parts fit."""
        return int((self.contents.run if self.contents else self._run)["step"])

    @property
    def journal(self) -> ObjectJournal:
        """Where what is finished is written down."""
        assert self._journal is not None
        return self._journal

    def create(self, name: str, nbytes: int) -> Upload:
        """A file of `nbytes`, which becomes an object when all its bytes are there."""
        if not self._files:
            self._take_down()
        done = self._left.files.get(len(self._files))
        url = sent_url(self.output, name)
        file = self._uploads.add(url, nbytes, done=done[0] if done else None, held=self._one_file)
        self._files[name] = file
        return file

    def _take_down(self) -> None:
        """Remove an old output: nobody is to find parts of two. A file by itself is replaced in one step, later."""
        if self._one_file:
            return
        there = there_at(self.output)
        self._refuse_arrivals(there)
        if not self._left.replaces:
            return
        old = [name for name, found in there.items() if self._left.replaces.get(name) == found]
        self.refuse_taken_over()
        self._gone = bool(old)
        try:
            with asked_of_the_store():
                _remove_in_turn(self._target, old)
        except OutputError:
            with suppress(OutputError):
                self._gone = not {*old} <= there_at(self.output).keys()
            raise
        self.wrote_down(_DOWN, [])
        self._left.replaces = {}

    def _refuse_arrivals(self, there: Mapping[str, Stored]) -> None:
        """Refuse what neither this run has put there, nor stood there when it began."""
        known = {name: file.done for name, file in self._files.items()}
        rest = {n: one for n, one in there.items() if one not in (known.get(n), self._left.replaces.get(n))}
        self._refuse({*rest} - {*self._left.made(self.output, rest)})

    def _refuse_to_replace(self, url: str) -> None:
        """Refuse to complete a file whose work was taken over, or whose name another program has given meanwhile."""
        self.refuse_taken_over()
        name = "" if self._one_file else url.removeprefix(f"{self._target}/")
        with asked_of_the_store():
            found = marked(url)
        if found is not None and found[1] != self._left.mark and found[0] != self._left.replaces.get(name):
            self._refuse([name or url])

    def _refuse(self, new: Iterable[str]) -> None:
        if new := sorted(new):
            raise OutputError(
                f"{self.output} has changed while the new output was written:\n{some(new)}",
                hint="Move it away. Then the same command with --resume continues from what is finished.",
            )

    def add(self, name: str, content: bytes) -> None:
        """Keep one of the files beside the weights until these are there."""
        self._beside[name] = content

    def keep(self) -> None:
        """What there is so far is worth going on from."""
        self.journal.empty = False

    def sync(self) -> None:
        """Return when all weights are objects, and are written down as finished."""
        for _ in self._uploads.wait():
            self.journal.note()

    def stop(self) -> None:
        """The run comes to its end: nothing that is to be written waits any more."""
        self._uploads.stop()

    @contextmanager
    def opened(self, name: str, head: bytes) -> Iterator[Path]:
        """A weight file as another program opens it, to read its header: that, and holes in place of the weights."""
        with tempfile.TemporaryDirectory(prefix="lines-") as folder:
            path = Path(folder, "header.safetensors")
            with open(path, "xb") as file:
                file.write(head)
                file.truncate(self._files[name].nbytes)
            yield path

    def digest(self, name: str) -> str:
        """The digest of a file, read back. What is not in the store yet is what was given."""
        if name in self._beside:
            return record_of(self._beside[name]).digest
        return digest_of_object(self._files[name].url)

    def publish(self, at_last: Callable[[], None] = lambda: None) -> None:
        """Put what is left into place: what stands beside the weights, then what a reader looks for, the recipe last.

        Args:
            at_last: is called before that, when all that takes time is done.

        Raises:
            OutputError: something has come to the destination meanwhile; or the store refuses.
        """
        self.sync()
        at_last()
        with asked_of_the_store():
            self.refuse_taken_over()
            there = there_at(self.output)
            self._refuse_arrivals(there)
            if self._one_file:
                self._uploads.let_go()
                self.sync()
            elif missing := sorted(n for n, file in self._files.items() if not _is_there(file, there.get(n))):
                raise OutputError(
                    f"{self.output} does not hold what was written into it:\n{some(missing)}",
                    hint="The same command with --resume makes again what is missing.",
                )
            for name in sorted(self._beside, key=turn):
                self._put_beside(name)
        try:
            self.refuse_taken_over()
        except OutputError:
            if self._lost:  # to one that saw no recipe yet, and may remove what it saw
                raise
        self._in_place = True

    def _put_beside(self, name: str) -> None:
        """Put one of the files beside the weights into place; one that others have put there stays."""
        url, mark = f"{self._target}/{name}", self._left.mark
        self.refuse_taken_over()
        if not put_content(url, self._beside[name], new=True, mark=mark):
            self._refuse_to_replace(url)
            put_content(url, self._beside[name], mark=mark)

    def refuse_taken_over(self) -> None:
        """Refuse to go on where another command has removed what this run wrote down, or has begun anew."""
        if taken_over(self.output, self._left.line):
            self._lost = True
            raise OutputError(
                f"{self.folder} is no longer that of this run: lines clean was run, or another run has begun",
                hint="Run the command again, when no other writes there.",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._uploads.end()
            if self._in_place:
                self._tidy()
            elif error is not None:
                with suppress(OutputError, CheckpointError):  # the store may be what failed
                    self._keep_or_discard(error)
        except BaseException as later:  # a second Ctrl-C, for one
            attach_aftermath(later, self._aftermath())
            raise
        finally:
            if error is not None:
                attach_aftermath(error, self._aftermath())

    def _keep_or_discard(self, error: BaseException) -> None:
        self.refuse_taken_over()
        if isinstance(error, OF_NO_USE):
            self.journal.empty = True
        else:
            self.journal.note()
        if self.journal.empty:
            _discard(self.output, self._left, self._left.made(self.output, there_at(self.output)))
            self._begun = False

    def _tidy(self) -> None:
        self.remarks += _said_of_uploads(self.output, self._left)
        try:
            self.wrote_down(_FINISHED, [{"finished": self._left.mark}])
            _discard(self.output, self._left)
        except OutputError as error:
            if self._lost:  # what lies there is another's
                return
            removes = f"lines clean {as_argument(self.output)}"
            self.remarks.append(
                f"{self.output} is in place; {self.folder} is not removed yet ({removes}): {error.message}"
            )
        self._begun = False

    def _aftermath(self) -> Aftermath:
        state = None
        if self._lost:
            return Aftermath(None, None, self.output)
        if self._gone and not self._in_place:
            state = f"the old {self.output} was removed before the new one was whole"
        elif self._files and self._begun and not self._one_file and not self._in_place:
            state = f"{self.output} holds weights without config, index or recipe, and is no output yet"
        if self._uploads.failed:
            parts = "if it could not be reached, the store may still hold parts of an upload (docs/scale.md)"
            state = f"{state}; {parts}" if state else parts
        in_place = self.output if self._in_place else None
        return Aftermath(self.folder if self._begun else None, in_place, self.output, state=state)

    # --- what is finished ---

    def wrote_down(self, name: str, lines: Iterable[Json]) -> None:
        """Write down what is finished."""
        with asked_of_the_store():
            self.refuse_taken_over()
            put_content(f"{self.folder}/{name}", b"".join(map(written_line, lines)))
        if name not in self._left.objects:
            self._left.objects.append(name)

    def finished(self) -> dict[int, tuple[Stored, int]]:
        """The files that are objects by now: each with its object, and how many blocks it has."""
        return {
            file.number: (file.done, -(-file.nbytes // DIGEST_BLOCK))
            for file in self._files.values()
            if file.done is not None and not self._one_file
        }


def _is_there(file: Upload, found: Stored | None) -> bool:
    """Whether a file is the object that it became; a list, which says what was found, may be late."""
    return found == file.done or looked_up(file.url) == file.done


class ObjectJournal:
    """What a run has finished: a file is written down once it is an object, with all its ranges.

    Attributes:
        empty: whether there is nothing that would be worth going on from.
    """

    def __init__(self, staging: ObjectStaging) -> None:
        self._staging = staging
        self._ranges: dict[int, list[WrittenRange]] = {}
        self._noted: set[int] = {part.file for part in staging.contents.parts} if staging.contents else set()
        self.empty = True

    def measured(self, tally: Json) -> None:
        """What was measured."""
        self._staging.wrote_down(_MEASURED, [{"measured": tally}])
        self.empty = False

    def wrote(self, part: WrittenRange) -> None:
        """A range that was made."""
        self._ranges.setdefault(part.file, []).append(part)
        self.note()

    def note(self) -> None:
        """Write down what has become whole since."""
        for number, (stored, blocks) in self._staging.finished().items():
            ranges = self._ranges.get(number, [])
            if number not in self._noted and sum(len(part.blocks) for part in ranges) == blocks:
                self._staging.wrote_down(str(number), [{"stored": [*stored]}, *map(line_of, ranges)])
                self._noted.add(number)
                self._ranges.pop(number)
                self.empty = False


def digest_of_object(url: Path | str) -> str:
    """The tree digest of an object, read in bounded memory.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = RemoteFile(str(url))

    def block(start: int) -> bytes:
        return sha256(file.range(start, min(start + DIGEST_BLOCK, file.nbytes))).digest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return tree_digest(pool.map(block, range(0, file.nbytes, DIGEST_BLOCK)))


def altered_objects(output: Path, files: Mapping[str, FileRecord]) -> dict[str, str]:
    """Which objects of an output are no longer what was written, each with what differs, in words; read whole.

    Raises:
        CheckpointError: one cannot be read.
    """
    found: dict[str, str] = {}
    for name, written in files.items():
        url = f"{_url(output)}/{name}"
        there = looked_up(url)
        if there is None:
            found[name] = "is missing"
        elif there.nbytes != written.nbytes:
            found[name] = f"holds {there.nbytes:,} bytes, but {written.nbytes:,} were written"
        elif (digest := digest_of_object(url)) != written.digest:
            found[name] = f"holds {digest}, {written.digest} was written"
    return found
