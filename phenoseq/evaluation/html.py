"""One file of HTML that opens offline, with data, style and script inside."""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from phenoseq.evaluation.report import plain


def write_html(path: Path, template: str, title: str, data: Mapping[str, Any]) -> None:
    """Fill a template of this package and write it, whole or not at all.

    Parameters
    ----------
    path
        The file.
    template
        Its name; ``$title``, ``$style``, ``$data``, ``$plotly`` and ``$tools`` are filled in.
    title
        Plain text.
    data
        For the page's script, as plain JSON; what is not a number becomes null.
    """
    own = files("phenoseq.evaluation")
    text = json.dumps(plain(data), allow_nan=False)
    page = string.Template(own.joinpath(template).read_text()).substitute(
        title=html.escape(title),
        style=own.joinpath("page.css").read_text(),
        data=text.replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        tools=own.joinpath("page.js").read_text(),
    )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
