"""The rules that keep chapters honest: each function takes the root of a checkout and yields one line per breach."""
import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from nb import code_cells, digest, directives, read, source

FLAGS = {'slow', 'cuda', 'network'}
KNOWN = FLAGS | {'default_exp', 'export', 'exercise'}
GUARD = {'slow': 'if full_run()', 'cuda': 'if torch.cuda.is_available()', 'network': 'if '}
MAX_BYTES = 300*1024


def chapters(root):
    "Notebooks in the order in which they may import: index, then by number."
    return sorted((root/'nbs').glob('*.ipynb'), key=lambda p: (p.stem != 'index', p.stem))


def module(nb):
    names = [m[1] for c in code_cells(nb) if (m := re.match(r'#\|\s*default_exp\s+(\w+)', source(c)))]
    return names[0] if len(names) == 1 else None


def parsed(cell):
    "The syntax tree of a cell without IPython's own lines; a cell that is no Python has an empty one."
    plain = source(cell)
    for text in (plain, '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in plain.splitlines())):
        with contextlib.suppress(SyntaxError): return ast.parse(text)      # a line of an expression may begin with %
    return ast.parse('')


def exported_names(nb):
    "Public functions and classes that the chapter exports, checks of exercises left out."
    cells = [c for c in code_cells(nb) if 'export' in directives(c)]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    found = [n.name for c in cells for n in parsed(c).body if isinstance(n, kinds)]
    return [n for n in found if not n.startswith(('_', 'check_'))]


def assertions(tree):
    "Number of things in a cell that can fail on purpose."
    calls = {'assert_close', 'raises', 'assert_allclose', 'assert_array_equal', 'assert_equal'}
    name = lambda call: getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    can_fail = lambda n: isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant)
    return sum(can_fail(n) or isinstance(n, ast.Call) and name(n) in calls for n in ast.walk(tree))


def untested(root):
    "At least two assertions for each exported name, in cells that run in a plain test and mention it."
    for path in chapters(root):
        nb = read(path)
        cells = [c for c in code_cells(nb) if not set(directives(c)) & (FLAGS | {'exercise', 'export', 'default_exp'})]
        trees = [(parsed(c), set(re.findall(r'\w+', source(c)))) for c in cells]
        if not sum(assertions(t) for t, _ in trees): yield f'{path.name}: expected assertions, got none'
        for name in exported_names(nb):
            n = sum(assertions(t) for t, words in trees if name in words)
            if n < 2: yield f'{path.name}: {name}: expected at least 2 assertions, got {n}'


def skipped(root):
    "Nothing that nbdev_test would pass over without a word."
    for path in chapters(root):
        nb = read(path)
        if path.name.startswith('_'): yield f'{path.name}: a leading underscore hides it from the tests'
        if not code_cells(nb): yield f'{path.name}: expected code cells, got none'
        for cell in nb['cells']:
            text, where = source(cell), f"{path.name} cell {cell['id']}"
            if re.search(r'skip_exec|skip_showdoc', text) and cell['cell_type'] != 'code': yield f'{where}: skip_exec'
            if cell['cell_type'] != 'code': continue
            if 'nbdev_export' + '(' in text: yield f'{where}: the text of an nbdev command, which hides the cell'
            for d in directives(cell):
                if d.rstrip(':') not in KNOWN: yield f'{where}: unknown directive {d!r}'
            for flag in FLAGS & set(directives(cell)):
                code = [line for line in text.splitlines() if line.strip() and not line.startswith('#')]
                if not (code and code[0].startswith(GUARD[flag])):
                    yield f'{where}: a {flag} cell begins with {GUARD[flag]!r}'
    for mark in (root/'nbs').rglob('.notest'): yield f'{mark.name}: hides its folder from the tests'


def stale(root):
    "Stored outputs belong to the code that stands there; none is an error, a warning or a path of some machine."
    for path in chapters(root):
        nb = read(path)
        if nb['metadata'].get('cnnbook', {}).get('sha256') != digest(nb):
            yield f'{path.name}: stale output: run `make book NB={path.stem}`'
        for cell in code_cells(nb):
            for o in cell['outputs']:
                where, text = f"{path.name} cell {cell['id']}", json.dumps({k: v for k,
                                                                            v in o.get('data',
                                                                                       o).items() if k != 'image/png'})
                if o['output_type'] == 'error': yield f"{where}: error output {o['ename']}"
                if o.get('name') == 'stderr': yield f'{where}: output on stderr'
                if re.search(r'/(root|home|work|Users|tmp|private)/', text):
                    yield f'{where}: output shows a path of some machine'


def shape(root):
    "Size, format, headings."
    for path in chapters(root):
        nb = read(path)
        if path.stat().st_size > MAX_BYTES:
            yield f'{path.name}: expected at most 300 KB, got {path.stat().st_size//1024}'
        if (nb['nbformat'], nb['nbformat_minor']) != (4, 5): yield f'{path.name}: expected nbformat 4.5'
        if module(nb) is None: yield f'{path.name}: expected one default_exp'
        text = re.sub(r'```.*?```', '', '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown'),
                      flags=re.S)
        levels = [len(m) for m in re.findall(r'^(#+) ', text, re.M)]
        if levels.count(1) != 1 or levels[:1] != [1]: yield f'{path.name}: expected one H1, at the top'
        if any(b > a + 1 for a, b in zip(levels, levels[1:])): yield f'{path.name}: a heading level is skipped'


def layers(root):
    "A module imports only from chapters before its own, never with a star."
    order = {module(read(p)): k for k, p in enumerate(chapters(root))}
    for path in sorted((root/'cnnbook').glob('[!_]*.py')):
        if path.stem not in order:
            yield f'{path.name}: expected a notebook that exports it, got none'
            continue
        for names, star in imports(ast.parse(path.read_text(encoding='utf-8'))):
            if star: yield f'{path.name}: star import'
            for name in names & order.keys():
                if order[name] >= order[path.stem]: yield f'{path.name}: imports {name}, a later chapter'
            if '_cext' in names and path.stem != 'boxes': yield f'{path.name}: only boxes imports _cext'
            if 'ipywidgets' in names and path.stem != 'playground':
                yield f'{path.name}: only playground imports ipywidgets'


def imports(tree):
    "For each import: the names of the book's own modules and of foreign packages, and whether it takes everything."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):                                 # import a.b
            parts = [a.name.split('.') for a in node.names]
            yield {p[1] if p[0] == 'cnnbook' and len(p) > 1 else p[0] for p in parts}, False
        elif isinstance(node, ast.ImportFrom):                           # from a.b import c, from . import c
            parts = ('cnnbook.' * bool(node.level) + (node.module or '')).strip('.').split('.')
            own = parts[0] == 'cnnbook'
            names = {parts[1]} if own and len(parts) > 1 else {a.name for a in node.names} if own else {parts[0]}
            yield names, any(a.name == '*' for a in node.names)


def drift(root):
    "Clean notebooks and exported modules are exactly what the tools make of the notebooks."
    tool = lambda name: str(Path(sys.executable).parent/name)
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_project(root, Path(tmp)/'copy')
        for name in ('nbdev_clean', 'nbdev_export'):
            subprocess.run([tool(name)], cwd=copy, check=True, capture_output=True)
        for folder, pattern in (('nbs', '*.ipynb'), ('cnnbook', '*.py')):
            ours, fresh = ({p.name: p.read_bytes() for p in (r/folder).glob(pattern)} for r in (root, copy))
            for name in sorted(ours.keys() | fresh.keys()):
                if ours.get(name) != fresh.get(name):
                    yield f'{folder}/{name}: differs from what the notebooks export: run `make export`'


def maps(root):
    "The map in index.ipynb and the table in README.md link exactly the chapters that are there."
    there = {p.name for p in chapters(root)} - {'index.ipynb'}
    index = '\n'.join(source(c) for c in read(root/'nbs'/'index.ipynb')['cells'])
    linked = {'index.ipynb': set(re.findall(r'\]\((\w+\.ipynb)\)', index)),
              'README.md': set(re.findall(r'\]\(nbs/(\w+\.ipynb)\)',
                                          (root/'README.md').read_text(encoding='utf-8'))) - {'index.ipynb'}}
    for file, names in linked.items():
        for name in sorted(there - names): yield f'{file}: expected a link to {name}, got none'
        for name in sorted(names - there): yield f'{file}: links {name}, which is not there'


def copy_project(root, to):
    "A copy of what the gate looks at."
    to.mkdir(parents=True)
    for name in ('nbs', 'cnnbook'):
        shutil.copytree(root/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '*.so', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'README.md', 'pyproject.toml'): shutil.copy(root/name, to)
    return to


RULES = [untested, skipped, stale, shape, layers, drift, maps]
