"The repository keeps the rules of `house.py`; and each rule is seen to fail on a small tree that breaks it."
import json, os, shutil, subprocess, sys, tarfile, zipfile
from fnmatch import fnmatch
from pathlib import Path
import pytest
import house, offline_docs

ROOT = Path(__file__).resolve().parents[1]
PARTS = ['nbs', 'sid_lsg_nb', 'tests', 'settings.ini', 'setup.py', 'README.md', '_quarto.yml', 'MANIFEST.in', 'LICENSE', 'NOTICE',
         'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff', '.ci', '.github', '.gitignore']
EXTRA = ['benchmarks', '.gitattributes']

# ---- tools

def run(*cmd, cwd):
    "Run a command in the copy `cwd`, importing the copy's package; fail with its output"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(cwd), OMP_NUM_THREADS='1', MPLBACKEND='agg')
    done = subprocess.run([sys.executable, *map(str, cmd)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f'{cmd}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    return done.stdout

def nbdev(command, cwd): return run('-c', f'from nbdev.cli import *; from nbdev.clean import *; from nbdev.doclinks import *; {command}.__wrapped__()', cwd=cwd)

def copy_tree(dest):
    "A copy of the house in which tests may write"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'nbdev.yml', 'sidebar.yml')
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
    cell = lambda s: dict(cell_type='code', id=str(abs(hash(s)))[:8], metadata={}, execution_count=None, outputs=list(outputs), source=s.splitlines(True))
    path = root/'nbs'/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[cell(s) for s in code], metadata={}, nbformat=4, nbformat_minor=5)))

def module(root, name, text=''):
    path = root/house.LIB/f'{name}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

@pytest.fixture
def small(tmp_path):
    "The smallest tree that keeps the rules: two notebooks, two modules, the second above the first"
    for n, m, code in ((0, 'core', 'import json'), (1, 'schedule', 'from sid_lsg_nb.core import f')):
        notebook(tmp_path, f'{n:02d}_{m}.ipynb', f'#| default_exp {m}', f'#| export\n{code}')
        module(tmp_path, m, code)
    module(tmp_path, '__init__', '__version__ = "0"')
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nrequirements = fastcore>=1.14\n')
    return tmp_path

# ---- the house keeps its rules

RULES = [house.odd_notebooks, house.ladder, house.strays, house.long_functions, house.unsafe_loads, house.unstated, house.machine_paths]

@pytest.mark.parametrize('rule', RULES, ids=lambda f: f.__name__)
def test_rule(rule): assert rule(ROOT) == []

def lint(root): return run('-m', 'ruff', 'check', '--isolated', '--no-cache', '--select', 'F821,F811,F401', house.LIB, cwd=root)

def test_names_are_defined_and_used(copied): lint(copied)

def top_level():
    "Names in the root: those git tracks, or outside of git those .gitignore does not name"
    if (ROOT/'.git').exists() and shutil.which('git'):
        files = subprocess.run(['git', '-c', 'safe.directory=*', '-c', 'core.quotePath=false', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {f.split('/')[0] for f in files.split('\0') if f}
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
    files = {p.relative_to(r) for r in (a, b) for p in [*(r/'nbs').rglob('*.ipynb'), *(r/house.LIB).rglob('*.py')] if '.ipynb_checkpoints' not in p.parts}
    same = lambda f: (a/f).exists() and (b/f).exists() and (a/f).read_bytes() == (b/f).read_bytes()
    return sorted(str(f) for f in files if not same(f))

def test_site_has_no_broken_link(copied):
    assert 'no broken link' in run('tests/offline_docs.py', cwd=copied)
    assert len(list((copied/'_docs').glob('*.html'))) == len(house.notebooks(ROOT))

def test_readme_is_index(copied):
    run('tests/offline_docs.py', '--readme', cwd=copied)
    assert (copied/'README.md').read_text(encoding='utf-8') == (ROOT/'README.md').read_text(encoding='utf-8')

def test_wheel_holds_what_is_embedded(copied, tmp_path):
    run('-m', 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '--no-index', '-q', '-w', tmp_path, cwd=copied)
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert house.embedded_gaps(house.embedded_files(copied), names) == []
    assert {f'{house.LIB}/{p.name}' for p in house.modules(copied)} <= set(names)

def test_sdist_holds_what_is_embedded(copied, tmp_path):
    run('-m', 'build', '--sdist', '--no-isolation', '--outdir', tmp_path, cwd=copied)
    names = [n.partition('/')[2] for n in tarfile.open(next(tmp_path.glob('*.tar.gz'))).getnames()]
    assert house.embedded_gaps(house.embedded_files(copied), names) == []
    assert {'settings.ini', 'setup.py', 'LICENSE', 'NOTICE', 'README.md'} <= set(names)

# ---- each rule can fail

def test_small_tree_keeps_the_rules(small):
    assert house.odd_notebooks(small, at_least=2) == []
    assert [c for rule in RULES[1:] for c in rule(small)] == []

def test_few_notebooks_and_notest_are_seen(small):
    (small/'nbs'/'.notest').touch()
    assert len(house.odd_notebooks(small, at_least=3)) == 2

def test_bad_notebooks_are_seen(small):
    (small/'nbs'/'02_torn.ipynb').write_text('{"cells": [')
    assert 'not valid JSON' in house.odd_notebooks(small, at_least=2)[0]
    notebook(small, '02_torn.ipynb', '1/0', outputs=[dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=[])])
    assert 'ZeroDivisionError' in house.odd_notebooks(small, at_least=2)[0]
    notebook(small, '02_torn.ipynb', '#' * (house.MAX_KB*1024 + 1))
    assert 'at most' in house.odd_notebooks(small, at_least=2)[0]

@pytest.mark.parametrize('climb', ['from .schedule import g', 'from sid_lsg_nb import schedule', 'import sid_lsg_nb.schedule as s', 'def f():\n    from sid_lsg_nb.schedule import g'])
def test_climbing_module_is_seen(small, climb):
    module(small, 'core', climb)
    assert house.ladder(small) == ['sid_lsg_nb/core.py: imports schedule of notebook 01, not below 00']

def test_climbing_cell_is_seen(small):
    notebook(small, '00_core.ipynb', '#| default_exp core', '%matplotlib inline\nfrom sid_lsg_nb.schedule import g')
    assert house.ladder(small) == ['nbs/00_core.ipynb: imports schedule of notebook 01, not below 00']

def test_stray_module_is_seen(small):
    module(small, 'utils')
    module(small, '__init__', 'from .core import f')
    assert len(house.strays(small)) == 2

def test_long_function_is_seen(small):
    module(small, 'core', 'def f():\n' + '    1\n' * house.MAX_LINES)
    (small/'nbs'/'recipes').mkdir()
    (small/'nbs'/'recipes'/'r.py').write_text('def g():\n' + '    1\n' * (house.MAX_LINES - 1))
    assert house.long_functions(small) == [f'sid_lsg_nb/core.py:1: f has {house.MAX_LINES + 1} lines, at most {house.MAX_LINES}']

@pytest.mark.parametrize('package, more', [('torch', ''), ('torch', ', weights_only=False'), ('pickle', ''), ('np', ', allow_pickle=True')])
def test_unsafe_load_is_seen(small, package, more):
    call = f'{package}.load(f{more})'
    module(small, 'core', call)
    notebook(small, '01_schedule.ipynb', '#| default_exp schedule', call)
    assert len(house.unsafe_loads(small)) == 2

def test_safe_load_is_not(small):
    module(small, 'core', 'torch.load(f, weights_only=True), json.load(f)')
    assert house.unsafe_loads(small) == []

def test_unstated_requirement_is_seen(small):
    module(small, 'core', 'import pytest, fastcore')
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
    assert 'by hand' not in mod.read_text(encoding='utf-8') and 'left' not in json.loads(nb.read_text(encoding='utf-8'))['metadata']

def test_broken_links_are_seen(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html#x"></a><a href="gone.html"></a><img src="c.png"><a href="https://x.y/z"></a>')
    (tmp_path/'b.html').write_text('<h2 id="y"></h2>')
    assert offline_docs.broken_links(tmp_path) == ['a.html: broken anchor b.html#x', 'a.html: broken link gone.html', 'a.html: broken link c.png']

def test_gaps_in_a_package_are_seen():
    sizes = {f'{house.LIB}/embedded/{f}': 1 for f in house.EMBEDDED}
    assert house.embedded_gaps(sizes, list(sizes)) == []
    assert len(house.embedded_gaps(sizes, list(sizes)[1:])) == 1
    assert len(house.embedded_gaps(dict(list(sizes.items())[1:]), list(sizes))) == 1
    assert 'at most' in house.embedded_gaps({f: 2e6 for f in sizes}, list(sizes))[0]
