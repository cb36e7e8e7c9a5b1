"""Reads settings.ini, adds the one C++ extension, and ships manifest, chapters and examples inside the package."""
import os
import shutil
from configparser import ConfigParser
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(HERE/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def lines(key):
    return [line for line in cfg.get(key, '').splitlines() if line.strip()]


class BuildPy(build_py):
    """What a checkout has beside the package, a wheel carries inside it: the manifest, the chapters, the examples."""

    def run(self):
        super().run()
        if self.editable_mode: return
        package = Path(self.build_lib)/'cnnbook'
        shutil.copy(HERE/'data'/'manifest.json', package/'manifest.json')
        for source, to, patterns in (('nbs', 'notebooks', ('*.ipynb', 'budget.json', '*.png')),
                                     ('examples', 'examples', ('*.json',))):
            (package/to).mkdir(exist_ok=True)
            for path in (p for pattern in patterns for p in (HERE/source).glob(pattern)): shutil.copy(path, package/to)


class BuildExt(build_ext):
    """Says what to install; without CNNBOOK_REQUIRE_CEXT=1 it is a warning, and the installation goes on."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as e:
            raise CompileError(f'{e}\nThe C++ part needs a compiler and the headers of Python. On Debian and Ubuntu: '
                               'apt-get install g++ python3-dev; then install cnnbook again.') from e


# A missing compiler must not stop a reader: boxes.py has a slow path. CNNBOOK_REQUIRE_CEXT=1 makes C++ errors count.
flags = [] if os.name == 'nt' else ['-O3', '-ffp-contract=off', '-fno-trapping-math']  # exact to the bit, vectorised
extension = Pybind11Extension('cnnbook._cext', sorted(glob('cext/*.cpp')), cxx_std=17, include_dirs=['cext'],
                              depends=sorted(glob('cext/*.h')),  # an edited header counts as an edited source
                              extra_compile_args=flags, optional=os.environ.get('CNNBOOK_REQUIRE_CEXT') != '1')

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      keywords=cfg['keywords'], license='Apache-2.0', python_requires=f">={cfg['min_python']}",
      long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=['cnnbook'], package_dir={'': '.'},  # so that an editable install is one plain path
      ext_modules=[extension], cmdclass={'build_ext': BuildExt, 'build_py': BuildPy},
      install_requires=lines('requirements'),
      extras_require={k: lines(f'{k}_requirements') for k in ('lab', 'dev', 'site', 'peers')},
      entry_points={'console_scripts': lines('console_scripts') or [cfg['console_scripts']],
                    'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]}, zip_safe=False)
