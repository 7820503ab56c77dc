"""Talks to a trained model: `python -m experiments.chat --workdir=RUN`.

What is typed is read token by token into the model's window; a line tells when
the model slept on a full one, and how far its fast weights moved. `/ask` puts
the answer marker and prints what the model then writes. It reads commands from
stdin, so a file of them can be piped in.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

from absl import app, flags

from experiments import main as command

_HELP = """\
TEXT            read a text
/tokens 3 4 5   read token ids
/ask [TEXT]     read the text, put the answer marker, and answer; where
                questions are read awake (Depo), the text is the question
/sleep          sleep now, on a window that is not full
/passes N       passes of the sleeps to come
/save FILE      keep what was read so far
/load FILE      go on from there
/new            forget everything
/help, /quit"""

_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from the likeliest k")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "longest answer")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")


def load_run(workdir: Path):
  """(config, model, parameters, tokenizer, example) of a run's folder.

  A run that only judged has no parameters of its own, but those of its
  `run.init_from`.

  Raises:
    ValueError: it is not the folder of a run with parameters.
  """
  from sleep_jax.config import completed, from_config_dict
  from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
  from sleep_jax.model.hybrid_lm import HybridLM
  from sleep_jax.training import checkpoints
  from sleep_jax.training.step import init_params

  try:
    text = (workdir / "config.json").read_text()
    config = from_config_dict(completed(json.loads(text)))
  except OSError as error:
    raise ValueError(
      f"{workdir}/config.json cannot be read ({error.strerror}): give the "
      "--workdir of a run"
    ) from error
  task, tokenizer = task_and_tokenizer(config)
  model = HybridLM(config.model, vocabulary_size(config, tokenizer))
  source = workdir
  if config.run.init_from and not checkpoints.is_started(workdir):
    source = config.run.init_from
  params = checkpoints.restore_params(source, init_params(model, 0))
  example = task.example(task.eval_splits[0], 0)
  return config, model, params, tokenizer, example


class Chat:
  """One sequence, and the commands on it; each returns the lines to print.

  The example shows how the task asks, and how its answers end.
  """

  def __init__(
    self, config, model, params, tokenizer, example, max_tokens, **generation
  ):
    from sleep_jax.session import Session

    sleep = config.sleep
    if sleep.eviction == "none":  # one window over the whole row
      room = config.data.length + max_tokens
      sleep = dataclasses.replace(sleep, window_length=room)
    self._session = Session(model, sleep)
    # Answers start a window, or follow the context in its last one.
    self._sleeps_before_answers = (
      config.data.align_answer and config.sleep.eviction != "none"
    )
    self._params, self._tokenizer = params, tokenizer
    self._max_tokens, self._generation = max_tokens, generation
    self._has_prompts = any(question.prompt for question in example.questions)
    self._stops = {
      *(i for end in example.answer_ends for i in tokenizer.encode(end)),
      tokenizer.end_id,
    }
    # Whether the window is one of answers, in which one more may be asked.
    self._answers = False
    self._passes = config.sleep.passes
    self._state = self._session.start(1)

  def run(self, line: str) -> list[str]:
    """What a line of input does.

    Raises:
      ValueError, OSError: it cannot be done; nothing has changed.
    """
    before = self._state, self._answers
    try:
      return self._do(line)
    except (ValueError, OSError):
      self._state, self._answers = before
      raise

  def _do(self, line):
    from sleep_jax import session_files

    command, _, rest = line.strip().partition(" ")
    if not command.startswith("/"):
      return self._read(self._tokenizer.encode(line.strip()))
    if command == "/tokens":
      return self._read([_whole(x, "a token id") for x in rest.split()])
    if command == "/ask":
      return self._ask(self._tokenizer.encode(rest) if rest else [])
    if command == "/sleep":
      return self._sleep()
    if command == "/passes":
      self._session.check_passes(passes := _whole(rest, "a number of passes"))
      self._passes = passes
      return [f"passes of the sleeps to come: {passes}"]
    if command == "/save":
      session_files.save(_file(rest), self._session, self._params, self._state)
      return [f"saved: {Path(rest).stat().st_size} bytes"]
    if command == "/load":
      self._state = session_files.load(_file(rest), self._session, self._params)
      self._answers = False
      return [self._place()]
    if command == "/new":
      self._state = self._session.start(1)
      return [self._place()]
    if command == "/help":
      return _HELP.splitlines()
    raise ValueError(f"unknown command {command}: /help names them all")

  def _read(self, ids) -> list[str]:
    """Reads tokens a window at a time, so that no sleep goes unseen."""
    if not ids:
      raise ValueError("nothing to read: type a text, or /help")
    self._answers = False
    lines, size = [], self._session.config.window_length
    for start in range(0, len(ids), size):
      state = self._session.feed(
        self._params,
        self._state,
        [ids[start : start + size]],
        passes=self._passes,
      )
      lines += self._slept(state)
      self._state = state
    return [*lines, self._place()]

  def _sleep(self) -> list[str]:
    state = self._session.sleep(self._params, self._state, passes=self._passes)
    lines = self._slept(state)
    self._state = state
    return lines or ["nothing to sleep on"]

  def _ask(self, ids) -> list[str]:
    lines, prompt = [], []
    if self._has_prompts:
      ids, prompt = [], ids
    if self._sleeps_before_answers:
      # A row that starts here is padded on its left to whole windows.
      first = len(ids) % self._session.config.window_length
      if first and not int(self._state.fed[0]):
        lines += [*self._read(ids[:first])[:-1], *self._sleep()]
        ids = ids[first:]
    if ids:
      lines += self._read(ids)[:-1]
    # A full window of context sleeps as the marker arrives.
    if (
      self._sleeps_before_answers
      and int(self._state.length[0])
      and not (self._has_prompts and self._answers)
    ):
      lines += self._sleep()
    lines += self._read([*prompt, self._tokenizer.marker_id])[:-1]
    answer, state = [], self._state
    while len(answer) < self._max_tokens and not self._stops & {*answer}:
      tokens, _, state = self._session.generate(
        self._params,
        state,
        max_tokens=1,
        # A window with an answer in it was trained awake.
        passes=1,
        **self._generation,
      )
      answer += tokens[0].tolist()
    lines += self._slept(state)
    self._state, self._answers = state, True
    return [*lines, f"answer: {self._tokenizer.decode(answer)}", self._place()]

  def _slept(self, state) -> list[str]:
    """A line where the state has slept since the present one."""
    times = int(state.sleeps[0] - self._state.sleeps[0])
    if not times:
      return []
    count = "" if times == 1 else f" {times} times, the last time"
    passes = int(state.passes[0])
    return [
      f"slept{count} with {passes} pass{'es' if passes > 1 else ''}: S moved "
      f"by {100 * float(state.moved[0]):.1f}% of its norm"
    ]

  def _place(self) -> str:
    state = self._state
    return (
      f"window {int(state.length[0])}/{state.tokens.shape[1]}, "
      f"{int(state.fed[0])} tokens read, {int(state.sleeps[0])} sleeps"
    )


def _whole(text: str, what: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise ValueError(f"{text!r} is not {what}: give a whole number") from None


def _file(text: str) -> str:
  if not text:
    raise ValueError("the file is missing: give its name")
  return text


def main(_):
  import jax

  if command.WORKDIR.value is None:
    command.fail("give --workdir=RUN, the folder of a finished run")
  try:
    chat = Chat(
      *load_run(Path(command.WORKDIR.value)),
      max_tokens=_MAX_TOKENS.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      key=jax.random.key(_SEED.value),
    )
  except ValueError as error:
    command.fail(error)
  prompt = "> " if sys.stdin.isatty() else ""
  print("a text to read, /ask, or /help", flush=True)
  while True:
    try:
      line = input(prompt)
    except (EOFError, KeyboardInterrupt):
      return
    if line.strip() in ("/quit", "/exit"):
      return
    try:
      lines = chat.run(line) if line.strip() else []
    except (ValueError, OSError) as error:
      lines = [f"error: {error}"]
    print("\n".join(lines), end="\n" if lines else "", flush=True)


if __name__ == "__main__":
  app.run(
    main, flags_parser=functools.partial(command.parse, needs_config=False)
  )
