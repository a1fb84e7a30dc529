"""What is patched for the dense LoRA layers. Importing this module loads neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from ....common.settings import Settings
from ....install.instrumentor import Arming, Instrumentor

MODEL_MANAGER = "vllm.lora.model_manager"


class DenseLayers(Instrumentor):
    """vLLM's making of LoRA layers, in every process that holds an engine's model.

    is_for_a_trainer: whether this process makes the rollouts of a trainer that this package serves. Layers that nobody
        asked for by name are made dense only then: nobody else's vLLM is touched.
    """

    triggers = (MODEL_MANAGER,)
    otherwise = "vLLM's own LoRA kernels compute the adapter"

    def __init__(self, arming: Arming, is_for_a_trainer: Callable[[], bool]) -> None:
        super().__init__(arming)
        self._is_for_a_trainer = is_for_a_trainer

    def watch(self) -> None:
        if Settings.from_environment().kernels != "vllm":
            super().watch()

    def instrument(self, module: ModuleType) -> None:
        from . import hooks

        hooks.is_for_a_trainer = self._is_for_a_trainer
        self.patch_sets = (hooks.LAYERS,)
        hooks.LAYERS.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        """Whether these layers were asked for, not whether the patches of the trainer were."""
        return Settings.from_environment().kernels == "dense"
