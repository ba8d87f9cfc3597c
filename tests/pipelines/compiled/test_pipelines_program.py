"""Costs read from the text of a program, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pipelines.compiled.chips import CHIPS
from pipelines.compiled.program import Collective, Program

V5E = CHIPS["v5e"]


def compiled(function, *shapes):
    return Program(jax.jit(function).lower(*shapes).compile().as_text())


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_in_loops_count_as_often_as_they_run():
    def function(x, w):
        def body(x, _):
            x, _ = lax.scan(lambda x, _: (x @ w, None), x, length=3)
            return x, None

        return lax.scan(body, x @ w, length=7)[0]

    program = compiled(function, floats(4, 8), floats(8, 8))
    cost = program.cost(V5E)
    assert cost.flops == (1 + 7 * 3) * 2 * 4 * 8 * 8
    assert not cost.unknown


def test_a_loop_of_unknown_length_counts_once_unless_told():
    def function(x, w, n):
        return lax.fori_loop(0, n, lambda _, x: x @ w, x)

    program = compiled(function, floats(4, 8), floats(8, 8), jax.ShapeDtypeStruct((), jnp.int32))
    (loop,) = program.loops()
    assert program.fixed_trips(loop) is None
    assert program.cost(V5E).flops == 512
    assert program.cost(V5E).unknown == {loop.scope}
    assert program.cost(V5E, lambda loop: 2.5).flops == 2.5 * 512
    assert not program.cost(V5E, lambda loop: 2.5).unknown


def products_by_hand(size, kernel, *, stride=1, low=0, high=0, dilation=1, image_dilation=1):
    """Along one axis, by writing zeros and ones: pairs of ones that meet."""
    image = np.zeros((size - 1) * image_dilation + 1, int)
    image[::image_dilation] = 1
    image = np.pad(image, (low, high))
    window = np.zeros((kernel - 1) * dilation + 1, int)
    window[::dilation] = 1
    return sum(
        int(image[start : start + len(window)] @ window) for start in range(0, len(image) - len(window) + 1, stride)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "low": 1, "high": 2},
        {"dilation": 2, "low": 2, "high": 2},
        {"image_dilation": 3, "stride": 2, "low": 1},
    ],
)
def test_convolutions_count_products_that_are_not_with_padding(options):
    names = {"stride": 1, "low": 0, "high": 0, "dilation": 1, "image_dilation": 1} | options

    def function(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (names["stride"], 1),
            [(names["low"], names["high"]), (0, 0)],
            lhs_dilation=(names["image_dilation"], 1),
            rhs_dilation=(names["dilation"], 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    # As it is before the processor's compiler makes products of it.
    text = (
        jax.jit(function).lower(floats(2, 9, 7, 3), floats(3, 2, 3, 5)).compiler_ir("hlo").as_hlo_module().to_string()
    )
    cost = Program(text).cost(V5E)
    along = products_by_hand(9, 3, **options) * products_by_hand(7, 2)
    assert cost.flops == 2 * 2 * 3 * 5 * along


def test_groups_of_channels_and_of_a_batch():
    def groups(x, w):
        return lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=3
        )

    text = jax.jit(groups).lower(floats(2, 6, 12), floats(3, 4, 9)).compiler_ir("hlo").as_hlo_module().to_string()
    assert Program(text).cost(V5E).flops == 2 * 2 * 4 * 3 * 4 * 9


TPU = """HloModule jit_f, is_scheduled=true

%fused_update (param_0: f32[100,32], param_1: f32[1,32], param_2: s32[]) -> f32[100,32] {
  %param_0 = f32[100,32]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[1,32]{1,0:T(8,128)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  ROOT %update = f32[100,32]{1,0:T(8,128)} dynamic-update-slice(%param_0, %param_1, %param_2)
}

%fused_slice (param_0: f32[100,32], param_1: s32[]) -> f32[1,32] {
  %param_0 = f32[100,32]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %slice = f32[1,32]{1,0:T(8,128)S(1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,32}
}

%body (param: (s32[], f32[64])) -> (s32[], f32[64]) {
  %param = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
  %x = f32[64]{0:T(128)} get-tuple-element(%param), index=1
  %all-reduce.1 = f32[64]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  %i = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %tuple = (s32[]{:T(128)}, f32[64]{0:T(128)}) tuple(%i, %all-reduce.1)
}

%condition (param: (s32[], f32[64])) -> pred[] {
  %param = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
  %end = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[100,32], b: f32[1,32], i: s32[]) -> f32[100,32] {
  %a = f32[100,32]{1,0:T(8,128)} parameter(0)
  %b = f32[1,32]{1,0:T(8,128)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %row = f32[1,32]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"70"}
  %copy-start = (f32[100,32]{1,0:T(8,128)S(1)}, f32[100,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[100,32]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %start = (s32[]{:T(128)}, f32[64]{0:T(128)}) tuple(%i, %b)
  %while.1 = (s32[]{:T(128)}, f32[64]{0:T(128)}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %gathered = (f32[8,64]{1,0:T(8,128)}, f32[2,64]{1,0:T(8,128)}) all-gather(%b, %row), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %new = f32[100,32]{1,0:T(8,128)} fusion(%a, %b, %i), kind=kLoop, calls=%fused_update, backend_config={"estimated_cycles":"30"}
}
"""  # noqa: E501


@pytest.mark.quick
def test_bytes_cycles_and_collectives_of_a_program_of_a_tpu():
    cost = Program(TPU).cost(V5E)
    # 32 numbers take a row of 128, a single row takes 8; a slice reads a row of them, an update in its place writes
    # one, and the copy to on-chip memory (100 rows take 104) reads all.
    tile, table = 8 * 128 * 4, 104 * 128 * 4
    compared = 6 * (4 + 4 + 1)  # by the condition of the loop, once more than its body runs
    assert cost.hbm_bytes == tile + table + tile + compared
    assert cost.cycles == 100
    assert cost.collectives == {
        Collective("all-reduce", 64 * 4, 2): 5,
        Collective("all-gather", (8 * 64 + 2 * 64) * 4, 4): 1,
    }
    assert cost.roofline_seconds == pytest.approx(cost.hbm_bytes / 819e9)


def test_what_talks_to_the_host_is_found():
    def function(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    assert compiled(function, floats(3)).host_calls
    assert not compiled(lambda x: x + 1, floats(3)).host_calls


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="no text of an XLA program"):
        Program("module @jit_f {}")
