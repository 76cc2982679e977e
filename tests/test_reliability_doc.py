"""The numbers that ``docs/reliability.md`` begins with are those of its tables."""

from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def number_of_rows(text: str, section: str) -> int:
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return sum(line.startswith("| ") for line in body.splitlines()) - 1  # without the head


def test_numbers_are_those_of_the_tables():
    text = PAGE.read_text(encoding="utf-8")
    wrong_input, faults = number_of_rows(text, "Wrong input"), number_of_rows(text, "Faults")
    assert f"{wrong_input} kinds of wrong input and {faults} kinds of fault" in text
