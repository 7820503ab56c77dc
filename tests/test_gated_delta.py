"""One contract for every form of every rule, against numpy float64."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta import (
  api,
  benchmark,
  check,
  chunked_xla,
  contract,
  pallas_gpu,
  pallas_tpu,
  shapes,
)
from sleep_jax.model.update_rules import UPDATE_RULES, UpdateRule

GOLDENS = pathlib.Path(__file__).parents[2] / "shared" / "goldens"


def inputs(length, case="random", rule="gated_delta", **sizes):
  return contract.inputs(length, case, per_channel=rule == "kda", **sizes)


def numpy_rule(rule, q, k, v, g, beta, state):
  """(o, state) of any rule by the float64 oracle."""
  g = 0 * g if rule == "delta" else g
  return contract.oracle(q, k, v, g, beta, state, delta=rule != "hebbian")


# fixed_decay is hebbian to a form: only the layer makes its g otherwise.
RULES = [rule for rule in UPDATE_RULES if rule != "fixed_decay"]
FORMS = {f"{rule}-chunkwise": (rule, UPDATE_RULES[rule]) for rule in RULES}
FORMS |= {
  f"{rule}-recurrence": (rule, UpdateRule(UPDATE_RULES[rule].update))
  for rule in RULES
}


# The kernels, interpreted. They keep a float32 state: no float64.
KERNELS = {
  "pallas_tpu": functools.partial(
    pallas_tpu.gated_delta_rule, interpret=pltpu.InterpretParams()
  ),
  "pallas_gpu": functools.partial(
    pallas_gpu.gated_delta_rule, interpret=InterpretGPUParams()
  ),
}


@pytest.fixture(
  params=[
    *FORMS,
    *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS),
  ]
)
def form(request):
  name = request.param
  return FORMS.get(name) or ("gated_delta", KERNELS[name])


def as_arrays(arrays, dtype):
  return [jnp.asarray(x, dtype) for x in arrays]


class TestContract:
  """What every form of every rule keeps to."""

  @pytest.mark.parametrize("length", contract.LENGTHS)
  def test_equals_numpy_float64(self, form, length):
    rule, function = form
    arrays = inputs(length, rule=rule)
    expected = numpy_rule(rule, *arrays)
    kernel = function in KERNELS.values()
    function = jax.jit(function)
    if not kernel:
      with jax.enable_x64(True):
        for mine, theirs in zip(
          function(*as_arrays(arrays, jnp.float64)), expected, strict=True
        ):
          np.testing.assert_allclose(mine, theirs, atol=1e-11)
    for mine, theirs in zip(
      function(*as_arrays(arrays, jnp.float32)), expected, strict=True
    ):
      np.testing.assert_allclose(mine, theirs, atol=3e-5)

  @pytest.mark.parametrize("case", contract.CASES[1:])
  def test_hard_keys_and_decays(self, form, case):
    rule, function = form
    arrays = inputs(64, case, rule)
    expected = numpy_rule(rule, *arrays)
    # Under strong decay the running total of g reaches -900, where float32
    # resolves 6e-5: differences of it carry that error into exp.
    tolerance = 5e-4 if case == "strong" else 1e-4
    for mine, theirs in zip(
      jax.jit(function)(*as_arrays(arrays, jnp.float32)), expected, strict=True
    ):
      scale = max(1.0, np.abs(theirs).max())
      np.testing.assert_allclose(mine, theirs, atol=tolerance * scale)

  @pytest.mark.parametrize("length", [1, 7, 64, 75])
  @pytest.mark.parametrize("case", ["random", "repeated", "strong"])
  def test_six_gradients_are_those_of_the_recurrence(self, form, case, length):
    """With a cotangent on both outputs; in float64 but for kernels."""
    rule, function = form
    arrays = inputs(length, case, rule)
    if function in KERNELS.values():
      tolerance = 5e-4 if case == "strong" else 1e-4
      errors = contract.errors(function, arrays)
      assert max(errors.values()) < tolerance, errors
      return
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=arrays[i].shape) for i in (2, 5)]

    def gradients(function):
      def loss(*arrays):
        outputs = function(*arrays)
        return sum(
          jnp.sum(x * w) for x, w in zip(outputs, weights, strict=True)
        )

      return jax.jit(jax.grad(loss, argnums=range(6)))(
        *as_arrays(arrays, jnp.float64)
      )

    with jax.enable_x64(True):
      entry = UPDATE_RULES[rule]
      token_by_token = UpdateRule(entry.update, entry.decay)
      for mine, theirs in zip(
        gradients(function), gradients(token_by_token), strict=True
      ):
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, atol=1e-11 * scale)

  def test_a_state_carried_over_any_split_is_one_call(self, form):
    rule, function = form
    # pallas_gpu has 16 bits of products with the state, not 24.
    tolerance = 5e-5 if function is KERNELS["pallas_gpu"] else 1e-5
    *tokens, state = as_arrays(inputs(75, rule=rule), jnp.float32)
    whole_o, whole_state = function(*tokens, state)
    for split in (1, 24, 70):
      first, state_between = function(*(x[:, :split] for x in tokens), state)
      rest, last = function(*(x[:, split:] for x in tokens), state_between)
      o = jnp.concatenate([first, rest], axis=1)
      np.testing.assert_allclose(o, whole_o, atol=tolerance)
      np.testing.assert_allclose(last, whole_state, atol=tolerance)

  def test_padding_leaves_the_state_alone(self, form):
    rule, function = form
    q, k, v, g, beta, state = as_arrays(inputs(30, rule=rule), jnp.float32)
    padded = jnp.arange(30) >= 20
    g = jnp.where(padded.reshape(1, -1, *[1] * (g.ndim - 2)), 0, g)
    beta = jnp.where(padded[None, :, None], 0, beta)
    o, final = function(q, k, v, g, beta, state)
    alone, expected = function(*(x[:, :20] for x in (q, k, v, g, beta)), state)
    np.testing.assert_allclose(o[:, :20], alone, atol=1e-5)
    np.testing.assert_allclose(final, expected, atol=1e-5)

  def test_vmap(self, form):
    rule, function = form
    arrays = as_arrays(inputs(24, rule=rule), jnp.float32)
    stacked = [jnp.stack([x, x[::-1]]) for x in arrays]
    o, state = jax.vmap(function)(*stacked)
    tolerance = 5e-5 if function is KERNELS["pallas_gpu"] else 1e-5
    for i in range(2):
      one_o, one_state = function(*(x[i] for x in stacked))
      np.testing.assert_allclose(o[i], one_o, atol=tolerance)
      np.testing.assert_allclose(state[i], one_state, atol=tolerance)

  def test_gradients_under_vmap(self, form):
    """Each row's own, where some inputs are shared."""
    rule, function = form
    q, *shared, state = as_arrays(inputs(7, rule=rule), jnp.float32)
    stacked = jnp.stack([q, 2 * q])

    def gradients(q):
      return jax.grad(
        lambda q, state: sum(x.sum() for x in function(q, *shared, state)),
        argnums=(0, 1),
      )(q, state)

    mine = jax.vmap(gradients)(stacked)
    for i in range(2):
      for many, one in zip(mine, gradients(stacked[i]), strict=True):
        np.testing.assert_allclose(many[i], one, atol=1e-4)

  def test_bfloat16_keeps_a_float32_state(self, form):
    rule, function = form
    arrays = inputs(24, rule=rule)
    low = as_arrays(arrays[:3], jnp.bfloat16)
    o, final = function(*low, *as_arrays(arrays[3:], jnp.float32))
    assert (o.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    expected_o, expected_state = numpy_rule(rule, *arrays)
    # bfloat16 has 8 bits: inputs are off by 2e-3, sums of 24 of them by more.
    np.testing.assert_allclose(o.astype(jnp.float32), expected_o, atol=0.05)
    np.testing.assert_allclose(final, expected_state, atol=0.05)

  def test_nan_stays_nan(self, form):
    rule, function = form
    q, k, v, g, beta, state = as_arrays(inputs(24, rule=rule), jnp.float32)
    o, final = function(q, k, v.at[0, 3, 0, 0].set(jnp.nan), g, beta, state)
    assert np.isnan(o[0, 3:, 0, 0]).all() and np.isnan(final[0, 0]).any()
    assert np.isfinite(o[1]).all() and np.isfinite(final[1]).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_may_share_queries_and_keys(groups):
  q, k, v, g, beta, state = as_arrays(inputs(24, heads=4), jnp.float32)
  q, k = q[:, :, :groups], k[:, :, :groups]
  o, final = api.gated_delta_rule(q, k, v, g, beta, state)
  repeated = [np.repeat(x, 4 // groups, axis=2) for x in (q, k)]
  expected = numpy_rule("gated_delta", *repeated, v, g, beta, state)
  np.testing.assert_allclose(o, expected[0], atol=1e-5)
  np.testing.assert_allclose(final, expected[1], atol=1e-5)


@pytest.mark.parametrize(
  "kernel, length, case, dtype, tolerance",
  [
    ("pallas_tpu", 24, "random", "float32", 1e-5),
    ("pallas_tpu", 24, "random", "bfloat16", 0.02),
    ("pallas_tpu", 75, "repeated", "float32", 1e-5),
    ("pallas_tpu", 150, "strong", "float32", 5e-4),
    ("pallas_gpu", 24, "random", "float32", 1e-4),
    pytest.param(
      *("pallas_gpu", 130, "random", "bfloat16", 0.02), marks=pytest.mark.slow
    ),
  ],
)
def test_kernels_in_small(kernel, length, case, dtype, tolerance):
  """Values and six gradients; the slow tests have the whole contract."""
  arrays = inputs(length, case)
  errors = contract.errors(KERNELS[kernel], arrays, jnp.dtype(dtype))
  assert max(errors.values()) < tolerance, errors


def test_the_gpu_kernel_multiplies_alike_where_interpreted():
  """By the very calls that are compiled; with jax 0.12 all is the same."""
  arrays = as_arrays(inputs(24), jnp.float32)

  def outputs_and_gradients(interpret):
    rule = functools.partial(pallas_gpu.gated_delta_rule, interpret=interpret)

    def run(*arrays):
      outputs, vjp = jax.vjp(rule, *arrays)
      return outputs, vjp(outputs)

    text = str(jax.make_jaxpr(run)(*arrays))
    return text.replace(f"interpret={interpret}", "")

  compiled = outputs_and_gradients(None)
  interpreted = outputs_and_gradients(InterpretGPUParams())
  products = compiled.count("wgmma_ref")
  assert products > 100 and "dot_general" not in interpreted
  assert interpreted.count("wgmma_ref") == products
  if jax.__version_info__ >= (0, 12):
    assert "layout_cast" in compiled and interpreted == compiled


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="plgpu.kernel takes no cost estimate"
)
def test_the_gpu_kernel_counts_its_products():
  """In float32, of two parts, each product of tiles is three of `wgmma`."""
  arrays = as_arrays(inputs(75, key=96, value=100), jnp.float32)

  def subjaxprs(equation):
    found = jax.tree.leaves(list(equation.params.values()))
    found = [getattr(x, "jaxpr", x) for x in found]
    return [x for x in found if hasattr(x, "eqns")]

  def calls(jaxpr):
    return sum(
      (x.primitive.name == "wgmma_ref")
      + x.params.get("length", 1) * sum(map(calls, subjaxprs(x)))
      for x in jaxpr.eqns
    )

  def estimates(jaxpr):
    for x in jaxpr.eqns:
      if x.params.get("cost_estimate"):
        yield x.params["cost_estimate"].flops, sum(map(calls, subjaxprs(x)))
      else:
        for inner in subjaxprs(x):
          yield from estimates(inner)

  def run(*arrays):
    outputs, vjp = jax.vjp(pallas_gpu.gated_delta_rule, *arrays)
    return vjp(outputs)

  found = list(estimates(jax.make_jaxpr(run)(*arrays).jaxpr))
  assert len(found) == 3  # forward, its states again, and backward
  programs = 2 * 2 * 2  # rows, heads, columns of V in tiles
  for flops, times in found:
    assert flops == programs * times // 3 * 2 * pallas_gpu.TILE**3


def test_the_finest_dtype_decides_the_precision():
  """Keys in float32 beside bfloat16 are not rounded."""
  arrays = inputs(24)
  low = contract.rounded(arrays, jnp.bfloat16)
  low[1] = jnp.asarray(arrays[1], jnp.float32)
  _, final = KERNELS["pallas_tpu"](*low)
  exact = [np.asarray(x.astype(jnp.float32)) for x in low]
  _, expected = numpy_rule("gated_delta", *exact)
  np.testing.assert_allclose(final, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "batch, heads, key, value", [(3, 6, 8, 12), (5, 4, 64, 128)]
)
def test_heads_and_rows_that_share_a_tile(batch, heads, key, value):
  """Packed heads, a last block of rows that is not full, real head sizes."""
  arrays = inputs(30, batch=batch, heads=heads, key=key, value=value)
  errors = contract.errors(KERNELS["pallas_tpu"], arrays)
  assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
  "rule",
  [
    "gated_delta",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("hebbian", "kda")),
  ],
)
def test_rows_in_pieces(monkeypatch, rule):
  """As a CPU takes a batch whose S is large: two of five rows at a time."""
  arrays = as_arrays(inputs(24, rule=rule, batch=5), jnp.float32)

  def outputs_and_gradients():
    outputs, vjp = jax.vjp(UPDATE_RULES[rule], *arrays)
    return outputs, vjp(outputs)

  whole = jax.jit(outputs_and_gradients)()
  monkeypatch.setattr(chunked_xla, "CACHED", 2 * arrays[-1][0].nbytes)
  traced = jax.jit(lambda: outputs_and_gradients()).trace()
  assert "platform_index" in str(traced.jaxpr)
  pieces = traced.lower().compile()()
  for mine, theirs in zip(*map(jax.tree.leaves, (pieces, whole)), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.gated_delta import api, chunked_xla
from tests.test_gated_delta import KERNELS, as_arrays, inputs
rule = KERNELS.get(sys.argv[1], api.gated_delta_rule)
mesh = jax.make_mesh(
  (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
arrays = as_arrays(inputs(24, batch=8, heads=2), np.float32)
chunked_xla.CACHED = 0  # a row at a time
tokens, state = P("data", None, "tensor"), P("data", "tensor")
sharded = jax.shard_map(
  rule,
  mesh=mesh,
  in_specs=(tokens,) * 5 + (state,),
  out_specs=(tokens, state),
)
def value_and_gradients(rule):
  def loss(*arrays):
    outputs = rule(*arrays)
    return sum(x.sum() for x in outputs), outputs
  return jax.jit(jax.value_and_grad(loss, range(6), has_aux=True))
run = value_and_gradients(sharded)
run.trace(*arrays)
if sys.argv[1] != "pallas_gpu":
  mine = jax.tree.leaves(run(*arrays))
  alone = jax.tree.leaves(value_and_gradients(api.gated_delta_rule)(*arrays))
  assert all(len(x.sharding.device_set) == 8 for x in mine)
  for x, y in zip(mine, alone, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.parametrize(
  "rule",
  ["None", *(pytest.param(x, marks=pytest.mark.slow) for x in KERNELS)],
)
def test_shard_map_over_batch_and_heads(rule):
  """On 8 virtual devices, which need a process of their own.

  The interpreter of pallas_gpu knows one device: there, types alone.
  """
  subprocess.run(
    [sys.executable, "-c", SHARDED, rule],
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
  )


@pytest.mark.parametrize("rule", ["gated_delta", "kda"])
def test_stored_answers(rule):
  path = GOLDENS / f"{'gdn' if rule == 'gated_delta' else rule}_rule.npz"
  if not path.exists():
    pytest.skip("no stored answers here")
  with np.load(path) as golden:
    o, state = UPDATE_RULES[rule](
      *as_arrays(
        [contract.normalise(golden["q"]), contract.normalise(golden["k"])],
        np.float32,
      ),
      *(jnp.asarray(golden[name]) for name in ("v", "g", "beta", "S0")),
    )
    np.testing.assert_allclose(o, golden["o"], atol=2e-6)
    np.testing.assert_allclose(state, golden["S"], atol=2e-6)


def test_a_rule_of_ones_own_runs_by_its_recurrence(monkeypatch):
  """A new entry needs nothing but its update: here S <- S + k v^T."""
  monkeypatch.setitem(
    UPDATE_RULES,
    "plain",
    UpdateRule(
      lambda s, k, v, g, beta: s + k[..., None] * v[..., None, :], decay="none"
    ),
  )
  q, k, v, g, beta, state = as_arrays(inputs(24), jnp.float32)
  _, final = UPDATE_RULES["plain"](q, k, v, g, beta, state)
  expected = state + jnp.einsum("BTHK,BTHV->BHKV", k, v)
  np.testing.assert_allclose(final, expected, atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"beta": lambda x: x[:, :3]}, r"beta has shape \(2, 3, 2\)"),
    ({"k": lambda x: x[..., :5]}, r"k has shape \(2, 4, 2, 5\)"),
    ({"v": lambda x: x[..., :0]}, r"no axis may be empty"),
    ({"q": lambda x: x[:, :0]}, r"no axis may be empty"),
    ({"initial_state": lambda x: x[:1]}, r"initial_state has shape \(1, "),
    ({"g": lambda x: x + 9}, r"g reaches .*at most 0"),
    ({"v": lambda x: x.astype(jnp.int32)}, "v is int32"),
    ({"v": lambda x: x[:, :, :1]}, "multiple of q's"),
  ],
)
def test_bad_inputs_are_named(change, message):
  arrays = dict(
    zip(
      ("q", "k", "v", "g", "beta", "initial_state"),
      as_arrays(inputs(4), jnp.float32),
      strict=True,
    )
  )
  arrays |= {name: f(arrays[name]) for name, f in change.items()}
  with pytest.raises(ValueError, match=message):
    api.gated_delta_rule(**arrays)


@pytest.mark.parametrize("implementation", api.available())
def test_an_implementation_can_be_forced(implementation):
  arrays = as_arrays(inputs(24), jnp.float32)
  expected = numpy_rule("gated_delta", *arrays)
  o, final = api.gated_delta_rule(*arrays, implementation=implementation)
  np.testing.assert_allclose(o, expected[0], atol=1e-5)
  np.testing.assert_allclose(final, expected[1], atol=1e-5)


def test_a_kernel_is_chosen_on_its_own_device(monkeypatch):
  """As on a TPU: the kernel has its trial there, interpreted, and is used."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", KERNELS["pallas_tpu"])
  arrays = as_arrays(inputs(24), jnp.float32)
  # A function of its own: jit keeps what it traced before.
  o, _ = jax.jit(lambda *arrays: api.gated_delta_rule(*arrays))(*arrays)
  assert api.choose(*arrays)[0] == "pallas_tpu"
  expected, _ = numpy_rule("gated_delta", *arrays)
  np.testing.assert_allclose(o, expected, atol=1e-5)
  assert api.choose(*as_arrays(inputs(7), jnp.float32)) == (
    "chunked_xla",
    "7 tokens do not fill the rows of a kernel's tile",
  )
  with jax.enable_x64(True):
    arrays[-1] = arrays[-1].astype(jnp.float64)
    assert api.choose(*arrays) == (
      "chunked_xla",
      "the state is float64: the kernels keep float32",
    )


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_kernel_that_fails_its_trial_is_not_used(monkeypatch, caplog, fault):
  trusted = api.IMPLEMENTATIONS["chunked_xla"]

  def kernel(q, k, v, g, beta, initial_state):
    if fault == "raises":
      raise RuntimeError("no such instruction")
    o, state = trusted(q, k, v, g, beta, initial_state)
    return o * (1.1 if fault == "wrong" else jnp.nan), state

  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", kernel)
  arrays = as_arrays(inputs(24), jnp.float32)
  expected = trusted(*arrays)
  for _ in range(2):  # in the midst of a trace, then again
    got = jax.jit(lambda *arrays: api.gated_delta_rule(*arrays))(*arrays)
    for mine, theirs in zip(got, expected, strict=True):
      np.testing.assert_allclose(mine, theirs, atol=1e-5)
  name, why = api.choose(*arrays)
  assert name == "chunked_xla" and "failed its trial" in why
  assert (
    len([x for x in caplog.records if "chunked_xla instead" in x.message]) == 1
  )


@pytest.mark.parametrize("kernel", api.CANNOT_SERVE)
def test_a_forced_kernel_that_cannot_serve_says_why(kernel):
  with jax.enable_x64(True):
    arrays = as_arrays(inputs(4), jnp.float64)
    with pytest.raises(ValueError, match=f"{kernel} cannot serve: .*float64"):
      api.gated_delta_rule(*arrays, implementation=kernel)
  with pytest.raises(ValueError, match="interpret mode|platform|backend"):
    jax.block_until_ready(
      api.gated_delta_rule(
        *as_arrays(inputs(4), jnp.float32), implementation=kernel
      )
    )


def test_too_long_for_the_kernel_names_the_memory():
  q, v = (
    jax.ShapeDtypeStruct((1, 16384, 2, d), jnp.bfloat16) for d in (128, 256)
  )
  state = jax.ShapeDtypeStruct((1, 2, 128, 256), jnp.float32)
  reason = pallas_tpu.cannot_serve(q, q, v, None, None, state)
  assert "MiB in VMEM for T = 16384" in reason


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="unknown implementation 'fast'"):
    api.gated_delta_rule(
      *as_arrays(inputs(4), jnp.float32), implementation="fast"
    )


def test_the_check_finds_what_is_wrong(monkeypatch, capsys):
  good = api.IMPLEMENTATIONS["chunked_xla"]

  def wrong(q, k, v, g, beta, initial_state):
    o, state = good(q, k, v, g, beta, initial_state)
    return o, state.at[..., 0].multiply(1.01)

  assert not check.failures("chunked_xla", [7], ["random", "strong"])
  monkeypatch.setitem(api.IMPLEMENTATIONS, "chunked_xla", wrong)
  (found,) = check.failures("chunked_xla", [7], [])[:1]
  assert "chunked_xla float32 T = 7 random" in found and "more than" in found
  assert "in state" in capsys.readouterr().out


def test_the_benchmark_times_every_implementation():
  rows = benchmark.benchmark(shapes.Shape(1, 5, 2, 4, 6), rounds=2)
  both = ("forward", "forward + backward")
  assert {(row[0], row[1]) for row in rows} >= {
    (name, what) for name in api.available() for what in both
  }
  for _, _, median, least, error in rows:
    assert 0 < least <= median and error < 1e-5


@pytest.mark.slow
def test_the_kernels_compile_for_a_tpu():
  """By the report, which says nothing spoils in HBM; needs the TPU compiler."""
  pytest.importorskip("libtpu")
  report = subprocess.run(
    [
      *(sys.executable, "-m", "pallas_kernels.gated_delta.compile_report"),
      *("--target=v5e", "--only=window24"),
    ],
    check=True,
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  ).stdout
  rows = [line.split("|")[1:-1] for line in report.splitlines()[2:]]
  assert [row[0].strip() for row in rows] == [
    "window24 forward",
    "window24 backward",
  ]
  for row in rows:
    assert int(row[1]) > 100 and int(row[2]) == 64  # rows of 256, 4 a step
    assert float(row[5]) < 2 and row[7].strip() == "0.0 MiB"


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pallas_kernels.gated_delta import trial
print("answer:", trial.everywhere(lambda: sys.argv[3] or None))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "found, answers",
  [
    (["", ""], ["None", "None"]),
    (["", "wrong"], ["it failed its trial in another process", "wrong"]),
  ],
)
def test_all_processes_come_to_one_answer(found, answers):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), reason],
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      text=True,
    )
    for i, reason in enumerate(found)
  ]
  for process, answer in zip(processes, answers, strict=True):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"answer: {answer}\n" in out
