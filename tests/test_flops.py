"""The counter against algebra: products, loops, gradients, kernels, a step."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.gated_delta import api, pallas_gpu, pallas_tpu
from sleep_jax.baselines import train_step_flops
from sleep_jax.config import (
  DataConfig,
  ExperimentConfig,
  ModelConfig,
  SleepConfig,
)
from sleep_jax.flops import Flops, count_flops

VOCABULARY = 11


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = array(8, 16), array(16, 16)
XW = 2 * 8 * 16 * 16


@pytest.mark.parametrize(
  "function, arguments, products, others",
  [
    (jnp.dot, (X, W), XW, 0),
    (lambda x, y: jnp.einsum("bik,bjk->bij", x, y), (array(3, 4, 5),) * 2)
    + (2 * 3 * 4 * 4 * 5, 0),
    # 6 places of 7 channels, each from a 3 x 5 kernel.
    (
      lambda x, k: lax.conv_general_dilated(
        x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
      ),
      (array(1, 8, 5), array(3, 5, 7)),
      2 * 6 * 7 * 3 * 5,
      0,
    ),
    # Depthwise: 5 channels, each from its own 3 taps.
    (
      lambda x, k: lax.conv_general_dilated(
        x,
        k,
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=5,
      ),
      (array(1, 8, 5), array(3, 1, 5)),
      2 * 6 * 5 * 3,
      0,
    ),
    (lambda x: jnp.sum(jnp.exp(x) * x), (X,), 0, 3 * 128),
    (lambda x: x.T.reshape(4, 32)[:, ::2].astype(jnp.bfloat16), (X,), 0, 0),
    # 16 sums, and 2 operations that turn a negative index.
    (lambda x, i: x.at[i].add(1.0), (X, 3), 0, 16 + 2),
  ],
)
def test_arithmetic(function, arguments, products, others):
  assert count_flops(function, *arguments) == Flops(products, others)


def test_loops_count_their_trips():
  def chain(x, w, trips):
    return lax.scan(lambda x, _: (x @ w, None), x, None, length=trips)[0]

  def nested(x, w):
    return lax.fori_loop(0, 5, lambda _, x: chain(x, w, 3), x)

  assert count_flops(lambda x, w: chain(x, w, 7), X, W) == Flops(7 * XW)
  assert count_flops(nested, X, W).products == 15 * XW
  assert count_flops(jax.jit(nested), X, W).products == 15 * XW


def test_a_while_loop_is_named():
  with pytest.raises(ValueError, match=r"test_flops.py:\d+.*lax.scan"):
    count_flops(
      lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x), X
    )


def test_a_while_loop_counts_as_often_as_told():
  def doubled(x):
    return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  found = count_flops(doubled, W, unknown_trips=3)
  assert found.products == 3 * 2 * 16**3


def test_what_no_table_has_is_named():
  with pytest.raises(ValueError, match="primitive 'sort'.*flops.py"):
    count_flops(jnp.sort, X)


def test_a_cond_counts_its_most_expensive_branch():
  def branches(x, w, chosen):
    return lax.switch(chosen, [lambda: x, lambda: x @ w, lambda: x @ w @ w])

  assert count_flops(branches, X, W, 0).products == 2 * XW


def test_gradients_of_a_linear_layer_cost_three_forward_passes():
  def loss(x, w):
    return jnp.sum(jnp.sin(x @ w))

  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  assert count_flops(gradient, X, W).products == 3 * XW


def test_what_is_recomputed_counts_again():
  """Two layers: 2 products forward, 1 again (the inner one), 4 backward."""

  def layers(x, v, w):
    return jnp.sin(x @ v) @ w

  def products(function):
    def loss(*arguments):
      return jnp.sum(jnp.sin(function(*arguments)))

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return count_flops(gradient, X, W, W).products

  assert products(layers) == 6 * XW
  assert products(jax.checkpoint(layers)) == 7 * XW


def test_a_custom_gradient_counts_as_it_is_written():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, dy: (dy @ kept[1].T @ kept[1].T, kept[1]),
  )
  assert count_flops(product, X, W).products == XW
  gradient = jax.value_and_grad(lambda x, w: jnp.sum(product(x, w)))
  assert count_flops(gradient, X, W).products == 3 * XW


def test_a_shard_map_counts_all_devices():
  mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
  rows = PartitionSpec("data")

  def sharded(x, w):
    return jax.shard_map(
      jnp.dot,
      mesh=mesh,
      in_specs=(rows, PartitionSpec()),
      out_specs=rows,
      axis_names={"data"},
    )(x, w)

  assert count_flops(jax.jit(sharded), X, W).products == XW


@pytest.mark.parametrize("estimate", [None, 12_345])
def test_a_kernel_says_itself_what_it_costs(estimate):
  def kernel(x, y):
    y[...] = 2 * x[...]

  call = pl.pallas_call(
    kernel,
    out_shape=X,
    name="doubling",
    cost_estimate=estimate and pl.CostEstimate(estimate, 0, 0),
  )
  if estimate:
    assert count_flops(call, X) == Flops(products=estimate)
  else:
    with pytest.raises(ValueError, match="kernel 'doubling'.*cost_estimate"):
      count_flops(call, X)


def rule_arguments(batch, length, heads=2, key_dim=64, value_dim=64):
  keys = array(batch, length, heads, key_dim)
  values = array(batch, length, heads, value_dim)
  gates = array(batch, length, heads)
  return (
    keys,
    keys,
    values,
    gates,
    gates,
    array(batch, heads, key_dim, value_dim),
  )


def test_the_gated_delta_kernel_costs_about_what_its_portable_form_does():
  def products(rule, batch):
    def total(*arguments):
      o, state = rule(*arguments)
      return jnp.sum(o) + jnp.sum(state)

    arguments = rule_arguments(batch, 32)
    gradient = jax.value_and_grad(total, argnums=tuple(range(6)))
    return count_flops(gradient, *arguments).products

  kernel = products(pallas_tpu.gated_delta_rule, 4)
  portable = products(
    functools.partial(api.gated_delta_rule, implementation="chunked_xla"), 4
  )
  assert products(pallas_tpu.gated_delta_rule, 8) == 2 * kernel
  assert 0.5 < kernel / portable < 2


def test_a_step_counts_the_same_whatever_kernel_the_machine_has(monkeypatch):
  def fail(*_):
    raise AssertionError("the machine was asked")

  monkeypatch.setattr(api, "choose", fail)
  assert train_step_flops(config(("gdn",), 2, repeats=1), VOCABULARY).total > 0
  with pytest.raises(AssertionError, match="was asked"):  # nothing stays
    count_flops(api.gated_delta_rule, *rule_arguments(1, 8))


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 12), reason="the kernel has an estimate"
)
def test_a_kernel_without_an_estimate_stops_the_count():
  with pytest.raises(ValueError, match="gated_delta_forward"):
    count_flops(pallas_gpu.gated_delta_rule, *rule_arguments(1, 64))


def config(kinds, passes, repeats=2, length=26, window_length=8, **model):
  return ExperimentConfig(
    model=ModelConfig(
      pattern=((kinds, repeats),),
      width=16,
      attention_heads=2,
      key_value_heads=1,
      fast_weight_heads=3,
      key_dim=4,
      value_dim=8,
      mlp_width=24,
      **model,
    ),
    sleep=SleepConfig(passes=passes, window_length=window_length),
    data=DataConfig(length=length, batch_size=6, align_answer=False),
  )


# Of `config`: width, key/value width of attention, heads x K, heads x V, F.
D, G, HK, HV, F = 16, 8, 12, 24, 24
ATTENTION = 2 * D * D + 2 * D * G
GATED_DELTA = 2 * D * HK + 3 * D * HV + 2 * D * 3
MLP_IN, MLP_OUT = 2 * D * F, F * D


def trained(tokens, weights):
  """Linear layers in a rematerialised block: forward twice, backward twice.

  The MLP's last product is the one that no gradient needs again.
  """
  return 2 * tokens * (4 * (weights + MLP_IN) + 3 * MLP_OUT)


def attended(rows, length):
  """q k^T and weights v over whole squares: the mask saves nothing."""
  return 8 * 2 * rows * D * length**2


def newton_schulz(rows, columns):
  """Five steps of A = X X^T, B = b A + c A A, X = a X + B X."""
  short, long = sorted((rows, columns))
  return 5 * (2 * 2 * short**2 * long + 2 * short**3)


def test_a_plain_transformer_costs_what_hand_algebra_says():
  """One window, no scan longer than the layers': every product of a step."""
  tokens, layers = 6 * 8, 2
  counted = train_step_flops(config(("attn",), 1, length=8), VOCABULARY)
  head = 3 * 2 * tokens * D * VOCABULARY
  muon = (
    2 * newton_schulz(D, D) + 2 * newton_schulz(D, G) + 3 * newton_schulz(D, F)
  )
  assert counted.products == head + layers * (
    trained(tokens, ATTENTION) + attended(6, 8) + muon
  )
  assert 0 < counted.others < counted.products


def test_flops_grow_with_passes_as_algebra_says():
  """Exactly affine; the slope is one more pass over three windows of 8."""
  counted = [
    train_step_flops(config(("attn", "gdn"), passes), VOCABULARY)
    for passes in (1, 2, 3, 4)
  ]
  steps = [
    (after.products - before.products, after.others - before.others)
    for before, after in zip(counted[:-1], counted[1:], strict=True)
  ]
  assert steps[0] == steps[1] == steps[2]
  # The rule alone: forward twice, backward once, in one chunk a window.
  arguments = rule_arguments(6, 8, heads=3, key_dim=4, value_dim=8)

  def forward_and_backward(*arguments):
    out, backward = jax.vjp(api.gated_delta_rule, *arguments)
    return backward(out)

  rule = (
    count_flops(api.gated_delta_rule, *arguments).products
    + count_flops(forward_and_backward, *arguments).products
  )
  tokens, windows, repeats = 6 * 8, 3, 2
  slope = (
    windows
    * repeats
    * (
      trained(tokens, ATTENTION)
      + attended(6, 8)
      + trained(tokens, GATED_DELTA)
      + rule
    )
  )
  assert steps[0][0] == slope
  assert steps[0][1] > 0
