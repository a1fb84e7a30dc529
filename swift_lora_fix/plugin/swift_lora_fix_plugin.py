"""For ms-swift: ``--external_plugins "$(swift-lora-fix plugin)"``.

It is alone in its folder, because ms-swift puts that folder first on ``sys.path``. ms-swift also runs it in each
dataloader worker: there importing the package, which arms it lazily, is enough.
"""

import multiprocessing

import swift_lora_fix

if multiprocessing.parent_process() is None:
    swift_lora_fix.apply()
