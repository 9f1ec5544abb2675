"""Command lines as README prints them, with short settings added and nothing else changed; the paths that they
name are made small. The chapters' lines are parsed."""

import copy, dataclasses, json, pickle, re, shlex, shutil, sys, types
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import nn
from sid_lsg_nb.commands import options
from sid_lsg_nb.teachers import edm, edm_networks
from sid_lsg_nb.cli import main, parse
from sid_lsg_nb.core import EMBEDDED
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.testing import tiny_flux, tiny_sdxl
from sid_lsg_nb.training.config import Config

ROOT = Path(__file__).resolve().parents[1]
SHORT = (
    '--max-train-images 16 --total-batch-size 8 --micro-batch 8 --gradient-accumulation-steps 1 --n-eval 0 '
    '--teacher-steps 1 --device cpu'
).split()
PAGES = 'demo', 'watch'  # which are opened in a browser in `test_demo.py`; here they are made and not served
KINDS = [Config, *(k for k in vars(options).values() if dataclasses.is_dataclass(k))]
OWN = {'--' + f.name.replace('_', '-') for kind in KINDS for f in dataclasses.fields(kind)}
OTHERS = set(
    '--help --version --config --path --readme --nproc-per-node --arch --seeds --flags --folder --pieces'.split()
)  # of launchers, scripts and published code

def words_of(line):
    "Words behind `sid-lsg`, a launcher's words taken off; None for any other line"
    words = shlex.split(line, comments=True)
    start = next((i for i, word in enumerate(words) if word in ('sid-lsg', 'sid_lsg_nb.cli')), None)
    return None if start is None else words[start + 1 :]

def lines(text):
    "Every `sid-lsg` command in the shell blocks of a text"
    blocks = re.findall(r'``` ?sh\n(.*?)```', text, re.S)
    return [w for block in blocks for line in block.splitlines() if (w := words_of(line)) is not None]

def spans(text):
    "Pieces of code inside a text's paragraphs"
    return re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S))

def told(text):
    "Every `sid-lsg` command in a text: in its shell blocks, and among its words where it is whole"
    found = [
        words_of(s)
        for s in spans(text)
        if re.search(r'\b(sid-lsg|sid_lsg_nb\.cli) \w', s) and not s.endswith('...')
    ]
    return lines(text) + [w for w in found if len(w) > 1 or w == ['distill']]

def chapters():
    "The prose of every notebook and guide, by name"
    for f in sorted(ROOT.glob('nbs/**/*.ipynb')):
        cells = json.loads(f.read_text(encoding='utf-8'))['cells']
        yield f.stem, '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    for name in ('CONTRIBUTING.md', 'benchmarks/README.md'):
        yield name, (ROOT / name).read_text(encoding='utf-8')

README = lines((ROOT / 'README.md').read_text(encoding='utf-8'))
FIRST = {}  # lines whose runs others use: what the fixture found them to leave

def forge(net, file):
    "A network as EDM's published code pickles it, by the forger that its chapter shows"
    cells = json.loads((ROOT / 'nbs/2_teachers/13_edm.ipynb').read_text(encoding='utf-8'))['cells']
    (source,) = [s for s in (''.join(c['source']) for c in cells) if 'class Forger' in s]
    scope = vars(edm_networks) | vars(edm) | dict(
        work=Path(file).parent, pickle=pickle, types=types, sys=sys, np=np, nn=nn)
    before = set(sys.modules)
    exec(source, scope)
    scope['forge'](net, Path(file).name, **scope['official_kwargs'](net.config))
    for name in set(sys.modules) - before:
        del sys.modules[name]

def official(file):
    "The bundled U-Net, pickled as a published SiD-LSG checkpoint is"
    with open(file, 'wb') as f:
        pickle.dump(dict(ema=copy.deepcopy(load_sd().denoiser.net)), f)

def prompts():
    "Four captions, in the two kinds of file that README names"
    captions = [f'a {color} fox on a white background' for color in ('red', 'green', 'blue', 'black')]
    Path('prompts.txt').write_text('\n'.join(captions))
    pq.write_table(pa.table(dict(caption=captions)), 'prompts.parquet')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder in which README's paths exist, and the runs that its first lines leave"
    folder = tmp_path_factory.mktemp('readme')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for path in ('path/to/your/model', 'path/to/sd15'):
            shutil.copytree(EMBEDDED / 'teacher', path)
        tiny_sdxl('path/to/sdxl')
        forge(edm.tiny_edm(classes=10).denoiser.net, folder / 'edm-cifar10-32x32-cond-vp.pkl')
        official('official.pkl')
        tiny_flux('path/to/flux')
        net = 'path/to/flux/transformer/diffusion_pytorch_model.safetensors'
        shutil.copy(net, 'fine-tune.safetensors')
        prompts()
        Path('path/to/pictures').mkdir()
        for i in range(8):
            Image.new('RGB', (32, 32), (30 * i, 90, 200)).save(f'path/to/pictures/{i}.png')
        for mark in (['distill'], ['distill', '--preset', 'sd15-lsg-1.5', '--teacher', 'path/to/your/model']):
            words = next(w for w in README if w[: len(mark)] == mark)
            before = made(folder, left(words))
            assert main([*words, *SHORT]) == 0
            FIRST[' '.join(words)] = made(folder, left(words)).keys() - before.keys()
        shutil.copytree('runs/embedded-1', 'runs/embedded-2')
        yield folder

def short(words):
    "What makes a line's work small"
    if '--resume' in words:
        return ['--max-train-images', '24', '--device', 'cpu']
    return dict(
        distill=SHORT,
        sample=['--device', 'cpu'],
        evaluate='--n 8 --batch 8 --device cpu'.split(),
        compare='--n 2 --device cpu'.split(),
        demo='--n 1 --device cpu'.split(),
    ).get(words[0], [])

def left(words):
    "A file that a line leaves, by the words of the line; '' if it only speaks"
    if '--dry-run' in words or '--help' in words or words[0] in ('status', *PAGES):
        return ''
    if words[0] == 'distill':
        return 'runs/*/generator/*.json'
    return {
        'sample': 'pictures/*/*.png',
        'import': 'student/model_index.json',
        'assemble': 'fine-tune/model_index.json',
        'export': 'runs/embedded-1/*.safetensors',
        'evaluate': 'runs/embedded-1/**/scores-*.json',
        'notebooks': 'chapters/index.ipynb',
        'compare': 'blind.html' if '--blind' in words else 'compare.html',
    }[words[0]]

def made(place, pattern):
    return {p: p.stat().st_mtime_ns for p in place.glob(pattern)} if pattern else {}

def test_readme_has_its_lines():
    assert len(README) >= 17
    assert {w[0] for w in README} >= {
        'distill',
        'sample',
        'status',
        'evaluate',
        'compare',
        'export',
        'import',
    }

@pytest.mark.parametrize('words', README, ids=' '.join)
def test_a_line_of_readme_runs(place, words, capsys, monkeypatch):
    if ' '.join(words) in FIRST:
        assert FIRST[' '.join(words)]
        return
    before, runs = made(place, left(words)), set(place.glob('runs/*'))
    if '--help' in words:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0 and '--teacher' in capsys.readouterr().out
        return
    if words[0] in PAGES:
        monkeypatch.setattr('sid_lsg_nb.commands.demo.serve', lambda page, args: print(page.title))
    added = [] if '--dry-run' in words else short(words)
    assert main([*words, *added]) == 0
    if left(words):
        assert made(place, left(words)).items() - before.items()
    else:
        assert capsys.readouterr().out and set(place.glob('runs/*')) == runs

def test_real_pictures_need_no_other_setting(place):
    (words,) = [w for w in README if '--real-images' in w]
    assert main([*words, '--dry-run']) == 0  # at the length that README's line has

def test_lines_of_the_chapters_are_understood(place):
    Path('runs/mine').mkdir()
    shutil.copy('runs/embedded-1/config.json', 'runs/mine')
    found = [w for _, text in chapters() for w in told(text)]
    assert len(found) >= 40 and {w[0] for w in found} >= {'distill', 'sample', 'evaluate', 'bench'}
    for words in found:
        if '--help' not in words:
            parse(words)

def test_options_that_the_chapters_name_exist():
    found = {
        (name, w.split('=')[0])
        for name, text in chapters()
        for s in spans(text)
        if s.startswith(('--', 'sid-lsg'))
        for w in s.split()
        if re.match('--[a-z]', w)
    }
    assert len(found) >= 45
    assert not {(name, w) for name, w in found if w not in OWN | OTHERS}


def test_measured_rows_of_the_bundled_teacher():
    "Each number of the table in embedded/README.md is a stored score, rounded"
    rows = json.loads((EMBEDDED/'rows.json').read_text())['rows']
    sweep = json.loads((ROOT/'nbs/images/embedded_run.json').read_text())['teacher']
    stored = {}
    for r in rows:
        words = {'real': 'other real pictures (the floor)', 'teacher': f'teacher, CFG {r["how"].get("kappa", 0):g}'}
        stored[words.get(r['how']['pictures']), r['captions']] = r['scores'][-1]
    for s in sweep: stored.setdefault((f'teacher, CFG {s["name"].split()[-1]}', 'trained'), s)
    lines = (EMBEDDED/'README.md').read_text().splitlines()
    table = [l.split(' | ') for l in lines if 'CFG' in l or '(the floor)' in l]
    assert len(table) == 8
    for name, captions, n, fd, kid, *rest in table:
        s = stored[name.strip('| '), 'held-out' if 'held out' in captions else 'trained']
        assert int(n.replace(',', '')) == s['n']
        shown = [fd.split(' ± ')[0], kid, rest[0], *rest[1:3], rest[3].strip(' |')]
        exact = [s['tiny_fd'], s['tiny_kid'] and 1000*s['tiny_kid'], s['tiny_clip'],
                 *(100*s[k] for k in ('concept', 'style', 'color'))]
        for text, value in zip(shown, exact, strict=True):
            if text == '-': assert value is None
            else: assert text == f'{value:.{len(text.split(".")[1])}f}', (name, text, value)
