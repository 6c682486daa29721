"""Whatever is wrong with an input, the command says so in one line and ends with 2; no code in it is run."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from skin_resnet.cli import main
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from tests.bad_inputs import BadInput, Options, list_arguments
from tests.bad_inputs.images import BAD_IMAGES, STOPPING
from tests.bad_inputs.networks import MODELS, RAN, RUNS, WEIGHTS, with_data_of
from tests.bad_inputs.options import CONFIGS, list_bad_options
from tests.bad_inputs.tables import METADATA, SPELLINGS, SPLITS, with_split, write_data

ROOT = Path(__file__).parent.parent
BAD_INPUTS = [*METADATA, *SPLITS, *BAD_IMAGES, *STOPPING, *WEIGHTS, *MODELS, *RUNS]
BAD_OPTIONS = list_bad_options()
REQUIRED = {
    "evaluate": ["--model=x"], "predict": ["--model=x", "--images=x"], "export": ["--model=x"],
    "compare": ["--runs=x,y"], "reproduce": ["--run=x"], "app": ["--model=x"],
}  # fmt: skip

Run = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tracking store, where the process is for this module's tests."""
    folder = tmp_path_factory.mktemp("store")
    before = Path.cwd()
    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.search_runs(output_format="list")  # makes the schema
    yield folder
    try:
        runs = mlflow.search_runs(output_format="list", max_results=10_000)
        assert {run.info.status for run in runs} <= {"FAILED", "FINISHED"}
        assert all(run.info.status == "FINISHED" or run.data.tags["failure"] for run in runs)
    finally:
        mlflow.set_tracking_uri(None)
        os.chdir(before)


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Yield what runs a command in this process, and its exit code, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    level = logging.getLogger("skin_resnet").level

    def run_command(arguments: list[str]) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    yield run_command
    logging.getLogger("skin_resnet").setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def list_places(command: str, folder: Path) -> list[str]:
    """Return the options that keep what a command writes in a folder."""
    places = {"cache_dir": folder / "cache", "checkpoint_dir": folder / "checkpoints"}
    known = CONFIGS[command].model_fields
    return [f"--{name}={place}" for name, place in places.items() if name in known]


def check_refusal(code: int, err: str, told: tuple[str, ...]) -> None:
    assert code == 2, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 600
    missing = [words for words in told if words not in lines[0]]
    assert not missing, lines[0]


def check_nothing_is_left(folder: Path) -> None:
    assert not list((folder / "cache").glob("**/*.tmp"))
    assert not (folder / "checkpoints").exists()
    assert not list(folder.rglob(RAN)), "code in a pickle was run"
    assert mlflow.active_run() is None


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_bad_input_is_refused_in_one_line_and_leaves_nothing(
    bad: BadInput, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    options = bad.make(tmp_path / "given")
    code, _, err = run([bad.command, *list_arguments(options), *list_places(bad.command, tmp_path)])
    check_refusal(code, err, bad.told)
    check_nothing_is_left(tmp_path)


@pytest.mark.parametrize(("command", "name", "text"), BAD_OPTIONS)
def test_an_option_out_of_its_bounds_is_refused_in_one_line(
    command: str, name: str, text: str, run: Run
) -> None:
    required = [option for option in REQUIRED.get(command, []) if not option.startswith(f"--{name}=")]
    code, _, err = run([command, *required, f"--{name}={text}"])
    check_refusal(code, err, (name, text))


def test_there_are_enough_bad_inputs_and_each_is_another() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS) >= 100
    assert len(set(BAD_OPTIONS)) == len(BAD_OPTIONS)
    tried = {(command, name) for command, name, _ in BAD_OPTIONS}
    assert tried == {(command, name) for command, config in CONFIGS.items() for name in config.model_fields}


@pytest.mark.parametrize("bad", BAD_IMAGES, ids=lambda bad: bad.name)
def test_a_bad_image_may_be_skipped_and_is_counted(bad: BadInput, run: Run, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    options = {**bad.make(tmp_path / "given"), "on_bad_image": "skip"}
    code, out, err = run(["audit", *list_arguments(options), *list_places("audit", tmp_path)])
    assert (code, err) == (0, "")
    assert "1 image could not be read" in out


def audit(run: Run, options: Options, folder: Path) -> str:
    code, out, err = run(["audit", *list_arguments(options), *list_places("audit", folder)])
    assert (code, err) == (0, "")
    return out


def test_a_table_in_any_spelling_gives_the_same_page(run: Run, tmp_path: Path) -> None:
    plain = audit(run, write_data(tmp_path), tmp_path)
    for name, make in SPELLINGS.items():
        (tmp_path / name).mkdir()
        assert audit(run, make(tmp_path / name), tmp_path) == plain, name


def test_a_split_that_names_a_skipped_image_is_used_without_it(run: Run, tmp_path: Path) -> None:
    options = {**with_split(lambda lines: lines)(tmp_path), "on_bad_image": "skip"}
    (tmp_path / "photo_11.png").write_bytes(b"")
    data = prepare_data(TrainConfig(**options, cache_dir=tmp_path / "cache"))
    assert list(data.store.skipped) == ["photo_11"]
    assert data.split.test == ("photo_09", "photo_10")
    assert len(data.split.train) == 6


def test_a_network_is_scored_on_images_of_one_class_and_skipped_ones_are_counted(
    run: Run, tmp_path: Path
) -> None:
    options = with_data_of(lambda text: text.replace("scar", "mole").replace("wart", "mole"))(tmp_path)
    (tmp_path / "photo_11.png").write_bytes(b"")
    code, out, err = run(
        ["evaluate", *list_arguments(options), *list_places("evaluate", tmp_path), "--on_bad_image=skip"]
    )
    assert (code, err) == (0, "")
    assert "Test: 2 images" in out
    assert "skipped  1 unreadable image\n" in out
    latest = mlflow.search_runs(output_format="list", max_results=1)[0]
    assert latest.data.metrics["test_balanced_accuracy"] == latest.data.metrics["test_accuracy"]
    assert "test_macro_auc" not in latest.data.metrics
    assert latest.data.tags["skipped_images"] == "1"
    skipped = mlflow.artifacts.load_dict(f"{latest.info.artifact_uri}/data/skipped_images.json")
    assert skipped == {"photo_11": "the file is empty"}


def run_process(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    command = [sys.executable, "-m", "skin_resnet", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_in_a_process_of_its_own_no_library_adds_a_word(store: Path, tmp_path: Path) -> None:
    huge = next(bad for bad in BAD_IMAGES if bad.name == "100 megapixels").make(tmp_path)  # Pillow would warn
    (tmp_path / "code").mkdir()
    code = next(bad for bad in WEIGHTS if bad.name == "weights: code in given.pt").make(tmp_path / "code")
    options = {**code, **huge, "on_bad_image": "skip"}
    done = run_process(store, "train", *list_arguments(options), *list_places("train", tmp_path))
    *before, last = done.stderr.splitlines()
    assert [line.partition(" 12 images")[0] for line in before] == ["decoding", "decoded"]
    check_refusal(done.returncode, last, ("more than the tensors", "given.pt"))
    check_nothing_is_left(tmp_path)
