"kill -9 at any moment, then --resume: the end is bit-equal to the run that was never killed (CPU, float32)."

import json, random, signal, subprocess, sys, time
import pytest
import torch
from forks import Forked, clean_env
from safetensors.torch import load_file

FLAGS = (
    '--max-train-images 72 --total-batch-size 4 --log-every 8 --sample-every 72 --checkpoint-every 4 --n-eval 0 '
    '--teacher-steps 2 --device cpu'
).split()

def start(folder, *flags):
    "The command line in a process of its own"
    return Forked(['-m', 'sid_lsg_nb.cli', 'distill', *FLAGS, *flags], folder)

def generator(folder):
    return load_file(folder / 'generator/unet/diffusion_pytorch_model.safetensors')

def wait_for(folder, n, process):
    "Until the run has written n checkpoints' worth of images, or has ended"
    while process.poll() is None and not any(
        int(p.name) >= n for p in (folder / 'checkpoints').glob('[0-9]*')
    ):
        time.sleep(0.02)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run nobody disturbed, by a Python that starts from nothing"
    home = tmp_path_factory.mktemp('whole')
    words = [sys.executable, '-m', 'sid_lsg_nb.cli', 'distill', *FLAGS, '--out', 'run']
    done = subprocess.run(words, cwd=home, env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / 'run'

@pytest.mark.parametrize('seed', [0, 1])
def test_killed_and_resumed(whole, tmp_path, seed):
    rng, run, first = random.Random(seed), tmp_path / 'run', ['--out', 'run']
    for reached in (8, 32, 52):
        p = start(tmp_path, *(first if reached == 8 else ['--resume', 'run']))
        wait_for(run, reached, p)
        time.sleep(rng.uniform(0, 0.4))
        p.send_signal(signal.SIGKILL)
        p.communicate()
        assert not (run / 'generator').exists(), 'it ended before it was killed: make the run longer'
    out, err = (p := start(tmp_path, '--resume', 'run')).communicate()
    assert p.returncode == 0 and 'resuming run at' in out, err
    a, b = generator(whole), generator(run)
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    lines = lambda f: [
        {k: v for k, v in json.loads(l).items() if k != 'img_per_s'}
        for l in (f / 'log.jsonl').read_text().splitlines()
    ]
    assert lines(whole) == lines(run)

def test_sigterm_saves_and_says_how_to_go_on(whole, tmp_path):
    p = start(tmp_path, '--out', 'run')
    wait_for(tmp_path / 'run', 8, p)
    for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        p.send_signal(s)  # a batch system and a launcher, insisting
    out, err = p.communicate()
    assert (
        p.returncode == 0 and '--resume run' in out and (tmp_path / 'run/generator/model_index.json').exists()
    )
    assert (p := start(tmp_path, '--resume', 'run')).communicate() and p.returncode == 0
    a, b = generator(whole), generator(tmp_path / 'run')
    assert all(torch.equal(a[k], b[k]) for k in a)
