"""Collectives read from compiled programs: known ones on eight virtual CPU devices, and the dialects of TPU and GPU."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import children
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from srpo_jax.costs import hlo, traffic

TURNS, INNER = 5, 3


def compile_known_collectives():
    """Child: prints the text of a program on a 2x4 mesh with a collective of every kind in a loop, one nested."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def program(x, y):
        def inner(c, _):
            return jax.lax.psum(c, "a") / 2, None

        def body(c, _):
            gathered = jax.lax.all_gather(c, "b", tiled=True)
            part = jax.lax.psum_scatter(gathered * 2, "b", tiled=True)
            mixed = jax.lax.all_to_all(part.reshape(4, -1), "b", 0, 0).reshape(-1)
            moved = jax.lax.ppermute(mixed, "b", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.scan(inner, moved, None, length=INNER)[0], None

        x = jax.lax.scan(body, x, None, length=TURNS)[0]
        return x, jax.lax.psum(y, ("a", "b"))

    split = jax.shard_map(program, mesh=mesh, in_specs=(P("b"), P()), out_specs=(P("b"), P()), check_vma=False)
    arguments = jax.ShapeDtypeStruct((4096,), jnp.float32), jax.ShapeDtypeStruct((300,), jnp.float32)
    print(json.dumps(jax.jit(split).lower(*arguments).compile().as_text()))


def test_known_collectives():
    found, unknown = hlo.collectives(children.call(compile_known_collectives), 8)
    assert not unknown
    table = {(item.kind, item.bytes, item.runs): item for item in found}
    rows, columns = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    # A device holds 1024 of 4096 float32 numbers.
    assert set(table) == {
        ("all-gather", 4096, TURNS),
        ("reduce-scatter", 16384, TURNS),
        ("all-to-all", 4096, TURNS),
        ("collective-permute", 4096, TURNS),
        ("all-reduce", 4096, TURNS * INNER),
        ("all-reduce", 1200, 1),
    }
    assert len(found) == len(table)
    groups = {kind: item.groups for (kind, size, _), item in table.items() if size != 1200}
    assert groups["all-gather"] == groups["reduce-scatter"] == groups["all-to-all"] == rows
    assert groups["all-reduce"] == columns
    assert set(groups["collective-permute"]) == {(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4)}
    traffic = {key: item.traffic for key, item in table.items()}
    assert traffic[("all-gather", 4096, TURNS)] == 3 * 4096  # three others' parts
    assert traffic[("reduce-scatter", 16384, TURNS)] == 3 * 4096
    assert traffic[("all-to-all", 4096, TURNS)] == 3 * 1024
    assert traffic[("collective-permute", 4096, TURNS)] == 4096
    assert traffic[("all-reduce", 4096, TURNS * INNER)] == 4096  # half to the other and half back
    assert traffic[("all-reduce", 1200, 1)] == pytest.approx(2 * 7 / 8 * 1200)


# What libtpu and the CUDA plugin write: layouts with tiles, loops without a known length, groups as axes of a mesh,
# a reduce-scatter as a fused all-reduce, collectives that start and end apart.
DIALECTS = """HloModule jit_update, is_scheduled=true

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(512)} parameter(0)
  %b = bf16[]{:T(512)} parameter(1)
  ROOT %add = bf16[]{:T(512)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[8,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%sum
  %offset = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.3, %offset, %offset), dynamic_slice_sizes={8,128}
}

%body (loop: (s32[], bf16[64,128], /*index=2*/f32[4])) -> (s32[], bf16[64,128], f32[4]) {
  %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/f32[4]{0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%loop), index=0
  %array = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %rest = f32[4]{0} get-tuple-element(%loop), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%count, %two)
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%array), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%fusion.1), channel_id=4, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/f32[4]{0}) tuple(%next, %all-gather.1, /*index=2*/%rest)
}

%condition (loop.1: (s32[], bf16[64,128], f32[4])) -> pred[] {
  %loop.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/f32[4]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(11)
  %count.1 = s32[]{:T(128)} get-tuple-element(%loop.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

%small (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %permute = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

%large (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %all-reduce.4 = f32[4]{0} all-reduce(%q), replica_groups={}, to_apply=%sum
}

ENTRY %main (x: bf16[64,128], y: f32[4], which: pred[]) -> (bf16[64,128], f32[4]) {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[4]{0} parameter(1)
  %which = pred[] parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %tuple.2 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/f32[4]{0}) tuple(%start, %x, /*index=2*/%y)
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/f32[4]{0}) while(%tuple.2), condition=%condition, body=%body
  %conditional.1 = f32[4]{0} conditional(%which, %y, %y), true_computation=%small, false_computation=%large
  %reduce-scatter-start.1 = ((f32[4]{0}, f32[4]{0}), (f32[2]{0}, f32[2]{0}), u32[]{:S(2)}) reduce-scatter-start(%y, %conditional.1), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%sum
  %reduce-scatter-done.1 = (f32[2]{0}, f32[2]{0}) reduce-scatter-done(%reduce-scatter-start.1)
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  ROOT %out = (bf16[64,128]{1,0:T(8,128)(2,1)}, f32[4]{0}) tuple(%done, %conditional.1)
}
"""  # noqa: E501


def test_dialects():
    found, unknown = hlo.collectives(DIALECTS, 8)
    assert not unknown
    everyone = (tuple(range(8)),)
    assert found == (
        # 1, 3, 5, 7, 9 are below 11.
        hlo.Collective("reduce-scatter", "all-reduce.3", 64 * 128 * 2, everyone, 5),
        hlo.Collective("all-gather", "all-gather.1", 8 * 128 * 2, ((0, 1, 2, 3), (4, 5, 6, 7)), 5),
        # Of the two branches, the one that moves more.
        hlo.Collective("all-reduce", "all-reduce.4", 16, everyone, 1),
        hlo.Collective("reduce-scatter", "reduce-scatter-start.1", 32, ((0, 4), (1, 5), (2, 6), (3, 7)), 1),
    )
    assert found[0].traffic == 7 / 8 * 64 * 128 * 2


# What libtpu 0.0.42 writes for two slices of 2x2: a sum of each chip's array with the other slice's, by the hosts.
SLICES = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[256,2048]) -> f32[512,8,128] {
  %x = f32[256,2048]{1,0:T(8,128)} parameter(0)
  %bitcast.1 = f32[512,8,128]{2,1,0:T(8,128)} bitcast(%x)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %send = (f32[512,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast.1, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv = (f32[512,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[512,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %get-tuple-element.2 = f32[512,8,128]{2,1,0:T(8,128)} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_transfers_between_slices():
    found, unknown = hlo.collectives(SLICES, 8)
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found == (hlo.Collective("all-reduce", "send", 256 * 2048 * 4, pairs, 1),) and not unknown
    assert found[0].traffic == 256 * 2048 * 4
    four = SLICES.replace("{1,2}x{0:3}", "{1:4}x{0,1}")
    assert hlo.collectives(four, 8).found[0].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    # Other transfers to the host are none of it.
    assert hlo.collectives(SLICES.replace("_xla_megascale_transfer_type", "_xla_other"), 8).found == ()
    for wrong in (("ALL_REDUCE", "NEWS"), ("{1,2}x{0:3}", "all")):
        with pytest.raises(ValueError, match="between slices not understood"):
            hlo.collectives(SLICES.replace(*wrong), 8)


# What libtpu 0.0.42 writes of a gather beside other work: it starts, goes on in a product of a loop, and ends.
CHAIN = """HloModule jit_f, is_scheduled=true

%start (p: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) custom-call(%p, %all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (q: (bf16[4,8], bf16[32,8])) -> (bf16[4,8], bf16[32,8]) {
  %q = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) parameter(0)
  %part = bf16[4,8]{1,0} get-tuple-element(%q), index=0
  %all-gather.2 = bf16[32,8]{1,0} all-gather(%part), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %tuple.1 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%part, %all-gather.2)
}

%body (l: (s32[], (bf16[4,8], bf16[32,8]))) -> (s32[], (bf16[4,8], bf16[32,8])) {
  %l = (s32[], (bf16[4,8]{1,0}, bf16[32,8]{1,0})) parameter(0)
  %i = s32[] get-tuple-element(%l), index=0
  %gathering = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) get-tuple-element(%l), index=1
  %fusion.2 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%gathering), kind=kOutput, calls=%beside
  ROOT %tuple.2 = (s32[], (bf16[4,8]{1,0}, bf16[32,8]{1,0})) tuple(%i, %fusion.2)
}

%condition (m: (s32[], (bf16[4,8], bf16[32,8]))) -> pred[] {
  %m = (s32[], (bf16[4,8]{1,0}, bf16[32,8]{1,0})) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%end (r: (bf16[4,8], bf16[32,8])) -> bf16[32,8] {
  %r = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) parameter(0)
  %part.1 = bf16[4,8]{1,0} get-tuple-element(%r), index=0
  ROOT %all-gather.3 = bf16[32,8]{1,0} all-gather(%part.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
}

ENTRY %main (x: bf16[4,8], n: s32[]) -> bf16[32,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %fusion.1 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %tuple.3 = (s32[], (bf16[4,8]{1,0}, bf16[32,8]{1,0})) tuple(%n, %fusion.1)
  %while.1 = (s32[], (bf16[4,8]{1,0}, bf16[32,8]{1,0})) while(%tuple.3), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"19"}}
  %gathered = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) get-tuple-element(%while.1), index=1
  %all-gather.4 = bf16[32,8]{1,0} all-gather(%x), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %fusion.3 = bf16[32,8]{1,0} fusion(%gathered), kind=kCustom, calls=%end
}
"""  # noqa: E501


# What libtpu 0.0.42 writes for TPU v7, whose collectives a core of their own makes.
SPARSE_CORE = """HloModule jit_f, is_scheduled=true

%called (p: bf16[4,8]) -> bf16[32,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (x: bf16[4,8]) -> bf16[32,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %call-start.1 = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  ROOT %call-done.1 = bf16[32,8]{1,0} call-done(%call-start.1)
}
"""  # noqa: E501


def test_a_gather_on_a_core_of_its_own():
    (found,) = hlo.collectives(SPARSE_CORE, 8).found
    assert found == hlo.Collective("all-gather", "all-gather.1", 4 * 8 * 2, (tuple(range(8)),), 1)
    assert traffic.of(SPARSE_CORE) == traffic.Traffic(0.0, 0.0)


def test_a_gather_beside_other_work_counts_once():
    found, unknown = hlo.collectives(CHAIN, 8)
    everyone = (tuple(range(8)),)
    assert not unknown and found == (
        hlo.Collective("all-gather", "all-gather.1", 4 * 8 * 2, everyone, 1),
        hlo.Collective("all-gather", "all-gather.4", 4 * 8 * 2, everyone, 1),
    )
    alone = hlo.collectives(CHAIN.replace("chain_id", "other"), 8).found
    assert [item.runs for item in alone] == [1, 19, 1, 1]


def test_a_loop_of_unknown_length_is_named():
    text = DIALECTS.replace("%limit = s32[]{:T(128)} constant(11)", "%limit = s32[]{:T(128)} parameter(1)")
    found, unknown = hlo.collectives(text, 8)
    assert unknown == ("while.1",) and found[0].runs == 1
    assert hlo.collectives(DIALECTS.replace("direction=LT", "direction=NE"), 8).unknown == ("while.1",)


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        # Devices 0, 4, 1, 5, 2, 6, 3, 7 in a mesh of 4 x 1 x 2.
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'z'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_groups(written, groups):
    text = DIALECTS.replace("[1,8]<=[8]", written)
    assert hlo.collectives(text, 8).found[0].groups == groups


@pytest.mark.parametrize("written", ["mesh['x'=8] {'y'}", "mesh['x'=8, device_ids=([8]T(0))] {'x'}", "none"])
def test_groups_that_are_not_understood(written):
    with pytest.raises(ValueError, match="replica groups not understood"):
        hlo.collectives(DIALECTS.replace("[1,8]<=[8]", written), 8)


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("HloModule nothing", 8)
