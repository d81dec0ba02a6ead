"""TOML parsed by Python's own parser, with moecc's errors."""

from __future__ import annotations

import tomllib

from moecc.errors import InputError
from moecc.support.untyped import JsonDict


def parse_toml(text: str, name: str) -> JsonDict:
    """Return the table of a TOML `text`.

    Args:
      text: the TOML.
      name: of its file, in messages.

    Raises:
      InputError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not TOML: {error}", where=name) from None
    except ValueError:  # a number with more digits than Python reads
        raise InputError("not TOML: a number is too long", where=name) from None
    except RecursionError:
        raise InputError("the TOML is nested too deeply", where=name) from None
