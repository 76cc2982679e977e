"""``docs/reliability.md`` names tests that exist, and its counts are those of its tables."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| .*`(\w[\w/]*\.py)::(\w+)`", re.MULTILINE)


def rows(section: str) -> list[str]:
    """The rows of a section's table, without its two head lines."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_every_named_test_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, name)


def test_every_row_has_a_test_and_the_counts_are_right():
    text = PAGE.read_text(encoding="utf-8")
    wrong_input, faults = rows("Wrong input"), rows("Faults")
    assert all(ROW.match(row) for row in wrong_input + faults)
    assert f"{len(wrong_input)} kinds of wrong input and {len(faults)} kinds of fault" in text
