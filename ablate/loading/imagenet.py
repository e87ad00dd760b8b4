"""ImageNet's classes by WordNet id, name or index, by the tables that timm and torchvision ship."""

from __future__ import annotations

import re
from functools import lru_cache

from ablate.errors import DataError, UnknownNameError
from ablate.loading.packages import require

CLASSES = 1000  # of ImageNet-1k; timm knows larger sets by their numbers of classes


class ImageNetClasses:
    """One of ImageNet's lists of classes.

    Attributes:
      wordnet: The WordNet id of each class, in the order of the model's outputs.
      names: Its name, in the same order; of ImageNet-1k two are there twice, "crane" and "maillot".
    """

    def __init__(self, subset: str) -> None:
        info = require("timm").data.ImageNetInfo(subset)
        self.wordnet: list[str] = list(info.label_names())
        lemmas = [info.index_to_description(i) for i in range(len(self.wordnet))]
        self.names = lemmas
        if len(self.wordnet) == CLASSES:  # torchvision's are as they are printed under pictures
            self.names = list(require("torchvision").models._meta._IMAGENET_CATEGORIES)
        self._known: dict[str, set[int]] = {}
        for i, (id_, name, lemma) in enumerate(zip(self.wordnet, self.names, lemmas, strict=True)):
            for text in (id_, name, lemma, *lemma.split(",")):
                self._known.setdefault(_folded(text), set()).add(i)

    def __len__(self) -> int:
        return len(self.wordnet)

    def index(self, folder: str) -> int:
        """Returns the class of a folder by its name: a WordNet id, a class index, or a name of one class alone.

        Raises:
          DataError: The name is that of several classes, or the index is none.
          UnknownNameError: No class has this name; offers the nearest.
        """
        if folder.isascii() and folder.isdigit():
            if int(folder) >= len(self):
                raise DataError(f"Folder {folder!r} is no index of ImageNet's {len(self):,} classes.")
            return int(folder)
        found = sorted(self._known.get(_folded(folder), ()))
        if not found:
            raise UnknownNameError("class of ImageNet", folder, self._known, "Or give classes as a list or a file.")
        if len(found) > 1:
            which = " or ".join(f"class {i} ({self.wordnet[i]}, {self.names[i]})" for i in found)
            raise DataError(f"Folder {folder!r} may be {which} of ImageNet. Rename it to the WordNet id of one.")
        return found[0]

    def knows(self, folder: str) -> bool:
        """Returns whether `index` would give a class."""
        digits = folder.isascii() and folder.isdigit()
        return int(folder) < len(self) if digits else len(self._known.get(_folded(folder), ())) == 1


@lru_cache(maxsize=2)
def imagenet_classes(classes: int | None) -> ImageNetClasses | None:
    """Returns the list with so many classes (None: ImageNet-1k), or None if ImageNet has none of that length."""
    subset = require("timm").data.infer_imagenet_subset({"num_classes": CLASSES if classes is None else classes})
    return None if subset is None else ImageNetClasses(subset)


def _folded(text: str) -> str:
    return re.sub(r"[\s_\-]+", " ", text).strip().lower()
