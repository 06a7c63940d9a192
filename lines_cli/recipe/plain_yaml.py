"""YAML from anybody, read into plain values: text, numbers, booleans, null, lists, and dicts whose keys are text; and
such values written.

The library splits the text into events. What becomes of them is decided here, event by event, so that a budget holds
while values are made and not after: a few hundred bytes of anchors, aliases and merge keys can stand for more than any
machine has. Tags that make anything but plain values are refused; a date is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import yaml

LARGEST = 2 * 2**20
"""Bytes of a YAML file: the record of a merge that reads 1,000 files has some 300 KB."""

Place = tuple[str | int, ...]
"""Where a value stands: `("models", 0, "parameters", "weight")`."""

_MOST_VALUES = 100_000  # keys count, too
_DEEPEST = 32
_LONGEST_NUMBER = 1000  # characters
_LARGEST_SLOW = 2**17  # characters that the library's slow reader is given

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null"))
_NO_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # others stand for the bytes of a file name that is not UTF-8
_BYTE_OF_A_NAME = re.compile(r"\\u[dD][cC][89a-fA-F]")


class YamlError(ValueError):
    """What is wrong with a YAML text, and in which line."""


def read_yaml(text: str) -> tuple[Any, dict[Place, str]]:
    """Read one YAML document.

    Args:
        text: the document; the caller bounds its size.

    Returns:
        Its value, in which nothing is shared; and for each key and each item of a list, where it stands: `line 7`.

    Raises:
        YamlError: it is not YAML, means something else than plain values, or comes to too much.
    """
    composer = _Composer(yaml.parse(text, Loader=_loader(text)))
    try:
        return composer.document(), composer.at
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_at(mark, error.problem or error.context or "it cannot be read")) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"line {line}: {str(error).splitlines()[0]}") from error
    except UnicodeEncodeError as error:
        raise YamlError(f"it holds {text[error.start]!r}, which is not valid text (half a character)") from error


def dump_yaml(values: Mapping[str, Any], *, flow: bool | None = False) -> str:
    """Plain values as a YAML document that `read_yaml` reads: keys in order, lines of up to 1,000 characters whole.

    Args:
        values: of text, numbers, booleans, None, lists and mappings.
        flow: whether lists and mappings stand on one line; None: those that hold no others.
    """
    how: dict[str, Any] = {"sort_keys": False, "width": 1_000, "default_flow_style": flow}
    try:
        text: str = yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **how)
    except UnicodeEncodeError:  # the fast one knows no half characters, as the fast reader
        text = yaml.dump(values, Dumper=yaml.SafeDumper, **how)
    return text


def anchored_keys(text: str) -> set[str]:
    """The keys at the top of a document that `read_yaml` has read, within whose values an anchor stands: for aliases
    elsewhere in it.
    """
    found: set[str] = set()
    key, depth = None, 0
    for event in yaml.parse(text, Loader=_loader(text)):
        if depth == 1 and key is None and isinstance(event, yaml.ScalarEvent):
            key = event.value
            continue
        if key is not None and not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None):
            found.add(key)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        key = None if depth < 2 and not isinstance(event, yaml.CollectionStartEvent) else key
    return found


def _loader(text: str) -> Any:
    """The library's fast reader, where it was built with one. It knows no half characters, which stand for bytes in the
    names of files.
    """
    fast = getattr(yaml, "CSafeLoader", None)
    if fast is not None and not _BYTE_OF_A_NAME.search(text):
        return fast
    if fast is not None and len(text) > _LARGEST_SLOW:
        raise YamlError(f"{len(text):,} characters; with names that are not UTF-8 at most {_LARGEST_SLOW:,} are read")
    return yaml.SafeLoader


def _at(mark: Any, problem: str) -> str:
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


class _Node(NamedTuple):
    """A value, how many values it is made of, how many containers lie within each other in it, and a scalar's text."""

    value: Any
    size: int = 1
    height: int = 0
    text: str | None = None


class _Resolver(yaml.resolver.Resolver):
    """Which plain scalars are numbers, booleans or null: those that YAML 1.1 says are, dates apart."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the library has it
        first: [(tag, pattern) for tag, pattern in known if tag in _SCALARS]
        for first, known in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }


class _Composer:
    """Makes values of events.

    Attributes:
        at: where each key and item stands.
    """

    def __init__(self, events: Iterator[Any]) -> None:
        self.at: dict[Place, str] = {}
        self._events = events
        self._left = _MOST_VALUES
        self._anchors: dict[str, _Node | None] = {}  # None while it is being made
        self._resolver = _Resolver()
        self._constructor = yaml.constructor.SafeConstructor()

    def document(self) -> Any:
        """The one document that there is; None for an empty text."""
        next(self._events)  # the stream begins
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._node(next(self._events), (), 0).value
        next(self._events)  # the document ends
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(event, "a second document begins; only one is allowed")
        return value

    def _refuse(self, event: Any, problem: str) -> NoReturn:
        raise YamlError(_at(event.start_mark, problem))

    def _spend(self, event: Any, values: int) -> None:
        self._left -= values
        if self._left < 0:
            self._refuse(event, f"more than {_MOST_VALUES:,} values")

    def _node(self, event: Any, place: Place, depth: int) -> _Node:
        """The value that begins with an event."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        anchor = event.anchor
        if anchor is not None:
            if anchor in self._anchors:
                self._refuse(event, f"the anchor &{anchor} appears twice")
            self._anchors[anchor] = None
        self._spend(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        else:
            kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
            if event.tag not in (None, "!", f"{_TAG}{kind}"):
                self._refuse_tag(event)
            if depth == _DEEPEST:
                self._refuse(event, f"nested more than {_DEEPEST} levels deep")
            node = self._mapping(place, depth + 1) if kind == "map" else self._sequence(place, depth + 1)
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _refuse_tag(self, event: Any) -> NoReturn:
        self._refuse(event, f"the tag {event.tag.replace(_TAG, '!!')} is not supported; only plain values are")

    def _alias(self, event: Any, depth: int) -> _Node:
        if event.anchor not in self._anchors:
            self._refuse(event, f"there is no anchor &{event.anchor}")
        node = self._anchors[event.anchor]
        if node is None:
            self._refuse(event, f"*{event.anchor} would contain itself")
        self._spend(event, node.size)
        if depth + node.height > _DEEPEST:
            self._refuse(event, f"nested more than {_DEEPEST} levels deep")
        return node._replace(value=_copied(node.value))

    def _sequence(self, place: Place, depth: int) -> _Node:
        items: list[_Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*place, len(items))
            self.at[here] = f"line {event.start_mark.line + 1}"
            items.append(self._node(event, here, depth))
        return _around([node.value for node in items], items)

    def _mapping(self, place: Place, depth: int) -> _Node:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        seen: set[str] = set()
        nodes: list[_Node] = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            merges = isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0] and not event.tag
            if isinstance(event, yaml.ScalarEvent) and event.tag is event.anchor is None:  # as most are
                key = _Node(None, text=self._text(event))
                self._spend(event, 1)
            else:
                key = self._node(event, (), depth)
            if key.text is None:
                self._refuse(event, "a key must be text")
            if key.text in seen:
                self._refuse(event, f"the key {key.text!r} appears twice")
            seen.add(key.text)
            here = (*place, key.text)
            self.at[here] = f"line {event.start_mark.line + 1}"
            node = self._node(next(self._events), here, depth)
            nodes += key, node
            if merges:
                merged = self._merged(event, node.value)
            else:
                own[key.text] = node.value
        return _around(merged | own, nodes)

    def _merged(self, event: Any, value: Any) -> dict[str, Any]:
        """What `<<` takes over: a mapping's keys, or those of several, of which the first has the last word."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            self._refuse(event, "<< must name a mapping, or a list of mappings")
        merged: dict[str, Any] = {}
        for mapping in reversed(mappings):
            merged.update(mapping)
        return merged

    def _text(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if wrong := _NO_TEXT.search(text):
            self._refuse(event, f"it holds {wrong[0]!r}, which is no text")
        return text

    def _scalar(self, event: yaml.ScalarEvent) -> _Node:
        text = self._text(event)
        tag = event.tag
        if tag is None or tag == "!":
            tag = self._resolver.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        if tag not in _SCALARS:
            self._refuse_tag(event)
        kind = tag.removeprefix(_TAG)
        if kind == "str":
            return _Node(text, text=text)
        if kind in ("int", "float") and len(text) > _LONGEST_NUMBER:
            self._refuse(event, f"a number of {len(text):,} characters")
        try:
            node = yaml.ScalarNode(tag, text)
            return _Node(getattr(self._constructor, f"construct_yaml_{kind}")(node), text=text)
        except (ValueError, OverflowError, LookupError):
            self._refuse(event, f"{text[:100]!r} is no {kind}")


def _around(value: Any, nodes: list[_Node]) -> _Node:
    """A container of nodes."""
    return _Node(value, 1 + sum(node.size for node in nodes), 1 + max((node.height for node in nodes), default=0))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
