"The repository keeps the rules of `house.py`; and each rule is seen to fail on a small tree that breaks it."
import json, os, shutil, subprocess, sys, tarfile, zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
import pytest
import yaml
from sid_lsg_nb.commands.notebooks import chapter_files
import house, house_map, offline_docs

ROOT = Path(__file__).resolve().parents[1]
PARTS = ['nbs', 'sid_lsg_nb', 'tests', 'settings.ini', 'setup.py', 'README.md', '_quarto.yml', 'MANIFEST.in',
         'LICENSE', 'NOTICE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff', '.ci', '.github', '.gitignore']
EXTRA = ['benchmarks', '.gitattributes']

# ---- tools

def run(*cmd, cwd):
    "Run a command in the copy `cwd`, importing the copy's package; fail with its output"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    env |= dict(PYTHONPATH=str(cwd), OMP_NUM_THREADS='1', MPLBACKEND='agg')
    command = [sys.executable, *map(str, cmd)]
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f'{cmd}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    return done.stdout

def nbdev(command, cwd):
    modules = 'from nbdev.cli import *; from nbdev.clean import *; from nbdev.doclinks import *'
    return run('-c', f'{modules}; {command}.__wrapped__()', cwd=cwd)

def copy_tree(dest):
    "A copy of the repository in which tests may write"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'nbdev.yml')
    for name in PARTS + EXTRA:
        src = ROOT/name
        if src.is_dir(): shutil.copytree(src, dest/name, symlinks=True, ignore=skip)
        elif src.exists(): shutil.copy2(src, dest/name)
    return dest

@pytest.fixture(scope='module')
def copied(tmp_path_factory):
    "A copy with its own egg-info, so that nbdev finds the copy's index of symbols"
    root = copy_tree(tmp_path_factory.mktemp('house'))
    run('setup.py', '-q', 'egg_info', cwd=root)
    return root

def notebook(root, name, *code, outputs=()):
    "A notebook of code cells in the small tree `root`"
    def cell(text):
        made = dict(cell_type='code', id=str(abs(hash(text)))[:8], metadata={}, execution_count=None)
        return made | dict(outputs=list(outputs), source=text.splitlines(True))
    path = root/'nbs'/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[cell(t) for t in code], metadata={}, nbformat=4, nbformat_minor=5)))

def module(root, name, text=''):
    "A module of the small tree by its dotted name, in packages that hold nothing"
    path = house.module_file(root, name)
    for package in [path.parent, *path.parent.parents]:
        if root not in package.parents: break
        package.mkdir(parents=True, exist_ok=True)
        if package != root/house.LIB: (package/'__init__.py').touch()
    path.write_text(text)

def chapter(root, place, name, code):
    "A notebook at `place` in nbs/, and the module that it makes"
    notebook(root, f'{place}.ipynb', f'#| default_exp {name}', f'#| export\n{code}')
    module(root, name, code)

SMALL = (('00_core', 'core', 'import json'), ('02_testing', 'testing', 'import json'),
         ('1_method/01_schedule', 'method.schedule', 'from ..core import f'),
         ('1_method/02_losses', 'method.losses', 'from .schedule import g\nfrom . import schedule'),
         ('2_teachers/01_base', 'teachers.base', 'from ..method.losses import h\nfrom ..method import schedule'),
         ('7_commands/01_compare', 'commands.compare', 'from ..teachers import base'),
         ('7_commands/02_cli', 'cli', 'from sid_lsg_nb.commands import compare as c\nimport sid_lsg_nb.core'))

@pytest.fixture
def small(tmp_path):
    "The smallest tree that keeps the rules: folders above one another, and modules that import from above"
    for place, name, code in SMALL: chapter(tmp_path, place, name, code)
    notebook(tmp_path, '8_stories/01_tour.ipynb', 'from sid_lsg_nb.cli import main', 'import sid_lsg_nb.testing')
    notebook(tmp_path, 'index.ipynb', 'from sid_lsg_nb.cli import main')
    module(tmp_path, '__init__', '__version__ = "0"')
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nrequirements = fastcore>=1.14\n')
    return tmp_path

# ---- this repository keeps the rules

RULES = [house.odd_notebooks, house.places, house.ladder, house.gone, house.strays, house.long_functions,
         house.whole_settings, house.unframed, house.unsafe_loads, house.unstated, house.machine_paths, house.density]

@pytest.mark.parametrize('rule', RULES, ids=lambda f: f.__name__)
def test_rule(rule): assert rule(ROOT) == []

def lint(root):
    "Undefined names, names defined twice, unused imports in the library"
    return run('-m', 'ruff', 'check', '--isolated', '--no-cache', '--select', 'F821,F811,F401', house.LIB, cwd=root)

def test_names_are_defined_and_used(copied): lint(copied)

def tracked():
    "Files that git tracks"
    command = ['git', '-c', 'safe.directory=*', '-c', 'core.quotePath=false', 'ls-files', '-z']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')[:-1]

def top_level():
    "Names in the root: those git tracks, or outside of git those .gitignore does not name"
    if (ROOT/'.git').exists() and shutil.which('git'): return {f.split('/')[0] for f in tracked()}
    ignored = [l.strip('/') for l in (ROOT/'.gitignore').read_text().split('\n') if l and l[0] != '#']
    return {n for n in os.listdir(ROOT) if not any(fnmatch(n, o) for o in ignored)}

def test_top_level():
    assert top_level() - {*PARTS, *EXTRA} == set()
    assert [p for p in PARTS if not (ROOT/p).exists()] == []

def test_clean_and_exported(tmp_path):
    root = copy_tree(tmp_path/'copy')
    nbdev('nbdev_clean', root), nbdev('nbdev_export', root)
    assert changed(ROOT, root) == []

def changed(a, b):
    "Notebooks and modules that differ between two trees"
    files = {p.relative_to(r) for r in (a, b) for p in [*house.all_notebooks(r), *(r/house.LIB).rglob('*.py')]}
    same = lambda f: (a/f).exists() and (b/f).exists() and (a/f).read_bytes() == (b/f).read_bytes()
    return sorted(str(f) for f in files if not same(f))

def run_by_nbdev_test(root):
    "Notebooks that `nbdev_test` would run in a tree"
    listing = 'lambda f, files, **kw: (print(*files, sep="\\n"), [(True, 0)]*len(files))[1]'
    found = run('-c', f'import nbdev.test as t; t.parallel = {listing}; t.nbdev_test.__wrapped__()', cwd=root)
    return {Path(line) for line in found.splitlines() if line.endswith('.ipynb')}

def test_nbdev_tests_every_notebook(copied):
    assert run_by_nbdev_test(copied) == set(house.all_notebooks(copied))

@pytest.fixture(scope='module')
def docs(copied):
    "README and the site, made anew in the copy; what was said"
    return run('tests/offline_docs.py', '--readme', '--out', '_docs', cwd=copied)

def test_site_has_no_broken_link(copied, docs):
    assert 'no broken link' in docs
    pages = [p for p in (copied/'_docs').rglob('*.html') if p.parent.name != 'images']
    made = {p.relative_to(copied/'_docs').as_posix() for p in pages}
    wanted = {offline_docs.page_name(p.relative_to(copied/'nbs')) for p in house.notebooks(copied)}
    assert made - {'map.html'} == wanted

def test_map_is_of_this_house(): assert house_map.stale(ROOT) == []

def test_readme_is_index(copied, docs):
    assert (copied/'README.md').read_text(encoding='utf-8') == (ROOT/'README.md').read_text(encoding='utf-8')

def test_wheel_holds_what_is_embedded(copied, tmp_path):
    offline = '--no-deps --no-build-isolation --no-index -q -w'.split()
    run('-m', 'pip', 'wheel', '.', *offline, tmp_path, cwd=copied)
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert house.embedded_gaps(house.embedded_files(copied), names) == []
    chapters = {n for n in names if n.startswith('sid_lsg_nb/chapters/')}
    assert library_files(copied) == {n for n in names if n.endswith('.py')} - chapters
    wanted = {name: f.relative_to(copied) for name, f in chapter_files(copied/'sid_lsg_nb').items()}
    assert chapters == {f'sid_lsg_nb/chapters/{f.as_posix()}' for f in wanted.values()}
    assert {p.relative_to(copied/'nbs').as_posix() for p in house.notebooks(copied)} <= set(wanted)

def library_files(root): return {p.relative_to(root).as_posix() for p in (root/house.LIB).rglob('*.py')}

def test_sdist_holds_what_is_embedded(copied, tmp_path):
    run('-m', 'build', '--sdist', '--no-isolation', '--outdir', tmp_path, cwd=copied)
    names = [n.partition('/')[2] for n in tarfile.open(next(tmp_path.glob('*.tar.gz'))).getnames()]
    assert house.embedded_gaps(house.embedded_files(copied), names) == []
    assert {'settings.ini', 'setup.py', 'LICENSE', 'NOTICE', 'README.md', *library_files(copied)} <= set(names)
    assert {p.relative_to(copied).as_posix() for p in house.all_notebooks(copied)} <= set(names)
    assert {f.relative_to(copied).as_posix() for f in chapter_files(copied/'sid_lsg_nb').values()} <= set(names)

# ---- each rule can fail

def test_small_tree_keeps_the_rules(small):
    rules = {*RULES[1:], house.density}
    assert house.odd_notebooks(small, at_least=9) == []
    assert [c for rule in rules for c in rule(small)] == []

def test_small_tree_lacks_notebooks(small):
    (small/'nbs'/'1_method'/'.notest').touch()
    notebook(small, '1_method/_draft.ipynb')
    notebook(small, '_old/03_later.ipynb')
    found = house.odd_notebooks(small, at_least=12)
    assert [c.partition(':')[0] for c in found] == [
        'nbs', 'nbs/1_method/_draft.ipynb', 'nbs/_old/03_later.ipynb', 'nbs/1_method/.notest']

def test_nbdev_leaves_out_a_marked_folder(small):
    shutil.copy(ROOT/'settings.ini', small)
    everything = set(house.all_notebooks(small))
    assert run_by_nbdev_test(small) == everything and len(everything) == 9
    (small/'nbs'/'1_method'/'.notest').touch()
    assert {p.name for p in everything - run_by_nbdev_test(small)} == {'01_schedule.ipynb', '02_losses.ipynb'}

def test_bad_notebooks_are_seen(small):
    (small/'nbs'/'1_method'/'02_torn.ipynb').write_text('{"cells": [')
    assert 'not valid JSON' in house.odd_notebooks(small, at_least=2)[0]
    broken = dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=[])
    notebook(small, '1_method/02_torn.ipynb', '1/0', outputs=[broken])
    assert 'ZeroDivisionError' in house.odd_notebooks(small, at_least=2)[0]
    notebook(small, '1_method/02_torn.ipynb', '#' * (house.MAX_KB*1024 + 1))
    assert 'at most' in house.odd_notebooks(small, at_least=2)[0]

# what a module of the small tree imports, the module, and what is said of it
CLIMBS = [('method.schedule', line, f'imports {found}, not above 1_method/01') for line, found in [
    ('from .losses import h', 'method.losses (1_method/02)'),                     # in its own folder
    ('from . import losses', 'method.losses (1_method/02)'),
    ('from sid_lsg_nb.method import losses', 'method.losses (1_method/02)'),
    ('import sid_lsg_nb.method.losses as l', 'method.losses (1_method/02)'),
    ('def f():\n    from .losses import h', 'method.losses (1_method/02)'),
    ('from ..teachers.base import k', 'teachers.base (2_teachers/01)'),           # in a folder below
    ('from ..teachers import base', 'teachers.base (2_teachers/01)'),
    ('from .. import cli', 'cli (7_commands/02)'),
    ('from sid_lsg_nb.teachers import base as b', 'teachers.base (2_teachers/01)'),
    ('def f():\n    import sid_lsg_nb.teachers.base', 'teachers.base (2_teachers/01)'),
    ('from sid_lsg_nb import teachers', 'teachers (2_teachers/*)'),               # a whole package
    ('import sid_lsg_nb.method', 'method (1_method/*)')]
] + [('core', 'from .method.schedule import g', 'imports method.schedule (1_method/01), not above nbs/00'),
     ('cli', 'from .testing import tiny', 'imports testing, which is for test cells'),
     ('method.losses', 'def f():\n    from ..testing import tiny', 'imports testing, which is for test cells')]

@pytest.mark.parametrize('name, code, said', CLIMBS)
def test_climbing_module_is_seen(small, name, code, said):
    module(small, name, code)
    file = house.module_file(small, name).relative_to(small).as_posix()
    assert house.ladder(small) == [f'{file}: {said}']

@pytest.mark.parametrize('code', [
    'from sid_lsg_nb.teachers.base import k', '%matplotlib inline\nimport sid_lsg_nb.teachers.base',
    'def f():\n    from ..teachers import base'])
def test_climbing_cell_is_seen(small, code):
    notebook(small, '1_method/02_losses.ipynb', '#| default_exp method.losses', code)
    said = 'imports teachers.base (2_teachers/01), not above 1_method/02'
    assert house.ladder(small) == [f'nbs/1_method/02_losses.ipynb: {said}']

def test_chapter_without_a_frame_is_seen(small):
    nb = small/'nbs'/'1_method'/'02_losses.ipynb'
    d = json.loads(nb.read_text())

    def found(*texts):
        words = [dict(cell_type='markdown', id=f'm{i}', metadata={}, source=[text]) for i, text in enumerate(texts)]
        nb.write_text(json.dumps(d | dict(cells=words + d['cells'])))
        return [c.rpartition(': ')[2] for c in house.unframed(small)]

    lacks = '2 folded answers at its end, there should be 3'
    assert found('# Losses\n\nAfter this chapter you can', '<details>'*3) == []
    assert found('# Losses\n\nAfter this chapter you can', '<details>'*2) == [lacks]
    assert found('# Losses', '<details>'*3) == ['say what one can do after it']

def test_function_that_takes_all_settings_is_seen(small):
    module(small, 'training.__init__', '')
    module(small, 'training.run_folder', 'def folder_of(config): pass')
    code = 'def setup(config): pass', 'def save(job, config): pass', "def rate(c: 'Config'): pass", 'def plain(x): pass'
    module(small, 'training.job', '\n'.join(code))
    assert [c.split(': ')[1].split()[0] for c in house.whole_settings(small)] == ['save', 'rate']

def test_relative_import_of_a_cell_is_seen(small):
    notebook(small, '1_method/01_schedule.ipynb', '#| default_exp method.schedule', 'from .losses import h')
    said = 'imports method.losses (1_method/02), not above 1_method/01'
    assert house.ladder(small) == [f'nbs/1_method/01_schedule.ipynb: {said}']

def test_import_from_the_same_number_is_seen(small):
    chapter(small, '1_method/02_noise', 'method.noise', 'from .losses import h')
    said = 'imports method.losses (1_method/02), not above 1_method/02'
    files = 'sid_lsg_nb/method/noise.py', 'nbs/1_method/02_noise.ipynb'
    assert house.ladder(small) == [f'{f}: {said}' for f in files]

def test_cell_may_use_its_own_folder_and_those_above(small):
    code = [f'from sid_lsg_nb.{m} import x' for m in ('method.schedule', 'testing', 'method.losses')]
    notebook(small, '1_method/02_losses.ipynb', '#| default_exp method.losses', *code)
    assert house.ladder(small) == []

def test_missing_export_is_seen(small):
    house.module_file(small, 'method.losses').unlink()
    assert 'sid_lsg_nb/method/losses.py: missing, run nbdev_export' in house.ladder(small)

@pytest.mark.parametrize('place, name, said', [
    ('1_method/02_guidance', 'method.guidance', 'nbs/1_method: number 02 is used 2 times'),
    ('2_teachers/02_losses', 'teachers.losses', 'notebooks losses: 2 of this name'),
    ('2_teachers/02_losses', 'teachers.losses', 'modules losses: 2 of this name'),
    ('2_teachers/02_guidance', 'method.guidance',
     'nbs/2_teachers/02_guidance.ipynb: makes method.guidance, which is not of this folder'),
    ('1_method/03_guidance', 'method.kappa',
     'nbs/1_method/03_guidance.ipynb: makes method.kappa, which is not of this folder'),
    ('7_commands/03_compact', 'cli', 'nbs/7_commands/03_compact.ipynb: makes cli, another name'),
    ('03_guidance', 'guidance', 'nbs/03_guidance.ipynb: makes guidance, which is not of this folder'),
    ('8_stories/02_plane', 'plane', 'nbs/8_stories/02_plane.ipynb: makes plane, which is not of this folder'),
    ('9_more/01_guidance', 'more.guidance', 'nbs/9_more/01_guidance.ipynb: no folder of the table of floors'),
    ('1_method/guidance', 'method.guidance', 'nbs/1_method/guidance.ipynb: no number')])
def test_misplaced_notebook_is_seen(small, place, name, said):
    chapter(small, place, name, '')
    assert said in house.places(small)

@pytest.mark.parametrize('place, code, found', [
    ('sid_lsg_nb/core.py', 'from sid_lsg_nb import losses', 'losses'),
    ('sid_lsg_nb/method/losses.py', 'from .noise import g', 'method.noise.g'),
    ('sid_lsg_nb/method/losses.py', 'import sid_lsg_nb.schedule', 'schedule'),
    ('tests/test_it.py', 'def test_it():\n    from sid_lsg_nb.schedule import g', 'schedule.g'),
    ('sid_lsg_nb/core.py', 'from sid_lsg_nb import train', 'train')])
def test_import_of_what_is_gone_is_seen(small, place, code, found):
    module(small, '__init__', 'def __getattr__(name):\n    if name == "train": from .cli import main')
    (small/'tests').mkdir()
    (small/place).write_text(code)
    assert house.gone(small) == [f'{place}: imports {found}, which the library does not have']

def test_import_of_what_is_gone_is_seen_in_a_skipped_cell(small):
    notebook(small, '8_stories/01_tour.ipynb', '#| cuda\nfrom sid_lsg_nb.schedule import g')
    said = 'nbs/8_stories/01_tour.ipynb: imports schedule.g, which the library does not have'
    assert house.gone(small) == [said]

def test_names_of_the_library_itself_are_for_its_users(small):
    module(small, '__init__', 'def __getattr__(name):\n    if name == "train": from .cli import main')
    notebook(small, '8_stories/01_tour.ipynb', 'from sid_lsg_nb import __version__, train')
    assert house.gone(small) == house.strays(small) == []

def test_stray_module_is_seen(small):
    module(small, 'method.utils')
    module(small, '__init__', 'from .core import f')
    (small/house.LIB/'method'/'__init__.py').write_text('from .losses import *')
    (small/house.LIB/'_modidx.py').write_text("d = {'syms': {'sid_lsg_nb.core': {}, 'sid_lsg_nb.losses': {}}}")
    assert house.strays(small) == [
        'sid_lsg_nb/method/utils.py: no notebook makes it', 'sid_lsg_nb/_modidx.py: sid_lsg_nb.losses is gone',
        'sid_lsg_nb/__init__.py: imports something', 'sid_lsg_nb/method/__init__.py: holds something']

def test_long_function_is_seen(small):
    module(small, 'method.losses', 'def f():\n' + '    1\n' * house.MAX_LINES)
    (small/'nbs'/'recipes').mkdir()
    (small/'nbs'/'recipes'/'r.py').write_text('def g():\n' + '    1\n' * (house.MAX_LINES - 1))
    said = f'sid_lsg_nb/method/losses.py:1: f has {house.MAX_LINES + 1} lines, at most {house.MAX_LINES}'
    assert house.long_functions(small) == [said]

def test_semicolons_are_seen(small):
    module(small, 'method.losses', "x = ';'  # ; and\ndef f(): 1; 2\nif x: f(); f()\n")
    assert house.density(small) == ['sid_lsg_nb/method/losses.py:2: 2 statements behind a semicolon']

def test_wide_lines_are_seen(small):
    (small/'tests').mkdir()
    (small/'tests'/'test_it.py').write_text('x = 1\n'*400 + '#'*120 + '\n' + 4*('#'*121 + '\n'))
    assert house.density(small) == []
    module(small, 'core', 'import json  ' + '#'*120)
    lines = sum(len(p.read_text().splitlines()) for p in [*house.modules(small), *house.scripts(small)])
    assert house.density(small) == [f'5 of {lines} lines over 120 characters, at most 1%',
                                    'tests/test_it.py: 4 of them', 'sid_lsg_nb/core.py: 1 of them']

@pytest.mark.parametrize('package, more', [
    ('torch', ''), ('torch', ', weights_only=False'), ('pickle', ''), ('np', ', allow_pickle=True')])
def test_unsafe_load_is_seen(small, package, more):
    call = f'{package}.load(f{more})'
    module(small, 'core', call)
    notebook(small, '1_method/01_schedule.ipynb', '#| default_exp method.schedule', call)
    assert len(house.unsafe_loads(small)) == 2

def test_safe_load_is_not(small):
    module(small, 'core', 'torch.load(f, weights_only=True), json.load(f)')
    assert house.unsafe_loads(small) == []

def test_unstated_requirement_is_seen(small):
    module(small, 'core', 'import pytest, fastcore')
    assert house.unstated(small) == ['settings.ini: pytest is imported by the library and not required']

def test_unstated_requirement_of_a_function_is_seen(small):
    module(small, 'core', 'def f():\n    import pytest\n    try: import xdist\n    except ImportError: pass')
    assert house.unstated(small) == ['settings.ini: pytest is imported by the library and not required']

def test_machine_path_is_seen(small):
    (small/'notes.md').write_text('see ' + '/'.join(['', 'home', 'me', 'x']))
    assert len(house.machine_paths(small)) == 1

@pytest.mark.parametrize('text', ['def f(): return g()\n', 'import json\n', 'def f(): pass\ndef f(): pass\n'])
def test_lint_is_seen(small, text):
    module(small, 'core', text)
    with pytest.raises(AssertionError, match='F821|F401|F811'): lint(small)

def test_unclean_notebook_and_old_export_are_seen(copied, tmp_path):
    root = copy_tree(tmp_path/'copy')
    nb, mod = house.notebooks(root)[0], next(p for p in house.modules(root) if p.stem != '__init__')
    nb.write_text(json.dumps(json.loads(nb.read_text(encoding='utf-8')) | {'metadata': {'left': 'over'}}))
    mod.write_text(mod.read_text(encoding='utf-8') + '\n# by hand\n')
    before = changed(ROOT, root)
    nbdev('nbdev_clean', root), nbdev('nbdev_export', root)
    assert before == sorted(str(p.relative_to(root)) for p in (nb, mod))
    assert 'by hand' not in mod.read_text(encoding='utf-8')
    assert 'left' not in json.loads(nb.read_text(encoding='utf-8'))['metadata']

# ---- the site and the map

def test_broken_links_are_seen(tmp_path):
    (tmp_path/'1_method').mkdir()
    (tmp_path/'out').mkdir()
    (tmp_path/'secret.html').touch()
    (tmp_path/'out'/'1_method').mkdir()
    links = lambda *targets: ''.join(f'<a href="{target}"></a>' for target in targets)
    (tmp_path/'out'/'a.html').write_text('<img src="c.png">' + links(
        '1_method/b.html#x', '1_method/b.html#y', 'b.html', 'https://x.y/z'))
    (tmp_path/'out'/'1_method'/'b.html').write_text('<h2 id="y"></h2>' + links(
        '../a.html', 'a.html', '#y', '#z', '../../secret.html'))
    assert offline_docs.broken_links(tmp_path/'out') == [
        '1_method/b.html: broken link a.html', '1_method/b.html: broken anchor #z',
        '1_method/b.html: broken link ../../secret.html', 'a.html: broken link c.png',
        'a.html: broken anchor 1_method/b.html#x', 'a.html: broken link b.html']

def test_site_in_folders(tmp_path):
    "Pages, links between them, pictures of cells and files beside the notebooks, from a staged tree"
    picture = dict(output_type='display_data', data={'image/svg+xml': ['<svg/>']})
    notebook(tmp_path, '1_method/06_losses.ipynb', 'x', outputs=[picture])
    text = ('[a](../2_teachers/01_base.ipynb#top) [b](https://h.io/p/2_teachers/base.html) [c](07_gone.ipynb) '
            '![d](../images/d.png)')
    add_markdown(tmp_path/'nbs/1_method/06_losses.ipynb', text)
    notebook(tmp_path, '2_teachers/01_base.ipynb', 'y')
    add_markdown(tmp_path/'nbs/2_teachers/01_base.ipynb', '## Top')
    (tmp_path/'nbs/images').mkdir()
    (tmp_path/'nbs/images/d.png').touch()
    section = dict(section='M', contents=[dict(text='on <t>'), '1_method/06_losses.ipynb'])
    sidebar, out = dict(contents=['2_teachers/01_base.ipynb', section]), tmp_path/'out'
    site = {'title': 's', 'site-url': 'https://h.io/p', 'sidebar': sidebar}
    (tmp_path/'nbs/_quarto.yml').write_text(yaml.safe_dump(dict(website=site)))
    with pytest.raises(SystemExit, match='1_method/06_losses.html: broken link 07_gone.ipynb'):
        offline_docs.write_site(SimpleNamespace(nbs_path=tmp_path/'nbs'), tmp_path/'nbs', out)
    page = (out/'1_method/06_losses.html').read_text()
    assert page.count('href="../2_teachers/01_base.html') == 2 and 'href="../2_teachers/base.html"' in page
    assert '<h2>M</h2><p>on &lt;t&gt;</p>' in page and (out/'images/d.png').exists()
    assert (out/'1_method/06_losses_files/cell-0-output-0.svg').exists()
    assert offline_docs.broken_links(out) == [
        '1_method/06_losses.html: broken link ../2_teachers/base.html',
        '1_method/06_losses.html: broken link 07_gone.ipynb']

def add_markdown(path, text):
    doc = json.loads(path.read_text())
    doc['cells'].append(dict(cell_type='markdown', metadata={}, source=[text]))
    path.write_text(json.dumps(doc))

def test_links_of_readme_lead_into_the_folders(tmp_path):
    for name in ('00_core', '1_method/06_losses'): notebook(tmp_path, f'{name}.ipynb')
    site, code = 'https://h.io/p', 'https://g.it/p'
    cfg = SimpleNamespace(nbs_path=tmp_path/'nbs', doc_host='https://h.io', doc_baseurl='/p', git_url=code,
                          branch='main')
    expected = {f'{site}/1_method/losses.html#x': 'nbs/1_method/06_losses.ipynb',
                '1_method/06_losses.ipynb': 'nbs/1_method/06_losses.ipynb', 'images/e.png': 'nbs/images/e.png',
                f'{site}/core.html': 'nbs/00_core.ipynb', f'{code}/blob/main/LICENSE': 'LICENSE',
                f'{site}/losses.html': f'{site}/losses.html'}
    for link, made in expected.items(): assert offline_docs.repo_links(f'[a]({link})', cfg) == f'[a]({made})'

@pytest.fixture
def mapped(small, monkeypatch):
    "The small tree with its map"
    monkeypatch.setattr(house_map, 'CHANGES', (('the loss', 'losses'),))
    (small/'CONTRIBUTING.md').write_text(f'# Title\n\n{house_map.START}\n{house_map.END}\n\nEnd.\n')
    (small/'nbs'/'images').mkdir()
    house_map.write_map(small)
    return small

def test_map_of_a_small_tree(mapped):
    assert house_map.stale(mapped) == []
    assert '[1_method/02_losses](nbs/1_method/02_losses.ipynb)' in (mapped/'CONTRIBUTING.md').read_text()
    assert '[1_method/02_losses](1_method/02_losses.ipynb)' in (mapped/house_map.PAGE).read_text()
    assert house_map.drawn_facts(mapped/house_map.PICTURE) == dict(
        folders=[['Foundations', ['core', 'testing']], ['Method', ['schedule', 'losses']], ['Teachers', ['base']],
                 ['Commands', ['compare', 'cli']], ['Stories', []]],
        imports=[['Method', 'Foundations'], ['Teachers', 'Method'], ['Commands', 'Foundations'],
                 ['Commands', 'Teachers']])

def test_side_bar_of_a_small_tree(mapped):
    contents = yaml.safe_load(house_map.sidebar(mapped))['website']['sidebar']['contents']
    assert contents[:2] == ['index.ipynb', 'map.qmd']
    assert [c['section'] for c in contents[2:]] == ['Foundations', 'Method', 'Teachers', 'Commands', 'Stories']
    assert contents[3]['contents'][1:] == ['1_method/01_schedule.ipynb', '1_method/02_losses.ipynb']
    assert list(offline_docs.flatten(contents))[2:4] == ['00_core.ipynb', '02_testing.ipynb']

def test_old_map_is_seen(mapped):
    chapter(mapped, '2_teachers/02_sana', 'teachers.sana', 'from ..core import f')
    assert [c.partition(':')[0] for c in house_map.stale(mapped)] == ['nbs/sidebar.yml', 'nbs/images/map.svg']
    (mapped/'nbs/1_method/02_losses.ipynb').rename(mapped/'nbs/1_method/03_losses.ipynb')
    assert len(house_map.stale(mapped)) == 4

def test_map_that_names_a_chapter_that_is_gone(mapped):
    (mapped/'nbs/1_method/02_losses.ipynb').unlink()
    with pytest.raises(SystemExit, match='not there: losses'): house_map.page(mapped)

def test_gaps_in_a_package_are_seen():
    sizes = {f'{house.LIB}/embedded/{f}': 1 for f in house.EMBEDDED}
    assert house.embedded_gaps(sizes, list(sizes)) == []
    assert len(house.embedded_gaps(sizes, list(sizes)[1:])) == 1
    assert len(house.embedded_gaps(dict(list(sizes.items())[1:]), list(sizes))) == 1
    assert 'at most' in house.embedded_gaps({f: 2e6 for f in sizes}, list(sizes))[0]
