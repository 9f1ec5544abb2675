"Numbers that a user sees bear the name of what they are"

import re
from pathlib import Path
import pytest
from sid_lsg_nb.core import DISAGREEMENT

LIBRARY = sorted((Path(__file__).parent.parent / 'sid_lsg_nb').rglob('*.py'))

@pytest.mark.parametrize('module', LIBRARY, ids=lambda p: p.stem)
def test_the_disagreement_is_called_no_distance(module):
    """`fisher` is no gap to the teacher and not what to look at first: it starts near 0, because the fake starts
    as the teacher"""
    assert not re.search(r'gap to the teacher|look here|number to watch', module.read_text(encoding='utf-8'))

def test_the_page_of_compare_names_it():
    from sid_lsg_nb.commands.compare import CURVES, draw_curves
    from sid_lsg_nb.commands.sources import ImageSource

    assert CURVES['fisher'] == f'{DISAGREEMENT}, fisher'
    (drawn,) = draw_curves(
        [ImageSource('student', '', 'x', log=[dict(nimg=10 * i, fisher=float(i)) for i in (1, 2, 3)])]
    )
    assert DISAGREEMENT in drawn

def test_the_bar_of_the_trainer_names_it(tmp_path, monkeypatch):
    from sid_lsg_nb.training import trainer
    from sid_lsg_nb.training.config import Config

    seen = []

    class Bar(trainer.tqdm):
        def set_postfix(self, *args, **kw):
            seen.append(args[0])
            super().set_postfix(*args, **kw)

    monkeypatch.setattr(trainer, 'tqdm', Bar)
    sizes = dict(
        max_train_images=8,
        total_batch_size=4,
        log_every=4,
        sample_every=8,
        checkpoint_every=8,
        n_eval=0,
        teacher_steps=2,
    )
    trainer.train(Config(out=str(tmp_path / 'run'), device='cpu', **sizes))
    assert seen and all(list(row)[:3] == ['loss', DISAGREEMENT, 'norm'] for row in seen)
