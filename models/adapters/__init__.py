"""Adapters: a few new parameters grafted on a model whose own stay as they are.

    tuned = models.adapted(model, models.adapters.lora(rank=8), model.paths("attention"))
    adapter = tuned.init(key)
    logits = tuned.apply(base, adapter, x)
    params = tuned.merge(base, adapter)      # an ordinary model again

| adapter | what it adds | starts neutral | can be merged |
| --- | --- | --- | --- |
| `lora` | a product of two thin matrices to a dense layer's | yes | yes |
| `scale_shift` | a factor and a term to every output channel of a layer | yes | yes |
| `bottleneck` | a narrow perceptron behind a dense layer | yes | no |
| `prompt` | tokens before those of a transformer | no | no |
"""

from models.adapters._graft import Adapted, Adapter, adapted
from models.adapters.bottleneck import bottleneck
from models.adapters.lora import lora
from models.adapters.prompt import prompt
from models.adapters.scale_shift import scale_shift

__all__ = ["Adapted", "Adapter", "adapted", "bottleneck", "lora", "prompt", "scale_shift"]
