"""Scripts and manifests that run a command of moecc on a cluster: printed, never run.

A conversion becomes a job of parts that run apart, and one that joins them; any other command runs
on all nodes together.  Nodes and accelerators of the machine, limits and restarts are filled in.
What moecc cannot know is an option, and an error names the options that are missing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import ceil, prod
from pathlib import Path
from string import Template

from moecc.errors import MachineError, Problem, UsageError, printable, raise_problems, unknown_name
from moecc.formats.store import is_address, is_place
from moecc.plan.machines import (
    LEAST_FRACTION,
    MEMORY_VARIABLE,
    find_machine,
    short_tpu_name,
    table,
)
from moecc.plan.networks import Switch
from moecc.plan.step import read_plan
from moecc.support.text import amount
from moecc.support.untyped import Json, JsonDict

RESTARTS = 10
"""How often a scheduler starts a training again, which goes on where it was saved."""

PORT = 8476
"""The port at which the first process waits for the others: the one of JAX on TPUs."""

STOP_SECONDS = 300
"""The time between the notice that a training ends and its end; it saves meanwhile."""

PART_CPUS, PART_MEMORY_GB = 8, 4
"""The cores of a part of a conversion, and its memory: a thread holds up to 0.2 GB."""

WORK = "/work"
"""The folder in a container at which a volume is mounted, and where the command runs."""

CONTAINER = "moecc"
"""The name of the container in a pod."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?\Z")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*\Z")
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*\Z")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_GKE_TPUS = {
    "v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x",
}  # fmt: skip
_GKE_GPUS = {
    "a100": "nvidia-a100-80gb", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}  # fmt: skip
_SKY_GPUS = {"a100": "A100-80GB"}
_USED = {
    "slurm": {"queue"}, "jobset": {"image", "queue", "volume"}, "skypilot": {"image", "volume"},
    "xpk": {"image", "cluster"},
}  # fmt: skip
"""The options that each template uses."""

_FAULTS = [1, 2, 3]
"""The exit codes of wrong inputs and failed checks, which a restart does not change."""

_EXCLUSIVE = {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
}
"""The annotation with which JobSet gives each slice of TPUs a node pool of its own."""


@dataclass(frozen=True)
class Hosts:
    """The hosts of a machine.

    Attributes:
      kind: ``gpu``, ``tpu`` or ``cpu``.
      chip: the accelerator, ``h100`` or ``v5p``; empty for the processors of hosts, and for GPUs
        that a file describes without naming them.
      count: the number of hosts, of one slice if there are several.
      accelerators: the number of accelerators of a host.
      topology: the topology of a slice of TPUs, ``4x4x4``.
      slices: the number of slices.
    """

    kind: str
    chip: str
    count: int
    accelerators: int
    topology: str = ""
    slices: int = 1


def hosts_of(text: str) -> Hosts:
    """Return the hosts of a machine, by its name or file. Raises UsageError, InputError."""
    machine = find_machine(text)
    if machine.kind == "cpu":
        return Hosts(machine.kind, "", 1, 0)
    _, chip, size, *slices = [*(machine.like or machine.name).split(":"), "", ""]
    if isinstance(machine.network, Switch):
        per_node = machine.network.per_node
        chip = chip if machine.like or machine.compiled_as else ""
        count = ceil(machine.devices / per_node)
        return Hosts(machine.kind, chip, count, min(machine.devices, per_node))
    chips, most = prod(map(int, size.split("x"))), table()["tpu"][chip]["chips_per_host"]
    count = int(slices[0] or 1)
    return Hosts(machine.kind, chip, ceil(chips / most), min(chips, most), size, count)


@dataclass(frozen=True)
class ClusterJob:
    """A command of moecc on a cluster.

    Attributes:
      name: the name of the job, a DNS label.
      words: the command and its arguments.
      hosts: the hosts that compute together; None for a conversion.
      nodes: the number of hosts, or of parts of a conversion.
      step_seconds: the limit of a step.
      image: the container image that has moecc.
      queue: the queue of Kueue, or the partition of Slurm.
      volume: the volume with the files of the command.
      cluster: the cluster of xpk.
      memory_fraction: the share of a GPU's memory to ask JAX for (default: `LEAST_FRACTION`).
    """

    name: str
    words: Sequence[str]
    hosts: Hosts | None
    nodes: int
    step_seconds: int
    image: str | None = None
    queue: str | None = None
    volume: str | None = None
    cluster: str | None = None
    memory_fraction: str | None = None

    @property
    def gpu_memory(self) -> tuple[str, str]:
        """The variable of JAX, and its value, for the share of a GPU's memory."""
        return MEMORY_VARIABLE, (self.memory_fraction or str(LEAST_FRACTION)).lstrip("0")

    @property
    def is_conversion(self) -> bool:
        """Whether the command is a conversion, which runs in parts."""
        return self.words[0] == "convert"

    @property
    def restarts(self) -> int:
        """The number of restarts: the same command goes on with a training or a conversion."""
        return RESTARTS if self.words[0] in ("train", "convert") else 0

    def part(self, number: str) -> str:
        """Return the shell command of a part; `number` is what the shell expands to its number."""
        threads = f"--threads {PART_CPUS}"
        return f"{self.command} --part {number}/{self.nodes} {threads} --resume"

    @property
    def join(self) -> str:
        """The shell command that joins the parts."""
        return f"{self.command} --join --threads {PART_CPUS} --resume"

    @property
    def command(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(["moecc", *self.words])


def make_job(
    name: str,
    words: Sequence[str],
    nodes: int | None,
    machine: str | None,
    step_seconds: int,
    **options: str | None,
) -> ClusterJob:
    """Return a job.

    Args:
      name: the name of the job.
      words: the command and its arguments.
      nodes: the number of hosts or parts; None for the hosts of the machine.
      machine: the machine; None for the one of the saved plan among the arguments, if there is one.
      step_seconds: the limit of a step.
      **options: further attributes of the job.

    Raises:
      UsageError: the name or the machine is none, the nodes are not those of the machine or the
        machine not the one of the plan, or a conversion has no number of parts.
      InputError: the plan or the file of a machine cannot be read.
    """
    if _LABEL.match(name) is None:
        raise UsageError(
            "not a valid name of a job",
            expected="a DNS label: at most 40 lower-case letters, digits and dashes",
            found=name,
        )
    raise_problems(
        (
            Problem(
                "not a name that a template can hold", f"--{option}",
                "letters, digits and . _ : / @ -", printable(value),
            )
            for option, value in options.items()
            if value is not None and not _VALUE.match(value)
        ),
        UsageError,
    )  # fmt: skip
    if words[0] == "convert":
        if stated := [word for word in words if word.split("=")[0] in ("--part", "--join")]:
            raise UsageError(
                "the template adds the parts itself", found=stated[0],
                hint="leave it out, and give the number of parts as --nodes",
            )  # fmt: skip
        if nodes is None:
            raise UsageError("a conversion runs in parts", expected="their number: --nodes 8, say")
        return ClusterJob(name, words, None, nodes, step_seconds, **options)
    if words[0] == "train" and not option_value(words, "--out", "--resume"):
        raise UsageError(
            "a training that is started again needs the folder of its run",
            expected="train RECIPE --out RUN",
            found=printable(" ".join(words)),
        )
    plan = option_value(words, "--plan")
    saved = read_plan(plan) if plan else None
    planned = saved and saved.machine
    hosts = None
    if text := machine or planned:
        hosts = hosts_of(text)
        devices = find_machine(text).devices
        if planned and (expected := find_machine(planned).devices) != devices:
            raise UsageError(
                "the machine is not the one of the plan", where=plan, found=text,
                expected=f"{amount(expected, 'device')}, {planned}; or leave --machine out",
            )  # fmt: skip
        count = hosts.count * hosts.slices
        if nodes is not None and hosts.kind != "cpu" and nodes not in (count, hosts.slices):
            raise UsageError(
                "the nodes are not those of the machine", where=text, found=f"--nodes {nodes}",
                expected=f"--nodes {count}, or none",
            )  # fmt: skip
        nodes = nodes if hosts.kind == "cpu" else count
    if saved is not None and saved.memory_fraction is not None:
        options["memory_fraction"] = str(saved.memory_fraction)
    return ClusterJob(name, words, hosts, nodes or 1, step_seconds, **options)


def option_value(words: Sequence[str], *names: str) -> str:
    """Return the value of the first word that is one of some options; empty without one."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return ""


def template(kind: str, job: ClusterJob) -> str:
    """Return the script or manifest of a kind of cluster.

    Raises:
      UsageError: there is no such kind, or what it needs is missing, all at once.
    """
    if kind not in TEMPLATES:
        raise UsageError([unknown_name("template", kind, TEMPLATES)])
    return TEMPLATES[kind](job)


def _require(kind: str, job: ClusterJob, **hints: str) -> None:
    """Raise UsageError with the options that a template needs and the job lacks."""
    if job.is_conversion:
        hints |= {"volume": "a volume with the source, where all parts are written"}
    raise_problems(
        (
            Problem(f"the template {kind} needs --{name}", expected=hint)
            for name, hint in hints.items()
            if getattr(job, name) is None
        ),
        UsageError,
    )


def _require_kept(kind: str, job: ClusterJob) -> None:
    """Raise UsageError if the folder of a run is in a container, with which it would be lost."""
    folder = option_value(job.words, "--out", "--resume") if job.words[0] == "train" else ""
    has_volume = job.volume is not None and "volume" in _USED[kind]
    if not folder or has_volume or is_address(folder) or folder.startswith("/"):
        return
    raise UsageError(
        "the run would be lost with its container", where=f"template {kind}", found=folder,
        expected="--out s3://BUCKET/RUN" + (", or --volume" if "volume" in _USED[kind] else ""),
    )  # fmt: skip


def remarks(kind: str, job: ClusterJob) -> Iterator[str]:
    """Yield the options that a template does not use, and what its containers must have."""
    for option in ("image", "queue", "volume", "cluster"):
        if getattr(job, option) is not None and option not in _USED[kind]:
            yield f"the template {kind} does not use --{option}"
    if kind == "slurm":
        return
    output = option_value(job.words, "--out", "--resume")
    values = (word.partition("=")[2] if word.startswith("--") else word for word in job.words[1:])
    local = [v for v in values if v and v != output and is_place(v) and Path(v).exists()]
    if local:
        target = "the image" if job.volume is None else f"the volume {job.volume}, below {WORK}"
        yield f"the containers read local files, put them into {target}: {', '.join(local)}"
    if kind == "jobset" and job.hosts is not None and job.hosts.chip in _GKE_GPUS:
        yield "the nodeSelector has GKE's label of these GPUs: replace it on other clusters"


_IMAGE = "a container image that has moecc"


def _machine_of(kind: str, job: ClusterJob, kinds: Sequence[str]) -> Hosts:
    example = "h100x16" if "gpu" in kinds else "v5p-128"
    if job.hosts is None or job.hosts.kind not in kinds:
        raise UsageError(
            f"the template {kind} needs a machine of {' or '.join(kinds)}",
            expected=f"--machine, for example {example}, or --plan among the arguments of train",
            found=None if job.hosts is None else job.hosts.kind,
        )
    return job.hosts


# Slurm and xpk: scripts.


def _fill(script: str, **values: object) -> str:
    text = (files("moecc.launch") / "scripts" / script).read_text("utf-8")
    return Template(text).substitute(values)


def _slurm(job: ClusterJob) -> str:
    partition = f"#SBATCH --partition={job.queue}\n" if job.queue else ""
    if job.is_conversion:
        return _fill(
            "slurm_parts.sh", name=job.name, parts=job.nodes, partition=partition, cpus=PART_CPUS,
            memory=PART_MEMORY_GB, part=job.part("$SLURM_ARRAY_TASK_ID"),
            join=shlex.quote(job.join), fault=MachineError.exit_code, restarts=job.restarts,
        )  # fmt: skip
    hosts = _machine_of("slurm", job, ("gpu", "cpu"))
    gpus = memory = ""
    if hosts.kind == "gpu":
        gpus = f"#SBATCH --gpus-per-node={hosts.accelerators}\n"
        memory = f"export {'='.join(job.gpu_memory)}    # of a GPU; JAX takes 75 % otherwise\n"
    return _fill(
        "slurm.sh", name=job.name, nodes=job.nodes, tasks=hosts.accelerators or 1, gpus=gpus,
        memory=memory, partition=partition, seconds=job.step_seconds, stop=STOP_SECONDS,
        command=job.command, fault=MachineError.exit_code, restarts=job.restarts,
    )  # fmt: skip


def _xpk(job: ClusterJob) -> str:
    if job.is_conversion:
        raise UsageError("xpk runs no conversions in parts", hint="moecc launch template jobset")
    _require("xpk", job, cluster="the name of the cluster that xpk made", image=_IMAGE)
    _require_kept("xpk", job)
    hosts = _machine_of("xpk", job, ("tpu",))
    settings = f"MOECC_DISTRIBUTED=cluster MOECC_STEP_SECONDS={job.step_seconds}"
    return _fill(
        "xpk.sh", name=job.name, slices=hosts.slices, restarts=job.restarts, image=job.image,
        cluster=job.cluster, type=short_tpu_name(hosts.chip, hosts.topology),
        fault=MachineError.exit_code, command=shlex.quote(f"{settings} {job.command}"),
    )  # fmt: skip


# Kubernetes: a JobSet, queued by Kueue.


def _jobset(job: ClusterJob) -> str:
    _require("jobset", job, image=_IMAGE)
    _require_kept("jobset", job)
    labels: JsonDict = {"labels": {"kueue.x-k8s.io/queue-name": job.queue}} if job.queue else {}
    if job.hosts is not None and job.hosts.kind == "tpu":
        labels["annotations"] = _EXCLUSIVE
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    policy = {"maxRestarts": job.restarts, "rules": [rule]}
    jobs = _part_jobs(job) if job.is_conversion else [_workers(job)]
    return _yaml_text(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name, **labels},
            "spec": {"failurePolicy": policy, "replicatedJobs": jobs},
        }
    )


def _workers(job: ClusterJob) -> Json:
    """Return the job of processes that compute together, one a host."""
    hosts = _machine_of("jobset", job, ("gpu", "tpu"))
    environment: list[Json] = [{"name": "MOECC_STEP_SECONDS", "value": str(job.step_seconds)}]
    selector: Json = {}
    resource = "nvidia.com/gpu"
    if hosts.kind == "tpu":
        # GKE tells each host of a slice its place, and JAX reads it.
        environment.append({"name": "MOECC_DISTRIBUTED", "value": "cluster"})
        resource = "google.com/tpu"
        selector = {"nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": _GKE_TPUS[hosts.chip],
            "cloud.google.com/gke-tpu-topology": hosts.topology,
        }}  # fmt: skip
    else:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment += [
            {"name": "MOECC_COORDINATOR", "value": f"{job.name}-workers-0-0.{job.name}:{PORT}"},
            {"name": "MOECC_PROCESSES", "value": str(hosts.count)},
            {"name": "MOECC_PROCESS", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            dict(zip(("name", "value"), job.gpu_memory, strict=True)),
        ]
        if gpu := _GKE_GPUS.get(hosts.chip):
            selector = {"nodeSelector": {"cloud.google.com/gke-accelerator": gpu}}
    container = {
        "command": ["moecc", *job.words], "env": environment,
        "resources": {"limits": {resource: hosts.accelerators}},
    }  # fmt: skip
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": STOP_SECONDS, **selector}
    # One process that ends, ends the others; JobSet then starts all again.
    return _replicated("workers", hosts.count, 0, _pod(job, pod, container), hosts.slices)


def _part_jobs(job: ClusterJob) -> list[Json]:
    """Return the jobs of a conversion: all parts, and behind them the one that joins them."""
    shells = {"parts": job.part("$((JOB_COMPLETION_INDEX + 1))"), "join": job.join}
    counts = {"parts": job.nodes, "join": 1}
    size = {"cpu": PART_CPUS, "memory": f"{PART_MEMORY_GB}Gi"}
    jobs = {
        name: _replicated(
            name, counts[name], counts[name] * RESTARTS,
            _pod(job, {"restartPolicy": "Never"},
                 {"command": ["sh", "-c", shell], "resources": {"requests": size}}),
        )
        for name, shell in shells.items()
    }  # fmt: skip
    condition = {"dependsOn": [{"name": "parts", "status": "Complete"}]}
    return [jobs["parts"], {**jobs["join"], **condition}]


def _replicated(name: str, count: int, retries: int, pod: Json, replicas: int = 1) -> Json:
    codes = {"containerName": CONTAINER, "operator": "In", "values": _FAULTS}
    spec = {
        "completionMode": "Indexed", "completions": count, "parallelism": count,
        "backoffLimit": retries,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod},
    }  # fmt: skip
    return {"name": name, "replicas": replicas, "template": {"spec": spec}}


def _pod(job: ClusterJob, pod: Json, container: Json) -> Json:
    # Kubernetes expands $(NAME) in a command, and reads $$ as a dollar.
    command = [word.replace("$", "$$") for word in container["command"]]
    main = {"name": CONTAINER, "image": job.image, **container, "command": command}
    if job.volume is None:
        return {**pod, "containers": [main]}
    mount = {"workingDir": WORK, "volumeMounts": [{"name": "work", "mountPath": WORK}]}
    claim = {"name": "work", "persistentVolumeClaim": {"claimName": job.volume}}
    return {**pod, "containers": [{**main, **mount}], "volumes": [claim]}


# SkyPilot: tasks of managed jobs, which are started again when a node is lost.


def _skypilot(job: ClusterJob) -> str:
    _require("skypilot", job, image=_IMAGE)
    _require_kept("skypilot", job)
    recovery = {"job_recovery": {"max_restarts_on_errors": job.restarts}} if job.restarts else {}
    resources: Json = {"image_id": f"docker:{job.image}", **recovery}
    volumes = {"volumes": {WORK: job.volume}} if job.volume else {}
    folder = [f"cd {WORK}"] if job.volume else []
    if job.is_conversion:
        cores = {"cpus": f"{PART_CPUS}+", "memory": f"{PART_MEMORY_GB}+"}
        resources = {**resources, **cores}
        part = job.part("$((SKYPILOT_NODE_RANK + 1))")
        tasks = [("parts", job.nodes, part), ("join", 1, job.join)]
        documents: list[Json] = [
            {"name": name, "num_nodes": count, "resources": resources, **volumes,
             "run": "\n".join([*folder, shell])}
            for name, count, shell in tasks
        ]  # fmt: skip
        return "---\n".join(map(_yaml_text, [{"name": job.name}, *documents]))
    hosts = _machine_of("skypilot", job, ("gpu",))
    if not hosts.chip:
        raise UsageError(
            "the template skypilot needs the name of a GPU",
            expected='like = "gpu:h100:8", for example, in the file of the machine',
        )
    gpu = _SKY_GPUS.get(hosts.chip, hosts.chip.upper())
    lines = [
        f'export MOECC_COORDINATOR="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
        'export MOECC_PROCESSES="$SKYPILOT_NUM_NODES" MOECC_PROCESS="$SKYPILOT_NODE_RANK"',
        job.command,
    ]
    task = {
        "name": job.name, "num_nodes": hosts.count,
        "resources": {"accelerators": f"{gpu}:{hosts.accelerators}", **resources},
        "envs": dict([("MOECC_STEP_SECONDS", str(job.step_seconds)), job.gpu_memory]),
        **volumes,
        "run": "\n".join([*folder, *lines]),
    }  # fmt: skip
    return _yaml_text(task)


TEMPLATES: Mapping[str, Callable[[ClusterJob], str]] = {
    "slurm": _slurm,
    "jobset": _jobset,
    "skypilot": _skypilot,
    "xpk": _xpk,
}


# YAML.


def _yaml_text(value: Json) -> str:
    return "\n".join(_yaml(value)) + "\n"


def _yaml(value: object) -> Iterator[str]:
    """Yield the lines of a value that is no scalar."""
    if isinstance(value, list):
        for item in value:
            lines = list(_yaml(item)) if isinstance(item, dict) else [_scalar(item)]
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
        return
    assert isinstance(value, dict), "a mapping or a list"
    for key, item in value.items():
        if isinstance(item, dict | list):
            yield f"{key}:"
            yield from (f"  {line}" for line in _yaml(item))
        elif isinstance(item, str) and "\n" in item and item.replace("\n", "").isprintable():
            yield f"{key}: |"
            yield from (f"  {line}" for line in item.split("\n"))
        else:
            yield f"{key}: {_scalar(item)}"


def _scalar(value: object) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.match(value) and value.lower() not in _YAML_WORDS:
        return value
    # JSON's escapes are YAML's, but for the pairs of surrogates of what is beyond 16 bits.
    characters = (c if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in value)
    return f'"{"".join(characters)}"'
