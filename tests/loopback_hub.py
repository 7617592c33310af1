"""A small model hub on 127.0.0.1: the requests of huggingface_hub's snapshot_download, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".gz")  # what a real hub keeps in LFS and lists with a SHA-256


def git_id(content: bytes) -> str:
    """Returns what `git hash-object` prints for `content`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `files` as every repository but org/gated (needs the token hf_CANARY) and org/missing.

    `cut` counts, by file name, the transfers to break in the middle; those of a file in `broken` all break until it was
    asked for by HEAD, as each attempt begins, more than that many times; a file in `corrupt` arrives with one bit
    flipped; `listed_size` overrides the size in the listing. `log` holds (method, path, Range, Authorization).

    `sets` are data sets, each with files of its own: "org/name", or "org/name@refs/convert/parquet" for a revision.
    Their commits are hashes of what they hold. The data set org/gated needs the token, too.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut: dict[str, int] = {}
        self.broken: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.listed_size: dict[str, int] = {}
        self.uploaded: dict[str, bytes] = {}
        self.sets: dict[str, dict[str, bytes]] = {}
        self.log: list[tuple[str, str, str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        """Stops; called at the end of a `with`."""
        self.shutdown()
        super().server_close()

    def transfers(self) -> list[str]:
        """Returns the file name of each GET of a file's content, in order."""
        return [path.rsplit("/", 1)[1] for method, path, *_ in self.log if method == "GET" and "/resolve/" in path]

    def commit(self, name: str) -> str:
        """Returns the commit of a data set's revision."""
        held = [(file, hashlib.sha1(content).hexdigest()) for file, content in sorted(self.sets[name].items())]
        return hashlib.sha1(repr((name, held)).encode()).hexdigest()

    def entry(self, name: str, files: dict[str, bytes] | None = None) -> dict[str, Any]:
        """Returns the file as the tree listing shows it."""
        content = (self.files if files is None else files)[name]
        size = self.listed_size.get(name, len(content))
        entry = {"type": "file", "path": name, "size": size, "oid": git_id(content)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return entry


class Handler(BaseHTTPRequestHandler):
    """One request; `self.server` is the Hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *values: object) -> None:
        """Silent: the Hub keeps its own log."""

    def do_GET(self) -> None:
        """Answers GET and HEAD."""
        head = [self.headers.get(name, "") for name in ("Range", "Authorization")]
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, *head))
        if "org/missing" in path:
            return self.error(401, "RepoNotFound", "Repository not found")
        if "org/gated" in path and head[1] != "Bearer hf_CANARY":
            return self.error(403 if head[1] else 401, "GatedRepo", "Access to model org/gated is restricted")
        if match := re.fullmatch(r"(?:/api)?/datasets/([\w-]+/[\w.-]+)(?:/(revision|tree|resolve)/(.+))?", path):
            return self.data_set(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/api/models/org/\w+(?:/revision/(.+))?", path):
            if match[1] not in (None, "main", "v1", COMMIT):
                return self.error(404, "RevisionNotFound", f"Invalid rev id: {match[1]}")
            return self.reply(200, {"id": path.split("models/")[1], "sha": COMMIT, "siblings": []})
        if re.fullmatch(rf"/api/models/org/\w+/tree/{COMMIT}", path):
            return self.reply(200, [self.server.entry(name) for name in self.server.files])
        if match := re.fullmatch(rf"/org/\w+/resolve/{COMMIT}/(.+)", path):
            return self.file(match[1])
        return self.error(404, "EntryNotFound", "no such address")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Takes an upload, file by file in one commit; what is in `uploaded` of the server then."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append((self.command, path, "", self.headers.get("Authorization", "")))
        if self.headers.get("Authorization") != "Bearer hf_CANARY":
            return self.error(401, "", "Invalid credentials")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            return self.reply(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})
        if re.fullmatch(r"/api/models/org/\w+/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.reply(200, {"files": modes, "commitOid": COMMIT})
        if re.fullmatch(r"/api/models/org/\w+/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.uploaded = {f["path"]: base64.b64decode(f["content"]) for f in files}
            return self.reply(200, {"success": True, "commitUrl": f"{self.server.url}/org/x", "commitOid": COMMIT})
        return self.reply(200, {"errors": [], "warnings": []})  # /api/validate-yaml

    def data_set(self, repo: str, part: str | None, rest: str) -> None:
        """Answers for a data set: its commit, the files of a commit, or one of them."""
        sets, commit = self.server.sets, self.server.commit
        revisions = {name.partition("@")[2] or "main": name for name in sets if name.partition("@")[0] == repo}
        if not revisions:
            return self.error(401, "RepoNotFound", "Repository not found")
        commits = {commit(name): name for name in revisions.values()}
        if part in (None, "revision"):
            name = revisions.get(rest) or commits.get(rest)
            if name is None:
                return self.error(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            return self.reply(200, {"id": repo, "sha": commit(name), "siblings": []})
        at, _, file = rest.partition("/")
        files = sets[commits[at]]
        if part == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self.reply(200, [self.server.entry(one, files) for one in files if recursive or "/" not in one])
        return self.file(file, files[file], at)

    def file(self, name: str, content: bytes | None = None, commit: str = COMMIT) -> None:
        """Sends the content from the byte that Range names; half of it if it is to be cut."""
        content = self.server.files[name] if content is None else content
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_id(content)
        head = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start:
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.server.cut.get(name, 0) > 0
        if cut:
            self.server.cut[name] -= 1
        heads = sum(method == "HEAD" and path.endswith(f"/{name}") for method, path, *_ in self.server.log)
        if self.command == "GET" and heads <= self.server.broken.get(name, 0):
            cut = True
        self.close_connection |= cut
        self.reply(206 if start else 200, content[start:], head, send=(len(content) - start) // 2 if cut else None)

    def error(self, status: int, code: str, message: str) -> None:
        """Sends an error the way the hub tells its cause."""
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def reply(self, status: int, body: Any, head: dict[str, str] | None = None, send: int | None = None) -> None:
        """Sends `body`, or its first `send` bytes under the full length."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(head or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:send])
