"""Faults that other tests show, and those that moecc cannot have."""

# ruff: noqa: E501

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def is_a_test(name: str) -> bool:
    """Whether ``FILE::FUNCTION`` is a test of the repository."""
    file, _, function = name.partition("::")
    text = (ROOT / file).read_text("utf-8")
    return re.search(rf"^def {function}\(", text, re.MULTILINE) is not None


ELSEWHERE = {
    43: "tests/families/test_graphs.py::test_the_imported_graph_gives_the_golden_logits",
    50: "tests/train/test_state.py::test_what_is_stored_of_a_rolled_program_restores_it",
    53: "tests/kill/test_kills.py::test_every_point",
    54: "tests/cli/test_trust_output.py::test_06_a_signal_leaves_nothing",
    60: "tests/cli/test_resume.py::test_another_conversion_is_not_continued",
    61: "tests/cli/test_resume.py::test_what_was_tampered_with_is_written_again",
    62: "tests/cli/test_hostile.py::test_artefacts_are_utf8_in_every_locale",
    65: "tests/cli/test_commands.py::test_a_closed_pipe_is_quiet",
    67: "tests/cli/test_defects_processes.py::test_21_a_libtpu_that_does_not_fit_jax_is_named",
    69: "tests/launch/test_processes.py::test_killing_one_ends_the_others_within_five_seconds",
    70: "tests/launch/test_processes.py::test_one_that_stops_is_told_and_ends_all",
    71: "tests/launch/test_rendezvous.py::test_a_run_ends_with_a_message_when_the_other_never_comes",
    72: "tests/launch/test_processes.py::test_a_process_with_another_configuration_is_named",
    74: "tests/xla/train/test_step.py::test_a_spike_and_what_is_not_finite_change_nothing_but_counters",
    75: "tests/xla/train/test_micro_batches.py::test_parts_and_meshes_change_no_loss_and_no_gradient",
    76: "tests/train/test_train_command.py::test_a_resumed_run_is_the_run_that_was_not_killed",
    78: "tests/sharding/test_expert_parallel.py::test_devices_compute_what_one_does",
    79: "tests/parity/test_upcycled.py::test_every_source_as_every_target_that_fits",
    80: "tests/families/test_graphs.py::test_fused_experts_are_the_same_model",
    81: "tests/families/test_export.py::test_what_exports_reads_back_and_computes_the_same",
    83: "tests/faults/test_flips.py::test_flipped_bits_are_found",
}
"""Faults that take processes, a training or another library, and the tests that show them."""

NOT_OURS = {
    73: "runs are saved by one process into one folder; a store without a shared disk is Orbax's",
    77: "moecc speaks to no tracker: metrics are lines of a file that others may read",
    82: "moecc writes no HTML; what it writes of hostile names is Markdown (tests/checkpoint)",
}
"""Faults that moecc cannot have, and why."""
