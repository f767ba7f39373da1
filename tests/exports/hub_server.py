"""A stand-in of the Hugging Face hub's HTTP interface: creating repositories, preupload, LFS batch and upload, commit.

It has the routes that huggingface_hub 2.4 calls for `create_repo`, `model_info` and `upload_folder`, and keeps what it receives.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class Hub(ThreadingHTTPServer):
    """Serves on a free port of this machine.

    Args:
        busy: How many requests to create a repository are answered with 503.
        public: Repositories that exist and are public.
    """

    daemon_threads = True

    def __init__(self, busy=0, public=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.busy, self.tokens, self.requests = busy, set(), []
        self.repositories = {name: {"private": False, "files": {}} for name in public}
        self.objects = {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.server.requests.append(f"GET {self.path}")
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if self.path.startswith("/api/models/") and name in self.server.repositories:
            repository = self.server.repositories[name]
            self.reply({"id": name, "private": repository["private"], "sha": "0" * 40,
                        "siblings": [{"rfilename": file} for file in repository["files"]]})
        else:
            self.reply({"error": "not found"}, 404)

    def do_PUT(self):
        self.server.requests.append(f"PUT {self.path}")
        data, oid = self.body(), self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self.reply({})

    def do_POST(self):
        self.server.requests.append(f"POST {self.path}")
        data, words = self.body(), self.path.split("?")[0].strip("/").split("/")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.create(json.loads(data))
        elif self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(data)["content"].split("---")[1])
            self.reply({"errors": [] if isinstance(head, dict) else [{"message": "no mapping"}], "warnings": []})
        elif "preupload" in words:
            files = json.loads(data)["files"]
            self.reply({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                                   "lfs" if file["path"].endswith(".safetensors") else "regular"} for file in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.reply({"transfer": "basic", "objects": [
                {"oid": upload["oid"], "size": upload["size"], "authenticated": True,
                 "actions": {"upload": {"href": f"{self.server.address}/lfs/{upload['oid']}"}}}
                for upload in json.loads(data)["objects"]]})
        elif "commit" in words:
            self.commit("/".join(words[2:4]), data)
        else:
            self.reply({"error": f"no route {self.path}"}, 404)

    def create(self, wanted):
        if self.server.busy:
            self.server.busy -= 1
            self.reply({"error": "busy"}, 503)
            return
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        if name in self.server.repositories:
            self.reply({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
            return
        self.server.repositories[name] = {"private": private, "files": {}}
        self.reply({"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def commit(self, name, data):
        files = self.server.repositories[name]["files"]
        for line in data.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
        self.reply({"success": True, "commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})
