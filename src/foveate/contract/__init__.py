"""What the engine and a method say to each other: sites and decisions, signals, the view, the size of the work."""

from foveate.contract.attention import BLOCK, AttentionRows
from foveate.contract.cache import CacheView, Evict, InCache
from foveate.contract.signals import (
    GROUPS,
    Attention,
    ClsAttention,
    Groups,
    Keys,
    Noise,
    ReceivedAttention,
    Signal,
    States,
    TowerKeys,
    content_keys,
)
from foveate.contract.sites import (
    BeforeLM,
    BeforeProcessor,
    Bypass,
    Cut,
    Decision,
    FromLayer,
    InEncoder,
    Rule,
    Site,
    ThroughLayer,
    Visibility,
    Visible,
)
from foveate.contract.view import Question, View
from foveate.contract.workload import ImageSize, Workload, products

__all__ = [
    "BLOCK",
    "GROUPS",
    "Attention",
    "AttentionRows",
    "BeforeLM",
    "BeforeProcessor",
    "Bypass",
    "CacheView",
    "ClsAttention",
    "Cut",
    "Decision",
    "Evict",
    "FromLayer",
    "Groups",
    "ImageSize",
    "InCache",
    "InEncoder",
    "Keys",
    "Noise",
    "Question",
    "ReceivedAttention",
    "Rule",
    "Signal",
    "Site",
    "States",
    "ThroughLayer",
    "TowerKeys",
    "View",
    "Visibility",
    "Visible",
    "Workload",
    "content_keys",
    "products",
]
