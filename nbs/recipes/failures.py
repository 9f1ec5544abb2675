"""How runs and students fail: the signatures of runs that were broken on purpose, and the worst prompts of a student.

    python nbs/recipes/failures.py --part runs                      # nbs/images/failures.json and failures_runs.png
    python nbs/recipes/failures.py --part prompts --work DIR --earlier RUN      # nbs/images/failures_prompts.json

`runs` trains the bundled teacher as a user would, in few images, once as the preset says and four times with a fault, and
keeps each log and pictures of the same prompts. `prompts` compares, caption by caption, the shipped student and the teacher
with real pictures, in the scorer's features, and says what the student's distance is made of, and that of an earlier run's.
DIR holds the kept passes of `tiny_rows.py`.
"""
import json, tempfile
from pathlib import Path
from typing import Literal
import torch, tyro
from embedded_run import IMAGES, machine
from safetensors.torch import load_file
from sid_lsg_nb.core import atomic_write
from sid_lsg_nb.export.shipped_student import shipped_student
from sid_lsg_nb.metrics.frechet import frechet_distance
from sid_lsg_nb.metrics.tiny import TinyClip, caption_scores, draw_passes, load_captions, trained_captions
from sid_lsg_nb.teachers.registry import open_student
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import save_grid
from sid_lsg_nb.training.run_folder import log_rows
from sid_lsg_nb.training.trainer import Diverged, train

BASE = dict(device='cpu', log_every=80, sample_every=0, checkpoint_every=0, n_eval=0, max_train_images=1_600, divergence_patience=40)
FAULTS = {  # what a user may have done
    'as the preset says': {},
    'late fake': dict(guidance='long', kappa=3., lr=1e-3, lr_fake=1e-7),    # the generator runs, the fake does not follow
    'prompts ignored': dict(kappa=0.),          # all guidance scales 0: everybody is asked without the prompt
    'diverged': dict(lr=.2, lr_fake=.2),        # a thousand times the preset's rate
    'not a number': dict(lr=1e4, lr_fake=1e4),  # 1e4 for 1e-4
}
SHOWN = [f'a {style} on a {color} background' for style, color in (
    ('3d fox', 'white'), ('flat fox', 'blue'), ('3d rocket', 'black'), ('flat pizza', 'green'), ('3d tulip', 'yellow'))]


def measured(draw, scorer: TinyClip) -> dict:
    "What is read back from pictures of 288 captions, four each, and how much the pixels of one caption's pictures differ"
    few, pixels = trained_captions()[::8], []
    keep = lambda prompts, seeds: pixels.append(draw(prompts, seeds)) or pixels[-1]
    with torch.no_grad(): features, _ = draw_passes(keep, scorer, few, 4)
    right = torch.stack([caption_scores(f, few, scorer) for f in features]).mean((0, 1))
    spread = torch.cat(pixels).clamp(-1, 1).unflatten(0, (4, -1)).std(0).mean()
    return dict(concept=right[1].item(), style=right[2].item(), color=right[3].item(), spread=spread.item())


def broken_run(name: str, settings: dict, scorer: TinyClip) -> tuple[dict, torch.Tensor | None]:
    "One run: its log, what it said at the end, its pictures"
    with tempfile.TemporaryDirectory() as tmp:
        folder, said = Path(tmp)/'run', ''
        try: train(Config(**BASE | settings, out=str(folder)))
        except Diverged as e: said = str(e).replace(str(folder), 'RUN')
        found = dict(name=name, settings=settings, said=said, log=log_rows(folder/'log.jsonl')[0])
        if said: return found, None
        student = open_student(folder/'generator')
        draw = lambda prompts, seeds: student(prompts, seeds, 1)
        with torch.no_grad(): pictures = [draw(SHOWN, [seed]*len(SHOWN)) for seed in (0, 1)]
        return found | measured(draw, scorer), torch.cat(pictures)


def runs(out: Path):
    "All faults"
    scorer, rows, sheets = TinyClip(), [], {}
    for name, settings in FAULTS.items():
        row, pictures = broken_run(name, settings, scorer)
        rows.append(row)
        if pictures is not None: sheets[name] = pictures
        print({k: v for k, v in row.items() if k != 'log'}, flush=True)
    atomic_write(out/'failures.json', json.dumps(dict(machine=machine(), shown=SHOWN, runs=rows)) + '\n')
    save_grid(sheets, out/'failures_runs.png', f'the same five prompts from two seeds, {BASE["max_train_images"]} images seen')


def caption_errors(features, real) -> list[float]:
    "Squared distance of the mean features of each caption from those of real pictures; noise of the means taken off"
    noise = lambda f: f.var(0).sum(-1)/len(f)
    found = (features.mean(0) - real.mean(0)).square().sum(-1) - noise(features) - noise(real)
    return [round(v, 3) for v in found.tolist()]


def fd_to_real(features) -> float:
    "tiny-FD of whole passes"
    flat, real = features.double().flatten(0, 1), load_captions()
    return frechet_distance(flat.mean(0), flat.T.cov(), real.mu, real.sigma)


def anatomy(student, real, teacher, unguided) -> dict:
    "What the student's distance is made of: features [K, captions, D] of the four"
    own, mean = student - student.mean(0), lambda f: f.mean((0, 1))
    line = mean(teacher) - mean(unguided)       # where guidance moves the mean of everything
    along = lambda f: ((mean(f) - mean(unguided))@line/(line@line)).item()
    noise = lambda f: f.var(0).sum(-1).mean()/len(f)
    apart = (student.mean(0) - teacher.mean(0)).square().sum(-1).mean() - noise(student) - noise(teacher)
    found = dict(
        tiny_fd=fd_to_real(student), tiny_fd_with_real_means=fd_to_real(own + real.mean(0)),
        shift=(mean(student).double() - load_captions().mu).square().sum().item(), to_teacher=apart.item(),
        along_guidance=dict(student=along(student), real=along(real)))
    return json.loads(json.dumps(found), parse_float=lambda v: round(float(v), 4))


def features_of(generator: Path) -> torch.Tensor:  # [4, captions, D]
    "Of a student's pictures, drawn anew"
    student = open_student(generator)
    with torch.no_grad(): return draw_passes(lambda p, s: student(p, s, 1), TinyClip(), trained_captions(), 4)[0]


def prompts(work: Path, out: Path, earlier: Path):
    "The shipped student and the teacher, caption by caption; of an earlier run only what its distance is made of"
    kept = lambda name, n: torch.stack([load_file(work/f'{name}-trained-{p:02}.safetensors')['features'] for p in range(n)])
    features = features_of(shipped_student()/'generator')
    real = kept('reference', 24)
    teacher, unguided = (kept(f'teacher-{k}', 4) for k in ('1.5', '1'))
    errors = dict(student=caption_errors(features, real), teacher=caption_errors(teacher, real))
    made_of = dict(
        anatomy=anatomy(features, real, teacher, unguided),
        earlier=anatomy(features_of(earlier/'generator'), real, teacher, unguided))
    text = json.dumps(dict(machine=machine(), passes=4) | made_of | dict(errors=errors))
    atomic_write(out/'failures_prompts.json', text + '\n')


def main(
    part: Literal['runs', 'prompts'],           # which
    work: Path = Path(),                        # kept passes of `tiny_rows.py`, for `prompts`
    earlier: Path = Path(),                     # a finished run with guidance at all times, for `prompts`
    out: Path = IMAGES,                         # where to write
):
    "Break runs, or look for worst prompts"
    torch.set_num_threads(1)
    runs(out) if part == 'runs' else prompts(work, out, earlier)


if __name__ == '__main__': tyro.cli(main, description=__doc__)
