"""An output -> the Hub, through the client's folder upload: what the Hub has already is not sent again.

Before anything is sent, the Hub is asked what is there and whether this token may write. Only the files that are named
are sent. Only those that are named are removed, in the same commit. When all is done, the Hub's own list of files is
held against what was sent.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lines_cli.errors import LinesError, PushError, RecipeError, as_argument, printable, some, without_secrets
from lines_cli.hub.client import (
    CACHE,
    COMMIT,
    HUB_ID,
    NOT_IN_A_REVISION,
    chain,
    discreet,
    is_transient,
    one_line,
    prepare,
    status_of,
    unreachable,
)

_TIMEOUT = 30.0  # seconds that the Hub may take to say what is there
_WAITS = (2.0, 8.0)  # seconds before a push is tried again
_MAIN = "main"


@dataclass(frozen=True, slots=True)
class Target:
    """Where on the Hub an output goes.

    Attributes:
        repo: `org/name`.
        private: whether nobody else may see the repository.
        revision: the branch; None for the main one.
    """

    repo: str
    private: bool = False
    revision: str | None = None

    @property
    def branch(self) -> str:
        """The branch that is committed to."""
        return self.revision or _MAIN

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def command(self, output: object) -> str:
        """What puts an output there."""
        private = " --private" if self.private else ""
        revision = f" --revision {as_argument(self.revision)}" if self.revision is not None else ""
        return f"lines push {as_argument(output)} {self.repo}{private}{revision}"


def target_of(repo: str, *, private: bool, revision: str | None) -> Target:
    """A target, as a person names it.

    Raises:
        RecipeError: it is no repository or branch that there could be.
    """
    match = HUB_ID.fullmatch(repo)
    if match is None or match["revision"] is not None or repo.endswith(".git") or "--" in repo or ".." in repo:
        raise RecipeError(
            f"{repo}: not the name of a repository on the Hub",
            hint="It is org/name, or user/name; a branch goes to --revision.",
        )
    if revision is not None and (NOT_IN_A_REVISION.search(revision) or COMMIT.fullmatch(revision)):
        raise RecipeError(
            f"--revision {revision}: not a branch that can be pushed to",
            hint="Name a branch, new or not, or a pull request: refs/pr/1.",
        )
    return Target(repo, private, None if revision == _MAIN else revision)


class RemoteFile(NamedTuple):
    """A file as the Hub lists it: its size, and its SHA-256 if it is a large one."""

    nbytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Remote:
    """What is at a target.

    Attributes:
        exists: whether the repository is there.
        commit: of the branch; None if there is no such branch yet.
        files: what that holds.
    """

    exists: bool = False
    commit: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


def is_weights(name: str) -> bool:
    """Whether a library that is given a repository may load this file of it as the model's weights, or by it."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


class Commit(NamedTuple):
    """What a push ended with: the commit, and its address."""

    oid: str
    url: str


def look(target: Target, *, quiet: bool, then: str = "") -> Remote:
    """Ask the Hub what is at a target, and whether it may be written to, as far as that can be told.

    Args:
        target: where to.
        quiet: no progress bars.
        then: what to do when the reason for a refusal is gone, as the end of a hint.

    Raises:
        PushError: it may not, or the Hub cannot be asked.
    """
    prepare(f"{target}:", quiet=quiet)
    with _explained(target, then):
        for wait in _WAITS:
            try:
                return _look(target, then)
            except Exception as error:
                if not is_transient(error):
                    raise
            time.sleep(wait)
        return _look(target, then)


def _look(target: Target, then: str) -> Remote:
    from huggingface_hub import HfApi, errors, get_token

    if get_token() is None:
        raise PushError(f"{target}: there is no token to push with", hint=_and(_LOG_IN, then))
    api = HfApi(token=True)
    try:
        info = api.model_info(target.repo, timeout=_TIMEOUT)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        _refuse_to_create(api, target, then)
        return Remote()
    if target.private and not info.private:
        raise PushError(
            f"{target}: it is there already, and everybody can see it; --private makes a new repository private, "
            "and changes none",
            hint=_and("Choose another name; or change its settings on the Hub, or leave --private out.", then),
        )
    _refuse_to_write(api, target)
    if target.revision is not None and not target.revision.startswith("refs/"):
        refs = api.list_repo_refs(target.repo)
        if target.revision in {tag.name for tag in refs.tags}:
            raise PushError(f"{target}: {target.revision} is a tag, and no branch", hint="Choose another revision.")
        if target.revision not in {branch.name for branch in refs.branches}:
            return Remote(exists=True)
    info = api.model_info(target.repo, revision=target.branch, files_metadata=True, timeout=_TIMEOUT)
    return Remote(True, info.sha, _listed(info.siblings))


def _listed(siblings: object) -> dict[str, RemoteFile]:
    found = {}
    for file in siblings if isinstance(siblings, list) else ():
        lfs = file.lfs
        found[file.rfilename] = RemoteFile(file.size, getattr(lfs, "sha256", None) if lfs else None)
    return found


def _refuse_to_create(api: object, target: Target, then: str) -> None:
    """Refuse a repository that this token cannot make, as far as it says who has it."""
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    try:
        who = api.whoami()
    except Exception as error:
        if any(status_of(cause) == 429 for cause in chain(error)):  # it may not be asked often
            return
        raise
    token = (who.get("auth") or {}).get("accessToken") or {}
    owner = target.repo.partition("/")[0]
    rights = {who.get("name"): None, **{org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or ()}}
    if token.get("role") == "read":
        raise PushError(f"{target}: this token may read and not write", hint=_and(_A_WRITER, then))
    if owner not in rights:
        raise PushError(
            f"{target}: there is no such repository, and {who.get('name')}, whose token this is, is not a member of "
            f"{owner}",
            hint=_and("Check the spelling, or push to a name of your own or of your organisation.", then),
        )
    if rights[owner] == "read":
        raise PushError(
            f"{target}: there is no such repository, and in {owner} {who.get('name')} may read and not write",
            hint=_and("Ask an administrator of the organisation for the right to write.", then),
        )


def _refuse_to_write(api: object, target: Target) -> None:
    """Refuse a repository that this token may not write to; a client or a Hub that does not know how to ask tells it
    later.
    """
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    try:
        api.auth_check(target.repo, write=True)
    except TypeError:
        return
    except Exception as error:
        if any(status_of(cause) == 404 for cause in chain(error)):
            return
        raise


def fetch(target: Target, remote: Remote, name: str) -> Path:
    """A small file of a target, as it is there.

    Raises:
        PushError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    with _explained(target, ""):
        return Path(hf_hub_download(target.repo, name, revision=remote.commit, cache_dir=CACHE.get(), token=True))


def upload(
    folder: Path,
    files: Mapping[str, int],
    target: Target,
    remote: Remote,
    *,
    removed: Collection[str],
    message: str,
    description: str,
    then: str,
) -> Commit:
    """Send files, and commit them.

    Args:
        folder: where they are.
        files: their names, relative to it, and their sizes.
        target: where to. What is missing of it is made: the repository, and the branch, which begins empty.
        remote: what is there.
        removed: names that are taken away in the same commit.
        message, description: of the commit.
        then: as of `look`.

    Raises:
        PushError: the Hub does not take them.
    """
    with _explained(target, then):
        for wait in _WAITS:
            try:
                return _upload(folder, files, target, remote, removed, message, description)
            except Exception as error:
                if not is_transient(error):
                    raise
            time.sleep(wait)
            remote = _look(target, then)  # a part may be there by now
        return _upload(folder, files, target, remote, removed, message, description)


def _upload(
    folder: Path,
    files: Mapping[str, int],
    target: Target,
    remote: Remote,
    removed: Collection[str],
    message: str,
    description: str,
) -> Commit:
    from huggingface_hub import HfApi

    api = HfApi(token=True)
    if not remote.exists:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if remote.commit is None and target.revision is not None:
        first = api.list_repo_commits(target.repo)[-1]  # which holds nothing: an output is whole by itself
        begun = _listed(api.model_info(target.repo, revision=first.commit_id, timeout=_TIMEOUT).siblings)
        if weights := sorted(filter(is_weights, begun)):
            raise PushError(
                f"{target}: a new branch would not begin empty, for the repository's first commit holds weights:\n"
                f"{some(weights)}",
                hint="Push to another repository.",
            )
        api.create_branch(target.repo, branch=target.revision, revision=first.commit_id, exist_ok=True)
    gone = sorted(set(removed) & remote.files.keys())
    done = api.upload_folder(
        repo_id=target.repo,
        folder_path=folder,
        revision=target.branch,
        allow_patterns=[glob.escape(name) for name in files],
        delete_patterns=[glob.escape(name) for name in gone] or None,
        parent_commit=remote.commit,  # what was looked at is what is committed to
        commit_message=message,
        commit_description=description,
    )
    there = _listed(api.model_info(target.repo, revision=done.oid, files_metadata=True, timeout=_TIMEOUT).siblings)
    wrong = [
        f"{name}: {'is missing' if name not in there else f'has {there[name].nbytes:,} bytes of {nbytes:,}'}"
        for name, nbytes in files.items()
        if name not in there or there[name].nbytes not in (nbytes, None)
    ]
    wrong += [f"{name}: is still there" for name in gone if name in there]
    if wrong:
        raise PushError(
            f"{target}: the Hub's commit {done.oid[:7]} is not what was sent:\n{some(wrong)}",
            hint="Push it again. If a file stays missing, a .gitignore in the repository keeps it out: remove that.",
        )
    return Commit(done.oid, without_secrets(str(done.commit_url)))


_LOG_IN = "Log in (hf auth login), or set HF_TOKEN to a token that may write."
_A_WRITER = "Use a token that may write there: HF_TOKEN, or hf auth login. The Hub's settings make them."


def _and(hint: str, then: str) -> str:
    return f"{hint} {then}".strip()


@contextmanager
def _explained(target: Target, then: str) -> Iterator[None]:
    """Turn whatever the client raises into a PushError, and hide what is secret in what it logs."""
    try:
        with discreet():
            yield
    except LinesError:
        raise
    except Exception as error:
        raise _explain(error, target, then) from error


def _explain(error: Exception, target: Target, then: str) -> PushError:
    from huggingface_hub import constants, errors

    def said(what: str, hint: str = "") -> PushError:
        return PushError(f"{target}: {what}", hint=_and(hint, then) or None)

    if why := unreachable(error, "cannot be reached, or the connection broke"):
        return said(why, "Try again in a while.")
    owner = target.repo.partition("/")[0]
    for cause in chain(error):
        status = status_of(cause)
        if status is None:
            continue
        quoted = _quoted(cause)
        where = str(getattr(getattr(cause, "response", None), "url", ""))
        if where and not where.startswith(constants.ENDPOINT):
            return said(f"the Hub's storage answered {status}{quoted}", "Try again.")
        match status:
            case 401:
                return said(
                    f"the Hub does not accept the token (401): it is wrong, or has expired{quoted}",
                    f"Make a new one ({constants.ENDPOINT}/settings/tokens). HF_TOKEN comes before hf auth login.",
                )
            case 402:
                return said(f"the Hub asks for payment (402), as where there is no room left{quoted}")
            case 403:
                return said(f"this token may not write there (403){quoted}", _A_WRITER)
            case 404 if isinstance(cause, errors.RevisionNotFoundError):
                return said(f"the repository has no revision {target.branch!r}", "Check its spelling.")
            case 404 if "xet-write-token" in str(cause):
                return said(
                    "the Hub has no Xet storage, to which the client would send large files (404)",
                    "Set HF_HUB_DISABLE_XET=1.",
                )
            case 404:
                return said(
                    f"the Hub has no such place, or hides it from this token (404){quoted}",
                    f"Check the spelling, and that the token may write to {owner}.",
                )
            case 409 | 412:
                return said(
                    f"somebody else has changed the repository meanwhile ({status}){quoted}",
                    "Look at it, and try again.",
                )
            case 429:
                return said(f"the Hub is asked too often, and wants a pause (429){quoted}", "Try again in a while.")
            case _:
                return said(f"the Hub answered {status}{quoted}")
    for cause in chain(error):
        if isinstance(cause, ValueError) and "README.md" in str(cause):
            reasons = "; ".join(line.strip("- ") for line in str(cause).splitlines()[1:] if line.strip())
            return said(f"the Hub does not accept the model card: {printable(reasons)}", "Correct README.md.")
        if isinstance(cause, OSError) and cause.strerror and cause.filename:
            return said(f"{cause.filename}: {cause.strerror}")
    return said(f"it could not be pushed: {type(error).__name__}: {one_line(error)}")


def _quoted(error: BaseException) -> str:
    """What the server says of it, for the end of a sentence."""
    message = getattr(error, "server_message", None) or ""
    text = one_line(ValueError(message)) if message else ""
    return f": {printable(text)}" if text else ""
