"""Ways to damage a file's bytes, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

Changes = list[tuple[str, int, bytes]]


@st.composite
def damages(draw: st.DrawFn, size: int, header: int) -> Changes:
    """Changes, mostly of the header: (what, where, bytes)."""
    place = st.integers(0, header - 1) | st.integers(0, header - 1) | st.integers(0, size - 1)
    word = st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\1" + b"\0" * 7, b"\0" * 7 + b"\x80"])
    change = st.tuples(
        st.sampled_from(["set", "set", "insert", "remove", "cut"]),
        place,
        st.binary(min_size=1, max_size=12) | word,
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def damage(raw: bytes, changes: Changes) -> bytes:
    for what, place, new in changes:
        end = place + len(new)
        if what == "cut":
            raw = raw[:place]
        else:
            raw = (
                raw[:place]
                + (b"" if what == "remove" else new)
                + raw[place if what == "insert" else end :]
            )
    return raw
