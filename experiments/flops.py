"""Training FLOPs of a config and of its baselines.

  python -m experiments.flops --config=experiments/automaton.py

Overrides count: the baselines printed are those of the config after them.
"""

from absl import app, flags

from experiments import main


def table(config) -> str:
  """A Markdown table of sizes and FLOPs; the ratio is to the config's own.

  Raises:
    ValueError: a baseline cannot be made, or there are no steps.
  """
  from sleep_jax.baselines import BASELINES, training_flops

  names = "blocks width MLP N steps FLOPs/step FLOPs ratio".split()
  rows = [["", *names], ["---", *("---:" for _ in names)]]
  target = training_flops(config)
  for name, baseline in {"itself": lambda x: x, **BASELINES}.items():
    variant = baseline(config)
    model, flops = variant.model, training_flops(variant)
    rows.append(
      [
        name,
        sum(len(kinds) * repeats for kinds, repeats in model.pattern),
        model.width,
        model.mlp_width,
        variant.sleep.passes,
        variant.run.steps,
        f"{flops / variant.run.steps:.4g}",
        f"{flops:.4g}",
        f"{flops / target:.4f}",
      ]
    )
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def run(_):
  from sleep_jax.config import from_config_dict

  try:
    print(table(from_config_dict(flags.FLAGS.config)))
  except (ValueError, OSError) as error:
    main.fail(error)


if __name__ == "__main__":
  app.run(run, flags_parser=main.parse)
