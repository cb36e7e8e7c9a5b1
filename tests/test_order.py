"A chapter run from top to bottom gives the same numbers whatever was run before (`make order` asks it of all)."
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
QUICK = '00c_images', '01_data', '05c_loop', '10da_slopes', '20x_polygons', '23z_texthits'      # some of each part


def order(*args, code=None):
    run = [sys.executable, '-c', code] if code else [sys.executable, 'order.py']
    return subprocess.run([*run, *args], cwd=ROOT/'tools', capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize('chapter', QUICK)
def test_numbers_do_not_depend_on_what_was_run_before(chapter):
    done = order(chapter)
    assert done.returncode == 0 and done.stdout.split() == [chapter, 'as', 'stored'], done.stdout + done.stderr[-500:]


def test_what_depends_on_the_order_is_found(tmp_path):
    count = 'builtins.times = getattr(builtins, "times", 0) + 1\nprint(builtins.times)'
    cells = [('import builtins', []), (count, ['1\n']), ('print("took 3 ms")', ['took 5 ms\n']),
             ('print(7)', ['7\n'])]
    out = lambda lines: [nbformat.v4.new_output('stream', text=line) for line in lines]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s, outputs=out(o)) for s, o in cells])
    nbformat.write(nb, tmp_path/'99_t.ipynb')
    code = 'import sys, pathlib; from order import differences; print(differences(pathlib.Path(sys.argv[1])))'
    done = order(str(tmp_path/'99_t.ipynb'), code=code)
    assert "'1', '2')]" in done.stdout and done.stdout.count('(') == 1, done.stdout + done.stderr[-500:]


def test_a_chapter_that_is_not_there():
    done = order('05c', '99')
    assert done.returncode == 1 and done.stderr.strip() == "NAME: expected a chapter, got '99'" and not done.stdout
