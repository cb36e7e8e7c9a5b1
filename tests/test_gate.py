"""The book passes every rule of the gate, and each rule turns red for the fault it is there for."""
import json
import os
import subprocess
import sys
from pathlib import Path

import gate
import pytest
from nb import digest, parse, read, write

NBDEV_TEST = str(Path(sys.executable).parent/'nbdev_test')


@pytest.mark.parametrize('rule', gate.RULES, ids=lambda r: r.__name__)
def test_book(rule):
    breaches = list(rule(gate.ROOT))
    assert not breaches, '\n'.join(breaches)


@pytest.fixture
def copy(tmp_path):
    return gate.copy_project(gate.ROOT, tmp_path/'book')


def edit(path, change):
    nb = read(path)
    change(nb)
    write(path, nb)


def cell(text, id='planted'):
    return parse(f'# %% {id}\n{text}\n')[0]


def nbdev_test(root, name):
    env = dict(os.environ, PYTHONPATH=str(root), CNNBOOK_OFFLINE='1')
    return subprocess.run([NBDEV_TEST, '--path', f'nbs/{name}', '--n_workers', '0'], cwd=root, env=env,
                          capture_output=True, text=True)


def test_wrong_cell_is_red(copy):
    assert nbdev_test(copy, 'index.ipynb').returncode == 0
    edit(copy/'nbs'/'index.ipynb', lambda nb: nb['cells'].append(cell('assert 1 + 1 == 3')))
    run = nbdev_test(copy, 'index.ipynb')
    assert run.returncode != 0 and 'AssertionError' in run.stderr


def test_assert_free_notebook_is_red(copy):
    write(copy/'nbs'/'34_empty.ipynb',
          {'cells': parse('# %% [md] t\n# Empty\n\n# %% e\n#| default_exp empty\n\n# %% x\n#| export\ndef f(): ...\n'),
                                        'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5})
    found = list(gate.untested(copy))
    assert '34_empty.ipynb: expected assertions, got none' in found
    assert '34_empty.ipynb: f: expected at least 2 assertions, got 0' in found


def test_assert_true_does_not_count(copy):
    edit(copy/'nbs'/'index.ipynb', lambda nb: nb['cells'].append(cell('#| export\ndef lonely(): ...', 'a')))
    edit(copy/'nbs'/'index.ipynb', lambda nb: nb['cells'].append(cell('lonely(); assert True; assert 1', 'b')))
    assert 'index.ipynb: lonely: expected at least 2 assertions, got 0' in list(gate.untested(copy))


def test_hand_edited_module_is_red(copy):
    path = copy/'cnnbook'/'exercise.py'
    path.write_text(path.read_text().replace('well done', 'well done!'))
    assert any('cnnbook/exercise.py: differs' in b for b in gate.drift(copy))


def test_import_from_later_chapter_is_red(copy):
    path = copy/'cnnbook'/'device.py'
    for line in ('from .boxes import box_iou', 'from cnnbook import boxes', 'import cnnbook.boxes',
                 'from . import boxes', 'from cnnbook.boxes import box_iou'):
        text = path.read_text()
        path.write_text(text + f'\n{line}\n')
        assert 'device.py: imports boxes, a later chapter' in list(gate.layers(copy)), line
        path.write_text(text)
    path.write_text(text + '\nfrom .exercise import *\nimport ipywidgets\n')
    assert {'device.py: star import', 'device.py: only playground imports ipywidgets'} <= set(gate.layers(copy))


@pytest.mark.parametrize('text, words', [
    ('#| eval: false\nassert 1 > 2', "unknown directive 'eval:'"), ('#| exprot\nx = 1', "unknown directive 'exprot'"),
    ('#| slow\nx = 1', "a slow cell begins with 'if full_run()'"), ('#| cuda\nif True: pass',
                                                                    'a cuda cell begins with'),
    ('x = "nbdev_export' + '()"', 'the text of an nbdev command')])
def test_hidden_cells_are_red(copy, text, words):
    edit(copy/'nbs'/'index.ipynb', lambda nb: nb['cells'].append(cell(text)))
    assert any(words in b for b in gate.skipped(copy))


def test_skipped_notebook_is_red(copy):
    edit(copy/'nbs'/'index.ipynb',
         lambda nb: nb['cells'].insert(0, parse('# %% [md] front\n---\nskip_exec: true\n---\n')[0]))
    assert 'index.ipynb cell front: skip_exec' in list(gate.skipped(copy))


def test_stale_or_leaking_output_is_red(copy):
    path = copy/'nbs'/'index.ipynb'
    edit(path, lambda nb: nb['cells'].append(cell('x = 1')))
    assert any('stale output' in b for b in gate.stale(copy))

    def leak(nb):
        nb['metadata']['cnnbook'] = {'sha256': digest(nb)}
        nb['cells'][-1]['outputs'] = [{'output_type': 'stream', 'name': 'stderr', 'text': ['/home/ada/secret']}]
    edit(path, leak)
    assert {'index.ipynb cell planted: output on stderr',
            'index.ipynb cell planted: output shows a path of some machine'} <= set(gate.stale(copy))


def test_size_and_headings_are_red(copy):
    edit(copy/'nbs'/'index.ipynb', lambda nb: nb['cells'].append(parse('# %% [md] deep\n#### Too deep\n'
                                                                       + 'x'*310_000)[0]))
    found = list(gate.shape(copy))
    assert any('at most 300 KB' in b for b in found) and 'index.ipynb: a heading level is skipped' in found


def test_missing_link_is_red(copy):
    (copy/'nbs'/'00_device.ipynb').rename(copy/'nbs'/'00z_device.ipynb')
    found = list(gate.maps(copy))
    assert 'README.md: expected a link to 00z_device.ipynb, got none' in found
    assert 'index.ipynb: links 00_device.ipynb, which is not there' in found


# --- exercises -------------------------------------------------------------------------------------------------------
def all_checks():
    import importlib
    for path in sorted((gate.ROOT/'cnnbook').glob('[!_]*.py')):
        mod = importlib.import_module(f'cnnbook.{path.stem}')
        for name, check in vars(mod).items():
            if name.startswith('check_') and check.__module__ == mod.__name__: yield check


CHECKS = list(all_checks())


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_check_accepts_solution_and_names_mistakes(check):
    assert check.judge(None).passed is None
    verdict = check.judge(check.solution)
    assert verdict, verdict.message
    assert len(check.wrong) >= 2
    for k, (answer, words) in enumerate(check.wrong):
        verdict = check.judge(answer)
        assert verdict.passed is False and words in verdict.message, f'wrong answer {k}: {verdict.message!r}'


def test_exercises_have_a_prompt_a_stub_and_a_solution():
    names = [c.__name__.removeprefix('check_') for c in CHECKS]
    assert len(set(names)) == len(names)
    cells = [c for p in gate.chapters(gate.ROOT) for c in read(p)['cells']]
    text = {kind: [gate.source(c) for c in cells if c['cell_type'] == kind] for kind in ('code', 'markdown')}
    for name in names:
        assert any(t.startswith(f'#| exercise\nanswer_{name} = None\n') for t in text['code']), f'{name}: no stub'
        prompt = [t for t in text['markdown'] if f'**Exercise `{name}`**' in t]
        assert len(prompt) == 1 and '<summary>Solution' in prompt[0] and '<summary>Hint' in prompt[0], f'{name}: prompt'


@pytest.mark.parametrize('path', gate.chapters(gate.ROOT), ids=lambda p: p.stem)
def test_number_of_exercises(path):
    mod = gate.module(read(path))
    n = sum(c.__module__ == f'cnnbook.{mod}' for c in CHECKS)
    assert n == 1 if path.stem == 'index' else 3 <= n <= 6, f'{n} exercises'


# --- import ----------------------------------------------------------------------------------------------------------
PROBE = '''
import json, sys, time
start = time.perf_counter(); import cnnbook; own = time.perf_counter() - start
import matplotlib, random, numpy as np, torch
settings = lambda: dict(dict.items(matplotlib.rcParams))        # read one by one they would start a backend
before = settings()
state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
flags = torch.backends.cudnn.benchmark, torch.get_num_threads(), torch.get_default_dtype()
import socket, urllib.request
def refuse(*a, **k): raise SystemExit('an import opened a connection')
socket.socket.connect = refuse; socket.create_connection = refuse
import importlib
for name in sys.argv[1:]: importlib.import_module('cnnbook.' + name)
after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
print(json.dumps(dict(own=own, rc=settings() == before, random=state == after,
                      cuda=torch.cuda.is_initialized(),
    flags=flags == (torch.backends.cudnn.benchmark, torch.get_num_threads(), torch.get_default_dtype()),
    widgets='ipywidgets' in sys.modules, pyplot='matplotlib.pyplot' in sys.modules)))
'''


def test_nothing_happens_at_import(tmp_path):
    names = [p.stem for p in (gate.ROOT/'cnnbook').glob('[!_]*.py')]
    run = subprocess.run([sys.executable, '-c', PROBE, *names], capture_output=True, text=True, cwd=tmp_path,
                         env=dict(os.environ, HOME=str(tmp_path/'no-home'), MPLCONFIGDIR=str(tmp_path)))
    assert run.returncode == 0 and not run.stderr, run.stderr
    seen = json.loads(run.stdout)
    assert seen.pop('own') < .1
    assert seen == {'rc': True, 'random': True, 'cuda': False, 'flags': True, 'widgets': False, 'pyplot': False}
    assert not (tmp_path/'no-home').exists(), 'an import wrote into the home folder'


def test_a_line_that_begins_with_percent_is_no_magic_inside_of_an_expression():
    assert len(gate.parsed(cell("x = ('%d'\n     % 3)\nassert x == '3'")).body) == 2
    assert len(gate.parsed(cell('%matplotlib inline\nx = 1')).body) == 1 and not gate.parsed(cell('no python')).body
