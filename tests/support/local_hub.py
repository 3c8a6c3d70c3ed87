"""A Hugging Face Hub on this machine: repositories in memory, as far as `huggingface_hub` asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """The server; `files` holds what each repository has, `created` how each was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Creating repositories, commits with their files inside, and reading files back."""

    server: LocalHub

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "me", asked["name"]]))
            self.server.created.append(asked)
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            self.answer({"success": True, "commitUrl": url, "commitOid": COMMIT})
        else:
            self.answer({"error": self.path}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if self.path.startswith("/api/models/"):
            name = "/".join(parts[2:4])
            known = name in self.server.files
            found = {"id": name, "sha": COMMIT, "siblings": [], "tags": []}
            self.answer(
                found if known else {}, 200 if known else 404, {} if known else {"X-Error-Code": "RepoNotFound"}
            )
            return
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        files = self.server.files.get(name)
        if files is None or path not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            self.answer({}, 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self.reply(files[path], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def reply(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run the server for as long as the context lasts."""
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
