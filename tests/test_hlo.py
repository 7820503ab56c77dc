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
rows = NamedSharding(mesh, P("x"))
X = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)

def sharded(body):
  return jax.shard_map(
    body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
  )

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
  def body(c):
    return jnp.sin(jax.lax.psum(c, ("x", "y")))
  return jax.lax.while_loop(lambda c: jnp.sum(c) < 9.0, body, x)

def branching(x):
  def little(x):
    return jax.lax.psum(x[:, :1], "x") + x
  return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "x"), little, x)

texts = {
  f.__name__: jax.jit(sharded(f)).lower(X).compile().as_text()
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
  text = (pathlib.Path(__file__).parent / "tpu_module.hlo").read_text()
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
