"""What MkDocs is told beside ``mkdocs.yml``: pages from outside ``docs``, and the API
reference.

Links of the pages are those of the repository, so that they work there too; here they
become links of the site. A link to a file that the site does not have is left as it is,
and then ``mkdocs build --strict`` fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Files that pages link to, as they lie in the repository.
OUTSIDE = (
    'README.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
    'benchmarks/README.md',
    'examples/library.py',
    'examples/ppo_in_one_file.py',
    'rlhf_jax/datasets/tiny_base/README.md',
)
LINK = re.compile(r'(\]\()(?!\w+:)([^)\s#]+)(#[^)\s]*)?(\))')


def on_config(config: Any) -> Any:
    """The pages of the algorithms and of the modules, in the order of their names."""
    pages = sorted((ROOT / 'docs' / 'algorithms').glob('*.md'))
    names = ['README.md', *(p.name for p in pages if p.name != 'README.md')]
    for entry in config.nav:
        if entry.get('Algorithms') == 'algorithms':
            entry['Algorithms'] = [f'algorithms/{name}' for name in names]
    reference: dict[str, list[Any]] = {}
    for module in _modules():
        package = module.split('.')[1] if module.count('.') > 1 else 'rlhf_jax'
        reference.setdefault(package, []).append({module: f'reference/{module}.md'})
    config.nav.append({'API reference': [{k: v} for k, v in reference.items()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that do not lie in ``docs``."""
    for name in OUTSIDE:
        text = (ROOT / name).read_text(encoding='utf-8')
        if name.endswith('.py'):
            text = f'# {name}\n\n```python\n{text}```\n'
        files.append(File.generated(config, _site_path(name), content=text))
    for module in _modules():
        text = f'# {module}\n\n::: {module}\n'
        files.append(File.generated(config, f'reference/{module}.md', content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site."""
    here = page.file.src_uri
    source = {_site_path(name): name for name in OUTSIDE}.get(here, f'docs/{here}')

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if target not in OUTSIDE and not target.startswith('docs/'):
            return match[0]
        path = posixpath.relpath(_site_path(target), posixpath.dirname(here) or '.')
        return f'{match[1]}{path}{match[3] or ""}{match[4]}'

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings (``:func:`name```) as the names they stand for."""
    return re.sub(r':(?:func|meth|class|mod):(<code>)', r'\1', html)


def _site_path(name: str) -> str:
    if name == 'README.md':
        return 'index.md'
    if name.startswith('docs/'):
        return name.removeprefix('docs/')
    return f'{name}.md' if name.endswith('.py') else name


def _modules() -> list[str]:
    """Dotted names of the modules of the package."""
    paths = sorted((ROOT / 'rlhf_jax').rglob('*.py'))
    names = ('.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in paths)
    return sorted(name.removesuffix('.__init__') for name in names)
