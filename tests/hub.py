"""A stand-in for the Hugging Face Hub: data sets, and models that can be uploaded, over HTTP to the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(sets: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """The address (``HF_ENDPOINT``) of a Hub that has these data sets: by name their files, by path."""
    found = {path: data for name, files in sets.items() for path, data in _answers(name, files).items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = found.get(unquote(urlsplit(self.path).path))
            self.send_response(404 if data is None else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            if data is None:
                known = any(f"/{name}/" in self.path for name in sets)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            else:
                self.send_header("ETag", f'"{_digest(data)}"')
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def model_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """The address of a Hub that takes models, and what it was given: by name their files, by path."""
    models: dict[str, dict[str, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content: object, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, **headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            name = "/".join(path.split("/")[3:5])
            if path == "/api/repos/create":
                given = json.loads(body)
                made = f"{given.get('organization') or 'me'}/{given['name']}"
                models.setdefault(made, {})
                self.answer({"url": f"http://{self.headers['Host']}/{made}"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                how = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
            else:  # a commit: a line for each file
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[0] == "api":
                files = models.get("/".join(parts[2:4]))
                if "tree" in parts:
                    entries = [{"type": "file", "path": p, "size": len(d), "oid": _digest(d)} for p, d in (files or {}).items()]
                    self.answer(entries)
                    return
                facts = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": path} for path in files or {}]}
                self.answer(facts if files is not None else {}, 200 if files is not None else 404)
                return
            data = models.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            self.answer(data or b"", 404 if data is None else 200, ETag=f'"{_digest(data or b"")}"')

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", models
    finally:
        server.shutdown()
        server.server_close()


def _answers(name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the client gets, by path: the files, the repository's facts, the list of every folder."""
    facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
    answers = {f"/api/datasets/{name}": facts, **{f"/api/datasets/{name}/revision/{at}": facts for at in ("main", COMMIT)}}
    folders = {parent for path in files for parent in PurePosixPath(path).parents}
    for folder in folders:
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
            for path, data in files.items()
            if PurePosixPath(path).parent == folder
        ]
        entries += [
            {"type": "directory", "path": str(other), "oid": COMMIT, "size": 0}
            for other in folders
            if other.parent == folder != other
        ]
        tree = "" if folder == PurePosixPath(".") else f"/{folder}"
        answers[f"/api/datasets/{name}/tree/{COMMIT}{tree}"] = entries
    served = {path: json.dumps(content).encode() for path, content in answers.items()}
    return served | {f"/datasets/{name}/resolve/{at}/{path}": data for path, data in files.items() for at in ("main", COMMIT)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
