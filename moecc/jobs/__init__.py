"""The commands: `moecc.jobs.NAME` has the typed function of ``moecc NAME``.

The command line, ``docs/cli.md`` and the Python API are derived from its signature and docstring.
"""

import keyword

COMMANDS = {
    "inspect": "Describe a model from its headers; no weights are read.",
    "import": "Print the graph of a model; no weights are read.",
    "opt": "Run a pipeline over a graph, verified after every pass.",
    "reduce": "Make a graph and a pipeline small while they fail.",
    "bisect": "Find the first pass of a pipeline that is wrong.",
    "replay": "Repeat a failure from its reproducer.",
    "convert": "Convert a model and write it to a folder or .gguf.",
    "push": "Upload a converted folder, with card and receipt.",
    "clean": "Remove what killed conversions left beside outputs.",
    "prove": "Prove that two models are the same function.",
    "verify": "Check the files of a model, or its logits.",
    "run": "Run a model and write its logits or hidden states.",
    "emit": "Write a model as a program, or for MaxText.",
    "lower": "Print a model as jax or XLA sees it.",
    "generate": "Continue texts with a model.",
    "plan": "Predict memory, time and traffic, and find a mesh.",
    "compile": "Compile a step for a machine that is not attached.",
    "tokens": "Write the token ids of texts to a folder.",
    "train": "Train the model of a recipe, or resume a run.",
    "evaluate": "Evaluate models on token folders, in pairs.",
    "report": "Write a page that compares runs.",
    "specialise": "Show which tokens tell each expert from others.",
    "capture": "Take statistics of a model's values over texts.",
    "launch": "Run a command in several processes.",
    "forecast": "Forecast whether upcycling a dense model is worth it.",
    "lint": "Show what the design guide advises against.",
    "passes": "List the passes, or show one.",
}
"""The commands in the order of ``moecc --help``, with the lines that it prints; it imports none."""


def python_name(command: str) -> str:
    """Return the name of a command's module and function, which ends in ``_`` for a keyword."""
    return f"{command}_" if keyword.iskeyword(command) else command
