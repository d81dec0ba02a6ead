"""``python -m tests.proof.schedulers``: read printed templates by the parsers of their schedulers.

    MOECC_KUBERNETES_PYTHON=… MOECC_SKYPILOT_PYTHON=… MOECC_XPK_PYTHON=… MOECC_JOBSET_CRD=… \\
        python -m tests.proof.schedulers [--out FILE]

The variables name interpreters that have kubernetes-validate with jsonschema, skypilot and xpk, and
JobSet's ``jobset.x-k8s.io_jobsets.yaml``. What is not named is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from moecc.cli.main import main as moecc
from moecc.version import __version__

JOB = ("--name", "pod", "--image", "registry/moecc:1")
TRAIN = ("--", "train", "recipe:upcycle", "--out", "s3://bucket/run")
CONVERT = ("--", "convert", "source", "out dir", "-p", "upcycle{experts=8 top-k=2}")
KUBERNETES = ("--queue", "team", "--volume", "data")
TEMPLATES = {
    "jobset, GPUs": ("jobset", *JOB, *KUBERNETES, "--machine", "h100x16", *TRAIN),
    "jobset, TPUs": ("jobset", *JOB, *KUBERNETES, "--machine", "tpu:v5p:4x4x4", *TRAIN),
    "jobset, parts": ("jobset", *JOB, *KUBERNETES, "--nodes", "4", *CONVERT),
    "skypilot, GPUs": ("skypilot", *JOB, "--machine", "h100x16", *TRAIN),
    "skypilot, parts": ("skypilot", *JOB, "--volume", "data", "--nodes", "4", *CONVERT),
    "xpk, TPUs": ("xpk", *JOB, "--cluster", "c", "--machine", "tpu:v5p:4x4x4", *TRAIN),
}

_JOBS = """
import kubernetes_validate, sys, yaml
from importlib.metadata import version
newest = kubernetes_validate.latest_version()
for part in yaml.safe_load(sys.stdin)["spec"]["replicatedJobs"]:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    kubernetes_validate.validate({**job, **part["template"]}, newest, strict=True)
print("Kubernetes", newest)
"""
# Kubernetes itself drops unknown fields; here they are errors.
_JOBSET = """
import jsonschema, os, sys, yaml
crd = yaml.safe_load(open(os.environ["MOECC_JOBSET_CRD"]))
(version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"]
schema = version["schema"]["openAPIV3Schema"]
def close(node):
    if isinstance(node, dict):
        if node.get("x-kubernetes-int-or-string"):
            node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if node.get("properties") and "additionalProperties" not in node:
            node["additionalProperties"] = False
    for inner in node.values() if isinstance(node, dict) else node:
        if isinstance(inner, dict | list):
            close(inner)
close(schema)
schema["properties"]["metadata"] = {"type": "object"}
jsonschema.Draft7Validator(schema).validate(yaml.safe_load(sys.stdin))
print("JobSet", crd["metadata"].get("labels", {}).get("version", "v1alpha2"))
"""
_SKYPILOT = """
import sky, sys
from sky.utils.dag_utils import load_chain_dag_from_yaml_str
assert load_chain_dag_from_yaml_str(sys.stdin.read()).tasks
print("SkyPilot", sky.__version__)
"""
_XPK = """
import argparse, shlex, sys
from importlib.metadata import version
from xpk.parser.core import set_parser
text = sys.stdin.read()
command = text[text.index("xpk workload"):].replace("\\\\\\n", " ")
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser)
parser.parse_args(shlex.split(command)[1:])
print("xpk", version("xpk"))
"""
READERS = (
    ("jobset", "MOECC_KUBERNETES_PYTHON", (), _JOBS),
    ("jobset", "MOECC_KUBERNETES_PYTHON", ("MOECC_JOBSET_CRD",), _JOBSET),
    ("skypilot", "MOECC_SKYPILOT_PYTHON", (), _SKYPILOT),
    ("xpk", "MOECC_XPK_PYTHON", (), _XPK),
)


def main() -> int:
    """Read all templates, print who read each, and return 1 if one was rejected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file of JSON to write")
    options = parser.parse_args()
    accepted = {}
    rejected = {}
    for name, words in TEMPLATES.items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert moecc(["launch", "template", *words]) == 0
        accepted[name] = []
        for kind, python, files, code in READERS:
            if name.partition(",")[0] != kind or not all(map(os.environ.get, (python, *files))):
                continue
            done = subprocess.run(
                [os.environ[python], "-c", code], input=text.getvalue(), text=True,
                capture_output=True,
            )  # fmt: skip
            if done.returncode:
                rejected[name] = done.stderr[-2000:]
            else:
                accepted[name].append(done.stdout.strip().splitlines()[-1])
    report = {
        "date": datetime.now(UTC).date().isoformat(), "moecc": __version__,
        "accepted_by": accepted, "rejected": rejected,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if rejected or not all(accepted.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
