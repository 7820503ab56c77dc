"""The library's attention kernels against a softmax written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.model import attention
from sleep_jax.model.places import EMPTY, KeyValueCache, window

BATCH, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 3, 4, 2, 128


def make(kept, length, window_length):
  """(q, k, v, places): rows padded on the left, on the right, and not kept."""
  rng = np.random.default_rng(0)

  def normal(tokens, heads):
    return rng.normal(size=(BATCH, tokens, heads, HEAD_DIM))

  valid = np.ones((BATCH, length), bool)
  valid[0, :7] = valid[1, -9:] = False
  cached = None
  if kept:
    there = np.ones((BATCH, kept), bool)
    there[0, :20] = there[2] = False
    cached = jnp.where(there, np.arange(-kept, 0), EMPTY)
  seen = kept + length
  return (
    normal(length, HEADS),
    normal(seen, KEY_VALUE_HEADS),
    normal(seen, KEY_VALUE_HEADS),
    window(jnp.asarray(valid), window_length, cached),
  )


def numpy_attention(q, k, v, places):
  """Row by row and token by token, in float64; 0 where nothing is seen."""
  out = np.zeros(q.shape)
  at, seen_at = np.asarray(places.position), np.asarray(places.seen_positions)
  for b, t, h in np.ndindex(q.shape[:3]):
    distance = at[0, t] - seen_at[b]
    near = (0 <= distance) & (distance < places.window_length)
    group = h // (HEADS // KEY_VALUE_HEADS)
    if near.any():
      logits = k[b, near, group] @ q[b, t, h] / np.sqrt(HEAD_DIM)
      weights = np.exp(logits - logits.max())
      out[b, t, h] = weights @ v[b, near, group] / weights.sum()
  return out


@pytest.mark.slow
@pytest.mark.parametrize(
  "kept, length, window_length",
  [(0, 200, 200), (200, 200, 200), (200, 150, 200)],
)
def test_splash_attention_and_its_gradient(kept, length, window_length):
  """Hard eviction, sliding, and a last window that is shorter; padding."""
  q, k, v, places = make(kept, length, window_length)
  valid = np.asarray(places.valid)[..., None, None]
  rng = np.random.default_rng(1)
  cotangent = valid * rng.normal(size=q.shape)

  def run(function, dtype, *arrays):
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    y, vjp = jax.vjp(function, *arrays)
    return y, vjp(jnp.asarray(cotangent, dtype))

  def splash(q, k, v):
    seen = places.seen_positions > EMPTY
    return attention.splash(
      *(q, k, v, places.valid, seen, window_length, 128), interpret=True
    )

  y, gradients = jax.jit(lambda *x: run(splash, jnp.float32, *x))(q, k, v)
  np.testing.assert_allclose(
    valid * y, valid * numpy_attention(q, k, v, places), atol=1e-5
  )
  with jax.enable_x64(True):
    _, expected = run(
      lambda *x: attention.plain(*x, attention._near(places)),
      *(jnp.float64, q, k, v),
    )
  for mine, theirs in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=3e-5)


def test_a_kernel_serves_long_windows_of_its_device(monkeypatch):
  """Elsewhere, and where tokens stand in slots, plain attention runs."""
  monkeypatch.setattr(attention, "KERNEL_LENGTH", 128)
  monkeypatch.setattr(attention, "splash", lambda q, *_, **__: "splash")
  monkeypatch.setattr(attention, "cudnn", lambda q, *_: "cudnn")
  monkeypatch.setattr(attention, "plain", lambda *_: "plain")

  def chosen(platform="tpu", here=True, dtype=jnp.bfloat16, length=128, **new):
    monkeypatch.setattr(attention, "target", lambda: (platform, "", here))
    q, k, v, places = make(0, length, length)
    return attention.attend(
      jnp.asarray(q, dtype), KeyValueCache(k, v), places.replace(**new)
    )

  assert chosen() == chosen(here=False) == "splash"
  assert chosen("gpu") == "cudnn"
  assert chosen("gpu", here=False) == chosen("cpu") == "plain"
  assert chosen(length=127) == chosen(dtype=jnp.float32) == "plain"
  slots = jnp.zeros((BATCH, 128), jnp.int32)
  cached = jnp.zeros((BATCH, 128), jnp.int32)
  assert chosen(slots=slots, cached=cached) == "plain"
