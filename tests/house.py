"""The rules of this repository. Each check takes the root of a tree and returns its complaints, one line each; none
runs or imports what it reads.

`test_house.py` holds this repository to them and shows that each can fail."""

import ast, io, json, re, shlex, sys, tokenize
from collections import Counter
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import packages_distributions

LIB, MAX_LINES, MAX_KB, MAX_EMBEDDED_MB, MAX_WIDTH, MAX_WIDE = 'sid_lsg_nb', 40, 600, 16, 120, 0.01
NUMBER, DEFAULT_EXP = re.compile(r'(\d+)_'), re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)
MACHINE_PATH = re.compile(r'(?<![\w.])/(?:home|root|Users|work|mnt)/\S{1,40}')
TEXT = set('.py .md .qmd .ipynb .ini .yml .yaml .toml .txt .cfg .cff .in .css .json .sh .svg'.split())
EMBEDDED = [
    'NOTICE',
    'prompts.txt',
    'world.json',
    'reference.safetensors',
    'real-trained.safetensors',
    'real-held-out.safetensors',
    'rows.json',
    'rows.safetensors',
    'scorer/open_clip_model.safetensors',
    'teacher/model_index.json',
    'teacher/text_encoder/model.safetensors',
    'teacher/tokenizer/merges.txt',
    *(f'teacher/{part}/diffusion_pytorch_model.safetensors' for part in ('unet', 'vae')),
]

# ---- the folders, in the order in which they may import: each from those above it

@dataclass(frozen=True)
class Floor:
    "A folder of notebooks and the package that they make"

    folder: str  # in nbs/; '' is nbs/ itself
    package: str | None  # in the library; None: its notebooks export nothing
    title: str
    holds: str  # one line for the map, the side bar and CONTRIBUTING.md
    single: tuple = ()  # modules of its notebooks that lie beside the packages

FLOORS = (
    Floor(
        '',
        None,
        'Foundations',
        'devices, seeds, noise, errors, whole files; pickles read without running them; '
        'tiny random models for tests',
        ('core', 'checkpoint_reader', 'testing'),
    ),
    Floor(
        '1_method',
        'method',
        'Method',
        'noise levels, score identities, guidance, one step and few steps, '
        'losses, the training steps, the discriminator',
    ),
    Floor(
        '2_teachers',
        'teachers',
        'Teachers',
        'pretrained models, one file per family; students opened and saved',
    ),
    Floor('3_data', 'data', 'Data', 'prompts, folders of images, real images for training'),
    Floor(
        '4_metrics',
        'metrics',
        'Metrics',
        'FID, KID, precision and recall, CLIP score, the protocols of papers',
    ),
    Floor(
        '5_export',
        'export',
        'Export',
        'single files, LoRA, ONNX, the model card; official checkpoints read in',
    ),
    Floor(
        '6_training',
        'training',
        'Training',
        'settings, memory, processes, checkpoints, log, alarm, pictures, trainer',
    ),
    Floor(
        '7_commands',
        'commands',
        'Commands',
        'the command line, and commands with a chapter of their own',
        ('cli',),
    ),
    Floor('8_stories', None, 'Stories', 'whole runs to read from end to end; they export nothing'),
)
ROOMS = {f.folder: i for i, f in enumerate(FLOORS)}
PACKAGES = {f.package: i for i, f in enumerate(FLOORS) if f.package}
FOR_TESTS = 'testing'  # product code never imports it

# ---- reading a tree

def all_notebooks(root):
    "Every notebook in nbs/, drafts too"
    return sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def is_draft(root, nb):
    return any(part[0] in '._' for part in nb.relative_to(root / 'nbs').parts)

def notebooks(root):
    "Notebooks that nbdev sees: not hidden, not drafts"
    return [p for p in all_notebooks(root) if not is_draft(root, p)]

def folder_of(root, nb):
    return '' if nb.parent == root / 'nbs' else nb.parent.relative_to(root / 'nbs').as_posix()

def in_order(root):
    "`(floor, its notebooks)` for every floor that has some; the index and folders of no floor left out"
    books = [p for p in notebooks(root) if NUMBER.match(p.name)]
    found = [(f, [p for p in books if folder_of(root, p) == f.folder]) for f in FLOORS]
    return [(f, sorted(ps, key=number)) for f, ps in found if ps]

def number(nb):
    return int(m[1]) if (m := NUMBER.match(nb.name)) else None

def base(nb):
    return NUMBER.sub('', nb.stem, count=1)

def modules(root):
    return sorted(p for p in (root / LIB).rglob('*.py') if not p.name.startswith('_modidx'))

def dotted(root, file):
    "Name of a module below the library; that of a package for its `__init__`, '' for the library's own"
    parts = file.relative_to(root / LIB).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)

def module_file(root, module):
    return root / LIB / f'{module.replace(".", "/")}.py'

def scripts(root):
    "Python that is not exported: tests, recipes, benchmarks"
    found = (p for d in ('tests', 'nbs', 'benchmarks') for p in (root / d).rglob('*.py'))
    return sorted(p for p in found if '.ipynb_checkpoints' not in p.parts)

def cells(nb):
    "Sources of a notebook's code cells"
    found = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in found if c['cell_type'] == 'code']

def made_by(nb):
    return DEFAULT_EXP.findall('\n'.join(cells(nb)))

def parse(file):
    return ast.parse(file.read_text(encoding='utf-8'))

def parse_cell(code):
    "Syntax tree of a cell, its magics left out"
    if code.lstrip().startswith('%%'):
        return ast.parse('')
    return ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', code, flags=re.M))

def trees(root):
    "`(place, syntax tree)` of every module, script and notebook cell"
    for f in [*modules(root), *scripts(root)]:
        yield f.relative_to(root), parse(f)
    for nb in notebooks(root):
        for code in cells(nb):
            yield nb.relative_to(root), parse_cell(code)

# ---- notebooks

def odd_notebooks(root, at_least=15):
    "Too few notebooks, one that nbdev leaves out, or a mark that makes nbdev_test pass without running them"
    nbs = all_notebooks(root)
    few = [f'nbs: {len(nbs)} notebooks, {at_least} or more expected'] if len(nbs) < at_least else []
    left = [f'{p.relative_to(root)}: nbdev_test leaves this out' for p in nbs if is_draft(root, p)]
    marks = [
        f'{p.relative_to(root)}: nbdev_test skips this folder and says nothing'
        for p in sorted((root / 'nbs').rglob('.notest'))
    ]
    return few + left + marks + [c for nb in nbs for c in bad_notebook(root, nb)]

def bad_notebook(root, nb):
    "Not JSON, too heavy, or with a saved error"
    name, kb = nb.relative_to(root), nb.stat().st_size / 1024
    try:
        doc = json.loads(nb.read_text(encoding='utf-8'))
    except ValueError as e:
        return [f'{name}: not valid JSON ({e})']
    heavy = [f'{name}: {kb:.0f} kB, at most {MAX_KB}'] if kb > MAX_KB else []
    outputs = [o for c in doc['cells'] for o in c.get('outputs', [])]
    return heavy + [
        f'{name}: saved error output {o.get("ename")}' for o in outputs if o['output_type'] == 'error'
    ]

# ---- where notebooks and modules lie

ABLE = re.compile(r'After this (chapter|page|story)|you (can|will)')

def unframed(root):
    "Chapters that do not say at their beginning what the reader will be able to do, or do not end with three questions"
    said = []
    for nb in notebooks(root):
        texts = [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
                 if c['cell_type'] == 'markdown']
        if number(nb) is None or not texts: continue
        if not ABLE.search('\n'.join(texts[:2])): said.append(f'{nb.relative_to(root)}: say what one can do after it')
        folded = '\n'.join(texts).count('<details>')
        if folded < 3: said.append(f'{nb.relative_to(root)}: {folded} folded answers at its end, there should be 3')
    return said

def twice(kind, names):
    "A complaint for each name that comes more than once"
    return [f'{kind} {n}: {k} of this name' for n, k in sorted(Counter(names).items()) if k > 1]

def misplaced(root, nb):
    "A notebook in no floor's folder, without a number, or that makes a module of another floor or name"
    place, folder = nb.relative_to(root), folder_of(root, nb)
    if nb == root / 'nbs' / 'index.ipynb':
        return []
    if folder not in ROOMS:
        return [f'{place}: no folder of the table of floors']
    if number(nb) is None:
        return [f'{place}: no number']
    floor = FLOORS[ROOMS[folder]]
    own = {*floor.single, *([f'{floor.package}.{base(nb)}'] if floor.package else [])}
    strange = [f'{place}: makes {m}, which is not of this folder' for m in made_by(nb) if m not in own]
    return strange + [
        f'{place}: makes {m}, another name'
        for m in made_by(nb)
        if m in own and m.rpartition('.')[2] != base(nb)
    ]

def places(root):
    "Each notebook on its floor, each number once in its folder, each base name once in the library"
    nbs, mods = notebooks(root), [p for p in modules(root) if p.stem != '__init__']
    numbers = Counter((folder_of(root, p), number(p)) for p in nbs if number(p) is not None)
    used = [
        f'nbs/{folder}: number {n:02d} is used {k} times'
        for (folder, n), k in sorted(numbers.items())
        if k > 1
    ]
    names = twice('notebooks', map(base, nbs)) + twice('modules', (p.stem for p in mods))
    return [c for nb in nbs for c in misplaced(root, nb)] + used + names

# ---- the ladder

def ranks(root):
    "Module -> (floor, number of the notebook that makes it)"
    found = {}
    for nb in notebooks(root):
        if place := rank(root, nb):
            for m in made_by(nb):
                found.setdefault(m, place)
    return found

def rank(root, nb):
    "(floor, number) of a notebook; None for one without a number, such as the index"
    return None if number(nb) is None else (ROOMS.get(folder_of(root, nb), len(FLOORS)), number(nb))

def absolute(node, home):
    "Dotted name below the library that a `from` import in package `home` starts from; None: not ours"
    if node.level:
        above = home.split('.') if home else []
        above = above[: len(above) - node.level + 1]
        return '.'.join([*above, *([node.module] if node.module else [])])
    head, _, rest = (node.module or '').partition('.')
    return rest if head == LIB else None

def imports(tree, home, known):
    "Names below the library that a syntax tree imports; for what lies in a module of `known`, that module"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name.partition('.')[2] for a in n.names if a.name.startswith(LIB + '.'))
        elif isinstance(n, ast.ImportFrom) and (start := absolute(n, home)) is not None:
            if start in known:
                yield start
            else:
                yield from (f'{start}.{a.name}'.strip('.') for a in n.names)

def place_of(name, ranks):
    "(floor, number) of an imported module; of a package, below all its modules; None: neither"
    return ranks.get(name) or ((PACKAGES[name], float('inf')) if name in PACKAGES else None)

def climbs(place, tree, home, me, own, ranks):
    "Imports of modules that are not above `me`, a (floor, number)"
    found = {m: place_of(m, ranks) for m in imports(tree, home, ranks) if m not in own}
    return [
        f'{place}: imports {m} ({said(there)}), not above {said(me)}'
        for m, there in sorted(found.items())
        if there and there >= me
    ]

def said(place):
    "A (floor, number) as a reader finds it"
    folder = FLOORS[place[0]].folder if place[0] < len(FLOORS) else '?'
    return f'{folder or "nbs"}/' + ('*' if place[1] == float('inf') else f'{place[1]:02d}')

def module_climbs(root, module, ranks):
    "What one exported module imports and must not"
    f = module_file(root, module)
    place = f.relative_to(root)
    if not f.exists():
        return [f'{place}: missing, run nbdev_export']
    tree, home = parse(f), home_of(f, root)
    borrowed = FOR_TESTS in set(imports(tree, home, ranks)) and module != FOR_TESTS
    return climbs(place, tree, home, ranks[module], [module], ranks) + (
        [f'{place}: imports {FOR_TESTS}, which is for test cells'] if borrowed else []
    )

def ladder(root):
    "Modules and cells import only from floors above theirs, and on their own floor from lower numbers"
    known = ranks(root)
    out = [c for m in known for c in module_climbs(root, m, known)]
    for nb in notebooks(root):
        if me := rank(root, nb):
            home, own = home_of(nb, root), made_by(nb)
            for code in cells(nb):
                out += climbs(nb.relative_to(root), parse_cell(code), home, me, own, known)
    return list(dict.fromkeys(out))

def floor_imports(root):
    "{(floor, floor above): how many imports of modules}, from the exported modules"
    known, found = ranks(root), Counter()
    for m in known:
        if (f := module_file(root, m)).exists():
            for other in set(imports(parse(f), home_of(f, root), known)):
                if (there := place_of(other, known)) and there[0] != known[m][0]:
                    found[known[m][0], there[0]] += 1
    return found

def home_of(file, root):
    "Package that a relative import in a module or a cell starts from"
    if root / LIB in file.parents:
        return '.'.join(file.relative_to(root / LIB).parts[:-1])
    floor = ROOMS.get(folder_of(root, file)) if root / 'nbs' in file.parents else None
    return (FLOORS[floor].package or '') if floor is not None else ''

def given_lazily(root):
    "Words of the library's `__init__`, which may hand out names of its modules"
    return set(re.findall(r'\w+', (root / LIB / '__init__.py').read_text(encoding='utf-8')))

def gone(root):
    "Imports of modules that the library does not have, also in cells and tests that are skipped"
    known = {dotted(root, p) for p in modules(root)} - {''} | {'_modidx'}
    given, out = given_lazily(root), []
    for place, tree in trees(root):
        for m in sorted(set(imports(tree, home_of(root / place, root), known))):
            allowed = m in known or (place.parts[0] != LIB and m in given) or m == '__version__'
            if not allowed:
                out.append(f'{place}: imports {m}, which the library does not have')
    return out

def strays(root):
    "Modules that no notebook makes, entries of modules that are gone, an `__init__` that imports"
    made = {*ranks(root)}
    out = [
        f'{p.relative_to(root)}: no notebook makes it'
        for p in modules(root)
        if p.stem != '__init__' and dotted(root, p) not in made
    ]
    index = root / LIB / '_modidx.py'
    entries = ast.literal_eval(parse(index).body[0].value)['syms'] if index.exists() else {}
    out += [f'{LIB}/_modidx.py: {m} is gone' for m in entries if m.partition('.')[2] not in made]
    return out + [c for p in modules(root) if p.stem == '__init__' for c in busy_init(root, p)]

def busy_init(root, file):
    "A package's `__init__` holds nothing; the library's own imports nothing when it is imported"
    place, tree = file.relative_to(root), parse(file)
    if file.parent != root / LIB:
        return [f'{place}: holds something'] if tree.body else []
    held = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [
        f'{place}: imports something'
        for top in held
        for n in ast.walk(top)
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]

# ---- code

def long_functions(root):
    "Functions over `MAX_LINES` lines in modules and scripts"
    return [
        f'{p.relative_to(root)}:{n.lineno}: {n.name} has {size} lines, at most {MAX_LINES}'
        for p in [*modules(root), *scripts(root)]
        for n in ast.walk(parse(p))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (size := n.end_lineno - n.lineno + 1) > MAX_LINES
    ]

LIST = 'config', 'presets', 'run_folder', 'dry_run'  # modules of training about the flat list of settings itself
TAKE_ALL = 'of', 'setup', 'with_t_init', 'config_on_all_ranks', 'open_run', 'train'  # these take it; all others get a part of it

def whole_settings(root):
    "Functions of training that take the whole list of settings"
    return [
        f'{p.relative_to(root)}:{n.lineno}: {n.name} takes the whole Config; give it the part that it reads'
        for p in modules(root)
        if p.parent.name == 'training' and p.stem not in LIST
        for n in ast.walk(parse(p))
        if isinstance(n, ast.FunctionDef) and n.name not in TAKE_ALL
        if any(a.arg == 'config' or a.annotation and 'Config' in ast.unparse(a.annotation) for a in arguments(n))
    ]

def arguments(function):
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs]

def semicolons(text):
    "Lines of statements behind a semicolon; one inside a string or a comment is none"
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.start[0] for t in tokens if t.type == tokenize.OP and t.string == ';']

def density(root):
    "Lines over `MAX_WIDTH` characters, at most `MAX_WIDE` of all; and statements behind semicolons, none"
    files = [p for p in [*modules(root), *scripts(root)] if (root / 'nbs') not in p.parents]
    texts = {p.relative_to(root): p.read_text(encoding='utf-8') for p in files}
    out = [
        f'{place}:{lines[0]}: {len(lines)} statements behind a semicolon'
        for place, text in texts.items()
        if (lines := semicolons(text))
    ]
    wide = {place: sum(len(l) > MAX_WIDTH for l in text.splitlines()) for place, text in texts.items()}
    lines = sum(len(text.splitlines()) for text in texts.values())
    if sum(wide.values()) <= MAX_WIDE * lines:
        return out
    share = f'{sum(wide.values())} of {lines} lines over {MAX_WIDTH} characters, at most {MAX_WIDE:.0%}'
    return out + [
        share,
        *(f'{place}: {n} of them' for place, n in sorted(wide.items(), key=lambda o: -o[1]) if n),
    ]

def is_unsafe(call):
    "Does this call unpickle what may come from elsewhere?"
    name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    unpickles = bool(re.search(r'(?:^|\.)(?:pickle|dill|joblib|cloudpickle)\.loads?$', name))
    loads = name.endswith('torch.load') and given.get('weights_only') != 'True'
    return unpickles or loads or given.get('allow_pickle') == 'True'

def unsafe_loads(root):
    "`torch.load` without `weights_only=True`, and unpickling, anywhere"
    return [
        f'{place}:{n.lineno}: {ast.unparse(n)[:60]} unpickles'
        for place, tree in trees(root)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and is_unsafe(n)
    ]

def required_imports(tree):
    "Top-level packages that a module imports, inside functions too; what a `try` asks for is optional"
    for n in ast.iter_child_nodes(tree):
        if isinstance(n, ast.Import):
            yield from (a.name.split('.')[0] for a in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level:
            yield n.module.split('.')[0]
        elif not isinstance(n, ast.Try):
            yield from required_imports(n)

def norm(name):
    return re.sub(r'[-_.]+', '-', name).lower()

def unstated(root):
    "Packages that the library imports and settings.ini does not require"
    cp = ConfigParser(delimiters=['='])
    cp.read(root / 'settings.ini', encoding='utf-8')
    stated = {norm(re.match(r'[\w.-]+', r)[0]) for r in shlex.split(cp['DEFAULT']['requirements'])}
    tops = {t for p in modules(root) for t in required_imports(parse(p))} - {LIB} - set(sys.stdlib_module_names)
    known = packages_distributions()
    return [
        f'settings.ini: {t} is imported by the library and not required'
        for t in sorted(tops)
        if not stated & {norm(d) for d in known.get(t, [t])}
    ]

# ---- files

def texts(root):
    "Text files of the repository"
    skip = set('.git _proc _docs runs build dist shared venv .venv .ci-venv __pycache__'.split())
    tops = [p for p in root.iterdir() if p.name not in skip and p.suffix != '.egg-info']
    files = (f for p in tops for f in ([p] if p.is_file() else p.rglob('*')))
    wanted = lambda f: f.suffix in TEXT or f.parent.name == '.ci'
    return sorted(f for f in files if f.is_file() and wanted(f) and not skip & set(f.relative_to(root).parts))

def machine_paths(root):
    "Paths of somebody's machine in a text file"
    found = ((p, MACHINE_PATH.search(p.read_text(encoding='utf-8', errors='ignore'))) for p in texts(root))
    return [f'{p.relative_to(root)}: names a path of a machine, {m[0]}' for p, m in found if m]

def embedded_files(root):
    "Bundled files and their sizes"
    files = (p for p in (root / LIB / 'embedded').rglob('*') if p.is_file() and p.suffix != '.pyc')
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in files}

def embedded_gaps(sizes, packed):
    "`sizes` of the bundled files against the names `packed` in a wheel or sdist"
    lacks = [f'embedded/{f}: not in the tree' for f in EMBEDDED if f'{LIB}/embedded/{f}' not in sizes]
    left = [f'{f}: not in the package' for f in sorted(sizes) if f not in packed]
    mb = sum(sizes.values()) / 1e6
    return (
        lacks + left + ([f'embedded: {mb:.1f} MB, at most {MAX_EMBEDDED_MB}'] if mb > MAX_EMBEDDED_MB else [])
    )
