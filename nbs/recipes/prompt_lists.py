"""Which characteristics of a prompt list go with the score? Many lists drawn at random, one student each.

    python nbs/recipes/prompt_lists.py --work DIR

Every list has its own number of captions, concepts, backgrounds and styles, its own wording, its own filter by how well real
pictures fit their captions, and is sorted in its file or not; all drawn independently, so that a regression over the lists
can tell the characteristics apart. A student per list, trained by the preset `embedded` in fewer images, is scored on the
captions that the teacher was trained on and on those that neither teacher nor student nor scorer ever saw. DIR holds the
world of `embedded_teacher.py data` (its pictures say how well a caption fits). Rows are written after each run; started
again, or several times at once, it goes on with lists that nobody has begun.
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path
import embedded_teacher as recipe
import numpy as np
import torch, tyro
from embedded_run import IMAGES
from sid_lsg_nb.metrics.tiny import TinyClip, caption_scores, draw_passes, load_captions, score_passes, trained_captions
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import student_draw
from sid_lsg_nb.training.job import iterate, setup

SEED = 300                                      # of the first list, and of its student; the next have one more
LEVELS = dict(
    captions=(16, 64, 256, 2048), concepts=(20, 60, 160), backgrounds=(2, 4, 8), styles=(1, 2),
    wording=('full', 'half short', 'loose', 'rich'), filter=('all', 'best half', 'worst half'), order=('mixed', 'sorted'))
FULL = 'a {style} {concept} on a {color} background'
WORDINGS = {                                    # one form per caption, in turn; the teacher has read the first two
    'full': (FULL,), 'half short': (FULL, 'a {style} {concept}'), 'loose': ('{color} background, {concept}, {style}',),
    'rich': ('a beautiful and highly detailed {style} {concept} on a {color} background, best quality',)}
PASSES = {'trained': 1, 'held-out': 8}          # over the captions, for a score


@dataclass(frozen=True)
class PromptList:
    "A list, by its characteristics"
    seed: int
    captions: int
    concepts: int
    backgrounds: int
    styles: int
    wording: str
    filter: str
    order: str


def draw_list(seed: int) -> PromptList:
    "Each characteristic on its own"
    g = np.random.default_rng(seed)
    return PromptList(seed, **{name: values[g.integers(len(values))] for name, values in LEVELS.items()})


def fit_of_captions(world: recipe.World, scorer: TinyClip) -> dict[tuple, float]:
    "How well real pictures fit their captions: cosine of image and text, mean of four pictures"
    g, found = torch.Generator().manual_seed(SEED - 1), []
    for _ in range(4):
        x = torch.cat([world.render(t, g) for t in world.train.split(256)])
        found.append(caption_scores(scorer.encode_images(recipe.bytes_round(x)), trained_captions(), scorer)[:, 0])
    return dict(zip(map(tuple, world.train.tolist()), torch.stack(found).mean(0).tolist()))


def prompts_of(p: PromptList, world: recipe.World, fit: dict[tuple, float]) -> list[str]:
    "The lines of its file; fewer than `captions` where the other characteristics leave fewer"
    g = np.random.default_rng([p.seed, 1])
    counts = (world.nc, p.concepts), (world.ns, p.styles), (world.nk, p.backgrounds)
    kept = [set(g.permutation(n)[:k].tolist()) for n, k in counts]
    pool = [t for t in fit if all(i in some for i, some in zip(t, kept))]
    pool, half = sorted(pool, key=lambda t: -fit[t]), len(pool)//2
    pool = {'all': pool, 'best half': pool[:half], 'worst half': pool[half:]}[p.filter]
    chosen = [pool[i] for i in g.permutation(len(pool))[:p.captions]]
    names = [dict(concept=world.meta['concepts'][c], style=world.meta['styles'][s], color=list(world.meta['colors'])[k])
             for c, s, k in chosen]
    forms = WORDINGS[p.wording]
    lines = list(dict.fromkeys(forms[i%len(forms)].format(**n) for i, n in enumerate(names)))
    return sorted(lines) if p.order == 'sorted' else lines


def run(p: PromptList, lines: list[str], images: int, work: Path) -> dict:
    "A student of this list, and what it scores"
    file = work/f'list-{p.seed}.txt'
    file.write_text('\n'.join(lines) + '\n')
    job, first = setup(Config(prompts=str(file), seed=p.seed, max_train_images=images, device='cpu')), []
    for s in iterate(job):
        if len(first) < 3: first.append(round(float(s.logs['loss']), 5))
        if s.nimg >= images: break
    draw, scorer, scores = student_draw(job.teacher, job.ema.net, job.t_init, 1), TinyClip(), {}
    for which, passes in PASSES.items():
        real = load_captions(which)
        with torch.no_grad(): features, _ = draw_passes(draw, scorer, real.captions, passes, seed=100_000*p.seed)
        found = asdict(score_passes('', features, real, scorer).score)
        scores[which] = {k: round(found[k], 5) for k in ('tiny_fd', 'tiny_clip', 'concept', 'style', 'color', 'n')}
    words = float(np.mean([len(line.split()) for line in lines]))
    return asdict(p) | dict(lines=len(lines), words=round(words, 2), first=first, images=images, scores=scores)


def main(
    work: Path,                                 # the world of the bundled teacher, and files of the runs
    lists: int = 36,                            # how many lists
    images: int = 2_400,                        # of one run
    out: Path = IMAGES/'prompt_lists.jsonl',    # a line per list; lists that are there are not run again
):
    "Train and score a student per list"
    torch.set_num_threads(1)
    begun = Path(f'{out}.begun')
    begun.mkdir(exist_ok=True)
    world, fit = recipe.World(work), None
    for seed in range(SEED, SEED + lists):
        try: (begun/str(seed)).mkdir()
        except FileExistsError: continue
        fit = fit or fit_of_captions(world, TinyClip())
        p = draw_list(seed)
        row = run(p, prompts_of(p, world, fit), images, work)
        with open(out, 'a') as f: f.write(json.dumps(row) + '\n')
        print(row, flush=True)


if __name__ == '__main__': tyro.cli(main, description=__doc__)
