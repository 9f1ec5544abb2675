"""Checkpoints written while the run goes on: the same bytes as those that it waits for, and faults are told"""

import json, shutil, time
from dataclasses import replace
from pathlib import Path
from threading import Event
import pytest
import torch
from forks import Forked, finish, start_ranks
from safetensors.torch import load_file
from sid_lsg_nb.core import max_abs
from sid_lsg_nb.testing import tiny_pipeline
from sid_lsg_nb.training import checkpoint
from sid_lsg_nb.training.checkpoint import CheckpointError, checkpoints, load_checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.resume import CheckpointWriter, open_run
from sid_lsg_nb.training.trainer import train

BESIDE = """
import json, resource, signal, sys
from threading import Event
from pathlib import Path
from sid_lsg_nb.training import checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.job import iterate
from sid_lsg_nb.training.resume import CheckpointWriter, open_run, save
processes, more, go_on, write = Distributed('cpu'), json.loads(sys.argv[1]), Event(), checkpoint.write_tensors
config = Config(teacher='unet', prompts='p.txt', device='cpu', total_batch_size=6, max_train_images=60, lr=1e-3,
                lr_fake=1e-3, out='run', async_checkpoint=True, **more)
job, folder = open_run(config, processes)
def iterations(count):
    for _ in range(count): job.nimg = next(iterate(job)).nimg
def later(*args):
    go_on.wait(60)
    return write(*args)
iterations(1)
save(job, folder/'waited')
checkpoint.write_tensors = later
writer = CheckpointWriter(job, folder)
writer.save()
iterations(2)  # the thread has read no number of the copy yet
assert writer.thread.is_alive() or not processes.is_main
go_on.set()
iterations(1)
assert writer.any_complete()
if processes.is_main:
    told = [json.loads((p/'checkpoints/000000000006/state.json').read_text()) for p in (folder, folder/'waited')]
    assert told[0] == told[1], 'other bytes'
    print('the same', told[0]['bytes'])
if processes.is_main:  # a disk that is full in the middle of the file
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
writer.save()
iterations(1)
try: writer.save()
except checkpoint.CheckpointError as e: print('could not:', e)
if processes.is_main: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
with writer: writer.save()
names = [p.name for p in checkpoint.checkpoints(folder/'checkpoints')]
assert names == ['000000000030', '000000000006'], names
save(job, folder/'waited')
shas = [json.loads((p/'checkpoints/000000000030/state.json').read_text())['sha256'] for p in (folder, folder/'waited')]
assert shas[0] == shas[1]
processes.close()
"""

CASES = {  # settings, processes
    'alone': (dict(mixed_precision='fp16'), 1),
    'copies': (dict(offload=('ema',)), 2),
    'slices': (dict(fsdp=True, mixed_precision='fp16', use_8bit_adam=True), 3)}

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with a small teacher and prompts"
    tiny_pipeline(tmp_path/'unet')
    (tmp_path/'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize('case', CASES)
def test_the_bytes_of_a_moment_that_has_passed(home, case):
    more, world = CASES[case]
    words = ['-c', BESIDE, json.dumps(more)]
    said = finish(start_ranks(words, [home]*world) if world > 1 else [Forked(words, home)], 300)
    assert [status for status, *_ in said] == [0]*world, ''.join(err[-2000:] for *_, err in said)
    assert 'the same' in said[0][1]
    assert all('could not: ' in out and 'free some space' in out for _, out, _ in said)

SMALL = Config(
    teacher='unet', prompts='p.txt', device='cpu', total_batch_size=4, max_train_images=24, lr=1e-3, sample_every=0,
    n_eval=0, log_every=4, checkpoint_every=4, checkpoints_total_limit=9)

def test_a_run_is_the_same_run(home):
    for name in ('waits', 'goes-on'):
        torch.manual_seed(0)
        train(replace(SMALL, out=name, async_checkpoint=name == 'goes-on'))
    one, two = (
        [json.loads((p/'state.json').read_text())['sha256'] for p in checkpoints(f'{name}/checkpoints')]
        for name in ('waits', 'goes-on'))
    assert len(one) == 6 and one == two
    one, two = (load_file(f'{name}/generator/unet/diffusion_pytorch_model.safetensors') for name in ('waits', 'goes-on'))
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)

KILLED = """
import os, signal, sys, threading, time
from sid_lsg_nb.training import checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train
from test_async_checkpoint import SMALL
from dataclasses import replace
write, count = checkpoint.write_tensors, []
def half(file, tensors, wholes):
    count.append(1)
    if len(count) < 3: return write(file, tensors, wholes)
    file.write_bytes(b'half of it')
    time.sleep(2)  # the run goes on
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write_tensors = half
train(replace(SMALL, out='killed', checkpoint_every=8, async_checkpoint=True))
"""

def test_a_kill_while_it_is_written_goes_back_to_the_one_before(home):
    (status, _, err), = finish([Forked(['-c', KILLED], home)])
    assert status == -9, err[-2000:]
    assert [int(p.name) for p in checkpoints('killed/checkpoints')] == [16, 8]
    train(replace(SMALL, resume='killed', checkpoint_every=8, async_checkpoint=True))
    train(replace(SMALL, out='whole', checkpoint_every=8))
    one, two = (load_checkpoint(checkpoints(f'{name}/checkpoints')[0]) for name in ('killed', 'whole'))
    assert one['nimg'] == two['nimg'] == 24
    assert all(max_abs(one[role][k], v) == 0 for role in ('generator', 'fake', 'ema') for k, v in two[role].items())
    assert not [p for p in Path('killed/checkpoints').iterdir() if not p.name.isdigit()]  # nothing half is left

def test_a_run_that_breaks_off_still_has_what_was_being_written(home, monkeypatch):
    job, folder = open_run(replace(SMALL, out='run', async_checkpoint=True))
    said, go_on, write = [], Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, 'write_tensors', lambda *args: (go_on.wait(60), write(*args))[1])
    with pytest.raises(RuntimeError, match='out of memory'), CheckpointWriter(job, folder, said.append) as writer:
        writer.save()
        job.nimg = 4
        go_on.set()
        raise RuntimeError('out of memory')
    assert [int(p.name) for p in checkpoints(folder/'checkpoints')] == [0] and not said

    def full(*_):
        raise OSError('no space')

    monkeypatch.setattr(checkpoint, 'write_tensors', full)
    with pytest.raises(RuntimeError, match='out of memory'), CheckpointWriter(job, folder, said.append) as writer:
        writer.save()
        raise RuntimeError('out of memory')
    assert len(said) == 1 and 'free some space' in said[0]  # the run's own fault is raised, this one is told

def test_a_writer_that_is_too_slow_is_told(home, monkeypatch):
    job, folder = open_run(replace(SMALL, out='run', async_checkpoint=True))
    said, order, write = [], [], checkpoint.write_tensors

    def slow(*args):
        order.append('begins')
        time.sleep(.5)
        sha = write(*args)
        order.append('ends')
        return sha

    monkeypatch.setattr(checkpoint, 'write_tensors', slow)
    with CheckpointWriter(job, folder, said.append) as writer:
        for nimg in (4, 8):
            job.nimg = nimg
            writer.save()
    assert [int(p.name) for p in checkpoints(folder/'checkpoints')] == [8, 4]
    assert order == ['begins', 'ends']*2  # one at a time
    assert said == ['the last checkpoint is still being written; the next one waits for it']

def test_a_fault_in_the_thread_ends_the_run_with_its_words(home, monkeypatch):
    def full(*_):
        raise OSError('no space')

    monkeypatch.setattr(checkpoint, 'write_tensors', full)
    with pytest.raises(CheckpointError, match='no space.*free some space'):
        train(replace(SMALL, out='run', checkpoint_every=0, async_checkpoint=True))  # the last one is told at the end
    shutil.rmtree('run')
    with pytest.raises(CheckpointError, match='no space'):  # or at the next one
        train(replace(SMALL, out='run', async_checkpoint=True))
