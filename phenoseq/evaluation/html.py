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


def write_html(path: Path, page: str, title: str, data: Mapping[str, Any]) -> None:
    """Write a page of this package, whole or not at all.

    Parameters
    ----------
    path
        The file.
    page
        Its name: ``NAME.html`` is put into ``shell.html``, and ``NAME.js`` after ``tools.js``.
    title
        Plain text.
    data
        For the script, as plain JSON; what is not a number becomes null.
    """
    own = files("phenoseq.evaluation")
    text = json.dumps(plain(data), allow_nan=False)
    whole = string.Template(own.joinpath("shell.html").read_text()).substitute(
        title=html.escape(title),
        style=own.joinpath("shell.css").read_text(),
        body=own.joinpath(f"{page}.html").read_text(),
        data=text.replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        tools=own.joinpath("tools.js").read_text(),
        script=own.joinpath(f"{page}.js").read_text(),
    )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(whole, encoding="utf-8")
    partial.replace(path)
