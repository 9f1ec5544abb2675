"""The learning rate is a function of the images seen: through the loop, through repeated updates, through a break."""

import json, shutil
from dataclasses import replace
import torch
from sid_lsg_nb.method.optim import lr_factor
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.dry_run import dry_run
from sid_lsg_nb.training.presets import PRESETS
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.resume import open_run
from sid_lsg_nb.training.trainer import train

RUN = Config(
    device='cpu', total_batch_size=8, max_train_images=32, lr=2e-4, lr_fake=1e-4, lr_scheduler='cosine', lr_warmup=12,
    sample_every=0, n_eval=0, log_every=8, checkpoint_every=8, checkpoints_total_limit=4)


def rates(job):
    return [job.nets[role].optimizer.param_groups[0]['lr'] for role in ('generator', 'fake')]


def wanted(nimg):
    factor = lr_factor('cosine', nimg, 12, 32)
    return [2e-4 * factor, 1e-4 * factor]


def test_every_update_of_an_iteration_has_the_rate_of_its_images():
    "Three updates of the fake run no faster through the schedule than one"
    job = setup(replace(RUN, fake_updates=3))
    seen, run, losses = [], iterate(job), job.method.losses
    def watched(*args):
        seen.append(rates(job))
        return losses(*args)
    object.__setattr__(job.method, 'losses', watched)
    for _ in range(4):
        next(run)
    assert seen == [wanted(nimg) for nimg in (0, 8, 16, 24) for _ in range(4)]
    assert seen[0] == [0.0, 0.0] and 0 < seen[4][0] < seen[8][0]


def test_no_rate_no_step(tmp_path):
    "At 0 images a warm-up has rate 0: after one iteration the networks are where they began"
    job = setup(RUN)
    before = [p.clone() for l in job.nets.learners.values() for p in l.net.parameters()]
    run = iterate(job)
    next(run)
    after = [p for l in job.nets.learners.values() for p in l.net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    next(run)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))


def test_a_resumed_run_has_the_rate_that_it_would_have_had(tmp_path):
    whole = train(replace(RUN, out=str(tmp_path / 'whole')))
    part = tmp_path / 'part'
    shutil.copytree(whole, part)
    for path in checkpoints(part / 'checkpoints')[:2]:
        shutil.rmtree(path)
    shutil.rmtree(part / 'generator')
    job, _ = open_run(replace(RUN, resume=str(part)))
    assert job.nimg == 16 and rates(job) == wanted(16)
    train(replace(RUN, resume=str(part)))
    a, b = (load_checkpoint(checkpoints(f / 'checkpoints')[0]) for f in (whole, part))
    assert a['nimg'] == b['nimg'] == 32
    for role in ('generator', 'fake', 'ema'):
        assert all(torch.equal(v, b[role][k]) for k, v in a[role].items())
    assert json.loads((whole / 'config.json').read_text())['lr_scheduler'] == 'cosine'


def test_published_runs_keep_one_rate(capsys):
    published = [c for name, c in PRESETS.items() if not name.startswith('embedded')]
    assert {(c.lr_scheduler, c.lr_warmup, c.fake_updates) for c in published} == {('constant', 0, 1)}
    dry_run(RUN)
    assert 'lr_scheduler: "cosine"\nlr_warmup: 12\n' in capsys.readouterr().out
