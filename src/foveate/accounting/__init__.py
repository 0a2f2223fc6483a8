"""What a run costs: predicted from a configuration, observed from what was done, counted as it happens."""

from foveate.accounting.ledger import CONVENTION, PARTS, Ledger, Trained, answered, summed, together
from foveate.accounting.predict import observed, predict
from foveate.accounting.prompts import Prompt, image_shape, image_tokens, read_prompts
from foveate.accounting.stack import Stack, decoder, lora_per_layer, parameters, trainable

__all__ = [
    "CONVENTION",
    "PARTS",
    "Ledger",
    "Prompt",
    "Stack",
    "Trained",
    "answered",
    "decoder",
    "image_shape",
    "image_tokens",
    "lora_per_layer",
    "observed",
    "parameters",
    "predict",
    "read_prompts",
    "summed",
    "together",
    "trainable",
]
