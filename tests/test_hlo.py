"""Bytes moved and sent, against counts by hand; loops by their trips."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sleep_jax import hlo

KIB = 1024

# Prints the optimized HLO of each program, on 8 devices.
PROGRAMS = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
X = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("x")))

def sharded(body, out):
  return jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=out, check_vma=False)

def repeated(x):
  def body(c, _):
    def inner(c, _):
      return jnp.sin(jax.lax.psum(c, "x")), None
    c, _ = jax.lax.scan(inner, c, None, length=3)
    return jax.lax.ppermute(c, "y", [(0, 1), (1, 0)]), None
  return jax.lax.scan(body, x, None, length=5)[0]

def exchanged(x):
  whole = jax.lax.all_gather(x, "x", tiled=True)
  part = jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)
  return jax.lax.all_to_all(jnp.cos(part), "x", 1, 0, tiled=True)

def until(x):
  return jax.lax.while_loop(
    lambda c: jnp.sum(c) < 9.0, lambda c: jnp.sin(jax.lax.psum(c, ("x", "y"))), x
  )

def branching(x):
  return jax.lax.cond(
    x[0, 0] > 0, lambda x: jax.lax.psum(x, "x"), lambda x: jax.lax.psum(x[:, :1], "x") + x, x
  )

texts = {
  f.__name__: jax.jit(sharded(f, P("x"))).lower(X).compile().as_text()
  for f in (repeated, exchanged, until, branching)
}
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def texts():
  done = subprocess.run(
    [sys.executable, "-c", PROGRAMS],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


# A device has 16 x 128 of float32.
LOCAL = 8 * KIB


@pytest.mark.parametrize(
  "name, sent, guessed",
  [
    (
      "repeated",
      # A ring of 4 sends 2 (4 - 1) / 4 of what it adds up.
      {
        "all-reduce": 5 * 3 * LOCAL * 2 * 3 / 4,
        "collective-permute": 5 * LOCAL,
      },
      0,
    ),
    (
      "exchanged",
      {
        "all-gather": 3 * LOCAL,
        "reduce-scatter": 4 * LOCAL * 3 / 4,
        "all-to-all": LOCAL * 3 / 4,
      },
      0,
    ),
    # Told to count 7 trips, on all 8 devices.
    ("until", {"all-reduce": 7 * LOCAL * 2 * 7 / 8}, 1),
    ("branching", {"all-reduce": LOCAL * 2 * 3 / 4}, 0),
  ],
)
def test_collectives_by_kind_and_trips(texts, name, sent, guessed):
  found = hlo.traffic(texts[name], devices=8, unknown_trips=7)
  assert found.collectives == pytest.approx(sent)
  assert found.guessed == guessed


def test_memory_by_trips_and_by_what_is_sliced():
  """11 rows of a matrix: a row is read and written each trip, not all."""
  rows, width = 11, 4096

  def function(x):
    return jax.lax.map(jnp.sin, x)

  shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
  text = jax.jit(function).lower(shape).compile().as_text()
  row = 4 * width
  found = hlo.traffic(text).hbm
  # A row is sliced, its sine taken, and the result put in place; and a fresh
  # array is cleared.
  assert 2 * rows * row <= found <= 7 * rows * row


def test_what_a_tpu_writes():
  """One gather in three fusions, a scatter as a reduction, VMEM, a loop."""
  text = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], s32[2]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=17, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %custom-call.1 = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, s32[2]{0:S(4)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[8,128], q: bf16[32,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=17, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%all-reduce-scatter.1 (input: f32[32,128]) -> f32[8,128] {
  %input = f32[32,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.1 = f32[32,128]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,128}
}

%body (state: (s32[], bf16[8,128], f32[32,128])) -> (s32[], bf16[8,128], f32[32,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[32,128]{1,0:T(8,128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %mine = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %all = f32[32,128]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(2)} add(%n, %one)
  %start.1 = (bf16[8,128]{1,0:S(1)}, bf16[32,128]{1,0:S(1)}, s32[2]{0:S(4)}) fusion(%mine), kind=kCustom, calls=%start
  %got = bf16[32,128]{1,0:S(1)} get-tuple-element(%start.1), index=1
  %fusion.1 = bf16[32,128]{1,0:S(1)} fusion(%mine, %got), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = f32[8,128]{1,0:T(8,128)} fusion(%all), kind=kCustom, calls=%all-reduce-scatter.1
  %reduced = f32[8,128]{1,0:T(8,128)} all-reduce(%fusion.2), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}, to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[32,128]{1,0:T(8,128)S(1)}) tuple(%next, %mine, %all)
}

%condition (state: (s32[], bf16[8,128], f32[32,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[32,128]{1,0:T(8,128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %last = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%n, %last), direction=LT
}

ENTRY %main (a: bf16[8,128], b: f32[32,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[32,128]{1,0:T(8,128)} parameter(1)
  %three = s32[]{:T(128)} constant(3)
  %first = s32[]{:T(128)S(2)} copy(%three)
  %copy-start = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[8,128]{1,0:S(1)} copy-done(%copy-start)
  %tuple = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[32,128]{1,0:T(8,128)S(1)}) tuple(%first, %copy-done, %b)
  %while = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[32,128]{1,0:T(8,128)S(1)}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while), index=1
}
"""
  found = hlo.traffic(text, devices=8)
  trips, mine, part = 9 - 3, 2 * KIB, 4 * KIB
  assert found.collectives == {
    "all-gather": trips * 3 * mine,
    "reduce-scatter": trips * 4 * part * 3 / 4,
    "all-reduce": trips * part * 2 * 7 / 8,
  }
  # One copy into VMEM; in the loop, what the scatter writes, and the reduction
  # reads and writes, and two words: S(1) and S(2) are not HBM.
  assert found.hbm == mine + trips * (3 * part + 2 * 4) + 4


def test_a_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.traffic("HloModule x\n")
