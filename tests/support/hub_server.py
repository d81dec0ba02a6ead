"""A server on this machine with the routes of the Hugging Face hub, over folders.

``ROOT/ORG/NAME/BRANCH/…`` are the files of a branch. Faults are named by the tests:
``gated`` models answer 403, and ``cut_after`` bytes of a body the connection ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_PART = 1 << 20


def commit_of(branch: Path) -> str:
    """Return the commit that stands for the state of a folder."""
    files = [(str(p), p.is_file() and p.stat().st_size) for p in sorted(branch.rglob("*"))]
    return hashlib.sha1(repr((str(branch), files)).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; `sent_bytes` counts the bytes of all bodies."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.sent_bytes = root, 0
        self.gated: set[str] = set()
        self.cut_after: int | None = None
        self.requests: list[tuple[str, str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def branch(self, model: str, revision: str) -> Path | None:
        """Return the folder of a branch or a commit of a model."""
        folders = [p for p in (self.root / model).glob("*") if p.is_dir()]
        return next((p for p in folders if revision in (p.name, commit_of(p))), None)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.command, path, body.decode(errors="replace")))
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization', 'user')}/{values['name']}"
            (self.server.root / name / "main").mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif model is None:
            self._error(404, "RepoNotFound")
        elif model[1] in self.server.gated:
            self._error(403, "Forbidden")
        elif model[2] == "branch":
            (self.server.root / model[1] / model[3]).mkdir(exist_ok=True)
            self._json({})
        elif model[2] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self._json({"files": files})
        else:
            self._commit(self.server.root / model[1] / model[3], body, model[1])

    def _commit(self, branch: Path, body: bytes, model: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (
                None, commit_of(branch)
            ):  # fmt: skip
                self._error(412, "")
                return
            if line["key"] == "deletedFile":
                (branch / value["path"]).unlink()
            if line["key"] == "file":
                (branch / value["path"]).write_bytes(base64.b64decode(value["content"]))
        commit = commit_of(branch)
        self._json({"commitUrl": f"{self.server.url}/{model}/commit/{commit}",
                    "commitOid": commit, "hookOutput": ""})  # fmt: skip

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = tree or file or info
        if match is None or not (self.server.root / match[1]).is_dir():
            self._error(404, "RepoNotFound")
        elif (branch := self.server.branch(match[1], match[2] or "main")) is None:
            self._error(404, "RevisionNotFound")
        elif tree:
            self._json([self._entry(p, branch) for p in sorted(branch.rglob("*"))])
        elif file is None:
            names = [p.relative_to(branch).as_posix() for p in branch.rglob("*") if p.is_file()]
            siblings = [{"rfilename": name} for name in names]
            self._json({"id": match[1], "sha": commit_of(branch), "siblings": siblings})
        elif match[1] in self.server.gated:
            self._error(403, "GatedRepo")
        elif not (branch / match[3]).is_file():
            self._error(404, "EntryNotFound")
        else:
            self._file(branch / match[3], commit_of(branch))

    @staticmethod
    def _entry(path: Path, branch: Path) -> dict[str, Any]:
        name, oid = path.relative_to(branch).as_posix(), hashlib.sha1(bytes(path)).hexdigest()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": oid, "size": 0}
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": oid}
        entry["size"] = path.stat().st_size
        if path.suffix == ".safetensors" and entry["size"] < 1 << 30:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["lfs"] = {"oid": digest, "size": entry["size"], "pointerSize": 130}
        return entry

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} of a test"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.sent_bytes += len(body)

    def _file(self, path: Path, commit: str) -> None:
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, size
        if match:
            start, stop = int(match[1]), min(size, int(match[2] or size - 1) + 1)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{hashlib.sha1(bytes(path)).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as stream:
            stream.seek(start)
            while start < stop:
                part = stream.read(min(_PART, stop - start))
                cut = self.server.cut_after
                if cut is not None and self.server.sent_bytes + len(part) > cut:
                    self.wfile.write(part[: len(part) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(part)
                self.server.sent_bytes += len(part)
                start += len(part)
