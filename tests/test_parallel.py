"The command line on two processes (gloo, CPU): copies and slices, saved by two and resumed by one, stopped together."

import json, os, shutil, signal, subprocess, sys, time
import pytest
import torch
from forks import Forked, clean_env, finish, start_ranks
from safetensors.torch import load_file
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.testing import tiny_pipeline
from sid_lsg_nb.testing import tiny_flux, tiny_sd3

FLAGS = (
    '--preset embedded --total-batch-size 8 --micro-batch 2 --log-every 8 --sample-every 800 --checkpoint-every 16 '
    '--checkpoints-total-limit 9 --teacher-steps 2 --device cpu --kappa 1.5 '
    '--lr 1e-4 --lr-fake 1e-4 --lr-scheduler constant'
).split()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a tiny teacher and prompts"
    home = tmp_path_factory.mktemp('two')
    tiny_pipeline(home / 'teacher')
    (home / 'p.txt').write_text(
        '\n'.join(
            f'a {c} {t} on a {b} background'
            for c in ('red', 'green', 'blue')
            for t in ('cat', 'dog', 'apple', 'shoe')
            for b in ('red', 'blue')
        )
    )
    return home

def command(*flags):
    return ['-m', 'sid_lsg_nb.cli', 'distill', '--teacher', 'teacher', '--prompts', 'p.txt', *FLAGS, *flags]

def ended(home, n, *flags):
    "Exit statuses of n processes, and what they said and complained of together"
    ranks = start_ranks(command(*flags), [home] * n) if n > 1 else [Forked(command(*flags), home)]
    statuses, *texts = zip(*finish(ranks))
    return [*statuses], *map(''.join, texts)

def run(home, n, *flags):
    statuses, out, err = ended(home, n, *flags)
    assert statuses == [0] * n, err[-3000:]
    return out

def generator(run):
    return load_file(run / 'generator/unet/diffusion_pytorch_model.safetensors')

def apart(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)

def lines(run):
    return [json.loads(l) for l in (run / 'log.jsonl').read_text().splitlines()]

@pytest.fixture(scope='module')
def one(home):
    run(home, 1, '--out', 'one', '--max-train-images', '32')
    return home / 'one'

@pytest.fixture(scope='module')
def halfway(home):
    "Of copies and of slices: a run of two processes up to 16 images in `half-way-...`, and what they said"
    flags = dict(copies=[], slices=['--fsdp'])
    return {k: run(home, 2, '--out', f'half-way-{k}', '--max-train-images', '16', *v) for k, v in flags.items()}

@pytest.mark.parametrize('how', ['copies', 'slices'])
def test_two_processes_are_one(home, one, halfway, how):
    out = halfway[how]
    shutil.copytree(home / f'half-way-{how}', home / how)
    assert out.count('run folder') == 1 and 'x 2 processes' in out  # one of them speaks
    a, b = lines(one)[:2], lines(home / how)
    assert [r['nimg'] for r in b] == [8, 16]
    for k in ('loss_fake', 'fisher', 'norm', 'norm_fake'):
        assert a[0][k] == pytest.approx(b[0][k], rel=2e-4, abs=1e-6), k  # the line holds the mean over both
    saved = load_checkpoint(checkpoints(home / how / 'checkpoints')[0])
    whole = load_checkpoint(checkpoints(one / 'checkpoints')[1])
    assert saved['nimg'] == 16 and all(
        saved['generator'][k].shape == v.shape for k, v in whole['generator'].items()
    )  # whole, whatever the slices
    assert (
        apart(saved['generator'], whole['generator']) < 5e-4
    )  # fp32: Adam's first steps turn rounding into lr 1e-4 here and there
    run(
        home, 1, '--resume', how, '--max-train-images', '32', *(['--no-fsdp'] if how == 'slices' else [])
    )  # saved by two, resumed by one
    assert [r['nimg'] for r in lines(home / how)] == [8, 16, 24, 32] and apart(
        generator(one), generator(home / how)
    ) < 8e-4
    start_weights = load_file(home / 'teacher/unet/diffusion_pytorch_model.safetensors')
    assert (
        apart(generator(one), start_weights) > 1e-4
        or apart(saved['generator'], {f'net.{k}': v for k, v in start_weights.items()}) > 1e-4
    )

@pytest.fixture(scope='module')
def chain(
    home,
):  # another kind of teacher, another loss, several steps: one step of the chain per iteration, the same everywhere
    tiny_sd3(home / 'flow')
    how = (
        '--teacher flow --student-steps 3 --max-train-images 24 --loss-weight 1-t --timestep-sampling logit-normal '
        '--fake-loss-weight velocity --method sim --distance huber:0.1 --n-eval 0'
    ).split()
    run(home, 1, '--out', 'chain', *how)
    return how

@pytest.mark.parametrize('how', ['copies', 'slices'])
def test_a_flow_with_several_steps(home, chain, how):
    run(home, 2, '--out', f'chain-{how}', *chain, *(['--fsdp'] if how == 'slices' else []))
    a, b = lines(home / 'chain'), lines(home / f'chain-{how}')
    assert len(a) == 3 and all(
        x[k] == pytest.approx(y[k], rel=2e-3, abs=1e-6)
        for x, y in zip(a, b)
        for k in ('loss_fake', 'fisher', 'norm', 'norm_fake')
    )
    new, old = (
        load_file(home / f / 'transformer/diffusion_pytorch_model.safetensors')
        for f in (f'chain-{how}/generator', 'flow')
    )
    assert (
        apart(new, load_file(home / 'chain/generator/transformer/diffusion_pytorch_model.safetensors')) < 1e-3
        and apart(new, old) > 1e-4
    )

def test_packed_latents_of_another_size_in_slices(home):
    tiny_flux(home / 'packed')
    how = (
        '--teacher packed --height 24 --width 16 --embedded-guidance 2 --max-train-images 16 --loss-weight 1-t '
        '--fake-loss-weight velocity --n-eval 0 --sample-every 0 --checkpoint-every 0'
    ).split()
    for n, more in ((1, ['--out', 'packed-1']), (2, ['--out', 'packed-2', '--fsdp'])): run(home, n, *how, *more)
    for x, y in zip(lines(home / 'packed-1'), lines(home / 'packed-2'), strict=True):
        for k in ('loss_fake', 'fisher', 'norm', 'norm_fake'): assert x[k] == pytest.approx(y[k], rel=2e-3, abs=1e-6)
    one, two, old = (
        load_file(home / f / 'transformer/diffusion_pytorch_model.safetensors')
        for f in ('packed-1/generator', 'packed-2/generator', 'packed')
    )
    assert apart(one, two) < 1e-3 and apart(one, old) > 1e-4
    index = json.loads((home / 'packed-2/generator/model_index.json').read_text())
    assert (index['_height'], index['_width'], index['_guidance_scale']) == (24, 16, 2.0)

FP16 = dict(
    copies=[], slices=['--fsdp'], lora='--lora both --lora-rank 4 --lr 1e-3 --lr-fake 1e-3'.split())

@pytest.mark.parametrize('how', FP16)
def test_fp16_on_two_processes(home, how):
    "The loss scalers of two processes and of one settle alike; norms agree to fp16's rounding; a break changes nothing"
    flags = ['--mixed-precision', 'fp16', '--n-eval', '0', *FP16[how]]
    alone = 'half-lora' if how == 'lora' else 'half'
    if not (home / alone).exists():
        run(home, 1, '--out', alone, '--max-train-images', '16', *flags, *(['--no-fsdp'] if how == 'slices' else []))
    run(home, 2, '--out', f'two-{how}', '--max-train-images', '24', *flags)
    a, b = lines(home / alone), lines(home / f'two-{how}')[:2]
    assert [r['nimg'] for r in b] == [8, 16]
    for k in ('skipped', 'skipped_fake', 'scale_fake', 'scale_generator'):
        assert [r[k] for r in a] == [r[k] for r in b], k
    for k in ('norm', 'norm_fake'):
        assert [r[k] for r in a] == pytest.approx([r[k] for r in b], rel=0.03), k
    broken_off(home / f'two-{how}', home / f'again-{how}', 24)
    run(home, 2, '--resume', f'again-{how}', '--max-train-images', '24', *flags)
    new, old = generator(home / f'again-{how}'), generator(home / f'two-{how}')
    assert all(torch.equal(new[k], v) for k, v in old.items())
    last = [lines(home / f'{run}-{how}')[-1] for run in ('two', 'again')]
    assert last[0]['nimg'] == 24 and last[0]['scale_generator'] == last[1]['scale_generator']

def broken_off(run, copy, nimg):
    "A copy of a run that died before its checkpoint at so many images"
    shutil.copytree(run, copy)
    newest = checkpoints(copy / 'checkpoints')[0]
    assert int(newest.name) == nimg
    shutil.rmtree(newest)
    shutil.rmtree(copy / 'generator')
    (copy / 'closing.json').unlink()

def test_slices_resume_exactly(home, halfway):
    run(home, 2, '--out', 'long', '--max-train-images', '32', '--fsdp')
    shutil.copytree(home / 'half-way-slices', home / 'short')
    run(home, 2, '--resume', 'short', '--max-train-images', '32', '--fsdp')
    a, b = generator(home / 'long'), generator(home / 'short')
    assert all(torch.equal(a[k], b[k]) for k in a)

def children(pid):
    "Processes started by a process"
    return [
        int(p)
        for t in os.listdir(f'/proc/{pid}/task')
        for p in open(f'/proc/{pid}/task/{t}/children').read().split()
    ]

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_a_signal_to_one_stops_both(home):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    words, pipe = command('--out', 'told', '--max-train-images', '80000'), subprocess.PIPE
    p = subprocess.Popen([*launch, *words], cwd=home, env=clean_env(), stdout=pipe, stderr=pipe, text=True)
    while p.poll() is None and not checkpoints(home / 'told/checkpoints'):
        time.sleep(0.05)
    os.kill(children(p.pid)[-1], signal.SIGTERM)  # the second process only
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and '--resume told' in out, err[-2000:]
    nimg = lines(home / 'told')[-1]['nimg']
    assert (
        int(checkpoints(home / 'told/checkpoints')[0].name) == nimg < 80000
        and (home / 'told/generator/model_index.json').exists()
    )

def test_a_batch_that_cannot_be_shared(home):
    statuses, out, err = ended(home, 2, '--out', 'odd', '--total-batch-size', '7')
    assert (
        0 not in statuses
        and err.count('does not divide among 2 processes') == 1
        and not (home / 'odd').exists()
    )

ONE_OVERFLOWS = """
import json, torch
from diffusers import DDIMScheduler
from sid_lsg_nb.teachers.base import Denoiser
from sid_lsg_nb.testing import tiny_unet
from sid_lsg_nb.training.distributed import Distributed, make_learner, gather_full
from sid_lsg_nb.method.schedule import DiscreteSchedule
processes = Distributed('cpu')
scheduler = DDIMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, clip_sample=False)
schedule = DiscreteSchedule.from_scheduler(scheduler)

def play(how, precision):
    torch.manual_seed(0)
    sliced = how == 'slices'
    learner = make_learner(processes, Denoiser(tiny_unet(), schedule), 1e-3, precision, shard=sliced)
    flat = lambda: torch.cat([gather_full(p.detach()).flatten().double() for p in learner.net.parameters()])
    weight, said = learner.net.net.conv_out.weight, []

    for bad in (None, 0, 1, None):  # the rank that overflows in this step
        start, rng, hook = flat(), torch.Generator().manual_seed(7 + processes.rank), None
        x = torch.randn(2, 4, 8, 8, generator=rng)
        cond = dict(encoder_hidden_states=torch.randn(2, 5, 16, generator=rng))

        # copies: infinite before the gradients are exchanged
        if not sliced and bad == processes.rank: hook = weight.register_hook(lambda g: g + torch.inf)
        with learner.sync(True):
            y = learner.train(x, torch.tensor([99, 500]), cond)
            learner.objective(y.square().mean((1, 2, 3)), 4).backward()
        if hook: hook.remove()

        # slices: infinite after the exchange, in the slice of one
        local = weight.grad.to_local() if sliced else weight.grad
        if sliced and bad == processes.rank: local.view(-1)[0] = torch.inf

        here = bool(local.isfinite().all())
        skipped = learner.step().skipped.item()
        now = flat()
        said.append(dict(
            here=here, skipped=skipped, scale=learner.scaler.get_scale() if learner.scaler else 0,
            moved=not torch.equal(now, start), weights=now.sum().item()))
    return said

said = {f'{how} {precision}': play(how, precision) for how in ('copies', 'slices') for precision in ('fp16', 'fp32')}
said = processes.all_gather(said)
if processes.is_main: print(json.dumps(said))
processes.close()
"""

def test_an_overflow_of_one_is_skipped_by_both(tmp_path):
    """An infinite gradient in one process, or in the slice of one: both leave the step out, halve the scale and
    keep the same weights"""
    (status, out, err), (status2, _, err2) = finish(start_ranks(['-c', ONE_OVERFLOWS], [tmp_path] * 2))
    assert (status, status2) == (0, 0), err[-3000:] + err2[-3000:]
    a, b = json.loads(out.splitlines()[-1])
    assert len(a) == 4 and set(a) == set(b)
    for k in a:
        for of in ('skipped', 'scale', 'moved', 'weights'):
            assert [s[of] for s in a[k]] == [s[of] for s in b[k]], (k, of)
        assert [s['skipped'] for s in a[k]] == [0, 1, 1, 0] and [s['moved'] for s in a[k]] == [
            True,
            False,
            False,
            True,
        ], k
        assert [s['scale'] for s in a[k]] == ([256, 128, 64, 64] if 'fp16' in k else [0] * 4), k
        alone = (
            [[True, False, True, True], [True, True, False, True]]
            if 'slices' in k
            else [[True, False, False, True]] * 2
        )
        assert [[s['here'] for s in r[k]] for r in (a, b)] == alone, (
            k
        )  # the slices were not both spoilt: somebody had to tell
