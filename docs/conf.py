"""Settings of Sphinx, which builds these pages: `make docs`."""

from tmpq_exp import __version__

project = "tmpq_exp"
copyright = "the authors of tmpq_exp, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tmpq_exp {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them
suppress_warnings = ["myst.header"]  # the README's first level is the page's title

autodoc_typehints = "description"  # types stand in annotations only
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Class attributes", "params_style")]
