"""The assembled vision-language model. Importing this makes it known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from foveate.model.assembly import from_backbones
from foveate.model.configuration import FoveateConfig
from foveate.model.modeling import FoveateForConditionalGeneration, FoveateModel
from foveate.model.processing import FoveateProcessor
from foveate.model.towers import Towers
from foveate.real.efficientnet import EfficientNetLite
from foveate.real.lcnet import LCNet

AutoConfig.register("foveate", FoveateConfig, exist_ok=True)
AutoModel.register(FoveateConfig, FoveateModel, exist_ok=True)
AutoModelForImageTextToText.register(FoveateConfig, FoveateForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FoveateConfig, FoveateProcessor, exist_ok=True)
for tower in (EfficientNetLite, LCNet, Towers):
    AutoConfig.register(tower.config_class.model_type, tower.config_class, exist_ok=True)
    AutoModel.register(tower.config_class, tower, exist_ok=True)

__all__ = ["FoveateConfig", "FoveateForConditionalGeneration", "FoveateModel", "FoveateProcessor", "from_backbones"]
