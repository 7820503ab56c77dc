"""Floating-point operations of a function, counted on its jaxpr.

XLA's `cost_analysis` counts a scan's body once and a Pallas call as nothing;
here a body counts as often as it runs. One counter for all that is compared.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Flops(NamedTuple):
  """Operations: of matrix products, convolutions and kernels; of all else."""

  products: int = 0
  others: int = 0

  @property
  def total(self) -> int:
    return self.products + self.others

  def plus(self, other: "Flops", times: int = 1) -> "Flops":
    """Self, and the other `times` over."""
    return Flops(
      self.products + times * other.products, self.others + times * other.others
    )


# Data movement and what costs no arithmetic.
_FREE = frozenset(
  """all_gather all_gather_invariant all_to_all axis_index
  bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy
  create_token debug_callback debug_print device_put dynamic_slice
  dynamic_update_slice empty empty2 gather get iota name optimization_barrier
  pad pcast platform_index pmax pmin ppermute pvary reduce_precision reshape
  reshard rev scatter select_n sharding_constraint slice split squeeze stack
  stop_gradient swap tile transpose unstack""".split()
)
# One for each element that comes out.
_ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
  conj cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
  integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne neg
  nextafter not one_minus_square or population_count pow psum psum_invariant
  real rem round rsqrt shift_left shift_right_arithmetic shift_right_logical
  sign sin sinh sqrt square sub tan tanh xor""".split()
)
# One for each element that goes in; of the updates where something scatters.
_REDUCTIONS = frozenset(
  """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and
  reduce_max reduce_min reduce_or reduce_prod reduce_scatter reduce_sum
  reduce_xor top_k""".split()
)
_SCATTERS = frozenset(
  "scatter-add scatter-max scatter-min scatter-mul scatter-sub".split()
)
# Kernels: their bodies are not walked, they say themselves what they cost.
_KERNELS = frozenset("core_map mpmd_map pallas_call".split())
# Their jaxprs are of one element, or do not tell how often they run.
_OPAQUE = frozenset(
  "custom_linear_solve reduce reduce_window select_and_scatter".split()
)


def count_flops(
  function: Callable, *abstract_args: Any, unknown_trips: int | None = None
) -> Flops:
  """The operations that one call of `function` executes; nothing is compiled.

  A product [M, K] x [K, N] is 2 M N K, arithmetic (a transcendental function
  included) one for each element that comes out, a reduction one for each that
  goes in, data movement nothing. A scan counts its length times its body, a
  `cond` its most expensive branch, a `shard_map` all its devices, a kernel its
  `cost_estimate`. What `remat` computes anew counts anew: these are hardware
  FLOPs, not the smaller "model FLOPs" of utilisation tables. Places that are
  padding or masked count like others.

  Args:
    function: what `jax.jit` takes, or has made.
    abstract_args: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
    unknown_trips: how often the bodies of `while` loops count, whose trips are
      not known.

  Raises:
    ValueError: a `while` loop without `unknown_trips`; a kernel without
      `cost_estimate`; a primitive that no table here has.
  """
  jaxpr = jax.make_jaxpr(function)(*abstract_args).jaxpr
  return _walk(jaxpr, unknown_trips)


def _walk(jaxpr: Jaxpr, unknown_trips: int | None) -> Flops:
  total = Flops()
  for equation in jaxpr.eqns:
    total = total.plus(_of_equation(equation, unknown_trips))
  return total


def _of_equation(equation: JaxprEqn, unknown_trips: int | None) -> Flops:
  name, params = equation.primitive.name, equation.params
  shapes = [getattr(x.aval, "shape", ()) for x in equation.invars]
  inputs = [math.prod(shape) for shape in shapes]
  outputs = [math.prod(getattr(x.aval, "shape", ())) for x in equation.outvars]
  if name in _FREE:
    return Flops()
  if name in _ELEMENTWISE:
    return Flops(others=sum(outputs))
  if name in _REDUCTIONS:
    return Flops(others=sum(inputs))
  if name in _SCATTERS:
    return Flops(others=inputs[2])
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(shapes[0][axis] for axis in contracted)
    return Flops(products=2 * outputs[0] * depth)
  if name == "conv_general_dilated":
    # Every output sums over the kernel but for its axis of output channels.
    channels = params["dimension_numbers"].rhs_spec[0]
    return Flops(products=2 * outputs[0] * inputs[1] // shapes[1][channels])
  if name in _KERNELS:
    if (estimate := params.get("cost_estimate")) is None:
      raise ValueError(
        f"the Pallas kernel {params.get('name')!r} ({_place(equation)}) has no "
        "cost_estimate: give it one, or count the function without the kernel"
      )
    return Flops(products=estimate.flops)
  if name == "while" and unknown_trips is None:
    raise ValueError(
      f"a while loop ({_place(equation)}) does not tell how often it runs: use "
      "lax.scan, or fori_loop with bounds that are Python integers"
    )
  bodies = [_walk(jaxpr, unknown_trips) for jaxpr in _sub_jaxprs(params)]
  if not bodies or name in _OPAQUE:
    raise ValueError(
      f"nothing is known of the primitive {name!r} ({_place(equation)}): add "
      "it to a table of sleep_jax/flops.py"
    )
  if name == "cond":
    return max(bodies, key=lambda flops: flops.total)
  times = 1
  if name == "scan":
    times = params["length"]
  elif name == "while":
    times = unknown_trips or 0
  elif name == "shard_map":
    sizes = dict(params["mesh"].shape)
    times = math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  total = Flops()
  for body in bodies:
    total = total.plus(body, times)
  return total


def _sub_jaxprs(params: dict[str, Any]):
  """Every jaxpr among an equation's parameters, alone or in a tuple."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def _place(equation: JaxprEqn) -> str:
  """Where the equation was written: "file:line (function)"."""
  traceback = equation.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if not frame.file_name.startswith(_LIBRARIES):
      return f"{frame.file_name}:{frame.line_num} in {frame.function_name}"
  return "place unknown"


_LIBRARIES = tuple(
  jax.__file__.replace("jax/__init__.py", library)
  for library in ("jax/", "flax/", "optax/", "jaxtyping/")
)
