"""The ablations that the story of the open questions shows.

    python nbs/recipes/ablation.py                                               # all of it, again
    python nbs/recipes/ablation.py --questions kappa --seeds 30 40 50 --out other.json

Distils the bundled teacher once per setting and seed, scores every student on captions that no student was trained on, and
writes after each run. Runs of one seed are paired: the same noise, times and order of captions, whatever is being compared.
Started again, it goes on where it stopped: what the file already holds is not run again. Nothing is typed in by hand.
"""
import itertools, json, tempfile, time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal
import numpy as np
import torch, tyro
from embedded_run import IMAGES, machine
from tqdm.auto import tqdm
from sid_lsg_nb.data.prompt_stream import PromptStream, read_prompts
from sid_lsg_nb.core import InputError, atomic_write
from sid_lsg_nb.core import EMBEDDED
from sid_lsg_nb.metrics.tiny import TinyClip, captions_against_world, load_world, tiny_score
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.drawing import many_step_draw, student_draw

@dataclass(frozen=True)
class Setting:
    "What one run does differently from the preset `embedded`"
    options: dict = field(default_factory=dict) # of `sid-lsg distill`
    captions: str = 'all'                       # which of the training captions, see `captions`
    part: float = 1.                            # of the images asked for; 0: no training
    steps: int = 1                              # that the generator is trained for
    draws: tuple[int, ...] = (1,)               # steps that the student is scored with
    teacher: float | None = None                # score the teacher instead, at this guidance

def lsg(kappa, **more): return Setting(dict(guidance='lsg', kappa=kappa), **more)
BASE = 'LSG 1.25'                               # the preset: a row in every question
FORMATS = {'fp32': {}, 'bf16': dict(mixed_precision='bf16'), 'pure-bf16': dict(weight_dtype='bf16'),
           'pure-fp16': dict(weight_dtype='fp16')}
SETTINGS = {
    BASE: lsg(1.25, draws=(1, 2, 4)), 'no CFG': lsg(1.), 'LSG 1.5': lsg(1.5), 'LSG 2': lsg(2.), 'LSG 3': lsg(3.), 'LSG 4.5': lsg(4.5),
    **{f'long {k:g}': Setting(dict(guidance='long', kappa=k)) for k in (1.5, 2., 3.)}, **{f'short {k:g}': Setting(dict(guidance='short', kappa=k)) for k in (.8, .5)},
    'undistilled': Setting(part=0., draws=(1, 2, 4)), **{f'teacher, CFG {k:g}': Setting(part=0., teacher=k) for k in (1., 1.5, 3.)},
    **{name: lsg(1.25, captions=name) for name in ('64 captions', '20 concepts', 'one background')},
    **{f'trained for {k} steps': lsg(1.25, steps=k, draws=(1, 2, 4)) for k in (2, 4)},
    **{name: Setting(FORMATS[name]) for name in ('bf16', 'pure-bf16')},
    **{f'{name}, a quarter': Setting(FORMATS[name], part=.25) for name in FORMATS},
    **{f'{name}, longer': Setting(dict(guidance=g, kappa=k), part=4.) for name, g, k in (('no CFG', 'lsg', 1.), (BASE, 'lsg', 1.25), ('LSG 2', 'lsg', 2.), ('long 2', 'long', 2.))}}
QUESTIONS = dict(
    kappa=['no CFG', 'short 0.8', 'short 0.5', 'long 1.5', 'long 2', 'long 3', BASE, 'LSG 1.5', 'LSG 2', 'LSG 3', 'LSG 4.5'],
    prompts=[BASE, '64 captions', '20 concepts', 'one background'], steps=[BASE, 'trained for 2 steps', 'trained for 4 steps', 'undistilled'],
    precision=[BASE, 'bf16', 'pure-bf16'], teacher=['undistilled', 'teacher, CFG 1', 'teacher, CFG 1.5', 'teacher, CFG 3'],
    fp16=['fp32, a quarter', 'bf16, a quarter', 'pure-bf16, a quarter', 'pure-fp16, a quarter'],
    longer=[f'{name}, longer' for name in ('no CFG', BASE, 'LSG 2', 'long 2')])
# what the preset said when these questions were asked; later it got another range of times
THEN = dict(t_max=980, lr=1e-4, lr_fake=1e-4, lr_scheduler='constant', ema_halflife=2_000, ema_rampup=.2)
HELD = 4321                                     # picks the captions for scoring, and numbers their pictures; never used for training

def captions(which:str, n:int, seed:int)->list[str]:
    "Training captions: all that are not among the n held ones, or a part of them that depends on the seed"
    known, world = read_prompts(EMBEDDED/'prompts.txt'), load_world(); held = set(PromptStream(known, HELD).take(n))
    rest, g = [c for c in known if c not in held], np.random.default_rng([seed, 7])
    if which == 'all': return rest
    if which == '64 captions': return [rest[i] for i in g.permutation(len(rest))[:64]]
    place, count = {'20 concepts': (0, 20), 'one background': (2, 1)}[which]; chosen = set(g.permutation(world.shape[place])[:count].tolist())
    return [c for c in rest if world.parse(c)[place] in chosen]

def prepare(setting:Setting, seed:int, nimg:int, n:int, batch:int): # the trainer's job
    "A run of the trainer, ready to iterate"
    with tempfile.TemporaryDirectory() as tmp:
        (file := Path(tmp)/'captions.txt').write_text('\n'.join(captions(setting.captions, n, seed)) + '\n')
        job = setup(Config(**THEN | dict(
            prompts=str(file), seed=seed, max_train_images=max(nimg, batch), total_batch_size=batch,
            student_steps=setting.steps, device='cpu') | setting.options))
    return job

def run(setting:Setting, seed:int, nimg:int, n:int, batch:int, scorer:TinyClip)->dict: # training_seconds: wall, processor
    "Train and score; the first losses go along, so that a run can be recognised"
    tick, job, spent = time.time(), prepare(setting, seed, nimg, n, batch), np.zeros(2)
    held = captions_against_world(PromptStream(read_prompts(EMBEDDED/'prompts.txt'), HELD).take(n))
    clocks = lambda: np.array([time.time(), time.process_time()])
    end = round(setting.part*nimg/batch)*batch; looks, first, gaps, scores = {end, end//2, end//4} if setting.part > 1 else {end}, [], [], []
    def look(images):
        for steps in setting.draws if images == end else (1,):
            draw = many_step_draw(job.teacher, setting.teacher, 25) if setting.teacher else student_draw(job.teacher, job.ema.net, job.t_init, steps)
            fresh = lambda prompts, seeds: draw(prompts, [s + 100_000*seed for s in seeds])                  # pictures from other noise for every seed
            s = asdict(tiny_score('', fresh, scorer, held, passes=1, seed=HELD)); scores.append(dict(images=images, steps=25 if setting.teacher else steps) | {k: round(s[k], 5) for k in ('tiny_fd', 'tiny_clip', 'concept', 'style', 'color')})
    if not end: look(0)
    before = clocks()
    for s in iterate(job) if end else ():
        spent += clocks() - before
        if len(first) < 5: first.append([float(s.logs['loss_fake']), float(s.logs['loss'])])
        gaps.append(float(s.logs['fisher']))
        if s.nimg in looks: look(s.nimg)
        if s.nimg >= end: break
        before = clocks()
    return dict(images=end, first=first, fisher=round(float(np.mean(gaps[len(gaps)*3//4:])), 4) if end else None, training_seconds=spent.round(1).tolist(), minutes=round((time.time() - tick)/60, 2), scores=scores)

def main(
    questions: tuple[Literal['kappa', 'prompts', 'steps', 'precision', 'teacher', 'fp16', 'longer'], ...] = tuple(QUESTIONS), # which of the comparisons; settings they share are run once
    seeds: tuple[int, ...] = (0, 10, 20), # one run of each setting per seed
    nimg: int = 512, # images to train on; the published preset takes 8,800
    n: int = 500, # captions held back from training, and pictures per score
    batch: int = 16, # images per step
    threads: int = 1, # of the processor
    out: Path = IMAGES/'ablation.json', # where to write; what it already holds is not run again
):
    "Distil the bundled teacher under many settings, and compare"
    torch.set_num_threads(threads)
    settings = dict(nimg=nimg, n=n, batch=batch, held=HELD, threads=threads, lr=THEN['lr'], base=BASE)
    result = json.loads(out.read_text()) if out.exists() else dict(machine=machine(), date=date.today().isoformat(), minutes=0., settings=settings, questions=QUESTIONS, runs=[])
    if result['settings'] != settings: raise InputError(f'{out} was made with {result["settings"]}, not with {settings}; give another --out')
    done, scorer = {(r['name'], r['seed']) for r in result['runs']}, TinyClip()
    jobs = list(dict.fromkeys((name, seed) for q in questions for seed, name in itertools.product(seeds, QUESTIONS[q])))
    for name, seed in tqdm([j for j in jobs if j not in done], desc='runs'):
        r = dict(name=name, seed=seed) | run(SETTINGS[name], seed, nimg, n, batch, scorer)
        result |= dict(runs=[*result['runs'], r], minutes=round(result['minutes'] + r['minutes'], 2), questions=QUESTIONS)
        atomic_write(out, json.dumps(result) + '\n')
        s = r['scores'][-1]; tqdm.write(f'{name:22} seed {seed:3} {r["minutes"]:5.2f} min  tiny-FD {s["tiny_fd"]:.3f}  concept {s["concept"]:.1%}  style {s["style"]:.1%}  colour {s["color"]:.1%}')

if __name__ == '__main__': tyro.cli(main, description=__doc__)
