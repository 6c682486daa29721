"""README and docs/: every command of theirs works, and every file that they name exists.

A command is a fenced block marked `sh`, a script one marked `python`. The slow tests run each in a copy of
the project, in small: see `SMALL` and `shrink`. After `sh` may follow `skip-test`, with what the block needs,
or `server` for one that runs until it is stopped.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import write_class_folders
from PIL import Image

from skin_resnet.cli import COMMANDS, load_config_type, parse_options
from skin_resnet.model.resnet import STAGE_DEPTHS, build_resnet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options that decide how long a command takes, given in it or not.
SMALL = {"arch": "resnet50", "image_size": "32", "epochs": "1", "n_trials": "3", "workers": "1", "seeds": "1"}


CROWN = """
import mlflow
version = mlflow.register_model("runs:/RUN_ID/model", "skin-resnet").version
mlflow.MlflowClient().set_registered_model_alias("skin-resnet", "champion", version)
"""


@dataclass(frozen=True, kw_only=True)
class Block:
    page: str
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks(language: str) -> list[Block]:
    blocks = []
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(rf"^```{language} *(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            line = text.count("\n", 0, found.start()) + 1
            blocks.append(Block(page=page.name, line=line, info=found[1], text=found[2]))
    return blocks


BLOCKS = find_blocks("sh")
SCRIPTS = find_blocks("python")
RUN_BLOCKS = [block for block in BLOCKS if not block.info.startswith("skip-test")]


def split_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script."""
    lines = re.sub(r"\s#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(lines, posix=True, punctuation_chars=";|&()<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, "\n"]:
        if set(token) <= set(";|&()<>\n"):
            yield words
            words = []
        elif words or token not in {"do", "then"}:
            words.append(token)


def find_calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of ours in a block, as `skin-resnet` has it: its name and its options."""
    for words in split_commands(text):
        if words[:1] == ["skin-resnet"] and not words[1].startswith("-"):
            yield words[1], words[2:]
        elif "mlflow" in words and words[words.index("mlflow") + 1 :][:2] == ["run", "."]:
            entry_point = words[words.index("-e") + 1] if "-e" in words else "train"
            given = [words[at + 1] for at, word in enumerate(words) if word == "-P"]
            pairs = [each.partition("=") for each in given]
            yield entry_point, [part for name, _, value in pairs for part in (f"--{name}", value)]


def test_most_blocks_are_run() -> None:
    assert len(RUN_BLOCKS) >= 15
    assert len(BLOCKS) - len(RUN_BLOCKS) <= 6


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_command_has_options_that_exist(block: Block) -> None:
    for command, options in find_calls(block.text):
        if "--config" in options:  # a file that the block makes
            del options[(at := options.index("--config")) : at + 2]
        parse_options(command, ["resnet50" if word == "$arch" else word for word in options])


def test_the_readme_is_short_and_names_every_page_and_command() -> None:
    readme = PAGES[0].read_text()
    assert readme.count("\n") <= 150
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme
    named = {command for block in BLOCKS for command, _ in find_calls(block.text)}
    assert named | {"doctor"} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)|src=\"([^\"]+)\"", text):
        assert (page.parent / "".join(link)).exists(), link
    tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"test_\w+\.py", text)) <= tests
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def shrink(text: str, placeholders: dict[str, str]) -> str:
    """Return a block with real paths, and with sizes that take seconds."""
    for name, value in placeholders.items():
        text = re.sub(rf"\b{name}\b", value, text)
    for name, value in SMALL.items():
        text = re.sub(rf"(-P {name}=|--{name} |\b{name}=(?=\d))\w+", rf"\g<1>{value}", text)

    def add(found: re.Match[str]) -> str:
        missing = {name: SMALL[name] for name in SMALL if name in load_config_type(found[1]).model_fields}
        options = [f" --{name} {value}" for name, value in missing.items() if f"--{name} " not in found[0]]
        return found[0].rstrip() + "".join(options) + " "  # before a comment

    return re.sub(r"skin-resnet (train|search)(?:\\\n|[^\n|;&#])*", add, text)


@dataclass(frozen=True, kw_only=True)
class Project:
    """A copy of the project with a run in its store."""

    folder: Path
    environment: dict[str, str]
    placeholders: dict[str, str]
    servers: ExitStack

    def run(self, text: str) -> None:
        """Run a block, which must succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shrink(text, self.placeholders)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    def serve(self, text: str) -> None:
        """Start a block in the background, until the next one starts; return once its address answers."""
        self.servers.close()
        log = self.folder / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", shrink(text, self.placeholders)],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.servers.callback(process.wait)
        self.servers.callback(os.killpg, process.pid, signal.SIGTERM)
        while not (found := re.search(r"running on (http://[\w.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        urllib.request.urlopen(f"{found[1]}/health", timeout=60)


def copy_project(folder: Path) -> None:
    files = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # What `make` and `mlflow run` would do at full size by themselves.
    project = folder / "MLproject"
    text = project.read_text()
    for name, value in SMALL.items():
        text = re.sub(rf"({name}: {{.*default: )\w+", rf"\g<1>{value}", text)
    project.write_text(text)
    # An environment that `make` takes for ready.
    (folder / ".venv").mkdir()
    for each in Path(sys.prefix).iterdir():
        if each.name != "ready":
            (folder / ".venv" / each.name).symlink_to(each)
    (folder / ".venv/ready").touch()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("copy") / "skin-resnet"
    copy_project(folder)
    write_class_folders(folder / "images")
    Image.new("RGB", (32, 32), (60, 80, 200)).save(folder / "lesion.jpg")
    # As if torchvision's weights had been downloaded before.
    downloaded = folder / ".cache/torch/hub/checkpoints"
    downloaded.mkdir(parents=True)
    for arch in STAGE_DEPTHS:
        url = torchvision.models.get_model_weights(arch)["IMAGENET1K_V2"].url
        torch.save(build_resnet(arch, num_classes=1000).state_dict(), downloaded / Path(url).name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # `skin-resnet` is this copy
        "PYTHONUNBUFFERED": "1",
    }
    del environment["MLFLOW_EXPERIMENT_NAME"]  # users have none
    with ExitStack() as servers:
        project = Project(
            folder=folder,
            environment=environment,
            placeholders={
                "FOLDER": "images",
                "FILE.csv": "split.csv",
                "5001": str(port),
                "app RUN_ID": f"app RUN_ID --port {port + 1}",
                "8000": str(port + 1),
            },
            servers=servers,
        )
        project.run("skin-resnet train --data FOLDER")
        (split,) = folder.glob("mlruns/*/*/artifacts/data/split.csv")
        shutil.copy(split, folder)
        project.placeholders["RUN_ID"] = split.parents[2].name
        # Trained for one epoch, no model is good enough to be registered.
        project.run(f"python -c {shlex.quote(CROWN)}")
        yield project


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN_BLOCKS, ids=str)
def test_every_command_works(block: Block, project: Project) -> None:
    (project.serve if block.info == "server" else project.run)(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_every_script_works(block: Block, project: Project) -> None:
    project.run(f"python - <<'END'\n{block.text}END\n")
