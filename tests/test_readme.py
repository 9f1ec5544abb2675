"Command lines as README prints them, with short settings added and nothing else changed; the paths that they name are made small."
import json, re, shlex, shutil
from pathlib import Path
import pytest
from PIL import Image
from sid_lsg_nb.cli import main, parse
from sid_lsg_nb.denoiser import EMBEDDED

README = Path(__file__).resolve().parents[1]/'README.md'
SHORT = '--nimg 16 --batch 8 --n-eval 0 --teacher-steps 1 --device cpu'.split()

def lines():
    "Words of every `sid-lsg` command in README, a launcher's words taken off"
    blocks = re.findall(r'``` ?sh\n(.*?)```', README.read_text(encoding='utf-8'), re.S)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    starts = [(w, next((i for i, word in enumerate(w) if word in ('sid-lsg', 'sid_lsg_nb.cli')), None)) for w in words]
    return [w[i + 1:] for w, i in starts if i is not None]

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder in which README's paths exist"
    monkeypatch.chdir(tmp_path)
    for path in ('path/to/your/model', 'path/to/sd15'): shutil.copytree(EMBEDDED/'teacher', path)
    for path, name in (('path/to/sdxl', 'StableDiffusionXLPipeline'),):
        Path(path).mkdir()
        Path(path, 'model_index.json').write_text(json.dumps(dict(_class_name=name)))
    Path('edm-cifar10-32x32-cond-vp.pkl').touch()
    Path('runs/sd15-lsg-1.5-1').mkdir(parents=True)
    Path('runs/sd15-lsg-1.5-1/config.json').write_text('{}')
    Path('path/to/pictures').mkdir()
    for i in range(4): Image.new('RGB', (32, 32), (60*i, 90, 200)).save(f'path/to/pictures/{i}.png')
    return tmp_path

def test_every_line_is_understood(place):
    found = lines()
    assert len(found) >= 15 and {w[0] for w in found} >= {'distill', 'sample', 'status', 'evaluate', 'compare', 'export', 'import'}
    for words in found:
        if '--help' not in words: parse(words)

@pytest.mark.parametrize('mark', ['--real', '--method'])
def test_lines_of_the_bundled_teacher_run(place, mark):
    words, = [w for w in lines() if w[0] == 'distill' and mark in w]
    assert main([*words, *SHORT, '--out', 'run']) == 0
    assert Path('run/generator/model_index.json').is_file()

def test_real_pictures_need_no_other_setting(place):
    words, = [w for w in lines() if '--real' in w]
    assert main([*words, '--dry-run']) == 0                                               # at the length that README's line has
