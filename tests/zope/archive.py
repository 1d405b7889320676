"""A small Zope product, as sites have them: pages with a catalog, files as blobs, and sessions that count.

Each request is one transaction. What it writes is the same however often Zope tries it again.
"""

import transaction
from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo
from BTrees.OOBTree import OOBTree
from OFS.SimpleItem import SimpleItem
from persistent.mapping import PersistentMapping
from Products.PluginIndexes.FieldIndex.FieldIndex import FieldIndex
from Products.ZCatalog.ZCatalog import ZCatalog
from ZODB.blob import Blob


class Page(SimpleItem):
    def __init__(self, title, author, body):
        self.id, self.title, self.author, self.body = title, title, author, body


class Archive(SimpleItem):
    """The application's object, at /archive."""

    security = ClassSecurityInfo()

    def __init__(self, id):
        self.id = id
        self.pages, self.files, self.sessions = OOBTree(), OOBTree(), OOBTree()
        self.catalog = ZCatalog("catalog")
        for name in ("title", "author"):
            self.catalog._catalog.addIndex(name, FieldIndex(name))

    @security.public
    def write(self, title, author, body):
        """A page, and its entry in the catalog."""
        self.pages[title] = page = Page(title, author, body)
        self.catalog.catalog_object(page, "/archive/" + title)
        transaction.get().note("page " + title)
        return "written"

    @security.public
    def read(self, title):
        """A page."""
        page = self.pages.get(title)
        return "" if page is None else page.body

    @security.public
    def find(self, author):
        """How many pages of an author the catalog knows."""
        return str(len(self.catalog.searchResults(author=author)))

    @security.public
    def attach(self, name, text):
        """A file."""
        blob = Blob()
        with blob.open("w") as file:
            file.write(text.encode())
        self.files[name] = blob
        return "attached"

    @security.public
    def fetch(self, name):
        """A file's text."""
        blob = self.files.get(name)
        if blob is None:
            return ""
        with blob.open() as file:
            return file.read().decode()

    @security.public
    def visit(self, session, number):
        """Notes a request of a session; two at the same time conflict, and Zope tries one of them again."""
        if session not in self.sessions:
            self.sessions[session] = PersistentMapping()
        self.sessions[session][number] = True
        return str(len(self.sessions[session]))

    @security.public
    def count(self):
        """How many pages there are."""
        return "%d %d" % (len(self.pages), len(self.catalog._catalog.paths))


InitializeClass(Archive)
