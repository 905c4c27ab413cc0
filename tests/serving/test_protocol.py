"""Text that is settled, while tokens come: half characters, stop strings, and all of it in the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pargs_min.serving.protocol import Reader


class Bytes:
    """A codec whose tokens are bytes, so that most characters take several."""

    def text(self, ids):
        return bytes(ids).decode(errors="replace")


def read(said, stops=()):
    """What a reader says at each token, and at the end, up to a stop string."""
    reader, parts = Reader(Bytes(), stops), []
    for token in said.encode():
        new, stopped = reader.add(token)
        parts.append(new)
        if stopped:
            return parts
    return [*parts, reader.rest()]


def test_half_a_character_is_held_back():
    assert read("aé€b") == ["a", "", "é", "", "", "€", "b", ""]
    reader = Reader(Bytes(), [])
    assert [reader.add(token)[0] for token in "€".encode()[:2]] == ["", ""]
    assert reader.rest() == "\ufffd"


def test_what_may_become_a_stop_string_is_held_back_and_the_stop_string_is_never_said():
    assert read("one\n\ntwo", ["\n\n"]) == ["o", "n", "e", "", ""]
    assert read("one\ntwo", ["\n\n"])[3:5] == ["", "\nt"]
    assert "".join(read("abcabd", ["abd", "x"])) == "abc"
    assert "".join(read("ab", ["b", "ab"])) == ""


@given(st.text(max_size=12), st.lists(st.text("ab\n€", min_size=1, max_size=3), max_size=2))
def test_in_the_end_all_has_been_said_up_to_the_first_stop_string(said, stops):
    said = said.encode(errors="ignore").decode()
    places = [said.find(stop) for stop in stops if stop in said]
    assert "".join(read(said, stops)) == said[: min(places, default=None)]


@pytest.mark.parametrize("stops", [[], ["b"]])
@given(st.text("ab€é", max_size=12))
def test_what_was_said_stays(stops, said):
    """Each part follows on what was said before: nothing is taken back."""
    parts = read(said, stops)
    for length in range(len(parts)):
        assert said.startswith("".join(parts[:length]))
