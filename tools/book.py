"""Execute the chapters and store their outputs, with measured time and memory in nbs/budget.json.

    python tools/book.py [NAME ...]              all chapters, or those whose file name begins with NAME
    python tools/book.py --measure [NAME ...]    only measure; stored outputs stay as they are

A chapter above 60 s or 2 GB ends it with exit code 1, after all are done.
Cells flagged slow, cuda or network keep their stored outputs unless CNNBOOK_FULL=1 (slow) or the machine runs them.
Widgets and progress bars are not stored; figures are stored with at most 256 colours, which keeps chapters small.
"""
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import zmq
from nb import code_cells, digest, directives, read
from nbclient import NotebookClient
from PIL import Image

NBS = Path(__file__).resolve().parent.parent/'nbs'
SECONDS, MEGABYTES = 60, 2048
PEAK = 'import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)'


def smaller(png):
    "The same picture with a palette of 256 colours, if that is smaller."
    raw = base64.b64decode(png)
    out = io.BytesIO()
    Image.open(io.BytesIO(raw)).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return base64.b64encode(min(raw, out.getvalue(), key=len)).decode()


def tidy(outputs):
    "What of a cell's outputs is worth keeping."
    kept = []
    for o in outputs:
        data = o.get('data', {})
        if 'application/vnd.jupyter.widget-view+json' in data: continue
        if o['output_type'] == 'stream' and o['name'] == 'stderr' and re.search(r'\d+%\|', o['text']): continue
        if 'image/png' in data: data['image/png'] = smaller(data['image/png'])
        o.pop('execution_count', None) if o['output_type'] != 'execute_result' else o.update(execution_count=None)
        kept.append(o)
    return kept


def runs_here(cell):
    import torch
    flags = set(directives(cell)) & {'slow', 'cuda', 'network'}
    runs = {'slow': os.environ.get('CNNBOOK_FULL') == '1', 'cuda': torch.cuda.is_available(),
            'network': not os.environ.get('CNNBOOK_OFFLINE')}
    return all(runs[f] for f in flags)


def run(nb, folder, **options):
    "Execute a notebook in a kernel of its own."
    at, beside = {'metadata': {'path': str(folder)}}, []
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', resources=at, **options)

    async def look():       # nbclient answers a widget past asyncio, which then may not notice that a reply has come
        while True:
            await asyncio.sleep(.5)
            if client.kc is not None: client.kc.shell_channel.socket.get(zmq.EVENTS)

    client.on_notebook_start = lambda notebook: beside.append(asyncio.ensure_future(look()))
    client.on_notebook_complete = lambda notebook: beside.pop().cancel()
    client.execute()


def execute(path, store=True):
    "Run one chapter, store its outputs, return (seconds, peak memory of the process in MB)."
    stored = {c['id']: c.get('outputs', []) for c in code_cells(read(path))}
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell(PEAK))
    start = time.perf_counter()
    run(nb, path.parent)
    seconds, peak = time.perf_counter() - start, int(nb.cells.pop()['outputs'][0]['text'])
    if not store: return seconds, peak
    for cell in code_cells(nb):
        cell['outputs'] = tidy(cell['outputs']) if runs_here(cell) else [nbformat.from_dict(o)
                                                                         for o in stored[cell['id']]]
        cell['execution_count'] = None
        cell['metadata'].pop('execution', None)
    nb.metadata.pop('widgets', None)
    nb.metadata['cnnbook'] = {'sha256': digest(nb)}
    nbformat.write(nb, path)
    return seconds, peak


def chapters(names):
    "Paths of the chapters that are meant, all without names; index last, since it shows the budget."
    every = [*sorted(NBS.glob('[0-9]*.ipynb')), NBS/'index.ipynb']
    for n in names:
        if not any(p.name.startswith(n) for p in every): raise SystemExit(f'NAME: expected a chapter, got {n!r}')
    return [p for p in every if not names or p.name.startswith(tuple(names))]


def main(*names):
    store, names = '--measure' not in names, [n for n in names if n != '--measure']
    os.environ.pop('MPLBACKEND', None)                      # the kernel shows figures by its own
    budget_path = NBS/'budget.json'
    measured = {}
    for path in chapters(names):
        seconds, peak = execute(path, store)
        if os.environ.get('CNNBOOK_FULL') != '1': measured[path.stem] = {'seconds': round(seconds, 1), 'peak_mb': peak}
        print(f'{path.stem:16}{seconds:6.1f} s{peak:8} MB{path.stat().st_size//1024:6} KB', flush=True)
    budget = json.loads(budget_path.read_text()) if budget_path.exists() else {}   # read late: runs may overlap
    budget |= measured
    budget = {k: budget[k] for k in sorted(budget) if (NBS/f'{k}.ipynb').exists()}
    budget_path.write_text(json.dumps(budget, indent=1) + '\n')
    if store: subprocess.run([Path(sys.executable).parent/'nbdev_clean'], check=True, cwd=NBS.parent)
    over = [k for k, v in measured.items() if v['seconds'] > SECONDS or v['peak_mb'] > MEGABYTES]
    if over: raise SystemExit(f'expected at most {SECONDS} s and {MEGABYTES} MB a chapter, got more: {", ".join(over)}')


if __name__ == '__main__':
    main(*sys.argv[1:])
