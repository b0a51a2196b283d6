"""Numbers as people write them."""

import pytest

from megadistill.units import count, left, number_of, readable, short, spell


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.004, "0.004"),
        (3e-4, "0.0003"),
        (3e-5, "3e-5"),
        (-1.5, "-1.5"),
        (0.6384, "0.638"),
        (130.0, "130"),
        (999.4, "999"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (1e20, "1e+20"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_three_digits_without_empty_zeros(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (0.0135, "13.5 ms"),
        (8.31, "8.3 s"),
        (30, "30 s"),
        (119.96, "2 min"),
        (125, "2 min 5 s"),
        (599.7, "10 min"),
        (1140, "19 min"),
        (3590, "1 h"),
        (7980, "2 h 13 min"),
        (18_000, "5 h"),
        (172_800, "2 days"),
        (86_400 * 11.58, "11.6 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert spell(seconds) == text


def test_time_left_is_in_whole_seconds() -> None:
    assert [left(seconds) for seconds in (0.2, 14.6, 125.4, 7980)] == [
        "1 s left",
        "15 s left",
        "2 min 5 s left",
        "2 h 13 min left",
    ]


def test_numbers_of_things() -> None:
    assert [number_of(number, "shard") for number in (0, 1, 2, 12345)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "12,345 shards",
    ]
    assert [number_of(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]


def test_amounts() -> None:
    assert [readable(amount, "B") for amount in (900, 25_400, 30_700_000, 16.1e9)] == [
        "900 B",
        "25.4 kB",
        "30.7 MB",
        "16.1 GB",
    ]
    assert [count(number) for number in (12, 395_232, 8.03e9, 2e12)] == ["12", "395k", "8.03B", "2T"]
