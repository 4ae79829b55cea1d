"""Sphinx: `make docs` builds this folder into build/docs, and a warning is an error. It needs no network."""

import fused_rnn

project = "fused_rnn"
author = "the authors of fused_rnn"
release = fused_rnn.__version__
html_title = f"fused_rnn {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
smartquotes_action = "D"  # dashes alone, for h' and "tanh" are code
myst_heading_anchors = 3  # links to a heading of another page: page.md#heading

# The API page: what the docstrings say, in the order in which the page names it.
autodoc_class_signature = "mixed"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Inputs", "params_style")]

# Every reference of ours must lead somewhere. Those into torch and Python cannot be looked up without a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|pathlib|typing|types)(\..*)?"),
    ("py:class", r"fused_rnn\.(convert|quantize)\.(M|Patch)"),
    ("py:class", r"fused_rnn\.flex\.compile\.Shape"),
    ("py:class", r"fused_rnn\.cells\.(descriptor\.Cell|program\.Program)"),
]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
highlight_language = "none"  # what names no language is a command line or a formula
html_theme_options = {"navigation_with_keys": True}
