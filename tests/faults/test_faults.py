"""A catalogue of bad inputs: each with its exit code and words of its message.

A row has a number, a title, the exit code, words of the message, and cases, which all end so; they
are in the modules `rows_…`.  Rows with one number are parts of one fault.  Malformed containers,
indices and configs stand with the tests of their formats.
"""

from __future__ import annotations

import re
import shutil

import pytest

from moecc.errors import MoeccError

from . import (
    rows_config,
    rows_container,
    rows_formats,
    rows_index,
    rows_surroundings,
    rows_weights,
)
from .place import Act, Allowed, Spoilt, make_model
from .rows import Row

PARTS = (rows_container, rows_index, rows_config, rows_weights, rows_formats, rows_surroundings)
ROWS: list[Row] = [row for part in PARTS for row in part.ROWS]

IDS = [f"{r.number}-{i}-{r.title.replace(' ', '-')}" for r in ROWS for i in range(len(r.cases))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = tmp_path_factory.mktemp("whole") / "model"
    make_model(made)
    return made


def ended(act: Act, place: Spoilt, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return exit code and message of a case, as the command line has them."""
    try:
        act(place)
    except MoeccError as error:
        return error.exit_code, str(error)
    except Allowed as said:
        return 0, str(said)
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().err
    return 0, ""


@pytest.mark.parametrize(("found", "act"), [(r, act) for r in ROWS for act in r.cases], ids=IDS)
def test_faults(found, act, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "model")
    code, text = ended(act, Spoilt(tmp_path), capsys)
    assert (code, bool(re.search(found.words, text))) == (found.code, True), text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    left = {p.name for p in tmp_path.iterdir() if "moecc" in p.name or p.name == "out"}
    assert not left or found.code in (0, 3)
