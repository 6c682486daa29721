"""What a served model does with hostile requests, and its memory: `python -m benchmarks.serving MODEL [N]`.

MODEL is what `mlflow models serve -m` takes. Sends N seeded requests (5,000 by default), a third of them
good, and prints the server's resident memory every now and then, and the statuses by kind of request.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

JSON = "application/json"
MOST = 64  # images in a request


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request, and the status that the answer should have."""

    kind: str
    body: bytes
    content_type: str | None = JSON
    status: int = 200


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a request."""

    status: int
    body: bytes

    def read_rows(self) -> list[dict[str, object]]:
        """Return its rows; JSON that is not strict is an error."""

        def refuse(constant: str) -> None:
            raise ValueError(constant)

        rows: list[dict[str, object]] = json.loads(self.body, parse_constant=refuse)["predictions"]
        return rows


def encode_image(rng: random.Random) -> bytes:
    """Return the file of a random image."""
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (rng.randint(16, 200), rng.randint(16, 200), 3), np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, rng.choice(("JPEG", "PNG", "WEBP")))
    return buffer.getvalue()


def encode_bomb() -> bytes:
    """Return a small file of 900 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    return buffer.getvalue()


def split(cells: list[object], column: str = "image") -> bytes:
    """Return the body of a request with one column."""
    return json.dumps({"dataframe_split": {"columns": [column], "data": [[each] for each in cells]}}).encode()


def to_text(file: bytes) -> str:
    """Return base64."""
    return base64.b64encode(file).decode()


def make_requests(seed: int, count: int) -> Iterator[Request]:
    """Yield good and hostile requests in a random order."""
    rng, bomb = random.Random(seed), encode_bomb()
    for _ in range(count):
        if rng.random() < 1 / 3:
            images = [encode_image(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8, 13)))]
            yield Request(kind="good", body=split([to_text(each) for each in images]))
        else:
            yield rng.choice(list_hostile(rng, encode_image(rng), bomb))


def list_hostile(rng: random.Random, image: bytes, bomb: bytes) -> list[Request]:
    """Return a request of each hostile kind."""
    good, noise, depth = to_text(image), rng.randbytes(rng.randint(1, 3000)), rng.randint(2_000, 50_000)
    damaged = bytearray(image)
    for _ in range(9):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    rows = {  # an image each: a row each, with a reason
        "truncated image": to_text(image[: rng.randrange(len(image) // 2)]),
        "damaged image": to_text(bytes(damaged)),
        "noise": to_text(noise),
        "text": to_text(b"hello"),
        "bomb": to_text(bomb),
        "data URL": f"data:image/jpeg;base64,{good}",
        "unicode": "é😀\u202e" * rng.randint(1, 99),
        "empty": "",
        "NUL": "\0",
    }
    refused: dict[str, object] = {  # by MLflow, the whole request
        "bad base64": good[: len(good) // 4 * 4 - 3],
        "path": "/etc/passwd",
        "null": None,
        "NaN": float("nan"),
        "infinite": float("inf"),
        "number": 10 ** rng.randint(0, 400),
        "list": [good],
        "dict": {"image": good},
        "surrogate": "\ud800",
    }
    bodies = {  # not what MLflow reads
        "no JSON": noise,
        "empty body": b"",
        "JSON null": b"null",
        "JSON list": b"[]",
        "empty dict": b"{}",
        "wrong key": b'{"images": []}',
        "wrong column": split([good], "picture"),
        "no columns": b'{"dataframe_split": {"columns": [], "data": []}}',
        "ragged": b'{"dataframe_split": {"columns": ["image"], "data": [[1, 2]]}}',
        "twice": b'{"dataframe_split": {"columns": ["image", "image"], "data": [["", ""]]}}',
        "too many": split(["aGVsbG8="] * (MOST + 1)),
        "10,000 rows": split(["aGVsbG8="] * 10_000),
    }
    return [
        *(Request(kind=kind, body=split([cell])) for kind, cell in rows.items()),
        *(Request(kind=kind, body=split([good, cell]), status=400) for kind, cell in refused.items()),
        *(Request(kind=kind, body=body, status=400) for kind, body in bodies.items()),
        Request(kind="mixed", body=split([good, rows["damaged image"], good, rows["text"]])),
        Request(kind="no rows", body=split([])),
        Request(kind="most rows", body=split([rows["noise"]] * MOST)),
        Request(kind="huge body", body=split(["AAAA" * rng.randint(1 << 18, 5 << 20)])),
        Request(kind="CSV path", body=b"image\n/etc/passwd\n", content_type="text/csv"),
        Request(kind="CSV noise", body=b"image\n\xff" + noise, content_type="text/csv", status=400),
        Request(kind="plain text", body=split([good]), content_type="text/plain", status=415),
        Request(kind="charset", body=split([good]), content_type=f"{JSON}; charset=latin-1", status=415),
        # MLflow's own: `None.split`, and the RecursionError of `json.loads`.
        Request(kind="no content type", body=split([good]), content_type=None, status=500),
        Request(kind="deep JSON", body=b"[" * depth + b"]" * depth, status=500),
    ]


def send(url: str, request: Request) -> Answer:
    """Send a request on a connection of its own."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/invocations")
        connection.putheader("Content-Length", str(len(request.body)))
        if request.content_type is not None:
            connection.putheader("Content-Type", request.content_type)
        connection.endheaders(request.body)
        response = connection.getresponse()
        return Answer(status=response.status, body=response.read())


@contextlib.contextmanager
def serve(model: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start `mlflow models serve` in a folder; yield its URL and its process, whose child serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["mlflow", "models", "serve", "-m", model, "-p", str(port), "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure_memory(server: psutil.Process) -> float:
    """Return the resident memory of a server and its children, in MB."""
    return sum(each.memory_info().rss for each in (server, *server.children(recursive=True))) / 1e6


def main() -> None:
    """Print the statuses of N requests by kind, and the memory meanwhile."""
    model, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5_000
    statuses, start = Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serve(model, Path(folder)) as (url, server):
        for number, request in enumerate(make_requests(seed=0, count=count), 1):
            statuses[f"{request.kind}: {send(url, request).status}"] += 1
            if number % (count // 20) == 0:
                used, seconds = measure_memory(server), time.perf_counter() - start
                print(f"{number:6} requests in {seconds:5.0f} s: {used:7.0f} MB", flush=True)
    for kind, number in sorted(statuses.items()):
        print(f"{number:6} {kind}")


if __name__ == "__main__":
    main()
