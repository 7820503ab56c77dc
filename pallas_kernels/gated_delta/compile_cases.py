"""The kernels at the shapes they are meant for, to be compiled anywhere.

`CASES` maps a name to `make(devices) -> (function, arguments)`, with abstract
arrays on compile-only devices as arguments. Queries, keys and values come as
projections write them, [B, T, H K], in bfloat16; gates and states are float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gated_delta import api
from pallas_kernels.gated_delta.shapes import Shape

SHAPES = {
  "window24": Shape(256, 24, 4, 64, 128),
  "window64": Shape(256, 64, 4, 64, 128),
  "length512": Shape(8, 512, 16, 96, 128),
  "length2000": Shape(8, 2000, 16, 128, 256),
}


def _rule(shape, implementation, q, k, v, g, beta, state):
  """The rule on flat inputs [B, T, H *]; o comes flat too."""
  tokens = (shape.batch, shape.length, shape.heads)
  q, k, v = (x.reshape(*tokens, -1) for x in (q, k, v))
  o, state = api.gated_delta_rule(
    q, k, v, g, beta, state, implementation=implementation
  )
  return o.reshape(*tokens[:2], -1), state


def _forward_case(shape, implementation, devices):
  sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

  def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  batch, length, heads, key_dim, value_dim = shape
  flat = [
    array((batch, length, heads * dim), jnp.bfloat16)
    for dim in (key_dim, key_dim, value_dim)
  ]
  gates = [array((batch, length, heads))] * 2
  state = array((batch, heads, key_dim, value_dim))
  return functools.partial(_rule, shape, implementation), (*flat, *gates, state)


def _backward_case(shape, implementation, devices):
  rule, arguments = _forward_case(shape, implementation, devices)
  cotangents = arguments[2], arguments[5]

  def gradient(arguments, cotangents):
    return jax.vjp(rule, *arguments)[1](cotangents)

  return gradient, (arguments, cotangents)


DIRECTIONS = {"forward": _forward_case, "backward": _backward_case}

CASES = {
  f"{implementation}_{name}_{direction}": functools.partial(
    make, shape, implementation
  )
  for implementation in api.CANNOT_SERVE
  for name, shape in SHAPES.items()
  for direction, make in DIRECTIONS.items()
}
