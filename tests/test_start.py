"""What a command line answers before it is told to work, it answers without the big libraries: their names are
looked for among the loaded modules of a fresh Python."""

import importlib, json, os, subprocess, sys
from dataclasses import asdict
import pytest
import sid_lsg_nb
from sid_lsg_nb.training.config import Config

BIG = {
    'torch',
    'torchvision',
    'numpy',
    'scipy',
    'PIL',
    'matplotlib',
    'diffusers',
    'transformers',
    'accelerate',
    'peft',
    'safetensors',
    'datasets',
    'pyarrow',
    'huggingface_hub',
    'open_clip',
    'cleanfid',
    'tqdm',
    'gradio',
}
LATER = {  # what the trainer imports when it comes to need it: scores, drawings, files of prompts, trackers, exports
    'open_clip', 'timm', 'cleanfid', 'matplotlib', 'pyarrow.parquet', 'datasets', 'pandas',
    'tensorboard', 'wandb', 'trackio', 'onnx', 'gradio',
    'ImageReward', 'IPython'}
CALLS = """
import contextlib, io, json, sys
from sid_lsg_nb.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try: code = main(words.split())
        except SystemExit as e: code = e.code
    print(json.dumps([code, said.getvalue(), sorted({m.split('.')[0] for m in sys.modules})]))
"""
QUICK = {  # words: exit status, and what the answer says
    '--version': (0, 'sid-lsg '),
    '--help': (0, 'distill'),
    'status': (0, 'nothing logged yet'),
    'status nowhere': (2, 'no run folder'),
    'notebooks runs': (2, 'is not empty'),
    'notebooks chapters': (0, 'jupyter lab chapters'),
    **{
        f'{c} --help': (0, '--help')
        for c in 'distill sample status evaluate compare doctor lab export import bench notebooks check-data'.split()
    },
    'distill --preset sd21-lsg-2 --help': (0, 'sd21-lsg-2'),
    'distill --resume runs/embedded-1 --help': (0, '8800'),
    '': (2, ''),
    'distil': (2, 'distil'),
    'distill --kapa 2': (2, '--kapa'),
    'distill --max-train-images many': (2, 'many'),
    'distill --method dmd': (2, 'dmd'),
    'distill --preset sd99': (2, 'sd99'),
    'distill --resume nowhere': (2, 'no run folder'),
    'distill --teacher owner/name --nimgs 5': (2, '--nimgs'),
    'distill --max-train-images 3': (2, 'larger max_train_images'),
    'distill --kappa -1': (2, 'kappa'),
    'distill --real-images nowhere': (2, 'does not exist'),
    'distill --lr 0': (2, 'positive'),
    'sample': (2, ''),
    'evaluate x --n many': (2, 'many'),
    'export x --to film': (2, 'film'),
    'import x': (2, '--out'),
    'bench --lora all': (2, 'all'),
    'compare a b --n many': (2, 'many'),
}

def fresh(program, *argv, cwd):
    "Lines that a fresh Python prints, each as JSON"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-c', program, *argv],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]

@pytest.fixture
def place(tmp_path):
    "A run's folder, and a teacher's with nothing in it but its index"
    (tmp_path / 'runs/embedded-1/checkpoints').mkdir(parents=True)
    (tmp_path / 'runs/embedded-1/config.json').write_text(json.dumps(asdict(Config())))
    (tmp_path / 'sdxl').mkdir()
    (tmp_path / 'sdxl/model_index.json').write_text(json.dumps(dict(_class_name='StableDiffusionXLPipeline')))
    return tmp_path

def test_answers_come_without_the_big_libraries(place):
    for words, (code, said, loaded) in zip(QUICK, fresh(CALLS, json.dumps([*QUICK]), cwd=place), strict=True):
        assert (words, code, BIG & {*loaded}) == (words, QUICK[words][0], set())
        assert QUICK[words][1] in said, words

def test_help_for_a_teacher_on_disk_asks_its_family(place):
    ((code, said, loaded),) = fresh(CALLS, json.dumps(['distill --teacher sdxl --help']), cwd=place)
    assert code == 0 and 'sdxl-sim' in said and 'torch' in loaded

def test_a_command_that_works_loads_them(place):
    ((code, said, loaded),) = fresh(CALLS, json.dumps(['distill --dry-run']), cwd=place)
    assert code == 0 and {'torch', 'diffusers'} <= {*loaded}

def test_importing_the_package_loads_nothing(place):
    program = (
        'import json, sys; before = {*sys.modules}; import sid_lsg_nb; print(json.dumps(sorted({*sys.modules} - '
        'before)))'
    )
    assert fresh(program, cwd=place) == [['sid_lsg_nb']]

def test_the_trainer_imports_scores_and_drawings_when_it_needs_them(place):
    program = 'import json, sys; import sid_lsg_nb.training.trainer; print(json.dumps(sorted(sys.modules)))'
    (loaded,) = fresh(program, cwd=place)
    assert {'torch', 'diffusers', 'sid_lsg_nb.metrics.tiny', 'sid_lsg_nb.training.drawing'} <= {*loaded}
    assert LATER & {*loaded} == set()

@pytest.mark.parametrize('name', ['Config', 'train', 'distill', 'open_teacher', 'open_student'])
def test_the_package_hands_out_its_main_names(name):
    place = importlib.import_module(f'sid_lsg_nb.{sid_lsg_nb.PLACES[name]}')
    assert getattr(sid_lsg_nb, name) is getattr(place, name) and name in dir(sid_lsg_nb)

def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'sid_lsg_nb' has no attribute 'nothing'"):
        sid_lsg_nb.nothing
