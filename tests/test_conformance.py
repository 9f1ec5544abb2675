"The kit for other code bases: its files come from the recipe, are small, and are read with numpy alone."

import importlib.util, json, os, subprocess, sys
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'sid_lsg_nb' / 'conformance'
ALONE = '''
import sys
from importlib import metadata
tops = {name.split('.')[0] for name in sys.modules}
from sid_lsg_nb.method.conformance import compare_gradient, read_cases, ask_networks
cases = read_cases()
case = next(c for c in cases if c.name == 'sid alpha=1')
d = case.inputs
y_real, y_fake, _ = ask_networks(d, d['x_g'])
to_delta = d['alpha_t']*(d['real_slope'] - d['fake_slope'])
found = to_delta*(y_fake - d['x_g']) + (y_real - y_fake)*(d['alpha_t']*d['fake_slope'] - 1)
print(compare_gradient(case, found) or 'right', len(cases))
new = {name.split('.')[0] for name in sys.modules} - tops - set(sys.stdlib_module_names)
print(*sorted(new))
'''


def test_numpy_alone():
    "Reading the kit and comparing by hand, with nothing imported but numpy and the package itself"
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, '-c', ALONE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told, modules = done.stdout.splitlines()
    assert told == 'right 41' and set(modules.split()) == {'numpy', 'sid_lsg_nb'}


def test_copied_out(tmp_path):
    "The reader is one file: it works beside a copy of the two JSON files, without the package"
    file = ROOT / 'sid_lsg_nb' / 'method' / 'conformance.py'
    (tmp_path / 'reader.py').write_bytes(file.read_bytes())
    code = f'import reader; print(len(reader.read_cases({str(FOLDER)!r})))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == '41', done.stderr


def numbers(tree):
    if isinstance(tree, dict):
        return [x for k in sorted(tree) for x in numbers(tree[k])]
    if isinstance(tree, list):
        return [x for v in tree for x in numbers(v)]
    return [tree]


def test_files_are_the_recipes():
    "Text for text, and number for number but for the last digits, which depend on the machine"
    spec = importlib.util.spec_from_file_location('kit', ROOT / 'nbs' / 'recipes' / 'conformance_kit.py')
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    sizes = 0
    for name, made in recipe.made().items():
        kept = json.loads((FOLDER / name).read_text())
        sizes += (FOLDER / name).stat().st_size
        pairs = list(zip(numbers(made), numbers(kept), strict=True))
        assert len(pairs) > 500
        for a, b in pairs:
            assert np.isclose(a, b, rtol=1e-9, atol=1e-10) if isinstance(a, float) else a == b
    assert sizes < 300_000
