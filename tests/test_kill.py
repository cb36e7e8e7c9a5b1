"A run that is killed (kill -9) at random instants, again and again, ends with the weights of one that never was."
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('kill_run.py')


def begin(folder):
    run = subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True)
    assert run.stdout.readline() == 'begun\n', run.communicate()
    return run


def finish(run):
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0, out
    return out.splitlines()[-1]


@pytest.mark.parametrize('kills', [3, pytest.param(50, marks=pytest.mark.slow)])
def test_fault_22_killed_at_random_instants(tmp_path, kills):
    run = begin(tmp_path/'whole')
    started = time.monotonic()
    whole, length = finish(run), time.monotonic() - started
    assert whole.startswith('weights ')
    instants, killed, done, folder = random.Random(0), 0, 0, tmp_path/'killed'
    while killed < kills:
        run = begin(folder)
        try: run.wait(instants.uniform(0, .7*length))
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            killed += 1
        else:                                                  # it came to its end first
            assert finish(run) == whole
            done += 1
            shutil.rmtree(folder)
    assert finish(begin(folder)) == whole
    assert not [p for p in folder.iterdir() if p.stat().st_size == 0 and p.suffix == '.ckpt']
    print(f'{killed} kills, {done + 1} runs came to their end, all with the same weights')
