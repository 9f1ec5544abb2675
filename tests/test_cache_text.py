"""`--cache-text`: prompts are encoded once, alone, into a file; training is what it is without, and resumes.

One picture per micro-batch is asked alone without the cache, too, so there all numbers are equal to the bit."""

import json
import pytest
import torch
from forks import finish, start_ranks
from safetensors.torch import load_file
from sid_lsg_nb.core import InputError
from sid_lsg_nb.data import prompts as prompt_files
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.pixart import PixArtTextEncoder
from sid_lsg_nb.teachers.qwen_image import QwenImageTextEncoder
from sid_lsg_nb.teachers.text_encoder import CLIPTextEncoder
from sid_lsg_nb.testing import tiny_pipeline, tiny_pixart, tiny_qwen_image
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train

FAMILIES = dict(
    sd=(tiny_pipeline, CLIPTextEncoder), pixart=(tiny_pixart, PixArtTextEncoder),
    qwen_image=(tiny_qwen_image, QwenImageTextEncoder))
PROMPTS = 'a red cat\nthe blue dog\nan apple\nthe green shoe\na cat\n'

@pytest.fixture(scope='module', params=FAMILIES)
def family(request, tmp_path_factory):
    "A folder with a tiny teacher and prompts, and the class of its encoder"
    home, (make, encoder) = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    make(home/'teacher')
    (home/'p.txt').write_text(PROMPTS)
    return home, encoder

@pytest.fixture
def asked(family, monkeypatch):
    "The prompts of each call of the encoder; the cache is beside the teacher"
    (home, encoder), calls, here = family, [], prompt_files.cached_assets_path
    monkeypatch.setattr(
        prompt_files, 'cached_assets_path', lambda *names, assets_dir: here(*names, assets_dir=home/'cache'))
    encode = encoder.__call__
    monkeypatch.setattr(encoder, '__call__', lambda self, prompts: (calls.append(prompts), encode(self, prompts))[1])
    return calls

def run(home, out, **more):
    small = dict(
        total_batch_size=2, micro_batch=1, max_train_images=8, log_every=2, sample_every=8, checkpoint_every=4,
        n_eval=0, teacher_steps=2, lr=1e-3, lr_fake=1e-3, kappa=1.5, proportion_empty_prompts=.5, device='cpu')
    train(Config(teacher=str(home/'teacher'), prompts=str(home/'p.txt'), out=str(home/out), **small | more))
    return home/out

def weights(run):
    file, = (p for k in ('unet', 'transformer') for p in run.glob(f'generator/{k}/*.safetensors'))
    return load_file(file)

def apart(a, b):
    a, b = weights(a), weights(b)
    return max((a[k] - b[k]).abs().max().item() for k in a)

def losses(run):
    rows = [json.loads(l) for l in (run/'log.jsonl').read_text().splitlines()]
    return [[v for k, v in r.items() if k[:4] in ('loss', 'norm')] for r in rows]

def test_a_run_is_the_same_and_the_next_encodes_nothing(family, asked):
    home, _ = family
    without = run(home, 'without')
    assert len(asked) > 10
    asked.clear()
    first = run(home, 'first', cache_text=True)
    assert sorted(p for call in asked for p in call) == ['', *sorted(PROMPTS.splitlines())]  # once, alone
    asked.clear()
    second = run(home, 'second', cache_text=True)
    assert asked == []
    for other in (first, second): assert apart(without, other) == 0 and losses(other) == losses(without)
    assert {p.name for p in first.rglob('*.safetensors')} == {p.name for p in without.rglob('*.safetensors')}
    drawn = [(r/'samples/000000008.png').read_bytes() for r in (without, second)]
    assert drawn[0] == drawn[1] and len(list((home/'cache').rglob('*.npy'))) == 2

def test_it_resumes_exactly(family, asked):
    home, _ = family
    whole = run(home, 'whole', cache_text=True)
    part = run(home, 'part', cache_text=True, max_train_images=4, lr_scheduler='constant')
    asked.clear()
    train(Config(**json.loads((part/'config.json').read_text()) | dict(
        resume=str(part), max_train_images=8, lr_scheduler='constant', out='')))
    again = run(home, 'constant', cache_text=True, lr_scheduler='constant')
    assert asked == [] and apart(part, again) == 0 < apart(part, whole) and losses(part)[-1] == losses(again)[-1]

def test_batches_of_two_differ_in_the_last_bits_at_most(family, asked):
    home, _ = family
    a, b = (run(home, f'two-{on}', micro_batch=2, cache_text=on) for on in (True, False))
    assert apart(a, b) < 1e-4  # Adam without momentum makes a step of lr out of any difference
    (la, lb) = (torch.tensor(losses(r)) for r in (a, b))
    assert ((la - lb).abs() <= 1e-3*lb.abs().clamp(min=1e-3)).all()

# ---- the command line

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('two')
    tiny_pipeline(home/'teacher')
    (home/'p.txt').write_text(PROMPTS)
    return home

PROGRAM = '''import pathlib
from sid_lsg_nb import cli
from sid_lsg_nb.data import prompts
here = prompts.cached_assets_path
prompts.cached_assets_path = lambda *names, assets_dir: here(*names, assets_dir=pathlib.Path('cache'))
cli.main()'''
LINE = '''distill --teacher teacher --prompts p.txt --total-batch-size 4 --micro-batch 1 --log-every 4
--max-train-images 8 --sample-every 800 --checkpoint-every 8 --teacher-steps 2 --device cpu --kappa 1.5'''.split()

def two(home, *flags):
    ended = finish(start_ranks(['-c', PROGRAM, *LINE, *flags], [home]*2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    return ''.join(out for _, out, _ in ended)

def test_of_two_processes_one_encodes(home):
    two(home, '--out', 'without')
    said = two(home, '--out', 'with', '--cache-text')
    assert said.count('encoded prompts: 5 prompts') == 1 and len(list((home/'cache').rglob('*.npy'))) == 2
    assert apart(home/'without', home/'with') == 0 and losses(home/'without') == losses(home/'with')

def test_a_dry_run_counts_it_and_refuses_what_reads_no_text(home, capsys, tmp_path):
    more = dict(dry_run=True, cache_text=True, device='cpu', out=str(tmp_path/'out'))
    train(Config(teacher=str(home/'teacher'), prompts=str(home/'p.txt'), **more))
    assert 'encoded prompts: about' in capsys.readouterr().out and not (tmp_path/'out').exists()
    save_edm(tiny_edm(classes=4).denoiser.net, tmp_path/'edm')
    with pytest.raises(InputError, match='no text encoder that could be put away; leave --cache-text away'):
        train(Config(preset='cifar10-sid', teacher=str(tmp_path/'edm'), kappa=1., **more))
