"""Where the members of a zip file lie in it. Nothing is unpacked, and of the file only its directory is read.

Every number is checked against the file before anything is allocated or read by it. Of members that are compressed or
encrypted it is known that they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from lines_cli.storage.files import read_into

LARGEST_DIRECTORY = 32 * 2**20
"""Bytes."""
MOST_MEMBERS = 400_000

SIGNATURE = b"PK\x03\x04"
"""How a zip file begins."""

_ENTRY = struct.Struct("<4s4xHH8xIIHHH8xI")  # flags, method, bytes packed and whole, bytes of 3 texts, where
_OWN_HEADER = struct.Struct("<4s2xHH16xHH")  # flags, method, bytes of 2 texts
_END = struct.Struct("<4sHHHHIIH")  # disks, entries, bytes and start of the directory, bytes of a comment
_END_64 = struct.Struct("<4s12xIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LONGEST_COMMENT = 2**16 - 1
_IN_EXTRA_FIELD = 2**32 - 1
_EXTRA_OF_64_BITS = 1


class ZipError(Exception):
    """A zip file cannot be read by its directory. The message is what is said of the file."""


class ZipEndError(ZipError):
    """The end of the file, where its directory should be, is not there."""


class Member(NamedTuple):
    """One of the files in a zip file.

    Attributes:
        name: its path within.
        at: where its own header begins.
        nbytes: of its content.
        as_it_is: whether its content stands there as it is, neither compressed nor encrypted.
    """

    name: str
    at: int
    nbytes: int
    as_it_is: bool


@dataclass(frozen=True)
class Directory:
    """The directory of a zip file.

    Attributes:
        members: by their names.
        start: where it begins, and the members end.
        raw: its bytes.
    """

    members: dict[str, Member]
    start: int
    raw: bytes


def read_directory(fd: int, file_size: int) -> Directory:
    """Read the directory of an open zip file.

    Raises:
        ZipError: it makes no sense, or is larger than may be.
        ZipEndError: there is none.
        OSError: the file cannot be read.
    """
    number, nbytes, start, end = _end_of(fd, file_size)
    if start + nbytes > end:
        raise ZipError("its zip directory reaches beyond its end")
    if nbytes > LARGEST_DIRECTORY or number > MOST_MEMBERS:
        raise ZipError(f"its zip directory claims {number:,} members and {nbytes:,} bytes, more than are read")
    raw = _read(fd, start, nbytes)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(number):
        if at + _ENTRY.size > nbytes:
            raise ZipError("its zip directory has fewer entries than it claims")
        mark, flags, method, packed, whole, *texts, where = _ENTRY.unpack_from(raw, at)
        of_name, of_extra, of_comment = texts
        at += _ENTRY.size
        name, extra = raw[at : at + of_name], raw[at + of_name : at + of_name + of_extra]
        at += of_name + of_extra + of_comment
        if mark != b"PK\x01\x02" or at > nbytes:
            raise ZipError("its zip directory is damaged")
        whole, packed, where = _in_64_bits([whole, packed, where], extra)
        member = Member(name.decode("utf-8", "surrogateescape"), where, whole, _is_plain(flags, method, packed, whole))
        if members.setdefault(member.name, member) is not member:
            raise ZipError(f"its zip directory names {member.name!r} twice")
    return Directory(members, start, raw)


def content_of(fd: int, member: Member, directory: Directory) -> int:
    """Where a member's content begins, in bytes from the start of the file; all of it lies before the directory.

    Raises:
        ZipError: it does not, or is not there as it is; or the member's own header is another's.
        OSError: the file cannot be read.
    """
    if not member.as_it_is:
        raise ZipError(f"its member {member.name!r} is compressed")
    if member.at + _OWN_HEADER.size > directory.start:
        raise ZipError(f"its member {member.name!r} begins beyond its end")
    name = member.name.encode("utf-8", "surrogateescape")
    raw = _read(fd, member.at, min(_OWN_HEADER.size + len(name), directory.start - member.at))
    mark, flags, method, of_name, of_extra = _OWN_HEADER.unpack_from(raw)
    if mark != SIGNATURE or method or flags & 1 or of_name != len(name) or raw[_OWN_HEADER.size :] != name:
        raise ZipError(f"its directory says that {member.name!r} stands where something else does")
    start: int = member.at + _OWN_HEADER.size + of_name + of_extra
    if start + member.nbytes > directory.start:
        raise ZipError(f"its member {member.name!r} reaches beyond its end")
    return start


def _end_of(fd: int, file_size: int) -> tuple[int, int, int, int]:
    """What the end of a zip file says: how many members, bytes of the directory, its start, and where it has to end."""
    tail_at = max(0, file_size - _END.size - _LONGEST_COMMENT - _LOCATOR_64.size)
    tail = _read(fd, tail_at, file_size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + _END.size > len(tail) or at + _END.size + _END.unpack_from(tail, at)[-1] != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise ZipEndError("its end is missing, where a zip file has its directory")
    _, disk, first, _, number, nbytes, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if at >= _LOCATOR_64.size and tail.startswith(b"PK\x06\x07", at - _LOCATOR_64.size):
        _, _, end, _ = _LOCATOR_64.unpack_from(tail, at - _LOCATOR_64.size)
        if end + _END_64.size > tail_at + at - _LOCATOR_64.size:
            raise ZipError("its zip directory ends beyond its end")
        mark, disk, first, _, number, nbytes, start = _END_64.unpack(_read(fd, end, _END_64.size))
        if mark != b"PK\x06\x06":
            raise ZipError("its zip directory is damaged")
    if disk or first:
        raise ZipError("it is one part of a zip file of several")
    return number, nbytes, start, end


def _is_plain(flags: int, method: int, packed: int, whole: int) -> bool:
    return method == 0 and not flags & 1 and packed == whole


def _in_64_bits(numbers: list[int], extra: bytes) -> list[int]:
    """The numbers of an entry, of which those that take more than 32 bits stand in its extra field, in this order."""
    if _IN_EXTRA_FIELD not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        if kind == _EXTRA_OF_64_BITS:
            field = extra[at + 4 : at + 4 + nbytes]
            missing = numbers.count(_IN_EXTRA_FIELD)
            if len(field) < 8 * missing:
                break
            found = iter(struct.unpack_from(f"<{missing}Q", field))
            return [next(found) if number == _IN_EXTRA_FIELD else number for number in numbers]
        at += 4 + nbytes
    raise ZipError("its zip directory lacks a size or a place")


def _read(fd: int, at: int, nbytes: int) -> bytes:
    """That part of the file, which has been checked to be in it."""
    raw = bytearray(nbytes)
    if read_into(fd, memoryview(raw), at) < nbytes:
        raise ZipError("it became shorter while it was read")
    return bytes(raw)
