"""Bytes read from compiled programs: a known one on this CPU, and what libtpu writes."""

import jax
import jax.numpy as jnp
import pytest

from srpo_jax.costs import traffic

TURNS = 7


def test_a_loop_of_products():
    """Each turn multiplies a slice of a stack, 64 x 64, by the carry, and adds one number to all of the product."""

    def program(stack, x):
        def body(x, kernel):
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(body, x, stack)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((TURNS, 64, 64), (64, 64))]
    found = traffic.of(jax.jit(program).lower(*shapes).compile().as_text())
    square = 64 * 64 * 4
    # Two operands and a result; around it the slice is read and written, or not, and tanh reads and writes.
    assert found.products == pytest.approx(TURNS * 3 * square, rel=0.01)
    assert TURNS * 2 * square <= found.between <= (TURNS * 4 + 4) * square * 1.01


# A loop of 5 turns: slices of a stack, a product whose kernel was fetched to vector memory, a stack that is changed in
# place; then a copy, a kernel, and a gather, which is none of it.
TPU = """HloModule jit_f, is_scheduled=true

%sliced (stack: bf16[5,8,128], i: s32[]) -> bf16[1,8,128] {
  %stack = bf16[5,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
}

%multiplied (x: bf16[128,8], kernel: bf16[8,128]) -> bf16[128,128] {
  %x = bf16[128,8]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[128,128]{1,0:T(8,128)(2,1)} convolution(%x, %kernel), dim_labels=bf_io->bf
}

%changed (all: f32[5,128], row: f32[1,128], j: s32[]) -> f32[5,128] {
  %all = f32[5,128]{1,0} parameter(0)
  %row = f32[1,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %dynamic-update-slice.1 = f32[5,128]{1,0} dynamic-update-slice(%all, %row, %j, %none)
}

%body (loop: (s32[], bf16[5,8,128], f32[5,128], bf16[128,8], f32[1,128])) -> (s32[], bf16[5,8,128], f32[5,128], bf16[128,8], f32[1,128]) {
  %loop = (s32[], bf16[5,8,128]{2,1,0}, f32[5,128]{1,0}, bf16[128,8]{1,0}, f32[1,128]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%loop), index=0
  %layers = bf16[5,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %grads = f32[5,128]{1,0} get-tuple-element(%loop), index=2
  %given = bf16[128,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=3
  %one = f32[1,128]{1,0} get-tuple-element(%loop), index=4
  %fusion.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} fusion(%layers, %count), kind=kLoop, calls=%sliced
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} bitcast(%fusion.1)
  %fusion.2 = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%given, %near), kind=kOutput, calls=%multiplied
  %fusion.3 = f32[5,128]{1,0} fusion(%grads, %one, %count), kind=kLoop, calls=%changed
  ROOT %tuple.1 = (s32[], bf16[5,8,128]{2,1,0}, f32[5,128]{1,0}, bf16[128,8]{1,0}, f32[1,128]{1,0}) tuple(%count, %layers, %fusion.3, %given, %one)
}

%condition (again: (s32[], bf16[5,8,128], f32[5,128], bf16[128,8], f32[1,128])) -> pred[] {
  %again = (s32[], bf16[5,8,128]{2,1,0}, f32[5,128]{1,0}, bf16[128,8]{1,0}, f32[1,128]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: s32[], b: bf16[5,8,128], c: f32[5,128], d: bf16[128,8], e: f32[1,128]) -> f32[1000] {
  %a = s32[] parameter(0)
  %b = bf16[5,8,128]{2,1,0} parameter(1)
  %c = f32[5,128]{1,0} parameter(2)
  %d = bf16[128,8]{1,0} parameter(3)
  %e = f32[1,128]{1,0} parameter(4)
  %tuple.2 = (s32[], bf16[5,8,128]{2,1,0}, f32[5,128]{1,0}, bf16[128,8]{1,0}, f32[1,128]{1,0}) tuple(%a, %b, %c, %d, %e)
  %while.1 = (s32[], bf16[5,8,128]{2,1,0}, f32[5,128]{1,0}, bf16[128,8]{1,0}, f32[1,128]{1,0}) while(%tuple.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %copy-start.1 = (f32[1,128]{1,0:S(1)}, f32[1,128]{1,0}, u32[]{:S(2)}) copy-start(%e)
  %copy-done.1 = f32[1,128]{1,0:S(1)} copy-done(%copy-start.1)
  %kernel.1 = f32[1000]{0} custom-call(%copy-done.1, %c), custom_call_target="tpu_custom_call"
  ROOT %all-gather.1 = f32[1000]{0} all-gather(%kernel.1), channel_id=1, replica_groups={}, dimensions={0}
}
"""  # noqa: E501


def test_what_libtpu_writes():
    found = traffic.of(TPU)
    # The product reads x and writes its result; the kernel reads c and writes 1000 numbers.
    assert found.products == 5 * (128 * 8 * 2 + 128 * 128 * 2) + 5 * 128 * 4 + 1000 * 4
    # The slice is read and written, with its number; the row is read and written in its place, with its number; and e
    # is read.
    assert found.between == 5 * (2 * 8 * 128 * 2 + 4 + 2 * 128 * 4 + 4) + 128 * 4


def test_a_slice_of_a_view_is_a_slice():
    """8-bit kernels: libtpu writes a fusion that gives the whole stack another layout, in the fusion that slices it."""
    view = """%viewed (s: bf16[5,8,128]) -> bf16[5,8,128] {
  %s = bf16[5,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[5,8,128]{2,1,0:T(16,128)(2,1)} copy(%s)
}

%sliced (stack"""
    inside = "%view = bf16[5,8,128]{2,1,0:T(16,128)(2,1)} fusion(%stack), kind=kLoop, calls=%viewed\n  %i = s32[]"
    text = TPU.replace("%sliced (stack", view).replace("%i = s32[]", inside, 1)
    text = text.replace("dynamic-slice(%stack,", "dynamic-slice(%view,")
    assert text.count("%viewed") == 2 and text.count("%view,") == 1
    assert traffic.of(text) == traffic.of(TPU)
    # What is given on as it is, is read whole.
    whole = text.replace("ROOT %dynamic-slice.1", "%dynamic-slice.1").replace("%view = ", "ROOT %view = ", 1)
    assert traffic.of(whole).between > traffic.of(TPU).between
