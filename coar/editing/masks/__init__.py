"""Hypernetwork masks: learn which components to edit, then tune only those.

May import: everything in `editing` below it, not `registry.py`. Start reading in `editor.py`.
"""

from coar.editing.masks.artefact import load_hypernetwork as load_hypernetwork
from coar.editing.masks.artefact import save_hypernetwork as save_hypernetwork
from coar.editing.masks.binarise import binarise as binarise
from coar.editing.masks.controls import RandomMask as RandomMask
from coar.editing.masks.editor import HypernetworkMask as HypernetworkMask
from coar.editing.masks.editor import MeanMask as MeanMask
from coar.editing.masks.meta_training import train_hypernetwork as train_hypernetwork
from coar.editing.masks.network import MaskHypernetwork as MaskHypernetwork
from coar.editing.masks.settings import MetaSettings as MetaSettings
from coar.editing.masks.sweep import density_sweep as density_sweep
