"""Settings of the website. `scripts/build_site.py` writes the source folder and builds it with these."""

from scripts.repository import BLOB

project = "kvlab"
author = "the authors of kvlab"
copyright = "the authors of kvlab, MIT licence"
html_title = "kvlab"
language = "en"

extensions = ["myst_nb", "scripts.site_extension"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns: list[str] = []

# Notebooks show their stored outputs. Nothing is executed here, and widgets are stills: no JavaScript of theirs.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

# The documents are written for GitHub: its anchors of headings, and none of the syntax that only MyST has.
myst_heading_anchors = 6
myst_disable_syntax = ["myst_role", "myst_line_comment", "myst_block_break", "myst_target"]
myst_enable_extensions = ["strikethrough"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["kvlab.css"]
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_theme_options = {
    "source_view_link": f"{BLOB}{{filename}}",
    "top_of_page_buttons": ["view"],
}
highlight_language = "none"  # of a block that names no language; else Sphinx tries Python
smartquotes = False  # "--" is an option, and not a dash
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
