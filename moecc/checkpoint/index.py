"""Read ``model.safetensors.index.json``, which maps tensors to shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.limits import name_fault
from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.checkpoint.safetensors import Header

MAX_INDEX_BYTES = 64 << 20
SHARD_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Index:
    """An index.

    Attributes:
      path: its file.
      weight_map: file name of each tensor; only those with a usable file name.
      named: all tensors that it names, including those with unusable file names.
      total_size_bytes: the sum of the tensors' sizes, if the index states it.
    """

    path: Path
    weight_map: dict[str, str]
    named: frozenset[str]
    total_size_bytes: int | None

    @property
    def shards(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))


def read_index(path: Path, problems: Problems) -> Index:
    """Read and check an index; errors in its content go to `problems`.

    Raises:
      InputError: the file is not a bounded JSON object.
      MachineError: the file cannot be read.
    """
    content = read_json_object(path, limit_bytes=MAX_INDEX_BYTES)
    total = _total_size(content.get("metadata"), path, problems)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.add(
            "the index has no weight_map",
            where=str(path),
            expected='"weight_map": an object from tensor names to file names',
            found=describe(weight_map),
        )
        return Index(path, {}, frozenset(), total)
    usable = _usable(weight_map, path, problems)
    return Index(path, usable, frozenset(weight_map), total)


def compare_with_headers(index: Index, headers: dict[Path, Header], problems: Problems) -> None:
    """Compare an index with the headers of the shards that could be read."""
    homes: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            other = homes.setdefault(name, file)
            if other is not file:
                what = f"the tensor {quoted(name)} is in two shards"
                both = f"{other.name} and {file.name}"
                problems.add(what, where=str(index.path), found=both)
    by_name = {file.name: header.tensors for file, header in headers.items()}
    for name, shard in index.weight_map.items():
        if shard in by_name and name not in by_name[shard]:
            what = f"the index puts the tensor {quoted(name)} into a shard that lacks it"
            found = f"it is in {homes[name].name}" if name in homes else None
            expected = f"it in {quoted(shard)}"
            problems.add(what, where=str(index.path), expected=expected, found=found)
    for name, home in homes.items():
        if name not in index.named:
            what = f"the tensor {quoted(name)} of {home.name} is not in the index"
            problems.add(what, where=str(index.path))
    if not problems:
        _compare_total(index, headers, problems)


def _compare_total(index: Index, headers: dict[Path, Header], problems: Problems) -> None:
    total = sum(info.nbytes for header in headers.values() for info in header.tensors.values())
    if index.total_size_bytes is not None and index.total_size_bytes != total:
        problems.add(
            "the index states another total size than the tensors have",
            where=str(index.path),
            expected=f"{total:,} bytes",
            found=f"{index.total_size_bytes:,} bytes",
        )


def _usable(weight_map: dict[str, object], path: Path, problems: Problems) -> dict[str, str]:
    """Return the entries with a usable file name; report each bad tensor name and file once."""
    for name in weight_map:
        if name_problem := name_fault(name):
            problems.add(name_problem, where=f"{path}, tensor {quoted(name)}")
    usable = {}
    refused: Counter[str] = Counter()
    examples: dict[str, tuple[str, object, str]] = {}
    checked: dict[str, str | None] = {}
    for name, file in weight_map.items():
        key = file if isinstance(file, str) else describe(file)
        if key not in checked:
            checked[key] = shard_name_fault(file)
        reason = checked[key]
        if reason is not None:
            refused[key] += 1
            examples.setdefault(key, (name, file, reason))
        elif isinstance(file, str):
            usable[name] = file
    for key, (name, file, why) in examples.items():
        others = f" and {refused[key] - 1:,} more" if refused[key] > 1 else ""
        problems.add(
            f"the file of the tensor {quoted(name)}{others} {why}",
            where=str(path),
            expected="the plain name of a .safetensors file in the same folder",
            found=describe(file),
        )
    return usable


def shard_name_fault(file: object) -> str | None:
    """Return why a file name in an index must not be opened, or None."""
    if not isinstance(file, str):
        return "is not a string"
    if fault := name_fault(file):
        return f"is not usable: {fault}"
    # Windows' rules are the stricter ones: they cover drives, shares and both kinds of slash.
    windows = PureWindowsPath(file)
    if windows.drive or windows.root:
        return "has an absolute path"
    if ".." in windows.parts:
        return "has a path that climbs out of the folder"
    if "/" in file or "\\" in file:
        return "has a path with folders in it"
    if not file.endswith(SHARD_SUFFIX) or file == SHARD_SUFFIX:
        return f"does not end in {SHARD_SUFFIX}"
    return None


def _total_size(metadata: object, path: Path, problems: Problems) -> int | None:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is None:
        return None
    # Older versions of transformers wrote it as a float.
    whole = isinstance(total, int | float) and not isinstance(total, bool) and total == int(total)
    if whole and total >= 0:
        return int(total)
    problems.add(
        "the total_size of the index is not a size",
        where=str(path),
        expected="a whole number of bytes",
        found=describe(total),
    )
    return None
