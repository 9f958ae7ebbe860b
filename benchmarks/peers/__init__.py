"""The tokenizers that this one is measured against: architectures at their published sizes, random weights.

They are written from their descriptions, to be timed and counted, not to be trained: what a weight's value cannot
change is here (every matrix product and attention of inference), losses and initialisation are not.
"""

from .adaptok import AdapTok, AdapTokScorer
from .larp import Larp, PeerSizes

__all__ = ["AdapTok", "AdapTokScorer", "Larp", "PeerSizes"]
