"""An S3 server on loopback, and servers that answer wrongly: both over real sockets."""

import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

REGION = "eu-central-1"
SECRET_KEY = "some-very-secret"
BUCKET = "covercal-tests"
TIMEOUT_SECONDS = 20.0  # for one request; a server that is there answers in milliseconds
PROXIES = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL")]


@dataclass(frozen=True)
class S3Server:
    """A server of S3 with one bucket, and a client that knows nothing of ours."""

    url: str
    client: Any

    def names(self, prefix: str) -> set[str]:
        """Return the names of all objects below a prefix, relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {each["Key"].removeprefix(prefix) for page in pages for each in page.get("Contents", [])}

    def read(self, name: str) -> bytes:
        """Return the bytes of an object."""
        return self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def delete(self, name: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=BUCKET, Key=name)


@functools.cache
def s3_server() -> S3Server:
    """Start the one server of this session; its thread ends with the process.

    moto answers from many threads and locks nothing: of two puts with `If-None-Match: *` both may win, and a put that
    overwrites an object closes it under who is just sending it. S3 does neither, so one request is answered at a time.
    """
    import boto3
    import moto.s3.models
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = 1  # tests send parts of some bytes, S3 wants 5 MiB
    answer = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def answer_one(environ: dict[str, Any], start_response: Any) -> Any:
        with one_at_a_time:
            return answer(environ, start_response)

    server = make_server("127.0.0.1", 0, answer_one, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1"]))
    client = boto3.client(
        "s3", endpoint_url=url, region_name=REGION, aws_access_key_id="tester", aws_secret_access_key=SECRET_KEY
    )
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    return S3Server(url, client)


def use_s3(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let S3 addresses mean the server at `url`, in the way people set it: by the environment."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", REGION)


def reply(status: str, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    """Return an HTTP answer; `length` is what it says of its body, for one that is cut short."""
    lines = {
        "Content-Length": str(len(body) if length is None else length),
        "Connection": "close",
        "ETag": '"tag"',
        "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@contextmanager
def answering(answer: Callable[[str, str], bytes | None]) -> Iterator[str]:
    """Serve what `answer` gives for a method and a path, byte for byte, and yield the address; None is no answer."""
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError):  # a client may go away at any time
            asked = _read_request(connection)
            text = answer(*asked) if asked is not None else b""
            if text is not None:
                connection.sendall(text)
                connection.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):  # the listener is shut down at the end
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=serve, args=connections[-1:], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for each in connections:
                each.close()


def _read_request(connection: socket.socket) -> tuple[str, str] | None:
    """Read a request to its end and return its method and path; None when the client sent none."""
    with connection.makefile("rb") as stream:
        first = stream.readline().decode().split()
        length = 0
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            if name.lower() == "content-length":
                length = int(value)
        stream.read(length)
    return (first[0], first[1]) if len(first) == 3 else None


def closed_port() -> str:
    """Return an address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
