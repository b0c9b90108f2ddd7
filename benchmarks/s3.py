"""A real S3 endpoint over HTTP on loopback (a moto server in a process of its own), for tests and fault injection."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "not-so-secret", "AWS_REGION": "us-east-1"}

# moto looks whether a key is there and puts it in two steps; one request at a time makes its conditional put atomic, as
# that of a real service is.
SERVER = """
import threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    def log(self, *_): pass
application, one = DomainDispatcherApplication(create_backend_app), threading.Lock()
def serial(environ, start_response):
    with one:
        return list(application(environ, start_response))
server = make_server("127.0.0.1", 0, serial, threaded=True, request_handler=Quiet)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 and point this process at it; yields the endpoint."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    values = {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield endpoint
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def s3_client(endpoint: str) -> "boto3.client":
    """Return a client that knows nothing of covercal."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    key, secret, region = (CREDENTIALS[name] for name in names)
    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name=region
    )


def bucket_address(endpoint: str) -> str:
    """Make a new bucket and return an address in it."""
    name = f"team-{uuid.uuid4().hex}"
    s3_client(endpoint).create_bucket(Bucket=name)
    return f"s3://{name}/cache"
