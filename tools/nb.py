"""Edit a chapter as text: a notebook shown as percent cells, and percent cells put back into the notebook.

    python tools/nb.py show NB                    print the chapter as percent text
    python tools/nb.py apply NB FILE              make the notebook equal to FILE (whole chapter)
    python tools/nb.py replace NB ID FILE         put FILE's cells in place of cell ID
    python tools/nb.py insert NB ID FILE          put FILE's cells after cell ID

A cell begins with `# %% [md] id` or `# %% id`; `folded` after the id hides a code cell's source in JupyterLab.
Cells whose id and source did not change keep their outputs.
"""
import hashlib
import json
import re
import sys
from pathlib import Path

MARK = re.compile(r'^# %%(?: \[(md)\])?(?: ([a-z0-9-]+))?( folded)?\s*$')
KERNEL = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def source(cell):
    return ''.join(cell['source'])


def read(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))


def write(path, nb):
    Path(path).write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def code_cells(nb):
    return [c for c in nb['cells'] if c['cell_type'] == 'code']


def digest(nb):
    "sha256 over the sources of all code cells: stored outputs belong to exactly these."
    return hashlib.sha256('\0'.join(source(c) for c in code_cells(nb)).encode()).hexdigest()


def directives(cell):
    "Names of the `#| name` lines at the head of a code cell."
    return [m[1] for line in source(cell).splitlines() if (m := re.match(r'#\s*\|\s*([\w:-]+)', line))]


def is_folded(cell):
    return bool(cell['metadata'].get('jupyter', {}).get('source_hidden'))


def show(nb):
    kind = lambda c: ' [md]' if c['cell_type'] == 'markdown' else ''
    head = lambda c: f"# %%{kind(c)} {c['id']}{' folded' if is_folded(c) else ''}"
    return '\n\n'.join(head(c) + '\n' + source(c) for c in nb['cells']) + '\n'


def make_cell(kind, id, folded, text, old):
    cell = {'cell_type': 'markdown' if kind else 'code', 'id': id, 'metadata': {},
            'source': text.splitlines(keepends=True)}
    if folded: cell['metadata']['jupyter'] = {'source_hidden': True}
    if not kind: cell |= {'execution_count': None, 'outputs': []}
    was = old.get(id)
    if was and was['cell_type'] == cell['cell_type'] and source(was) == text:
        if not kind: cell['outputs'] = was['outputs']
        if 'attachments' in was: cell['attachments'] = was['attachments']
    return cell


def parse(text, old=()):
    cells, head, body = [], None, []

    def close():
        if head:
            cells.append(make_cell(head[1], head[2], head[3], '\n'.join(body).strip('\n'), {c['id']: c for c in old}))

    for line in text.splitlines():
        m = MARK.match(line)
        if not m:
            body.append(line)
            continue
        close()
        if not m[2]: raise ValueError(f'cell head: expected an id, got {line!r}')
        head, body = m, []
    close()
    ids = [c['id'] for c in cells]
    if len(set(ids)) != len(ids):
        raise ValueError(f'ids: expected unique, got {sorted({i for i in ids if ids.count(i) > 1})} twice')
    return cells


def edit(path, id, text, keep):
    nb = read(path)
    at = [c['id'] for c in nb['cells']].index(id)
    nb['cells'][at + keep:at + 1] = parse(text, nb['cells'])
    write(path, nb)


def apply(path, text):
    nb = read(path) if Path(path).exists() else {'cells': [], 'metadata': dict(KERNEL), 'nbformat': 4,
                                                 'nbformat_minor': 5}
    nb['cells'] = parse(text, nb['cells'])
    write(path, nb)


def main(verb='', *args):
    if verb == 'show' and len(args) == 1: print(show(read(args[0])), end='')
    elif verb == 'apply' and len(args) == 2: apply(args[0], Path(args[1]).read_text(encoding='utf-8'))
    elif verb in ('replace', 'insert') and len(args) == 3:
        edit(args[0], args[1], Path(args[2]).read_text(encoding='utf-8'), keep=verb == 'insert')
    else: sys.exit(__doc__)


if __name__ == '__main__':
    main(*sys.argv[1:])
