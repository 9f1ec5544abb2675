"""Checkpoints of networks in slices: written and read tensor by tensor, and the same bytes whoever held what, and on
which disk"""

import json, shutil
from collections import defaultdict
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from forks import Forked, finish, start_ranks
from PIL import Image
from safetensors.torch import load_file
from sid_lsg_nb.testing import tiny_pipeline, tiny_sd3
from sid_lsg_nb.training.checkpoint import checkpoints, join, load_checkpoint, save_checkpoint

STEP = """
import json, resource, signal, sys
from pathlib import Path
from sid_lsg_nb.training.checkpoint import CheckpointError
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.job import iterate
from sid_lsg_nb.training.resume import open_run, save
processes, asked = Distributed('cpu'), json.loads(sys.argv[1])
job, folder = open_run(Config(prompts='p.txt', device='cpu', total_batch_size=6, **asked['config']), processes)
while job.nimg < asked['until']: job.nimg = next(iterate(job)).nimg
if asked.get('full') and processes.is_main:  # a disk that is full in the middle of the file
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (asked['full'], -1))
try: save(job, folder)
except CheckpointError as e: print('could not:', e)
if asked.get('full'):
    if processes.is_main: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    job.nimg += 1
    save(job, folder)
processes.close()
"""

def step(folders, until, full=0, **config):
    "One process per folder opens the run and saves it; what each of them said"
    words = ['-c', STEP, json.dumps(dict(config=config, until=until, full=full))]
    ranks = start_ranks(words, folders) if len(folders) > 1 else [Forked(words, folders[0])]
    said = finish(ranks, 300)
    assert [status for status, _, _ in said] == [0]*len(folders), ''.join(err[-2000:] for _, _, err in said)
    return [out + err for _, out, err in said]

@pytest.fixture
def disks(tmp_path):
    "Two machines' folders: two teachers, prompts, pictures"
    a, b = tmp_path / 'a', tmp_path / 'b'
    tiny_pipeline(a / 'unet')
    tiny_sd3(a / 'flow')
    (a / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    (a / 'real').mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(a / f'real/{k}.png')
    shutil.copytree(a, b)
    return a, b

def newest(disk):
    return checkpoints(disk / 'run/checkpoints')[0]

def written(disk):
    "(SHA-256 of the tensors, the tree without the run's settings, the file's time) of the newest checkpoint"
    told = json.loads((newest(disk) / 'state.json').read_text())
    tree = join(told['tree'], defaultdict(lambda: 'a tensor'))
    del tree['config']
    for group in (g for k in tree if k.startswith('opt_') for g in tree[k]['param_groups']): del group['lr']
    return told['sha256'], tree, (newest(disk) / 'state.safetensors').stat().st_mtime_ns

PICTURES = dict(
    real_images='real', freeze_generator_until=0, gan_start=0, gan_weight_generator=1.0, micro_batch=1)
CASES = {  # settings, those of several processes
    'fp16, averages, 8-bit Adam': (
        dict(teacher='unet', mixed_precision='fp16', more_ema_halflives=(8., 30.), ema_rampup=9.,
             eval_reference='real', use_8bit_adam=True), dict(fsdp=True)),
    "a discriminator's head": (dict(teacher='unet', method='dmd2', **PICTURES), dict(fsdp=True)),
    'flow, real pictures, bf16 weights, 8-bit Adam': (
        dict(teacher='flow', weight_dtype='bf16', use_8bit_adam=True, **PICTURES), dict(fsdp=True)),
    'LoRA, 8-bit Adam': (dict(teacher='unet', lora='fake', lora_rank=256, use_8bit_adam=True), {})}

@pytest.mark.parametrize('case', CASES)
def test_the_same_bytes_whoever_holds_them(disks, case):
    a, b = disks
    more, several = CASES[case]
    more = dict(max_train_images=12, lr=1e-3, lr_fake=1e-3, **more)
    step([a], 6, out='run', **more)
    found = [written(a)]
    for folders in ((a, a, a), (a, b), (a,)):  # (a, b): the second does not see the run
        said = step(folders, 6, resume='run', **more, **(several if len(folders) > 1 else {}))
        assert ('do not see it' in said[0]) == (folders == (a, b))
        found.append(written(a))
    assert len({time for *_, time in found}) == len(found)  # each has written anew
    assert all(f[:2] == found[0][:2] for f in found)
    assert not (b / 'run').exists()
    if '8-bit' in case:
        kept = load_file(newest(a) / 'state.safetensors')
        assert any(k.endswith('codes') and v.dtype == torch.uint8 and v.any() for k, v in kept.items())
        assert any(k.endswith('scales') and v.dtype == torch.float32 and v.any() for k, v in kept.items())

SLICED = dict(teacher='unet', max_train_images=24, lr=1e-3, lr_fake=1e-3, fsdp=True)

def test_a_broken_newest_file_is_passed_over(disks):
    a, b = disks
    step([a, a], 6, out='run', **SLICED)
    good, before = newest(a), written(a)
    step([a, a], 12, resume='run', **SLICED)
    file = newest(a) / 'state.safetensors'
    assert int(newest(a).name) == 12 and int(good.name) == 6
    broken = bytearray(file.read_bytes())
    broken[-3] ^= 1
    file.write_bytes(broken)
    time = before[2]
    for second in (a, b):  # it sees the files, or not
        said = step([a, second], 6, resume='run', **SLICED)
        assert said[0].count('SHA-256 differs') == 1 and 'resuming run at 6 images' in said[0]
        assert 'SHA-256' not in said[1]
        assert file.read_bytes() == broken  # left alone
        state = json.loads((good / 'state.json').read_text())
        assert state['sha256'] == before[0]
        assert (newer := (good / 'state.safetensors').stat().st_mtime_ns) != time  # back, and saved again
        time = newer

def test_a_disk_that_is_full_in_the_middle_stops_no_one(disks):
    a, _ = disks
    said = step([a, a], 6, full=200_000, out='run', **SLICED)
    assert all('could not: ' in text and 'free some space' in text for text in said)
    left = (a / 'run/checkpoints').iterdir()
    assert [p.name for p in left] == ['000000000007'] and load_checkpoint(newest(a))['nimg'] == 7

def test_a_checkpoint_of_safetensors_own_writer_loads(tmp_path, monkeypatch):
    "As earlier versions wrote them"
    from safetensors.torch import save_file
    from sid_lsg_nb.training import checkpoint

    def with_library(file, tensors, _wholes=None):
        save_file(tensors, file)
        return checkpoint._sha256(file)

    tree = dict(w=torch.randn(4, 3).bfloat16(), opt={0: dict(step=torch.tensor(3.))}, r=torch.arange(9).byte(), n=1)
    save_checkpoint(tmp_path / 'new', 1, tree)
    monkeypatch.setattr(checkpoint, 'write_tensors', with_library)
    save_checkpoint(tmp_path / 'old', 1, tree)
    old, new = (load_checkpoint(checkpoints(tmp_path / k)[0]) for k in ('old', 'new'))
    assert old.keys() == new.keys() == tree.keys() and old['opt'].keys() == {0: 0}.keys()
    for one in (old, new):
        assert one['w'].equal(tree['w']) and one['r'].equal(tree['r']) and one['opt'][0]['step'] == 3

MEMORY = """
import gc, json, re, sys
from dataclasses import replace
from pathlib import Path
from torch.distributed.tensor import DTensor
from sid_lsg_nb.training.checkpoint import split
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.resume import open_run, save, state_of
processes, more = Distributed('cpu'), json.loads(sys.argv[1])
memory = lambda word: int(re.search(word + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])*1024
local = lambda t: t.to_local() if isinstance(t, DTensor) else t
def forget_peak():
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')
    return memory('VmRSS')
config = Config(teacher='flow', prompts='p.txt', device='cpu', total_batch_size=2, fsdp=True)
open_run(replace(config, out=sys.argv[2]), processes)  # what libraries take at their first use is not counted
before = forget_peak()
job, folder = open_run(replace(config, teacher='big', **more), processes)
opened = memory('VmHWM') - before
tensors = [*split(state_of(job))[1].values()]
told = dict(whole=sum(t.nbytes for t in tensors), largest=max(t.nbytes for t in tensors))
told |= dict(slices=sum(local(t).nbytes for t in [*tensors, *job.teacher.denoiser.parameters()]))
for t in tensors:  # zeros of Adam's that were never written take no memory
    if isinstance(t, DTensor) and not t.to_local().any(): t.to_local().uniform_()
held = forget_peak()
save(job, folder)
print(json.dumps(told | dict(opened=opened, saving=memory('VmHWM') - held)))
processes.close()
"""

def test_no_process_ever_holds_the_whole(disks):
    a, b = disks
    tiny_sd3(a / 'big')
    config = SD3Transformer2DModel.load_config(a / 'big/transformer')
    more = dict(num_layers=4, attention_head_dim=64, num_attention_heads=8, caption_projection_dim=512)
    SD3Transformer2DModel.from_config(config, **more).save_pretrained(a / 'big/transformer')
    shutil.copytree(a / 'big', b / 'big')
    cases = ((a, a), dict(out='run')), ((a, a), dict(resume='run')), ((a, b), dict(resume='run'))
    for k, (folders, config) in enumerate(cases):
        said = finish(start_ranks(['-c', MEMORY, json.dumps(config), f'warm-{k}'], folders), 300)
        assert [status for status, *_ in said] == [0, 0], said[0][2][-2000:] + said[1][2][-2000:]
        for told in (json.loads(out.splitlines()[-1]) for _, out, _ in said):
            print(config, folders[1] == b, told)
            assert told['whole'] > 1.5*told['slices'] > 5e8 and told['largest'] < .05*told['whole'], told
            assert told['saving'] < 3*told['largest'] + 6e7 < .2*told['whole'], (config, told)
            assert told['opened'] < 1.5*told['slices'] < .95*told['whole'], (config, told)
