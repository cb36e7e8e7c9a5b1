"""Build the book as static pages: `python tools/make_site.py [FOLDER]` (default out/site); chapters are not executed.

Notebooks are copied with the outputs that are committed, without the lines that only speak to tools; each module gets
a page of reference from its signatures, docstrings and comments beside the parameters. A warning of Sphinx is an error,
and every link inside of the site is followed.
"""
import ast
import inspect
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from fastcore.docments import docments
from nb import read
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
ROW = re.compile(r'^\| *(?P<part>[^|]*?) *\| *(?:\[(?P<title>[^]]*)\]\((?P<name>\w+)\.ipynb\))?', re.M)


def module_of(notebook):
    "The module that a notebook exports, or None."
    for cell in notebook['cells']:
        if found := re.match(r'#\| *default_exp +(\w+)', ''.join(cell['source'])): return found[1]


def parts(index):
    "{part: {chapter: title}} as the map on the start page has them."
    found, part = {}, ''
    for row in ROW.finditer('\n'.join(''.join(c['source']) for c in index['cells'])):
        part = row['part'] or part
        if row['name']: found.setdefault(part, {})[row['name']] = row['title']
    return found


def toctree(caption, titles):
    lines = [f'{title} <{name}>' for name, title in titles.items()]
    return '\n'.join([f'```{{toctree}}\n:caption: {caption}\n:hidden:\n', *lines, '```\n'])


def page(path, tail=''):
    "A notebook for readers: what only speaks to tools is gone, and `tail` stands at its end."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = DIRECTIVE.sub('', cell.source).strip('\n')
    nb.cells = [c for c in nb.cells if c.source or c.get('outputs')] + [nbformat.v4.new_markdown_cell(tail)]*bool(tail)
    nb.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
    return nbformat.writes(nb)


def comments(thing):
    "{parameter: its comment} and what is said of the result."
    try: found = {k: (v or {}).get('docment') for k, v in docments(thing, full=True).items()}
    except (TypeError, ValueError, OSError, SyntaxError): return {}, None
    returned = found.pop('return', None)
    return {k: ' '.join(v.split()) for k, v in found.items() if v}, returned


def indented(lines): return ['    ' + line if line else '' for line in lines]


def entry(kind, name, module, signature, thing, members=()):
    "A function, class or method as reStructuredText."
    said, returned = comments(thing)
    body = [escape(inspect.cleandoc(thing.__doc__ or '')), '', *(f':param {k}: {escape(v)}' for k, v in said.items())]
    if returned: body.append(f':returns: {escape(returned)}')
    head = [f'.. py:{kind}:: {name}{signature}', *([f'    :module: {module}'] if module else []), '']
    return head + indented('\n'.join(body).splitlines() + [''] + [line for m in members for line in m]) + ['']


def escape(text):
    "Plain words with `code` in them, as reStructuredText."
    words = re.split(r'`([^`]+)`', text)
    plain = lambda t: re.sub(r'([*`|_\\])', r'\\\1', t)
    return ''.join(f'\\ ``{w}``\\ ' if k % 2 else plain(w) for k, w in enumerate(words))


class InFull(ast.NodeTransformer):
    "The book's own classes by their full names, since several chapters have a `Report`."
    def __init__(self, module): self.module = module

    def visit_Name(self, node):
        home = getattr(getattr(self.module, node.id, None), '__module__', '') or ''
        return ast.Name(f'{home}.{node.id}') if home.startswith('cnnbook.') else node


def annotation(node, module): return ast.unparse(InFull(module).visit(node)) if node else ''


def signature(node, module):
    "What stands between the brackets in the source, without `self`."
    args = node.args
    if args.args and args.args[0].arg in ('self', 'cls'): args.args.pop(0)
    for a in (*args.posonlyargs, *args.args, *args.kwonlyargs):
        if a.annotation: a.annotation = InFull(module).visit(a.annotation)
    returns = f' -> {annotation(node.returns, module)}' if node.returns else ''
    return f'({" ".join(ast.unparse(args).split())}){returns}'


def of_class(node, thing, module):
    "(signature, methods) of a class: those of its public methods that have a docstring."
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    init = signature(methods['__init__'], module) if '__init__' in methods else ''
    if not init and hasattr(thing, '__dataclass_fields__'):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        value = lambda n: f' = {ast.unparse(n.value)}' if n.value else ''
        init = f"({', '.join(f'{n.target.id}: {annotation(n.annotation, module)}{value(n)}' for n in fields)})"
    public = [n for name, n in methods.items() if name[0] != '_' and ast.get_docstring(n)]
    kind = lambda n: 'property' if any(getattr(d, 'id', '') == 'property' for d in n.decorator_list) else 'method'
    text = lambda n: '' if kind(n) == 'property' else signature(n, module)
    raw = lambda n: getattr(inspect.getattr_static(thing, n.name), 'fget', None) or getattr(thing, n.name)
    return init, [entry(kind(n), n.name, None, text(n), raw(n)) for n in public]


def reference(name, chapter):
    "The page of a module: what it exports, in the order of its chapter; checks of exercises are left out."
    module = import_module(f'cnnbook.{name}')
    tree = ast.parse(inspect.getsource(module))
    title = f'cnnbook.{name}'
    lines = [title, '='*len(title), '', escape(module.__doc__ or ''), '', f'Chapter: :doc:`/{chapter}`', '']
    for node in tree.body:
        if getattr(node, 'name', '_')[0] == '_' or node.name.startswith('check_') or node.name not in module.__all__:
            continue
        thing = getattr(module, node.name)
        if isinstance(node, ast.ClassDef):
            init, methods = of_class(node, thing, module)
            lines += entry('class', node.name, title, init, thing, methods)
        elif isinstance(node, ast.FunctionDef):
            lines += entry('function', node.name, title, signature(node, module), thing)
    own = {n.name for n in tree.body if hasattr(n, 'name')}
    again = [n for n in module.__all__ if n not in own and not n.isupper()]
    homes = {n: getattr(getattr(module, n), '__module__', '') for n in again}
    if again: lines += ['Offered from here as well', '-'*25, '']
    lines += [f'- :py:obj:`{n} <{home}.{n}>`' for n, home in homes.items() if home.startswith('cnnbook.')]
    return '\n'.join(lines) + '\n'


def lay_out(source):
    "Write the pages that Sphinx reads."
    (source/'api').mkdir(parents=True)
    index = read(ROOT/'nbs'/'index.ipynb')
    chapters, modules = parts(index), {}
    for name in [n for names in chapters.values() for n in names] + ['index']:
        path = ROOT/'nbs'/f'{name}.ipynb'
        if module := module_of(read(path)): modules[module] = name
        tail = f'Reference: [`cnnbook.{module}`](api/{module}.rst)' if module else ''
        if name == 'index':
            tail = '\n'.join([toctree(p, names) for p, names in chapters.items()]
                             + [toctree('Reference', {f'api/{m}': m for m in sorted(modules)})])
        (source/f'{name}.ipynb').write_text(page(path, tail))
    for module, chapter in modules.items(): (source/'api'/f'{module}.rst').write_text(reference(module, chapter))


class Links(HTMLParser):
    "Every `href` and `src` of a page, and every place in it that can be linked to."
    def __init__(self, path):
        super().__init__()
        self.links, self.fetched, self.places = [], [], {''}
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[k] for k in ('id', 'name') if found.get(k)}
        self.links += [found[k] for k in ('href', 'src') if found.get(k)]
        fetched = found.get('src') or (tag == 'link' and found.get('href')) or ''
        if urlsplit(fetched).netloc: self.fetched.append(fetched)


def broken(site):
    "Links that lead nowhere, and whatever a page would fetch from the net."
    pages, lost = {p: Links(p) for p in site.rglob('*.html')}, []
    for path, found in pages.items():
        lost += [(path.name, f'needs the net: {link}') for link in found.fetched]
        for link in found.links:
            to = urlsplit(link)
            if to.scheme or to.netloc: continue
            target = (path.parent/unquote(to.path)).resolve() if to.path else path
            if target.is_dir(): target /= 'index.html'
            known = pages[target].places if target in pages else {'', unquote(to.fragment)}
            if not target.exists() or unquote(to.fragment) not in known: lost.append((path.name, link))
    return lost, len(pages), sum(len(p.links) for p in pages.values())


def main(out='out/site'):
    site = Path(out).resolve()
    source = site.parent/f'{site.name}-source'
    for folder in (source, site): shutil.rmtree(folder, ignore_errors=True)
    lay_out(source)
    code = build_main(['-q', '-W', '--keep-going', '-j', '2', '-c', str(ROOT/'tools'/'site'),
                       '-d', str(source/'.doctrees'), str(source), str(site)])
    if code: return code
    lost, pages, links = broken(site)
    for name, link in lost: print(f'{name}: {link}')
    print(f'{pages} pages, {links} links, {len(lost)} broken: {site}/index.html')
    return int(bool(lost))


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
