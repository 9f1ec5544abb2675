"""A teacher whose linear layers are in 8 bits: every family answers as with the same weights in float32, a run learns
on it, and what is saved has the weights of the teacher's files."""

import json
import shutil
from pathlib import Path
import pytest
import torch
from forks import Forked, finish, start_ranks
from safetensors.torch import load_file
from test_families import edm, opened
from sid_lsg_nb.core import InputError, max_abs, rng
from sid_lsg_nb.teachers.int8 import block_linears, int8_layers, quantize_linears
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import tiny_flux, tiny_flux2, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_z_image
from sid_lsg_nb.training.checkpoint import checkpoints
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import setup
from sid_lsg_nb.training.networks import check_int8

FAMILIES = dict(
    sd=tiny_pipeline, sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana, flux=tiny_flux,
    flux2=tiny_flux2, qwen=tiny_qwen_image, z_image=tiny_z_image)

def answer(denoiser, teacher):
    "Of two pictures, and the gradient with respect to them"
    x = torch.randn(2, *teacher.latent_shape, generator=rng(1), requires_grad=True)
    t = teacher.schedule.sample_time(2, *teacher.schedule.default_range, generator=rng(2))
    y = denoiser(x, t, teacher.text(['a red cat', 'the blue dog']))
    slope, = torch.autograd.grad(y, x, torch.randn(y.shape, generator=rng(3)))
    return torch.stack([y.detach(), slope])

@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_answers_as_with_the_same_weights_in_float32(tmp_path, family):
    teacher = opened(FAMILIES[family])(tmp_path / 'teacher')
    rounded, same = (teacher.denoiser.copy().requires_grad_(False) for _ in range(2))
    quantize_linears(rounded.net)
    layers = int8_layers(rounded.net)
    assert layers.keys() == block_linears(teacher.denoiser.net).keys()
    for name, layer in layers.items(): same.net.get_submodule(name).weight.data = layer.float_weight()
    eight, wide, before = (answer(d, teacher) for d in (rounded, same, teacher.denoiser))
    scale = before.flatten(1).norm(dim=1)
    off = ((eight - before).flatten(1).norm(dim=1)/scale).tolist()
    print(f'{family}: {len(layers)} layers, estimate {off[0]:.2%}, gradient {off[1]:.2%}')
    assert max_abs(eight, wide) < 2e-5*scale.max().item() and 0 < max(off) < .03

# ---- runs

FLAGS = (
    '-m sid_lsg_nb.cli distill --preset embedded --teacher teacher --prompts p.txt --total-batch-size 4 '
    '--micro-batch 2 --lora both --lora-rank 3 --int8-teacher --lr 1e-3 --lr-fake 1e-3 --log-every 4 --checkpoint-every 8 '
    '--sample-every 0 --n-eval 0 --device cpu --loss-weight 1-t').split()

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('p.txt').write_text('a red cat\nthe blue dog\nan apple\na shoe\n')
    return tmp_path

def run(*flags, n=1):
    "One process or several; what they said"
    words, here = [*FLAGS, *flags], Path.cwd()
    ranks = start_ranks(words, [here]*n) if n > 1 else [Forked(words, here)]
    said = finish(ranks)
    assert [status for status, *_ in said] == [0]*n, said[0][2][-3000:]
    return ''.join(out for _, out, _ in said)

def weights(folder):
    file, = Path(folder, 'transformer').glob('*.safetensors')
    return load_file(file)

def lines(folder):
    return [json.loads(l) for l in Path(folder, 'log.jsonl').read_text().splitlines()]

def test_what_is_saved_are_the_weights_of_the_files_and_a_lora(place):
    "All that changed is of the LoRA's rank, and only where it is; a run that broke off goes on to the bit"
    tiny_flux('teacher')
    said = run('--out', 'run', '--max-train-images', '16')
    assert said.count('in 8 bits') == 1
    old, new = weights('teacher'), weights('run/generator')
    moved = {k: new[k] - v for k, v in old.items() if not torch.equal(new[k], v)}
    targets = open_teacher('teacher').denoiser.lora_targets
    assert moved and all(k.removesuffix('.weight').endswith(targets) for k in moved)
    for d in moved.values():
        values = torch.linalg.svdvals(d)
        assert values[0] > 1e-4 and values[3:].max() < 1e-6  # rounded weights would leave 1e-4 in all of them
    shutil.copytree('run', 'again')
    newest = checkpoints(Path('again/checkpoints'))[0]
    assert int(newest.name) == 16
    shutil.rmtree(newest)
    shutil.rmtree('again/generator')
    Path('again/closing.json').unlink()
    run('--resume', 'again', '--max-train-images', '16')
    assert all(torch.equal(v, new[k]) for k, v in weights('again/generator').items())

def test_two_processes_are_one(place):
    tiny_sd3('teacher')
    for n in (1, 2): run('--out', f'run-{n}', '--max-train-images', '8', n=n)
    for a, b in zip(lines('run-1'), lines('run-2'), strict=True):
        for k in ('loss_fake', 'fisher', 'norm', 'norm_fake'): assert a[k] == pytest.approx(b[k], rel=2e-3), k

@pytest.mark.parametrize('more', [
    '--mixed-precision fp16 --gradient-checkpointing', '--mixed-precision bf16 --cache-text', '--method scm',
    '--lora fake', '--lora none --weight-dtype bf16'])
def test_it_goes_with_other_ways_to_need_less(place, more):
    tiny_sd3('teacher')
    run('--out', 'run', '--max-train-images', '8', *more.split())
    rows = lines('run')
    assert [r['nimg'] for r in rows] == [4, 8] and not any(r['skipped'] for r in rows)
    assert rows[0]['norm'] > 0 and all(r['norm'] < 1e4 for r in rows)

def fails(teacher, words, opened=None):
    with pytest.raises(InputError, match=words):
        setup(Config(teacher=teacher, prompts='p.txt', device='cpu', int8_teacher=True), teacher=opened)

def test_what_cannot_be(place):
    tiny_pipeline('teacher')
    fails('teacher', 'give a pipeline.s folder with .safetensors', open_teacher('teacher'))  # opened whole before
    file, = Path('teacher/unet').glob('*.safetensors')
    torch.save(load_file(file), file.with_suffix('.bin'))
    file.unlink()
    fails('teacher', 'give a pipeline.s folder with .safetensors')
    with pytest.raises(InputError, match='no linear layers in blocks'): check_int8(True, edm()(place/'edm'))
