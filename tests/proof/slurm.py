"""``make proof-slurm``: jobs on a cluster of Slurm that are killed and requeued.

    python -m tests.proof.slurm [--job training|conversion] [--steps N] [--out FILE]

Debian's ``slurm-wlm`` runs here as it is: ``slurmctld`` and two ``slurmd`` on the loopback, in a
temporary folder and with a key of their own.  The script of ``moecc launch template slurm`` is
submitted as it is printed.  A training, with one task a node, runs

* undisturbed;
* with the loss of a node: its daemon and its process are killed, the node comes back, and Slurm
  requeues the job;
* with a signal, as before the time is up: the tasks save, and the script requeues itself.

and all three must have the same metrics, byte for byte.  A conversion runs as an array of 8 parts,
of which two are killed with their node; what its last job joins must be the bytes of one process.

The nodes of this cluster have no names that
resolve, so that the address of the first process is stated: ``JAX_COORDINATOR_ADDRESS``.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from moecc.formats.run import saved_steps

from ..train.tiny import make_recipe  # noqa: TID252

NODES = ("n1", "n2")
LIMIT_SECONDS = 1800

CONFIG = """
ClusterName=moecc
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/slurm
CredType=cred/slurm
AuthInfo=use_client_ids
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_delay=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=10
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost Port={first} CPUs=64 RealMemory=8000
NodeName=n2 NodeHostname=localhost Port={second} CPUs=64 RealMemory=8000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """A controller and two nodes on this machine.

    Attributes:
      folder: has the configuration, the key, the state and the logs.
      daemons: the processes by name: ``slurmctld``, ``n1``, ``n2``.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Slurm's commands find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self):
        """Write the configuration, start all daemons, and wait for the nodes."""
        port, first, second = free_ports(3)
        text = CONFIG.format(folder=self.folder, port=port, first=first, second=second)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "slurm.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(self._is_idle, 600)

    def _is_idle(self) -> bool:
        """Return whether both nodes wait for jobs; raise RuntimeError if a daemon has ended."""
        if ended := [name for name, daemon in self.daemons.items() if daemon.poll() is not None]:
            logs = [path.read_text() for path in sorted(self.folder.glob("*.log"))]
            raise RuntimeError(f"{', '.join(ended)} ended: {''.join(logs)[-2000:]}")
        return self.run("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"]

    def start_node(self, node: str):
        """Start the daemon of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def _start(self, name: str, *command: str):
        self.daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def run(self, *command: str, **more: str) -> str:
        """Run a command of Slurm and return what it prints."""
        environment = {**self.environment, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Submit a script, and return the number of its job."""
        address = f"localhost:{free_ports(1)[0]}"
        printed = self.run(
            "sbatch", "--parsable", *options, f"--chdir={script.parent}",
            f"--output={self.folder}/job-%j.log", str(script),
            JAX_COORDINATOR_ADDRESS=address, JAX_PLATFORMS="cpu",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )  # fmt: skip
        return printed.strip()

    def state(self, job: str) -> str:
        """Return the state of a job, ``RUNNING`` for instance."""
        return self.fact(job, "JobState")

    def fact(self, job: str, name: str) -> str:
        """Return a value of a job that ``scontrol`` shows."""
        facts = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return next(fact.split("=", 1)[1] for fact in facts if fact.startswith(f"{name}="))

    def lose_node(self, node: str):
        """Kill everything on a node: its daemon, and the processes of its jobs."""
        daemon = self.daemons[node]
        daemon.kill()
        daemon.wait()
        members = []
        steps = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables
                if ours and f"SLURMD_NODENAME={node}".encode() in variables:
                    members.append(int(process.name))
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    if (Path("/proc") / parent / "comm").read_text().startswith("slurmstepd"):
                        steps.add(int(parent))
        # A daemon of a step that sees its task die reports a failed job, which is not requeued.
        for number in (*steps, *members):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def stop(self):
        """End all daemons."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster in a temporary folder."""
    with TemporaryDirectory(prefix="moecc-slurm-") as folder:
        nodes = Cluster(Path(folder))
        try:
            nodes.start()
            yield nodes
        finally:
            nodes.stop()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def wait_for(condition: Callable[[], bool], seconds: float = LIMIT_SECONDS):
    """Wait until a condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)


def printed_script(folder: Path, name: str, nodes: int, *words: str) -> Path:
    """Write the script that runs a command, as moecc prints it."""
    command = [
        sys.executable, "-m", "moecc", "launch", "template", "slurm", "--nodes", str(nodes),
        "--name", name, "--machine", "cpu", "--", *words,
    ]  # fmt: skip
    script = folder / f"{name}.sh"
    script.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    return script


def has_saved(run: Path) -> bool:
    """Whether a run has a checkpoint."""
    return (run / "steps").is_dir() and bool(saved_steps(run))


def train(nodes: Cluster, folder: Path, name: str, disturb: Callable[[str], None] | None) -> int:
    """Train to the end, disturbed after the first checkpoint; return the number of restarts."""
    run = folder / name
    words = ("train", str(folder / "recipe.toml"), "--out", str(run))
    one_task = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
    job = nodes.submit(printed_script(folder, name, len(NODES), *words), *one_task)
    if disturb is not None:
        wait_for(lambda: has_saved(run))
        disturb(job)
    wait_for(lambda: nodes.state(job) in {"COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED"})
    if nodes.state(job) != "COMPLETED":
        log = (nodes.folder / f"job-{job}.log").read_text()
        raise RuntimeError(f"{name}: the job is {nodes.state(job)}:\n{log[-4000:]}")
    return int(nodes.fact(job, "Restarts"))


PARTS = 8
_SHAPES = {"q": (256, 256), "k": (256, 256), "v": (256, 256), "o": (256, 256)}
_DENSE = {"gate": (1024, 256), "up": (1024, 256), "down": (256, 1024)}


def make_source(folder: Path, layers: int = 24):
    """Write a llama of random weights, 26 million of them."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "intermediate_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (512, 256), "norm": (256,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": shape for name, shape in _SHAPES.items()}
        shapes |= {f"{at}.mlp.{name}_proj": shape for name, shape in _DENSE.items()}
        shapes |= {f"{at}.input_layernorm": (256,), f"{at}.post_attention_layernorm": (256,)}
    draw = np.random.default_rng(0)
    tensors = {
        f"model.{name}.weight": draw.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def convert(nodes: Cluster, folder: Path) -> dict[str, object]:
    """Convert in parts, lose a node while it writes two of them, and compare the result."""
    make_source(folder / "source")
    words = [
        "convert", str(folder / "source"), str(folder / "out"), "-p", "upcycle{experts=8 top-k=2}",
        "--to", "mixtral", "--max-shard-bytes", "10MB",
    ]  # fmt: skip
    # Two parts a node at a time.
    job = nodes.submit(printed_script(folder, "parts", PARTS, *words), "--cpus-per-task=32")
    parts = folder / ".out.moecc-parts"

    def parts_on(node):
        listed = nodes.run("squeue", "-h", "-t", "R", "-w", node, "-j", job, "-o", "%K")
        return [int(number) for number in listed.split()]

    def are_two_written():
        partial = [parts / f".{n:05d}-of-{PARTS:05d}.moecc-partial" for n in parts_on("n2")]
        return len(partial) == 2 and all(path.is_dir() for path in partial)

    wait_for(are_two_written)
    killed = parts_on("n2")
    nodes.lose_node("n2")
    wait_for(lambda: not parts_on("n2"))
    left = [path.name for path in parts.iterdir() if path.name.startswith(".")]
    nodes.start_node("n2")
    wait_for(lambda: (folder / "out").is_dir() and not parts.exists())
    alone = [sys.executable, "-m", "moecc", *words[:2], str(folder / "alone"), *words[3:]]
    subprocess.run(alone, capture_output=True, check=True)
    contents = [
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("out", "alone")
    ]
    return {"parts": PARTS, "killed": killed, "left_partial": len(left),
            "bytes": sum(map(len, contents[0].values())),
            "same_bytes": contents[0] == contents[1]}  # fmt: skip


def train_three(nodes: Cluster, folder: Path, steps: int) -> dict[str, object]:
    """Run the three trainings and compare their metrics."""
    settings = f"steps = {steps}\nsave_steps = {steps // 8}\nkeep = 3"
    make_recipe(folder, settings, seq=32)
    with (folder / "recipe.toml").open("a") as recipe:
        recipe.write('\n[mesh]\nmesh = "data=2"\n')

    def lose_node(job):
        nodes.lose_node("n2")
        wait_for(lambda: nodes.state(job) != "RUNNING")
        nodes.start_node("n2")

    def end_of_time(job):
        nodes.run("scancel", "--signal=TERM", job)

    disturbances = {"undisturbed": None, "lost": lose_node, "told": end_of_time}
    restarts = {name: train(nodes, folder, name, disturb) for name, disturb in disturbances.items()}
    metrics = {name: (folder / name / "metrics.jsonl").read_bytes() for name in disturbances}
    same = {name: text == metrics["undisturbed"] for name, text in metrics.items()}
    return {"processes": len(NODES), "steps": steps, "restarts": restarts, "same_metrics": same}


def main() -> int:
    """Run the jobs and compare what they wrote; a job that is not run keeps its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=("training", "conversion"), help="one of the jobs")
    parser.add_argument("--steps", type=int, default=400, help="steps of the training")
    parser.add_argument("--out", type=Path, help="file of JSON to write")
    options = parser.parse_args()
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name)]:
        print(f"not here: {', '.join(missing)}; Debian has them in slurm-wlm", file=sys.stderr)
        return 4

    has_record = options.out is not None and options.out.is_file()
    report = json.loads(options.out.read_text()) if has_record else {}
    with TemporaryDirectory(prefix="moecc-jobs-") as text, cluster() as nodes:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "slurm": nodes.run("sinfo", "--version").strip(),
        }
        if options.job != "conversion":
            report["training"] = about | train_three(nodes, Path(text), options.steps)
        if options.job != "training":
            report["conversion"] = about | convert(nodes, Path(text))
    text = json.dumps(report, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    training, conversion = report.get("training"), report.get("conversion")
    restarts = {"undisturbed": 0, "lost": 1, "told": 1}
    is_right = (
        training is None
        or (all(training["same_metrics"].values()) and training["restarts"] == restarts)
    ) and (conversion is None or (conversion["same_bytes"] and len(conversion["killed"]) == 2))
    return 0 if is_right else 3


if __name__ == "__main__":
    sys.exit(main())
