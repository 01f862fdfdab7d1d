"""What the website needs of Sphinx beyond its settings: links into the repository, and alternative texts.

Both are transforms of a page's tree right after it was read, so that they see what a link or a picture is, and not
text that looks like one. What they cannot resolve is a warning, and a warning fails the build.
"""

# mypy: allow-subclassing-any, allow-untyped-calls
from __future__ import annotations

import hashlib
import posixpath
from binascii import a2b_base64
from pathlib import Path
from typing import Any, Final

import nbformat
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from scripts.repository import BLOB, ROOT, TREE
from scripts.site_source import GUIDE, LANDING, alternative_texts

LOG: Final = logging.getLogger(__name__)


class RepositoryLinks(SphinxTransform):
    """Links to files of the repository: to the page that shows the file, else to the file on GitHub.

    A page's link to its own file stays a link to GitHub: it says where the source is.
    """

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Rewrite each link of the page that leads into the repository."""
        for link in list(self.document.findall(nodes.reference)):
            uri = link.get("refuri", "")
            if uri.startswith((BLOB, TREE)):
                self._link(link, uri.removeprefix(BLOB).removeprefix(TREE))
        for link in list(self.document.findall(pending_xref)):
            if link["reftype"] == "myst" and not link["refdomain"]:
                self._link(link, self._from_root(link["reftarget"]))

    def _from_root(self, target: str) -> str:
        """A target relative to this page, from the root of the repository."""
        return posixpath.normpath(posixpath.join(posixpath.dirname(self.env.docname), target))

    def _link(self, link: nodes.Element, target: str) -> None:
        """Replace a link to `target`, a path from the root with or without an anchor."""
        path, _, anchor = target.partition("#")
        page = self.env.path2doc(str(Path(self.env.srcdir) / path))
        if page in self.env.found_docs and (page, anchor) != (self.env.docname, ""):
            new: nodes.Element = pending_xref(
                refdomain="doc", reftype="myst", reftarget=page, reftargetid=anchor or None, refdoc=self.env.docname
            )
            new["refexplicit"] = True
            new += nodes.inline("", "", *link.children, classes=["xref", "myst"])
        else:
            file = Path(self.config.repository_root) / path
            if not file.exists():
                LOG.warning("a link to %s, which is not in the repository", path, location=link)
            new = nodes.reference("", "", *link.children, refuri=(TREE if file.is_dir() else BLOB) + target)
        link.replace_self(new)


class AlternativeTexts(SphinxTransform):
    """The alternative texts of pictures in outputs, which myst-nb leaves out; a picture without one is a warning.

    myst-nb names the file of a picture by the SHA-256 of its bytes.
    """

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Give each picture its text."""
        texts = self._texts()
        for picture in self.document.findall(nodes.image):
            text = picture.get("alt") or texts.get(Path(picture["uri"]).stem)
            if not text:
                LOG.warning("a picture without an alternative text: %s", picture["uri"], location=picture)
            picture["alt"] = text or ""

    def _texts(self) -> dict[str, str]:
        path = Path(self.env.doc2path(self.env.docname))
        if path.suffix != ".ipynb":
            return {}
        pairs = alternative_texts(nbformat.read(path, as_version=4))
        return {hashlib.sha256(a2b_base64(png)).hexdigest(): text for png, text in pairs}


def _landing_is_readme(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
    """The landing page's link to its source: it has no file of its own in the repository."""
    if page == Path(LANDING).stem:
        context["theme_source_view_link"] = f"{BLOB}{GUIDE}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transforms, and where the files are to which links may lead."""
    app.add_config_value("repository_root", str(ROOT), "env")
    app.add_transform(RepositoryLinks)
    app.add_transform(AlternativeTexts)
    app.connect("html-page-context", _landing_is_readme)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
