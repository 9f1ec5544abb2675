"""The chapters that `sid-lsg notebooks` writes: nothing in them writes to the package, every file that they name lies
beside them, and they run in a plain kernel."""

import json, os, re
from pathlib import Path
import nbclient, nbformat, pytest
from sid_lsg_nb.cli import main
from sid_lsg_nb.commands.notebooks import EXPORT, SKIPPED, chapter_files
import house

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'\]\(([^)#\s]+)')
NAMED = re.compile(r"""['"]((?:\.\./)*(?:images|recipes|benchmarks|tests)/[\w./-]+)['"]""")

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp('reader')/'chapters'
    assert main(['notebooks', str(target)]) == 0
    return target

def books(folder):
    for path in sorted(folder.rglob('*.ipynb')):
        yield path, json.loads(path.read_text(encoding='utf-8'))['cells']

def source(cell): return ''.join(cell['source'])

def test_every_chapter_is_there(folder):
    wanted = {p.relative_to(ROOT/'nbs').as_posix() for p in house.notebooks(ROOT)}
    assert wanted == {p.relative_to(folder).as_posix() for p, _ in books(folder)}

def test_no_cell_writes_to_the_package(folder):
    every = [(c['cell_type'], source(c)) for _, cells in books(folder) for c in cells]
    code = [text for kind, text in every if kind == 'code']
    nbdev = re.compile(r'^(?:import|from) nbdev|^show_doc', re.M)
    assert len(code) > 1000 and not [t for t in code if any(r.search(t) for r in (EXPORT, SKIPPED, nbdev))]
    assert not [text for _, text in every if text.strip() == '## Export -']

def test_a_chapter_loses_one_heading_and_one_cell(folder):
    kept = {p.relative_to(folder).as_posix(): len(cells) for p, cells in books(folder)}
    for path in house.notebooks(ROOT):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        gone = 2 if any(EXPORT.search(source(c)) for c in cells) else 0
        assert kept[path.relative_to(ROOT/'nbs').as_posix()] == len(cells) - gone, path

def links(folder):
    "`(notebook, path)` of what a notebook links, shows, or reads"
    for path, cells in books(folder):
        for cell in cells:
            pattern = LINK if cell['cell_type'] == 'markdown' else NAMED
            yield from ((path, name) for name in pattern.findall(source(cell)) if ':' not in name)

def test_what_a_chapter_names_is_there(folder):
    found = list(links(folder))
    for kind, at_least in (('.ipynb', 50), ('images/', 5), ('benchmarks/', 1), ('tests/', 1)):
        assert sum(kind in name for _, name in found) >= at_least, kind
    inside = [(path.name, name, (path.parent/name).resolve()) for path, name in found]
    assert [n[:2] for n in inside if not (n[2].exists() and n[2].is_relative_to(folder.resolve()))] == []

def test_a_chapter_runs_in_a_plain_kernel(folder, tmp_path):
    place = folder/'7_commands'
    book = nbformat.read(place/'11_notebooks.ipynb', 4)
    env = dict(os.environ, PYTHONPATH=str(ROOT), IPYTHONDIR=str(tmp_path))
    nbclient.NotebookClient(book, timeout=100, resources=dict(metadata=dict(path=str(place)))).execute(env=env)
    ran = [c for c in book.cells if c.cell_type == 'code']
    assert len(ran) > 5 and all(c.execution_count for c in ran)

def test_names_are_those_of_the_list(folder):
    written = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
    assert {*chapter_files()} == {n for n in written if '__pycache__' not in n}
