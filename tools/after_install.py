"""Last step of `make setup`: name the kernel, say what was installed, and whether the C++ part is there."""
import importlib.util
import sys
from importlib.metadata import version

from ipykernel.kernelspec import install

install(kernel_name='python3', display_name='cnnbook (venv)', prefix=sys.prefix)   # what JupyterLab shows top right
has_cext = importlib.util.find_spec('cnnbook._cext') is not None
print(f"cnnbook {version('cnnbook')} with torch {version('torch')}, torchvision {version('torchvision')}")
print('C++ part: built' if has_cext else
      'C++ part: not built (no C++ compiler?); the slow Python path is used. '
      'To build it: apt-get install g++, then make clean setup')
