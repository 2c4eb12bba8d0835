"""The customers' file: read again when it changed, and never taken half, empty or ambiguous."""

import os
from pathlib import Path

import pytest

from consumer.deliver.customers import UnmappedError
from consumer.runtime.customers import CustomerFile, CustomerFileError

GOOD = "acme: cus_1\nours: null\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two customers."""
    found = tmp_path / "customers.yaml"
    found.write_text(GOOD)
    return found


def replace(path: Path, text: str) -> None:
    """Put another file where it was, in one step."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def looked(file: CustomerFile) -> bool:
    """Whether there are other customers, after two looks: one that it has changed, and one that it stays so."""
    return file.changed() is not None or file.changed() is not None


def test_names_are_stripe_customers_null_or_unknown(path: Path) -> None:
    customers = CustomerFile(path).customers
    assert (customers.stripe_customer("acme"), customers.stripe_customer("ours")) == ("cus_1", None)
    with pytest.raises(UnmappedError):
        customers.stripe_customer("other")


def test_a_changed_file_is_taken_as_a_whole_once_it_stays_the_same(path: Path) -> None:
    file = CustomerFile(path)
    assert not looked(file)
    replace(path, GOOD + "new: cus_2\n")
    assert file.changed() is None, "it may still be written"
    changed = file.changed()
    assert changed is not None
    assert changed.stripe_customer("new") == "cus_2"
    assert not looked(file), "once is enough"


def test_a_file_that_is_being_written_is_not_taken(path: Path) -> None:
    file = CustomerFile(path)
    with path.open("w") as writing:
        for line in range(3):
            print(f"name{line}: cus_{line}", file=writing, flush=True)
            os.utime(path, ns=(line, line))
            assert file.changed() is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no customers"),
        ("{}", "holds no customers"),
        ("# nobody\n", "holds no customers"),
        ("- acme\n", "is no mapping"),
        ("acme: cus_1\nours: cu", "ends in the middle of a line"),
        ("acme: {\n", "is no YAML, line 2, column 1"),
        ("acme: cus_1\nacme: cus_2\n", "lines 1 and 2: a name is in it twice"),
        ("acme: cus_1\nours: 5\n", "line 2 is no name with a Stripe customer or null"),
        ("5: cus_1\n", "names of digits need quotes"),
        ("<<: {acme: cus_1, ours: 5}\n", "entry 2 is no name with a Stripe customer or null"),
        ("? [acme]\n: cus_1\n", "holds something else than text"),
        ("acme: 2026-13-01\n", "holds something else than text"),
        ("acme: ''\n", "is no name with a Stripe customer or null"),
    ],
)
def test_what_is_of_no_use_changes_nothing_and_is_told_until_it_is_put_right(path: Path, text: str, why: str) -> None:
    file = CustomerFile(path)
    replace(path, text)
    assert not looked(file)
    assert file.refused
    assert file.customers.stripe_customer("acme") == "cus_1", "what was right before is in use"
    with pytest.raises(CustomerFileError, match=why):
        CustomerFile(path)
    replace(path, GOOD + "new: cus_2\n")
    assert looked(file)
    assert not file.refused


def test_a_file_that_is_gone_changes_nothing(path: Path) -> None:
    file = CustomerFile(path)
    path.unlink()
    assert not looked(file)
    assert file.refused
    replace(path, GOOD)
    looked(file)
    assert not file.refused


def test_a_file_that_is_put_back_as_it_was_is_right_again(path: Path) -> None:
    file = CustomerFile(path)
    before = path.stat()
    text = path.read_text()
    path.write_text("")
    assert not looked(file)
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    looked(file)
    assert not file.refused


def test_json_is_as_good(path: Path) -> None:
    replace(path, '{"acme": "cus_3"}')
    assert CustomerFile(path).customers.stripe_customer("acme") == "cus_3"
