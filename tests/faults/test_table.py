"""Every fault has a test or a reason, and the page that lists them is up to date."""

from __future__ import annotations

from catalogue import EXCUSED, FAULTS
from table import PAGE, page, problems, tests_by_fault

FOUND = tests_by_fault()


def test_the_catalogue_is_complete() -> None:
    assert list(FAULTS) == list(range(1, 138))
    assert set(EXCUSED) <= set(FAULTS)


def test_every_fault_has_a_test_or_a_reason() -> None:
    assert not problems(FOUND)


def test_a_missing_number_is_found() -> None:
    assert problems({n: tests for n, tests in FOUND.items() if n != 17}) == ["fault 17 has neither a test nor a reason"]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(FOUND), "run: python tests/faults/table.py --write"
