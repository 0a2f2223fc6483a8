"""The assembled vision-language model. Importing this makes it known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from foveate.model.assembly import from_backbones
from foveate.model.configuration import FoveateConfig
from foveate.model.modeling import FoveateForConditionalGeneration, FoveateModel
from foveate.model.processing import FoveateProcessor

AutoConfig.register("foveate", FoveateConfig, exist_ok=True)
AutoModel.register(FoveateConfig, FoveateModel, exist_ok=True)
AutoModelForImageTextToText.register(FoveateConfig, FoveateForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FoveateConfig, FoveateProcessor, exist_ok=True)

__all__ = ["FoveateConfig", "FoveateForConditionalGeneration", "FoveateModel", "FoveateProcessor", "from_backbones"]
