"""Self-contained HTML pages: one file with its pictures inside.

Flow: report and inspect_data put their sections together with `write_page`.
Not here: what the sections say.
"""

import base64
import html
import os
from collections.abc import Iterable

from adco_jax.runtime.files import write_text

WIDE = 704  # pixels, 44rem: pictures of more show things too small to be made smaller

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
table { border-collapse: collapse; display: block; overflow-x: auto } th, td { padding: .25rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr { border-top: 1px solid #ddd }
figure { margin: 1rem 0 } figcaption, .small { color: #555; font-size: .92rem } .small { margin: .3rem 0 }
img { max-width: 100%; height: auto } .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem }
.wide { overflow-x: auto } .wide img { min-width: 44rem }
.warning { border-left: .3rem solid #c60; padding-left: .7rem }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; font-size: .88rem } }
details { margin-top: 2rem } code { font-size: .85rem }
"""


def write_page(path: str, name: str, sections: Iterable[str]) -> None:
  """Writes the sections that are not empty, whole or not at all."""
  title, body = html.escape(name), "\n".join(section for section in sections if section)
  page = (
    f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'><title>{title}</title><style>{STYLE}</style>"
    f"<h1>adco_jax: {title}</h1>\n{body}</html>\n"
  )
  write_text(path, page)


def picture(path: str, title: str, caption: str) -> str:
  """A PNG under a heading, or nothing if it is not there."""
  if not os.path.exists(path):
    return ""
  with open(path, "rb") as file:
    png = file.read()
  wide = int.from_bytes(png[16:20], "big") >= WIDE
  return f"<h2>{title}</h2>{figure(png, 'image/png', title, caption, wide)}"


def figure(data: bytes, kind: str, alt: str, caption: str, wide: bool = False) -> str:
  """An image of MIME type `kind` from its bytes; a `wide` one is moved sideways on a narrow screen, not made smaller."""
  code = base64.b64encode(data).decode()
  image = f"<img alt='{alt}' src='data:{kind};base64,{code}'>"
  image = f"<div class=wide>{image}</div>" if wide else image
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
