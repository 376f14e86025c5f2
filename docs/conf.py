"""Configuration of the documentation: ``python -m sphinx -W -b html docs docs/_build/html``."""

import re
from collections.abc import Iterator

from phenoseq import __version__

project = "phenoseq"
author = "The phenoseq developers"
copyright = "The phenoseq developers"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"phenoseq {__version__}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Cells run at every build, since a cache knows the cells but not the package: what a page shows is
# what this version does. They run in a folder that is thrown away.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables

# Every name of phenoseq that a page or a docstring refers to must be documented.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!phenoseq\b).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
default_role = "py:obj"

napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
napoleon_custom_sections = ["Returns"]  # prose, where napoleon would take each line for a type


def setup(app) -> None:
    app.connect("autodoc-process-docstring", split_names, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", short_arrays)


def split_names(app, what, name, obj, options, lines: list[str]) -> None:
    """Give each of ``a, b`` in Attributes and Raises its own entry, as Parameters does."""
    lines[:] = _split(lines)


def _split(lines: list[str]) -> Iterator[str]:
    section = ""
    for place, line in enumerate(lines):
        if set(line) == {"-"}:
            section = lines[place - 1]
        listed = re.fullmatch(r"\w+(, \w+)+", line)
        if not listed or section not in ("Attributes", "Raises"):
            yield line
            continue
        rest = lines[place + 1 :]
        stop = next((i for i, text in enumerate(rest) if text and text[0] != " "), len(rest))
        *others, last = line.split(", ")
        for one in others:
            yield from (one, *rest[:stop])
        yield last


def short_arrays(app, what, name, obj, options, signature, returns):
    """Write ``NDArray[...]`` for what it stands for."""
    module = r"~?(?:\w+\.)*"
    long = rf"{module}ndarray\[tuple\[{module}Any, \.\.\.\], {module}dtype\[({module}\w+)\]\]"
    return tuple(text and re.sub(long, r"NDArray[\1]", text) for text in (signature, returns))
