"""Run the benchmarks and write RESULTS.md: `python benchmarks/run.py [NAME ...]`, by default all of them.

Each benchmark is a module with a docstring, `main() -> dict` of figures, and measures its peers in the same run.
"""
import importlib
import json
import os
import platform
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def machine():
    python = f'Python {platform.python_version()}, torch {torch.__version__}'
    return f'{platform.machine()}, {os.cpu_count()} cores, {python}'


def render(results):
    lines = ['# Results', '', 'Written by `make bench`. Ratios hold from machine to machine; times do not.', '']
    for name, r in sorted(results.items()):
        lines += [f"## {name}", '', r['about'], '', f"On {r['machine']}.", '', '| figure | value |', '|---|---|']
        lines += [f'| {k} | {v:,.4g} |' if isinstance(v, float) else f'| {k} | {v} |' for k, v in r['figures'].items()]
        lines.append('')
    return '\n'.join(lines)


def main(*names):
    store = HERE/'results.json'
    results = json.loads(store.read_text()) if store.exists() else {}
    every = sorted(p.stem for p in HERE.glob('*.py') if p.stem != 'run')
    for name in names or every:
        module = importlib.import_module(name)
        results[name] = {'about': module.__doc__.strip().split('\n\n')[0], 'machine': machine(),
                         'figures': module.main()}
    results = {k: v for k, v in results.items() if k in every}
    store.write_text(json.dumps(results, indent=1) + '\n')
    (HERE/'RESULTS.md').write_text(render(results))


if __name__ == '__main__':
    main(*sys.argv[1:])
