"""What a person sees of a training, a comparison and a search in the MLflow UI, at 1500 x 1100."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

sync_api = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]
WIDTH, HEIGHT = 1500, 1100
LINK = re.compile(r"^view +(\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of processes whose runs a server on this machine tracks and shows."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port), "--workers", "1"]
    environment = {name: text for name, text in os.environ.items() if name != "MLFLOW_EXPERIMENT_NAME"}
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "mlflow", "server", *options]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(120):
                try:
                    requests.get(f"{url}/health", timeout=2).raise_for_status()
                    break
                except requests.RequestException:
                    time.sleep(1)
            yield {**environment, "MLFLOW_TRACKING_URI": url, "PYTHONPATH": str(ROOT), "FOLDER": str(folder)}
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def links(server: dict[str, str], class_folders: Path) -> dict[str, str]:
    """The links that two trainings, their comparison and a search print."""

    def start(*arguments: str) -> str:
        command = [sys.executable, "-m", "skin_resnet", *arguments]
        done = subprocess.run(
            command,
            cwd=server["FOLDER"],
            env=server,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = LINK.search(done.stdout)
        assert found, done.stdout
        return found[1]

    options = [
        f"--data={class_folders}",
        "--weights=none",
        "--image_size=32",
        "--batch_size=8",
        "--device=cpu",
        "--epochs=2",
        # What random weights learn most from in a few steps.
        "--ema_decay=0",
        "--lr_schedule=cosine",
        "--warmup_epochs=1",
    ]
    options.append(f"--cache_dir={server['FOLDER']}/cache")
    train = [start("train", *options, f"--seed={seed}") for seed in (0, 1)]
    run_ids = [re.split("[/?]", link)[-2] for link in train]
    return {
        "train": train[0],
        "compare": start("compare", ",".join(run_ids)),
        "search": start("search", *options, "--n_trials=2", "--seeds=1", "--register_as=skin-resnet"),
    }


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a browser that has never been here before, and has closed MLflow's assistant."""
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(60_000)
        for key, value in (("panelOpen_v1", "false"), ("fab.autoOpenedOnFirstLoad_v1", "true")):
            page.add_init_script(f"localStorage.setItem('mlflow.assistant.{key}', '{value}')")
        yield page
        browser.close()


def open_tab(page: Any, link: str, tab: str) -> None:
    page.goto(link.replace("?", f"/{tab}?"))


def is_on_screen(locator: Any) -> bool:
    locator.wait_for()
    box = locator.bounding_box()
    return box["y"] >= 0 and box["y"] + box["height"] <= HEIGHT and box["x"] + box["width"] <= WIDTH


def test_the_link_of_a_training_opens_its_page_in_a_new_browser(page: Any, links: dict[str, str]) -> None:
    page.goto(links["train"])
    page.get_by_role("heading", name="resnet50 · folders · 32 px · seed 0").wait_for()
    page.get_by_text(re.compile(r"Metrics \((1\d|2[0-5])\)")).wait_for()
    # Score and majority class are text, and no link. A perfect score has no interval.
    sentence = page.get_by_text(re.compile(r"Test balanced accuracy [\d.]+.*; always \w+: 0\.333"))
    sentence.wait_for()
    assert not sentence.locator("a").count()


def test_the_curves_of_train_and_val_are_on_the_first_screen(page: Any, links: dict[str, str]) -> None:
    open_tab(page, links["train"], "model-metrics")
    for split in ("train", "val"):
        for metric in ("loss", "balanced_accuracy"):
            assert is_on_screen(page.get_by_text(f"({split}/{metric}", exact=False).first), (split, metric)


def test_a_comparison_shows_its_verdict_metrics_and_sources(page: Any, links: dict[str, str]) -> None:
    page.goto(links["compare"])
    page.get_by_role("heading", name="compare · resnet50 seed 0 vs resnet50 seed 1").wait_for()
    page.get_by_text("Highest test balanced accuracy: resnet50 seed").wait_for()
    page.get_by_text("Metrics (16)").wait_for()
    page.get_by_text("Show more", exact=True).click()
    source = page.get_by_role("link", name="resnet50 seed 0", exact=True).get_attribute("href")
    assert source.endswith(links["train"].partition("#")[2])
    figure = page.locator("img[src*='figures/differences.png']")
    figure.wait_for()
    page.wait_for_function("image => image.naturalWidth > 0", arg=figure.element_handle())


def read_columns(page: Any) -> list[str]:
    """Return the headings of the runs table that can be read as it opens: on the screen and not cut off."""
    page.locator(".ag-header-cell").first.wait_for()
    cells = page.locator(".ag-header-cell").filter(has_text=re.compile(r"\w"))
    whole = "cell => [...cell.querySelectorAll('*')].every(each => each.scrollWidth <= each.clientWidth + 1)"
    return [cell.inner_text().strip() for cell in cells.all() if is_on_screen(cell) and cell.evaluate(whole)]


def test_a_search_shows_its_winner_progress_and_trials(page: Any, links: dict[str, str]) -> None:
    page.goto(links["search"])
    page.get_by_text("Winner:").wait_for()
    page.get_by_role("link", name=re.compile(r"^trial [01]$")).wait_for()
    page.get_by_role("heading", name="search · folders").wait_for()
    assert is_on_screen(page.get_by_text("About this run")), "the command does not push the sidebar away"
    trials = page.get_by_role("link", name="the runs of its trials").get_attribute("href")
    open_tab(page, links["search"], "model-metrics")
    for metric in ("search_best_val_loss", "search_eta_s"):
        assert is_on_screen(page.get_by_text(metric, exact=True).first), metric
    page.goto(links["search"].partition("#")[0] + trials)
    for name in ("trial 0 · baseline recipe", "trial 1 · defaults", "baseline recipe · seed 1"):
        page.get_by_role("link", name=name).wait_for()
    assert not page.get_by_role("link", name="search · folders").count()
    assert {
        "arch", "image_size", "seed", "best_val_balanced_accuracy", "test_balanced_accuracy",
        "test_macro_auc", "final_gap",
    } <= set(read_columns(page))  # fmt: skip


def test_a_registered_model_shows_its_score_beside_the_baseline(page: Any, links: dict[str, str]) -> None:
    page.goto(links["search"].partition("#")[0] + "#/models/skin-resnet/versions/1")
    page.get_by_text(re.compile(r"balanced accuracy [\d.]+.*; always \w+: 0\.333")).first.wait_for()
