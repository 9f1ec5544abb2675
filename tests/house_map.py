"""The map of the package: side bar, tables and picture, written from the table of floors in `house.py` and from the
imports of its modules. `offline_docs.py` has the options; `test_house.py` holds the committed files to it."""
import html, json, re
from dataclasses import dataclass
from pathlib import Path
import matplotlib.pyplot as plt
import yaml
from matplotlib.patches import FancyBboxPatch
import house

SIDEBAR, PAGE, PICTURE, GUIDE = 'nbs/sidebar.yml', 'nbs/map.qmd', 'nbs/images/map.svg', 'CONTRIBUTING.md'
START, END = '<!-- map: written by tests/offline_docs.py --house -->', '<!-- end of map -->'
ALT = 'Folders of the package, their modules, and which folder imports from which'
CAPTION = ('A folder imports only from folders above it, a chapter only from chapters of lower numbers in its own '
           'folder. To see what a folder imports from, follow its lines to a dot, and from there the arrow.')

# What one may want to change, and the chapter in which it is changed
CHANGES = (
    ('the distribution of t, for the generator and for the fake', 'schedule'),
    ('the guidance scales kappa1 to kappa4', 'guidance'),
    ('the loss of the generator, its weight, the loss of the fake', 'losses'),
    ('what happens in one iteration', 'steps'),
    ('the discriminator on real images', 'adversary'),
    ('which methods have a name; a loss or a method of your own, registered or from a file', 'methods'),
    ('what other code bases can test their losses against', 'conformance'),
    ('which families of teachers can be opened', 'registry'),
    ('how prompts are read and repeated', 'prompts'),
    ('the resizer in front of FID', 'resize'),
    ('the feature network of FID, the Inception Score', 'features'),
    ('the CLIP score', 'clip'),
    ('what is exported: single files, 16-bit weights, ONNX', 'formats'),
    ('the LoRA that is exported', 'lora'),
    ('settings and their defaults', 'config'),
    ('the published recipes (`--preset`)', 'presets'),
    ('what a checkpoint holds, how a run goes on', 'resume'),
    ('which pictures are drawn and scored during a run', 'scores'),
    ('the options of the command line', 'cli'),
)

# ---- side bar and tables

def sidebar(root):
    "Text of `nbs/sidebar.yml`: one section per folder, with its title, one line, and its chapters in order"
    pages = ['index.ipynb', Path(PAGE).name]
    for floor, nbs in house.in_order(root):
        links = [p.relative_to(root/'nbs').as_posix() for p in nbs]
        pages.append(dict(section=floor.title, contents=[dict(text=floor.holds), *links]))
    body = dict(website=dict(sidebar=dict(contents=pages)))
    return '# written by tests/offline_docs.py --sidebar\n' + yaml.safe_dump(body, sort_keys=False, width=1000)

def table(head, rows):
    "Rows of strings as a markdown table"
    lines = [head, ['---']*len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)

def folders(root):
    "Table of the folders: which package each makes, and what it holds"
    rows = []
    for floor, _ in house.in_order(root):
        packages = ([floor.package + '/'] if floor.package else []) + list(floor.single)
        made = ', '.join(f'`{p}`' for p in packages) or '–'
        rows.append([f'`nbs/{floor.folder}`', made, floor.holds])
    return table(['Chapters', f'Modules in `{house.LIB}`', 'What they hold'], rows)

def changes(root, up=''):
    "Table of what to change where; `up` leads from the text to nbs/"
    by_name = {house.base(p): p for p in house.notebooks(root)}
    if gone := [name for _, name in CHANGES if name not in by_name]:
        raise SystemExit(f'tests/house_map.py: CHANGES names chapters that are not there: {", ".join(gone)}')
    rows = []
    for what, name in CHANGES:
        page = by_name[name].relative_to(root/'nbs').as_posix()
        rows.append([what, f'[{page.removesuffix(".ipynb")}]({up}{page})'])
    return table(['To change', 'open'], rows)

def tables(root, up=''):
    "Both tables and the picture, in markdown"
    picture = f'![{ALT}]({up}{Path(PICTURE).relative_to("nbs").as_posix()})'
    return f'{folders(root)}\n\n{CAPTION}\n\n{picture}\n\n{changes(root, up)}'

def page(root):
    "Text of `nbs/map.qmd`"
    front = '---\ntitle: Map of the package\ndescription: Which folder holds what, and where to change what\n---'
    return f'{front}\n\n<!-- written by tests/offline_docs.py --house -->\n\n{tables(root)}\n'

def guide(root):
    "Text of CONTRIBUTING.md with its map renewed"
    text = (root/GUIDE).read_text(encoding='utf-8')
    block = f'{START}\n\n{tables(root, "nbs/")}\n\n{END}'
    new, n = re.subn(f'{re.escape(START)}.*?{re.escape(END)}', lambda _: block, text, flags=re.S)
    if n != 1: raise SystemExit(f'{GUIDE} needs one place between {START} and {END}')
    return new

# ---- the picture

@dataclass
class Box:
    "One folder in the picture"
    title: str
    lines: list    # of modules, as they are drawn
    top: float = 0.
    color: str = ''

    @property
    def height(self): return .55 + .3*len(self.lines)

def facts(root):
    "What the picture shows: folders with their modules, and which folder imports from which"
    made = {m: place for m, place in house.ranks(root).items() if place[0] < len(house.FLOORS)}
    shown = lambda i: [m.rpartition('.')[2] for m in sorted((m for m in made if made[m][0] == i), key=made.get)]
    boxes = [[floor.title, shown(house.ROOMS[floor.folder])] for floor, _ in house.in_order(root)]
    titles = [floor.title for floor in house.FLOORS]
    arrows = [[titles[a], titles[b]] for a, b in sorted(house.floor_imports(root)) if a < len(titles)]
    return dict(folders=boxes, imports=arrows)

def wrapped(names, width=68):
    "Names in lines of at most `width` characters"
    lines = ['']
    for name in names:
        longer = f'{lines[-1]}  ·  {name}' if lines[-1] else name
        lines[-1:] = [longer] if len(longer) <= width else [lines[-1], name]
    return lines

def laid_out(found):
    "Boxes of the picture from top to bottom"
    boxes, top = {}, 0.
    for i, (title, names) in enumerate(found['folders']):
        box = Box(title, wrapped(names or ['whole runs; they export nothing']), top, f'C{i}')
        boxes[title] = box
        top -= box.height + .3
    return boxes

def draw_box(ax, box, width=6.3):
    "A folder's box, its title and modules"
    shape = FancyBboxPatch((0, box.top - box.height), width, box.height, boxstyle='round,pad=0,rounding_size=.12')
    shape.set(facecolor=box.color, edgecolor=box.color, alpha=.2)
    ax.add_patch(shape)
    ax.text(.18, box.top - .3, box.title, weight='bold', size=11, va='center')
    for k, line in enumerate(box.lines): ax.text(.18, box.top - .62 - .3*k, line, size=9, va='center')

def stubs(boxes, arrows):
    "{(importing, imported): height at which it leaves}, spread over the right side of the importing box"
    found = {}
    for title, box in boxes.items():
        mine = [pair for pair in arrows if pair[0] == title]
        for k, pair in enumerate(mine, 1): found[pair] = box.top - box.height*(.3 + .6*k/(len(mine) + 1))
    return found

def draw_lane(ax, box, heights, start, x):
    "Everything that imports from `box`: one line each to the lane at x, and the lane's arrow into the box"
    into = box.top - .25*box.height
    for y in heights:
        ax.plot([start, x], [y, y], color=box.color, lw=1.1)
        ax.plot(x, y, 'o', color=box.color, ms=3.5)
    ax.plot([x, x], [min(heights), into], color=box.color, lw=1.6, solid_capstyle='round')
    arrow = dict(arrowstyle='-|>', color=box.color, lw=1.6, shrinkA=0, shrinkB=0)
    ax.annotate('', (start, into), (x, into), arrowprops=arrow)

def draw(found, width=6.3, gap=.3):
    "The picture of `facts`, as a figure: a box for each folder, a lane for each folder that others import from"
    boxes = laid_out(found)
    bottom = min(b.top - b.height for b in boxes.values())
    arrows = [tuple(pair) for pair in found['imports']]
    targets, heights = [t for t in boxes if any(t == b for _, b in arrows)], stubs(boxes, arrows)
    fig, ax = plt.subplots(figsize=(9, -bottom*.9 + .2))
    for box in boxes.values(): draw_box(ax, box, width)
    for k, target in enumerate(targets):
        leaving = [y for (_, b), y in heights.items() if b == target]
        draw_lane(ax, boxes[target], leaving, width, width + gap*(len(targets) - k))
    ax.set(xlim=(-.1, width + gap*(len(targets) + 1)), ylim=(bottom - .1, .1), aspect='equal')
    ax.axis('off')
    return fig

def write_picture(root, path=None):
    "The picture as SVG, with its facts inside; another path's suffix may name another format"
    path, found = path or root/PICTURE, facts(root)
    kept = dict(Date=None, Creator=None, Description=json.dumps(found)) if path.suffix == '.svg' else None
    with plt.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'map', 'font.family': 'sans-serif'}):
        fig = draw(found)
        fig.savefig(path, bbox_inches='tight', metadata=kept)
    plt.close(fig)
    if path.suffix == '.svg':        # matplotlib leaves blanks at the ends of lines
        lines = path.read_text(encoding='utf-8').splitlines()
        path.write_text(''.join(f'{line.rstrip()}\n' for line in lines), encoding='utf-8')

def drawn_facts(path):
    "The facts that a written picture was drawn from"
    text = path.read_text(encoding='utf-8')
    return json.loads(html.unescape(re.search(r'<dc:description>(.*?)</dc:description>', text, re.S)[1]))

# ---- all of it

def write_sidebar(root): (root/SIDEBAR).write_text(sidebar(root), encoding='utf-8')

def write_map(root):
    "Side bar, page, picture, and the tables of CONTRIBUTING.md"
    write_sidebar(root)
    write_picture(root)
    (root/PAGE).write_text(page(root), encoding='utf-8')
    (root/GUIDE).write_text(guide(root), encoding='utf-8')

def stale(root):
    "Committed files of the map that are not what would be written, one line each"
    same = lambda file, text: (root/file).exists() and (root/file).read_text(encoding='utf-8') == text
    old = [f for f, text in ((SIDEBAR, sidebar), (PAGE, page), (GUIDE, guide)) if not same(f, text(root))]
    if not (root/PICTURE).exists() or drawn_facts(root/PICTURE) != facts(root): old.append(PICTURE)
    return [f'{f}: not as written, run python tests/offline_docs.py --house' for f in old]
