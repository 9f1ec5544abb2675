"""Trials of the recipe for the bundled teacher: each line of a list is a run, scored on whole passes over the captions.

    python nbs/recipes/recipe_search.py trials.jsonl nbs/images/recipe_search.jsonl
    python nbs/recipes/recipe_search.py more.jsonl nbs/images/recipe_search.jsonl RUN    # each goes on from this run

A trial is a name and settings of `sid-lsg distill` that differ from `START`; beside them `passes` over the captions for the
score and `averages`, further half-lives. All trials have a seed that no published row has. A name whose result is there is
not run again, and several of these programs may work on one list: a trial belongs to who makes its folder first. Where a run
is named, generator and fake begin as it left them (its newest checkpoint), and optimisers, average and rates anew: what would
this setting still change at the end of a long run?
"""
import json, sys
from pathlib import Path
import torch
from sid_lsg_nb.method.optim import EMA
from sid_lsg_nb.metrics.tiny import TinyClip, draw_passes, load_captions, score_passes
from sid_lsg_nb.training.checkpoint import load_latest
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import student_draw
from sid_lsg_nb.training.job import iterate, setup

SEED = 21
START = dict(
    seed=SEED, kappa=1.1, t_max=980, lr=1e-4, lr_fake=1e-4, lr_scheduler='linear', ema_halflife=2_000, ema_rampup=.2)


def go_on(job, run: Path):
    "Generator and fake as a run left them; the average begins at the generator"
    state = load_latest(run/'checkpoints')[1]
    for role, learner in job.nets.learners.items(): learner.net.load_state_dict(state[role])
    job.ema.net.load_state_dict(state['generator'])


def train(settings: dict, averages: list[float], run: Path | None) -> tuple:  # the job, its averages by half-life
    "One run without a folder"
    config = Config(**START | settings)
    job, batch = setup(config), config.total_batch_size
    if run: go_on(job, run)
    net = job.nets.learners['generator'].net
    others = {h: EMA(net, h, config.ema_rampup) for h in averages}
    for s in iterate(job):
        job.nimg = s.nimg
        for ema in others.values(): ema.update(net, s.nimg - batch, batch)
        if s.nimg >= config.max_train_images: return job, {config.ema_halflife: job.ema} | others


def scored(job, ema: EMA, passes: int) -> dict:
    "tiny-FD, the part of it that is a shift of the mean, and 1000 tiny-KID where there are two passes"
    scorer, captions = TinyClip(), load_captions()
    draw = student_draw(job.teacher, ema.net, job.t_init, job.settings.evaluation.student_steps)
    with torch.no_grad(): features, _ = draw_passes(draw, scorer, captions.captions, passes)
    s = score_passes('', features, captions, scorer).score
    shift = (features.double().mean((0, 1)) - captions.mu).square().sum().item()
    found = dict(tiny_fd=s.tiny_fd, shift=shift) | (dict(kid1000=1000*s.tiny_kid) if s.tiny_kid is not None else {})
    return {k: round(v, 4) for k, v in found.items()}


def trial(name: str, settings: dict, run: Path | None) -> dict:
    "A line of the results"
    more = dict(settings)
    passes, averages = more.pop('passes', 2), more.pop('averages', [])
    job, emas = train(more, averages, run)
    scores = {f'{h:g}': scored(job, ema, passes) for h, ema in emas.items()}
    n = passes*len(load_captions().captions)
    row = dict(name=name, settings=START | more, images=job.nimg, n=n, scores=scores)
    return row | (dict(after=json.loads((run/'config.json').read_text())['max_train_images']) if run else {})


def main(trials: str, results: str, run: str = ''):
    "All trials that nobody has begun, one after the other, on one thread"
    torch.set_num_threads(1)
    begun = Path(f'{results}.begun')
    begun.mkdir(exist_ok=True)
    for line in Path(trials).read_text().splitlines():
        t = json.loads(line)
        try: (begun/t['name']).mkdir()
        except FileExistsError: continue
        row = trial(t['name'], t['settings'], Path(run) if run else None)
        with open(results, 'a') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
