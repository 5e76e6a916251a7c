"""Tests that look for trouble: faults, kills, hostile files, random calls, long runs. `make test` runs a quick part of each and
`make harden` all of it; both end with a table of what was tried."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

SHARE = float(os.environ.get("UNDO_HARDEN", "0"))  # of the full numbers, which are tried with 1; 0 for the quick ones


@pytest.fixture
def tries():
    """Returns how often this run tries: `tries(quick, full)`; a test whose quick number is 0 belongs to `make harden` alone."""

    def choose(quick: int, full: int) -> int:
        if not SHARE and quick == 0:
            pytest.skip("long: make harden runs it")
        return max(1, quick, round(SHARE * full)) if SHARE else quick

    return choose


@pytest.fixture
def some(tries):
    """Returns what this run tries of a list, evenly spread: `some(listed, quick)` is so many entries, and all of them in full."""

    def choose(listed: Iterable[Any], quick: int) -> list[Any]:
        listed = list(listed)
        count = min(len(listed), tries(quick, len(listed)))
        return [listed[number * len(listed) // count] for number in range(count)]

    return choose


@pytest.fixture
def account(record_property):
    """Adds a row to the table: `account("torn checkpoint", tried=40, survived=31, refused=9)`. Survived ended with the right result,
    refused with one clear error that left everything as it was; a test fails by itself if they are not all that was tried."""

    def add(what: str, *, tried: int, survived: int, refused: int = 0) -> None:
        assert tried == survived + refused and tried > 0, f"{what}: {tried} tried, {survived} survived, {refused} refused"
        record_property("harden", [what, tried, survived, refused])

    return add


def pytest_terminal_summary(terminalreporter):
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, []) if one.when == "call"]
    rows = [value for one in reports for name, value in one.user_properties if name == "harden"]
    if rows:
        totals: dict[str, list[int]] = {}
        for what, *numbers in rows:
            totals[what] = [old + new for old, new in zip(totals.get(what, [0, 0, 0]), numbers, strict=True)]
        width = max(map(len, [*totals, "fault or input"]))
        terminalreporter.section(
            "what was tried"
            + (
                " (all of it)"
                if SHARE == 1
                else f" ({SHARE:.0%} of it)"
                if SHARE
                else " (the quick part; make harden tries all)"
            )
        )
        terminalreporter.line(f"{'fault or input':{width}}  {'tried':>8} {'survived':>8} {'refused':>8}")
        for what, numbers in sorted(totals.items()):
            terminalreporter.line(f"{what:{width}}  " + " ".join(f"{number:>8,}" for number in numbers))
