"""What a GPU would punish, seen without one: the training step asks no tensor for its value and carries nothing
between devices."""

from contextlib import nullcontext
import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import sid_lsg_nb.teachers.base
from sid_lsg_nb.core import to_device
from sid_lsg_nb.teachers.base import Denoiser
from sid_lsg_nb.testing import tiny_unet
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.rollout import Draw
from sid_lsg_nb.method.sequential import generator_grad_sequential
from sid_lsg_nb.method.steps import Batch, Learner, Networks, generator_grad, run_update
from sid_lsg_nb.method.guidance import Kappa
from sid_lsg_nb.method.optim import EMA, make_adam
from sid_lsg_nb.method.schedule import DiscreteSchedule
from sid_lsg_nb.training.config import Config, settings_of
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.networks import build_networks

ASKS = {
    getattr(torch.ops.aten, k).default for k in ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select')
}

class Watch(TorchDispatchMode):
    "Counts questions that would wait for the device, and copies between devices"

    def __init__(self):
        super().__init__()
        self.asked, self.carried = [], []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        where = {
            t.device.type for t in tree_leaves((args, kwargs or {}, out)) if torch.is_tensor(t) and t.dim()
        }
        if f in ASKS:
            self.asked.append(str(f))
        if len(where) > 1:
            self.carried.append(str(f))
        return out

@pytest.mark.parametrize(
    'more',
    [
        {},
        dict(mixed_precision='bf16', gradient_checkpointing=True),
        dict(sequential_gradient=True, clip_grad_value=1.0),
        dict(student_steps=4, method='sim'),
        dict(use_8bit_adam=True),
    ],
    ids=str,
)
def test_an_iteration_asks_nothing(more):
    it = iterate(setup(Config(device='cpu', total_batch_size=2, micro_batch=1, max_train_images=8, **more)))
    next(it)
    with Watch() as seen:
        next(it)
    assert seen.asked == []

def test_the_watch_sees():
    with Watch() as seen:
        torch.ones(2).sum().item(), bool(torch.ones(1) > 0), torch.ones(2, device='cpu').to('meta')
    assert len(seen.asked) == 2 and len(seen.carried) == 1

@pytest.mark.parametrize(
    'gradient, use_8bit_adam', [(generator_grad, False), (generator_grad_sequential, False), (generator_grad, True)])
def test_a_step_carries_nothing(monkeypatch, gradient, use_8bit_adam):
    """Networks, prompts and noise on `meta`, which stands for the GPU: after the first step nothing comes from the
    CPU any more"""
    monkeypatch.setattr(
        sid_lsg_nb.teachers.base.torch, 'autocast', lambda *a, **k: nullcontext()
    )  # knows no meta
    teacher = Denoiser(
        tiny_unet().to('meta').requires_grad_(False), DiscreteSchedule.from_scheduler(DDIMScheduler())
    )
    adam = lambda net: make_adam(net.parameters(), use_8bit_adam=use_8bit_adam)
    fake, generator = (Learner(n := teacher.copy(), adam(n), clip=1.0) for _ in range(2))
    words, ema = (
        lambda n: dict(encoder_hidden_states=torch.empty(n, 16, 16, device='meta')),
        EMA(generator.net),
    )
    latents = lambda: torch.empty(2, 4, 8, 8, device='meta')
    draw = Draw(latents(), latents(), torch.empty(2, dtype=torch.long, device='meta'))
    nets = Networks(teacher, dict(fake=fake, generator=generator), words(1))
    method = make_method(Recipe(kappa=Kappa.lsg(1.5), fake_loss_weight='1-t', gradient=gradient))

    def step():
        for update in method.updates(0):
            run_update(method, update, nets, [Batch(words(2))], [draw])
        ema.update(generator.net, 0, 2)

    step()
    with Watch() as seen:
        step()
    assert seen.carried == [] and seen.asked == []

def test_to_device_takes_the_pinned_way_to_a_gpu(monkeypatch):
    x, taken = torch.arange(3), []
    assert to_device(x, 'cpu') is x and to_device(x, torch.device('meta')).device.type == 'meta'
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *a, **k: taken.append((a, k)) or self)
    to_device(x, 'cuda')
    assert taken == [(('cuda',), dict(non_blocking=True))]

@pytest.mark.parametrize('lora, most', [('none', 2), ('fake', 2), ('generator', 2), ('both', 0)])
def test_no_copy_of_the_teacher_that_nobody_trains(monkeypatch, lora, most):
    made, copy = [], Denoiser.copy
    monkeypatch.setattr(Denoiser, 'copy', lambda net: (made.append(net), copy(net))[1])
    config = Config(device='cpu', lora=lora, lora_rank=2)
    teacher = open_teacher('embedded')
    build_networks(settings_of(config).networks, teacher, make_method(Recipe()))
    assert len(made) <= most
