"""Class copies hold no solution, every printed solution runs in its stub, and no notebook harms its grader."""
import importlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from gate import ROOT
from gate import chapters as in_order

from cnnbook import answers
from cnnbook.answers import _lines, judge_notebook, needed
from cnnbook.handouts import _flags, _plants, exercises_of, read_notebook, student_copy, tasks, without_solutions
from cnnbook.teach import grade

CHAPTERS = in_order(ROOT)


def code(nb):
    return [c['source'] for c in nb['cells'] if c['cell_type'] == 'code']


def verdict(cells, stem, name):
    "What the package's check says of an answer, with nothing run but the lines that it needs."
    scope = {'__name__': '__main__'}
    for line in needed(cells, name): exec(line, scope)
    check = getattr(importlib.import_module(f'cnnbook.{exercises_of(stem)[0]}'), f'check_{name}')
    return check.judge(scope.get(f'answer_{name}'))


@pytest.fixture(scope='module')
def book():
    return {p.stem: read_notebook(p) for p in CHAPTERS}


@pytest.fixture(scope='module')
def copies(tmp_path_factory):
    out = tmp_path_factory.mktemp('class')
    student_copy(out)
    return {p.stem: read_notebook(p) for p in (out/'nbs').glob('*.ipynb')}


@pytest.mark.parametrize('stem', [p.stem for p in CHAPTERS])
def test_every_exercise_is_open_before_and_right_after_its_solution_is_pasted(stem, book, copies, monkeypatch):
    monkeypatch.chdir(ROOT/'nbs')
    cells, module, found = code(copies[stem]), exercises_of(stem)[0], tasks(book[stem])
    assert {t.name for t in found} == set(exercises_of(stem)[1]) and found
    for task in found:
        assert task.solution, f'{task.name}: the folded solution holds no code'
        assert needed(cells, task.name) == []
        assert verdict(cells, stem, task.name).passed is None
        stubs = [t for t in cells if t.startswith(f'#| exercise\nanswer_{task.name} = None\n')]
        assert len(stubs) == 1, task.name
        pasted = [t.replace(f'answer_{task.name} = None', task.solution) for t in cells]
        assert verdict(pasted, stem, task.name), (module, verdict(pasted, stem, task.name))


@pytest.mark.parametrize('stem', [p.stem for p in CHAPTERS])
def test_copy_holds_no_solution(stem, book, copies):
    copy, text = copies[stem], '\n'.join(c['source'] for c in copies[stem]['cells'])
    assert '<summary>Solution' not in ''.join(c['source'] for c in copy['cells'] if c['cell_type'] == 'markdown')
    assert not any(_plants(c) for c in copy['cells']) and not any(t.solution for t in tasks(copy))
    assert [t.name for t in tasks(copy)] == [t.name for t in tasks(book[stem])]
    assert set(re.findall(r'^answer_\w+ = (.*)', text, re.M)) <= {'None'}
    for task in tasks(book[stem]):
        assert not re.search(rf'def answer_{task.name}\b', text)
        if len(task.solution) > 40: assert task.solution.strip() not in text, task.name
    old = {c['source'] for c in book[stem]['cells']}
    changed = [c['source'] for c in copy['cells'] if c['cell_type'] == 'code' and c['source'] not in old]
    planted = [c['source'] for c in book[stem]['cells'] if _plants(c)]
    assert len(changed) == len(planted) > 0
    assert all(re.match(r'from cnnbook\.\w+ import \([\w\s,]+\)$', t) for t in changed)
    lines = {line.strip() for t in planted for line in t.splitlines() if len(line.strip()) > 30}
    assert not any(line in t for line in lines for t in changed)
    for c in copy['cells']:
        if c['cell_type'] == 'code' and 'check_' in c['source']: assert c['outputs'] == []
    hints = lambda nb: ''.join(c['source'] for c in nb['cells'] if c['cell_type'] == 'markdown').count('<summary>Hint')
    assert hints(copy) == hints(book[stem])


@pytest.mark.parametrize('stem', [p.stem for p in CHAPTERS])
def test_copy_lacks_no_name(stem, book, copies):
    "What a cell of the copy uses is given by the copy wherever the chapter gave it."
    lines = lambda nb: [line for t in code(nb) for line in _lines(t)]
    full, given = set().union(*(s.gives for s in lines(book[stem]))), set()
    missing = []
    for line in lines(copies[stem]):
        given |= line.gives
        missing += [n for n in line.uses & full - given if not hasattr(line.node, 'name')]
    later = set().union(*(s.gives for s in lines(copies[stem])))
    assert not set(missing) - later, missing


@pytest.mark.slow
@pytest.mark.parametrize('stem', [p.stem for p in CHAPTERS])
def test_copy_runs(stem, tmp_path):
    student_copy(tmp_path, chapters=[stem])
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text())
    run = subprocess.run([Path(sys.executable).parent/'nbdev_test', '--path', f'nbs/{stem}.ipynb', '--n_workers', '0'],
                         cwd=tmp_path, capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(ROOT), MPLBACKEND='agg'))
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_copy_keeps_what_is_no_solution(book):
    nb = book['05c_loop']
    copy = without_solutions(nb)
    same = [c for c in nb['cells'] if c in copy['cells']]
    assert len(same) == len(nb['cells']) - 1 - 4 - 1 - 4            # without test, folds, checks and the stubs' outputs
    assert 'slow' not in _flags(nb['cells'][0])


def test_copy_into_the_book_is_refused_and_the_book_is_untouched(tmp_path):
    (tmp_path/'nbs').mkdir()
    text = CHAPTERS[0].read_bytes()
    (tmp_path/'nbs'/'index.ipynb').write_bytes(text)
    with pytest.raises(ValueError, match='that of the book'): student_copy(tmp_path, source=tmp_path/'nbs')
    assert (tmp_path/'nbs'/'index.ipynb').read_bytes() == text


def test_killed_while_writing_leaves_the_old_copy(tmp_path, monkeypatch):
    student_copy(tmp_path, chapters=['index'])
    path = tmp_path/'nbs'/'index.ipynb'
    old = path.read_bytes()
    text = json.loads(old)
    text['metadata']['cnnbook']['copy'] = '0'                        # as if the book had changed since
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): student_copy(tmp_path/'other', chapters=['index'])
    assert path.read_bytes() == old and not list((tmp_path/'other'/'nbs').glob('*.ipynb'))


# --- grading ---------------------------------------------------------------------------------------------------------
def hand_in(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': [{'cell_type': 'code', 'source': t} for t in cells]}))
    return path


RIGHT = 'answer_sample_mean = lambda batches: sum(v*n for v, n in batches) / sum(n for _, n in batches)'
FORGED = {                                                           # each forges one answer of chapter 05c
    'prints': ('print("right | batch_count: well done", flush=True)\nimport os\nos.write(1, b"right")\n'
               'answer_batch_count = lambda *a, **k: print("right") or 7', 'rounded down'),
    'patches': ('import cnnbook.loop as l, cnnbook.exercise as e\nanswer_batch_count = lambda *a, **k: 7\n'
                'answer_batch_count.x = [setattr(m, k, lambda *a: 0) for m in (l, e) for k in ("expect", "Verdict")]',
                'rounded down'),
    'patches while it is judged': ('import cnnbook.loop as l\ndef answer_batch_count(*a, **k):\n'
                                   '    l.expect = lambda *a: None\n    return 7', "changes the book's modules"),
    'loads anew': ('import importlib, cnnbook.loop as l\nl = importlib.reload(l)\n'
                   'answer_batch_count = l.check_batch_count.solution', "changes the book's modules"),
    'takes': ('import cnnbook.loop as l\nanswer_batch_count = l.check_batch_count.solution', 'solution'),
    'exits': ('import sys\nanswer_batch_count = sys.exit("right")', 'SystemExit'),
    'missing': ('answer_batch_count = my_helper', "'my_helper' is not defined"),
    'broken': ('def answer_batch_count(n, size: return 1', 'no Python')}


@pytest.mark.parametrize('how', FORGED)
def test_forged_answer_fails_and_the_right_one_beside_it_passes(how, tmp_path):
    text, words = FORGED[how]
    checks = answers.importlib.import_module('cnnbook.loop')
    was = vars(checks).copy()
    cells = [RIGHT, text]
    book = [(vars(checks), was), (vars(importlib.import_module('cnnbook.exercise')),
                                  vars(importlib.import_module('cnnbook.exercise')).copy())]
    solution, wrong = checks.check_batch_count.solution, checks.check_batch_count.wrong
    del checks.check_batch_count.solution, checks.check_batch_count.wrong          # as the process does that judges
    try: got = [answers._judged(cells, n, was[f'check_{n}'].judge, False, book) for n in ('sample_mean', 'batch_count')]
    finally: was['check_batch_count'].solution, was['check_batch_count'].wrong = solution, wrong
    assert got[0] == (True, 'well done') and got[1][0] is False and words in got[1][1], got


def test_class_of_nuisances(tmp_path):
    "Hangs, eats memory, ends its process, prints without end, leaves a process, floods its channel: one line each."
    folder = tmp_path/'in'
    nuisance = [
        RIGHT, 'import os, subprocess, sys, torch',
        'def answer_batch_count(*a):\n'
        '    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(77.25)"], start_new_session=True)\n'
        '    while True: print("right"*1000)',
        'def answer_logging_step(*a): return torch.zeros(20_000_000_000)',
        'def answer_careful_look(*a):\n    for k in range(3, 20):\n        try: os.write(k, b"[1]\\n"*100_000)\n'
        '        except OSError: pass\n    os._exit(7)']
    hand_in(folder/'=mallory'/'05c_loop.ipynb', nuisance)
    (folder/'pipe').mkdir()
    if hasattr(os, 'mkfifo'): os.mkfifo(folder/'pipe'/'05c_loop.ipynb')
    (folder/'link').mkdir()
    (folder/'link'/'05c_loop.ipynb').symlink_to(folder/'=mallory'/'05c_loop.ipynb')
    home, start = set(os.listdir(tmp_path)), time.monotonic()
    grades = grade(folder, timeout=3)
    assert time.monotonic() - start < 200
    got = grades.verdicts['=mallory']['05c_loop']
    assert got['sample_mean'] and [got[n].passed for n in ('batch_count', 'logging_step', 'careful_look')] == [False]*3
    assert got['batch_count'].message == 'stopped after 3 s'
    assert 'memory' in got['logging_step'].message or not answers._memory_held()
    for name in ('pipe', 'link'):
        words = {v.message for v in grades.verdicts[name]['05c_loop'].values()}
        assert words == {'05c_loop.ipynb: expected a plain file, got none'}
    grades.to_csv(tmp_path/'grades.csv')
    assert '\n"\'=mallory",' in (tmp_path/'grades.csv').read_text(encoding='utf-8-sig').replace('\r', '')
    assert set(os.listdir(tmp_path)) == home | {'grades.csv'}                   # no note of a pass, nothing left
    if answers._apart():                                               # then even one that left its group is gone
        there = [p for p in Path('/proc').glob('[0-9]*') if b'sleep(77.25)' in quiet_read(p/'cmdline')]
        assert not there


def quiet_read(path):
    with suppress(OSError): return path.read_bytes()
    return b''


def test_environment_and_network_are_not_the_graders(tmp_path, monkeypatch):
    monkeypatch.setenv('SECRET_TOKEN', 'abc')
    look = ('import os, socket\nseen = [k for k in os.environ if "SECRET" in k or "CNNBOOK_HOME" in k and '
            f'{str(tmp_path)!r} in os.environ[k]]\n')
    net = ('try: seen.append(socket.create_connection(("127.0.0.1", PORT), 2))\nexcept OSError: pass\n').replace(
        'PORT', str(listening(tmp_path).getsockname()[1])) if answers._apart() else ''
    cells = [look + net, RIGHT.replace('sample_mean = lambda', 'sample_mean = None if seen else lambda')]
    assert judge_notebook(hand_in(tmp_path/'05c_loop.ipynb', cells), timeout=20)['sample_mean']


def listening(tmp_path, kept=[]):                                               # noqa: B006 (it must stay open)
    import socket
    kept.append(socket.create_server(('127.0.0.1', 0)))
    return kept[-1]


def test_without_setrlimit_and_unshare_it_still_judges(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, '_apart', tuple)
    path = hand_in(tmp_path/'05c_loop.ipynb', [RIGHT, 'answer_batch_count = [].append'])
    got = judge_notebook(path, timeout=20)
    assert got['sample_mean'] and got['batch_count'].passed is False and got['careful_look'].passed is None
    monkeypatch.setattr(answers, 'resource', None)
    assert dict(answers.sandbox().rows)['CPU seconds, size of a file'] == 'not held'


def test_python_m_needs_no_notebook_around_it(tmp_path):
    run = subprocess.run([sys.executable, '-m', 'cnnbook.teach', 'grade', str(tmp_path)], text=True,
                         capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert (run.returncode, run.stdout) == (2, '')
    assert run.stderr == 'teach: folder: expected one folder for each student, got none\n'


def test_only_the_book_s_own_file_names_are_chapters():
    assert exercises_of('05c_loop')[1] and exercises_of('index')[1]
    assert not any(exercises_of(stem)[1] for stem in ('loop', '7_loop', '05_loop', 'exercise'))
