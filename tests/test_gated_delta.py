"""One contract for every form of every rule, against numpy float64."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta import api, benchmark, shapes
from sleep_jax.model.update_rules import UPDATE_RULES, UpdateRule

GOLDENS = pathlib.Path(__file__).parents[2] / "shared" / "goldens"
# T with and without a remainder in every blocking inside a chunk, and beyond.
LENGTHS = [1, 7, 24, 63, 64, 65, 75, 512]
CASES = ["random", "repeated", "correlated", "negative", "strong"]


def numpy_rule(rule, q, k, v, g, beta, state):
  """The recurrence in numpy float64, a row, a head and a token at a time.

  Written from the equations, apart from `reference.py`.
  """
  q, k, v, g, beta = (np.array(x, np.float64) for x in (q, k, v, g, beta))
  state, o = np.array(state, np.float64), np.zeros(v.shape)
  for b in range(q.shape[0]):
    for h in range(v.shape[2]):
      for t in range(q.shape[1]):
        key, query = k[b, t, h], q[b, t, h] * q.shape[-1] ** -0.5
        s = state[b, h]
        if rule != "delta":
          s = np.exp(g[b, t, h]).reshape(-1, 1) * s
        target = v[b, t, h]
        if rule in ("delta", "gated_delta", "kda"):
          target = target - key @ s
        state[b, h] = s + beta[b, t, h] * np.outer(key, target)
        o[b, t, h] = query @ state[b, h]
  return o, state


def normalise(x):
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def inputs(
  length, case="random", rule="gated_delta", batch=2, heads=2, key=8, value=12
):
  rng = np.random.default_rng(length)
  shape = (batch, length, heads)
  q = normalise(rng.normal(size=(*shape, key)))
  k = normalise(rng.normal(size=(*shape, key)))
  v = rng.normal(size=(*shape, value))
  g = rng.normal(size=(*shape, key) if rule == "kda" else shape)
  g = -np.log1p(np.exp(g))
  beta = rng.uniform(size=shape)
  if case == "repeated":
    k, g, beta = np.broadcast_to(k[:, :1], k.shape), 0 * g, 1 + 0 * beta
  elif case == "correlated":  # about 0.99
    k = normalise(0.1 * normalise(rng.normal(size=k.shape)) + k[:, :1])
    g, beta = 0 * g, 1 + 0 * beta
  elif case == "negative":  # negative eigenvalues of the transition
    g, beta = 0.1 * g, 2 * beta
  elif case == "strong":
    g = np.where(rng.uniform(size=g.shape) < 0.3, -30.0, g)
  state = rng.normal(size=(batch, heads, key, value))
  return q, k, v, g, beta, state


# fixed_decay is hebbian to a form: only the layer makes its g otherwise.
RULES = [rule for rule in UPDATE_RULES if rule != "fixed_decay"]
FORMS = {f"{rule}-chunkwise": (rule, UPDATE_RULES[rule]) for rule in RULES}
FORMS |= {
  f"{rule}-recurrence": (rule, UpdateRule(UPDATE_RULES[rule].update))
  for rule in RULES
}


@pytest.fixture(params=FORMS)
def form(request):
  return FORMS[request.param]


def as_arrays(arrays, dtype):
  return [jnp.asarray(x, dtype) for x in arrays]


class TestContract:
  """What every form of every rule keeps to."""

  @pytest.mark.parametrize("length", LENGTHS)
  def test_equals_numpy_float64(self, form, length):
    rule, function = form
    arrays = inputs(length, rule=rule)
    expected = numpy_rule(rule, *arrays)
    function = jax.jit(function)
    with jax.enable_x64(True):
      for mine, theirs in zip(
        function(*as_arrays(arrays, jnp.float64)), expected, strict=True
      ):
        np.testing.assert_allclose(mine, theirs, atol=1e-11)
    for mine, theirs in zip(
      function(*as_arrays(arrays, jnp.float32)), expected, strict=True
    ):
      np.testing.assert_allclose(mine, theirs, atol=3e-5)

  @pytest.mark.parametrize("case", CASES[1:])
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
    """With a cotangent on both outputs, in float64."""
    rule, function = form
    arrays = inputs(length, case, rule)
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
    *tokens, state = as_arrays(inputs(75, rule=rule), jnp.float32)
    whole_o, whole_state = function(*tokens, state)
    for split in (1, 24, 70):
      first, state_between = function(*(x[:, :split] for x in tokens), state)
      rest, last = function(*(x[:, split:] for x in tokens), state_between)
      o = jnp.concatenate([first, rest], axis=1)
      np.testing.assert_allclose(o, whole_o, atol=1e-5)
      np.testing.assert_allclose(last, whole_state, atol=1e-5)

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
    for i in range(2):
      one_o, one_state = function(*(x[i] for x in stacked))
      np.testing.assert_allclose(o[i], one_o, atol=1e-5)
      np.testing.assert_allclose(state[i], one_state, atol=1e-5)

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


SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.gated_delta import api, benchmark, shapes
from tests.test_gated_delta import as_arrays, inputs
mesh = jax.make_mesh(
  (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
arrays = as_arrays(inputs(24, batch=4, heads=2), np.float32)
tokens, state = P("data", None, "tensor"), P("data", "tensor")
sharded = jax.shard_map(
  api.gated_delta_rule,
  mesh=mesh,
  in_specs=(tokens,) * 5 + (state,),
  out_specs=(tokens, state),
)
alone = api.gated_delta_rule(*arrays)
for mine, theirs in zip(jax.jit(sharded)(*arrays), alone):
  assert len(mine.sharding.device_set) == 8
  np.testing.assert_allclose(mine, theirs, atol=1e-5)
"""


def test_shard_map_over_batch_and_heads():
  """On 8 virtual devices, which need a process of their own."""
  subprocess.run(
    [sys.executable, "-c", SHARDED],
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
      *as_arrays([normalise(golden["q"]), normalise(golden["k"])], np.float32),
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


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
def test_an_implementation_can_be_forced(implementation):
  arrays = as_arrays(inputs(24), jnp.float32)
  expected = numpy_rule("gated_delta", *arrays)
  o, final = api.gated_delta_rule(*arrays, implementation=implementation)
  np.testing.assert_allclose(o, expected[0], atol=1e-5)
  np.testing.assert_allclose(final, expected[1], atol=1e-5)


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="unknown implementation 'fast'"):
    api.gated_delta_rule(
      *as_arrays(inputs(4), jnp.float32), implementation="fast"
    )


def test_the_benchmark_times_every_implementation():
  rows = benchmark.benchmark(shapes.Shape(1, 5, 2, 4, 6), rounds=2)
  both = ("forward", "forward + backward")
  assert {(row[0], row[1]) for row in rows} >= {
    (name, what) for name in api.IMPLEMENTATIONS for what in both
  }
  for _, _, median, least, error in rows:
    assert 0 < least <= median and error < 1e-5
