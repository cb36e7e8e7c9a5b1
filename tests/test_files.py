"""Downloads, archives and data sets under fire: faults 1-9 and 16-18, on local servers, with real kills."""
import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cnnbook.disk import PART, unpack, write_atomic
from cnnbook.files import DownloadError, data_root, download, fetch, manifest, status

DATA = hashlib.shake_256(b'toy').digest(300_000)
RIGHT = hashlib.sha256(DATA).hexdigest()
LABELS = bytes(range(10))*100
FILES = {f'TOY/raw/{n}': {'sha256': hashlib.sha256(d).hexdigest(), 'bytes': len(d)}
         for n, d in (('images', DATA), ('labels', LABELS))}
PACKED = {'/images.gz': gzip.compress(DATA), '/labels.gz': gzip.compress(LABELS)}


class Mirror(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        route = self.server.routes[self.path]
        if callable(route): return route(self)
        self.send_response(200)
        self.send_header('Content-Length', str(len(route)))
        self.end_headers()
        self.wfile.write(route)

    def log_message(self, *args): pass


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Mirror)
        self.routes, self.asked, self.closing = {'/toy.bin': DATA, **PACKED}, [], threading.Event()
        self.started = threading.Event()
        self.base = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': .02}, daemon=True).start()

    def handle_error(self, request, address): pass  # a client that was killed is no news

    def part(self, data, then_wait=False, announced=None):
        "A route that sends part of what it announced, then closes or falls asleep."
        def route(handler):
            handler.send_response(200)
            handler.send_header('Content-Length', str(announced or len(DATA)))
            handler.end_headers()
            handler.wfile.write(data)
            handler.wfile.flush()
            self.started.set()
            if then_wait: self.closing.wait(30)
        return route

    def entry(self):
        source = lambda n: {'urls': [f'{self.base}/{n}.gz'], 'to': f'TOY/raw/{n}'}
        return {'stand_in': 'digits', 'files': FILES, 'sources': [source('images'), source('labels')]}


def error(code): return lambda handler: handler.send_error(code)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.delenv('CNNBOOK_OFFLINE', raising=False)
    one = Server()
    yield one
    one.closing.set()
    one.shutdown()
    one.server_close()


def child(code, *args):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=pipe, stderr=pipe, text=True)


def everything(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*'))


FETCH = 'import json, sys; from cnnbook.files import fetch; fetch("toy", sys.argv[1], entry=json.loads(sys.argv[2]))'


def test_fault_01_truncated_download(server, tmp_path, capsys):
    server.routes['/short'] = server.part(DATA[:1000])
    path, short, good = tmp_path/'toy.bin', f'{server.base}/short', f'{server.base}/toy.bin'
    with pytest.raises(DownloadError, match=f'incomplete: 1000 of 300000 bytes from {short}'):
        download(short, path, RIGHT)
    assert everything(tmp_path) == []
    download([short, good], path, RIGHT)                 # the next mirror
    assert f'incomplete: 1000 of 300000 bytes from {short}; trying the next' in capsys.readouterr().out
    assert path.read_bytes() == DATA and everything(tmp_path) == ['toy.bin']
    path.unlink()
    server.routes['/short'] = DATA                       # a later retry
    assert download(short, path, RIGHT).read_bytes() == DATA


def test_fault_01_truncated_without_a_length(server, tmp_path):
    def chunked(handler):
        handler.protocol_version = 'HTTP/1.1'
        handler.send_response(200)
        handler.send_header('Transfer-Encoding', 'chunked')
        handler.end_headers()
        handler.wfile.write(b'ffff\r\n' + DATA[:1000])
        handler.close_connection = True
    server.routes['/chunked'] = chunked
    with pytest.raises(DownloadError, match='incomplete: 1000 of None bytes'):
        download(f'{server.base}/chunked', tmp_path/'x')
    assert everything(tmp_path) == []


def test_fault_02_error_page_as_data(server, tmp_path):
    page = b'\n<!DOCTYPE html><title>Log in to the hotel</title>'
    server.routes |= {'/toy.bin': page, '/labels.gz': page}
    path = tmp_path/'toy.bin'
    path.write_bytes(b'old and good')
    with pytest.raises(DownloadError, match='sha256 mismatch: .* looks like HTML'):
        download(f'{server.base}/toy.bin', path, RIGHT)
    assert path.read_bytes() == b'old and good'
    with pytest.raises(DownloadError, match='labels.gz.* looks like HTML'):
        fetch('toy', tmp_path/'set', entry=server.entry())
    assert everything(tmp_path/'set') == ['TOY', 'TOY/raw', 'TOY/raw/images']
    server.routes['/labels.gz'] = PACKED['/images.gz']     # a sound archive, but of another file
    with pytest.raises(DownloadError, match='sha256 mismatch after unpacking: damaged: TOY/raw/labels'):
        fetch('toy', tmp_path/'set', entry=server.entry())
    assert everything(tmp_path/'set') == ['TOY', 'TOY/raw', 'TOY/raw/images']


def test_fault_03_mirror_gone(server, tmp_path):
    server.routes |= {'/a': error(404), '/b': error(403)}
    urls = [f'{server.base}/a', f'{server.base}/b']
    with pytest.raises(DownloadError) as e: download(urls, tmp_path/'toy.bin', RIGHT)
    text = str(e.value)
    assert f'HTTP 404 Not Found from {urls[0]}' in text and f'HTTP 403 Forbidden from {urls[1]}' in text
    assert f'by hand at {tmp_path/"toy.bin"} (sha256 {RIGHT})' in text and text.count('\n') == 1
    assert [u for u, _ in e.value.tries] == urls and pickle.loads(pickle.dumps(e.value)).tries == e.value.tries


def test_fault_04_stalled_server(server, tmp_path):
    server.routes['/stall'] = server.part(DATA[:1000], then_wait=True)
    began = time.monotonic()
    with pytest.raises(DownloadError, match='stalled: no byte for 0.5 s after 1000 of 300000 bytes'):
        download(f'{server.base}/stall', tmp_path/'toy.bin', RIGHT, timeout=.5)
    assert time.monotonic() - began < 2 and everything(tmp_path) == []


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_fault_04_interrupt_works_at_once(server, tmp_path):
    server.routes['/stall'] = server.part(DATA[:1000], then_wait=True)
    run = child('import signal, sys; from cnnbook.files import download; '
                'signal.signal(signal.SIGINT, signal.default_int_handler); download(sys.argv[1], sys.argv[2])',
                f'{server.base}/stall', tmp_path/'toy.bin')
    assert server.started.wait(20)
    time.sleep(.1)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in run.communicate(timeout=10)[1] and run.returncode != 0
    assert time.monotonic() - began < 2 and everything(tmp_path) == []


def together(server, data):
    "A route that sends the first half at once and the rest when three clients have come."
    meet = threading.Barrier(3)
    def route(handler):
        server.part(data[:len(data)//2], announced=len(data))(handler)
        with contextlib.suppress(threading.BrokenBarrierError): meet.wait(20)
        handler.wfile.write(data[len(data)//2:])
    return route


def test_fault_05_three_processes_one_file(server, tmp_path):
    server.routes['/toy.bin'] = together(server, DATA)
    code = 'import sys; from cnnbook.files import download; download(*sys.argv[1:])'
    runs = [child(code, f'{server.base}/toy.bin', tmp_path/'toy.bin', RIGHT) for _ in range(3)]
    for run in runs: assert (run.communicate(timeout=60)[1], run.returncode) == ('', 0)
    assert (tmp_path/'toy.bin').read_bytes() == DATA and everything(tmp_path) == ['toy.bin']


def test_fault_05_three_processes_one_set(server, tmp_path):
    server.routes['/images.gz'] = together(server, PACKED['/images.gz'])
    runs = [child(FETCH, tmp_path, json.dumps(server.entry())) for _ in range(3)]
    for run in runs: assert (run.communicate(timeout=60)[1], run.returncode) == ('', 0)
    assert status('toy', tmp_path, server.entry()) == 'complete' and server.asked.count('/images.gz') == 3
    assert everything(tmp_path) == ['TOY', 'TOY/raw', 'TOY/raw/images', 'TOY/raw/labels']


def test_fault_06_killed_in_mid_download(server, tmp_path, capsys):
    server.routes['/images.gz'] = server.part(DATA[:150_000], then_wait=True)
    run = child(FETCH, tmp_path, json.dumps(server.entry()))
    assert server.started.wait(20)
    time.sleep(.1)
    run.kill()
    run.communicate()
    left = [p for p in tmp_path.iterdir() if p.name.endswith(PART)]
    assert len(left) == 1 and everything(tmp_path)[0].startswith('.')
    assert status('toy', tmp_path, server.entry()) == 'absent'
    server.routes['/images.gz'] = PACKED['/images.gz']
    fetch('toy', tmp_path, entry=server.entry())
    assert capsys.readouterr() == ('', '') and status('toy', tmp_path, server.entry()) == 'complete'
    for p in [left[0], *left[0].rglob('*')]: os.utime(p, (time.time() - 100_000,)*2)
    with write_atomic(tmp_path/'next') as f: f.write(b'x')                       # the next day
    assert everything(tmp_path) == ['TOY', 'TOY/raw', 'TOY/raw/images', 'TOY/raw/labels', 'next']


def test_fault_07_damaged_cache(server, tmp_path, capsys, monkeypatch):
    fetch('toy', tmp_path, entry=server.entry())
    path = tmp_path/'TOY/raw/images'
    with open(path, 'r+b') as f: f.seek(150_000), f.write(b'!!')
    damaged = path.read_bytes()
    monkeypatch.setenv('CNNBOOK_OFFLINE', '1')
    with pytest.raises(DownloadError) as e: fetch('toy', tmp_path, entry=server.entry())
    assert f'by hand at {path} (sha256 {RIGHT})' in str(e.value) and 'offline?' in str(e.value)
    assert path.read_bytes() == damaged                                          # nothing was made worse
    monkeypatch.delenv('CNNBOOK_OFFLINE')
    capsys.readouterr(), server.asked.clear()
    fetch('toy', tmp_path, entry=server.entry())
    assert f'{path}: cached file damaged, fetching again' in capsys.readouterr().out
    assert path.read_bytes() == DATA and server.asked == ['/images.gz']          # only what was damaged


def hostile(name, **fields):
    info = tarfile.TarInfo(name)
    for key, value in fields.items(): setattr(info, key, value)
    return info


HOSTILE = {
    'climbs': [hostile('../outside.txt', size=6)],
    'climbs-late': [hostile('a/b/../../../outside.txt', size=6)],
    'absolute': [hostile('FOLDER/outside.txt', size=6)],
    'backslash': [hostile('a\\..\\..\\outside.txt', size=6)],
    'drive': [hostile('C:\\outside.txt', size=6)],
    'symlink': [hostile('link', type=tarfile.SYMTYPE, linkname='..'), hostile('link/outside.txt', size=6)],
    'hardlink': [hostile('hard', type=tarfile.LNKTYPE, linkname='../outside.txt'), hostile('hard', size=6)],
    'device': [hostile('dev', type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    'pipe': [hostile('pipe', type=tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize('kind', HOSTILE)
@pytest.mark.parametrize('suffix', ['.tar', '.tar.gz'])
def test_fault_08_hostile_tar(kind, suffix, tmp_path):
    (tmp_path/'outside.txt').write_bytes(b'before')
    with tarfile.open(tmp_path/f'bad{suffix}', 'w:gz' if suffix == '.tar.gz' else 'w') as t:
        t.addfile(hostile('good.txt', size=5), io.BytesIO(b'seven'))
        for info in map(copy.copy, HOSTILE[kind]):
            info.name = info.name.replace('FOLDER', str(tmp_path))
            t.addfile(info, io.BytesIO(b'beyond') if info.size else None)
    with pytest.raises(ValueError) as e: unpack(tmp_path/f'bad{suffix}', tmp_path/'out')
    name = HOSTILE[kind][0].name.replace('FOLDER', str(tmp_path))
    assert f'refusing unsafe member {name}' in str(e.value)
    assert everything(tmp_path) == [f'bad{suffix}', 'outside.txt']
    assert (tmp_path/'outside.txt').read_bytes() == b'before'


@pytest.mark.parametrize('name, mode', [('../outside.txt', 0), ('FOLDER/outside.txt', 0), ('C:/outside.txt', 0),
                                        ('link', stat.S_IFLNK | 0o777), ('dev', stat.S_IFCHR | 0o644)])
def test_fault_08_hostile_zip(name, mode, tmp_path):
    with zipfile.ZipFile(tmp_path/'bad.zip', 'w') as z:
        z.writestr('good.txt', 'seven')
        info = zipfile.ZipInfo(name.replace('FOLDER', str(tmp_path)))
        info.external_attr = mode << 16
        z.writestr(info, '..')
    with pytest.raises(ValueError, match='refusing unsafe member'): unpack(tmp_path/'bad.zip', tmp_path/'out')
    assert everything(tmp_path) == ['bad.zip']


def test_fault_08_hostile_archive_of_a_mirror(server, tmp_path):
    with tarfile.open(tmp_path/'bad.tar', 'w') as t: t.addfile(hostile('../outside.txt', size=6), io.BytesIO(b'beyond'))
    bad = (tmp_path/'bad.tar').read_bytes()
    server.routes['/toy.tar'] = bad
    entry = {'stand_in': 'shapes', 'files': FILES, 'sources': [
        {'urls': [f'{server.base}/toy.tar'], 'to': 'TOY', 'sha256': hashlib.sha256(bad).hexdigest()}]}
    with pytest.raises(DownloadError, match='refusing unsafe member ../outside.txt'):
        fetch('toy', tmp_path/'root', entry=entry)
    assert everything(tmp_path) == ['bad.tar', 'root'] and status('toy', tmp_path/'root', entry) == 'absent'


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'page', 'empty'])
@pytest.mark.parametrize('suffix', ['.tar', '.tar.gz', '.zip', '.gz'])
def test_damaged_archives_are_refused(damage, suffix, tmp_path):
    path = tmp_path/f'x{suffix}'
    if suffix == '.gz': path.write_bytes(PACKED['/images.gz'])
    elif suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('x.bin', DATA)
    else:
        with tarfile.open(path, 'w:gz' if suffix == '.tar.gz' else 'w') as t:
            t.addfile(hostile('x.bin', size=300_000), io.BytesIO(DATA))
    good = path.read_bytes()
    flipped = good[:150_000] + bytes([good[150_000] ^ 255]) + good[150_001:]
    path.write_bytes({'cut': good[:200_000], 'flipped': flipped, 'page': b'<html>no</html>', 'empty': b''}[damage])
    if (suffix, damage) == ('.tar', 'flipped'):              # a tar has no checksum of its contents: digests must tell
        assert unpack(path, tmp_path/'out')[0].read_bytes() != DATA
        return
    if (suffix, damage) == ('.gz', 'empty'):                 # Python reads an empty gzip file as an empty file
        assert unpack(path, tmp_path/'out')[0].read_bytes() == b''
        return
    with pytest.raises(ValueError, match='expected a whole archive') as e: unpack(path, tmp_path/'out')
    assert ('HTML' in str(e.value)) == (damage == 'page') and everything(tmp_path) == [path.name]


@pytest.mark.parametrize('kind', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize('at', [45, 60, 1000])
def test_damaged_zips_of_every_kind_are_refused(kind, at, tmp_path):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w', kind) as z: z.writestr('x.bin', DATA)
    good = (tmp_path/'x.zip').read_bytes()
    (tmp_path/'x.zip').write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1:])
    with pytest.raises(ValueError, match='x.zip: expected a whole archive'): unpack(tmp_path/'x.zip', tmp_path/'out')
    assert everything(tmp_path) == ['x.zip']


@pytest.mark.parametrize('names', [('a', 'a/b'), ('a/b', 'a'), ('a', 'a/b/c'), ('a', 'a/'), ('.',), ('a/..b', 'A')])
def test_archives_with_a_file_where_a_folder_is_are_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w') as z:
        for name in names: z.writestr(name, '' if name.endswith('/') else 'seven')
    with pytest.raises(ValueError, match=f'file or a folder, got both for {names[-1]}'):
        unpack(tmp_path/'x.zip', tmp_path/'out')
    assert everything(tmp_path) == ['x.zip']


def test_fault_09_killed_in_extraction(server, tmp_path):
    with tarfile.open(tmp_path/'toy.tar.gz', 'w:gz') as t:
        for name, data in (('images', DATA), ('labels', LABELS)):
            t.addfile(hostile(f'TOY/raw/{name}', size=len(data)), io.BytesIO(data))
    packed = server.routes['/toy.tar.gz'] = (tmp_path/'toy.tar.gz').read_bytes()
    entry = {'stand_in': 'shapes', 'files': FILES, 'sources': [
        {'urls': [f'{server.base}/toy.tar.gz'], 'to': 'TOY', 'sha256': hashlib.sha256(packed).hexdigest()}]}
    half = ('import os, shutil, signal\n'
            'def half(src, dst, n=0): dst.write(src.read(1000)); dst.flush(); os.kill(os.getpid(), signal.SIGKILL)\n'
            'shutil.copyfileobj = half\n')
    root = tmp_path/'root'
    run = child(half + FETCH, root, json.dumps(entry))
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL and any(p.stat().st_size == 1000 for p in root.rglob('images'))
    assert status('toy', root, entry) == 'absent' and not (root/'TOY').exists()
    fetch('toy', root, entry=entry)
    assert status('toy', root, entry) == 'complete'
    run = child(half + 'import sys; from cnnbook.disk import unpack; unpack(*sys.argv[1:])',
                tmp_path/'toy.tar.gz', tmp_path/'out')
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL and not (tmp_path/'out').exists()
    assert [p.name for p in unpack(tmp_path/'toy.tar.gz', tmp_path/'out')] == ['images', 'labels']


def test_an_archive_placed_by_hand_comes_first(server, tmp_path, monkeypatch, capsys):
    with tarfile.open(tmp_path/'toy.tar.gz', 'w:gz') as t:
        for name, data in (('images', DATA), ('labels', LABELS)):
            t.addfile(hostile(f'TOY/raw/{name}', size=len(data)), io.BytesIO(data))
    packed = server.routes['/toy.tar.gz'] = (tmp_path/'toy.tar.gz').read_bytes()
    (tmp_path/'toy.tar.gz').write_bytes(packed[:-9])         # the stick was pulled too early
    entry = {'stand_in': 'shapes', 'files': FILES, 'sources': [
        {'urls': [f'{server.base}/toy.tar.gz'], 'to': 'TOY', 'sha256': hashlib.sha256(packed).hexdigest()}]}
    fetch('toy', tmp_path, entry=entry)
    assert 'sha256 mismatch' in capsys.readouterr().out and server.asked == ['/toy.tar.gz']
    shutil.rmtree(tmp_path/'TOY')
    (tmp_path/'toy.tar.gz').write_bytes(packed)
    monkeypatch.setenv('CNNBOOK_OFFLINE', '1')
    fetch('toy', tmp_path, entry=entry)
    assert status('toy', tmp_path, entry) == 'complete' and len(server.asked) == 1 and (tmp_path/'toy.tar.gz').exists()


@pytest.mark.parametrize('name', ['with space', 'Größe', '日本 %41#?'])
def test_fault_16_odd_names(server, tmp_path, name, monkeypatch):
    monkeypatch.setenv('CNNBOOK_DATA', str(tmp_path/name))
    raw = tmp_path/name/'TOY/raw'
    raw.mkdir(parents=True)
    (raw/'labels.gz').write_bytes(PACKED['/labels.gz'])      # by hand, read through a file URL
    assert fetch('toy', entry=server.entry()) == tmp_path/name and status('toy', entry=server.entry()) == 'complete'
    assert server.asked == ['/images.gz']


def test_fault_16_linked_root(server, tmp_path):
    (tmp_path/'real').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'real')
    fetch('toy', tmp_path/'link', entry=server.entry())
    assert status('toy', tmp_path/'real', server.entry()) == 'complete' and (tmp_path/'link').is_symlink()


def test_fault_16_no_home(monkeypatch, tmp_path):
    import pwd

    import cnnbook
    monkeypatch.setattr(cnnbook, '__file__', str(tmp_path/'cnnbook'/'__init__.py'))
    for name in ('HOME', 'CNNBOOK_DATA', 'XDG_CACHE_HOME'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid])
    with pytest.raises(DownloadError, match=r'no home folder .* \$CNNBOOK_DATA'): data_root()
    monkeypatch.setenv('CNNBOOK_DATA', str(tmp_path))
    assert data_root() == tmp_path


READ_ONLY = '''
import json, os, sys
from cnnbook.files import DownloadError, fetch, status
entry = json.loads(sys.argv[2])
fetch('toy', sys.argv[1] + '/full', entry=entry)          # whatever Python imports late is imported now
for name in ('full', 'empty'): os.chmod(sys.argv[1] + '/' + name, 0o555)
try:
    if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)
except OSError: sys.exit('no other user here')           # in a user namespace of one
print(fetch('toy', sys.argv[1] + '/full', entry=entry))   # complete: nothing needs to be written
try: fetch('toy', sys.argv[1] + '/empty', entry=entry)
except DownloadError as e: print(e)
'''


@pytest.mark.skipif(os.name == 'nt', reason='POSIX rights')
def test_fault_16_read_only_root(server):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder)/'empty').mkdir()
        out, err = child(READ_ONLY, folder, json.dumps(server.entry())).communicate(timeout=60)
        for name in ('full', 'empty'): os.chmod(f'{folder}/{name}', 0o755)
        if 'no other user here' in err: pytest.skip('root of a namespace without other users')
        assert err == '' and out.splitlines()[0] == f'{folder}/full' and everything(Path(folder)/'empty') == []
        assert f'cannot use {folder}/empty' in out and 'Permission denied' in out and '$CNNBOOK_DATA' in out


LIMITED = '''
import json, resource, sys
from cnnbook.disk import unpack
from cnnbook.files import DownloadError, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: unpack(sys.argv[3], sys.argv[1] + '/out')
except OSError as e: print(e)
try: fetch('toy', sys.argv[1] + '/set', entry=json.loads(sys.argv[2]))
except DownloadError as e: print(e)
'''


@pytest.mark.skipif(os.name == 'nt', reason='POSIX limits')
def test_fault_17_disk_full(server, tmp_path):
    archive = tmp_path/'zeros.tar.gz'                        # 2 kB packed, 2 MB unpacked: the unpacking fails
    with tarfile.open(archive, 'w:gz') as t: t.addfile(hostile('zeros', size=2_000_000), io.BytesIO(bytes(2_000_000)))
    out, err = child(LIMITED, tmp_path, json.dumps(server.entry()), archive).communicate(timeout=60)
    first, second = out.splitlines()
    assert err == '' and str(tmp_path/'out') in first
    assert 'zeros.tar.gz: 2000000 bytes needed, ' in first and ' free' in first
    assert f'cannot use {tmp_path}/set' in second and 'File too large' in second
    assert everything(tmp_path) == ['set', 'zeros.tar.gz'] and status('toy', tmp_path/'set', server.entry()) == 'absent'


def test_fault_18_offline_and_nothing_cached(tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        dead = f'http://127.0.0.1:{s.getsockname()[1]}'
    for name in ('no_proxy', 'NO_PROXY', 'CNNBOOK_OFFLINE'): monkeypatch.delenv(name, raising=False)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.setenv(name, dead)
    began = time.monotonic()
    for name, file, stand_in in (('mnist', 'MNIST/raw/train-images-idx3-ubyte', 'digits'),
                                 ('cifar10', 'cifar-10-python.tar.gz', 'shapes')):
        with pytest.raises(DownloadError, match='no connection') as e: fetch(name, tmp_path)
        assert all(words in str(e.value) for words in ('offline? Put ', str(tmp_path/file), f"load('{stand_in}')"))
        assert len(e.value.tries) == len(manifest()[name]['sources'][0]['urls']) and status(name, tmp_path) == 'absent'
    assert time.monotonic() - began < 10 and everything(tmp_path) == []


def test_a_redirect_within_http_is_followed(server, tmp_path):
    def moved(handler):
        handler.send_response(302)
        handler.send_header('Location', f'{server.base}/toy.bin')
        handler.end_headers()
    server.routes['/moved'] = moved
    assert download(f'{server.base}/moved', tmp_path/'toy.bin', RIGHT).read_bytes() == DATA


def test_a_bar_for_large_files_only(server, tmp_path, capsys):
    server.routes['/big.bin'] = bytes(2_000_000)
    download(f'{server.base}/toy.bin', tmp_path/'a')
    download(f'{server.base}/big.bin', tmp_path/'b', progress=False)
    assert capsys.readouterr().err == ''
    download(f'{server.base}/big.bin', tmp_path/'b')
    assert 'big.bin' in capsys.readouterr().err


def test_manifest_is_sound():
    keys = {'title', 'about', 'licence', 'citation', 'source', 'stand_in', 'bytes', 'files', 'sources'}
    for name, entry in manifest().items():
        assert entry.keys() == keys, name
        for path in entry['files']:
            assert sum(path == s['to'] or path.startswith(s['to'] + '/') for s in entry['sources']) == 1, path
        for s in entry['sources']:
            assert len({url.rpartition('/')[2] for url in s['urls']}) == 1
            assert 'sha256' in s or s['to'] in entry['files']


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get('CNNBOOK_DATA'), reason='$CNNBOOK_DATA is not set')
@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'cifar10'])
def test_real_sets_have_the_digests_of_the_manifest(name):
    if status(name) == 'absent': pytest.skip(f'{name} is not under $CNNBOOK_DATA')
    assert status(name) == 'complete'
    for path, file in manifest()[name]['files'].items(): assert (data_root()/path).stat().st_size == file['bytes']
