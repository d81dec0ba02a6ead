"""Collectives beside products: read from the order of a schedule, in short programs."""

import pytest
from moecc_backends.xla.census import census

BYTES = 8 * 4 * 4

DOT = "%d = f32[8,8] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
KERNEL = '%d = f32[8,8] custom-call(%p), custom_call_target="tpu_custom_call"'
QUICK = "%d = f32[4,4] fusion(%p), kind=kLoop, calls=%quick"
START = "%s = (f32[4,4], f32[8,4]) all-gather-start(%p), dimensions={0}, replica_groups={{0,1}}"
DONE = "%g = f32[8,4] all-gather-done(%s)"
PLAIN = "%g = f32[8,4] all-gather(%p), dimensions={0}, replica_groups={{0,1}}"

CALLED = """%quick (q: f32[4,4]) -> f32[4,4] {
  %q = f32[4,4] parameter(0)
  ROOT %e = f32[4,4] exponential(%q)
}

%multiplies (m: f32[4,4]) -> f32[8,8] {
  %m = f32[4,4] parameter(0)
  ROOT %d.1 = f32[8,8] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%part (x: f32[4,4]) -> f32[8,4] {
  %x = f32[4,4] parameter(0)
  ROOT %g.1 = f32[8,4] all-gather(%x), dimensions={0}, channel_id=3, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}

%step (y: f32[4,4]) -> f32[8,4] {
  %y = f32[4,4] parameter(0)
  %d.2 = f32[8,8] dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %g.2 = f32[8,4] all-gather(%y), dimensions={0}, channel_id=3, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}

%scattered (z: f32[4,4]) -> f32[8,4] {
  %z = f32[4,4] parameter(0)
  ROOT %g.3 = f32[8,4] all-gather(%z), dimensions={0}, replica_groups={{0,1}}
}
"""  # noqa: E501

BEGIN = "%b = f32[8,4] fusion(%p), kind=kCustom, calls=%part"
MIDDLE = "%c = f32[8,4] fusion(%p), kind=kOutput, calls=%step"
END = "%f = f32[8,4] fusion(%p), kind=kCustom, calls=%part"
ASYNC = "%s = ((f32[4,4]), f32[8,4]) async-start(%p), calls=%scattered"
UPDATE = "%u = ((f32[4,4]), f32[8,4]) async-update(%s)"
SPARSE = "%s = (f32[4,4], f32[8,4]) call-start(%p), to_apply=%scattered"
FUSED = "%d = f32[8,8] fusion(%p), kind=kOutput, calls=%multiplies"


def program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m, is_scheduled=true, num_partitions=2\n\n{CALLED}\n"
        "ENTRY %main (p: f32[4,4]) -> f32[4,4] {\n  %p = f32[4,4] parameter(0)\n"
        f"{body}\n  ROOT %out = f32[4,4] copy(%p)\n}}\n"
    )


OVERLAPPED = {
    "a product": (START, DOT, DONE),
    "a fused product": (START, FUSED, DONE),
    "a kernel": (START, KERNEL, DONE),
    "the last step waits": (ASYNC, UPDATE, DOT, "%g = f32[8,4] async-done(%u)"),
    "the first step goes on": (ASYNC, DOT, UPDATE, "%g = f32[8,4] async-done(%u)"),
    "on another core": (SPARSE, DOT, "%g = f32[8,4] call-done(%s)"),
    "another turn waits": (START, DOT),
    "steps of a product": (BEGIN, MIDDLE, END),
    "a product between steps": (BEGIN, DOT, END),
}
EXPOSED = {
    "one instruction": (DOT, PLAIN),
    "nothing between": (START, DONE),
    "what is soon done": (START, QUICK, DONE),
    "before and behind": (DOT, START, DONE, FUSED.replace("%d ", "%d.9 ")),
    "steps alone": (DOT, BEGIN, END, FUSED.replace("%d ", "%d.9 ")),
    "another core, waited for": (DOT, SPARSE, "%g = f32[8,4] call-done(%s)"),
}


def gathered(overlapped, exposed):
    return {"all-gather": {"overlapped_bytes": overlapped, "exposed_bytes": exposed}}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_a_collective_beside_a_product_is_overlapped(name):
    assert census(program(*OVERLAPPED[name])).overlap() == gathered(BYTES, 0)


@pytest.mark.parametrize("name", EXPOSED)
def test_a_collective_beside_no_product_is_exposed(name):
    assert census(program(*EXPOSED[name])).overlap() == gathered(0, BYTES)


def test_loops_count_as_often_as_they_run_and_each_collective_by_itself():
    loop = f"""%body (t: (f32[4,4])) -> (f32[4,4]) {{
  %t = (f32[4,4]) parameter(0)
  %p = f32[4,4] get-tuple-element(%t), index=0
  {BEGIN}
  {END}
  {START}
  {DOT}
  {DONE}
  ROOT %r = (f32[4,4]) tuple(%p)
}}

%never (n: (f32[4,4])) -> pred[] {{
  %n = (f32[4,4]) parameter(0)
  ROOT %c.1 = pred[] constant(false)
}}
"""
    text = program(
        "%first = (f32[4,4]) tuple(%p)",
        "%w = (f32[4,4]) while(%first), condition=%never, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}',
        PLAIN,
    ).replace(CALLED, CALLED + "\n" + loop)
    found = census(text)
    assert found.overlap() == gathered(3 * BYTES, 4 * BYTES)
    assert found.by_kind()["all-gather"]["bytes"] == 7 * BYTES
