"""A stand-in for the Hugging Face Hub on 127.0.0.1, for the unmodified `huggingface_hub` client without Xet.

It knows model repos and Spaces ("spaces/user/name") with their commits, branches and tags, files in git and in LFS,
tokens, and failures on demand. Tests take the fixture `hub`; `hub.fail`, `hub.cut` and `hub.stop` make it
misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

USER, TOKEN = "tester", "hf_loopbackSecretToken"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".png", ".parquet")
WRONG_TOKEN = "Invalid credentials in Authorization header"


class RefusedError(Exception):
    """An answer of the hub that is an error, in the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def listed(self) -> dict:
        """Size and hashes as the client wants them."""
        size = len(self.data)
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": len(self.pointer)}
        return {"oid": self.oid, "blobId": self.oid, "size": size, **({"lfs": lfs} if self.lfs else {})}


@dataclass
class Commit:
    files: dict[str, File]
    title: str
    parent: str | None


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], title: str, branch: str = "main") -> str:
        parent = self.branches.get(branch)
        seed = [branch, parent, title, len(self.commits), sorted((name, file.oid) for name, file in files.items())]
        oid = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        self.commits[oid] = Commit(files, title, parent)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        name = re.sub(r"^refs/(heads|tags)/", "", revision)
        oid = self.branches.get(name) or self.tags.get(name) or (name if name in self.commits else None)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Failure:
    """What happens to the next `times` requests of `method` whose path and query match the pattern `path`."""

    status: int | None
    times: float
    method: str | None
    path: str
    headers: dict = field(default_factory=dict)
    silent: bool = False

    def meets(self, method: str, path: str) -> bool:
        met = self.times > 0 and self.method in (None, method) and re.search(self.path, path) is not None
        self.times -= met
        return met


# The card of a new Space, as the Hub writes it.
NEW_SPACE = """---
title: {}
emoji: 🌖
colorFrom: purple
colorTo: red
sdk: gradio
sdk_version: 5.0.0
app_file: app.py
pinned: false
---

Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference
"""


class LoopbackHub:
    """The server, what it holds, and switches for failures.

    Attributes:
        url (`str`): its address.
        token (`str`): the one token it accepts, that of `user`. Public repos are read without any.
        log (`list[str]`): "METHOD path" of every request.
    """

    def __init__(self, user: str = USER, token: str = TOKEN):
        self.user, self.token = user, token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    # --- what tests put in and look at ----------------------------------------------------------------------------

    def put(self, repo_id: str, files: dict[str, bytes | str | None], branch: str = "main", private=False) -> str:
        """Commits files past the client, making the repo where needed; None removes one. Returns the commit's hash."""
        repo = self.repos.get(repo_id) or self.create(repo_id, private)
        held = dict(repo.commits[repo.branches.get(branch, repo.branches["main"])].files)
        for name, data in files.items():
            held.pop(name, None)
            if data is not None:
                data = data.encode() if isinstance(data, str) else data
                held[name] = File(data, is_lfs(name, data))
        return repo.commit(held, "put", branch)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        repo = self.repos[repo_id]
        return {name: file.data for name, file in repo.commits[repo.resolve(revision)].files.items()}

    def create(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({}, "initial commit")
        return repo

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """The messages of a revision's commits, newest first."""
        repo = self.repos[repo_id]
        oid, found = repo.resolve(revision), []
        while oid is not None:
            found.append(repo.commits[oid].title)
            oid = repo.commits[oid].parent
        return found

    def asked(self, pattern: str) -> int:
        """How many requests matched the pattern."""
        return sum(re.search(pattern, line) is not None for line in self.log)

    # --- failures -------------------------------------------------------------------------------------------------

    def fail(self, status: int, times: float = 1, method: str | None = None, path: str = "", **headers) -> None:
        """Answers the next `times` matching requests with `status`; `Retry_After="0"` and the like are headers."""
        self.failures.append(Failure(status, times, method, path, headers))

    def cut(self, path: str, times: float = 1, silent: bool = False) -> None:
        """Breaks the connection in the middle of the body of the next `times` matching downloads.

        Where `silent`, half of the file is sent as if it were the whole.
        """
        self.failures.append(Failure(None, times, "GET", path, silent=silent))

    def stop(self) -> None:
        """Closes the server and the client's connections to it, as if the network were gone."""
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.close_session()


def is_lfs(name: str, data: bytes) -> bool:
    return name.endswith(LFS_ENDINGS) or b"\0" in data


ROUTES: list[tuple[str, str, Callable]] = []


def route(methods: str, pattern: str) -> Callable:
    """Hands requests of these methods and this path to a method of the handler, with the pattern's groups."""

    def add(method: Callable) -> Callable:
        ROUTES.append((methods, pattern, method))
        return method

    return add


NAME = r"((?:spaces/)?[^/]+/[^/]+)"
REPO = r"/api/(?:models/|(?=spaces/))" + NAME


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.raw, self.query = self.body(), parse_qs(url.query)
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {self.path}")
            self.failure = None
            try:
                self.fail_on_demand()
                self.check_token()
                self.find(url.path)
            except RefusedError as refused:
                self.refuse(refused)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def find(self, path: str) -> None:
        for methods, pattern, method in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return method(self, *(None if group is None else unquote(group) for group in match.groups()))
        raise RefusedError(404, f"no such route: {self.command} {path}")

    def fail_on_demand(self) -> None:
        self.failure = next((f for f in self.hub.failures if f.meets(self.command, self.path)), None)
        if self.failure is not None and self.failure.status is not None:
            raise RefusedError(self.failure.status, "failed on demand")

    # --- tokens ---------------------------------------------------------------------------------------------------

    def check_token(self) -> None:
        """A token that is wrong is refused even where none is needed."""
        given = self.headers.get("Authorization")
        self.known = given == f"Bearer {self.hub.token}"
        if given is not None and not self.known:
            raise RefusedError(401, WRONG_TOKEN)

    def writable(self, repo_id: str) -> None:
        if not self.known:
            raise RefusedError(401, "Invalid username or password.")
        owner = repo_id.split("/")[-2]
        if owner != self.hub.user:
            raise RefusedError(403, f"You don't have the rights to create a model under {owner!r}")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """A repo that exists and that the token may see; the Hub tells neither from the other."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.known):
            raise RefusedError(404 if self.known else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writable(repo_id)
        return repo

    # --- in and out -----------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, data: object = b"", status: int = 200, kind: str = "application/json", **headers) -> None:
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        cut = self.failure is not None and self.failure.status is None
        sent = data[: len(data) // 2] if cut else data
        data = sent if cut and self.failure.silent else data
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection = self.close_connection or cut

    def refuse(self, refused: RefusedError) -> None:
        headers = {"X_Error_Message": str(refused), **(self.failure.headers if self.failure else {})}
        if refused.code is not None:
            headers["X_Error_Code"] = refused.code
        self.send({"error": str(refused)}, refused.status, **headers)

    def blob(self, data: bytes, **headers) -> None:
        """A file, or the part that a Range header asks for; a range beyond its end is an error, as on the Hub."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(data, kind="application/octet-stream", **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            raise RefusedError(416, "Range Not Satisfiable")
        place = f"bytes {first}-{last}/{len(data)}"
        self.send(data[first : last + 1], 206, "application/octet-stream", Content_Range=place, **headers)

    # --- routes: who, and repos -----------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.known:
            raise RefusedError(401, WRONG_TOKEN)
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send({"type": "user", "id": "0", "name": self.hub.user, "orgs": [], "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        self.send({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repo(self):
        asked = json.loads(self.raw)
        repo_id = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if asked.get("type") == "space":
            repo_id = f"spaces/{repo_id}"
            if asked.get("sdk") != "gradio":
                raise RefusedError(400, "a Space here is one of gradio")
        self.writable(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            message = "You already created this model repo"
            return self.send({"error": message, "url": url, "name": repo_id}, 409, X_Error_Message=message)
        self.hub.create(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        if asked.get("type") == "space":
            self.hub.put(repo_id, {"README.md": NEW_SPACE.format(asked["name"].title())})
        self.send({"url": url, "name": repo_id, "id": "0"})

    @route("GET", REPO + r"(?:/revision/([^/]+))?")
    def info(self, repo_id, revision):
        repo = self.repo(repo_id)
        oid = repo.resolve(revision or "main")
        files = repo.commits[oid].files
        card = front_matter(files.get("README.md"))
        self.send(
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": oid,
                "private": repo.private,
                "lastModified": now(),
                "createdAt": now(),
                "tags": card.get("tags") or [],
                "cardData": card,
                "siblings": [
                    {"rfilename": name, **(file.listed() if "blobs" in self.query else {})}
                    for name, file in sorted(files.items())
                ],
            }
        )

    @route("GET", REPO + "/refs")
    def refs(self, repo_id):
        repo = self.repo(repo_id)
        listed = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in held.items()]
            for kind, place, held in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        self.send({**listed, "converts": [], "pullRequests": []})

    @route("POST", REPO + "/branch/([^/]+)")
    def branch(self, repo_id, name):
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise RefusedError(409, "Reference already exists")
        asked = json.loads(self.raw or b"{}")
        repo.branches[name] = repo.resolve(asked.get("startingPoint") or "main")
        self.send({})

    @route("POST", REPO + "/tag/([^/]+)")
    def tag(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        repo.tags[json.loads(self.raw)["tag"]] = repo.resolve(revision)
        self.send({})

    # --- routes: writing ------------------------------------------------------------------------------------------

    @route("POST", REPO + "/preupload/([^/]+)")
    def preupload(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        oid = repo.resolve(revision)
        answers = []
        for asked in json.loads(self.raw)["files"]:
            lfs = is_lfs(asked["path"], base64.b64decode(asked.get("sample") or ""))
            old = repo.commits[oid].files.get(asked["path"])
            known = None if old is None else old.sha256 if old.lfs else old.oid
            mode = "lfs" if lfs else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send({"files": answers, "commitOid": oid})

    @route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id):
        self.repo(repo_id, write=True)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.raw)["objects"]]
        for found in objects:
            if found["oid"] not in self.hub.lfs:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-store/{found['oid']}", "header": {}}}
        self.send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    @route("PUT", r"/lfs-store/([0-9a-f]{64})")
    def lfs_upload(self, sha256):
        if hashlib.sha256(self.raw).hexdigest() != sha256:
            raise RefusedError(400, "the hash differs")
        self.hub.lfs[sha256] = self.raw
        self.send()

    @route("POST", REPO + "/commit/([^/]+)")
    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.raw.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.branches[revision]):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[revision]].files)
        for line in lines:
            self.apply(files, line["key"], line["value"])
        oid = repo.commit(files, header["summary"], revision)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self.send({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def apply(self, files: dict[str, File], key: str, value: dict) -> None:
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                raise RefusedError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
            files[value["path"]] = File(self.hub.lfs[value["oid"]], True)
        elif key == "deletedFile":
            files.pop(value["path"])
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(value["path"].rstrip("/") + "/")]:
                del files[name]

    # --- routes: reading ------------------------------------------------------------------------------------------

    @route("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)")
    def resolve(self, repo_id, revision, name):
        repo = self.repo(repo_id)
        oid = repo.resolve(revision)
        file = repo.commits[oid].files.get(name)
        if file is None:
            return self.send(
                {}, 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=oid
            )
        if not file.lfs:
            return self.blob(file.data, X_Repo_Commit=oid, ETag=f'"{file.oid}"', Accept_Ranges="bytes")
        # Large files lie on another host, as on the Hub: within one host the client would follow at once and never
        # see the commit.
        self.hub.lfs[file.sha256] = file.data
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs-store/{file.sha256}?name={name}"
        linked = {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.data))}
        self.send(b"", 302, X_Repo_Commit=oid, Location=location, **linked)

    @route("GET HEAD", r"/lfs-store/([0-9a-f]{64})")
    def lfs_download(self, sha256):
        self.blob(self.hub.lfs[sha256], ETag=f'"{sha256}"')

    @route("GET", REPO + r"/tree/([^/]+)(?:/(.*))?")
    def tree(self, repo_id, revision, folder):
        files = self.repo(repo_id).commits[self.repo(repo_id).resolve(revision)].files
        inside = f"{folder.rstrip('/')}/" if folder else ""
        held = {name: file for name, file in files.items() if name.startswith(inside)}
        if folder and not held:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        shown = {name: file for name, file in held.items() if deep or "/" not in name[len(inside) :]}
        parents = {str(p) for name in held for p in Path(name).parents if str(p) not in (".", folder)}
        folders = sorted(p for p in parents if p.startswith(inside) and (deep or "/" not in p[len(inside) :]))
        self.send([*map(listed_folder, folders), *itertools.starmap(listed_file, sorted(shown.items()))])

    @route("POST", REPO + "/paths-info/([^/]+)")
    def paths_info(self, repo_id, revision):
        repo = self.repo(repo_id)
        files = repo.commits[repo.resolve(revision)].files
        asked = json.loads(self.raw) if self.raw.startswith(b"{") else parse_qs(self.raw.decode())
        self.send([listed_file(name, files[name]) for name in asked.get("paths", []) if name in files])

    @route("GET", REPO + "/commits/([^/]+)")
    def commits(self, repo_id, revision):
        repo = self.repo(repo_id)
        oid, found = repo.resolve(revision), []
        while oid is not None:
            author = [{"user": self.hub.user}]
            found.append({"id": oid, "title": repo.commits[oid].title, "message": "", "date": now(), "authors": author})
            oid = repo.commits[oid].parent
        self.send(found)


def listed_file(name: str, file: File) -> dict:
    return {"type": "file", "path": name, **file.listed()}


def listed_folder(name: str) -> dict:
    return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}


def front_matter(card: File | None) -> dict:
    match = re.match(rb"---\s*\n(.*?)\n---", card.data, re.DOTALL) if card is not None else None
    try:
        values = yaml.safe_load(match[1]) if match else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def point_client_to(url: str, folder: Path, monkeypatch) -> None:
    """Points the client of this process to `url`, with a cache in `folder`, and without waits between its retries.

    The client reads HF_ENDPOINT and the like when it is imported, so the environment alone is for subprocesses.
    """
    home = folder / "hf_home"
    environment = {"HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    hasty = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hasty)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub to which the client of this process points, logged in with the hub's token."""
    server = LoopbackHub()
    point_client_to(server.url, tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.stop()
