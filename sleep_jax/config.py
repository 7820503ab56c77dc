"""Every setting of an experiment: frozen dataclasses, checked together.

`experiments/*.py` return these as a `ConfigDict`, whose leaves the command
line overrides (`--config.sleep.passes=4`); `from_config_dict` turns the result
back into an `ExperimentConfig` or reports all that is wrong with it at once.
"""

import dataclasses
import math
import re
import reprlib
from typing import Any

import ml_collections

from sleep_jax.model.update_rules import UPDATE_RULES
from sleep_jax.tasks import TASKS, TaskConfig
from sleep_jax.tasks.gsm_infinite import GsmInfiniteConfig

# Kinds of blocks: attention over the window, or over its own shorter one, or
# with norms after it and on its queries and keys, as in OLMo 2; fast weights
# with a fixed or a dynamic convolution; the latter without an MLP, inserted
# into a pretrained model, where it starts by adding nothing.
MIXERS = ("attn", "swa", "post_attn", "gdn", "jet", "inserted_jet")
ATTENTION = ("attn", "swa", "post_attn")
COMPUTE_DTYPES = ("float32", "bfloat16")
EVICTIONS = ("hard", "sliding", "none")
PORTABLE = ("chunked_xla", "reference")
MESH_AXES = ("data", "fsdp", "tensor")


def _seed(name: str, value: int):
  if not 0 <= value < 2**32:
    yield f"{name} = {value}: must be in 0..{2**32 - 1}"


def _positive(name: str, value: float):
  if not 0 < value < math.inf:
    yield f"{name} = {value}: must be positive and finite"


def _type_violations(name: str, value: Any, default: Any):
  """A leaf has the type of its default; a whole number fits an int32."""
  if isinstance(default, tuple):
    fits = isinstance(value, list | tuple)
    kinds = set(map(type, default))
    # Of other tuples their section says what they hold.
    if fits and kinds in ({int}, {str}):
      fits = set(map(type, value)) <= kinds
    wanted = f"a tuple like {default!r}"
  elif isinstance(default, float):
    fits = type(value) is float or (type(value) is int and abs(value) < 2**1023)
    wanted = "a number"
  elif type(default) is int:
    most = 2**32 if name.endswith(".seed") else 2**31
    fits = type(value) is int and abs(value) < most
    wanted = f"a whole number below {most}"
  else:
    fits = type(value) is type(default)
    wanted = "True or False" if type(default) is bool else "a text"
  if not fits:
    yield f"{name} = {reprlib.repr(value)}: must be {wanted}"


def _pattern(name: str, value: str):
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError) as error:
    yield f"{name} = {value!r}: must be a regular expression ({error})"


def _whole_numbers(values, least: int) -> bool:
  return isinstance(values, tuple) and all(
    type(value) is int and value >= least for value in values
  )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The hybrid: which blocks, and how large."""

  # Groups of (kinds of blocks, repeats); the parameters of a group's repeats
  # are stacked and scanned: ((("attn", "gdn"), 2),) is attn gdn attn gdn.
  pattern: tuple = ((("attn", "gdn"), 2),)
  # W: rows of the embedding and of the head; 0 is the tokenizer's number of
  # tokens, which a pretrained model's may exceed.
  vocab_size: int = 0
  # D: width of the residual stream.
  width: int = 64
  # Attention: query heads, and the key/value heads that they share.
  attention_heads: int = 4
  key_value_heads: int = 4
  # Biases of the projections to queries, keys and values.
  attention_bias: bool = False
  # Tokens that "swa" blocks see, the own one included, where L is more.
  sliding_window: int = 0
  # Base of the rotary positions, which restart in each window; 0 has none.
  rope_theta: float = 10_000.0
  # H, K, V of the fast weights: S is H matrices of K x V.
  fast_weight_heads: int = 2
  key_dim: int = 32
  value_dim: int = 32
  # b = beta_range x sigmoid(...): above 1 the transition I - b k k^T of S may
  # have a negative eigenvalue; above 2 S would grow without bound.
  beta_range: float = 1.0
  # How S learns: one of `model.update_rules.UPDATE_RULES`.
  update_rule: str = "gated_delta"
  # The code that computes it: "" is the best for the machine; else one of
  # `pallas_kernels.gated_delta.api.IMPLEMENTATIONS` that the rule has. With one
  # of PORTABLE attention takes no kernel either.
  implementation: str = ""
  # Taps of the causal depthwise convolution on q, k and v.
  convolution_size: int = 4
  # "jet" blocks convolve v alone, with taps that a two-layer network makes for
  # each token; its hidden width is H x V divided by this.
  generator_reduction: int = 8
  # F: width of the SwiGLU layer.
  mlp_width: int = 128
  # Added to the mean square in every RMSNorm.
  norm_eps: float = 1e-6
  # A second norm in each block, on what mixer and MLP add to h.
  sandwich_norms: bool = False
  # The final norm ends each run of the blocks, so that it stands between loops
  # and between passes, and not only before the head.
  norm_in_loop: bool = False
  # R: runs of all blocks that make one pass, each with S, keys and values of
  # its own; the model's own loops, not sleep's.
  loops: int = 1
  # A gate on each loop's h, which says how probably the model stops there.
  exit_gate: bool = False
  # The head is the embedding.
  tied_head: bool = False
  # Dtype of the activations, "float32" or "bfloat16"; parameters and S stay in
  # float32.
  compute_dtype: str = "float32"

  def violations(self):
    for name in (
      "width attention_heads key_value_heads fast_weight_heads key_dim "
      "value_dim convolution_size generator_reduction mlp_width loops"
    ).split():
      if getattr(self, name) < 1:
        yield f"model.{name} = {getattr(self, name)}: must be at least 1"
    for name in ("vocab_size", "sliding_window"):
      if getattr(self, name) < 0:
        yield f"model.{name} = {getattr(self, name)}: must be at least 0"
    if self.attention_heads > 0 and self.width % (2 * self.attention_heads):
      yield (
        f"model.width = {self.width}: must be a multiple of 2 x "
        f"model.attention_heads = {self.attention_heads} (rotary positions "
        "turn pairs)"
      )
    if self.key_value_heads > 0 and self.attention_heads % self.key_value_heads:
      yield (
        f"model.key_value_heads = {self.key_value_heads}: must divide "
        f"model.attention_heads = {self.attention_heads}"
      )
    if self.update_rule not in UPDATE_RULES:
      yield (
        f"model.update_rule = {self.update_rule!r}: one of "
        f"{sorted(UPDATE_RULES)}"
      )
    elif self.implementation not in (
      "",
      *(forms := UPDATE_RULES[self.update_rule].implementations),
    ):
      yield (
        f"model.implementation = {self.implementation!r}: "
        f"model.update_rule = {self.update_rule!r} has {forms}; '' chooses"
      )
    if self.compute_dtype not in COMPUTE_DTYPES:
      yield (
        f"model.compute_dtype = {self.compute_dtype!r}: one of {COMPUTE_DTYPES}"
      )
    yield from _positive("model.norm_eps", self.norm_eps)
    if not 0 <= self.rope_theta < math.inf:
      yield (
        f"model.rope_theta = {self.rope_theta}: must be positive and finite, "
        "or 0 for no rotary positions"
      )
    if not 0 < self.beta_range <= 2:
      yield (
        f"model.beta_range = {self.beta_range}: must be above 0 and at most 2"
      )
    try:
      fits = len(self.pattern) > 0 and all(
        isinstance(kinds, tuple)
        and len(kinds) > 0
        and set(kinds) <= set(MIXERS)
        and type(repeats) is int
        and repeats >= 1
        for kinds, repeats in self.pattern
      )
    except (TypeError, ValueError):
      fits = False
    if not fits:
      yield (
        f"model.pattern = {self.pattern!r}: must be a tuple of (kinds, "
        f"repeats) with kinds from {MIXERS} and repeats >= 1, like "
        '((("attn", "gdn"), 2),)'
      )
      return
    kinds = {kind for kinds, _ in self.pattern for kind in kinds}
    if "swa" in kinds and self.sliding_window < 1:
      yield (
        f"model.sliding_window = {self.sliding_window}: must be at least 1 for "
        "the 'swa' blocks of model.pattern"
      )
    generated = self.fast_weight_heads * self.value_dim
    if kinds & {"jet", "inserted_jet"} and self.generator_reduction > generated:
      yield (
        f"model.generator_reduction = {self.generator_reduction}: must be at "
        f"most model.fast_weight_heads x model.value_dim = {generated}"
      )

  def portable(self) -> "ModelConfig":
    """The same model without kernels, which counts the same on any machine."""
    has = UPDATE_RULES[self.update_rule].implementations
    portable = next(name for name in PORTABLE if name in has)
    return dataclasses.replace(self, implementation=portable)


@dataclasses.dataclass(frozen=True)
class SleepConfig:
  """When and how long the model sleeps (paper, Algorithm 1 and section 6.4)."""

  # N: passes over a window before it is evicted; 1 is the ordinary hybrid.
  passes: int = 2
  # L: tokens between evictions.
  window_length: int = 32
  # What leaves when a window is full: "hard", all of its tokens; "sliding", all
  # but the last L - 1, which the next window's tokens still attend to as far as
  # L - 1 back; "none", nothing: one window over the whole row, without sleep.
  eviction: str = "hard"
  # Whose keys and values the tokens kept by "sliding" carry, and whose values
  # the convolution's history: those of the "last" or the "first" pass.
  kept_pass: str = "last"
  # Start the short convolution with the tokens before the window, not at zero.
  carry_convolution: bool = False
  # Groups of model.pattern that are looped, (first, one after the last); () is
  # all. Those before and after run once for each window.
  looped_groups: tuple = ()
  # Train each batch with a number of passes drawn from 1..N.
  sampled_passes: bool = False
  # Weight of a loss after each pass, for a task that says what every place of
  # a window should then hold (`Example.pass_targets`); 0 leaves it out.
  pass_loss: float = 0.0
  # The numbers of passes that are judged; () is N alone.
  evaluation_passes: tuple = ()
  # In evaluation and sessions a row stops sleeping when a pass changes its S by
  # at most this, relative to S; 0 takes all N passes.
  tolerance: float = 0.0
  # Back-propagate through the last passes of each sleep, and through the last
  # windows of each row, alone; 0 is all of them. Keys kept by a pass that is
  # not among these (kept_pass = "first") are constants.
  gradient_passes: int = 0
  gradient_windows: int = 0
  # Keep what a pass, or a window, starts from, and compute the rest again for
  # the gradient. (Every block does so.)
  remat_passes: bool = False
  remat_windows: bool = False

  def violations(self):
    for name, least in dict(
      passes=1, window_length=1, gradient_passes=0, gradient_windows=0
    ).items():
      if getattr(self, name) < least:
        yield f"sleep.{name} = {getattr(self, name)}: must be at least {least}"
    for name, choices in dict(
      eviction=EVICTIONS, kept_pass=("last", "first")
    ).items():
      if getattr(self, name) not in choices:
        yield f"sleep.{name} = {getattr(self, name)!r}: one of {choices}"
    if self.eviction == "none" and self.passes != 1:
      yield (
        f"sleep.passes = {self.passes}: with sleep.eviction = 'none' nothing "
        "is evicted and nothing slept on; set sleep.passes to 1"
      )
    if self.eviction == "none" and (
      self.evaluation_passes or self.tolerance or self.sampled_passes
    ):
      yield (
        "sleep.eviction = 'none' never sleeps: leave sleep.evaluation_passes, "
        "sleep.tolerance and sleep.sampled_passes as they are"
      )
    if not 0 <= self.pass_loss < math.inf:
      yield (
        f"sleep.pass_loss = {self.pass_loss}: must be at least 0 and finite"
      )
    if self.pass_loss and (
      self.sampled_passes or self.gradient_passes or self.eviction == "none"
    ):
      yield (
        f"sleep.pass_loss = {self.pass_loss}: is for all N passes of a sleep; "
        "leave sleep.sampled_passes, sleep.gradient_passes and "
        "sleep.eviction = 'none' out"
      )
    if not 0 <= self.tolerance < math.inf:
      yield (
        f"sleep.tolerance = {self.tolerance}: must be at least 0 and finite"
      )
    if not _whole_numbers(self.evaluation_passes, 1) or (
      len(set(self.evaluation_passes)) < len(self.evaluation_passes)
    ):
      yield (
        f"sleep.evaluation_passes = {self.evaluation_passes!r}: must be a "
        "tuple of different numbers of passes, each at least 1, like (1, 2, 4)"
      )
    if self.looped_groups != () and not (
      _whole_numbers(self.looped_groups, 0)
      and len(self.looped_groups) == 2
      and self.looped_groups[0] < self.looped_groups[1]
    ):
      yield (
        f"sleep.looped_groups = {self.looped_groups!r}: must be () or the "
        "first looped group of model.pattern and the one after the last, like "
        "(1, 2)"
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How examples become rows of tokens."""

  # T: tokens a row, the answer marker and the answer included.
  length: int = 68
  # Start every answer at a window's start (the context is padded on its left
  # to whole windows), as Depo does; False packs rows from their start, so that
  # the last window holds what is left of the context, and the answer.
  align_answer: bool = True
  # Most places of a row with loss: an answer's tokens and the end after them.
  # Logits are made for as many places of a window; 0 makes them for all.
  answer_length: int = 0
  # Rows of a training batch, over all processes.
  batch_size: int = 64
  # "words" (the task's own symbols), "characters", or the path of a
  # tokenizer.json.
  tokenizer: str = "words"
  # A JSONL file of problems to read in place of the generator ("" = generate);
  # of the task's settings, heldout_fraction alone is then used.
  path: str = ""
  # Seed of the examples and of their order.
  seed: int = 0

  def violations(self):
    if self.batch_size < 1:
      yield f"data.batch_size = {self.batch_size}: must be at least 1"
    if self.length < 2:
      yield f"data.length = {self.length}: must be at least 2"
    if self.answer_length < 0:
      yield f"data.answer_length = {self.answer_length}: must be at least 0"
    yield from _seed("data.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Muon for matrices, AdamW for the rest, one schedule for both."""

  # Peak rates of the two groups (paper: 2e-3 from scratch, and 5e-5).
  muon_learning_rate: float = 2e-3
  adamw_learning_rate: float = 5e-5
  # Decoupled: each step takes learning rate x weight_decay off a parameter.
  weight_decay: float = 1e-4
  # Shares of the steps spent warming up (linear) and decaying (cosine).
  warmup_fraction: float = 0.005
  decay_fraction: float = 0.6
  # Largest global norm of the gradient.
  clip_norm: float = 1.0
  # Parts that a batch is cut into; their gradients are summed.
  accumulation_steps: int = 1
  # What is trained: the parameters whose path this regular expression finds,
  # as in "inserted_jet" or "^(?!embedding)"; "" is all of them.
  trainable: str = ""
  # Steps in a row that may be skipped, and counted, because their gradient is
  # not finite, before the run ends; 0 ends it at the first.
  skipped_steps: int = 0

  def violations(self):
    for name in ("muon_learning_rate", "adamw_learning_rate", "clip_norm"):
      yield from _positive(f"optimizer.{name}", getattr(self, name))
    if not 0 <= self.weight_decay < math.inf:
      yield f"optimizer.weight_decay = {self.weight_decay}: must be at least 0"
    fractions = self.warmup_fraction, self.decay_fraction
    if not (min(fractions) >= 0 and sum(fractions) <= 1):
      yield (
        f"optimizer.warmup_fraction, decay_fraction = {fractions}: must not be "
        "negative and must sum to at most 1"
      )
    yield from _pattern("optimizer.trainable", self.trainable)
    if self.skipped_steps < 0:
      yield (
        f"optimizer.skipped_steps = {self.skipped_steps}: must be at least 0"
      )
    if self.accumulation_steps < 1:
      yield (
        f"optimizer.accumulation_steps = {self.accumulation_steps}: must be at "
        "least 1"
      )


@dataclasses.dataclass(frozen=True)
class FirstStageConfig:
  """Steps in which new layers learn alone (paper, section 6.4).

  Else a pretrained model's attention leaves them nothing to do. Judging, also
  on the way, is as after this stage.
  """

  # How many of run.steps; 0 is no such stage.
  steps: int = 0
  # What learns, of that which optimizer.trainable finds.
  trainable: str = "inserted_jet"
  # In place of sleep.eviction.
  eviction: str = "hard"

  def violations(self):
    if self.steps < 0:
      yield f"first_stage.steps = {self.steps}: must be at least 0"
    yield from _pattern("first_stage.trainable", self.trainable)
    if self.eviction not in EVICTIONS[:2]:
      yield (
        f"first_stage.eviction = {self.eviction!r}: one of {EVICTIONS[:2]}"
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Over which devices a run is spread (`parallel/sharding.py`).

  A run may go on with another mesh than the one it was started with.
  """

  # Rows of a batch go over data x fsdp devices. 0: all that the others leave.
  data: int = 0
  # Parameters and optimizer state are cut into so many parts, gathered layer
  # by layer.
  fsdp: int = 1
  # Heads, fast weights and the MLP's width are cut into so many parts.
  tensor: int = 1
  # Before `sharding.RULES`: (pattern, axes) for the parameters whose path the
  # regular expression finds, an axis or None for each of the last dimensions,
  # like (("head/kernel", ("fsdp", None)),).
  rules: tuple = ()

  def violations(self):
    for name, least in dict(data=0, fsdp=1, tensor=1).items():
      if getattr(self, name) < least:
        yield f"mesh.{name} = {getattr(self, name)}: must be at least {least}"
    try:
      fits = all(
        re.compile(pattern)
        and isinstance(pattern, str)
        and isinstance(axes, tuple)
        and set(axes) <= {None, *MESH_AXES}
        and all(axes.count(axis) <= 1 for axis in MESH_AXES)
        for pattern, axes in self.rules
      )
    except (TypeError, ValueError, OverflowError, re.error):
      fits = False
    if not fits:
      yield (
        f"mesh.rules = {self.rules!r}: must be a tuple of (regular expression, "
        f"axes) with axes from {MESH_AXES}, each once, or None"
      )


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How long to train, and what to write down on the way."""

  # Optimizer steps; 0 only judges.
  steps: int = 1000
  # Seed of the initial parameters.
  seed: int = 0
  # Steps between two evaluations, checkpoints, lines of metrics.
  evaluate_every: int = 500
  checkpoint_every: int = 500
  log_every: int = 50
  # Held-out examples judged at the end; a quarter of them on the way.
  evaluation_examples: int = 2048
  # Rows of an evaluation batch.
  evaluation_batch_size: int = 256
  # Checkpoints that are kept: the last so many; all steps that are a multiple
  # of keep_every; the best of those by an evaluation's metric, the higher the
  # better, like "eval/heldout/accuracy". 0 and "" keep none for that.
  keep_last: int = 2
  keep_every: int = 0
  keep_best: str = ""
  # Write what the devices do from the first to the last of two steps, like
  # (10, 15), to the workdir's profile/, for xprof or Perfetto.
  profile_steps: tuple = ()
  # Parameters to start from: a workdir, a checkpoint or an exported folder.
  init_from: str = ""
  # Also log what each pass of a sleep does to S, and the accuracy at each of
  # sleep.evaluation_passes.
  log_passes: bool = False
  # Also write TensorBoard event files.
  tensorboard: bool = False

  def violations(self):
    for name, least in dict(
      steps=0,
      evaluate_every=1,
      checkpoint_every=1,
      log_every=1,
      evaluation_examples=1,
      evaluation_batch_size=1,
      keep_last=1,
      keep_every=0,
    ).items():
      if getattr(self, name) < least:
        yield f"run.{name} = {getattr(self, name)}: must be at least {least}"
    if self.keep_best and self.checkpoint_every % max(self.evaluate_every, 1):
      yield (
        f"run.checkpoint_every = {self.checkpoint_every}: with run.keep_best "
        "every saved step is evaluated; make it a multiple of "
        f"run.evaluate_every = {self.evaluate_every}"
      )
    if self.profile_steps != () and not (
      _whole_numbers(self.profile_steps, 1)
      and len(self.profile_steps) == 2
      and self.profile_steps[0] <= self.profile_steps[1]
    ):
      yield (
        f"run.profile_steps = {self.profile_steps!r}: must be () or the first "
        "and the last step to profile, like (10, 15)"
      )
    yield from _seed("run.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All of the above, and the task's own settings.

  Raises:
    ValueError: values are out of bounds; one line that names every violation.
  """

  task: TaskConfig = GsmInfiniteConfig()
  model: ModelConfig = ModelConfig()
  sleep: SleepConfig = SleepConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  first_stage: FirstStageConfig = FirstStageConfig()
  mesh: MeshConfig = MeshConfig()
  run: RunConfig = RunConfig()

  def __post_init__(self):
    if problems := sorted(self._violations()):
      raise ValueError("bad config: " + "; ".join(problems))

  def at_step(self, step: int) -> "ExperimentConfig":
    """The config under which an optimizer step, counted from 1, is taken."""
    first = self.first_stage
    if step > first.steps:
      return self
    optimizer = dataclasses.replace(self.optimizer, trainable=first.trainable)
    sleep = dataclasses.replace(self.sleep, eviction=first.eviction)
    return dataclasses.replace(self, optimizer=optimizer, sleep=sleep)

  def _violations(self):
    for section in (
      self.model,
      self.sleep,
      self.data,
      self.optimizer,
      self.first_stage,
      self.mesh,
      self.run,
    ):
      yield from section.violations()
    length, window = self.data.length, self.sleep.window_length
    alone = self.data.align_answer or self.sleep.pass_loss
    if alone and length <= window:
      yield (
        f"data.length = {length}: with data.align_answer or sleep.pass_loss at "
        f"least one whole window of sleep.window_length = {window} must fit "
        f"before the answer; set data.length above {window}"
      )
    looped, groups = self.sleep.looped_groups, len(self.model.pattern)
    if looped and _whole_numbers(looped, 0) and looped[-1] > groups:
      yield (
        f"sleep.looped_groups = {looped}: model.pattern has {groups} groups"
      )
    for name in "attention_heads key_value_heads fast_weight_heads".split():
      heads = getattr(self.model, name)
      if self.mesh.tensor > 0 and heads % self.mesh.tensor:
        yield (
          f"mesh.tensor = {self.mesh.tensor}: must divide model.{name} = "
          f"{heads}"
        )
    if self.model.loops > 1 and looped not in ((), (0, groups)):
      yield (
        f"sleep.looped_groups = {looped}: with model.loops = "
        f"{self.model.loops} all groups are looped; set it to ()"
      )
    if self.first_stage.steps > self.run.steps > 0:
      yield (
        f"first_stage.steps = {self.first_stage.steps}: must be at most "
        f"run.steps = {self.run.steps}"
      )
    if self.first_stage.steps and self.sleep.eviction == "none":
      yield (
        f"first_stage.steps = {self.first_stage.steps}: with sleep.eviction = "
        "'none' there is one window; set it to 0"
      )
    parts = self.optimizer.accumulation_steps
    if parts > 0 and self.data.batch_size % parts:
      yield (
        f"data.batch_size = {self.data.batch_size}: must be a multiple of "
        f"optimizer.accumulation_steps = {parts}"
      )


# But for the task's, which its name tells.
SECTIONS = {
  "model": ModelConfig,
  "sleep": SleepConfig,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "first_stage": FirstStageConfig,
  "mesh": MeshConfig,
  "run": RunConfig,
}


def _with_tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _with_tuples(leaf) for name, leaf in value.items()}
  if isinstance(value, list | tuple):
    return tuple(map(_with_tuples, value))
  return value


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The same settings as a `ConfigDict`, open to overrides of equal type."""
  return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(config: Any) -> ExperimentConfig:
  """The checked `ExperimentConfig` of a `ConfigDict` or nested dict.

  Lists count as tuples, so that what config.json holds can be read back.

  Raises:
    ValueError: unknown or missing leaves, or values out of bounds; one line
      that names every violation.
  """
  try:
    return _from_dict(
      config.to_dict() if hasattr(config, "to_dict") else config
    )
  except RecursionError as error:
    raise ValueError("bad config: a value is nested too deeply") from error


def completed(config: Any) -> Any:
  """What a config.json holds, with the leaves that it lacks at their defaults.

  It may have been written before there were these: a new leaf's default is what
  was done without it.
  """
  if not isinstance(config, dict):
    return config
  task = config.get("task")
  kind = TASKS.get(str(task.get("name"))) if isinstance(task, dict) else None
  classes = SECTIONS | ({"task": kind.config} if kind else {})
  defaults = {
    name: dataclasses.asdict(make()) for name, make in classes.items()
  }
  return {
    name: defaults.get(name, {}) | section
    if isinstance(section := config.get(name, {}), dict)
    else section
    for name in config.keys() | defaults.keys()
  }


def _from_dict(config: Any) -> ExperimentConfig:
  if not isinstance(config, dict):
    raise ValueError(f"bad config: {reprlib.repr(config)}: must have sections")
  for name, section in config.items():
    if not isinstance(section, dict):
      raise ValueError(
        f"bad config: {name} = {reprlib.repr(section)}: must be a section"
      )
  task_name = config.get("task", {}).get("name")
  if str(task_name) not in TASKS:
    raise ValueError(
      f"bad config: task.name = {task_name!r}: one of {sorted(TASKS)}"
    )
  classes = {"task": TASKS[task_name].config, **SECTIONS}
  problems = [f"unknown section {x!r}" for x in config.keys() - classes.keys()]
  problems += [f"missing section {x!r}" for x in classes.keys() - config.keys()]
  sections: dict[str, Any] = {}
  for name, section_class in classes.items():
    given = config.get(name, {})
    leaves = {x.name: x.default for x in dataclasses.fields(section_class)}
    before = len(problems)
    problems += [
      f"unknown leaf {name}.{x}" for x in given.keys() - leaves.keys()
    ]
    problems += [
      f"missing leaf {name}.{x}" for x in leaves.keys() - given.keys()
    ]
    for x in leaves.keys() & given.keys():
      problems += _type_violations(f"{name}.{x}", given[x], leaves[x])
    if len(problems) == before:
      values: dict[str, Any] = {
        x: float(value) if type(leaves[x]) is float else _with_tuples(value)
        for x, value in given.items()
      }
      try:
        sections[name] = section_class(**values)
      except ValueError as error:  # a task's settings check themselves
        problems += str(error).splitlines()
  if not problems:
    return ExperimentConfig(**sections)
  raise ValueError("bad config: " + "; ".join(sorted(problems)))
