"""Registers the models with the Auto classes of transformers, when it is imported.

The package imports it with the first of its names that has to do with models, and at once where transformers is there
already, so that `import evatok_hf` alone stays light for what reads videos and for `evatok --help`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

# Not from `transformers` itself, which hides the class where torchvision is missing.
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .models.configuration_evatok import EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
from .models.modeling_evatok import EvatokModel
from .models.modeling_evatok_generator import EvatokForCausalLM
from .models.modeling_evatok_router import EvatokRouter
from .models.video_processing_evatok import EvatokVideoProcessor

for config in (EvatokConfig, EvatokRouterConfig, EvatokGeneratorConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
AutoModel.register(EvatokConfig, EvatokModel, exist_ok=True)
AutoModel.register(EvatokRouterConfig, EvatokRouter, exist_ok=True)
AutoModelForCausalLM.register(EvatokGeneratorConfig, EvatokForCausalLM, exist_ok=True)
AutoVideoProcessor.register(EvatokConfig, EvatokVideoProcessor, exist_ok=True)
