"""Times: the millisecond in which they lie, and nothing else that looks like one."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.times import parse_time

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01T00:00:00-00:00", 0),
        ("1970-01-01T05:30:00.25+05:30", 250),
        ("1969-12-31T16:00:00.1-08:00", 100),
        ("1970-01-01T00:00:00.9999Z", 999),
        ("1970-01-01T00:00:01.0009999999999999999999999999+00:00", 1000),
        ("1969-12-31T23:59:59.9999996Z", -1),
        ("1969-12-31T23:59:59.0009Z", -1000),
        ("2026-11-01T11:59:59.9999996Z", 1793534399999),
        ("2024-02-29T00:00:00Z", 1709164800000),
        ("2016-12-31T23:59:60Z", 1483228799999),
        ("2016-12-31T23:59:60.5Z", 1483228799999),
        ("2016-12-31T15:59:60.123456-08:00", 1483228799999),
        ("0001-01-01T00:00:00Z", -62135596800000),
        ("9999-12-31T23:59:59.999Z", 253402300799999),
    ],
)
def test_a_time_is_the_millisecond_in_which_it_lies(text: str, milliseconds: int) -> None:
    for _ in range(2):  # seen for the first time, and remembered
        assert parse_time(text) == milliseconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-11-01",
        "2026-11-01T00:00:00",
        "2026-11-01T00:00:00.5",
        "2026-11-01 00:00:00Z",
        "2026-11-01T00:00Z",
        "20261101T000000Z",
        "2026-11-01T00:00:00,5Z",
        "2026-11-01T00:00:00.Z",
        "2026-11-01T00:00:00.1234x6Z",
        "2026-11-01T00:00:00.123٤Z",
        "2026-11-01T00:00:00.123²Z",
        "2026-11-01T00:00:0٤Z",
        "2026-11-01T00:00:00+0530",
        "2026-11-01T00:00:00+05",
        "2026-11-01T00:00:00+24:00",
        "2026-11-01T00:00:00+05:60",
        "2026-11-01T00:00:00+05:30:00",
        "2026-11-01T00:00:00Z ",
        "2026-11-01T00:00:00Z\n",
        " 2026-11-01T00:00:00Z",
        "2026-11-01T24:00:00Z",
        "2026-11-01T23:60:00Z",
        "2026-11-01T23:59:61Z",
        "2026-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "12026-11-01T00:00:00Z",
        "2016-12-31T12:00:60Z",
        "2016-12-31T23:59:60+01:00",
        "2016-12-31T23:59:60",
        "2016-13-31T23:59:60Z",
        "Z1234Z",
        "9" * 10_000,
    ],
)
def test_what_is_not_an_rfc_3339_time_with_an_offset_is_refused(text: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="is not an RFC 3339 time") as caught:
            parse_time(text)

        assert len(str(caught.value)) < 300


@given(
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 12, 31)),  # noqa: DTZ001 - the offset is drawn apart
    st.integers(min_value=-1439, max_value=1439),
    st.integers(min_value=0, max_value=6),
    st.text(alphabet="0123456789", max_size=9),
)
def test_it_agrees_with_the_standard_library_and_truncates(
    naive: datetime, offset: int, digits: int, further: str
) -> None:
    moment = naive.replace(tzinfo=timezone(timedelta(minutes=offset)))
    zone = f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02}:{abs(offset) % 60:02}"
    fraction = f"{naive.microsecond:06}"[:digits]
    second = moment.replace(microsecond=int(fraction.ljust(6, "0"))).strftime("%m-%dT%H:%M:%S")
    text = f"{naive.year:04}-{second}" + (f".{fraction}{further if digits == 6 else ''}" if fraction else "") + zone
    truncated = datetime.fromisoformat(f"{text[:19]}.{fraction.ljust(6, '0')}{zone}")

    assert parse_time(text) == (truncated - EPOCH) // timedelta(milliseconds=1)


@given(st.text(alphabet="0123456789-:.+TtZz٤² ", max_size=40) | st.text(max_size=10))
def test_any_text_is_a_time_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert isinstance(parse_time(text), int)
