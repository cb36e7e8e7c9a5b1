"""Chapter 33 where a cell is not enough: the ends of real processes, a download that works, faked machines."""
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from test_device import FACTS, NANO, ORIN, PC, THOR, write

import cnnbook.device
import cnnbook.files
from cnnbook.cli import main

COMMAND = [sys.executable, '-c', 'from cnnbook.cli import main; raise SystemExit(main())']


def cnnbook_(*words, **kwargs):
    return subprocess.run([*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, timeout=60,
                          **{'stdout': subprocess.PIPE} | kwargs)


# --- fault 65: errors in one line, exit codes, the ends of a process ---

@pytest.mark.parametrize('words, said', [
    (['docter'], 'command: expected lab, doctor, bench, data, train, show, progress, '
                 "got 'docter'; did you mean doctor?"),
    (['data', 'fetch', 'minst'], "name: expected mnist, fashion_mnist, cifar10, got 'minst'; did you mean mnist?")])
def test_fault_65_unknown_word_is_one_line_and_code_2(words, said):
    r = cnnbook_(*words)
    assert (r.returncode, r.stdout, r.stderr) == (2, '', f'cnnbook: {said}\n')


@pytest.mark.parametrize('words, said', [
    ([], 'command: expected lab, doctor, bench, data, train, show, progress, got none'),
    (['data'], 'expected list, fetch, where, got none'),
    (['data', 'fetch'], 'required: NAME; see cnnbook data fetch --help'), (['data', 'fetch', ''], "got ''"),
    (['doctor', 'now'], "argument: expected none, got 'now'"), (['--verison'], 'did you mean --version?'),
    (['data', 'list', '--root'], 'expected one argument'), (['data', 'where', '-x'], "got '-x'"),
    (['train'], 'required: -c/--config'), (['train', '-c', 'a', '--resum', 'b'], 'did you mean --resume?'),
    (['train', '-c', 'a', '--lr', '1'], "got '--lr'"), (['show'], 'required: CHECKPOINT')])
def test_fault_65_bad_words_in_process(capsys, words, said):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('cnnbook: ') and said in err


def test_fault_65_traceback_only_with_debug():
    r = cnnbook_('data', 'fetch', 'nothing', '--debug')
    assert r.returncode == 1 and 'Traceback' in r.stderr and 'ValueError: name: expected' in r.stderr


def test_fault_65_root_that_is_a_file(tmp_path, capsys):
    (tmp_path/'file').write_text('x')
    assert main(['data', 'fetch', 'mnist', '--root', str(tmp_path/'file')]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and (tmp_path/'file').read_text() == 'x'


def test_fault_65_reader_of_the_pipe_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    r = cnnbook_('data', 'list', stdout=writer)
    os.close(writer)
    assert (r.returncode, r.stderr) == (141, '')


def test_fault_65_both_streams_gone():
    reader, writer = os.pipe()
    os.close(reader)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}      # with it nothing is left to flush
    r = subprocess.run([*COMMAND, 'docter'], stdout=writer, stderr=writer, timeout=60, env=env)
    os.close(writer)
    assert r.returncode == 2


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_fault_65_disk_full_is_one_line():
    with open('/dev/full', 'w') as full: r = cnnbook_('data', 'where', stdout=full)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'No space left' in r.stderr


def entry(url, data):
    return {'title': 'Tiny', 'about': 'five bytes', 'licence': 'CC0', 'stand_in': 'digits', 'bytes': len(data),
            'files': {'tiny/a.bin': {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data)}},
            'sources': [{'urls': [url], 'to': 'tiny/a.bin'}]}


def test_fault_65_ctrl_c_in_a_download(tmp_path):
    server = socket.create_server(('127.0.0.1', 0))
    asked = threading.Event()

    def stall():
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc')
            asked.set()
            with suppress(OSError): connection.recv(4096)  # returns when the client leaves

    thread = threading.Thread(target=stall, daemon=True)
    thread.start()
    sets = json.dumps({'tiny': entry(f'http://127.0.0.1:{server.getsockname()[1]}/a.bin.gz', b'x' * 1000)})
    # a run in the background ignores Ctrl-C, and its children inherit that: switch it on
    code = ('import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
            'import sys, json, cnnbook.files; from cnnbook.cli import main; '
            'cnnbook.files.manifest = lambda: json.loads(sys.argv.pop()); s = cnnbook.files.manifest(); '
            'cnnbook.files.manifest = lambda: s; raise SystemExit(main())')
    process = subprocess.Popen([sys.executable, '-c', code, 'data', 'fetch', 'tiny', '--root', tmp_path/'data', sets],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {'CNNBOOK_OFFLINE': '0'})
    try:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        server.close()
        thread.join(10)
    assert (process.returncode, out, err) == (130, '', 'cnnbook: interrupted\n')
    assert [p for p in (tmp_path/'data').rglob('*') if p.is_file()] == []


# --- fault 65: train and show as real processes ---

TRAINER = {'max_epochs': 2, 'device': 'cpu', 'default_root_dir': 'results'}
SAVE = [{'name': 'ModelCheckpoint'}]


def config(folder, text=None, **sections):
    sections = {'data': {'limit': 200}, 'trainer': TRAINER, 'callbacks': SAVE} | sections
    (folder/'run.json').write_text(json.dumps(sections) if text is None else text)
    return folder


def train_(folder, *words, **kwargs): return cnnbook_('train', '-c', 'run.json', *words, cwd=folder, **kwargs)


@pytest.mark.parametrize('sections, said', [
    ({'trainer': {'max_epoch': 3}}, 'trainer.max_epoch: expected one of '),
    ({'epoch': 3}, 'did you mean trainer.max_epochs?'),
    ({'optimizer': {'lr': '0.1'}}, 'optimizer.lr: expected a number above 0 to 1000, got "0.1"'),
    ({'trainer': {'max_epochs': -1}}, 'trainer.max_epochs: expected a whole number from 1 to 100000, or null, got -1'),
    ({'trainer': {'max_epochs': 0}}, 'got 0'), ({'trainer': {'max_epochs': 1e9}}, 'got 1000000000.0'),
    ({'optimizer': {'lr': float('nan')}}, 'optimizer.lr: expected a number above 0 to 1000, got NaN'),
    ({'trainer': {'device': 'cuda:77'}}, 'trainer.device: expected a device that works, got cuda:77'),
    ({'data': {'root': 'nowhere'}}, 'data.root: expected a folder, got nowhere'),
    ({'schedule': {'name': 'one_cycle', 'total_steps': 9}, 'trainer': TRAINER | {'max_steps': 3}},
     'schedule.total_steps: expected the 3 steps of this run'),
    ({'trainer': {'max_epochs': None}}, 'trainer.max_epochs: expected a number, or max_steps above 0, got neither'),
    ({'model': {'name': 'shutil.rmtree'}}, 'model.name: expected a network of yours'),
    ({'model': {'name': 'layers', 'layers': ['Flaten']}}, 'did you mean Flatten?'),
    ({'callbacks': [{'name': 'ModelCheckpoint', 'monitr': 'x'}]}, 'callbacks[0].monitr: expected one of '),
    ({'loggers': [{'name': 'CSVLogger'}]}, 'loggers[0]: expected what CSVLogger takes')])
def test_fault_65_an_impossible_config_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, sections, said):
    monkeypatch.chdir(config(tmp_path, **sections))
    assert main(['train', '-c', 'run.json']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('cnnbook: ') and said in err, err
    assert [p.name for p in tmp_path.iterdir()] == ['run.json']


@pytest.mark.parametrize('text, said', [
    ('{"seed": 1,}', 'line 1, column'), ('', 'line 1, column 1'), ('seed: 1', 'line 1, column 1'),
    ('[]', 'expected an object'),
    ('{"seed": 1, "seed": 2}', 'seed: expected once in its section, got 2 times'),
    ('{\n "seed": 1\n "data": {}}', "line 3, column 2")])
def test_fault_65_broken_file(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.chdir(config(tmp_path, text))
    assert main(['train', '-c', 'run.json']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('cnnbook: run.json: ') and said in err, err


def test_fault_65_train_in_real_processes(tmp_path):
    r = train_(config(tmp_path, trainer={'max_epoch': 3}))
    assert (r.returncode, r.stdout, r.stderr.count('\n')) == (2, '', 1) and 'did you mean max_epochs?' in r.stderr
    r = train_(config(tmp_path))
    assert r.returncode == 0 and r.stdout.count('\nepoch ') == 2 and r.stderr == ''


def test_train_goes_on_for_longer_but_not_as_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(config(tmp_path))
    words = ['train', '-c', 'run.json', '-r', 'last']
    assert main(words[:3]) == 0 and capsys.readouterr().out.count('\nepoch ') == 2
    assert main(['show', 'results/checkpoints/last.ckpt']) == 0
    out, err = capsys.readouterr()
    assert 'epoch      2, step 4' in out and '"limit": 200' in out and err == ''
    config(tmp_path, seed=1)
    before = (tmp_path/'results'/'checkpoints'/'last.ckpt').read_bytes()
    assert main(words) == 2 and capsys.readouterr().err.startswith('cnnbook: seed: expected 0, as in')
    assert (tmp_path/'results'/'checkpoints'/'last.ckpt').read_bytes() == before
    config(tmp_path, trainer=TRAINER | {'max_epochs': 3})
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count('\nepoch ') == 1 and 'epoch 2  step 6' in out
    with pytest.raises(ValueError, match='max_epoch: expected'):
        config(tmp_path, trainer={'max_epoch': 3})
        main([*words, '--debug'])


SLOW_NET = """
import time
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        if self.training: time.sleep(.1)
        return self.linear(x.flatten(1))
"""


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fault_65_a_signal_ends_a_run_with_a_checkpoint_and_its_code(tmp_path, capsys, number, code):
    config(tmp_path, trainer=TRAINER | {'max_epochs': 500}, model={'name': 'slow_net.Net'})
    (tmp_path/'slow_net.py').write_text(SLOW_NET)
    words = ['import signal; signal.signal(signal.SIGINT, signal.default_int_handler); ' + COMMAND[2]]
    process = subprocess.Popen([*COMMAND[:2], *words, 'train', '-c', 'run.json'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert any(line.startswith('epoch 0') for line in process.stdout)         # it has begun
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally: process.kill()
    assert process.returncode == code, err
    assert err.count('\n') == 1 and 'resume with ckpt_path=' in err and 'last.ckpt' in err
    assert main(['show', str(tmp_path/'results'/'checkpoints'/'last.ckpt')]) == 0
    assert '"name": "slow_net.Net"' in capsys.readouterr().out


def test_fault_65_reader_of_a_training_run_leaves(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    r = train_(config(tmp_path), stdout=writer)
    os.close(writer)
    assert (r.returncode, r.stderr) == (141, '')


@pytest.mark.parametrize('content, said', [
    (b'', 'is damaged'), (b'PK' + bytes(100), 'is damaged'), (None, 'which is not there')])
def test_show_refuses_in_one_line(tmp_path, capsys, content, said):
    path = tmp_path/'x.ckpt'
    if content is not None: path.write_bytes(content)
    assert main(['show', str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and said in err


def test_show_of_a_hostile_pickle_runs_nothing(tmp_path, capsys):
    class Hostile:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    import torch
    torch.save({'state_dict': Hostile()}, tmp_path/'raw')
    raw = (tmp_path/'raw').read_bytes()
    (tmp_path/'x.ckpt').write_bytes(raw + hashlib.sha256(raw).digest())
    assert main(['show', str(tmp_path/'x.ckpt')]) == 2 and 'refused' in capsys.readouterr().err
    assert not (tmp_path/'ran').exists()


def test_help_and_errors_load_nothing_heavy():
    code = ('import sys; from cnnbook.cli import main; main(["--help"]); main(["docter"]); '
            'sys.exit("torch" in sys.modules or "numpy" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, timeout=60).returncode == 0


# --- data: a set that arrives, is damaged, is repaired ---

def test_data_commands_through_the_life_of_a_set(tmp_path, monkeypatch, capsys):
    (tmp_path/'a.bin.gz').write_bytes(gzip.compress(b'right'))
    monkeypatch.setattr(cnnbook.files, 'manifest', lambda: {'tiny': entry((tmp_path/'a.bin.gz').as_uri(), b'right')})
    root = tmp_path/'with space'
    where, show = ['data', 'where', 'tiny', '--root', str(root)], ['data', 'list', '--root', str(root)]

    assert main(where) == 1 and 'tiny: absent' in capsys.readouterr().err
    assert main(['data', 'fetch', 'tiny', '--root', str(root)]) == 0
    assert capsys.readouterr().out == f'tiny: complete in {root}\n'
    assert main(where) == 0 and capsys.readouterr() == (f'{root}/tiny/a.bin\n', '')
    assert main(show) == 0
    out = capsys.readouterr().out
    assert f'data in {root}' in out and 'complete' in out and 'Tiny: five bytes; licence: CC0' in out

    (root/'tiny'/'a.bin').write_bytes(b'wrong')
    assert main(show) == 0 and 'damaged: tiny/a.bin' in capsys.readouterr().out
    assert main(where) == 1 and 'tiny: damaged' in capsys.readouterr().err
    assert main(['data', 'fetch', 'tiny', '--root', str(root)]) == 0
    out, err = capsys.readouterr()
    assert out == f'tiny: complete in {root}\n' and 'fetching again' in err  # remarks are not on stdout
    assert (root/'tiny'/'a.bin').read_bytes() == b'right'


# --- doctor: exit code and text on machines that are not here (fault 66h, rows A1 and A2) ---

@pytest.mark.parametrize('files, arch, facts, code, said', [
    ({}, 'x86_64', {}, 0, 'device      cpu'),
    (PC, 'x86_64', dict(build='CPU', version='2.9.0+cpu'), 1, 'torch 2.9.0+cpu is a CPU build and ignores the GPU'),
    (ORIN, 'aarch64', dict(build='CPU'), 1, "a general wheel replaced NVIDIA's"),
    (ORIN, 'aarch64', dict(cuda_error='', gpu='Orin', capability=(8, 7)), 0, 'gpu_bf16    True'),
    (ORIN | {'proc/meminfo': 'MemAvailable: 900000 kB'}, 'aarch64', dict(cuda_error=''), 0, 'advice      only 0.9 GiB'),
    (THOR, 'aarch64', dict(cuda_error=''), 0, 'jetpack     7'),
    (NANO, 'aarch64', dict(build='CPU'), 1, 'with JetPack 4 is too old')])
def test_doctor_on_faked_machines(tmp_path, monkeypatch, capsys, files, arch, facts, code, said):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(cnnbook.device, '_torch_facts', lambda: FACTS | facts)
    (tmp_path/'proc'/'sys'/'kernel').mkdir(parents=True)
    (tmp_path/'proc'/'sys'/'kernel'/'osrelease').write_text('6.8.0-generic')
    assert main(['doctor', '--root', str(write(tmp_path, files)), '--arch', arch]) == code
    out, err = capsys.readouterr()
    assert said in out and err == ''


def test_doctor_here_in_a_real_process():
    r = cnnbook_('doctor')
    assert r.returncode in (0, 1) and (r.returncode == 1) == ('PROBLEM' in r.stdout) and r.stderr == ''
    assert 'version' in r.stdout and 'extension' in r.stdout
