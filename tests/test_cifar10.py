"""The parts of `benchmarks/cifar10.py curves` on noise of CIFAR-10's shape, with a feature network that averages:
the pipes, the going on, the table and the picture."""

import importlib.util, json, sys
from pathlib import Path
import pytest
import torch
from sid_lsg_nb.data.images import file_sha256
from sid_lsg_nb.metrics import features, protocols

ROOT = Path(__file__).resolve().parents[1]
HOW = '--size tiny --batch 4 --n 16 --reference-n 16 --draw 8 --device cpu'.split()

def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'benchmarks/{name}.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

class Averages(torch.nn.Module):
    "What stands for Inception: 48 averages, and five classes"

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        self.output = torch.nn.Linear(48, 5)

    def forward(self, x):
        return self.output(self.layers(x))

@pytest.fixture
def ready(tmp_path, monkeypatch):
    "The script, and its words; pictures and a feature network lie where they should"
    seeded = lambda n: torch.Generator().manual_seed(n)
    noise = lambda n: torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=seeded(n))
    data = {k: noise(n) if k[-1] == 'x' else torch.arange(n) % 10
            for n, p in ((400, 'train'), (100, 'test')) for k in (f'{p}_x', f'{p}_y')}
    torch.manual_seed(0)
    torch.jit.script(Averages()).save(str(file := tmp_path / 'inception.pt'))
    monkeypatch.setitem(features.INCEPTION_SHA256, file_sha256(file), features.INCEPTION)
    monkeypatch.setattr(protocols, 'CLASS_PICTURES', 16)
    c = script('cifar10')
    monkeypatch.setattr(c, 'load_data', lambda o: data)
    return c, [*HOW, '--folder', str(tmp_path), '--out', str(tmp_path)]

def rows_of(folder):
    return [r for r in json.loads((folder / 'cifar10.json').read_text()) if r['fid'] is not None]

@pytest.mark.filterwarnings('ignore')
def test_curves_run_in_parts(ready, tmp_path, capsys):
    c, words = ready
    assert c.main(['curves', *words]) == 2 and 'there is no teacher' in capsys.readouterr().err
    assert c.main(['teacher', '--iters', '1', *words]) == 0
    every = ['curves', *words, '--keep-every', '4e-6', '--lrs', '1e-4', '1e-5']
    assert c.main([*every, '--iters', '1', '--method', 'di', '--lrs', '1e-4']) == 0  # a part of it
    first = {r['images'] for r in rows_of(tmp_path) if r['who'] == 'di'}
    assert c.main([*every, '--iters', '2']) == 0  # goes on with that, and does the rest
    rows = rows_of(tmp_path)
    points = {(r['who'], r['lr'], r['images']) for r in rows if r['who'] in c.RECIPES}
    assert first == {4} and points == {(m, lr, n) for m in c.RECIPES for lr in (1e-4, 1e-5) for n in (4, 8)}
    assert all(r['is'] >= 1 and r['is_std'] >= 0 for r in rows) and len({r.get('weights') for r in rows}) == len(rows)
    text = (tmp_path / 'README.md').read_text()
    assert text.count('Diff-Instruct, one step | 0.0001 | 4 | 8 |') == 1 and '| SIM, one step | 1e-05 | 4 |' in text
    assert text.count('| 2 | 16 |') == 6 and (tmp_path / 'cifar10-curves-tiny-uncond.png').stat().st_size > 10_000
    assert [text.count(f'| {name} | unconditional | tiny') for name in c.NAMES.values()] == [1, 1, 1, 0]
    before = (tmp_path / 'cifar10.json').read_bytes()
    assert c.main([*every, '--iters', '2']) == 0 and (tmp_path / 'cifar10.json').read_bytes() == before

    bare = [{k: v for k, v in r.items() if k not in ('is', 'is_std')} for r in rows]  # by a trunk alone
    (tmp_path / 'cifar10.json').write_text(json.dumps(bare))
    assert c.main(['table', *words]) == 0
    page = (tmp_path / 'README.md').read_text()
    assert '| 0.0001 | 4 | 8 | 0.2' in page and ' | – | 0.' in page
