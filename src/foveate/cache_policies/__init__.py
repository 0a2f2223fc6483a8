"""The cache policies, one file each, one line below each: what stays of a layer's keys and values once a prompt has gone through it."""

from __future__ import annotations

from foveate.cache_policies.base import CachePolicy as CachePolicy
from foveate.reducers.spelling import listed, read

# The policies in the order of tables: the baseline, then papers by date. A line both exports a policy and lists it.
# isort: off
from foveate.cache_policies.random import RandomEviction as RandomEviction
from foveate.cache_policies.snapkv import SnapKV as SnapKV
from foveate.cache_policies.pyramidkv import PyramidKV as PyramidKV
from foveate.cache_policies.lookm import LookM as LookM
from foveate.cache_policies.zipvl import ZipVL as ZipVL
from foveate.cache_policies.prefixkv import PrefixKV as PrefixKV
# isort: on

POLICIES: dict[str, type[CachePolicy]] = listed(globals(), CachePolicy)


def parse(text: str) -> CachePolicy | None:
    """A policy from its spelling, such as "snapkv:keep=0.5,window=32"; "" and "none" give None. FoveateError for what is not known."""
    return None if text.strip() in ("", "none") else read(text, "cache policy", POLICIES)
