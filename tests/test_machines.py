"Two machines with disks of their own: two nodes in two folders of this one (gloo, loopback), once by `torchrun`."

import json, shutil, socket, subprocess, sys
import pytest
import torch
from forks import clean_env, finish, start_ranks
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.testing import tiny_pipeline

FLAGS = (
    '--preset embedded --teacher teacher --prompts p.txt --total-batch-size 4 --log-every 4 --sample-every 800 '
    '--checkpoint-every 8 --teacher-steps 2 --device cpu --lr 1e-4 --lr-fake 1e-4 --lr-scheduler constant'
).split()
LEFT = {
    'ACCELERATE_USE_DEEPSPEED': 'true', 'ACCELERATE_USE_FSDP': 'true', 'FSDP_CPU_RAM_EFFICIENT_LOADING': 'true',
    'ACCELERATE_MIXED_PRECISION': 'fp8', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1',
    'PMI_SIZE': '4', 'PMI_RANK': '3', 'CUDA_VISIBLE_DEVICES': '', 'LC_ALL': 'C', 'PYTHONUTF8': '0',
    'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'ascii'}

@pytest.fixture(scope='module')
def disks(tmp_path_factory):
    "Two machines' folders, the same teacher and prompts on both"
    a, b = (tmp_path_factory.mktemp(k) for k in 'ab')
    tiny_pipeline(a / 'teacher')
    shutil.copytree(a / 'teacher', b / 'teacher')
    for d in (a, b):
        (d / 'p.txt').write_text(
            'a red cat\nthe café in the snow\na photo of a dog with a shoe\n', encoding='utf-8'
        )
    return a, b

def together(disks, *flags, own=((), ()), seconds=180):
    "One run on both: `(status, what it said)` of each"
    words = [['-m', 'sid_lsg_nb.cli', 'distill', *FLAGS, *flags, *more] for more in own]
    nodes = start_ranks(words, disks, clean_env(), local=False)
    return [(status, out + err) for status, out, err in finish(nodes, seconds)]

def torchrun(disks, *flags, env=()):
    "The same, each by a `torchrun` of its own"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    node = lambda k: [
        sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--node-rank', str(k), '--master-addr',
        '127.0.0.1', '--master-port', str(port), '--nproc-per-node', '1', '-m', 'sid_lsg_nb.cli', 'distill', *FLAGS,
        *flags]
    ps = [
        subprocess.Popen(
            node(k), cwd=disk, env=clean_env(**dict(env)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding='utf-8', errors='replace')
        for k, disk in enumerate(disks)
    ]
    said = []
    try:
        said = [p.communicate(timeout=180)[0] for p in ps]
    finally:
        for p in ps:
            p.poll() is None and p.kill()
    return [(p.returncode, text) for p, text in zip(ps, said)]

def test_start_and_resume_with_a_disk_each(disks):
    a, b = disks
    (rc, said), (rc2, other) = torchrun(disks, '--out', 'run', '--max-train-images', '8', env=LEFT)
    assert (rc, rc2) == (0, 0), said + other
    assert (
        'x 2 processes' in said
        and 'ACCELERATE_USE_DEEPSPEED=true (here: --fsdp)' in said
        and 'run folder' not in other
    )
    assert (
        f'is on {socket.gethostname()} alone' in said and not (b / 'run').exists()
    )  # the second machine has nothing of it
    before = load_checkpoint(checkpoints(a / 'run/checkpoints')[0])
    (rc, said), (rc2, other) = together(disks, '--resume', 'run', '--max-train-images', '16')
    assert (rc, rc2) == (0, 0), said + other
    after = load_checkpoint(checkpoints(a / 'run/checkpoints')[0])
    assert (before['nimg'], after['nimg'], after['position'] > before['position']) == (8, 16, True) and not (
        b / 'run'
    ).exists()
    (rc, said), (rc2, other) = together(
        (a, a), '--out', 'whole', '--max-train-images', '16', '--checkpoint-every', '16'
    )  # one disk, never interrupted
    assert (rc, rc2) == (0, 0) and 'alone' not in said, said + other
    straight = load_checkpoint(checkpoints(a / 'whole/checkpoints')[0])
    for k in ('fake', 'generator', 'ema'):
        assert all(torch.equal(after[k][n], straight[k][n]) for n in straight[k]), (
            k
        )  # the sent checkpoint is the read one
    rows = lambda run: [
        {k: v for k, v in json.loads(l).items() if k != 'img_per_s'}
        for l in (run / 'log.jsonl').read_text().splitlines()
    ]
    assert rows(a / 'run') == rows(a / 'whole')

@pytest.mark.parametrize('what', ['teacher', 'other teacher', 'settings', 'no run'])
def test_what_is_wrong_on_one_is_said_by_all(disks, tmp_path, what):
    a, b = disks
    c = tmp_path / 'c'
    shutil.copytree(b, c)
    flags, own, want = (
        ['--out', f'bad {what}', '--max-train-images', '8'], ((), ()), f'rank 1 on {socket.gethostname()}: ')
    if what == 'teacher':
        shutil.rmtree(c / 'teacher')
    if what == 'other teacher':
        shutil.rmtree(c / 'teacher')
        torch.manual_seed(5)
        tiny_pipeline(c / 'teacher', seed=5)
        want = 'the content of the teacher is not the same'
    if what == 'settings':
        own, want = ((), ('--lr', '3e-4')), '--lr is not the same for all processes: 0.0001 for rank 0'
    if what == 'no run':
        flags, want = (
            ['--resume', 'nowhere', '--max-train-images', '8'], f'rank 0 on {socket.gethostname()}: ')
    for rc, said in together((a, c), *flags, own=own, seconds=120):
        assert rc != 0 and said.count(f'sid-lsg: {want}') == 1, said
    assert not (a / f'bad {what}').exists()
