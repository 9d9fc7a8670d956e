"""Writes docs/api.md, what programs that import us may use, from signatures and docstrings: python docs/make_api.py."""

import ast
import importlib
import inspect
import pathlib
import textwrap

PAGE = pathlib.Path(__file__).parent / "api.md"
PUBLIC = {
  "adco_jax": ["load_encoder", "LoadedEncoder", "train", "ConfigError", "RunError", "Preempted"],
  "adco_jax.config.config_files": ["load", "names"],
  "adco_jax.objectives.base": [
    "Objective",
    "Base",
    "Variables",
    "Rows",
    "Embeddings",
    "Context",
    "Written",
  ],
  "adco_jax.config.plan": ["Phase", "Sizes"],
  "adco_jax.data.sources.base": ["Source"],
  "adco_jax.evaluation.knn": ["predict"],
  "adco_jax.tasks.replay": ["replay"],
}
HEAD = """# What programs may import

Made from the docstrings by `python docs/make_api.py`. Names that are not here may move. Arrays are named after their axes:
B batch, V views, H W image, F features, D embedding, K rows of a bank, N images.
"""


def page():
  """The whole of it."""
  parts = [HEAD]
  for module, names in PUBLIC.items():
    held = importlib.import_module(module)
    parts.append(f"\n## {module}\n")
    parts += [entry(name, getattr(held, name)) for name in names]
  return "".join(parts)


def entry(name, thing):
  """One class or function, with its own public methods."""
  lines = [f"\n### {name}\n\n", *text(name, thing)]
  if inspect.isclass(thing):
    for method, value in vars(thing).items():
      if inspect.isfunction(value) and not method.startswith("_") and value.__doc__:
        lines += [f"\n`.{method}{signature(value)}`\n\n", f"{inspect.getdoc(value)}\n"]
  return "".join(lines)


def text(name, thing):
  """Signature and docstring."""
  if inspect.isfunction(thing):
    yield f"`{name}{signature(thing)}`\n\n"
  yield f"{inspect.getdoc(thing)}\n"


def signature(function):
  """As it is written, without self."""
  written = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
  written.args.args = [a for a in written.args.args if a.arg != "self"]
  result = f" -> {ast.unparse(written.returns)}" if written.returns else ""
  return f"({ast.unparse(written.args)}){result}"


if __name__ == "__main__":
  PAGE.write_text(page())
