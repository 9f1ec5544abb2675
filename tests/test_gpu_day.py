"The day with one GPU, rehearsed: every part of the script runs to its end on a CPU, so that it cannot rot."

import importlib.util, json, subprocess, sys
from pathlib import Path
import pytest
from forks import Forked, clean_env, finish

HERE = Path(__file__).resolve().parent.parent / 'benchmarks'

def script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f'{name}.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m

SMALL = '--device cpu --tiny --pieces 7 --out day --folder data'.split()
FORKED = 'right', 'fast', 'many', 'whole', 'real'  # the day itself starts a process for each part

def test_every_part_runs(tmp_path):
    words = [sys.executable, HERE / 'gpu_day.py', *SMALL, '--minutes', '14', '--only', 'where', 'small']
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-2000:])
    for part in FORKED:
        script_and_words = [str(HERE / 'gpu_day.py'), part, *SMALL, '--seconds', '600']
        code = f'import runpy, sys; sys.argv = {script_and_words}; runpy.run_path(sys.argv[0], run_name="__main__")'
        env = clean_env(PYTHONPATH=str(HERE.parent))
        for status, out, err in finish([Forked(['-c', code], tmp_path, env)], 900):
            assert status == 0, (out[-4000:], err[-2000:])
    found = {f.stem: json.loads(f.read_text()) for f in (tmp_path / 'day').glob('*.json')}
    assert {k: v['status'] for k, v in found.items()} == dict.fromkeys(script('gpu_day').PARTS, 'done'), found
    assert (
        found['right']['resumed_bit_equal']
        and found['right']['losses_ok']
        and found['right']['waits_fp32'] == 'none'
    )
    assert all(found['many'][k]['ok'] for k in ('copies', 'slices', 'copies, fp16', 'slices, fp16'))
    assert not found['real']['stayed_behind']
    assert {r['who'] for r in found['real']['rows']} == {'test', 'teacher', 'sid', 'sim'} and found['whole'][
        'images'
    ] == 16

def test_a_rehearsal_stays_out_of_the_tables(tmp_path):
    (tmp_path / 'where.json').write_text(json.dumps(dict(part='where', status='done', rehearsal=True)))
    with pytest.raises(SystemExit, match='rehearsal'):
        script('run').take(tmp_path, tmp_path)

def test_a_measured_day_goes_into_the_tables(tmp_path):
    run, day, to = script('run'), tmp_path / 'day', tmp_path / 'to'
    day.mkdir()
    to.mkdir()
    (to / 'cifar10.json').write_text('[]')
    write = lambda part, **found: (day / f'{part}.json').write_text(
        json.dumps(dict(part=part, status='done') | found)
    )
    write('where', rehearsal=False, card='Some Card', driver='1', date='2026-01-01', versions=dict(torch='2'))
    write(
        'fast',
        rows={'gpu-fp32-4': dict(ratio=1.02, img_per_s=3.0), 'gpu-fp32-8': dict(failed='does not fit')},
    )
    write('right', killed_failed='trace')
    run.take(day, to)
    text = '\n'.join(run.day_section(to / 'day.json'))
    assert (
        json.loads((to / 'gpu-fp32-4.json').read_text())['img_per_s'] == 3.0
        and not (to / 'gpu-fp32-8.json').exists()
    )
    assert 'Some Card' in text and '**killed failed**' in text and 'not run' not in text
    assert '| fast | not run |' in '\n'.join(run.day_section(tmp_path / 'none.json'))

def test_the_readme_says_what_was_measured(tmp_path):
    run, files = script('run'), [tmp_path / name for name in ('nbs/index.ipynb', 'README.md')]
    (tmp_path / 'nbs').mkdir()
    for file in files:
        file.write_text(
            (HERE.parent / file.relative_to(tmp_path)).read_text(encoding='utf-8'), encoding='utf-8'
        )
    before = [f.read_text(encoding='utf-8') for f in files]
    run.write_words(json.loads((HERE.parent / 'sid_lsg_nb/embedded/speeds.json').read_text()), tmp_path)
    assert before == [
        f.read_text(encoding='utf-8') for f in files
    ]  # what stands there is of the stored speeds
    row = lambda card, speed: dict(
        card=card,
        date='2026-01-01',
        img_per_s=speed,
        settings=dict(teacher='random-sd15', mixed_precision='bf16', weight_dtype='fp32', micro_batch=4),
    )
    run.write_words([row('Some "Card"', 12.34), row('Some "Card"', 9.0), row('Other', 2.0)], tmp_path)
    prose = '\n'.join(''.join(c['source']) for c in json.loads(files[0].read_text(encoding='utf-8'))['cells'])
    for text in (prose, files[1].read_text(encoding='utf-8')):
        assert 'Some "Card": 12.3 images/s' in text and 'Other: 2 images/s' in text and 'No GPU' not in text
    run.write_words([], tmp_path)
    assert before == [f.read_text(encoding='utf-8') for f in files]
    files[1].write_text('no marks')
    with pytest.raises(ValueError, match='marks of speeds'):
        run.write_words([], tmp_path)

def test_a_state_comes_back_whole(tmp_path, monkeypatch):
    day, root, out, back = script('gpu_day'), tmp_path / 'root', tmp_path / 'out', tmp_path / 'back'
    monkeypatch.setattr(day, 'PIECE', 5_000)
    out.mkdir()
    for who in ('teacher', 'sid'):
        for k in ('checkpoints/000000000004', 'nets/000000000004'):
            (root / who / k).mkdir(parents=True)
            (root / who / k / 'a.bin').write_bytes(bytes(range(200)) * 30)
    assert day.pack(root, out, 99) == [] and len(list(out.glob('state-teacher-*'))) > 1
    day.unpack(out, back)
    assert {p.relative_to(back): p.read_bytes() for p in back.rglob('*.bin')} == {
        p.relative_to(root): p.read_bytes() for p in root.rglob('*.bin')
    }
    assert day.pack(root, tmp_path, 1) == ['teacher', 'sid']

def test_a_dry_run_names_the_card_and_is_silent_elsewhere(tmp_path, monkeypatch, capsys):
    from dataclasses import asdict, replace
    from sid_lsg_nb.commands.bench import Bench
    from sid_lsg_nb.training.config import resolve
    from sid_lsg_nb.training.dry_run import estimate_time, dry_run
    from sid_lsg_nb.training.presets import PRESETS

    config = resolve(replace(PRESETS['sd15-lsg-1.5'], max_train_images=360_000))
    (tmp_path / 'gpu-fp32-4.json').write_text(
        json.dumps(
            dict(
                machine=dict(device='Some Card', date='2026-01-01'),
                img_per_s=50.0,
                settings=asdict(Bench('random-sd15', micro_batch=4)),
            )
        )
    )
    rows = script('run').speeds(tmp_path)
    assert 'about 2 hours' in estimate_time(
        config, 'Some Card', rows
    ) and 'one Some Card (50 images/s, measured 2026-01-01)' in estimate_time(config, 'Some Card', rows)
    for other in (
        dict(mixed_precision='bf16'),
        dict(micro_batch=2),
        dict(kappa=1.0),
        dict(lora='both'),
        dict(teacher='embedded'),
    ):
        assert estimate_time(replace(config, **other), 'Some Card', rows) == '', other
    assert estimate_time(config, 'Another Card', rows) == estimate_time(config, 'Some Card', []) == ''
    dry_run(PRESETS['embedded'])
    assert 'time:' not in capsys.readouterr().out
