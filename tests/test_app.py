"""The app: what it answers to people, to programs, and to those who mean it no good."""

import base64
import contextlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
import uvicorn
from PIL import Image

from skin_resnet.commands.app import MAX_BODY, MAX_FILE, MAX_FILES, MAX_WAITING, _Protocol, app, build_api
from skin_resnet.commands.config import AppConfig
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES
from skin_resnet.model.classifier import Classifier
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.models import load_model
from skin_resnet.training.checkpoint import save_checkpoint
from tests.test_serving import encode

ROOT = Path(__file__).parent.parent
PROBABILITIES = np.array([0.05, 0.1, 0.2, 0.05, 0.25, 0.3, 0.05])  # of HAM10000_CLASSES
CALIBRATION = {"temperature": 1.0, "decision_weights": [1.0] * 7, "least_probability": 0.2, "coverage": 0.9}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network at 64 px, where Grad-CAM has cells to show."""
    torch.manual_seed(0)
    network = build_resnet("resnet50", 7)
    torch.nn.init.normal_(network.fc.weight, std=0.3)
    path = tmp_path_factory.mktemp("app") / "best.pt"
    content = {
        "arch": "resnet50", "classes": list(HAM10000_CLASSES), "image_size": 64,
        "network": network.state_dict(), "calibration": CALIBRATION, "license": "none",
        "familiarity": {"center": torch.zeros(256), "whitening": torch.zeros(256, 256)},
        "run_id": "0123456789abcdef", "epoch": 3,
        "config": TrainConfig(image_size=64).model_dump(mode="json"),
        "split": {"train": ["a"], "val": ["b"], "test": ["c"]},
    }  # fmt: skip
    save_checkpoint(path, content)
    return path


def start(checkpoint: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the command on a free port; return its process and address once it listens."""
    command = [sys.executable, "-m", "skin_resnet", "app", str(checkpoint), "--port=0", "--precision=fp32"]
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file)
    while "running on " not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    return process, log.read_text().partition("running on ")[2].partition(",")[0]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The command's process and its address."""
    log = checkpoint.with_name("log")
    process, url = start(checkpoint, log)
    try:
        yield psutil.Process(process.pid), url
        assert log.read_text().splitlines()[2:] == [], "no request makes it print anything"
    finally:
        process.kill()
        process.wait()


def post(url: str, *contents: bytes, query: str = "", names: tuple[str, ...] = ()) -> requests.Response:
    named = zip(names or [f"{number}.jpg" for number in range(len(contents))], contents, strict=True)
    files = [("files", (name, content)) for name, content in named]
    return requests.post(f"{url}/predict{query}", files=files, timeout=60)


def test_rows_are_those_of_the_classifier_with_the_files_names(server: Any, checkpoint: Path) -> None:
    images = [encode(), b"no image", encode(200, 150, "PNG", 1)]
    answer = post(server[1], *images, names=("a.jpg", "../../etc/b.txt", "c\\d.png"))
    assert answer.status_code == 200
    rows = answer.json()
    assert [row.pop("file") for row in rows] == ["a.jpg", "b.txt", "d.png"]
    expected = load_model(str(checkpoint), "cpu", "fp32").predict(images)
    for row, wanted in zip(rows, expected.to_dict("records"), strict=True):
        assert set(row) == set(wanted)
        for name, value in wanted.items():
            is_missing = isinstance(value, float) and np.isnan(value)
            assert row[name] is None if is_missing else row[name] == pytest.approx(value, abs=1e-5), name
    assert "not an image" in rows[1]["error"]


def test_an_explanation_is_a_png_of_the_networks_size_to_lay_over_the_image(server: Any) -> None:
    rows = post(server[1], encode(), b"", query="?explain=true").json()
    assert "overlay" not in rows[1]
    kind, _, text = rows[0]["overlay"].partition(",")
    assert kind == "data:image/png;base64"
    layer = np.array(Image.open(io.BytesIO(base64.b64decode(text))))
    assert layer.shape == (64, 64, 4)
    assert layer[..., 3].max() == round(0.6 * 255)  # a map's maximum is 1, and something shines through it
    assert "overlay" not in post(server[1], encode()).json()[0]


def test_health_says_which_model_it_is(server: Any) -> None:
    health = requests.get(f"{server[1]}/health", timeout=60).json()
    assert health["version"] == "01234567-epoch3"
    assert list(health["classes"]) == list(HAM10000_CLASSES)
    assert health["classes"]["mel"] == "melanoma"


def test_the_page_needs_nothing_from_elsewhere(server: Any) -> None:
    answer = requests.get(server[1], timeout=60)
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "not a medical device" in answer.text
    assert "default-src 'none'" in answer.text
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "Access-Control-Allow-Origin" not in answer.headers


def send(url: str, parts: Iterable[bytes]) -> tuple[int, bytes]:
    """Send parts until an answer comes; return its status and body."""
    host, port = url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for part in parts:
            if select.select([connection], [], [], 0)[0]:
                break
            with contextlib.suppress(ConnectionError):  # answered, and closed
                connection.sendall(part)
        while not is_whole(answer) and (more := connection.recv(65_536)):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def is_whole(answer: bytes) -> bool:
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
    return bool(length) and len(body) >= int(length)


def write(body: bytes = b"", target: str = "/predict", method: str = "POST", **headers: str) -> list[bytes]:
    """Write a request; a header that is empty is left out."""
    length = {} if "Transfer_Encoding" in headers else {"Content-Length": str(len(body))}
    fields = {"Host": "localhost", "Content-Type": "multipart/form-data; boundary=x", **length}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return ["\r\n".join(lines).encode() + b"\r\n\r\n" + body]


def part(content: bytes = b"", head: str = 'name="files"; filename="a.jpg"') -> bytes:
    return f"--x\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"


def upload(content: bytes = b"", head: str = 'name="files"; filename="a.jpg"', **headers: str) -> list[bytes]:
    return write(part(content, head) + b"--x--\r\n", **headers)


def draw_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    chunks = [(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0")]
    chunks += [(b"IDAT", zlib.compress(bytes(1_000_000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks
    )


def send_for_ever() -> Iterator[bytes]:
    (head,) = write(Transfer_Encoding="chunked")
    yield head + f"{len(part()):x}\r\n".encode() + part() + b"\r\n"
    yield from itertools.repeat(b"10000\r\n" + bytes(65_536) + b"\r\n", MAX_BODY // 65_536 + 5_000)


CHARSETS = ["unicode_escape", "undefined", "idna", "punycode", "hex", "utf-16", "y" * 99]
JPEG = encode()
HOSTILE: dict[str, Callable[[random.Random], Iterable[bytes]]] = {
    "random bytes": lambda rng: upload(rng.randbytes(rng.randrange(3_000))),
    "half an image": lambda rng: upload(JPEG[: rng.randrange(300, len(JPEG) // 2)]),
    "a text": lambda rng: upload(b"hello " * rng.randrange(100)),
    "an empty file": lambda rng: upload(),
    "an SVG": lambda rng: upload(b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"),
    "a bomb": lambda rng: upload(draw_bomb(rng.randrange(9_000, 2**31), 9_000)),
    "an elongated bomb": lambda rng: upload(draw_bomb(16, rng.randrange(2_000_000, 3_999_999))),
    "an image cut off": lambda rng: upload(draw_bomb(rng.randrange(600, 900), 900)),
    "a large file": lambda rng: upload(bytes(MAX_FILE + 1)),
    "no body": lambda rng: write(),
    "no content type": lambda rng: upload(JPEG, Content_Type=""),
    "no boundary": lambda rng: upload(JPEG, Content_Type="multipart/form-data"),
    "another boundary": lambda rng: upload(JPEG, Content_Type="multipart/form-data; boundary=y"),
    "a long boundary": lambda rng: upload(JPEG, Content_Type=f"multipart/form-data; boundary={'x' * 9_000}"),
    "an odd charset": lambda rng: upload(
        b"", 'name="files"; filename="\\ud800\xff"',
        Content_Type=f"multipart/form-data; boundary=x; charset={rng.choice(CHARSETS)}",
    ),
    "a name of surrogates": lambda rng: upload(
        b"", 'name="files"; filename="\\ud800"',
        Content_Type="multipart/form-data; boundary=x; charset=unicode_escape",
    ),
    "a form without an end": lambda rng: write(part(JPEG)[:-2]),
    "no form": lambda rng: write(rng.randbytes(500)),
    "a part without a name": lambda rng: upload(JPEG, 'filename="a.jpg"'),
    "a long part header": lambda rng: upload(JPEG, f'name="{"n" * rng.randrange(5_000, 90_000)}"'),
    "many part headers": lambda rng: upload(JPEG, 'name="files"; filename="a"' + "\r\nX: y" * 1_000),
    "another field": lambda rng: upload(JPEG, 'name="image"; filename="a.jpg"'),
    "a data URL": lambda rng: upload(b"data:image/jpeg;base64," + base64.b64encode(JPEG), 'name="files"'),
    "a long text": lambda rng: upload(b"y" * 2_000_000, 'name="files"'),
    "too many files": lambda rng: write(part() * (MAX_FILES + rng.randrange(1, 200)) + b"--x--\r\n"),
    "too many fields": lambda rng: write(part(head='name="y"') * 5_000 + b"--x--\r\n"),
    "a path for a name": lambda rng: upload(b"y", 'name="files"; filename="../../../etc/passwd"'),
    "deep JSON": lambda rng: write(b"[" * rng.randrange(100_000), Content_Type="application/json"),
    "pairs": lambda rng: write(b"files=1&" * 50_000, Content_Type="application/x-www-form-urlencoded"),
    "a huge length": lambda rng: write(Content_Length=str(rng.randrange(MAX_BODY + 1, 10**18))),
    "a wrong length": lambda rng: write(Content_Length=rng.choice(["-1", "1e9", "9" * 5_000, "1, 2"])),
    "no end": lambda rng: send_for_ever(),
    "a broken chunk": lambda rng: write(b"zz\r\n", Transfer_Encoding="chunked"),
    "a huge header": lambda rng: write(X="y" * rng.randrange(70_000, 200_000)),
    "many headers": lambda rng: write(**{f"X{number}": "y" * 50 for number in range(3_000)}),
    "no HTTP": lambda rng: [rng.randbytes(200) + b"\r\n\r\n"],
    "TLS": lambda rng: [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500)],
    "an unknown address": lambda rng: write(target=rng.choice(["/x", "/predict/", "/docs", "/../etc"])),
    "an odd address": lambda rng: write(target=rng.choice(["/%00", "/%2e%2e/", "*", "//", "http://a.b/c"])),
    "a wrong method": lambda rng: write(method=rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "X"])),
    "a wrong question": lambda rng: upload(JPEG, target=f"/predict?explain={rng.choice(['2', '%ff', ''])}"),
    "another host": lambda rng: upload(JPEG, Host=rng.choice(["evil.example", "localhost.evil", "[", "a,b"])),
    "no host": lambda rng: [b"GET / HTTP/1.0\r\n\r\n"],
    "another site": lambda rng: upload(JPEG, Sec_Fetch_Site=rng.choice(["cross-site", "same-site"])),
}  # fmt: skip

STATUSES = {
    "a large file": 413, "a huge length": 413, "no end": 413, "too many files": 400, "a long text": 400,
    "another host": 403, "no host": 403, "another site": 403, "a wrong method": 405, "an odd address": 404,
    "a text": 422, "a bomb": 422, "a data URL": 422,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_nobody_should_send_gets_a_sentence(server: Any, kind: str) -> None:
    status, body = send(server[1], HOSTILE[kind](random.Random(kind)))
    assert status == STATUSES.get(kind, status)
    assert 400 <= status < 500, body
    ((name, text),) = json.loads(body).items()
    assert name == "error"
    assert len(text.split()) > 5
    assert not any(part in text for part in ("\n", "Traceback", "passwd/", "../"))


@pytest.mark.parametrize("number", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_number_of_them_takes_no_memory_and_the_next_image_is_classified(
    server: Any, number: int
) -> None:
    process, url = server
    rng = random.Random(number)
    kinds = [list(HOSTILE)[index % len(HOSTILE)] for index in range(number)]
    rng.shuffle(kinds)

    def attack(kind: str) -> tuple[str, int, bool]:
        status, body = send(url, HOSTILE[kind](random.Random(rng.random())))
        return kind, status, bool(json.loads(body)["error"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attack, HOSTILE))  # what is needed once
        before = process.memory_info().rss
        answers = set(pool.map(attack, kinds))
    after = process.memory_info().rss
    print(f"{number} requests: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    assert not [each for each in answers if not (400 <= each[1] < 500 and each[2])]
    assert after - before < 60e6
    assert post(url, encode()).status_code == 200


def test_slow_clients_hold_up_nobody(server: Any) -> None:
    host, port = server[1].removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for number in range(60):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            (content,) = upload(encode())
            connection.sendall(content[: 20 if number % 2 else -100])
        assert post(server[1], encode()).status_code == 200


def test_a_forwarded_port_is_no_other_host(server: Any) -> None:
    for host in ("localhost:9000", "127.0.0.1", "LOCALHOST"):
        assert send(server[1], write(target="/health", method="GET", Host=host))[0] == 200


def test_many_at_once_get_the_same_answer_as_one(server: Any) -> None:
    images = [encode(seed=seed) for seed in range(8)]
    alone = [post(server[1], image).json() for image in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda image: post(server[1], image).json(), images)) == alone


@contextlib.contextmanager
def serve(score: Callable[[Any], Any]) -> Iterator[str]:
    """Serve a classifier that is one function, in this process; yield the address."""
    facts = {"classes": HAM10000_CLASSES, "image_size": 64, "calibration": CALIBRATION, "version": "x"}
    api = build_api(Classifier(facts=facts, score=score), set())
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(api, http=_Protocol, lifespan="off", log_config=None, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_more_than_can_wait_are_asked_to_come_back() -> None:
    go = threading.Event()

    def score(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert go.wait(300)
        return np.tile(PROBABILITIES, (len(pixels), 1)), np.zeros(len(pixels))

    with serve(score) as url, ThreadPoolExecutor(99) as pool, contextlib.ExitStack() as at_last:
        at_last.callback(go.set)
        todo = [pool.submit(post, url, encode()) for _ in range(MAX_WAITING + 4)]
        refused = [done.result() for done in itertools.islice(as_completed(todo), 3)]
        assert [each.status_code for each in refused] == [503] * 3
        assert all(int(each.headers["Retry-After"]) for each in refused)
        assert all(each.json()["error"] for each in refused)
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        go.set()
        assert sorted(each.result().status_code for each in todo) == [200] * (MAX_WAITING + 1) + [503] * 3


def test_without_a_network_there_is_no_explanation_and_a_failure_is_told(caplog: Any) -> None:
    def score(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if pixels.mean() < 1:
            raise RuntimeError("no memory left on the device")
        return np.tile(PROBABILITIES, (len(pixels), 1)), np.ones(len(pixels)) * 2

    black = io.BytesIO()
    Image.new("RGB", (64, 64)).save(black, "PNG")
    with serve(score) as url:
        (row,) = post(url, encode(), query="?explain=true").json()
        assert "overlay" not in row
        assert (row["prediction"], row["set"], row["refer"]) == ("nv", ["bkl", "mel", "nv"], "unfamiliar")
        failed = post(url, black.getvalue())
        assert (failed.status_code, list(failed.json())) == (500, ["error"])
        assert "no memory left" in caplog.text
        assert post(url, encode()).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "no..host", "203.0.113.9"])
def test_an_address_that_cannot_be_had_is_a_users_error(server: Any, host: str) -> None:
    port = int(server[1].rpartition(":")[2])
    with pytest.raises(UserError, match=re.escape(f"{host}:{port} (")):
        app(AppConfig(model="never read", host=host, port=port))


@pytest.mark.slow
def test_ctrl_c_ends_it_even_while_somebody_uploads(checkpoint: Path, tmp_path: Path) -> None:
    process, url = start(checkpoint, tmp_path / "log")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        (content,) = upload(encode())
        connection.sendall(content[:-100])
        assert requests.get(f"{url}/health", timeout=60).ok  # it has begun to read
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["interrupted by SIGINT"]


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags.split())
        yield browser
        browser.close()


def drop(page: Any, *files: tuple[str, bytes]) -> None:
    script = """files => files.reduce((all, [name, bytes]) => {
        all.items.add(new File([new Uint8Array(bytes)], name)); return all }, new DataTransfer())"""
    transfer = page.evaluate_handle(script, [[name, list(content)] for name, content in files])
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


@pytest.mark.slow
def test_dropped_images_are_shown_with_their_results_and_a_text_with_its_error(
    server: Any, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(server[1])
    page.get_by_text("model 01234567-epoch3").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "file"
    page.emulate_media(reduced_motion="reduce")
    attack = "<img src=x onerror=document.title='broken'>.txt"
    drop(page, ("a.png", encode(kind="PNG")), (attack, b"no image"), ("b.png", encode(seed=1, kind="PNG")))
    page.get_by_text("3 of 3 done").wait_for(timeout=60_000)
    assert page.locator("h2").all_inner_texts() == ["a.png", attack, "b.png"]
    (row,) = post(server[1], encode(kind="PNG")).json()
    card = page.locator("article").first
    names = {each.code: each.name for each in DIAGNOSES}
    name = names[row["prediction"]]
    assert card.locator("h3").text_content() == f"{name} P(malignant) {100 * row['p_malignant']:.0f} %"
    assert card.locator(".predicted span").text_content() == name
    ranked = sorted(names, key=lambda code: -row[code])
    assert card.locator("li span").all_text_contents() == [names[code] for code in ranked]
    sentence = card.get_by_text("With 90 % coverage").text_content()
    assert sentence.endswith(f"{', '.join(names[code] for code in row['set'])}.")
    assert card.locator("img").evaluate_all("all => all.map(each => each.naturalWidth)") == [64, 64]
    assert "not an image" in page.locator("article").nth(1).inner_text()
    assert page.title() == "Skin lesion classifier"
    assert page.locator("article .images").evaluate_all("all => all.map(each => each.hidden)") == [
        False,
        False,
    ]
    assert all(url.startswith((server[1], "blob:", "data:")) for url in loaded)


@pytest.mark.slow
def test_of_an_unfamiliar_image_no_coverage_is_claimed_and_what_a_browser_cannot_show_is_hidden(
    server: Any, browser: Any
) -> None:
    page = browser.new_page()
    page.goto(server[1])
    page.get_by_text("model 01234567-epoch3").wait_for()
    (row,) = post(server[1], encode(kind="PNG")).json()
    unfamiliar = [{**row, "refer": "unfamiliar"}]
    page.route("**/predict*", lambda route: route.fulfill(json=unfamiliar))
    drop(page, ("a.tiff", encode(kind="TIFF")))
    page.get_by_text("Unfamiliar:").wait_for()
    assert "coverage" not in page.locator("article").inner_text()
    assert page.locator(".images").is_hidden()
    page.route("**/predict*", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
    drop(page, ("b.png", encode(kind="PNG")))
    page.get_by_text("answered 502").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(server: Any, browser: Any, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 812}, color_scheme=scheme)
    page.goto(server[1])
    drop(page, ("n" * 150 + ".png", encode(900, 300, "PNG")), ("notes.txt", b"no image"))
    page.get_by_text("2 of 2 done").wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.mouse.wheel(0, 5_000)
    banner = page.get_by_text("not a medical device")
    assert banner.bounding_box()["y"] >= 0
    ground = page.locator("article").first.evaluate("each => getComputedStyle(each).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 382) == (scheme == "light")
