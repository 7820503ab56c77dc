"""Problems in files, checked from their tokens alone.

A line is one JSON object with the fields of the original's samples: `ids` are
bos, the edges (two names each, after a 9700 each if `params` has a true
`separator`), and the queries (9000 + k, a name, the marker
9500, a name); `loss_mask` is 1 on markers and answers. `params`: N, K, M, the
names' mini_vocab, min_tlen and max_tlen, and QA, true where n must be N.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from sleep_jax.tasks import problem_files

_HOPS, _MARKER, _SEPARATOR = 9000, 9500, 9700
# Of params that the original leaves out: those that its functions default to.
_DEFAULTS = dict(M=10, mini_vocab=3, min_tlen=5, max_tlen=7)


class Wrong(ValueError):
  """A problem is not as it says, or not as its params say."""


def read_records(path: str | pathlib.Path) -> Iterator[tuple[int, dict]]:
  """(number of the line, its fields); blank lines are passed over.

  Raises:
    ValueError: the file has no problem, or a line is no such object; names
      file and line.
    OSError: the file cannot be read.
  """
  return problem_files.read_lines(path, _numbered)


def _numbered(line: str, number: int) -> tuple[int, dict]:
  fields = json.loads(line)
  _check_types(fields)
  return number, fields


def _check_types(fields: Any) -> None:
  if not isinstance(fields, dict):
    raise ValueError("not a JSON object")

  def check(where, names, fits, kind):
    for name in names.split():
      if not fits(where.get(name)):
        raise ValueError(f"field {name!r} is missing or no {kind}")

  def is_list(value):
    return isinstance(value, list) and all(type(x) is int for x in value)

  check(fields, "params", lambda x: isinstance(x, dict), "object")
  check(fields, "ids loss_mask", is_list, "list of integers")
  check(fields, "bos n_nodes edges_tokens qa_tokens", _is_int, "integer")
  check(fields["params"], "N K", _is_int, "integer")
  for name, default in _DEFAULTS.items():
    if type(fields["params"].setdefault(name, default)) is not int:
      raise ValueError(f"params: {name!r} is no integer")
  if type(fields["params"].setdefault("separator", False)) is not bool:
    raise ValueError("params: 'separator' is neither true nor false")
  queries = fields.get("queries")
  if not isinstance(queries, list) or not all(
    isinstance(query, dict) for query in queries
  ):
    raise ValueError("field 'queries' is missing or no list of objects")
  for query in queries:
    check(query, "k pos ans_pos", _is_int, "integer")
    check(query, "query answer", is_list, "list of integers")


def _is_int(value: Any) -> bool:
  return type(value) is int


def check(record: dict) -> None:
  """Checks one problem of `read_records`.

  Raises:
    Wrong: says what is not right first.
  """
  ids, params = record["ids"], record["params"]
  _equal("ids[0], the bos", ids[0] if ids else None, record["bos"])
  names, place = [], 1
  while place < len(ids) and not _HOPS < ids[place] < _MARKER:
    if params["separator"] and len(names) % 2 == 0:
      if ids[place] != _SEPARATOR:
        raise Wrong(f"token {place}: no separator before an edge")
      place += 1
    name = _name(ids, place, params)
    names.append(name)
    place += len(name)
  _equal("tokens of the edges", place - 1, record["edges_tokens"])
  _equal("tokens of the queries", len(ids) - place, record["qa_tokens"])
  following = _cycle(names)
  nodes, most = len(following), params["N"]
  _equal("nodes", nodes, record["n_nodes"])
  if not 3 <= nodes <= most or (params.get("QA") and nodes < most):
    raise Wrong(f"{nodes} nodes with N = {most}")

  asked, mask = [], [0] * len(ids)
  while place < len(ids):
    query = _query(ids, place, params)
    start, answer, at = query["query"], query["answer"], query["ans_pos"]
    if tuple(start) not in following:
      raise Wrong(f"token {place}: {start} is asked for, and is no node")
    node = tuple(start)
    for _ in range(query["k"] % nodes):
      node = following[node]
    if node != tuple(answer):
      raise Wrong(
        f"token {at}: {query['k']} hops from {start} are {list(node)}, not "
        f"{answer}"
      )
    place = at + 1 + len(answer)
    mask[at:place] = [1] * (place - at)
    asked.append(query)
  _equal("queries", len(asked), min(nodes, params["M"]))
  if len({tuple(query["query"]) for query in asked}) < len(asked):
    raise Wrong("a node is asked about twice")
  _equal("queries stated", len(record["queries"]), len(asked))
  for i, (stated, query) in enumerate(
    zip(record["queries"], asked, strict=True)
  ):
    _equal(f"query {i}", {name: stated[name] for name in query}, query)
  _equal("length of loss_mask", len(record["loss_mask"]), len(ids))
  for i, pair in enumerate(zip(record["loss_mask"], mask, strict=True)):
    _equal(f"loss_mask[{i}]", *pair)


def _equal(what: str, found: object, expected: object) -> None:
  if found != expected:
    raise Wrong(f"{what}: {found}, not {expected}")


def _name(ids: Sequence[int], place: int, params: dict) -> tuple[int, ...]:
  """The name that starts at a place: it ends with the first token above V."""
  size = params["mini_vocab"]
  stop = place
  while stop < len(ids) and 1 <= ids[stop] <= size:
    stop += 1
  if stop == len(ids) or not size < ids[stop] <= 2 * size:
    raise Wrong(f"token {stop}: the name from token {place} on does not end")
  name = tuple(ids[place : stop + 1])
  if not params["min_tlen"] <= len(name) <= params["max_tlen"]:
    raise Wrong(f"token {place}: a name of {len(name)} tokens")
  return name


def _cycle(names: Sequence[tuple]) -> dict[tuple, tuple]:
  """The successor of each node, given (node, successor) pairs in a row."""
  if len(names) % 2 or not names:
    raise Wrong(f"{len(names)} names make no edges")
  following = dict(zip(names[::2], names[1::2], strict=True))
  if len(following) < len(names) // 2:
    raise Wrong("two edges leave one node")
  node, seen = names[0], set()
  while node in following and node not in seen:
    seen.add(node)
    node = following[node]
  if node != names[0] or len(seen) < len(following):
    raise Wrong("the edges are not one cycle")
  return following


def _query(ids: Sequence[int], place: int, params: dict) -> dict[str, Any]:
  """The query that starts at a place, as `queries` states one."""
  k = ids[place] - _HOPS
  if not 1 <= k <= params["K"]:
    raise Wrong(f"token {place}: {ids[place]} is no query of 1..K hops")
  start = _name(ids, place + 1, params)
  at = place + 1 + len(start)
  if at == len(ids) or ids[at] != _MARKER:
    raise Wrong(f"token {at}: no answer marker")
  answer = _name(ids, at + 1, params)
  return dict(k=k, query=[*start], answer=[*answer], pos=place, ans_pos=at)
