"""What an attack on an early version found, point by point, and the tests that hold it now.

The names of tests are ``FILE::FUNCTION``, below ``tests/``.
"""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """A defect: what happened, and the tests that fail where it happens again."""

    was: str
    tests: tuple[str, ...]


POINTS: dict[int, Point] = {
    0: Point(
        "a peer that never comes ended a process in C++, with SIGABRT",
        ("launch/test_rendezvous.py::test_a_run_ends_with_a_message_when_the_other_never_comes",),
    ),
    1: Point(
        "a source with the folder additional_chat_templates could not be converted",
        ("cli/test_hostile.py::test_additional_chat_templates_are_copied_and_recorded",),
    ),
    2: Point(
        "hostile JSON, in configs and headers, was exit code 70",
        (
            "cli/test_hostile.py::test_hostile_json_is_refused",
            "cli/test_hostile.py::test_hostile_headers_are_refused",
        ),
    ),
    3: Point(
        "a hostile tokenizer ended the process or was a traceback",
        ("cli/test_generate.py::test_hostile_tokenizers_are_refused",),
    ),
    4: Point(
        "arguments, or an encoding of the output, that are not UTF-8 were a traceback",
        (
            "cli/test_hostile.py::test_arguments_that_are_not_utf8_are_refused",
            "cli/test_hostile.py::test_artefacts_are_utf8_in_every_locale",
        ),
    ),
    5: Point(
        "a source that changed while it was read was not noticed",
        ("cli/test_trust_source.py::test_05_a_change_after_the_last_weight_was_read_is_noticed",),
    ),
    6: Point(
        "signals left folders that nothing removed or named",
        (
            "cli/test_trust_output.py::test_06_a_signal_leaves_nothing",
            "cli/test_trust_output.py::test_06_what_a_kill_leaves_is_named_and_removed_by_force",
            "cli/test_trust_output.py::test_06_an_old_output_between_two_renames_is_named_and_kept_until_the_end",
        ),
    ),
    7: Point(
        "files and folders were not synchronised in order",
        (
            "cli/test_trust_output.py::test_07_every_file_is_synchronised_before_the_rename_and_the_folder_after",
        ),
    ),
    8: Point(
        "all shards of an output stayed open",
        ("cli/test_trust_output.py::test_08_many_shards_need_few_open_files",),
    ),
    9: Point(
        "escape sequences of a graph or a name reached the terminal",
        (
            "cli/test_defects_text.py::test_09_a_graph_brings_no_escape_sequence_to_the_terminal",
            "cli/test_defects_text.py::test_09_a_file_name_brings_no_escape_sequence_to_the_terminal",
            "cli/test_defects_text.py::test_09_reports_and_usage_errors_show_escape_sequences",
        ),
    ),
    10: Point(
        "a pass that crashed left no reproducer, or one that did not replay",
        (
            "cli/test_defects_text.py::test_10_a_crash_of_an_own_pass_names_its_line_and_can_be_replayed",
            "cli/test_defects_text.py::test_10_a_crash_of_a_pass_of_moecc_is_a_bug_with_a_reproducer",
        ),
    ),
    11: Point(
        "a licence with an unprintable name was converted and then failed verify",
        ("cli/test_hostile.py::test_what_a_manifest_cannot_name_is_refused",),
    ),
    12: Point(
        "temperatures, seeds, logits, sizes, locations and signals of users were exit code 70",
        (
            "cli/test_generate.py::test_draws_that_cannot_be_are_refused",
            "cli/test_generate.py::test_a_temperature_next_to_0_is_that_of_the_likeliest",
            "cli/test_generate.py::test_logits_that_are_nan_are_refused",
            "cli/test_defects_files.py::test_12_a_size_of_400_digits_is_an_error",
            "cli/test_defects_files.py::test_12_a_location_of_5000_digits_is_an_error",
            "launch/test_supervisor.py::test_a_signal_without_a_name_is_told_by_its_number",
        ),
    ),
    13: Point(
        "launched programs and compilers survived their parents, and copies ran that never joined",
        (
            "cli/test_defects_processes.py::test_13_a_launched_program_ends_with_its_supervisor",
            "cli/test_defects_processes.py::test_13_copies_that_never_join_are_reported",
            "cli/test_defects_processes.py::test_13_the_compiling_process_ends_with_its_parent",
        ),
    ),
    14: Point(
        "verify ignored added files and edited cards",
        (
            "cli/test_defects_files.py::test_14_every_added_file_is_found",
            "cli/test_defects_files.py::test_14_every_removed_file_is_found",
            "cli/test_defects_files.py::test_14_an_edited_card_is_found_unless_it_is_allowed",
        ),
    ),
    15: Point(
        "the number of experts had no bound",
        ("st_moe/test_st_moe.py::test_what_contradicts_itself_is_refused_before_anything_runs",),
    ),
    16: Point(
        "an infinity and noise made a matrix of NaN, which was not recorded",
        ("cli/test_defects_files.py::test_16_noise_that_one_infinity_turns_to_nan_is_recorded",),
    ),
    17: Point(
        "logits that were all zero agreed, and NaN generated token 0",
        (
            "cli/test_defects_files.py::test_17_logits_that_are_all_zero_are_no_agreement",
            "cli/test_generate.py::test_logits_that_are_nan_are_refused",
        ),
    ),
    18: Point(
        "files of passes ended moecc, files of rules had no bound, weight expressions were dropped",
        (
            "pipeline/test_registry.py::test_faulty_files_are_blamed_with_their_line",
            "plan/test_rules.py::test_files_of_rules_are_bounded",
            "cli/test_defects_files.py::test_18_a_stored_graph_with_weight_expressions_is_not_read_without_them",
        ),
    ),
    19: Point(
        "token ids out of range, 8-bit weights without scales and other frameworks passed unnamed",
        (
            "cli/test_defects_files.py::test_19_token_ids_out_of_range_are_reported",
            "cli/test_defects_files.py::test_19_eight_bit_weights_without_scales_are_reported",
            "cli/test_defects_files.py::test_19_checkpoints_of_other_frameworks_are_named",
        ),
    ),
    20: Point(
        "relative names of checkpoints were taken from the working folder, unsaid",
        (
            "cli/test_defects_files.py::test_20_relative_names_are_taken_from_the_folder_of_the_file",
        ),
    ),
    21: Point(
        "a libtpu that does not fit jaxlib crashed the compiler",
        ("cli/test_defects_processes.py::test_21_a_libtpu_that_does_not_fit_jax_is_named",),
    ),
    22: Point(
        "inspect took minutes for 10,000 layers",
        (
            "cli/test_defects_meaning.py::test_22_to_inspect_is_to_make_no_text_of_the_graph",
            "cli/test_defects_meaning.py::test_22_the_time_of_inspect_grows_as_the_layers_do",
        ),
    ),
    23: Point(
        "losses and gradients of padding alone were NaN, and empty groups diluted the mean",
        (
            "st_moe/test_losses.py::test_a_unit_of_nothing_but_padding_counts_nowhere",
            "st_moe/test_losses.py::test_losses_of_nothing_but_padding_are_zero",
        ),
    ),
    24: Point(
        "the predicted error left out the scale of the norm",
        ("cli/test_trust.py::test_the_predicted_error_reads_the_scale_of_norms",),
    ),
    25: Point(
        "a sequence that the mesh does not divide was an error of jax",
        (
            "cli/test_defects_processes.py::test_25_a_sequence_that_the_mesh_does_not_divide_is_reported",
        ),
    ),
    26: Point(
        "the docs called a line the same as st-moe that was another",
        ("cli/test_defects_meaning.py::test_26_the_line_that_is_the_same_as_st_moe_is_the_same",),
    ),
    27: Point(
        "the balance loss of a graph typed f64, run in bf16, was off",
        (
            "cli/test_defects_meaning.py::test_27_the_balance_loss_of_a_bf16_run_does_not_depend_on_the_types_of_the_graph",
        ),
    ),
    28: Point(
        "upcycle{top-k=1} has a router without a gradient, unsaid",
        ("cli/test_defects_meaning.py::test_28_one_expert_a_token_is_warned_of",),
    ),
    29: Point(
        "the router of the paper, in bf16, could not be had",
        (
            "cli/test_defects_meaning.py::test_29_a_router_in_the_type_of_the_run_can_be_had",
            "cli/test_defects_meaning.py::test_29_a_router_has_the_type_of_the_run_or_float32",
        ),
    ),
}
"""The points by their numbers."""
