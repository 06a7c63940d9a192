"""A pickle as the values that it describes: those that Python makes, where they are plain; else what is named."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lines_cli.checkpoint.pickles import Global, Hooks, Made, OtherKey, PickleEndError, PickleError, read_pickle

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-(2**63), 2**63 - 1), inner, max_size=5)
    ),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]), more=st.binary(max_size=5))
def test_plain_values(value: Any, protocol: int, more: bytes) -> None:
    """Any of them, in each protocol that has bytes; and where the pickle ends."""
    raw = pickle.dumps(value, protocol)
    found, end = read_pickle(raw + more)
    assert found == value
    assert end == len(raw)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]), data=st.data())
def test_a_pickle_that_was_cut(value: Any, protocol: int, data: st.DataObject) -> None:
    """Is known to be one, wherever it was cut."""
    raw = pickle.dumps(value, protocol)
    with pytest.raises(PickleEndError):
        read_pickle(raw[: data.draw(st.integers(0, len(raw) - 1))])


def test_values_that_are_shared() -> None:
    """One value in two places is one."""
    inner = [1]
    for protocol in (2, 3, 4, 5):
        (one, other), _ = read_pickle(pickle.dumps([inner, inner], protocol))
        assert one is other


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dicts_of_the_library(protocol: int) -> None:
    """An OrderedDict and a defaultdict are dicts, in their order."""
    value = OrderedDict(b=1, a=defaultdict(list, x=[2]))
    found, _ = read_pickle(pickle.dumps(value, protocol))
    assert found == {"b": 1, "a": {"x": [2]}}
    assert list(found) == ["b", "a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_would_be_called(protocol: int) -> None:
    """Of an object stands what would have made it, and with what."""
    found, _ = read_pickle(pickle.dumps([date(2024, 1, 2), {3}, date], protocol))
    day, numbers, itself = found
    assert isinstance(day, Made)
    assert day.of == Global("datetime", "date")
    assert isinstance(numbers, Made)
    assert itself == Global("datetime", "date")


def test_keys_of_other_kinds() -> None:
    """None of them is lost, and each is one of its own."""
    found, _ = read_pickle(pickle.dumps({("a", "b"): 1, None: 2, 2**64: 3, 1.5: 4, "x": 5}))
    assert sorted(found.values()) == [1, 2, 3, 4, 5]
    assert sum(isinstance(key, OtherKey) for key in found) == 4


@pytest.mark.parametrize("raw", [
    b"", b".", b"\x80\x02", b"\x80\x09N.", b"cos\nsystem\n(S'id'\ntR.", b"I1\n.", b"\x80\x02t.", b"\x80\x02(",
    b"\x80\x02h\x07.", b"\x80\x02K\x01K\x02a.", b"\x80\x02}K\x01s.", b"\x80\x02\x85.", b"\x80\x02(K\x01u.",
    b"\x80\x02K\x01Q.", b"\x80\x02c\xff\n\xfe\n.", b"\x80\x02K\x01K\x02\x93.", b"\x80\x02U\x05a.", b"\x80\x02\x82\x01.",
    b"\x80\x05\x97.", b"\x80\x02T\xff\xff\xff\xff.",
])  # fmt: skip
def test_what_is_no_pickle(raw: bytes) -> None:
    """Instructions without what they take, that torch.save does not write, that make no sense."""
    with pytest.raises(PickleError) as refused:
        read_pickle(raw)
    assert str(refused.value).startswith("it")


def test_hooks() -> None:
    """Names are told once each; a reference gives what the hook makes of it."""
    told: list[str] = []

    class Telling(Hooks):
        def named(self, what: Global) -> None:
            told.append(str(what))

        def stored(self, key: Any) -> Any:
            return ("stored", key)

    found, _ = read_pickle(b"\x80\x02]q\x00(ca\nb\nca\nb\nX\x01\0\0\0kQe.", 0, Telling())
    assert found == [Global("a", "b"), Global("a", "b"), ("stored", "k")]
    assert told == ["a.b"]
