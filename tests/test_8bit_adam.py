"""Second moments in 8 bits, in slices and whole: given the same gradients the same codes and scales in as many
processes as you like, before and after a checkpoint"""

import json
import pytest
import torch
from forks import Forked, finish, start_ranks
from safetensors.torch import load_file
from torch import nn
from sid_lsg_nb.core import InputError, rng
from sid_lsg_nb.method.optim import LeanAdam8bit, make_adam
from sid_lsg_nb.training.checkpoint import checkpoints
from sid_lsg_nb.training.config import Config, check
from sid_lsg_nb.training.run_folder import changed_settings

DTYPES = {'fp32': torch.float32, 'pure-bf16': torch.bfloat16, 'pure-fp16': torch.float16}

class SmallNet(nn.Module):
    "Two rows, so that a third process has none; rows that do not divide evenly; too few numbers, too short rows"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        linear = lambda *shape: nn.Linear(*shape, bias=False)
        self.wide, self.conv, self.tall = linear(2560, 2), nn.Conv2d(16, 50, 3, bias=False), linear(96, 50)
        self.few, self.short = linear(64, 9), linear(16, 700)

def gradients(net, k):
    "Of step k, over some orders of magnitude; in step 1 none for one of the tensors, and step 2 is a bad one"
    draw, found = rng(k), {}
    for name, p in net.named_parameters():
        size = 10**(torch.randn(p.shape, generator=draw) - 1)*(torch.inf if k == 2 else 1)
        found[name] = (size*torch.randn(p.shape, generator=draw)).to(p.dtype)
    if k == 1: del found['tall.weight']
    return found

def steps(net, opt, ks, cut=lambda g, _p: g):
    for k in ks:
        opt.zero_grad()
        found = gradients(net, k)
        for n, p in net.named_parameters(): p.grad = cut(found[n], p) if n in found else None
        opt.found_inf = torch.tensor(float(k == 2))
        opt.step()

SLICES = """
import sys
import torch
from torch.distributed.tensor import distribute_tensor
from sid_lsg_nb.training.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from sid_lsg_nb.training.distributed import Distributed, gather_full, make_learner
from sid_lsg_nb.training.resume import load_state
from test_8bit_adam import DTYPES, SmallNet, steps
from pathlib import Path
processes, precision, first, end = Distributed('cpu'), sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = SmallNet().to(DTYPES[precision])
opt = make_learner(processes, net, 1e-2, precision, shard=True, eps=1e-8, use_8bit_adam=True).optimizer
if first:
    state = open_checkpoint(Path('.', f'{first:012d}'))
    load_state(net, state['net'], True)
    load_state(opt, state['opt'], True)
steps(net, opt, range(first, end), lambda g, p: distribute_tensor(g, p.device_mesh, p.placements))
state = gather_full(dict(net=net.state_dict(), opt=opt.state_dict()), main_only=True)
if processes.is_main: save_checkpoint(Path('.'), end, state)
print(len(opt.state[net.wide.weight]['codes'].to_local()))
processes.close()
"""

def in_slices(folder, world, precision, first, end):
    "Steps of so many processes, into a checkpoint; how many rows of the tensor with two each of them had"
    said = finish(start_ranks(['-c', SLICES, precision, first, end], [folder]*world), 120)
    assert [status for status, *_ in said] == [0]*world, ''.join(err[-1500:] for *_, err in said)
    return [int(out.splitlines()[-1]) for _, out, _ in said]

def by_path(tree, path=''):
    "Tensors of a tree of dicts"
    if torch.is_tensor(tree): return {path: tree}
    return {k: t for name, v in tree.items() for k, t in by_path(v, f'{path}/{name}').items()}

@pytest.mark.parametrize('precision', DTYPES)
def test_slices_are_the_whole(tmp_path, precision):
    "Three processes, then two that read what they wrote, against one optimiser without slices"
    net = SmallNet().to(DTYPES[precision])
    opt = make_adam(net.parameters(), lr=1e-2, use_8bit_adam=True)
    rows = in_slices(tmp_path, 3, precision, 0, 4), in_slices(tmp_path, 2, precision, 4, 7)
    assert rows == ([1, 1, 0], [1, 1])
    for first, end in ((0, 4), (4, 7)):
        steps(net, opt, range(first, end))
        wanted = by_path(dict(net=net.state_dict(), opt=dict(state=opt.state_dict()['state'])))
        found = load_file(tmp_path / f'{end:012d}' / 'state.safetensors')
        assert found.keys() == wanted.keys()
        for k, v in wanted.items():
            exact = k.endswith(('codes', 'scales', 'step'))
            assert found[k].dtype == v.dtype and found[k].shape == v.shape, k
            if exact:
                assert found[k].equal(v), k
                continue
            assert (found[k] - v).abs().max() <= 2*torch.finfo(v.dtype).eps*v.abs().max(), k
    kept = {k: opt.state[p] for k, p in net.named_parameters()}
    assert [k for k, s in kept.items() if 'codes' in s] == ['wide.weight', 'conv.weight', 'tall.weight']
    for s in (s for s in kept.values() if 'codes' in s):
        assert (s['codes'].dtype, s['scales'].dtype) == (torch.uint8, torch.float32)
    assert kept['wide.weight']['step'] == 6 and kept['tall.weight']['step'] == 5  # of seven, one of them bad

FLAGS = (
    '--preset embedded --total-batch-size 4 --micro-batch 2 --max-train-images 12 --log-every 4 --device cpu '
    '--n-eval 0 --sample-every 0 --checkpoint-every 0 --lr 1e-4 --lr-fake 1e-4 --use-8bit-adam').split()

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The bundled teacher: one process, two with copies, two with slices"
    home = tmp_path_factory.mktemp('runs')
    for name, world, more in (('one', 1, []), ('copies', 2, []), ('slices', 2, ['--fsdp'])):
        words = ['-m', 'sid_lsg_nb.cli', 'distill', *FLAGS, '--out', name, *more]
        said = finish(start_ranks(words, [home]*2) if world == 2 else [Forked(words, home)], 300)
        assert [status for status, *_ in said] == [0]*world, ''.join(err[-1500:] for *_, err in said)
    return home

def generator(run):
    return load_file(run / 'generator/unet/diffusion_pytorch_model.safetensors')

@pytest.mark.parametrize('how', ['copies', 'slices'])
def test_two_processes_are_one(runs, how):
    a, b = ([json.loads(l) for l in (runs / k / 'log.jsonl').read_text().splitlines()] for k in ('one', how))
    assert len(a) == len(b) == 3
    for x, y in zip(a, b):
        for k in ('loss_fake', 'fisher', 'norm', 'norm_fake'): assert x[k] == pytest.approx(y[k], rel=2e-3), k
    one, two = generator(runs / 'one'), generator(runs / how)
    apart = torch.cat([(one[k] - v).flatten().abs() for k, v in two.items()])
    assert apart.mean() < 1e-6 and apart.max() < 4e-4, (apart.mean(), apart.max())
    kept = [load_file(checkpoints(runs / k / 'checkpoints')[0] / 'state.safetensors') for k in ('one', how)]
    codes = [k for k in kept[0] if k.endswith('codes')]
    off = torch.cat([(kept[0][k].int() - kept[1][k].int()).flatten().abs() for k in codes])
    assert off.numel() > 5e6 and off.float().mean() < 1e-3  # of the fake and the generator

def test_moments_of_an_earlier_version_are_refused():
    "And the setting stays as the run began; slices are no reason to refuse it"
    p = nn.Parameter(torch.randn(64, 96))
    earlier = dict(step=3, state1=torch.zeros(64, 96, dtype=torch.uint8), state2=torch.zeros(64, 96, dtype=torch.uint8))
    opt = LeanAdam8bit([p])
    state = dict(state={0: earlier}, param_groups=opt.state_dict()['param_groups'])
    with pytest.raises(InputError, match='of an earlier version; start a new run'): opt.load_state_dict(state)
    with pytest.raises(InputError, match='cannot resume with another use_8bit_adam'):
        changed_settings(Config(), Config(use_8bit_adam=True))
    check(Config(use_8bit_adam=True, fsdp=True))
