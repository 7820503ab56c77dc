"""Wake-time inference: tokens stream in, and full windows are slept on.

A `Session` says which model under which sleep; what it has seen is a `State`,
a value that goes in and comes out. Its size does not depend on how much that
was.

  session = Session(model, sleep_config)
  state = session.start(batch_size)
  state = session.feed(params, state, tokens)
  answer, lengths, state = session.generate(params, state, max_tokens=8)

A row sleeps lazily: when its window is full and one more token arrives. Being
awake was a first pass over the window, whose S answered; the sleep starts
again from the S of the window's start, as in the rollout.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.array_types import Counts, Mask, Rows, Tokens, by_name
from sleep_jax.config import SleepConfig
from sleep_jax.model import layers
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.model.places import EMPTY, KeyValueCache, Places, init_cache
from sleep_jax.rollout import Memory, init_memory, run_window
from sleep_jax.sleep import row_norm, sleep_until

# N is a traced number up to this, so that changing it compiles nothing.
MOST_PASSES = 64


class State(NamedTuple):
  """What a batch of sequences has seen; rows have boundaries of their own.

  Attributes:
    tokens: of the current window, from its start; later places hold what was
      there before [B, L].
    length: how many of them count [B].
    start: `rollout.Memory` at the window's start.
    fast_weights: S after the tokens so far, as `init_fast_weights`.
    cache: keys and values of the window, and under sliding eviction before them
      those kept from the last one; histories of convolutions.
    logits: of the token to come [B, W]; 0 before the first.
    fed: tokens since the session's start [B].
    sleeps: since then [B].
    passes: of the last sleep [B].
    moved: |S - S'| / |S| of the last sleep, S' before it and S after it [B].
  """

  tokens: jax.Array
  length: jax.Array
  start: Memory
  fast_weights: Any
  cache: Any
  logits: jax.Array
  fed: jax.Array
  sleeps: jax.Array
  passes: jax.Array
  moved: jax.Array


@dataclasses.dataclass(frozen=True)
class Session:
  """Pure functions over a `State`, compiled once for each shape.

  And once more with a tolerance; numbers of passes compile nothing. Token
  arrays are padded to powers of two in T before they are compiled for.
  With `config.eviction` "none" nothing sleeps, and L is all that fits.

  Arguments that several methods have:
    params: the model's parameters.
    state: is left as it was, also by an error.
    passes: N of the sleeps that begin in this call; None is `config.passes`.
    tolerance: of these sleeps, in place of `config.tolerance`; positive.

  Every method raises a ValueError, before anything is computed, for arguments
  that are out of bounds, and for a state of another model.
  """

  model: HybridLM
  config: SleepConfig

  def start(self, batch_size: int) -> State:
    """The state of `batch_size` sequences that have seen nothing."""
    if batch_size < 1:
      raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    memory = init_memory(self.model, batch_size, self.config)
    length = self.config.window_length
    slots = length + (0 if memory.cached is None else length)
    _, dtype = layers.dtypes(self.model.config)
    counts = jnp.zeros(batch_size, jnp.int32)
    return State(
      tokens=jnp.zeros((batch_size, length), jnp.int32),
      length=counts,
      start=memory,
      fast_weights=memory.state,
      cache=init_cache(self.model.config, batch_size, slots, history=True),
      logits=jnp.zeros((batch_size, self.model.vocabulary_size), dtype),
      fed=counts,
      sleeps=counts,
      passes=counts,
      moved=jnp.zeros(batch_size, dtype),
    )

  def feed(
    self, params, state: Any, tokens, lengths=None, passes=None, tolerance=None
  ) -> State:
    """The state after more tokens, however they are cut into calls.

    Args:
      tokens: ids [B, T].
      lengths: how many of a row's T count, from its start [B]; None is all.

    A window's worth of tokens is one call of the blocks.
    """
    batch = self.check_state(state)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != batch:
      raise ValueError(
        f"tokens have shape {list(tokens.shape)}, but the session has a batch "
        f"of {batch}: give [{batch}, T], or start another session"
      )
    size = tokens.shape[1]
    if lengths is None:
      lengths = np.full(batch, size)
    lengths = np.asarray(lengths)
    if (
      lengths.shape != (batch,)
      or lengths.dtype.kind not in "iu"
      or not np.all((0 <= lengths) & (lengths <= size))
    ):
      raise ValueError(
        f"lengths = {lengths.tolist()}: must be {batch} whole numbers in "
        f"0..{size}"
      )
    if not lengths.any():
      raise ValueError("an empty feed: give at least one token")
    counted = np.arange(size)[None] < lengths[:, None]
    wrong = tokens[counted]
    if tokens.dtype.kind in "iu":
      wrong = wrong[(wrong < 0) | (wrong >= self.model.vocabulary_size)]
    if wrong.size:
      raise ValueError(
        f"a token is {wrong[0].item()}: must be a whole number in 0.."
        f"{self.model.vocabulary_size - 1}, the vocabulary"
      )
    self._check_room(state, lengths)
    padded = np.zeros((batch, _power_of_two(size)), np.int32)
    padded[:, :size] = np.where(counted, tokens, 0)
    knobs = self._knobs(passes, tolerance)
    return self._feed(params, state, padded, lengths.astype(np.int32), *knobs)

  def sleep(self, params, state: Any, passes=None, tolerance=None) -> State:
    """The state after a sleep at once, of every row whose window holds a token.

    A window that is not full sleeps as one padded on its left. So does a row's
    first window where answers start a window (`data.align_answer`). In later
    ones the padding stands between the window and what is kept of the last:
    sliding eviction and a carried convolution see that, S does not.
    """
    self.check_state(state)
    if self.config.eviction == "none":
      raise ValueError(
        "sleep.eviction = 'none' never sleeps: set it to 'hard' or 'sliding'"
      )
    return self.sleep_now(params, state, *self._knobs(passes, tolerance))

  def generate(
    self,
    params,
    state: Any,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: int | None = None,
    key=None,
    passes=None,
    tolerance=None,
  ) -> tuple[np.ndarray, np.ndarray, State]:
    """(tokens [B, max_tokens], lengths [B], state after feeding these tokens).

    Args:
      max_tokens: at least 1. What a row leaves unused is 0.
      temperature: 0 takes the likeliest token.
      top_k: draw from this many likeliest tokens; None is all.
      stop: a row ends with this token; None is no such token.
      key: a `jax.random.key`, or one for each row [B], for temperatures above
        0. A row's draws depend on its key and on how many tokens it was fed,
        not on how they are cut into calls.

    A window that holds answers was trained awake: `passes` = 1 sleeps on it as
    the rollout does.
    """
    batch = self.check_state(state)
    vocabulary = self.model.vocabulary_size
    if not _whole(max_tokens) or max_tokens < 1:
      raise ValueError(
        f"max_tokens = {max_tokens!r}: must be a whole number of at least 1"
      )
    if not 0 <= temperature < np.inf:
      raise ValueError(
        f"temperature = {temperature}: must be at least 0 and finite"
      )
    if top_k is not None and not (_whole(top_k) and 1 <= top_k <= vocabulary):
      raise ValueError(
        f"top_k = {top_k}: must be in 1..{vocabulary}, or None for all"
      )
    if stop is not None and not (_whole(stop) and 0 <= stop < vocabulary):
      raise ValueError(
        f"stop = {stop}: must be in 0..{vocabulary - 1}, or None for no token"
      )
    if temperature > 0 and not _is_key(key, batch):
      raise ValueError(
        f"temperature = {temperature} draws tokens: give a key, as "
        f"jax.random.key(0), or {batch} of them"
      )
    if not np.all(state.fed):
      raise ValueError(
        "a row has been fed no token, and there is nothing to go on from: "
        "feed each row at least one"
      )
    self._check_room(state, np.full(batch, max_tokens))
    tokens, lengths, state = self._generate(
      params,
      state,
      _power_of_two(max_tokens),
      np.int32(max_tokens),
      np.float32(temperature),
      np.int32(vocabulary if top_k is None else top_k),
      np.int32(-1 if stop is None else stop),
      jax.random.key(0) if key is None else key,
      *self._knobs(passes, tolerance),
    )
    return np.asarray(tokens)[:, :max_tokens], np.asarray(lengths), state

  # What is compiled.

  @functools.partial(jax.jit, static_argnums=0)
  def _feed(self, params, state, tokens: Tokens, lengths: Counts, *knobs):
    """Window by window: rows that are full sleep, then all fill theirs."""
    window_length = self.config.window_length
    batch, size = tokens.shape
    here = jnp.arange(min(size, window_length))[None]

    def segment(loop):
      state, done = loop
      left = lengths - done
      full = (state.length == window_length) & (left > 0)
      state = self._sleep(params, state, full, *knobs)
      taken = jnp.minimum(left, window_length - state.length)
      taken = jnp.minimum(taken, here.size)
      index = jnp.minimum(done[:, None] + here, size - 1)
      piece = jnp.take_along_axis(tokens, index, axis=1)
      state = self.read(params, state, piece, here < taken[:, None])
      return state, done + taken

    none = jnp.zeros(batch, jnp.int32)
    return jax.lax.while_loop(
      lambda loop: jnp.any(loop[1] < lengths), segment, (state, none)
    )[0]

  @functools.partial(jax.jit, static_argnums=0)
  def sleep_now(self, params, state, *knobs):
    return self._sleep(params, state, state.length > 0, *knobs)

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def _generate(
    self, params, state, size, limit, temperature, top_k, stop, key, *knobs
  ):
    batch = state.length.size
    keys = key
    if key.ndim == 0:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def draw(logits, fed):
      least = jnp.sort(logits, axis=1)[:, logits.shape[1] - top_k]
      logits = jnp.where(logits >= least[:, None], logits, -jnp.inf)
      drawn = jax.vmap(jax.random.categorical)(
        jax.vmap(jax.random.fold_in)(keys, fed),
        logits / temperature.astype(logits.dtype),
      )
      return drawn.astype(jnp.int32)

    def likeliest(logits, _):
      return jnp.argmax(logits, axis=1).astype(jnp.int32)

    def decode(loop):
      state, tokens, active, n = loop
      token = jax.lax.cond(
        temperature > 0, draw, likeliest, state.logits, state.fed
      )
      token = jnp.where(active, token, 0)
      state = self.read(params, state, token[:, None], active[:, None])
      active = active & (token != stop) & (n + 1 < limit)
      return state, tokens.at[:, n].set(token), active, n + 1

    def unfinished(loop):
      _, _, active, _ = loop
      return jnp.any(active)

    def full(loop):
      state, _, active, _ = loop
      return active & (state.length == self.config.window_length)

    def until_full(loop):
      # Not at each token: what a sleep may replace would be copied then.
      state, *rest = loop
      state = self._sleep(params, state, full(loop), *knobs)
      return jax.lax.while_loop(
        lambda loop: unfinished(loop) & ~jnp.any(full(loop)),
        decode,
        (state, *rest),
      )

    tokens = jnp.zeros((batch, size), jnp.int32)
    active, n = jnp.ones(batch, bool), jnp.zeros((), jnp.int32)
    after, tokens, _, _ = jax.lax.while_loop(
      unfinished, until_full, (state, tokens, active, n)
    )
    return tokens, after.fed - state.fed, after

  @jax.named_scope("wake")
  def read(self, params, state: State, tokens: Tokens, valid: Mask) -> State:
    """One pass over tokens that fit their rows' windows, padding at the end."""
    window_length = self.config.window_length
    position = state.length[:, None] + jnp.arange(tokens.shape[1])[None]
    slot = jnp.arange(window_length)[None]
    cached = jnp.where(slot < state.length[:, None], slot, EMPTY)
    if state.start.cached is not None:
      cached = jnp.concatenate([state.start.cached, cached], axis=1)
    slots = cached.shape[1]
    places = Places(
      valid,
      position,
      cached,
      jnp.where(valid, slots - window_length + position, slots),
      window_length,
    )
    apply: Any = functools.partial(self.model.apply, {"params": params})
    h = apply(tokens, method="embed")
    h, fast_weights, cache = apply(
      h, state.fast_weights, state.cache, places, method="blocks"
    )
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    h = jnp.take_along_axis(h, last, axis=1)
    logits = apply(h, method="logits")[:, 0]
    row = jnp.arange(tokens.shape[0])[:, None]
    place = jnp.where(valid, position, window_length)
    return state._replace(
      tokens=state.tokens.at[row, place].set(tokens, mode="drop"),
      length=state.length + count,
      fast_weights=fast_weights,
      cache=cache,
      logits=jnp.where((count > 0)[:, None], logits, state.logits),
      fed=state.fed + count,
    )

  @jax.named_scope("sleep")
  def _sleep(self, params, state: State, rows: Rows, passes, tolerance):
    """The state after a sleep of some rows, which may be none."""
    if self.config.eviction == "none":
      return state

    def asleep(state):
      place = jnp.arange(self.config.window_length)[None]
      place = place - (self.config.window_length - state.length)[:, None]
      tokens = jnp.take_along_axis(state.tokens, jnp.maximum(place, 0), axis=1)
      _, memory, slept = run_window(
        self.model,
        params,
        tokens,
        state.start,
        (place >= 0) & rows[:, None],
        jnp.where(rows, passes, 0),
        self._most_passes,
        self.config,
        functools.partial(sleep_until, tolerance=tolerance, watch=False),
      )
      before = state.start.state
      norm = row_norm(memory.state, rows.size)
      step = row_norm(
        jax.tree.map(jnp.subtract, memory.state, before), rows.size
      )
      after = state._replace(
        length=jnp.zeros_like(state.length),
        start=memory,
        fast_weights=memory.state,
        cache=_woken(state.cache, memory.cache),
        sleeps=state.sleeps + 1,
        passes=slept.passes,
        moved=(step / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)).astype(
          state.moved.dtype
        ),
      )
      return _choose(rows, after, state)

    return jax.lax.cond(jnp.any(rows), asleep, lambda state: state, state)

  # What is checked.

  @property
  def _most_passes(self) -> int:
    return max(MOST_PASSES, self.config.passes)

  def check_passes(self, passes: int) -> None:
    """ValueError for numbers of passes that a sleep cannot take."""
    if not _whole(passes) or not 1 <= passes <= self._most_passes:
      raise ValueError(
        f"passes = {passes!r}: must be a whole number in 1.."
        f"{self._most_passes}; a sleep takes at least one pass"
      )

  def _knobs(self, passes, tolerance):
    passes = self.config.passes if passes is None else passes
    self.check_passes(passes)
    if tolerance is None:
      # Not a traced zero: what takes all passes may be one kernel.
      tolerance = self.config.tolerance or None
    elif not 0 < tolerance < np.inf:
      raise ValueError(
        f"tolerance = {tolerance}: must be positive and finite; leave it out "
        "to take all passes"
      )
    return np.int32(passes), tolerance and np.float32(tolerance)

  def check_state(self, state: Any) -> int:
    """The batch size of a state of this session; else ValueError."""
    if not isinstance(state, State):
      raise ValueError(
        f"the state is a {type(state).__name__}: give what start, feed, "
        "generate or load returned"
      )
    batch = np.shape(state.tokens)[0]
    like = by_name(shapes(self, batch))
    mine = by_name(state)
    for name in sorted(like | mine):
      was, wanted = (
        f"{x[name].dtype}{list(x[name].shape)}" if name in x else "absent"
        for x in (mine, like)
      )
      if was != wanted:
        raise ValueError(
          f"the state is of another model or window: {name} is {was}, this "
          f"session's is {wanted}; start another session"
        )
    return batch

  def _check_room(self, state, counts):
    """ValueError where nothing is evicted and not everything fits."""
    if self.config.eviction != "none":
      return
    room = self.config.window_length - np.asarray(state.length)
    if np.any(counts > room):
      raise ValueError(
        f"{counts.max()} more tokens, but sleep.eviction = 'none' holds "
        f"sleep.window_length = {self.config.window_length} and there is room "
        f"for {room.min()}: set it higher, or let the model sleep"
      )


def _woken(cache, kept):
  """The cache at a window's start, from the one at its end.

  Slots of the window itself need no clearing: no position says that they hold
  anything.
  """

  def of_block(old, kept):
    if isinstance(old, KeyValueCache):
      if kept is None:
        return old
      return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, 0, 2), old, kept
      )
    return jnp.zeros_like(old) if kept is None else kept

  return jax.tree.map(
    of_block, cache, kept, is_leaf=lambda x: isinstance(x, KeyValueCache)
  )


def _choose(rows: Rows, new: State, old: State) -> State:
  """The state with some rows new."""

  def of_leaf(path, new, old):
    # Arrays of blocks are [R, B, ...], all others [B, ...].
    blocks = any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
    shape = [1] * old.ndim
    shape[int(blocks)] = rows.size
    return jnp.where(rows.reshape(shape), new, old)

  return jax.tree.map_with_path(of_leaf, new, old)


@functools.lru_cache
def shapes(session: Session, batch_size: int) -> State:
  """The state's arrays as `jax.ShapeDtypeStruct`s."""
  return jax.eval_shape(lambda: session.start(batch_size))


def _whole(value) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_key(key, batch: int) -> bool:
  """Whether it is one of `jax.random.key`, or one for each row."""
  return (
    isinstance(key, jax.Array)
    and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    and key.shape in ((), (batch,))
  )


def _power_of_two(size: int) -> int:
  """The least one that is not below `size`."""
  return 1 << (size - 1).bit_length()
