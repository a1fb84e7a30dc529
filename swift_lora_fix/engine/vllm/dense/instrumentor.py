"""What is patched for the dense LoRA layers. Importing this module loads neither torch nor vLLM."""

from __future__ import annotations

from types import ModuleType

from ....common.settings import Settings
from ....install.instrumentor import Instrumentor

MODEL_MANAGER = "vllm.lora.model_manager"


class DenseLayers(Instrumentor):
    """vLLM's making of LoRA layers, in every process that holds an engine's model."""

    triggers = (MODEL_MANAGER,)
    otherwise = "vLLM's own LoRA kernels compute the adapter"

    def watch(self) -> None:
        """Only where these layers are asked for: nobody else's vLLM is touched."""
        if self.is_asked_for_by_name:
            super().watch()

    def instrument(self, module: ModuleType) -> None:
        from . import hooks

        self.patch_sets = (hooks.LAYERS,)
        hooks.LAYERS.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        """Whether these layers were asked for, not whether the patches of the trainer were."""
        return Settings.from_environment().kernels == "dense"
