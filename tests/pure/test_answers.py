"""What programs and people read on stdout: the same JSON, with nothing in it that a terminal obeys."""

from __future__ import annotations

import json

import pytest

from edgeres.answers import print_json


def test_names_of_strangers_give_a_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"name": "a\u202eb\u009b31m\x1b[2J\U000e0001", "fine": "é × 電\nnext", "list": [1.5, None, True]}
    print_json(data)
    printed = capsys.readouterr().out
    assert json.loads(printed) == data
    assert all(one.isprintable() or one == "\n" for one in printed)
    assert "é × 電" in printed
