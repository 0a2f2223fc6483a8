"""Models that the setting would not reach: vLLM asks here when it makes their configuration, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    from vllm.model_executor.models.config import VerifyAndUpdateConfig as _Base


class Unknown(_Base):
    """Comes in front of what vLLM checks of an architecture. Without the setting it does what that does."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        from foveate.integrations.vllm.setting import refuse_unknown

        refuse_unknown(model_config.architecture, model_config.hf_config)
        super().verify_and_update_model_config(model_config)


def watch(architectures: Iterable[str]) -> None:
    """Puts `Unknown` in front of what vLLM checks of each of these; once, however often it is called."""
    for name in architectures:
        own: Any = MODELS_CONFIG_MAP.get(name)
        if own is None:
            MODELS_CONFIG_MAP[name] = Unknown
        elif not issubclass(own, Unknown):
            MODELS_CONFIG_MAP[name] = type(own.__name__, (Unknown, own), {"__module__": __name__})
