"""Does a chapter give the same numbers whatever was run before?

    python tools/order.py [NAME ...]             all chapters, or those whose file name begins with NAME

In one kernel: the imports, then all other cells in a shuffled order, whatever they raise, and then the chapter from top
to bottom. What it prints must be what is stored. Lines with times and speeds differ by nature; a line that differs in
a plain run as well tells nothing and is left out.
"""
import random
import re
import sys

import nbformat
from book import chapters, run, runs_here
from nb import code_cells

TIMED = re.compile(r'\d ?(s|ms|us|µs|ns|min|minutes|seconds|[KMG]i?B|images/s|images a second|times as fast)\b')


def texts(cell):
    "The lines that a cell printed or showed as text, without figures, widgets, bars and times."
    shown = ''
    for o in cell['outputs']:
        if {'application/vnd.jupyter.widget-view+json', 'image/png'} & set(o.get('data', ())): continue
        if o.get('name') == 'stderr': continue
        if o['output_type'] == 'stream': shown += o['text']                # may come in pieces, cut anywhere
        elif o['output_type'] == 'error': shown += f"\n{o['ename']}: {o['evalue']}\n"
        else: shown += '\n' + o.get('data', {}).get('text/plain', '') + '\n'
    return [line for line in shown.splitlines() if line and not TIMED.search(line) and ' at 0x' not in line]


def texts_after(nb, path):
    run(nb, path.parent, allow_errors=True)
    return {c['id']: texts(c) for c in code_cells(nb) if runs_here(c) and 'again' not in c['metadata']}


def differences(path, seed=0):
    "[(cell, line stored, line after cells in a shuffled order)]."
    plain, nb = (nbformat.read(path, as_version=4) for _ in range(2))
    stored = {c['id']: texts(c) for c in code_cells(plain) if runs_here(c)}
    first, rest = [], []
    for cell in code_cells(nb):
        if not runs_here(cell): continue
        early = len(first) + len(rest) < 3 and re.search(r'^(from|import) ', cell['source'], re.M)
        (first if early else rest).append(nbformat.v4.new_code_cell(cell['source'], metadata={'again': True}))
    random.Random(seed).shuffle(rest)
    nb.cells = first + rest + nb.cells
    after = texts_after(nb, path)
    if after == stored: return []
    noise = texts_after(plain, path)
    found = []
    for id, lines in stored.items():
        if len(noise[id]) == len(lines) != len(after[id]):
            found.append((id, f'{len(lines)} lines', f'{len(after[id])} lines: {after[id][:3]}'))
        found += [(id, a, b) for a, b, c in zip(lines, after[id], noise[id]) if a != b and a == c]
    return found


def main(*names):
    bad = []
    for path in chapters(names):
        found = differences(path)
        print(f"{path.stem:22}{'as stored' if not found else f'{len(found)} lines differ'}", flush=True)
        for id, a, b in found[:6]: print(f'    {id}: {a[:90]!r} became {b[:90]!r}', flush=True)
        bad += [path.stem]*bool(found)
    if bad: raise SystemExit(f'expected the same numbers after any order of cells, got others: {", ".join(bad)}')


if __name__ == '__main__':
    main(*sys.argv[1:])
