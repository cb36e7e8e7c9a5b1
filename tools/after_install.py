"""Last step of `make setup`: say what was installed, and whether the C++ part is there."""
import importlib.util
from importlib.metadata import version

has_cext = importlib.util.find_spec('cnnbook._cext') is not None
print(f"cnnbook {version('cnnbook')} with torch {version('torch')}, torchvision {version('torchvision')}")
print('C++ part: built' if has_cext else
      'C++ part: not built (no C++ compiler?); the slow Python path is used. '
      'To build it: apt-get install g++, then make clean setup')
