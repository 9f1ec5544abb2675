"A run in slices that never holds a network whole: equal to the bit to one whose teacher was opened whole, and smaller"

import json
import pytest
from forks import finish, start_ranks
from sid_lsg_nb.method.adversary import Discriminator
from sid_lsg_nb.teachers.loading import weights_in_files
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import tiny_pipeline, tiny_pixart, tiny_sana, tiny_sd3, tiny_sdxl
from sid_lsg_nb.training.config import Config, resolve, settings_of
from sid_lsg_nb.training.networks import Start

TWO_WAYS = """
import json, torch
from torch.distributed.tensor import DTensor
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed, gather_full
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.networks import Start
from sid_lsg_nb.training.resume import state_of
processes = Distributed('cpu')
more = json.loads({more!r})
config = Config(
    teacher='teacher', prompts='p.txt', device='cpu', total_batch_size=4, max_train_images=8, fsdp=True, lr=1e-3,
    lr_fake=1e-3, **more)
seen = []
configure = Start.configure
Start.configure = lambda self, net: (seen.append(next(net.parameters()).is_meta), configure(self, net))[1]

def play(teacher):
    job = setup(config, processes, teacher)
    for s in iterate(job):
        if s.nimg >= 8: break
    nets = dict(ema=job.ema.net, teacher=job.teacher.denoiser) | {{k: l.net for k, l in job.nets.learners.items()}}
    state, learns = state_of(job)['generator'], job.nets.learners['generator'].net
    assert all(isinstance(state[k], DTensor) for k, _ in learns.named_parameters())  # nobody has made it whole
    return job.teacher_sha, {{k: gather_full(n.state_dict()) for k, n in nets.items()}}

(sha, sliced), (same_sha, whole) = play(None), play(open_teacher('teacher'))
half = len(seen)//2
assert all(seen[:half]) and not any(seen[half:]) and half >= 3, seen
equal = {{k: all(torch.equal(v, whole[k][n]) for n, v in net.items()) for k, net in sliced.items()}}
moved = not all(torch.equal(v, sliced['teacher'][n]) for n, v in sliced['generator'].items())
if processes.is_main: print(json.dumps(dict(equal=equal, moved=moved, same=sha == same_sha)))
processes.close()
"""

CASES = {
    'U-Net': (tiny_pipeline, {}),
    'U-Net, bf16': (tiny_pipeline, dict(mixed_precision='bf16')),
    'flow transformer': (tiny_sd3, {})}

@pytest.mark.parametrize('case', CASES)
def test_slices_out_of_files_are_those_of_whole_networks(tmp_path, case):
    make, more = CASES[case]
    make(tmp_path / 'teacher')
    (tmp_path / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    ranks = start_ranks(['-c', TWO_WAYS.format(more=json.dumps(more))], [tmp_path]*2)
    (status, out, err), (status2, _, err2) = finish(ranks, 200)
    assert (status, status2) == (0, 0), err[-3000:] + err2[-3000:]
    said = json.loads(out.splitlines()[-1])
    assert said['moved'] and said['same'] and all(said['equal'].values()), said
    assert {*said['equal']} >= {'ema', 'teacher', 'generator', 'fake'}

@pytest.mark.parametrize('make', [tiny_pipeline, tiny_sdxl, tiny_pixart, tiny_sd3, tiny_sana])
def test_what_a_discriminator_would_read_is_known_without_numbers(tmp_path, make):
    settings = settings_of(resolve(Config(device='cpu', total_batch_size=4))).networks
    whole = open_teacher(make(tmp_path / 'teacher'))
    with weights_in_files():
        empty = open_teacher(tmp_path / 'teacher')
    assert all(p.is_meta for p in empty.denoiser.parameters())
    found = [Start(settings, t).features(Discriminator(t.denoiser.feature_layer)) for t in (empty, whole)]
    assert found[0] == found[1]
    tables = dict(whole.denoiser.net.named_buffers())
    assert all(b.equal(tables[k]) for k, b in empty.denoiser.net.named_buffers())

ROUNDS = """
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from sid_lsg_nb.training.distributed import Distributed, make_learner

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
    def forward(self, x):
        for block in self.blocks: x = block(x).tanh()
        return x

processes = Distributed('cpu')
torch.manual_seed(0)
learner = make_learner(processes, Net(), 1e-3, shard=True)
for last in (False, True):
    with learner.sync(last): learner.train(torch.ones(2, 6)).square().sum().backward()
    grads = [p.grad for p in learner.net.parameters()]
    print([isinstance(g, DTensor) and g.to_local().shape[0] == 3 for g in grads])
processes.close()
"""

def test_the_gradient_is_cut_after_every_micro_batch(tmp_path):
    "Not only after the last: whole, it would take as much in every process as the network does uncut"
    for status, out, err in finish(start_ranks(['-c', ROUNDS], [tmp_path]*2), 120):
        assert status == 0, err[-2000:]
        assert out.splitlines()[-2:] == [str([True]*6)]*2
