"Packaging for the exported library: every setting lives in settings.ini (nbdev 2 layout), none here."
import shlex, shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
cp = ConfigParser(delimiters=['='])
cp.read(ROOT/'settings.ini', encoding='utf-8')
cfg = cp['DEFAULT']
lib = cfg['lib_path']

statuses = ['0 - Pre-Planning', '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
licenses = {'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}

class BuildWithChapters(build_py):
    "The modules, and beside them the chapters that `sid-lsg notebooks` writes out; an editable install has its checkout"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        chapters = Path(self.build_lib)/lib/'chapters'
        shutil.rmtree(chapters, ignore_errors=True)
        for pattern in cfg['chapter_files'].split():
            for file in ROOT.glob(pattern):
                target = chapters/file.relative_to(ROOT)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(
    cmdclass=dict(build_py=BuildWithChapters),
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license=licenses[cfg['license']],
    classifiers=['Development Status :: ' + statuses[int(cfg['status'])], 'Intended Audience :: ' + cfg['audience'],
                 'Natural Language :: ' + cfg['language'], 'Programming Language :: Python :: 3'],
    long_description=(ROOT/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_namespace_packages(include=[lib, lib + '.*'], exclude=['*__pycache__*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require={'dev': shlex.split(cfg.get('dev_requirements', '')),
                    'demo': shlex.split(cfg.get('demo_requirements', '')),
                    'notebooks': shlex.split(cfg.get('notebooks_requirements', ''))},
    entry_points={'console_scripts': shlex.split(cfg.get('console_scripts', '')),
                  'nbdev': [f'{lib}={lib}._modidx:d']},
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']} if cfg.get('doc_host') else {},
)
