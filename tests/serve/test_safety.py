"""If this breaks: a page of the internet reaches the model through a visitor's browser, a few clients that send half a request
take the server from everybody, or a large body is read into memory. Real sockets, the server's own application, no model.
"""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

ORIGIN = "https://chat.example"


@pytest.fixture(scope="module")
def edge(endless_model):
    """The application on a real socket, without LitServe's other processes: routes that need the model answer 503."""
    from serve.engine_client import Limits
    from serve.server import Network, Settings, build

    network = Network(port=free_port(), allowed_hosts=("Model.Example",), cors_origins=(ORIGIN,), request_seconds=1,
                      write_seconds=2, keep_alive_seconds=2, max_connections=40)
    server = build(Settings(endless_model, ("one", "two"), network, keys=("sesame",), limits=Limits(max_body_bytes=1000)))
    running = uvicorn.Server(uvicorn.Config(server.app, port=network.port, lifespan="off", log_level="critical", **network.uvicorn()))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    running.port, running.spec = network.port, server.lit_api.spec
    yield running
    running.should_exit = running.force_exit = True
    thread.join(10)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def http(edge):
    with httpx.Client(base_url=f"http://127.0.0.1:{edge.port}", timeout=20) as client:
        yield client


def raw(edge, text):
    client = socket.create_connection(("127.0.0.1", edge.port), timeout=10)
    client.sendall(text.encode("latin-1"))
    return client


def until_closed(client):
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(("host", "served"), [
    ("127.0.0.1", True), ("localhost", True), ("LOCALHOST:1234", True), ("localhost.", True), ("127.1.2.3:80", True), ("[::1]:8000", True),
    ("model.example", True), ("model.example:443", True),
    ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("0.0.0.0", False), ("10.0.0.1", False),
    ("", False), ("a.model.example", False), ("[::1", True), ("localhost@evil.example", False), ("2130706433", False),
])
def test_only_own_hosts_are_served(host, served, edge):
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("POST", "/v1/chat/completions"), ("GET", "/nowhere"), ("OPTIONS", "/chat")):
        client = raw(edge, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: {ORIGIN}\r\nAccess-Control-Request-Method: POST\r\n"
                           "Content-Length: 0\r\nConnection: close\r\n\r\n")
        reply = until_closed(client)
        assert (b"host_not_allowed" not in reply) == served, reply
        assert reply.startswith(b"HTTP/1.1 403") != served, reply


def test_a_name_that_points_here_gets_no_redirect_with_it(edge):
    for path in ("/v1/models/", "/chat/", "//evil.example"):
        reply = until_closed(raw(edge, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
        assert b"location:" not in reply.lower()
        assert not reply.startswith(b"HTTP/1.1 30")


def test_headers_of_every_response(http):
    for method, path in (("GET", "/"), ("GET", "/health/live"), ("GET", "/nowhere"), ("POST", "/chat"), ("PUT", "/chat")):
        headers = http.request(method, path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "server" not in headers


def test_request_ids(http):
    assert http.get("/version", headers={"x-request-id": "trace-1.2:3_4"}).headers["x-request-id"] == "trace-1.2:3_4"
    for wrong in ("x" * 129, "a b", "ä".encode(), "a;b"):
        answered_id = http.get("/version", headers={"x-request-id": wrong}).headers["x-request-id"]
        assert len(answered_id) == 32
        assert answered_id.isalnum()
    assert http.get("/nowhere").headers["x-request-id"] != http.get("/nowhere").headers["x-request-id"]


def test_any_case_of_bearer(http):
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert http.get("/v1/models", headers={"Authorization": f"{scheme} sesame"}).status_code == 503     # no engine
    for wrong in ("sesame", "Basic sesame", "Bearer", "Bearersesame", "bearer"):
        assert http.get("/v1/models", headers={"Authorization": wrong}).status_code == 401


def test_cors_is_for_the_named_origin(http):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    reply = http.options("/v1/chat/completions", headers=ask | {"Origin": ORIGIN})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(reply.headers["access-control-allow-headers"].lower().replace(" ", "").split(","))
    refused = http.options("/v1/chat/completions", headers=ask | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    for path, headers in (("/v1/models", {}), ("/nowhere", {}), ("/health", {})):      # errors can be read, too
        assert http.get(path, headers=headers | {"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-origin" not in http.get(path, headers={"Origin": "https://evil.example"}).headers


def test_head_is_get_without_a_body(http):
    for path in ("/", "/health/live", "/version", "/metrics"):
        reply, whole = http.head(path), http.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert reply.headers["content-type"] == whole.headers["content-type"]
        assert int(reply.headers["content-length"]) > 0
    assert http.head("/v1/chat/completions").status_code == 405


def test_health_and_metrics_without_a_worker(http):
    for path in ("/health", "/health/ready"):
        reply = http.get(path)
        assert (reply.status_code, reply.json()["status"]) == (503, "not ready")
        assert reply.headers["retry-after"]
    assert http.get("/health/live").status_code == 200
    before = http.get("/metrics").text
    http.get("/nowhere/1")
    http.get("/nowhere/2")
    after = http.get("/metrics").text
    assert "lit_llm_ready 0.0" in after
    assert count(after, "404", "other") - count(before, "404", "other") == 2      # one series, however many paths are tried
    assert "nowhere" not in after


def count(text, code, route):
    wanted = f'lit_llm_requests_total{{code="{code}",route="{route}"}} '
    return sum(float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted))


def test_metrics_need_the_key_from_elsewhere(edge):
    """uvicorn takes the client's address from a local proxy."""
    def ask(*headers):
        reply = until_closed(raw(edge, "\r\n".join(("GET /metrics HTTP/1.1", "Host: localhost", "Connection: close", *headers)) + "\r\n\r\n"))
        return int(reply.split()[1])

    assert ask() == 200
    assert ask("X-Forwarded-For: 203.0.113.9") == 401
    assert ask("X-Forwarded-For: 203.0.113.9", "Authorization: Bearer sesame") == 200


def test_a_body_is_refused_by_its_length_before_it_is_read(edge):
    client = raw(edge, "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1001\r\n\r\n")
    reply = client.recv(65536)                      # not a byte of the body was sent
    assert reply.startswith(b"HTTP/1.1 413")
    assert json.loads(reply.split(b"\r\n\r\n")[1])["error"]["code"] == "body_too_large"


def test_a_chunked_body_is_refused_while_it_is_read(edge):
    client = raw(edge, "POST /chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(11):
        client.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 413")


HALVES = {"nothing": "", "a method": "POST", "headers": "POST /chat HTTP/1.1\r\nHost: localhost\r\n",
          "no body": "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n",
          "half a body": "POST /chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
                         "Content-Length: 50\r\n\r\n{",
          "half a chunk": "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
          "a second request": "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ver",
          "a refused body": "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\nxxx"}


def test_half_a_request_is_closed_in_time(edge):
    """All at once; each trickles on where it can, which gives it no more time."""
    started = time.monotonic()
    clients = {name: raw(edge, text) for name, text in HALVES.items()}
    replies, ended = {}, {}

    def follow(name, client):
        client.settimeout(0.2)
        parts = b""
        while time.monotonic() - started < 8:
            try:
                if not (part := client.recv(65536)):
                    break
                parts += part
            except TimeoutError:
                if "body" in name:
                    client.sendall(b" ")
            except OSError:
                break
        replies[name], ended[name] = parts, time.monotonic() - started

    threads = [threading.Thread(target=follow, args=item) for item in clients.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(ended.values()) < 6, ended           # 1 second, and a loaded machine
    for name in ("headers", "half a body", "a second request"):
        assert b"HTTP/1.1 408" in replies[name], name
    assert replies["nothing"] == b""
    assert replies["a second request"].startswith(b"HTTP/1.1 200")


def test_an_idle_connection_stays_open_and_then_ends(edge):
    client = raw(edge, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    time.sleep(1.3)                                 # longer than a request may take to arrive
    client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    start = time.monotonic()
    assert client.recv(65536) == b""
    assert 1.5 < time.monotonic() - start < 6


def unread(edge, count):
    """A connection with a small buffer, on which so many answers of some kilobytes are requested and none is read yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    client.settimeout(20)
    client.connect(("127.0.0.1", edge.port))

    def ask():
        with contextlib.suppress(OSError):
            for _ in range(count):
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n\r\n")

    threading.Thread(target=ask, daemon=True).start()
    return client


def test_a_client_that_does_not_read_is_cut_and_a_slow_one_is_not(edge):
    """Within two seconds it must read something; the slow one reads some kilobytes each time, of megabytes."""
    count = 300
    deaf, slow, parts = unread(edge, count), unread(edge, count), []
    for _ in range(8):
        parts.append(slow.recv(20_000))
        time.sleep(0.6)
    received = b""
    with contextlib.suppress(ConnectionError):      # what the system had taken comes first
        while part := deaf.recv(1 << 20):
            received += part
    assert 0 < received.count(b"HTTP/1.1 200") < count
    answers = b"".join(parts)
    while answers.count(b"HTTP/1.1 200") < count:
        part = slow.recv(1 << 20)
        assert part, "it was cut"
        answers += part


def test_many_connections(edge):
    """Above the limit a client is told; far above it, it is cut. Those before keep theirs."""
    first = raw(edge, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert first.recv(65536).startswith(b"HTTP/1.1 200")
    others = []
    try:
        others += [socket.create_connection(("127.0.0.1", edge.port), timeout=10) for _ in range(45)]
        time.sleep(0.2)
        reply = until_closed(raw(edge, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert reply.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in reply
        first.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
        others += [socket.create_connection(("127.0.0.1", edge.port), timeout=10) for _ in range(80)]
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert others[-1].recv(1) == b""
        assert time.monotonic() - start < 0.8       # before the time for a request is over
    finally:
        for client in others:
            client.close()
    time.sleep(0.3)
    assert until_closed(raw(edge, "GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


def test_draining(edge, http):
    """After SIGTERM: new requests are refused at once, health says why."""
    edge.spec.engine.draining = True
    try:
        for method, path in (("POST", "/chat"), ("GET", "/v1/models"), ("GET", "/"), ("POST", "/v1/chat/completions")):
            reply = http.request(method, path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
            assert (reply.headers["retry-after"], reply.headers["connection"]) == ("5", "close")
        assert http.get("/health/ready").json()["status"] == http.get("/health").json()["status"] == "shutting down"
        assert http.get("/health/live").status_code == http.get("/metrics").status_code == 200
    finally:
        edge.spec.engine.draining = False


@pytest.mark.parametrize(("words", "named"), [
    (["--allowed-host", "a/b"], "--allowed-host"), (["--allowed-host", ""], "--allowed-host"), (["--cors-origin", "chat.example"], "--cors-origin"),
    (["--cors-origin", "https://a.example/path"], "--cors-origin"), (["--max-wait-seconds", "0"], "--max-wait-seconds"),
    (["--keep-alive-seconds", "0"], "--keep-alive-seconds"), (["--max-connections", "0"], "--max-connections"),
])
def test_wrong_options(words, named, endless_model, capsys):
    from serve.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(["--model", endless_model, *words])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
