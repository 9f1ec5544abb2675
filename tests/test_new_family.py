"""A new family of teachers is one class and one call of `register_family`.

Here it is a small convolutional network with a file format of its own. No other file knows it; it trains (with LoRA and
with real pictures too), is saved, found again, drawn, described, measured and refused where it has to be."""

import json
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from sid_lsg_nb.cli import default_preset
from sid_lsg_nb.commands.convert import export_to
from sid_lsg_nb.commands.options import Export
from sid_lsg_nb.commands.sources import make_sampler, open_source
from sid_lsg_nb.core import InputError, atomic_folder, max_abs, noise_for
from sid_lsg_nb.method.rollout import one_step
from sid_lsg_nb.method.schedule import DiscreteSchedule
from sid_lsg_nb.teachers.base import Denoiser, StudentStart, Teacher, read_config
from sid_lsg_nb.teachers.registry import FAMILIES, brings_prompts, family_of, find_family, model_shapes, open_student
from sid_lsg_nb.teachers.registry import open_teacher, register_family
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.teachers.text_encoder import TextEncoder
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train

# ---- the family, all of it

WORDS = ['red', 'green', 'blue']

class DotsNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x, t, word):
        at = (t.to(x.dtype)/1000)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        word = word[:, None, None, None].to(x.dtype).expand_as(at)
        return self.leave(torch.tanh(self.middle(torch.tanh(self.enter(torch.cat([x, at, word], 1))))))

class DotsText(TextEncoder):
    device = torch.device('cpu')

    def __call__(self, prompts):
        return dict(word=torch.tensor([float(WORDS.index(p) + 1) if p else 0. for p in prompts]))

class DotsDenoiser(Denoiser):
    lora_targets, feature_layer = ('enter', 'middle', 'leave'), 'middle'
    def predict(self, x_t, t, cond): return self.net(x_t, t, cond['word'])
    def empty_net(self): return DotsNet()

@dataclass
class DotsStudent:
    teacher: Teacher
    t_init: float

    @torch.no_grad()
    def __call__(self, prompts, seeds=None, steps=1):
        z = noise_for(range(len(prompts)) if seeds is None else seeds, self.teacher.latent_shape)
        return self.teacher.decode(one_step(self.teacher.denoiser, z, self.teacher.text(prompts), int(self.t_init)))

class DotsTeacher(Teacher):
    kinds, title, default_preset = ('Dots',), 'coloured dots', 'cifar10-sid'
    brings_prompts, opens_in_diffusers, library, example_prompt = True, False, 'dots', 'red'
    usage = "dots.draw('{where}', '{prompt}')"
    latent_shape, prompts = (3, 8, 8), WORDS

    @classmethod
    def claims(cls, path): return (Path(path)/'dots.safetensors').is_file()
    @classmethod
    def is_student(cls, folder): return 't_init' in read_config(Path(folder)/'dots.json')
    @classmethod
    def student_start(cls, folder): return StudentStart('Dots', read_config(Path(folder)/'dots.json')['t_init'], 2.5)

    @classmethod
    def load(cls, path, device='cpu', dtype=torch.float32, prediction_type=''):
        net = DotsNet()
        net.load_state_dict(load_file(Path(path)/'dots.safetensors'))
        schedule = DiscreteSchedule.from_scheduler(DDIMScheduler(beta_schedule='scaled_linear'))
        return cls(DotsDenoiser(net.to(dtype).eval().requires_grad_(False), schedule), DotsText(), str(path))

    @classmethod
    def open_student(cls, folder, device='cpu', dtype=torch.float32):
        return DotsStudent(cls.load(folder, device, dtype), cls.student_start(folder).t_init)

    def decode(self, latents): return latents.float().clamp(-1, 1)
    def encode(self, pixels): return pixels.float()
    def sample(self, z, cond, null, kappa=3., steps=25): return one_step(self.denoiser, z, cond, 700)

    def save(self, net, folder, t_init):
        with atomic_folder(folder) as tmp:
            save_file(net.net.state_dict(), tmp/'dots.safetensors')
            (tmp/'dots.json').write_text(json.dumps(dict(t_init=t_init)))
        return Path(folder)

# ---- what everything else makes of it

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    register_family(DotsTeacher)
    folder = tmp_path_factory.mktemp('dots')/'teacher'
    folder.mkdir()
    torch.manual_seed(0)
    save_file(DotsNet().state_dict(), folder/'dots.safetensors')
    yield str(folder)
    FAMILIES.pop('Dots')

def run(teacher, out, **more):
    small = dict(device='cpu', max_train_images=24, total_batch_size=8, micro_batch=4, log_every=8, n_eval=0)
    train(Config(**small | dict(teacher=teacher, out=str(out), sample_every=16, checkpoint_every=24, lr=1e-3) | more))
    return [json.loads(line) for line in (out/'log.jsonl').read_text().splitlines()]

def pictures(folder):
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(8): Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(folder/f'{i}.png')
    return str(folder)

def test_it_is_found(teacher):
    assert find_family(teacher) is family_of(teacher) is DotsTeacher
    assert (brings_prompts(teacher), default_preset(teacher), model_shapes(teacher)) == (True, 'cifar10-sid', None)
    assert open_source(teacher).kind == 'teacher'
    draw, _ = make_sampler(open_source(teacher), 'cpu', steps=2, kappa=2.)
    assert draw(['red'], [0]).shape == (1, 3, 8, 8)

def test_another_family_cannot_take_its_kind(teacher):
    class Other(Teacher): kinds = ('Dots',)
    with pytest.raises(InputError, match='a family for Dots is registered already'): register_family(Other)
    assert register_family(DotsTeacher) is FAMILIES['Dots'] is DotsTeacher

@pytest.mark.parametrize('how', ['plain', 'lora', 'real'])
def test_it_trains_is_saved_opens_and_draws(teacher, tmp_path, how):
    real = dict(freeze_generator_until=0, gan_start=8)
    more = dict(plain={}, lora=dict(lora='both', lora_rank=2), real=real)[how]
    if how == 'real': more |= dict(real_images=pictures(tmp_path/'real'))
    rows = run(teacher, tmp_path/'run', **more)
    assert len(rows) == 3 and all(np.isfinite(r['loss']) and r['norm'] > 0 for r in rows)
    assert open_source(str(tmp_path/'run')).kind == 'student'
    assert len(list((tmp_path/'run/samples').glob('*.png'))) >= 1
    before, student = open_teacher(teacher), open_student(tmp_path/'run')
    state = student.teacher.denoiser.net.state_dict()
    assert all(max_abs(v, before.denoiser.net.state_dict()[k]) > 0 for k, v in state.items() if 'weight' in k)
    drawn = student(['red', 'blue'], [3, 4])
    assert drawn.shape == (2, 3, 8, 8) and drawn.isfinite().all() and max_abs(drawn[:1], drawn[1:]) > 0
    assert max_abs(student(['blue'], [4]), drawn[1:]) < 1e-5

def test_what_is_saved_is_what_was_given(teacher, tmp_path):
    t = open_teacher(teacher)
    student = open_student(save_student(t, t.denoiser, tmp_path/'student'))
    assert student.t_init == t.default_t_init
    z = noise_for([5], t.latent_shape)
    with torch.no_grad(): want = one_step(t.denoiser, z, t.text(['green']), t.default_t_init)
    assert max_abs(student(['green'], [5]), t.decode(want)) == 0

def test_its_card_and_its_exports(teacher, tmp_path):
    run(teacher, tmp_path/'run')
    card = (tmp_path/'run/generator/README.md').read_text()
    assert "dots.draw('PATH_OR_REPO', 'red')" in card and 'library_name: dots' in card
    with pytest.raises(InputError, match='a student of coloured dots; --to onnx is for Stable Diffusion'):
        export_to(Export(str(tmp_path/'run'), to='onnx'))
