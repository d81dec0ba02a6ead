"""``moecc launch template``: what schedulers read is what moecc means."""

import json
import os
import shlex
import subprocess

import pytest
import yaml

from moecc.errors import CheckError, InputError, UsageError
from moecc.launch.processes import ProcessInfo, process_info

TRAIN = ("--", "train", "recipe:continue-dense", "--out", "run", "--set", 'model.source="b c"')
CONVERT = ("--", "convert", "source", "out dir", "-p", "upcycle{experts=8 top-k=2}")
JOIN = (*CONVERT[1:], "--join", "--threads", "8", "--resume")
STORED = ("--", "train", "recipe:upcycle", "--out", "s3://bucket/run")
CLUSTER = ("--image", "registry/moecc:1", "--queue", "team", "--volume", "data")


@pytest.fixture
def printed(moecc):
    """Return what ``moecc launch template ARGS`` prints."""

    def run(*words):
        done = moecc("launch", "template", *words)
        assert done.code == 0, done.err
        return done.out

    return run


@pytest.fixture
def loaded(printed):
    """Return the YAML that a template prints."""
    return lambda *words: yaml.safe_load(printed(*words))


def jobs_of(jobset):
    """Return the jobs of a JobSet by name."""
    return {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}


def container_of(job):
    return job["template"]["spec"]["containers"][0]


def script_of(task):
    """Return what a task of SkyPilot runs, where it stands."""
    return task["run"].replace("cd /work\n", "")


def with_stubs(folder, script, fails=None, code=0, **environment):
    """Run a script with commands that note their arguments and environment; one fails with code."""
    for name in ("moecc", "sbatch", "scontrol", "srun", "xpk"):
        stub = folder / name
        stub.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.args\nenv > {folder}/env\n'
            f"exit {code if name == fails else 0}\n"
        )
        stub.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    env = {"PATH": path, **environment}
    assert subprocess.run(["bash", "-c", script], cwd=folder, env=env).returncode == code
    return {p.stem: p.read_text() for p in folder.glob("*.args")}


def arguments(words):
    return "".join(f"{word}\n" for word in words)


def noted_process(folder):
    lines = (line.partition("=") for line in (folder / "env").read_text().splitlines())
    return process_info({name: value for name, _, value in lines})


def test_a_jobset_tells_each_host_its_process(loaded):
    jobset = loaded("jobset", "--machine", "h100x16", *CLUSTER, *TRAIN)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = jobs_of(jobset)["workers"]
    container = container_of(job)
    assert container["command"] == ["moecc", *TRAIN[1:]]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {v["name"]: v.get("value", "1") for v in container["env"]}
    # The name that JobSet gives to the first pod of its first job.
    assert process_info(variables) == ProcessInfo("moecc-workers-0-0.moecc:8476", 2, 1)
    assert job["completions"] == job["parallelism"] == 2


def test_a_jobset_asks_for_slices_of_tpus(loaded):
    jobset = loaded("jobset", "--machine", "tpu:v5p:4x4x4:2", *CLUSTER, *TRAIN)
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["completions"]) == (2, 16)
    selector = job["template"]["spec"]["nodeSelector"]
    assert set(selector.values()) == {"tpu-v5p-slice", "4x4x4"}
    assert container_of(job)["resources"]["limits"] == {"google.com/tpu": 4}


def test_a_saved_plan_names_the_machine(moecc, printed, loaded, tmp_path):
    plan = tmp_path / "plan.json"
    done = moecc("plan", "preset:smollm2-135m", "--machine", "h100x32", "--save", plan)
    assert done.code == 0, done.err
    task = loaded("skypilot", *CLUSTER, *TRAIN, "--plan", plan)
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (4, "H100:8")
    assert "--nodes=4" in printed("slurm", *TRAIN, f"--plan={plan}")


def test_a_plan_of_other_passes_than_the_recipe_s_is_refused_before_the_queue(moecc, tmp_path):
    plan = tmp_path / "plan.json"
    passes = "upcycle{experts=16 top-k=2 granularity=2 router-init=logit-std router-std=1}"
    words = ("launch", "template", "slurm", *STORED, "--plan", plan)
    other = "upcycle{experts=8 top-k=2}"
    for text, sets, code in (
        (other, (), 1),
        (other, ("--set", f"model.pipeline={other}"), 0),
        (other, (f"--set=model.pipeline={other}",), 0),
        (f"{passes},pack-segments", (), 0),
        ("", (), 1),
        ("", ("--set", "model.pipeline="), 0),
    ):
        options = ("-p", text, "--machine", "h100x8", "--force", "--save", plan)
        assert moecc("plan", "preset:smollm2-135m", *options).code == 0
        done = moecc(*words, *sets)
        assert (done.code, "the plan is of other passes" in done.err) == (code, code == 1), done.err


def test_a_wrong_recipe_is_refused_before_the_queue(moecc, tmp_path):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text("[run]\nsteps = -1\n")
    words = ("launch", "template", "slurm", "--machine", "h100x16", "--", "train")
    done = moecc(*words, recipe, "--out", "run")
    assert done.code == 1, done.err
    assert "run.steps" in done.err
    assert moecc(*words, tmp_path / "of_the_cluster.toml", "--out", "run").code == 0


def test_words_of_any_characters_reach_the_command(loaded):
    odd = "a 'b' \"c\" \U0001f600 é $(HOME) $$ `id` \\ud83d # : - {"
    words = ["train", "r", "--out", odd, "--set", f"{odd}\n{odd}"]
    options = ("--image", "i", "--machine", "h100x16", "--volume", "v", "--")
    (job,) = jobs_of(loaded("jobset", *options, *words)).values()
    command = container_of(job)["command"]
    assert [word.replace("$$", "$") for word in command] == ["moecc", *words]
    for more in ([], ["\t\r\x85\u2028"]):
        task = loaded("skypilot", *options, *words, *more)
        assert shlex.split(task["run"].split("\n", 3)[3]) == ["moecc", *words, *more]


def test_a_task_of_skypilot_runs_the_command(loaded, tmp_path):
    task = loaded("skypilot", "--machine", "a100x16", *CLUSTER, *TRAIN)
    assert task["resources"]["accelerators"] == "A100-80GB:8"
    ran = with_stubs(
        tmp_path, script_of(task), SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
    )  # fmt: skip
    assert ran["moecc"] == arguments(TRAIN[1:])
    assert noted_process(tmp_path) == ProcessInfo("10.0.0.1:8476", 2, 1)


def test_a_conversion_becomes_parts_and_a_join(printed, tmp_path):
    first, parts, join = yaml.safe_load_all(
        printed("skypilot", "--nodes", "8", "--name", "big", *CLUSTER, *CONVERT)
    )
    assert (first, parts["num_nodes"], join["num_nodes"]) == ({"name": "big"}, 8, 1)
    jobs = jobs_of(yaml.safe_load(printed("jobset", "--nodes", "8", *CLUSTER, *CONVERT)))
    assert jobs["parts"]["completions"] == 8
    expected = arguments([*CONVERT[1:], "--part", "3/8", "--threads", "8", "--resume"])
    in_kubernetes = container_of(jobs["parts"])["command"][2].replace("$$", "$")
    for script, variables in (
        (script_of(parts), {"SKYPILOT_NODE_RANK": "2"}),
        (in_kubernetes, {"JOB_COMPLETION_INDEX": "2"}),
        (printed("slurm", "--nodes", "8", *CONVERT),
         {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}),
    ):  # fmt: skip
        assert with_stubs(tmp_path, script, **variables) == {"moecc": expected}, variables
    assert script_of(join).strip() == container_of(jobs["join"])["command"][2]
    assert with_stubs(tmp_path, script_of(join))["moecc"] == arguments(JOIN)


def test_the_first_part_on_slurm_submits_the_join_once(printed, tmp_path):
    script = printed("slurm", "--nodes", "8", "--queue", "cpu", *CONVERT)
    assert "#SBATCH --partition=cpu\n" in script
    first = {
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_PARTITION": "cpu",
        "SLURM_JOB_ACCOUNT": "team a",
    }  # fmt: skip
    assert "sbatch" not in with_stubs(tmp_path, script, **first, SLURM_RESTART_COUNT="1")
    submitted = with_stubs(tmp_path, script, **first)["sbatch"].splitlines()
    assert {"--dependency=afterok:7", "--account=team a"} <= {*submitted}
    assert not any(word.startswith("--qos") for word in submitted)
    wrapped = next(word for word in submitted if word.startswith("--wrap="))
    assert shlex.split(wrapped.removeprefix("--wrap=")) == ["moecc", *JOIN]


@pytest.mark.parametrize(
    ("status", "restarts", "is_requeued"),
    [(143, 99, True), (4, 9, True), (4, 10, False), (137, 0, True), (1, 0, False), (3, 0, False)],
)
@pytest.mark.parametrize(
    ("words", "name"),
    [(("--machine", "h100x16", *TRAIN), "srun"), (("--nodes", "8", *CONVERT), "moecc")],
)
def test_slurm_requeues_what_a_restart_can_mend(
    printed, tmp_path, words, name, status, restarts, is_requeued
):
    ran = with_stubs(
        tmp_path, printed("slurm", *words), fails=name, code=status, SLURM_JOB_ID="7",
        SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT=f"{restarts}",
    )  # fmt: skip
    is_training = name == "srun"
    assert ("scontrol" in ran) == (is_requeued and (is_training or status != 143))
    assert ran.get("scontrol", arguments(["requeue", "7"])) == arguments(["requeue", "7"])


def test_xpk_gets_the_type_that_clouds_call_a_slice(printed, tmp_path):
    script = printed(
        "xpk", "--machine", "tpu:v5p:4x4x4:2", "--cluster", "c", "--image", "i", *STORED
    )
    ran = with_stubs(tmp_path, script)["xpk"].splitlines()
    assert {"--cluster=c", "--tpu-type=v5p-128", "--num-slices=2", "--max-restarts=10"} <= {*ran}
    # By itself xpk starts nothing again that ended below 127, and a watchdog ends with 4.
    assert "--restart-on-exit-codes=4" in ran
    command = next(word for word in ran if word.startswith("--command="))
    assert shlex.split(command.removeprefix("--command="))[2:] == ["moecc", *STORED[1:]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("slumr -- train r --out o", "did you mean 'slurm'?"),
        ("jobset --machine h100x16 -- train r --out o", "needs --image"),
        ("jobset --image i -- train r --out /o", "--machine, for example h100x16"),
        ("slurm -- train r --out o", "--machine, for example h100x16"),
        ("jobset --nodes 2 --image i -- convert a b", "needs --volume"),
        ("slurm -- convert a b", "their number: --nodes"),
        ("slurm --nodes 2 -- convert s3://b/a -p x --force gs://b/c", "not written to a store"),
        ("slurm --nodes 2 -- convert a b.gguf --to gguf:llama", "written by one process"),
        ("slurm --nodes 2 -- convert --to=gguf:llama a b", "written by one process"),
        ("xpk --machine v5p-128 -- train r --out o", "needs --cluster"),
        (
            "xpk --machine h100x16 --cluster c --image i -- train r --out gs://b/o",
            "a machine of tpu",
        ),
        (
            "xpk --machine v5p-8 --cluster c --image i --volume v -- train r --out o",
            "would be lost",
        ),
        ("jobset --machine h100x8 --image i -- train r --out o", "or --volume"),
        ("skypilot --machine h100x8 --image i -- train --resume o", "lost with its container"),
        ("xpk --nodes 2 --cluster c --image i -- convert a b", "moecc launch template jobset"),
        ("slurm --machine h100x16 --nodes 3 -- train r --out o", "--nodes 2, or none"),
        ("slurm --machine h100x3x -- train r --out o", "unknown machine"),
        ("slurm --name A_B -- train r --out o", "a DNS label"),
        ("slurm --queue 'a\n#SBATCH -x' -- train r --out=o", "not a name that a template can hold"),
        ("slurm -- convert a b --part 1/3", "the template adds the parts itself"),
        ("slurm --machine v5p-16 -- train r --out o", "a machine of gpu or cpu"),
        (
            "xpk --machine h100x8 --cluster c --image i -- train r --out s3://b/o",
            "example v5p-128,",
        ),
        ("slurm --machine h100x16 -- train r --set run.steps=5", "train RECIPE --out RUN"),
    ],
)
def test_a_template_that_cannot_be_written(moecc, words, told):
    done = moecc("launch", "template", *shlex.split(words))
    assert (done.code, done.out) == (2, "")
    assert told in done.err


def test_the_machine_is_the_one_of_the_plan(moecc, tmp_path):
    plan = tmp_path / "plan.json"
    assert moecc("plan", "preset:smollm2-135m", "--machine", "h100x16", "--save", plan).code == 0
    words = ("launch", "template", "slurm", "--machine", "h100x32", *TRAIN, "--plan", plan)
    code, out, err = moecc(*words)
    assert (code, out, "16 devices, h100x16" in err) == (2, "", True), err


def test_a_machine_of_a_file_is_as_good_as_a_name(loaded, printed, moecc, tmp_path):
    file = tmp_path / "ours.toml"
    file.write_text('like = "gpu:h100:16"\nmemory = "70 GB"\ndevices_per_node = 4\n')
    task = loaded("skypilot", "--machine", file, *CLUSTER, *TRAIN)
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (4, "H100:4")
    file.write_text('like = "tpu:v5p:4x4x4:2"\nmemory = "90 GB"\n')
    (workers,) = jobs_of(loaded("jobset", "--machine", file, *CLUSTER, *TRAIN)).values()
    assert workers["template"]["spec"]["nodeSelector"].keys() >= {
        "cloud.google.com/gke-tpu-topology"
    }
    file.write_text(
        'kind = "gpu"\ndevices = 8\ndevices_per_node = 4\nmemory = "90 GB"\n'
        "memory_bytes_per_second = 1e12\nlink_bytes_per_second = 1e11\n"
        "node_bytes_per_second = 1e11\npeak_flops = { f32 = 1e13 }\n"
    )
    assert "--gpus-per-node=4" in printed("slurm", "--machine", file, *TRAIN)
    done = moecc("launch", "template", "skypilot", "--machine", file, *CLUSTER, *TRAIN)
    assert (done.code, "needs the name of a GPU" in done.err) == (2, True), done.err


def test_faults_of_inputs_are_not_started_again(loaded):
    jobset = loaded("jobset", "--machine", "tpu:v5p:4x4x4:2", *CLUSTER, *TRAIN)
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = jobs_of(jobset)["workers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container_of(job)["name"]
    assert set(rule["onExitCodes"]["values"]) == {
        error.exit_code for error in (InputError, UsageError, CheckError)
    }
    assert any("exclusive-topology" in name for name in jobset["metadata"]["annotations"])


def test_gpus_are_of_the_machine_and_give_the_memory_of_the_plan(loaded, printed):
    machine = ("--machine", "h100x16", *CLUSTER, *TRAIN)
    job = jobs_of(loaded("jobset", *machine))["workers"]
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb"
    }
    variables = {v["name"]: v.get("value") for v in container_of(job)["env"]}
    assert variables["XLA_CLIENT_MEM_FRACTION"] == ".92"
    assert loaded("skypilot", *machine)["envs"]["XLA_CLIENT_MEM_FRACTION"] == ".92"
    assert "\nexport XLA_CLIENT_MEM_FRACTION=.92 " in printed("slurm", *machine)
    assert "MEM_FRACTION" not in printed("slurm", "--machine", "cpu", *TRAIN)


@pytest.mark.parametrize(("share", "fraction"), [(0.5, ".92"), (0.943, ".95"), (0.995, ".98")])
def test_a_template_gives_the_memory_that_the_saved_plan_needs(
    moecc, printed, tmp_path, share, fraction
):
    words = ("preset:smollm2-135m", "--mesh", "fsdp=8", "--remat", "none", "--machine")
    needed = moecc.plan(*words, "gpu:h100:8")["best"]["total_bytes"]
    file, plan = tmp_path / "ours.toml", tmp_path / "plan.json"
    file.write_text(f'like = "gpu:h100:8"\nmemory = "{needed / share / 1e9:.6f} GB"\n')
    done = moecc("plan", *words, file, "--save", plan)
    assert (f"needs XLA_CLIENT_MEM_FRACTION=0{fraction}" in done.out) == (share > 0.92), done.err
    assert ("and more, which may not fit" in done.out) == (share > 0.98)
    assert f"XLA_CLIENT_MEM_FRACTION={fraction} " in printed("slurm", *TRAIN, "--plan", plan)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("slurm", "--machine", "h100x8", *CLUSTER, *TRAIN), ("use --image", "use --volume")),
        (("skypilot", "--machine", "h100x8", *CLUSTER, *TRAIN), ("use --queue",)),
        (("slurm", "--machine", "h100x8", "--nodes", "2", *CONVERT), ("not use --machine",)),
        (("jobset", "--machine", "h100x8", *CLUSTER, *TRAIN, "--load", __file__),
         ("the volume data, below /work: " + __file__, "GKE's label")),
    ],
)  # fmt: skip
def test_what_a_template_leaves_to_its_user_is_said(moecc, words, told):
    done = moecc("launch", "template", *words)
    assert done.code == 0
    for text in told:
        assert text in done.err


JUDGES = {
    "MOECC_KUBERNETES_PYTHON": """
import json, sys, kubernetes_validate
for job in json.load(sys.stdin):
    kubernetes_validate.validate(job, "1.31", strict=True)
""",
    "MOECC_SKYPILOT_PYTHON": """
import json, sys
from sky.utils import dag_utils
for text in json.load(sys.stdin):
    dag = dag_utils.load_chain_dag_from_yaml_str(text)
    assert all(task.run for task in dag.tasks) and dag.name
""",
    "MOECC_XPK_PYTHON": """
import json, sys
from xpk.parser.core import set_parser
import argparse
for words in json.load(sys.stdin):
    parser = argparse.ArgumentParser()
    set_parser(parser)
    assert parser.parse_args(words).tpu_type
""",
}
"""The programs by which schedulers judge, by the variable that names an interpreter."""


@pytest.mark.parametrize("variable", JUDGES)
def test_the_parser_of_the_scheduler_accepts_it(printed, tmp_path, variable):
    interpreter = os.environ.get(variable)
    if not interpreter:
        pytest.skip(f"{variable} names no interpreter with the scheduler's package")
    subjects = []
    machine = ("--machine", "h100x16")
    if "KUBERNETES" in variable:
        for words in ((*machine, *CLUSTER, *TRAIN), ("--nodes", "8", *CLUSTER, *CONVERT),
                      ("--machine", "v5e-16", "--image", "i", *STORED)):  # fmt: skip
            jobs = jobs_of(yaml.safe_load(printed("jobset", *words)))
            subjects += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
                          "spec": spec} for name, spec in jobs.items()]  # fmt: skip
    elif "SKYPILOT" in variable:
        subjects.append(printed("skypilot", *machine, *CLUSTER, *TRAIN))
        subjects.append(printed("skypilot", "--nodes", "8", *CLUSTER, *CONVERT))
    else:
        words = ("--machine", "v5p-128", "--cluster", "c", "--image", "i", *STORED)
        subjects.append(with_stubs(tmp_path, printed("xpk", *words))["xpk"].splitlines())
    subprocess.run(
        [interpreter, "-c", JUDGES[variable]], input=json.dumps(subjects), text=True, check=True
    )
