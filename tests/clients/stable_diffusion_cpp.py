"""A student of Stable Diffusion 1.5's size, with random weights, drawn by stable-diffusion.cpp.

Does the program take every tensor of the single file and of the LoRA?

    python tests/clients/stable_diffusion_cpp.py FOLDER [--python PYTHON]

Not part of CI: the first call builds the program from its package `stable-diffusion-cpp-python` in FOLDER/venv
(about ten minutes on two cores; PYTHON is an interpreter that has it already) and needs 10 GB of memory. What was
taken and dropped is written to FOLDER/stable_diffusion_cpp.json."""

import argparse, json, os, platform, re, subprocess, sys, venv
from datetime import date
from pathlib import Path
import torch
from sid_lsg_nb.commands.bench import random_teacher
from sid_lsg_nb.export.formats import save_single_file, write_safetensors
from sid_lsg_nb.export.lora import kohya_names
from sid_lsg_nb.teachers.student import save_student

VERSION, RANK, T_INIT = '0.4.7', 4, 625
DRAW = """
import json, sys
from stable_diffusion_cpp import StableDiffusion
model, folder, prompt, out = sys.argv[1:]
sd = StableDiffusion(model_path=model, lora_model_dir=folder, verbose=True)
settings = dict(width=64, height=64, seed=1, cfg_scale=1.0, sample_method='euler', sigmas='2.5017,0.0')
picture, = sd.generate_image(prompt=prompt, **settings)
picture.save(out)
"""

def build(folder: Path) -> Path:  # its interpreter
    "The program in an environment of its own"
    venv.create(folder / 'venv', with_pip=True)
    python, env = folder / 'venv/bin/python', dict(os.environ, CMAKE_BUILD_PARALLEL_LEVEL='2')
    for packages in (
        ['scikit-build-core', 'cmake', 'ninja', 'numpy', 'pillow', 'typing-extensions'],
        ['--no-build-isolation', f'stable-diffusion-cpp-python=={VERSION}'],
    ):
        subprocess.run([python, '-m', 'pip', 'install', '-q', *packages], env=env, check=True)
    return python

def make(folder: Path) -> dict:  # counts of tensors
    "NAME.safetensors and a random LoRA of every layer, as the exports write them"
    torch.manual_seed(0)
    teacher = random_teacher('random-sd15', 'cpu')
    unet = teacher.denoiser.net
    state = {}
    for name, m in unet.named_modules():
        if not isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        out, inner, *kernel = m.weight.shape
        state[f'{name}.lora_A.weight'] = torch.randn(RANK, inner, *kernel, dtype=torch.float16) / 100
        state[f'{name}.lora_B.weight'] = torch.randn(out, RANK, *[1] * len(kernel), dtype=torch.float16) / 100
    (folder / 'lora').mkdir(exist_ok=True)
    write_safetensors(kohya_names(state), folder / 'lora/student.safetensors')
    save_student(teacher, teacher.denoiser, folder / 'student', T_INIT)
    save_single_file(folder / 'student', folder / 'student.safetensors', torch.float16)
    return dict(lora_layers=len(state) // 2, lora_tensors=len(kohya_names(state)))

def draw(python, folder: Path, prompt: str, out: str) -> str:  # what the program said
    "One picture in one step"
    args = [python, '-c', DRAW, folder / 'student.safetensors', folder / 'lora', prompt, folder / out]
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (folder / f'{out}.txt').write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f'{out} was not drawn; the end of what was said:\n{(done.stdout + done.stderr)[-3000:]}')
    return done.stdout + done.stderr

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path)
    parser.add_argument('--python', type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    python, made = args.python or build(args.folder), make(args.folder)
    plain, changed = (
        draw(python, args.folder, 'a cat', 'plain.png'),
        draw(python, args.folder, '<lora:student:1> a cat', 'lora.png'),
    )
    applied = re.findall(r'\((\d+) */ *(\d+)\) LoRA tensors', changed)
    report = dict(
        program=f'stable-diffusion-cpp-python {VERSION}',
        call="sigmas='2.5017,0.0', cfg_scale=1.0, sample_method='euler'",
        **made,
        lora_applied=[[int(a), int(b)] for a, b in applied],
        unused=sorted(
            {
                l.strip()
                for l in (plain + changed).splitlines()
                if re.search(r'unused|unknown tensor|not in model|missing', l)
            }
        ),
        pictures_differ=(args.folder / 'plain.png').read_bytes() != (args.folder / 'lora.png').read_bytes(),
        machine=f'{platform.system()} {platform.machine()}',
        date=f'{date.today()}',
    )
    (args.folder / 'stable_diffusion_cpp.json').write_text(json.dumps(report, indent=1) + '\n')
    print(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
