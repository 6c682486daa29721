"""Make the pictures of the README: train, open the run in MLflow's UI in a browser, take a screenshot.

    python -m pip install playwright && python -m playwright install chromium
    python docs/make_screenshots.py                           # the demo's synthetic images
    python docs/make_screenshots.py --data FOLDER --epochs 8  # any options of train; with absolute paths

Those of the README: --data HAM10000 --weights FILE --image_size 64 --train_fraction 0.2 --epochs 8
--augment crops --class_weighting none --precision bf16

Writes docs/images/metrics.png (the run's page "Model metrics") and docs/images/curves.png. The environment
variable CHROMIUM names a browser to use instead of Playwright's own, FOLDER a folder that keeps the training:
the next call then only takes the pictures.
"""

import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
WIDTH, MAX_BYTES = 1000, 150_000
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# Charts are drawn as they come into view, and no event says that the last one is there.
SETTLE_S = 12


def train(folder: Path, options: list[str]) -> str:
    """Train in a folder unless it holds a training, and save the curves; return the path of its page."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    if not (folder / "mlflow.db").exists():
        command = [sys.executable, "-m", "skin_resnet", "train", *options]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    curves = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="figures/curves.png")
    save(Image.open(curves), "curves.png")
    return f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run `mlflow server` on a free port; give its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def take_screenshot(address: str) -> Image.Image:
    """Return a picture of a page of MLflow's UI."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=FLAGS)
        context = browser.new_context(viewport={"width": 1400, "height": 1060})
        hide = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        context.add_init_script(f"{hide}; localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
        page = context.new_page()
        page.goto(address)
        time.sleep(SETTLE_S)
        picture = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(picture))


def save(picture: Image.Image, name: str) -> None:
    """Write a picture as a small PNG: scaled down, in a palette."""
    height = round(picture.height * WIDTH / picture.width)
    small = picture.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    IMAGES.mkdir(exist_ok=True)
    small.quantize(64, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    size = (IMAGES / name).stat().st_size
    print(f"docs/images/{name}: {WIDTH} x {height}, {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        sys.exit(f"docs/images/{name} is larger than {MAX_BYTES / 1000:.0f} kB")


def main() -> None:
    """Make both pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("FOLDER", temporary)).resolve()
        page = train(folder, sys.argv[1:])
        with serve(folder) as server:
            metrics = f"{server}{page}/model-metrics?workflowType=machine_learning"
            save(take_screenshot(metrics), "metrics.png")


if __name__ == "__main__":
    main()
