"""One study on many machines: the templates in deploy/, and searches that have only the network in common."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import psycopg
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from test_outage import Server, find_free_port
from test_search_end_to_end import Search, is_training
from test_search_postgresql import needs_server, storage  # noqa: F401 (a fixture)

from search.report import WINNER
from search.space import BASELINE
from skin_resnet.cli import parse_options

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SLURM = [
    shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")
]
needs_slurm = pytest.mark.skipif(
    not all(SLURM) or os.geteuid() != 0, reason="Slurm is not installed, or not root"
)


def find_commands() -> dict[str, str]:
    """Return what each template runs on a machine."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["search"]["command"]
    job = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    return {
        "compose": compose,
        "kubernetes": shlex.join(job["containers"][0]["args"]),
        "sky": yaml.safe_load((DEPLOY / "sky.yaml").read_text())["run"],
        "slurm": next(line for line in lines if line.startswith("srun")),
    }


@pytest.mark.parametrize("template", ["compose", "kubernetes", "sky", "slurm"])
def test_every_template_runs_the_same_search(template: str) -> None:
    words = shlex.split(find_commands()[template].split("skin-resnet ")[-1])
    command, option, file, *more = words
    assert (command, option, Path(file).name) == ("search", "--config", "study.yaml")
    # Where the folder is on a shared volume, so are the decoded images.
    assert more == (["--cache_dir", "cache"] if template in ("compose", "kubernetes") else [])


def test_the_compose_file_keeps_to_its_schema() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema=vendor.compose-spec"]
    subprocess.run([*checker, DEPLOY / "compose.yaml"], check=True)


def test_the_kubernetes_job_keeps_to_its_schema() -> None:
    job = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
    assert kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_server_of_the_docs_answers_the_clients_of_the_docs() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    (hosts,) = re.findall(r"--allowed-hosts (\S+)", text)
    (client,) = re.findall(r"MLFLOW_TRACKING_URI=http://(\S+)", text)
    assert is_allowed_host_header(hosts.split(","), client)


def test_the_study_file_is_one_that_search_takes(tmp_path: Path) -> None:
    text = (DEPLOY / "study.yaml").read_text().replace("/data", str(tmp_path))
    (tmp_path / "study.yaml").write_text(text)
    config = parse_options("search", ["--config", str(tmp_path / "study.yaml")])
    assert (config.n_trials, str(config.data)) == (200, str(tmp_path))


class Machine(Search):
    """A machine with a folder of its own; it shares the study, the tracking server and the images."""

    N_TRIALS = 6

    def __init__(self, folder: Path, data: Path, storage: str, tracking_uri: str, **options: int) -> None:  # noqa: F811
        folder.mkdir()
        study = {"storage": storage.replace("/postgres", "/study"), "study_name": "folders"}
        super().__init__(folder, data, **study, n_trials=self.N_TRIALS, heartbeat_s=2, **options)
        self.tracking_uri = tracking_uri
        given = dict(each.removeprefix("--").split("=", 1) for each in self.command[4:])
        (folder / "study.yaml").write_text(yaml.safe_dump(given))
        self.command = [*self.command[:4], "--config", "study.yaml"]


@pytest.fixture
def tracking_server(storage: str, tmp_path: Path) -> Iterator[Server]:  # noqa: F811
    with psycopg.connect(storage.replace("+psycopg", ""), autocommit=True) as connection:
        for name in ("mlflow", "study"):
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {name}")
    server = Server(tmp_path, storage.replace("/postgres", "/mlflow"))
    server.start()
    yield server
    server.stop()


@needs_server
@pytest.mark.slow
def test_four_machines_finish_a_study_though_one_dies_one_leaves_and_the_server_restarts(
    storage: str,  # noqa: F811
    tracking_server: Server,
    tmp_path: Path,
    class_folders: Path,
) -> None:
    machines = [
        Machine(
            tmp_path / f"machine{number}", class_folders, storage, tracking_server.uri, epochs=10, seeds=1
        )
        for number in range(4)
    ]
    try:
        dies, leaves, *others = [machine.start() for machine in machines]
        machines[0].wait_for(lambda trials: sum(is_training([trial]) for trial in trials) >= 3)
        os.killpg(dies.pid, signal.SIGKILL)
        leaves.send_signal(signal.SIGUSR1)
        assert leaves.wait(120) == 128 + signal.SIGUSR1
        tracking_server.stop()
        time.sleep(3)
        tracking_server.start()
        assert [each.wait(600) for each in others] == [0, 0], machines[2].log.read_text()
    finally:
        for machine in machines:
            machine.kill()
    machines[2].check_books(Machine.N_TRIALS)
    # One of them retrained and tested, with checkpoints from the server, while the others left it alone.
    retrained = [run for run in machines[2].read_runs() if "search.recipe" in run.data.tags]
    recipes = Counter(run.data.tags["search.recipe"] for run in retrained)
    assert recipes in (Counter([BASELINE]), Counter([BASELINE, WINNER]))
    assert all(run.info.status == "FINISHED" and "test_accuracy" in run.data.metrics for run in retrained)
    assert all("Traceback" not in machine.log.read_text() for machine in machines)


class Cluster:
    """Slurm on this machine alone, with two CPUs."""

    CONF = """
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={ports[0]}
        SlurmdPort={ports[1]}
        SlurmUser=root
        AuthInfo=socket={folder}/munge.socket
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        NodeName={host} NodeAddr=127.0.0.1 CPUs=2
        PartitionName=main Nodes=ALL Default=YES
    """

    def __init__(self, folder: Path) -> None:
        ports = [find_free_port() for _ in range(2)]
        (folder / "state").mkdir()
        text = self.CONF.format(host=socket.gethostname().split(".")[0], ports=ports, folder=folder)
        (folder / "slurm.conf").write_text("\n".join(map(str.strip, text.splitlines())))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        munged, slurmctld, slurmd = SLURM
        munge = [munged, "--foreground", "--force", f"--socket={folder}/munge.socket"]
        munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.log = (folder / "slurm.log").open("wb")
        self.daemons = []
        for command in (munge, [slurmctld, "-D"], [slurmd, "-D"]):
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
            )
            time.sleep(1)

    def run(self, command: str, *options: object, check: bool = True) -> str:
        done = subprocess.run(
            [command, *map(str, options)], env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def read_states(self, job: str) -> list[str]:
        """Return the state of each task of an array."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(word.partition("=")[::2] for word in line.split())["JobState"] for line in lines]

    def wait_for(self, job: str, condition: Callable[[list[str]], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition(states := self.read_states(job)):
            assert time.monotonic() < deadline, states
            time.sleep(0.5)

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while (
            self.run("squeue", "--noheader", "--states=running,completing", check=False)
            and time.monotonic() < deadline
        ):
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait(30)
        self.log.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/slurm.XXXXXX"], text=True).strip())
    folder.chmod(0o755)
    made = Cluster(folder)
    yield made
    made.stop()
    shutil.rmtree(folder)


@needs_slurm
@needs_server
@pytest.mark.slow
def test_a_job_array_finishes_a_study_though_one_task_is_out_of_time_and_one_cancelled(
    cluster: Cluster,
    storage: str,  # noqa: F811
    tracking_server: Server,
    tmp_path: Path,
    class_folders: Path,
) -> None:
    project = Machine(tmp_path / "project", class_folders, storage, tracking_server.uri, epochs=20)
    project.log = project.folder / "search-1.log"
    program = project.folder / ".venv" / "bin" / "skin-resnet"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m skin_resnet "$@"\n')
    program.chmod(0o755)
    cluster.environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": tracking_server.uri}
    small = ["--array=1-2", "--cpus-per-task=1", "--gpus-per-task=0", f"--chdir={project.folder}"]
    job = cluster.run("sbatch", "--parsable", *small, DEPLOY / "slurm.sh")
    project.wait_for(lambda trials: sum(is_training([trial]) for trial in trials) >= 2)
    # What Slurm sends when the time limit is near: to the step, not to the script.
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    cluster.wait_for(f"{job}_1", lambda states: states == ["PENDING"])
    cluster.run("scancel", f"{job}_2")
    cluster.wait_for(f"{job}_2", lambda states: states == ["CANCELLED"])
    cluster.run("scontrol", "requeue", f"{job}_2")
    for task in (1, 2):  # Slurm would wait for two minutes
        cluster.run("scontrol", "update", f"jobid={job}_{task}", "starttime=now")
    cluster.wait_for(job, lambda states: states == ["COMPLETED"] * 2)
    project.check_books(Machine.N_TRIALS)
