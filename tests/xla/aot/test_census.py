"""Reading HLO: types, loops, collectives and products, from texts and from compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from moecc_backends.xla.census import HloShape, census, parse_hlo

ONCE = {"count": 1, "runs": 1, "bytes": 512}


def program(body, *, more=""):
    entry = f"ENTRY %main (p: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"
    return f"HloModule m, num_partitions=8\n\n{more}\n{entry}"


def loop(condition, start="%c0 = s32[] constant(0)"):
    more = f"""%body (b: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {{
  %b = (s32[]{{:T(128)}}, f32[8,4]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %x = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %r = f32[8,4] all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,4], s32[]) tuple(%next, %r, %n)
}}

%condition (c: (s32[], f32[8,4], s32[])) -> pred[] {{
  %c = (s32[], f32[8,4], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
{condition}
}}
"""
    body = f"""  %p = f32[8,4] parameter(0)
  {start}
  %limit = s32[] constant(9)
  %first = (s32[], f32[8,4], s32[]) tuple(%c0, %p, %limit)
  %w = (s32[], f32[8,4], s32[]) while(%first), condition=%condition, body=%body
  ROOT %out = f32[8,4] get-tuple-element(%w), index=1"""
    return program(body, more=more)


CONSTANT = "  %k = s32[] constant(5)\n  ROOT %lt = pred[] compare(%i.1, %k), direction=LT"
CARRIED = CONSTANT.replace("constant(5)", "get-tuple-element(%c), index=2")
INCLUSIVE = CONSTANT.replace("LT", "LE")

UNROLLED = (
    "%next = s32[] add(%i, %one)",
    "%next.1 = s32[] add(%i, %one)\n  %next = s32[] add(%next.1, %one)",
)
"""A counter that a turn advances by two, as XLA leaves it when it has unrolled a loop."""


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (loop(CONSTANT), 5),
        (loop(CONSTANT).replace(*UNROLLED), 3),
        (loop(CARRIED).replace("%one = s32[] constant(1)", "%one = s32[] constant(3)"), 3),
        (loop(CONSTANT, "%c0 = s32[] constant(2)"), 3),
        (loop(CONSTANT, "%c0 = s32[] constant(7)"), 0),
        (loop(CARRIED), 9),
        (loop(INCLUSIVE), 6),
    ],
)
def test_a_loop_runs_as_often_as_its_condition_says(text, times):
    found = census(text)
    assert found.unknown_loops == 0
    assert [c.times for c in found.collectives] == [times]
    assert found.by_kind()["all-reduce"] == {"count": 1, "runs": times, "bytes": 128 * times}


def test_what_xla_has_noted_of_a_loop_comes_first():
    noted = ', backend_config={"known_trip_count":{"n":"12"}}'
    text = loop(CONSTANT).replace("body=%body", f"body=%body{noted}")
    assert census(text).by_kind()["all-reduce"]["runs"] == 12


def test_rounds_of_an_exchange_count_once_and_at_most_as_often_as_their_name_says():
    start = "%q = s32[8] iota(), iota_dimension=0\n  %c0 = s32[] reduce(%q, %q), to_apply=%add"
    name = 'body=%body, metadata={op_name="jit(step)/while/body/rounds_at_most_4/while"}'
    found = census(loop(CONSTANT, start).replace("body=%body", name))
    assert found.unknown_loops == 0
    assert found.by_kind()["all-reduce"] == {
        "count": 1, "runs": 1, "bytes": 128, "worst_bytes": 4 * 128
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "group"),
    [
        ("all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("all-to-all(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}", 2),
        ("all-to-all(%p), replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("all-reduce(%p), to_apply=%add", 8),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,0}}", 2),
    ],
)  # fmt: skip
def test_the_full_tensor_and_the_group_of_a_collective(line, group):
    kind = line.partition("(")[0]
    sizes = {"all-gather": ("8,4", "32,4"), "reduce-scatter": ("32,4", "8,4")}
    given, made = sizes.get(kind, ("32,4", "32,4"))
    body = f"  %p = f32[{given}]{{1,0}} parameter(0)\n  ROOT %r = f32[{made}]{{1,0}} {line}"
    (found,) = census(program(body)).collectives
    assert (found.kind, found.size_bytes, found.group_size) == (kind, 512, group)


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        ("(f32[8,4], f32[32,4]) all-gather-start", "all-gather"),
        ("((f32[32,4]), f32[32,4]) all-to-all-start", "all-to-all"),
        ("(f32[32,4], f32[32,4], u32[], u32[]) collective-permute-start", "collective-permute"),
        ("f32[32,4] all-reduce-start", "all-reduce"),
    ],
)
def test_a_start_is_counted_and_its_end_is_not(types, kind):
    given = "8,4" if kind == "all-gather" else "32,4"
    body = (
        f"  %p = f32[{given}] parameter(0)\n  %s = {types}(%p), replica_groups=[2,4]<=[8]\n"
        f"  ROOT %d = f32[32,4] {kind}-done(%s)"
    )
    assert census(program(body)).by_kind() == {kind: ONCE}


def test_a_fusion_that_keeps_a_slice_of_a_sum_is_a_reduce_scatter():
    more = """%all-reduce-scatter.1 (i: f32[32,4]) -> f32[8,4] {
  %i = f32[32,4] parameter(0)
  %s = f32[32,4] all-reduce(%i), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %d = f32[8,4] slice(%s), slice={[0:8], [0:4]}
}
"""
    fusion = "fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    body = f"  %p = f32[32,4] parameter(0)\n  ROOT %r = f32[8,4] {fusion}"
    assert census(program(body, more=more)).by_kind() == {"reduce-scatter": ONCE}


def test_a_collective_that_is_written_in_parts_counts_once():
    """A TPU begins a gather in one fusion and ends it in another; each has all of it."""

    def part(name, chain, channel):
        gather = (
            f"all-gather(%i), channel_id={channel}, replica_groups=[2,4]<=[8], dimensions={{0}}"
        )
        return f"""%{name} (i: f32[8,4]) -> f32[32,4] {{
  %i = f32[8,4] parameter(0)
  ROOT %g = f32[32,4] {gather}, frontend_attributes={{chain_id="{chain}"}}
}}

"""

    more = part("begin", 0, 7) + part("end", 0, 7) + part("other", 1, 8)
    calls = "\n".join(
        f"  %{name}.1 = f32[32,4] fusion(%p), kind=kCustom, calls=%{name}"
        for name in ("begin", "end", "other")
    )
    body = f"  %p = f32[8,4] parameter(0)\n{calls}\n  ROOT %r = f32[8,4] slice(%end.1)"
    assert census(program(body, more=more)).by_kind() == {
        "all-gather": {"count": 2, "runs": 2, "bytes": 1024}
    }


def test_of_a_branch_the_heavier_arm_counts():
    arm = """%{name} (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4] parameter(0)
  ROOT %d = f32[8,{n}] dot(%a, %a), lhs_contracting_dims={{{axis}}}, rhs_contracting_dims={{0}}
}}
"""
    arms = arm.format(name="light", n=4, axis=1) + arm.format(name="heavy", n=4, axis=0)
    body = (
        "  %p = f32[8,4] parameter(0)\n  %i = s32[] constant(0)\n"
        "  ROOT %r = f32[8,4] conditional(%i, %p, %p), branch_computations={%light, %heavy}"
    )
    assert census(program(body, more=arms)).flops == 2 * 8 * 4 * 8


@pytest.mark.parametrize(
    ("kernel", "products"),
    [("splash_mha_fwd_residuals", 2), ("splash_mha_dq_residuals", 3), ("splash_mha_dkv_x", 4)],
)
def test_a_kernel_whose_scope_says_its_scores_is_counted(kernel, products):
    # XLA writes what a kernel says of itself over several lines.
    body = (
        "  %p = f32[8,4] parameter(0)\n"
        "  %hidden = s8[1,3,3] constant({...})\n"
        "  %q = bf16[2,9,384,64] broadcast(%p)\n"
        "  %k = bf16[2,3,384,64] broadcast(%p)\n"
        "  ROOT %r = f32[8,4] custom-call(%hidden, %q, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 128}"\n'
        f'}}}}, metadata={{op_name="jit(f)/score_pairs_98304/{kernel}/pallas_call"}}'
    )
    found = census(program(body))
    assert found.flops == 2 * products * 98304 * 2 * 9 * 64
    assert not found.opaque


def test_types_with_layouts_tuples_and_long_constants():
    body = (
        "  %p = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/(pred[]{:T(512)}, u8[7])) "
        "parameter(0)\n"
        '  %c = s8[4] constant({ 1, 2, 3, 4 }), metadata={op_name="a(b)={c"}\n'
        "  ROOT %g = bf16[2,3] get-tuple-element(%p), index=0"
    )
    module = parse_hlo(program(body))
    instructions = module.computations["main"].instructions
    shapes = HloShape("bf16", (2, 3)), HloShape("pred", ()), HloShape("u8", (7,))
    assert instructions["p"].shapes == shapes
    assert instructions["p"].size_bytes == 12 + 1 + 7
    assert instructions["c"].source == "a(b)={c"
    assert module.partitions == 8


# --- compiled here


def lowered(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


def test_dots_of_a_compiled_loop():
    def run(x, w):
        return lax.scan(lambda h, m: (jnp.tanh(h @ m), None), x, w)[0]

    program = lowered(run, (64, 48), (7, 48, 48)).compile().as_text()
    assert census(program).flops == 7 * 2 * 64 * 48 * 48


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1,), "padding": "VALID"},
        {"window_strides": (2,), "padding": [(3, 1)]},
        {"window_strides": (1,), "padding": [(4, 4)], "lhs_dilation": (3,)},
        {"window_strides": (3,), "padding": [(5, 2)], "lhs_dilation": (2,), "rhs_dilation": (2,)},
        {"window_strides": (1,), "padding": "SAME", "feature_group_count": 2},
        {"window_strides": (1,), "padding": "SAME", "batch_group_count": 2},
    ],
)
def test_a_convolution_multiplies_as_often_as_ones_add_up(options):
    features = 6 // options.get("feature_group_count", 1)
    shapes = (4, 6, 11), (8, features, 5)

    def run(x, w):
        return lax.conv_general_dilated(x, w, **options)

    # Before it is optimised: later a convolution may be spelt as another with the same result.
    text = lowered(run, *shapes).compiler_ir("hlo").as_hlo_text()
    products = float(run(*map(jnp.ones, shapes)).sum())
    assert census(text).flops == 2 * products
