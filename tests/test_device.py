"""Chapter 00 where a cell is not enough: other processes, a torch that lies, a GPU that is not here, odd files."""
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch

from cnnbook import device as D

ORIN = {'etc/nv_tegra_release': '# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64',
        'proc/device-tree/model': 'NVIDIA Jetson AGX Orin Developer Kit\0', 'proc/meminfo': 'MemAvailable: 8000000 kB'}
THOR = ORIN | {'etc/nv_tegra_release': '# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64',
               'proc/device-tree/model': 'NVIDIA Jetson AGX Thor Developer Kit\0'}
NANO = ORIN | {'etc/nv_tegra_release': '# R32 (release), REVISION: 7.1, GCID: 1, BOARD: t210ref, EABI: aarch64',
               'proc/device-tree/model': 'NVIDIA Jetson Nano Developer Kit\0'}
PC = {'proc/driver/nvidia/version': 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025'}


def write(root, files):
    for path, text in files.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def test_import_is_cheap_beyond_torch_starts_nothing_and_describe_imports_nothing():
    code = """if True:
        import sys, time, torch
        start = time.process_time()
        import cnnbook.device
        print(time.process_time() - start)
        assert not torch.cuda.is_initialized()
        assert not {'matplotlib', 'torchvision', 'sklearn', 'ipywidgets'} & set(sys.modules)
        cnnbook.device.describe()
        assert 'cnnbook._cext' not in sys.modules"""
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert (r.returncode, r.stderr) == (0, '') and float(r.stdout) < .2


def test_looking_leaves_no_trace():
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype(), list(warnings.filters)
    D.describe(), D.pick_device(), D.defaults()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.is_grad_enabled(), torch.get_default_dtype(), list(warnings.filters))


def test_pick_device_is_quick():
    D.pick_device()
    start = time.perf_counter()
    D.pick_device()
    assert time.perf_counter() - start < .5


# --- fault 66h: a GPU that is promised and does not work ---

def lying(monkeypatch, error, count=1):
    "A torch that sees a GPU but fails at the first operation on it."
    real = torch.ones
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda i: type('P', (), dict(name='Old One', major=5, minor=2, total_memory=4 * 2**30)))

    def ones(*shape, device='cpu', **kwargs):
        if str(device).startswith('cuda'): raise RuntimeError(error)
        return real(*shape, device=device, **kwargs)
    monkeypatch.setattr(torch, 'ones', ones)


def test_fault_66h_available_but_no_kernel_image(monkeypatch, tmp_path):
    lying(monkeypatch, 'CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors')
    report = D.describe(write(tmp_path, PC), {}, 'x86_64')
    report = replace(report, build='CUDA 13.0')
    assert report.device.type == 'cpu' and report.cuda_error.endswith('on the device')
    assert 'holds no code for Old One, sm_52' in report.causes
    with pytest.warns(UserWarning, match='working on cpu: .* holds no code for Old One'): D.pick_device(report=report)
    with pytest.raises(ValueError, match='prefer: expected a device that works, got cuda: .*Cure: newest torch'):
        D.pick_device('cuda', report)


def test_a_device_that_calculates_wrongly_is_not_usable(monkeypatch):
    monkeypatch.setattr(torch, 'conv2d', lambda x, w: torch.zeros(1))
    assert D._try('cpu') == 'expected 80, got 64.0'


def test_an_error_without_text_still_counts(monkeypatch):
    def fail(*args, **kwargs): raise AssertionError
    monkeypatch.setattr(torch, 'ones', fail)
    assert D._try('cpu') == 'AssertionError'


@pytest.mark.parametrize('error', ['CUDA out of memory. Tried to allocate', 'NVML_SUCCESS == r INTERNAL FAILED'])
def test_full_gpu_is_told_from_a_missing_one(monkeypatch, tmp_path, error):
    lying(monkeypatch, error)
    report = replace(D.describe(write(tmp_path, PC), {}, 'x86_64'), build='CUDA 13.0')
    assert 'no memory left' in report.causes


# --- rows A1 and A2: the machines, from files and facts ---

FACTS = dict(version='2.9.0', build='CUDA 12.6', cuda_error='Found no NVIDIA driver on your system', mps_error='no GPU')


@pytest.mark.parametrize('files, arch, facts, what, cure', [
    (PC, 'x86_64', dict(build='CPU', version='2.9.0+cpu'),
     'torch 2.9.0+cpu is a CPU build and ignores the GPU, driver 580.65.06', 'for CUDA 13 or older'),
    (PC, 'x86_64', dict(visible=' '), 'hides every GPU', 'unset it'),
    (PC, 'x86_64', {}, 'but torch cannot use the GPU: Found no NVIDIA', '--gpus all'),
    ({'usr/lib/wsl/lib/libcuda.so.1': ''}, 'x86_64', dict(build='CPU'), 'ignores the GPU, driver unknown', 'CUDA 12'),
    (ORIN, 'aarch64', dict(build='CPU'), "a general wheel replaced NVIDIA's", 'jp6/cu126'),
    (ORIN, 'aarch64', {}, "cannot use this Jetson's GPU", 'jp6/cu126'),
    (THOR, 'aarch64', dict(build='CPU'), "a general wheel replaced NVIDIA's", 'sbsa/cu130'),
    (NANO, 'aarch64', dict(build='CPU'), 'Jetson Nano Developer Kit with JetPack 4 is too old', 'another computer'),
    (NANO, 'aarch64', dict(cuda_error=''), 'is too old', 'another computer'),
])
def test_each_cause_has_its_text_and_cure(tmp_path, files, arch, facts, what, cure):
    report = replace(D.describe(write(tmp_path, files), {}, arch), **FACTS | facts)
    (problem,) = report.problems
    assert what in problem.what and cure in problem.cure and problem.blocks
    assert f'PROBLEM     {problem.what}\ncure        {problem.cure}' in repr(report)


def test_working_machines_have_no_problem(tmp_path):
    for i, files in enumerate((PC, ORIN, THOR)):
        report = D.describe(write(tmp_path/str(i), files), {}, 'x86_64' if files is PC else 'aarch64')
        assert replace(report, **FACTS | dict(cuda_error='')).problems == ()


def test_environment_is_the_one_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert D.describe(write(tmp_path, PC)).visible == ''
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert D.describe(tmp_path).visible == 'all'


@pytest.mark.parametrize('line, version', [
    ('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.195.03  Release Build  (dvs)', '570.195.03'),
    ('NVRM version: NVIDIA UNIX Kernel Module for aarch64  34.1.1  Release Build', '34.1.1'),
    ('NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC 2024', '470.256.02'),
    ('something else', 'unknown')])
def test_driver_line_in_all_its_forms(tmp_path, line, version):
    assert D.describe(write(tmp_path, {'proc/driver/nvidia/version': line}), {}, 'x86_64').driver == version


@pytest.mark.parametrize('files', [
    {'proc/meminfo': b'\xff\xfe\0\0', 'etc/nv_tegra_release': b'\x80'}, {'proc/meminfo/is/a/folder': ''},
    {'proc/meminfo': 'MemAvailable: many kB'}])
def test_odd_files_are_no_error(tmp_path, files):
    assert D.describe(write(tmp_path, files), {}, 'x86_64').ram_free is None


def test_jetson_with_an_unknown_release_is_not_called_too_old(tmp_path):
    report = D.describe(write(tmp_path, ORIN | {'etc/nv_tegra_release': '# R47 (release)'}), {}, 'aarch64')
    assert report.jetpack is None and 'too old' not in report.causes and replace(report, cuda_error='').causes == ''


def test_cpu_with_bfloat16_is_recognised(tmp_path):
    for flags, fast in (('fpu avx2 avx512_bf16', True), ('fp asimd bf16', True), ('fpu avx2', False)):
        assert D.describe(write(tmp_path, {'proc/cpuinfo': f'flags : {flags}\n'}), {}, 'x86_64').cpu_bf16 is fast


# --- calls on a GPU, without one ---

def test_limit_memory_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', lambda f, i: calls.append((f, i)))
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda i: (1, 1000))
    assert D.limit_memory(.25, 'cuda:1') == 250 and D.limit_memory(1) == 1000
    assert calls == [(.25, 1), (1., 0)]


@pytest.mark.parametrize('methods', [['spawn'], ['forkserver', 'fork', 'spawn']])     # Windows; Linux, Python 3.14
def test_defaults_where_workers_do_not_fork(methods, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, 'get_all_start_methods', lambda: methods)
    assert D.defaults(report=D.Report('arm64', cores=8, mps_error='')) == D.Defaults(128, 0, '32', False, False)
