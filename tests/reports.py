"""Reports of the tools in tests: when and where they were made, and where they go."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moecc.version import __version__


def machine() -> str:
    """Return what kind of machine this is."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def about() -> dict[str, str]:
    """Return when, with what and where a report is made."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "python": platform.python_version(),
        "machine": machine(),
    }


def deliver(report: dict[str, Any], out: Path | None) -> int:
    """Print a report, write it to a file if one is given, and return 1 if it has failures."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if out is not None:
        out.write_text(f"{text}\n", "utf-8")
    print(text)
    return int(bool(report["failures"]))


@contextmanager
def work_folder(folder: Path | None, prefix: str) -> Iterator[Path]:
    """Yield a folder to work in: the given one, which is kept, or a temporary one."""
    work = folder or Path(tempfile.mkdtemp(prefix=prefix))
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        if folder is None:
            shutil.rmtree(work)
