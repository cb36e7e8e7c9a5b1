"How Sphinx builds the pages that make_site.py lays out; nothing here or in the pages asks the net for anything."
from importlib.metadata import version as version_of

from docutils import nodes
from latex2mathml.converter import convert

project, author, copyright = 'cnnbook', 'the authors of cnnbook', 'the authors of cnnbook, Apache-2.0'
version = release = version_of('cnnbook')
extensions = ['myst_nb']
myst_enable_extensions = ['dollarmath', 'attrs_block']
myst_dmath_allow_digits = myst_dmath_allow_space = False    # `$5 and $6` is money, as in JupyterLab
myst_heading_anchors = 4
nb_execution_mode = 'off'                # the pages show the outputs that are committed
nb_ipywidgets_js = {}                    # a page has no kernel: its still figures stand in
nb_merge_streams = True
html_theme = 'furo'
html_title = 'cnnbook'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_copy_source, html_show_sphinx = False, False
html_theme_options = {'navigation_with_keys': True}
html_math_renderer = 'mathml'
smartquotes = False                      # a quote in a docstring is a character that one types
add_module_names = False
python_use_unqualified_type_names = True


def mathml(visitor, node):
    "TeX as MathML, which browsers draw by themselves: no script, no font to fetch."
    block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display='block' if block else 'inline')
    visitor.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (mathml, None), (mathml, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
