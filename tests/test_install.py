"""A wheel holds what it needs, installs into a path with a space, works without a checkout and without a compiler."""
import os
import subprocess
import sys
import zipfile

import pytest
from gate import ROOT

pytestmark = pytest.mark.install


def build(to, **env):
    "Build the wheel in a copy of the sources, with the build tools of this environment."
    import shutil
    source = to/'source'
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True,
                           text=True).stdout
    for name in names.split('\n'):
        if name and (ROOT/name).is_file():
            (source/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, source/name)
    run = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w',
                          str(to/'wheels'),
                          str(source)], capture_output=True, text=True, env=os.environ | env)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next((to/'wheels').glob('*.whl'))


def try_it(wheel, folder, code):
    "Install the wheel into a folder alone and run code with it, far from the checkout."
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(folder), str(wheel)],
                   check=True)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'CNNBOOK_DATA')}
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder,
                         env=env | {'PYTHONPATH': str(folder), 'XDG_CACHE_HOME': str(folder/'cache')})
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_wheel(tmp_path):
    wheel = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert 'cnnbook/manifest.json' in names and any('_cext' in n for n in names)
    assert not any(n.startswith(('tests', 'nbs', 'data')) for n in names)
    out = try_it(wheel, tmp_path/'a path', 'import numpy as np, cnnbook\nfrom cnnbook.boxes import box_iou\n'
                 'from cnnbook.files import data_root, manifest\nprint(cnnbook.__file__, *manifest(), data_root())\n'
                 'print(box_iou(np.array([[0., 0, 2, 2]]), np.array([[1., 0, 3, 2]])))')
    assert 'a path' in out and 'mnist' in out and 'cache/cnnbook' in out and '0.333' in out
    chapters = {n for n in names if n.startswith('cnnbook/notebooks/') and n.endswith('.ipynb')}
    assert len(chapters) == len(list((ROOT/'nbs').glob('*.ipynb'))) and 'cnnbook/examples/mnist.json' in names
    lab = ('from cnnbook.cli import main\nassert main(["lab", "my book", "--copy"]) == 0\nfrom pathlib import Path\n'
           'mine = Path("my book/nbs/03_conv.ipynb")\nmine.write_text(mine.read_text().replace("= None", "= 7"))\n'
           'work = mine.read_bytes()\nshipped = Path("cnnbook/notebooks/03_conv.ipynb")\n'
           'shipped.write_text(shipped.read_text().replace("# Convolution", "# Convolution, anew", 1))\n'
           'assert main(["lab", "my book", "--copy"]) == 0 and mine.read_bytes() == work\n'
           'there = ("nbs/03_conv.new.ipynb", "nbs/budget.json", "examples/mnist.json")\n'
           'print(all((Path("my book")/n).exists() for n in there), sorted(p.name for p in Path("my book").iterdir()))')
    run = subprocess.run([sys.executable, '-c', lab], capture_output=True, text=True, cwd=tmp_path/'a path',
                         env=os.environ | {'PYTHONPATH': str(tmp_path/'a path')})
    assert run.stdout.endswith("True ['examples', 'nbs']\n"), run.stderr
    assert '1 beside an edited one: 03_conv.new.ipynb' in run.stderr


def test_fault_64_no_compiler(tmp_path):
    wheel = build(tmp_path, CC='/no/such/compiler', CXX='/no/such/compiler', CNNBOOK_REQUIRE_CEXT='')
    assert not any('_cext' in n for n in zipfile.ZipFile(wheel).namelist())
    out = try_it(wheel, tmp_path/'site', 'import numpy as np\nfrom cnnbook.boxes import box_iou\nimport warnings\n'
                 'with warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter("always")\n'
                 '    print(box_iou(np.array([[0., 0, 2, 2]]), np.array([[1., 0, 3, 2]])))\n'
                 'print([str(i.message) for i in w])')
    assert '0.333' in out and 'slow Python' in out
