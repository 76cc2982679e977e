"""What the commands share: user code is imported, or refused in one sentence."""

import argparse
import queue
import sys

import pytest

from kd_detectron.commands import import_user_code, parse_arguments
from kd_detectron.errors import ConfigError


def test_module_and_file_are_imported_by_name_and_path(tmp_path):
    file = tmp_path / "of_commands_test.py"
    file.write_text("VALUE = 3\n")
    import_user_code("json.tool")
    import_user_code(str(file))
    assert sys.modules.pop("of_commands_test").VALUE == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nosuch_module", None, r"'nosuch_module' cannot be imported \(ModuleNotFoundError: No"),
        ("nosuch_folder.nosuch", None, r"cannot be imported \(ModuleNotFoundError"),
        ("gone.py", None, "'.*gone.py' is not a file"),
        ("of_commands_test.py", "def broken(", r"SyntaxError: .*of_commands_test.py, line 1"),
        ("of_commands_test.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("queue.py", "VALUE = 3", "would replace the module 'queue' .*; rename the file"),
    ],
)
def test_code_that_cannot_be_imported_is_answered_in_a_sentence(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        import_user_code(str(tmp_path / name) if name.endswith(".py") else name)
    assert "of_commands_test" not in sys.modules and sys.modules["queue"] is queue


def test_option_after_the_overrides_is_answered_in_a_sentence(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    assert parse_arguments(parser, ["--resume", "SEED", "-1"]).opts == ["SEED", "-1"]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(parser, ["SEED", "1", "--resume"])
    assert stop.value.code == 2
    said = "error: --resume stands after KEY VALUE overrides; options go before them\n"
    assert capsys.readouterr().err == said
