"""What a page of ours consists of, by its HTML."""

from html.parser import HTMLParser

VOID = {"meta", "img", "line", "circle", "polyline", "br", "input"}


class Checker(HTMLParser):
    """Collects tags and the text of a page, and complains about unbalanced ones."""

    def __init__(self, page):
        super().__init__()
        self.open, self.images, self.links, self.text, self.cards = [], [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "data")]
        if tag == "img":
            self.images.append(attributes)
        if tag == "article":
            self.cards.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
