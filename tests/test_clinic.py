"""What the clinic's cells cannot say: its list is whole, its links lead somewhere, old calls fail."""
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cnnbook import clinic, clinic_answers, clinic_data, clinic_loops, clinic_old, clinic_transfer
from cnnbook.trace import keep_rng

NBS = Path(__file__).resolve().parent.parent/'nbs'
MODULES = clinic, clinic_answers, clinic_loops, clinic_transfer, clinic_data, clinic_old
CASES = [*clinic.CASES, *clinic_answers.ANSWER_CASES, *clinic_loops.LOOP_CASES, *clinic_transfer.TRANSFER_CASES,
         *clinic_data.DATA_CASES]


def checks():
    "Every check of the clinic."
    return {name: getattr(m, name) for m in MODULES for name in vars(m)
            if name.startswith('check_') and getattr(m, name).__module__ == m.__name__}


def text(stem):
    cells = json.loads((NBS/f'{stem}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells)


def test_the_list_has_forty_rows_and_its_links_lead_somewhere():
    rows = re.findall(r'^\| (\d+) \| .+ \| (.+) \|$', text('11b_clinic'), re.M)
    assert [int(n) for n, _ in rows] == list(range(1, 41)) and all(where.strip() for _, where in rows)
    linked = {f for _, where in rows for f in re.findall(r'\]\((\w+\.ipynb)\)', where)}
    assert linked and all((NBS/f).exists() for f in linked), linked


def test_each_case_has_its_exercise_in_the_chapter_that_the_list_names():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names) == 22
    assert {f'check_{n}' for n in names} <= checks().keys()
    where = dict(re.findall(r'\[11\w\]\((11\w_\w+)\.ipynb\) `(\w+)`', text('11b_clinic')))
    for stem, name in where.items(): assert f'**Exercise `{name}`**' in text(stem), (stem, name)
    rows = {int(n): line for n, line in re.findall(r'^\| (\d+) \| (.+) \|$', text('11b_clinic'), re.M)}
    for c in CASES: assert not c.row or f'`{c.name}`' in rows[c.row], c


@pytest.mark.parametrize('name', sorted(checks()))
def test_checks_leave_the_random_state_and_survive_nonsense(name):
    check = checks()[name]
    import torch
    with keep_rng():
        before = torch.get_rng_state()
        for nonsense in (0, 'text', lambda *args: None, lambda *args: 0, print):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                assert check.judge(nonsense).passed is False, nonsense
        assert check.judge(None).passed is None
        assert torch.equal(torch.get_rng_state(), before)


def test_old_names_of_numpy_fail_in_a_fresh_process():
    code = 'import numpy as n; print(int(n.__version__.split(".")[0]) < 2 or not hasattr(n, "Inf"))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'True'


def test_old_names_of_torchmetrics_and_lightning():
    torchmetrics = pytest.importorskip('torchmetrics')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = pytest.importorskip('lightning.pytorch')
    assert not hasattr(torchmetrics, 'IoU') and hasattr(torchmetrics, 'JaccardIndex')
    names = [m[1] for c in clinic_old.OLD_CALLS if (m := re.match(r'Trainer\((\w+)=', c.old))]
    assert len(names) == 5
    for name in names:
        with pytest.raises(TypeError, match=name): trainer.Trainer(**{name: 1})
    hooks = [c.old.removeprefix('def ') for c in clinic_old.OLD_CALLS if c.old.startswith('def ')]
    assert hooks and not any(hasattr(trainer.Callback, h) for h in hooks)
    assert hasattr(trainer.Callback, 'setup') and hasattr(trainer.Callback, 'on_exception')
