"""Tiny vocabularies: ms-swift's templates of Qwen-VL and Gemma 3 have the ids of those models' own tokens for images
and videos written into them.

The tests' tokenizer has the same tokens at other places.
"""

import wrapt


@wrapt.when_imported("swift.template.templates.qwen")
def _read_ids(module):
    original = module.Qwen2VLTemplate.init_env_args

    def init_env_args(self):
        original(self)
        config = getattr(self.config, "thinker_config", self.config)  # Omni's
        self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id

    module.Qwen2VLTemplate.init_env_args = init_env_args


@wrapt.when_imported("swift.template.templates.gemma")
def _read_gemmas_ids(module):
    module.Gemma3VisionTemplate.boi_token_id = property(lambda self: self.config.boi_token_index)
